"""What a library holds and says: one record a video, rows a frame, hits, reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import Failure
from keyreel.types import F32, F64, I64, SearchHit

BOOL: TypeAlias = NDArray[np.bool_]
Status = Literal["ok", "failed"]
Change = Literal["added", "changed", "moved", "copied", "unchanged", "failed", "missing"]


@dataclass(frozen=True, slots=True)
class Preview:
    """A key-frame as a picture, with what the model attended to."""

    pts_seconds: float
    jpeg: bytes
    attention: F32  # [P] float32, sums to 1; the grid stands in the record


@dataclass(frozen=True, slots=True)
class Rows:
    """The sampled frames of one video, in order of time."""

    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    vectors: F32  # [T, D] float32, unit length; stored in 16 bits
    shot: I64  # [T] int64, number of the shot
    weight: F32  # [T] float32 in 0..1, importance
    previews: tuple[Preview, ...]  # of the key-frames, in order of time

    def __post_init__(self) -> None:
        count = len(self.pts_seconds)
        arrays = {name: getattr(self, name) for name in ("frame_index", "vectors", "shot", "weight")}
        if wrong := {name: array.shape for name, array in arrays.items() if len(array) != count}:
            raise ValueError(f"Rows: {count} times, but {wrong}")
        if unknown := {preview.pts_seconds for preview in self.previews} - set(self.pts_seconds.tolist()):
            raise ValueError(f"Rows: previews of frames that are not there, at {sorted(unknown)}")

    def __len__(self) -> int:
        return len(self.pts_seconds)


@dataclass(frozen=True, slots=True)
class Extras:
    """What is kept of a video for a page or a player, besides its rows."""

    sprite: bytes  # JPEG of small pictures, evenly spaced over the video
    vtt: str  # WebVTT: which part of the sprite shows which second
    overview: Mapping[str, Any]  # of the key-frames: pts_seconds, frame_index, cluster, weight, score, quality, shot


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one generation as they are stored, in order of time, without their pictures."""

    generation: str
    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    vectors: F32  # [T, D] float32, stored in 16 bits and made unit length again
    shot: I64  # [T] int64
    keyframe: BOOL  # [T] bool: which of them are key-frames
    weight: F32  # [T] float32

    def __len__(self) -> int:
        return len(self.pts_seconds)


@dataclass(frozen=True, slots=True)
class Record:
    """One video of a library."""

    id: str  # stays the same when the file moves or changes
    path: str  # absolute path or URL
    size: int  # bytes
    mtime_ns: int  # of the file
    fingerprint: str  # of the content, see files.fingerprint
    generation: str  # of its rows: a new one with each time that they are written; "" where there are none
    frames: int  # rows
    status: Status
    error: str | None  # why it failed
    hint: str | None
    tags: tuple[str, ...]
    date: float | None  # seconds since 1970: when it was recorded where the file says so, else when it was last changed
    duration_seconds: float | None
    indexed_at: float  # seconds since 1970
    probe: Mapping[str, Any]  # fields of VideoInfo, empty where it failed
    grid: tuple[int, int]  # (h, w) of the attention maps
    shots: tuple[tuple[float, float], ...]  # [start, stop) in seconds
    model: str
    model_sha256: str


@dataclass(frozen=True, slots=True)
class LibraryHit(SearchHit):
    """A moment of a video in a library. `video` is its path; times and score as in SearchHit."""

    video_id: str = ""
    keyframe_seconds: float = 0.0  # the key-frame that shows it: the nearest one in its shot, else the nearest
    video_score: float = 0.0  # the video's pooled score
    folded: int = 0  # near-duplicate moments of other videos that this one stands for


@dataclass(frozen=True, slots=True)
class VideoHit:
    """A video that answers a query."""

    video: str  # path
    video_id: str
    score: float  # sum of softmax(s / tau) s over its frames' cosines s (CLIP-Hitchhiker, Bain et al. 2022)
    moments: tuple[LibraryHit, ...]  # its best ones, best first


@dataclass(frozen=True, slots=True)
class Example:
    """A frame of a video in the library, as a query."""

    video: str  # id or path
    seconds: float


@dataclass(frozen=True, slots=True)
class Filter:
    """Which videos and times a search looks at; what is not given does not restrict."""

    videos: Sequence[str] = ()  # ids or paths
    path: str | None = None  # glob over the whole path, "*/holiday/*.mp4"
    tags: Sequence[str] = ()  # all of them
    start_seconds: float | None = None  # frames in [start, stop) of their video
    stop_seconds: float | None = None
    min_duration_seconds: float | None = None
    max_duration_seconds: float | None = None
    after: float | None = None  # date, seconds since 1970, inclusive
    before: float | None = None  # exclusive


@dataclass(frozen=True, slots=True)
class Added:
    """What became of one video."""

    path: str
    change: Change
    record: Record | None  # None where it is gone
    failure: Failure | None
    seconds: float  # that it took


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that `verify` found wrong."""

    kind: str  # "unreadable", "incomplete", "orphans", "vectors", "manifest", ...
    what: str  # one line for people
    videos: tuple[str, ...]  # paths of the videos that it touches
    repaired: bool


@dataclass(frozen=True, slots=True)
class LibraryStats:
    """Sizes of a library."""

    videos: int
    failed: int
    frames: int
    hours: float  # of video
    bytes: int | None  # on disk; None where the store cannot tell
    model: str
    model_sha256: str
    width: int  # D
