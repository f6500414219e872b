"""The values that flow between the stages: frozen, checked when made, times on the CPU.

Letters: T frames, P patches (grid h x w), D embedding width, H x W pixels. Times are float64 seconds from the start
of the video stream; spans are half-open, [start, stop).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from keyreel.config import OutputConfig, ReelMode, ReelOrder, ReframeMode, output_config
from keyreel.tables import Tabular, table_of

U8: TypeAlias = NDArray[np.uint8]
F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]

Progress: TypeAlias = Callable[[str, float, float | None], None]
"""progress(stage, done, total): called from the working thread, in seconds of video or in items; total may be None."""

# Of scene and subject in `Embedding.joint`: the subject is a quarter of the cosine. With a half, fewer of eight real
# clips in a row got a key-frame (95.0 % against 96.2 %, K = 8).
JOINT = np.sqrt(np.array([0.75, 0.25], np.float32))

AnsweredBy: TypeAlias = Literal["scene", "subject"]

Region: TypeAlias = tuple[float, float, float, float]
"""(x, y, width, height) of a part of a picture, as shares of its width and height."""


@dataclass(frozen=True, slots=True)
class Example:
    """A frame of a video in a library, as a query."""

    video: str  # id or path
    seconds: float


Query: TypeAlias = str | os.PathLike[str] | NDArray[Any] | Example
"""A text; a picture, as the path of a file or as [H, W, 3] uint8 RGB; in a library also a frame of it."""


@dataclass(frozen=True, slots=True)
class Combined:
    """A query with conditions: `Combined("a dog", also=["snow"], without=["indoors"])`.

    Texts must fit too, or not. Pictures, and in a library frames as `Example`, move the answer: more like these, less
    like those.
    """

    query: Query
    also: Sequence[Query] = ()
    without: Sequence[Query] = ()

    def __post_init__(self) -> None:
        for name in ("also", "without"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"Combined.{name} must be a list of queries, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, query: Query | Combined) -> Combined:
        """The query itself, or one without conditions."""
        return query if isinstance(query, Combined) else cls(query)

    @property
    def parts(self) -> tuple[Query, ...]:
        """The query and all conditions."""
        return self.query, *self.also, *self.without

    @property
    def texts(self) -> list[str]:
        """Those of the parts that are texts, each once."""
        return list(dict.fromkeys(part for part in self.parts if isinstance(part, str)))


def _check_lengths(owner: Any) -> None:
    arrays = {own.name: getattr(owner, own.name) for own in fields(owner)}
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if hasattr(array, "shape")}
    if len({shape[:1] for shape in shapes.values()}) > 1:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{type(owner).__name__}: leading dimensions must agree, got {text}")


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A file's video stream, in display orientation."""

    path: str  # as given; "<bytes>", "<stream>" or "<stdin>" where there is none
    duration_seconds: float | None  # None where neither container nor stream knows
    width: int  # pixels, after sample aspect and rotation
    height: int  # pixels, after sample aspect and rotation
    codec: str  # FFmpeg's name of the codec, "h264"
    pixel_format: str  # FFmpeg's name of the coded format, "yuv420p10le"
    rotation_degrees: int  # 0, 90, 180, 270: how far the coded picture is turned clockwise to be shown
    average_fps: float | None  # an average only; pts are the clock
    has_audio: bool
    transfer: str  # "sdr", "pq" or "hlg"

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Decoded frames with their times."""

    data: U8  # [T, H, W, 3] uint8 RGB (sRGB/BT.709 transfer), display orientation; a CuPy array on a CUDA device
    pts_seconds: F64  # [T] float64, from the stream's start; rising in stream order, as asked for with `times`
    frame_index: I64  # [T] int64, place of the frame in display order, from 0

    def __post_init__(self) -> None:
        _check_lengths(self)
        if self.data.ndim != 4 or self.data.shape[-1] != 3:
            raise ValueError(f"FrameBatch.data must be [T, H, W, 3], got {tuple(self.data.shape)}")

    def __len__(self) -> int:
        return int(self.data.shape[0])

    def __getitem__(self, rows: slice | Sequence[int] | I64) -> FrameBatch:
        # A list, since the data may be on a device and NumPy arrays are not.
        own = rows if isinstance(rows, slice) else np.asarray(rows, np.int64).tolist()
        return FrameBatch(self.data[own], self.pts_seconds[rows], self.frame_index[rows])

    def __repr__(self) -> str:
        span = f"{self.pts_seconds[0]:.3f}..{self.pts_seconds[-1]:.3f} s" if len(self) else "empty"
        return f"FrameBatch(data={tuple(self.data.shape)} {self.data.dtype}, {span})"


@dataclass(frozen=True, slots=True)
class Embedding(Tabular):
    """Two fused vectors a frame, and what was measured on the way."""

    vectors: F32  # [T, D] float32, unit length, in the text encoder's space: of the whole picture, stock CLIP
    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    attention: F32  # [T, P] float32, each row sums to 1: where the subject is
    grid: tuple[int, int]  # (h, w), h * w = P
    sharpness: F32  # [T] float32 >= 0: variance of the luma's Laplacian, luma in 0..1
    luma_mean: F32  # [T] float32 in 0..1
    luma_spread: F32  # [T] float32: standard deviation of the luma
    pixel_change: F32  # [T] float32 in 0..1: how far the colours differ from those of the frame before, 0 for the first
    layout_change: F32  # [T] float32 >= 0: the same of what is where, see `encode.layout_of`
    model: str  # name of the bundle
    model_sha256: str  # fingerprint of the bundle's manifest
    subject: F32 | None = None  # [T, D] float32, unit length: of what stands out or moves; None where it is off

    @property
    def scene(self) -> F32:
        """[T, D] float32: `vectors` by the name that tells them from `subject`."""
        return self.vectors

    @property
    def joint(self) -> F32:
        """[T, 2 D] float32, unit length: both as one. Its cosine is theirs, weighed; without subject `vectors`."""
        if self.subject is None:
            return self.vectors
        scene, subject = JOINT
        joint: F32 = np.concatenate([scene * self.vectors, subject * self.subject], axis=1)
        return joint

    def __post_init__(self) -> None:
        _check_lengths(self)
        if self.attention.shape[1:] != (self.grid[0] * self.grid[1],):
            raise ValueError(f"Embedding.attention {self.attention.shape} does not fit the grid {self.grid}")

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    def __repr__(self) -> str:
        return f"Embedding(vectors={tuple(self.vectors.shape)}, grid={self.grid}, model={self.model!r})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        frames, width = self.vectors.shape
        span = f", {self.pts_seconds.min():.1f} to {self.pts_seconds.max():.1f} s" if frames else ""
        both = "" if self.subject is None else ", with subject vectors"
        facts = f"{frames} frames x {width} numbers, float32, unit length{both}{span}"
        return f"<b>Embedding</b> {escape(facts)} <small>{escape(self.model)}</small>"

    def to_arrow(self) -> Any:
        """A pyarrow table: pts_seconds, frame_index, vector, subject (where there is one) and the picture signals.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        names = ("pts_seconds", "frame_index", "vectors", "subject", "sharpness", "luma_mean", "luma_spread")
        columns = {"vector" if name == "vectors" else name: getattr(self, name) for name in names}
        return table_of({name: values for name, values in columns.items() if values is not None})


