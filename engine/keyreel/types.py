"""Data types of the pipeline: frozen dataclasses that check their values. Times are always NumPy arrays on the CPU.

Letters: T frames, P patches (grid h x w), D embedding width, H x W pixels. Times are float64 seconds from the start of
the video stream. Spans are half-open: [start, stop).
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
"""progress(stage, done, total), called from the working thread. `done` and `total` count seconds of video, or items.
`total` is None if it is unknown."""

# Factors of scene and subject in `Embedding.joint`: the subject makes a quarter of the cosine. With a half, fewer of
# eight joined real clips got a key-frame (95.0 % instead of 96.2 %, K = 8).
JOINT = np.sqrt(np.array([0.75, 0.25], np.float32))

AnsweredBy: TypeAlias = Literal["scene", "subject"]

Region: TypeAlias = tuple[float, float, float, float]
"""(x, y, width, height) of a part of a picture, as fractions of its width and height, from the upper left."""


@dataclass(frozen=True, slots=True)
class Example:
    """A query: the frame of a library's video that is shown at a time."""

    video: str  # id or path of a video in the library
    seconds: float


Query: TypeAlias = str | os.PathLike[str] | NDArray[Any] | Example
"""A text; a picture: a path, or [H, W, 3] uint8 RGB; for a library also one of its frames, as an `Example`."""


@dataclass(frozen=True, slots=True)
class Combined:
    """A query with conditions: `Combined("a dog", also=["snow"], without=["indoors"])`.

    A moment must also show what the texts of `also` say, and must not show what those of `without` say. Pictures, and
    frames of a library (`Example`), steer the search: `also` finds more like them, `without` less.
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
        """Wraps a query that has no conditions; returns a `Combined` unchanged."""
        return query if isinstance(query, Combined) else cls(query)

    @property
    def parts(self) -> tuple[Query, ...]:
        """The query, then its conditions."""
        return self.query, *self.also, *self.without

    @property
    def texts(self) -> list[str]:
        """The texts among the parts, without repeats."""
        return list(dict.fromkeys(part for part in self.parts if isinstance(part, str)))


def _check_lengths(owner: Any) -> None:
    arrays = {own.name: getattr(owner, own.name) for own in fields(owner)}
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if hasattr(array, "shape")}
    if len({shape[:1] for shape in shapes.values()}) > 1:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{type(owner).__name__}: leading dimensions must agree, got {text}")


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Facts about a video stream. Sizes are those of the upright picture, as a player shows it."""

    path: str  # as given; "<bytes>", "<stream>" or "<stdin>" where there is none
    duration_seconds: float | None  # None if neither container nor stream states it
    width: int  # pixels, after sample aspect and rotation
    height: int  # pixels, after sample aspect and rotation
    codec: str  # FFmpeg's name of the codec, "h264"
    pixel_format: str  # FFmpeg's name of the coded format, "yuv420p10le"
    rotation_degrees: int  # 0, 90, 180 or 270: a player turns the coded picture clockwise by this
    average_fps: float | None  # a rough value; keyreel counts time by pts, never by this
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
    pts_seconds: F64  # [T] float64, from the stream's start; rising, except for mode `times`: in the order of its times
    frame_index: I64  # [T] int64, number of the frame in display order, from 0

    def __post_init__(self) -> None:
        _check_lengths(self)
        if self.data.ndim != 4 or self.data.shape[-1] != 3:
            raise ValueError(f"FrameBatch.data must be [T, H, W, 3], got {tuple(self.data.shape)}")

    def __len__(self) -> int:
        return int(self.data.shape[0])

    def __getitem__(self, rows: slice | Sequence[int] | I64) -> FrameBatch:
        # A list: CuPy data cannot be indexed with NumPy arrays.
        own = rows if isinstance(rows, slice) else np.asarray(rows, np.int64).tolist()
        return FrameBatch(self.data[own], self.pts_seconds[rows], self.frame_index[rows])

    def __repr__(self) -> str:
        span = f"{self.pts_seconds[0]:.3f}..{self.pts_seconds[-1]:.3f} s" if len(self) else "empty"
        return f"FrameBatch(data={tuple(self.data.shape)} {self.data.dtype}, {span})"


