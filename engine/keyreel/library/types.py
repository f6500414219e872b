"""The values of a library: one record a video, rows of frames, hits, reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import Failure
from keyreel.types import F32, F64, I64, SearchHit

BOOL: TypeAlias = NDArray[np.bool_]
F16: TypeAlias = NDArray[np.float16]
I32: TypeAlias = NDArray[np.int32]
Status = Literal["ok", "failed"]
Change = Literal["added", "changed", "moved", "copied", "unchanged", "failed", "missing"]


@dataclass(frozen=True, slots=True)
class Subjects:
    """The subjects of one video's frames."""

    row: I64  # [S] int64, rising: which frames have a vector of their own here
    vectors: F32  # [S, D] float32, unit length; stored in 16 bits
    region: F32  # [T, 4] float32, of every frame: x, y, width, height as shares of the picture; stored in 16 bits

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Rows:
    """The sampled frames of one video, in order of time."""

    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    vectors: F32  # [T, D] float32, unit length, of the scenes; stored in 16 bits
    shot: I64  # [T] int64, number of the shot
    keyframe: BOOL  # [T] bool
    weight: F32  # [T] float32 in 0..1, importance
    subjects: Subjects | None = None  # None: indexed without
    digest: int | None = None  # of what is stored, where it was read from a library

    def __len__(self) -> int:
        return len(self.pts_seconds)

    @property
    def counts(self) -> tuple[int, int | None]:
        """`frames` and `subjects` of their record."""
        return len(self), None if self.subjects is None else len(self.subjects)


@dataclass(frozen=True, slots=True)
class Preview:
    """A key-frame as a picture, with the model's attention map."""

    pts_seconds: float
    jpeg: bytes
    attention: F32  # [P] float32, sums to 1; `Record.grid` is its shape


@dataclass(frozen=True, slots=True)
class Extras:
    """What a page or a player shows of a video, besides its key-frames."""

    sprite: bytes  # JPEG of small pictures, evenly spaced over the video
    vtt: str  # WebVTT: which part of the sprite shows which second
    overview: Mapping[str, Any]  # of the key-frames: pts_seconds, frame_index, cluster, weight, score, quality, shot


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One video of a library."""

    id: str  # stays the same when the file moves or changes
    path: str  # absolute path or URL
    size: int  # bytes
    mtime_ns: int  # of the file
    fingerprint: str  # of the content, see files.fingerprint
    generation: str = ""  # names its rows, a new one each time that they are written; "" without rows
    frames: int = 0
    subjects: int | None = None  # how many frames have a subject's vector, too; None: indexed without subjects
    status: Status = "ok"
    error: str | None = None  # why indexing failed
    hint: str | None = None
    tags: tuple[str, ...] = ()
    date: float | None = None  # recording time from the file's metadata, seconds since 1970; None if it has none
    duration_seconds: float | None = None
    indexed_at: float  # seconds since 1970
    probe: Mapping[str, Any] = field(default_factory=dict)  # fields of VideoInfo; empty if indexing failed
    grid: tuple[int, int] = (0, 0)  # (h, w) of the attention maps
    shots: tuple[tuple[float, float], ...] = ()  # [start, stop) in seconds
    scenes: tuple[tuple[float, float], ...] = ()  # [start, stop) in seconds; none where an older keyreel indexed it
    # Of its rows as they were written; None of those that an older keyreel wrote.
    digest: int | None = field(default=None, compare=False)
    model: str
    model_sha256: str

    @property
    def rows(self) -> int:
        """How many vectors it has."""
        return self.frames + (self.subjects or 0)


@dataclass(frozen=True, slots=True)
class LibraryHit(SearchHit):
    """A moment of a video in a library. `video` is its path; times and score as in SearchHit."""

    video_id: str = ""
    keyframe_seconds: float = 0.0  # the nearest key-frame in its shot, else the nearest
    video_score: float = 0.0  # the video's pooled score
    folded: int = 0  # near-duplicate moments of other videos that are hidden behind this one
    more: int = (
        0  # on the last one of a video: moments that `Filter.per_video` hides, and that are better than the last hit
    )


@dataclass(frozen=True, slots=True)
class VideoHit:
    """A video as the answer to a query."""

    video: str  # path
    video_id: str
    score: float  # of its best scene, see `ranking.pooled`
    moments: tuple[LibraryHit, ...]  # its best ones, best first


@dataclass(frozen=True, slots=True)
class Filter:
    """Restricts a search to some videos and times."""

    videos: Sequence[str] = ()  # ids or paths
    path: str | None = None  # glob over the whole path, "*/holiday/*.mp4"
    tags: Sequence[str] = ()  # all of them
    start_seconds: float | None = None  # frames in [start, stop) of their video
    stop_seconds: float | None = None
    min_duration_seconds: float | None = None
    max_duration_seconds: float | None = None
    after: float | None = None  # recorded at this time or later, in seconds since 1970; see `Record.date`
    before: float | None = None  # recorded before this time
    per_video: int | None = None  # of one video, so many moments are shown at most; the best ones


@dataclass(frozen=True, slots=True)
class Added:
    """The result of indexing one video."""

    path: str
    change: Change
    record: Record | None  # None once it is removed
    failure: Failure | None
    seconds: float  # time taken


@dataclass(frozen=True, slots=True)
class Planned:
    """What indexing one video would do."""

    path: str
    change: Change
    why: str
    duration_seconds: float | None = None  # of a video that would be decoded, as its headers say
    failure: Failure | None = None  # what is wrong with it already
    was: str | None = None  # the path before, of a video that moved


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem that `verify` found."""

    kind: str  # "unreadable", "incomplete", "orphans", "vectors", "manifest", ...
    what: str  # one line for people
    videos: tuple[str, ...]  # paths of the affected videos
    repaired: bool


@dataclass(frozen=True, slots=True)
class LibraryStats:
    """Sizes of a library."""

    videos: int
    failed: int
    frames: int
    hours: float  # of video
    bytes: int | None  # on disk; None for a URI
    model: str
    model_sha256: str
    width: int  # D
