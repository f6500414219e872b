"""JSON documents as dataclasses, which msgspec encodes and describes: summary.json and search results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from keyreel.errors import Failure
from keyreel.render.reframe import Camera, TakeMode
from keyreel.types import KEYFRAME_FACTS, AnsweredBy, SearchHit, Shot, Summary

SUMMARY: Final = "keyreel.summary/1"

Json: TypeAlias = dict[str, Any]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Cosine: TypeAlias = Annotated[float, Meta(ge=-1.001, le=1.001)]
Score: TypeAlias = float  # of a search: a cosine; for a subject, brought to the same scale, see `SubjectScale`
Fraction: TypeAlias = Annotated[float, Meta(ge=0, le=1.001)]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
Size: TypeAlias = Annotated[int, Meta(ge=1)]


def to_json(document: Any) -> str:
    """Encodes a document as JSON: indented, ASCII, with a newline at the end. Leaves out fields that are UNSET.

    Raises:
        ValueError: a number is not finite.
    """
    content = msgspec.to_builtins(document, enc_hook=_plain_value, str_keys=True)
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _plain_value(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def plain(value: Any) -> Any:
    """Converts dataclasses, NumPy numbers, tuples and paths to types of JSON."""
    return json.loads(to_json(value))


def schema_of(document: type) -> Json:
    """Makes the JSON Schema (draft 2020-12) of a document. Only fields with the default UNSET may be missing."""
    schema = msgspec.json.schema(document)
    for described in schema["$defs"].values():
        own = described["properties"]
        fixed = [name for name, field in own.items() if field.pop("default", None) is not None]
        described["required"] = [name for name in own if name in fixed or name in described["required"]]
        described["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclass(frozen=True, slots=True)
class FailedVideo:
    """A video that failed among several."""

    video: str
    error: str
    exit_code: Size

    @classmethod
    def of(cls, failure: Failure) -> FailedVideo:
        """Makes the entry of a failure."""
        return cls(failure.video, str(failure.error), failure.error.exit_code)


@dataclass(frozen=True, slots=True)
class VideoEntry:
    """The video of a summary."""

    path: str
    duration_seconds: Seconds | None
    width: Size
    height: Size
    codec: str
    rotation_degrees: Annotated[int, Meta(ge=0, le=270, multiple_of=90)]
    frames_sampled: Count


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """The model of a summary."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class DeviceEntry:
    """The device of a summary, and why it was chosen."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeyFrameEntry:
    """A key-frame, see `keyreel.KeyFrame`."""

    pts_seconds: Seconds
    frame_index: Count
    cluster: Count
    weight: Fraction
    score: Cosine
    quality: Fraction
    file: str | None  # path of its picture, relative to summary.json


@dataclass(frozen=True, slots=True)
class WindowEntry:
    """The part of the frame to show at a time."""

    pts_seconds: Seconds
    region: tuple[Fraction, Fraction, Fraction, Fraction]  # x, y, width, height, as shares of the frame


@dataclass(frozen=True, slots=True)
class TakeEntry:
    """How to show a span of one shot.

    `fixed`: one window; `path`: a window that moves between the given ones; `fit`: the whole frame before blurred
    sides.
    """

    start_seconds: Seconds
    stop_seconds: Seconds
    mode: TakeMode
    reason: str
    windows: tuple[WindowEntry, ...]


@dataclass(frozen=True, slots=True)
class ReframeEntry:
    """How the reel gets its shape."""

    aspect: str
    takes: tuple[TakeEntry, ...]

    @classmethod
    def of(cls, camera: Camera) -> ReframeEntry:
        """Makes the entry of a camera."""
        takes = []
        for take in camera.takes:
            windows = tuple(WindowEntry(seconds, camera.region_of(take, seconds)) for seconds in take.times)
            takes.append(TakeEntry(take.start_seconds, take.stop_seconds, take.mode, take.reason, windows))
        return cls(camera.aspect, tuple(takes))


@dataclass(frozen=True, slots=True)
class ReelEntry:
    """The reel of a summary."""

    file: str | None
    spans: tuple[Shot, ...]
    mode: Literal["copy", "encode"] | None  # None without a file
    reason: str  # why this mode, or why there is no file
    reframe: ReframeEntry | UnsetType = UNSET  # if the reel has another shape than the video


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Working time of the stages, in seconds."""

    decode: Seconds
    encode: Seconds
    fuse: Seconds
    select: Seconds
    render: Seconds  # all outputs
    thumbnails: Seconds  # the sprite, part of render; its pictures are made during decoding
    reel: Seconds  # part of render
    total: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryDocument:
    """The content of summary.json."""

    schema: Literal["keyreel.summary/1"] = SUMMARY
    video: VideoEntry
    model: ModelEntry
    device: DeviceEntry
    config: Mapping[str, Any]
    keyframes: Annotated[tuple[KeyFrameEntry, ...], Meta(min_length=1)]
    shots: tuple[Shot, ...]
    scenes: tuple[Shot, ...]
    reel: ReelEntry | None
    warnings: tuple[str, ...]
    timings_seconds: StageSeconds