@dataclass(frozen=True, slots=True)
class Embedding(Tabular):
    """The vectors of a video's sampled frames, with the attention maps and picture signals."""

    vectors: F32  # [T, D] float32, unit length: whole pictures, in the space of CLIP's text vectors
    pts_seconds: F64  # [T] float64
    frame_index: I64  # [T] int64
    attention: F32  # [T, P] float32, each row sums to 1: high where the subject is
    grid: tuple[int, int]  # (h, w), h * w = P
    sharpness: F32  # [T] float32 >= 0: variance of the luma's Laplacian, luma in 0..1
    luma_mean: F32  # [T] float32 in 0..1
    luma_spread: F32  # [T] float32: standard deviation of the luma
    pixel_change: F32  # [T] float32 in 0..1: difference of the colours from the previous frame's; 0 for the first
    layout_change: F32  # [T] float32 >= 0: difference of the layout, see `encode.layout_of`
    model: str  # name of the bundle
    model_sha256: str  # sha256 of the bundle's manifest
    subject: F32 | None = None  # [T, D] float32, unit length: what stands out or moves; None if off

    @property
    def scene(self) -> F32:
        """[T, D] float32: another name of `vectors`, the counterpart of `subject`."""
        return self.vectors

    @property
    def joint(self) -> F32:
        """[T, 2 D] float32, unit length: scene and subject joined; without subjects, `vectors`.

        A cosine of two rows is 3/4 of the scenes' cosine plus 1/4 of the subjects'.
        """
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
        """HTML for notebooks."""
        frames, width = self.vectors.shape
        span = f", {self.pts_seconds.min():.1f} to {self.pts_seconds.max():.1f} s" if frames else ""
        both = "" if self.subject is None else ", with subject vectors"
        facts = f"{frames} frames x {width} numbers, float32, unit length{both}{span}"
        return f"<b>Embedding</b> {escape(facts)} <small>{escape(self.model)}</small>"

    def to_arrow(self) -> Any:
        """Makes a pyarrow table, a row for each frame.

        Columns: pts_seconds, frame_index, vector, subject (unless it is None), sharpness, luma_mean, luma_spread.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        names = ("pts_seconds", "frame_index", "vectors", "subject", "sharpness", "luma_mean", "luma_spread")
        columns = {"vector" if name == "vectors" else name: getattr(self, name) for name in names}
        return table_of({name: values for name, values in columns.items() if values is not None})


@dataclass(frozen=True, slots=True)
class Shot:
    """A span of the video, [start, stop) in seconds: a shot, between two cuts or fades, or a scene."""

    start_seconds: float
    stop_seconds: float

    @property
    def duration_seconds(self) -> float:
        """Length in seconds."""
        return self.stop_seconds - self.start_seconds


@dataclass(frozen=True, slots=True)
class KeyFrame:
    """A frame that represents a cluster of frames."""

    pts_seconds: float
    frame_index: int  # number in display order, from 0
    cluster: int  # 0 .. K-1, in time order of the key-frames
    weight: float  # fraction of the sampled frames that it represents; they sum to 1
    score: float  # cosine to the centroid of its cluster
    quality: float  # 0..1: rank of the sharpness among the frames, lowered for dark or blank frames and flashes
    sample: int  # row of the frame in the Embedding


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A moment that answers a query: a span [start, stop) and its best frame."""

    video: str
    start_seconds: float
    stop_seconds: float
    pts_seconds: float  # time of the best frame
    score: float  # cosine of query and best frame; for a subject, brought to the same scale
    preview: str | None = None  # path of a picture of the best frame, if one was written
    answered_by: AnsweredBy = "scene"  # the vector of the best frame with the higher score
    region: Region | None = None  # where the subject of the best frame is; None if subjects are off
    chance: float | None = None  # 0..1: probability that the best frame shows what the text says, see `keyreel.chance`


KEYFRAME_FACTS = tuple(own.name for own in fields(KeyFrame) if own.name != "sample")
HitT = TypeVar("HitT", bound=SearchHit)