@dataclass(frozen=True, slots=True)
class Shot:
    """A span between two cuts or fades, [start, stop)."""

    start_seconds: float
    stop_seconds: float

    @property
    def duration_seconds(self) -> float:
        return self.stop_seconds - self.start_seconds


@dataclass(frozen=True, slots=True)
class KeyFrame:
    """A frame that represents a cluster of frames."""

    pts_seconds: float
    frame_index: int  # place in display order
    cluster: int  # 0 .. K-1, in time order of the key-frames
    weight: float  # fraction of the sampled frames that it represents; the fractions sum to 1
    score: float  # cosine to the centroid of its cluster
    quality: float  # 0..1, rank of sharpness and exposure among the frames
    sample: int  # row of the frame in the Embedding


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A moment that answers a query, [start, stop) around its best frame."""

    video: str
    start_seconds: float
    stop_seconds: float
    pts_seconds: float  # the best frame's time
    score: float  # cosine between query and the best frame, or what stands for it where the subject answered
    preview: str | None = None  # path of a picture of the best frame, where one was written
    answered_by: AnsweredBy = "scene"  # which vector of the best frame answered
    region: Region | None = None  # where the subject of the best frame is; None where subjects are off
    chance: float | None = None  # in 0..1, that the best frame shows what a text says, see `keyreel.chance`


HitT = TypeVar("HitT", bound=SearchHit)


class Hits(list[HitT], Tabular, Generic[HitT]):
    """Moments, best first: a list that notebooks show with pictures, and that converts to a table."""

    def __init__(self, hits: Iterable[HitT] = (), show: Callable[[Sequence[HitT]], str] | None = None) -> None:
        super().__init__(hits)
        self._show = show  # makes HTML; it holds on to the videos, so copies of a pickle have none

    def __reduce__(self) -> Any:
        return Hits, (list(self),)

    def _repr_html_(self) -> str:
        """For notebooks: each moment's best frame, span, score and video."""
        return f"<pre>{escape(repr(self))}</pre>" if self._show is None else self._show(self)

    def to_arrow(self) -> Any:
        """A pyarrow table with a row for each moment and a column for each field of `SearchHit`.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        kind = type(self[0]) if self else SearchHit
        return table_of({own.name: [getattr(hit, own.name) for hit in self] for own in fields(kind)})


class SummaryActions(Protocol):
    """What a Summary can do with its video and its model; the Engine provides it."""

    def images(self, summary: Summary, max_height: int) -> list[U8]: ...
    def html(self, summary: Summary) -> str: ...
    def save(self, summary: Summary, folder: Path, output: OutputConfig, progress: Progress | None) -> Path: ...
    def render_reel(self, summary: Summary, path: Path, output: OutputConfig) -> tuple[Shot, ...]: ...
    def search(self, summary: Summary, query: Query | Combined, k: int) -> Hits[SearchHit]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Summary(Tabular):
    """Key-frames, shots and scenes of one video, and what they were computed from.

    Can be pickled. A copy still saves and renders if the video was a file; to search it, pass it to `Engine.search`.
    """

    video: VideoInfo
    embedding: Embedding
    keyframes: tuple[KeyFrame, ...]  # in time order, never empty
    shots: tuple[Shot, ...]  # in time order, together they cover the video
    scenes: tuple[Shot, ...]  # the same, of shots that show the same and parts of long ones, see `scenes.find_scenes`
    importance: F32  # [T] float32 in 0..1, of each sampled frame
    device: str  # "cpu", "cuda:0"
    device_reason: str  # why this device
    config: Mapping[str, Any]  # the options that were in force
    warnings: tuple[str, ...]
    timings_seconds: Mapping[str, float]  # decode, encode, fuse, select, total: busy time of each stage
    actions: SummaryActions = field(repr=False, compare=False)
    # [h, w, 3] uint8 RGB of the thumbnails whose frames were among the sampled ones, by their time in seconds
    thumbnails: Mapping[float, U8] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stop_seconds(self) -> float:
        """End of the analysed part of the video."""
        return self.shots[-1].stop_seconds

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Summary:
        """Reads a summary that was saved with `embeddings=True`.

        As a pickled copy, it saves and renders again if the video is still there, and `Engine.search` searches it.

        Raises:
            RenderError: there is no such summary, or its files are damaged.
        """
        # Values know nothing of files: the module is imported once somebody asks for it.
        loaded: Summary = import_module("keyreel.actions").load_summary(Path(folder))
        return loaded

    def save(
        self,
        folder: str | Path,
        output: OutputConfig | None = None,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> Path:
        """Writes summary.json, scenes.vtt, key-frames, contact sheet, storyboard, thumbnails and reel into `folder`.

        All files are made in a hidden folder beside it, which is then renamed: nothing half-written is left behind.

        Args:
            output: which files; the defaults of `config.OutputConfig`.
            progress: called with ("pictures" | "reel", done, total).
            options: fields of `config.OutputConfig` by name, as in `save("out", reel_seconds=30, embeddings=True)`.

        Returns:
            the folder.

        Raises:
            RenderError: an output cannot be made.
            TypeError: there is no such option; the message names similar ones.
        """
        return self.actions.save(self, Path(folder), output_config(output, options), progress)

    def images(self, *, max_height: int = 1080) -> list[U8]:
        """Decodes the key-frames: [H, W, 3] uint8 RGB each, upright, at most `max_height` pixels tall, in time order.

        Raises:
            SourceError, RenderError: the video cannot be read again.
        """
        return self.actions.images(self, max_height)

    def _repr_html_(self) -> str:
        """For notebooks: a timeline and the key-frames."""
        return self.actions.html(self)

    def to_arrow(self) -> Any:
        """A pyarrow table with a row for each key-frame: its fields, and the numbers of its shot and scene from 0.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        names = ("pts_seconds", "frame_index", "cluster", "weight", "score", "quality")
        columns: dict[str, Any] = {"video": [self.video.path] * len(self.keyframes)}
        columns |= {name: [getattr(frame, name) for frame in self.keyframes] for name in names}
        times = columns["pts_seconds"]
        for name, spans in (("shot", self.shots), ("scene", self.scenes)):
            starts = [span.start_seconds for span in spans]
            columns[name] = (np.searchsorted(starts, times, side="right") - 1).clip(0)
        return table_of(columns)

    def render_reel(
        self,
        path: str | Path,
        *,
        seconds: float | None = None,
        query: str | None = None,
        mode: ReelMode = "auto",
        order: ReelOrder = "time",
        aspect: str | None = None,
        reframe: ReframeMode = "follow",
    ) -> tuple[Shot, ...]:
        """Writes a video of the spans around the key-frames, or around what `query` finds; returns the spans.

        Args:
            path: ends in .mp4, or in .mkv where the packets of VP8 or VP9 are copied.
            seconds: length of the reel at most; 15 % of the video within 10 to 60 s, at most half, by default.
            mode: "copy" takes the video's packets as they are, "encode" makes H.264 and AAC of them, "auto" copies
                where that is possible. Copying moves the ends of the spans by up to 0.75 s.
            order: of the spans with a query; "score" begins with the best.
            aspect: shape of the reel, "9:16", "1:1" or another width:height; None for that of the video.
            reframe: with `aspect`, "follow" cuts out what the subject map marks, "fit" shows whole frames.

        Raises:
            RenderError: the reel cannot be made, or would be most of the video again.
            ValueError: an aspect or a mode that does not exist.
        """
        output = OutputConfig(
            reel_seconds=seconds, query=query, reel_mode=mode, order=order, aspect=aspect, reframe=reframe
        )
        return self.actions.render_reel(self, Path(path), output)

    def search(self, query: Query | Combined, *, k: int = 5) -> Hits[SearchHit]:
        """The k best moments of this video that answer a text or a picture, best first."""
        return self.actions.search(self, query, k)

    def close(self) -> None:
        """Deletes the temporary copy of a video that came as a stream; then nothing can be rendered. Idempotent."""
        self.actions.close()