def summary_document(
    summary: Summary, files: Sequence[str], reel: ReelEntry | None, seconds: Mapping[str, float]
) -> SummaryDocument:
    """Makes the document of a summary.

    Args:
        files: path of each key-frame's picture, relative to summary.json.
        reel: file and spans of the reel.
        seconds: time of further stages, added to the summary's.
    """
    video, spent = summary.video, summary.timings_seconds
    keyframes = tuple(
        KeyFrameEntry(**{name: getattr(keyframe, name) for name in KEYFRAME_FACTS}, file=file)
        for keyframe, file in zip(summary.keyframes, files, strict=True)
    )
    stages = [own.name for own in dataclasses.fields(StageSeconds)]
    return SummaryDocument(
        video=VideoEntry(
            path=video.path,
            duration_seconds=video.duration_seconds,
            width=video.width,
            height=video.height,
            codec=video.codec,
            rotation_degrees=video.rotation_degrees,
            frames_sampled=len(summary.embedding),
        ),
        model=ModelEntry(summary.embedding.model, summary.embedding.model_sha256),
        device=DeviceEntry(summary.device, summary.device_reason),
        config=summary.config,
        keyframes=keyframes,
        shots=summary.shots,
        scenes=summary.scenes,
        reel=reel,
        warnings=summary.warnings,
        timings_seconds=StageSeconds(*(spent.get(stage, 0.0) + seconds.get(stage, 0.0) for stage in stages)),
    )


@dataclass(frozen=True, slots=True)
class HitEntry:
    """A moment; fields with a default are only in moments of a library."""

    video: str
    start_seconds: Seconds
    stop_seconds: Seconds
    pts_seconds: Seconds
    score: Score
    preview: str | None
    answered_by: AnsweredBy  # which vector of the best frame
    region: tuple[Fraction, Fraction, Fraction, Fraction] | None  # x, y, width, height of its subject, as fractions
    chance: Fraction | None  # that the best frame shows what the text says
    video_id: str | UnsetType = UNSET
    keyframe_seconds: Seconds | UnsetType = UNSET
    video_score: Score | UnsetType = UNSET
    folded: Count | UnsetType = UNSET
    more: Count | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class FoundVideo:
    """A video of a library that answers a query."""

    video: str
    video_id: str
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchDocument:
    """What `keyreel search --json` prints."""

    schema: Literal["keyreel.search/2"] = "keyreel.search/2"
    query: str
    also: tuple[str, ...] = ()  # texts that moments must show too
    without: tuple[str, ...] = ()  # texts that moments must not show
    hits: tuple[HitEntry, ...]  # best first
    failed: tuple[FailedVideo, ...]
    videos: tuple[FoundVideo, ...] | UnsetType = UNSET  # with --videos; the hits are their moments
    unknown_words: tuple[str, ...] = ()  # words of the text that the model does not know
    left_out: tuple[str, ...] = ()  # videos of the library that were skipped, since their rows are damaged


def search_document(
    query: str,
    hits: Sequence[SearchHit],
    failed: Sequence[Failure] = (),
    *,
    also: Sequence[str] = (),
    without: Sequence[str] = (),
    videos: Sequence[FoundVideo] | None = None,
    unknown_words: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> SearchDocument:
    """Makes the document of search results: best hit first, with the failed videos."""
    return SearchDocument(
        query=query,
        also=tuple(also),
        without=tuple(without),
        hits=tuple(HitEntry(**dataclasses.asdict(hit)) for hit in sorted(hits, key=lambda hit: -hit.score)),
        failed=tuple(FailedVideo.of(failure) for failure in failed),
        videos=UNSET if videos is None else tuple(videos),
        unknown_words=tuple(unknown_words),
        left_out=tuple(left_out),
    )