class Hits(list[HitT], Tabular, Generic[HitT]):
    """A list of moments, best first. Notebooks show it with pictures; it converts to tables."""

    def __init__(self, hits: Iterable[HitT] = (), show: Callable[[Sequence[HitT]], str] | None = None) -> None:
        super().__init__(hits)
        self._show = show  # makes HTML from the videos; pickled copies lose it

    def __reduce__(self) -> Any:
        return Hits, (list(self),)

    def _repr_html_(self) -> str:
        """HTML for notebooks: best frame, span, score and video of each moment."""
        return f"<pre>{escape(repr(self))}</pre>" if self._show is None else self._show(self)

    def to_arrow(self) -> Any:
        """Makes a pyarrow table: a row for each moment, a column for each field of the hits.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        kind = type(self[0]) if self else SearchHit
        return table_of({own.name: [getattr(hit, own.name) for hit in self] for own in fields(kind)})


class SummaryActions(Protocol):
    """The work behind the methods of a Summary. The Engine provides it, so that this module needs no decoder."""

    def images(self, summary: Summary, max_height: int) -> list[U8]: ...
    def html(self, summary: Summary) -> str: ...
    def save(self, summary: Summary, folder: Path, output: OutputConfig, progress: Progress | None) -> Path: ...
    def render_reel(self, summary: Summary, path: Path, output: OutputConfig) -> tuple[Shot, ...]: ...
    def search(self, summary: Summary, query: Query | Combined, k: int) -> Hits[SearchHit]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Summary(Tabular):
    """Key-frames, shots and scenes of one video, and the embedding that they come from.

    It can be pickled. If the video is a file, the copy can still save and render. `Engine.search` searches it.
    """

    video: VideoInfo
    embedding: Embedding
    keyframes: tuple[KeyFrame, ...]  # in time order, never empty
    shots: tuple[Shot, ...]  # in time order; they cover the analysed part of the video
    scenes: tuple[Shot, ...]  # likewise; similar neighbouring shots joined, long ones divided, see `scenes.find_scenes`
    importance: F32  # [T] float32 in 0..1, of each sampled frame
    device: str  # "cpu", "cuda:0"
    device_reason: str  # why this device
    config: Mapping[str, Any]  # all options of the call
    warnings: tuple[str, ...]
    timings_seconds: Mapping[str, float]  # working time of the stages decode, encode, fuse, select; and total
    actions: SummaryActions = field(repr=False, compare=False)
    # [h, w, 3] uint8 RGB thumbnails of sampled frames, by their time in seconds; `save` decodes the others
    thumbnails: Mapping[float, U8] = field(default_factory=dict, repr=False, compare=False)

    @property
    def stop_seconds(self) -> float:
        """End of the analysed part of the video, in seconds."""
        return self.shots[-1].stop_seconds

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> Summary:
        """Reads a summary that was saved with `embeddings=True`.

        It can save and render if the video still exists. `Engine.search` searches it.

        Raises:
            RenderError: the folder holds no such summary, or its files are damaged.
        """
        # Imported here: this module must not depend on decoding and rendering.
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

        It makes all files in a hidden folder, then renames that: after an error nothing half-written remains.

        Args:
            output: which files to write; by default those of `config.OutputConfig`.
            progress: called with ("pictures" | "reel", done, total).
            options: fields of `config.OutputConfig` by name: `save("out", reel_seconds=30, embeddings=True)`.

        Returns:
            The folder.

        Raises:
            RenderError: an output cannot be made, or the folder must not be replaced.
            SourceError: the video cannot be read again.
            MissingExtra: an output needs a package that is not installed.
            TypeError: an unknown option; the message names similar ones.
        """
        return self.actions.save(self, Path(folder), output_config(output, options), progress)

    def images(self, *, max_height: int = 1080) -> list[U8]:
        """Decodes the key-frames, in time order: upright [H, W, 3] uint8 RGB, at most `max_height` pixels tall.

        Raises:
            SourceError, RenderError: the video cannot be read again.
            ValueError: max_height is too small.
        """
        return self.actions.images(self, max_height)

    def _repr_html_(self) -> str:
        """HTML for notebooks: a timeline and the key-frames."""
        return self.actions.html(self)

    def to_arrow(self) -> Any:
        """Makes a pyarrow table: a row for each key-frame, with its fields, and the numbers of its shot and scene.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        columns: dict[str, Any] = {"video": [self.video.path] * len(self.keyframes)}
        columns |= {name: [getattr(frame, name) for frame in self.keyframes] for name in KEYFRAME_FACTS}
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
        """Writes a reel: the best spans of the video, or those that answer `query`. Returns the spans.

        Args:
            path: the file to write: .mp4, or .mkv to copy the packets of VP8 or VP9.
            seconds: longest length of the reel; by default 15 % of the video, within 10 to 60 s, at most half of it.
            mode: "copy" copies the packets without loss, "encode" encodes H.264 and AAC, "auto" copies if possible.
                Copying moves the ends of the spans by up to 0.75 s.
            order: with a query: "time", or "score" for the best span first.
            aspect: shape of the reel as width:height, such as "9:16"; None keeps the video's.
            reframe: with `aspect`: "follow" cuts out the part of the frame with the subject, "fit" shows whole frames.

        Raises:
            RenderError: the reel cannot be made, or would repeat most of the video.
            SourceError: the video cannot be read again.
            ValueError: an unknown mode, order or aspect.
        """
        output = OutputConfig(
            reel_seconds=seconds, query=query, reel_mode=mode, order=order, aspect=aspect, reframe=reframe
        )
        return self.actions.render_reel(self, Path(path), output)

    def search(self, query: Query | Combined, *, k: int = 5) -> Hits[SearchHit]:
        """Finds the k best moments of this video for a text or a picture, best first.

        Raises:
            ValueError: k < 1, or the summary has no engine, as a pickled or loaded one: pass it to `Engine.search`.
            SourceError: the picture cannot be read.
        """
        return self.actions.search(self, query, k)

    def close(self) -> None:
        """Deletes the temporary copy of a video that came from a stream; it can then not be rendered. Idempotent."""
        self.actions.close()
