"""Data types of a library: records of videos, rows of frames, hits, reports."""

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
    """The subject vectors of one video."""

    row: I64  # [S] int64, rising: the frames that have a subject vector
    vectors: F32  # [S, D] float32, unit length; stored as float16
    region: F32  # [T, 4] float32, of every frame: x, y, width, height as fractions; stored as float16

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Rows:
    """The sampled frames of one video, in order of time."""

    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    vectors: F32  # [T, D] float32, unit length, scene vectors; stored as float16
    shot: I64  # [T] int64, number of the shot
    keyframe: BOOL  # [T] bool
    weight: F32  # [T] float32 in 0..1, importance
    subjects: Subjects | None = None  # None: indexed without subjects
    digest: int | None = None  # of the stored rows; set when they were read

    def __len__(self) -> int:
        return len(self.pts_seconds)

    @property
    def counts(self) -> tuple[int, int | None]:
        """The numbers `frames` and `subjects` of the record."""
        return len(self), None if self.subjects is None else len(self.subjects)


@dataclass(frozen=True, slots=True)
class Preview:
    """The picture of a key-frame, with its attention map."""

    pts_seconds: float
    jpeg: bytes
    attention: F32  # [P] float32, sums to 1; `Record.grid` is its shape


@dataclass(frozen=True, slots=True)
class Extras:
    """What a page or player shows of a video, besides its key-frames."""

    sprite: bytes  # JPEG sheet of thumbnails, evenly spaced over the video
    vtt: str  # WebVTT: the part of the sprite for each span of time
    overview: Mapping[str, Any]  # for each key-frame: pts_seconds, frame_index, cluster, weight, score, quality, shot


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One video of a library."""

    id: str  # stays when the file moves or changes
    path: str  # absolute path or URL
    size: int  # bytes
    mtime_ns: int  # of the file
    fingerprint: str  # of the content, see files.fingerprint
    generation: str = ""  # name of its rows, new with each writing; "" without rows
    frames: int = 0
    subjects: int | None = None  # number of subject vectors; None: indexed without subjects
    status: Status = "ok"
    error: str | None = None  # why it failed
    hint: str | None = None
    tags: tuple[str, ...] = ()
    date: float | None = None  # recording time by the file's metadata, seconds since 1970; None without one
    duration_seconds: float | None = None
    indexed_at: float  # seconds since 1970
    probe: Mapping[str, Any] = field(default_factory=dict)  # fields of VideoInfo; empty if the video failed
    grid: tuple[int, int] = (0, 0)  # (h, w) of the attention maps
    shots: tuple[tuple[float, float], ...] = ()  # [start, stop) in seconds
    scenes: tuple[tuple[float, float], ...] = ()  # [start, stop) in seconds; empty if an older keyreel indexed it
    # Digest of its rows when written; None if an older keyreel wrote them.
    digest: int | None = field(default=None, compare=False)
    model: str
    model_sha256: str

    @property
    def rows(self) -> int:
        """The number of its vectors."""
        return self.frames + (self.subjects or 0)

    def describes(self, rows: Rows) -> bool:
        """Whether rows that were read are all of its rows, undamaged."""
        return rows.counts == (self.frames, self.subjects) and self.digest in (None, rows.digest)


@dataclass(frozen=True, slots=True)
class LibraryHit(SearchHit):
    """A moment of a video in a library. `video` is the path; see SearchHit for times and score."""

    video_id: str = ""
    keyframe_seconds: float = 0.0  # time of the nearest key-frame, if possible of the same shot
    video_score: float = 0.0  # score of the video
    folded: int = 0  # how many near-duplicates in other videos it hides
    more: int = 0  # at the last hit of a video: how many more good moments `Filter.per_video` hides


@dataclass(frozen=True, slots=True)
class VideoHit:
    """A video that answers a query."""

    video: str  # path
    video_id: str
    score: float  # of its best scene, see `ranking.pooled`
    moments: tuple[LibraryHit, ...]  # its best moments, best first


@dataclass(frozen=True, slots=True)
class Filter:
    """Restricts a search to some videos and times. Conditions that are not given do not restrict."""

    videos: Sequence[str] = ()  # ids or paths
    path: str | None = None  # glob over the whole path, "*/holiday/*.mp4"
    tags: Sequence[str] = ()  # videos with all of these tags
    start_seconds: float | None = None  # only frames in [start, stop) of their video
    stop_seconds: float | None = None
    min_duration_seconds: float | None = None
    max_duration_seconds: float | None = None
    after: float | None = None  # recorded at or after this time, seconds since 1970; see `Record.date`
    before: float | None = None  # recorded before this time
    per_video: int | None = None  # the most moments of one video


@dataclass(frozen=True, slots=True)
class Added:
    """The result of indexing a video."""

    path: str
    change: Change
    record: Record | None  # None if it was removed
    failure: Failure | None
    seconds: float  # how long it took


@dataclass(frozen=True, slots=True)
class Planned:
    """What indexing would do with a video, and why."""

    path: str
    change: Change
    why: str
    duration_seconds: float | None = None  # of a video to decode, by its headers
    failure: Failure | None = None  # why it would fail
    was: str | None = None  # the old path, if the video moved


@dataclass(frozen=True, slots=True)
class Finding:
    """Damage that `verify` found."""

    kind: str  # "unreadable", "incomplete", "orphans", "vectors", "manifest", ...
    what: str  # a message of one line
    videos: tuple[str, ...]  # paths of the affected videos
    repaired: bool


@dataclass(frozen=True, slots=True)
class LibraryStats:
    """Sizes of a library, and its model."""

    videos: int
    failed: int
    frames: int
    hours: float  # of video
    bytes: int | None  # on disk; None for a URI
    model: str
    model_sha256: str
    width: int  # D
