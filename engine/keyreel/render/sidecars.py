"""Files for other programs: summary.json and search results with their JSON Schemas, WebVTT, OTIO, EDL."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keyreel.errors import Failure, RenderError, import_extra
from keyreel.render.pictures import clock
from keyreel.types import SearchHit, Shot, Summary, VideoInfo

if TYPE_CHECKING:
    from keyreel.library.types import VideoHit

SUMMARY = "keyreel.summary/1"
SEARCH = "keyreel.search/1"
STAGES = ("decode", "encode", "fuse", "select", "render", "total")
DRAFT = "https://json-schema.org/draft/2020-12/schema"

Json = dict[str, Any]


def summary_document(
    summary: Summary,
    *,
    files: Sequence[str | None] | None = None,
    reel: tuple[str | None, Sequence[Shot]] | None = None,
    render_seconds: float = 0.0,
) -> Json:
    """The content of summary.json, `keyreel.summary/1`.

    Args:
        summary: what to tell.
        files: path of each key-frame's picture, relative to summary.json; None where none was written.
        reel: (file, spans) of the reel, None where there is none.
        render_seconds: time that writing the outputs took; stands in the timings and is added to their total.

    Raises:
        ValueError: a number is not finite.
    """
    video = summary.video
    names = files if files is not None else [None] * len(summary.keyframes)
    timings = {stage: float(summary.timings_seconds.get(stage, 0.0)) for stage in STAGES}
    timings["render"] += render_seconds
    timings["total"] += render_seconds
    rows = sorted(zip(summary.keyframes, names, strict=True), key=lambda row: row[0].pts_seconds)
    document: Any = {
        "schema": SUMMARY,
        "video": {
            "path": video.path,
            "duration_seconds": video.duration_seconds,
            "width": video.width,
            "height": video.height,
            "codec": video.codec,
            "rotation_degrees": video.rotation_degrees,
            "frames_sampled": len(summary.embedding),
        },
        "model": {"name": summary.embedding.model, "sha256": summary.embedding.model_sha256},
        "device": {"name": summary.device, "reason": summary.device_reason},
        "config": summary.config,
        "keyframes": [
            {
                "pts_seconds": keyframe.pts_seconds,
                "frame_index": keyframe.frame_index,
                "cluster": keyframe.cluster,
                "weight": keyframe.weight,
                "score": keyframe.score,
                "quality": keyframe.quality,
                "file": name,
            }
            for keyframe, name in rows
        ],
        "shots": _spans(summary.shots),
        "reel": None if reel is None else {"file": reel[0], "spans": _spans(reel[1])},
        "warnings": list(summary.warnings),
        "timings_seconds": timings,
    }
    document = plain(document)
    check_json(document)
    return document  # type: ignore[no-any-return]


def search_document(
    query: str,
    hits: Sequence[SearchHit],
    failed: Sequence[Failure] = (),
    *,
    videos: Sequence[VideoHit] | None = None,
    weak_score: float | None = None,
) -> Json:
    """What `keyreel search --json` prints, `keyreel.search/1`, best hit first, and the videos that failed.

    Args:
        videos: the videos that were found in a library, where videos were asked for; the hits are their moments.
        weak_score: hits below it hardly match a text, where the model says so, see `Bundle.weak_score`.

    Raises:
        ValueError: a number is not finite.
    """
    document: Any = {
        "schema": SEARCH,
        "query": query,
        "hits": [dataclasses.asdict(hit) for hit in sorted(hits, key=lambda hit: -hit.score)],
        "failed": [failure.document() for failure in failed],
    }
    if videos is not None:
        document["videos"] = [{"video": v.video, "video_id": v.video_id, "score": v.score} for v in videos]
    if weak_score is not None:
        document["weak_score"] = weak_score
    document = plain(document)
    check_json(document)
    return document  # type: ignore[no-any-return]


def check_json(document: Any) -> None:
    """Raises ValueError where a document holds what JSON cannot: NaN, infinity."""
    json.dumps(document, allow_nan=False)


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Writes a document for people and programs: indented, ASCII, ends with a newline."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="ascii")


def _spans(spans: Sequence[Shot]) -> list[Json]:
    return [{"start_seconds": span.start_seconds, "stop_seconds": span.stop_seconds} for span in spans]


def plain(value: Any) -> Any:
    """NumPy numbers, tuples and paths as JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def object_of(properties: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Json:
    """Schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def list_of(items: Mapping[str, Any], least: int = 0) -> Json:
    """Schema of an array."""
    return {"type": "array", "items": dict(items), "minItems": least}


TEXT: Json = {"type": "string"}
TEXT_OR_NULL: Json = {"type": ["string", "null"]}
SECONDS: Json = {"type": "number", "minimum": 0}
COSINE: Json = {"type": "number", "minimum": -1.001, "maximum": 1.001}
SHARE: Json = {"type": "number", "minimum": 0, "maximum": 1.001}
COUNT: Json = {"type": "integer", "minimum": 0}
SIZE: Json = {"type": "integer", "minimum": 1}
FAILED = list_of(object_of({"video": TEXT, "error": TEXT, "exit_code": SIZE}))
SPANS = list_of(object_of({"start_seconds": SECONDS, "stop_seconds": SECONDS}))


def summary_schema() -> Json:
    """JSON Schema (draft 2020-12) of summary.json."""
    video = {
        "path": TEXT,
        "duration_seconds": {"type": ["number", "null"], "minimum": 0},
        "width": SIZE,
        "height": SIZE,
    }
    video |= {"codec": TEXT, "rotation_degrees": {"enum": [0, 90, 180, 270]}, "frames_sampled": SIZE}
    keyframe = {"pts_seconds": SECONDS, "frame_index": COUNT, "cluster": COUNT}
    keyframe |= {"weight": SHARE, "score": COSINE, "quality": SHARE, "file": TEXT_OR_NULL}
    properties = {
        "schema": {"const": SUMMARY},
        "video": object_of(video),
        "model": object_of({"name": TEXT, "sha256": TEXT}),
        "device": object_of({"name": TEXT, "reason": TEXT}),
        "config": {"type": "object"},
        "keyframes": list_of(object_of(keyframe), least=1),
        "shots": SPANS,
        "reel": {"anyOf": [{"type": "null"}, object_of({"file": TEXT_OR_NULL, "spans": SPANS})]},
        "warnings": list_of(TEXT),
        "timings_seconds": object_of(dict.fromkeys(STAGES, SECONDS)),
    }
    return {"$schema": DRAFT, "title": SUMMARY, **object_of(properties)}


def search_schema() -> Json:
    """JSON Schema (draft 2020-12) of what `keyreel search --json` prints.

    What is optional comes from a library, but for "weak_score", which stands where a text was asked of a model that has
    such a score.
    """
    hit = {"video": TEXT, "start_seconds": SECONDS, "stop_seconds": SECONDS, "pts_seconds": SECONDS}
    hit |= {"score": COSINE, "preview": TEXT_OR_NULL}
    more = {"video_id": TEXT, "video_score": COSINE, "keyframe_seconds": SECONDS, "folded": COUNT}
    properties = {"schema": {"const": SEARCH}, "query": TEXT, "hits": list_of(object_of(hit, more)), "failed": FAILED}
    videos = list_of(object_of({"video": TEXT, "video_id": TEXT, "score": COSINE}))
    return {"$schema": DRAFT, "title": SEARCH, **object_of(properties, {"videos": videos, "weak_score": COSINE})}


def webvtt(boxes: Sequence[tuple[int, int, int, int]], step_seconds: float, duration_seconds: float, image: str) -> str:
    """A WebVTT thumbnail track: a cue for each tile of the sprite, `image#xywh=x,y,width,height`."""
    cues = ["WEBVTT\n"]
    for place, box in enumerate(boxes):
        start = place * step_seconds
        stop = max(start + 0.001, min(start + step_seconds, duration_seconds))
        cues.append(f"{clock(start)} --> {clock(stop)}\n{image}#xywh={','.join(map(str, box))}\n")
    return "\n".join(cues)


def import_otio(*, edl: bool = False) -> Any:
    """opentimelineio, with its CMX 3600 adapter where an EDL is wanted.

    Raises:
        MissingExtra: one of them is not installed.
    """
    if edl:
        import_extra("otio_cmx3600_adapter", extra="otio", purpose="writing an EDL")
    return import_extra("opentimelineio", extra="otio", purpose="writing OTIO or an EDL")


def write_otio(video: VideoInfo, target: str, spans: Sequence[Shot], path: Path) -> None:
    """Writes the reel as an OpenTimelineIO timeline.

    Raises:
        MissingExtra: opentimelineio is not installed.
    """
    otio = import_otio()
    timeline = _timeline(otio, video, target, spans, _rate(video.average_fps))
    otio.adapters.write_to_file(timeline, str(path), adapter_name="otio_json")


def write_edl(video: VideoInfo, target: str, spans: Sequence[Shot], path: Path) -> None:
    """Writes the reel as a CMX 3600 edit list, in the nearest rate that has a timecode.

    Raises:
        MissingExtra: opentimelineio or its CMX 3600 adapter is not installed.
        RenderError: the adapter refuses the timeline.
    """
    otio = import_otio(edl=True)
    valid = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)
    rate = min(valid, key=lambda fps: abs(math.log(fps / _rate(video.average_fps))))
    timeline = _timeline(otio, video, target, spans, rate)
    # The edit list knows one picture track; the sound goes with the clips.
    del timeline.tracks[1:]
    try:
        text = otio.adapters.write_to_string(timeline, adapter_name="cmx_3600", rate=rate)
    except otio.exceptions.OTIOError as error:
        raise RenderError(f"the EDL cannot be written: {error}", hint="write OTIO instead") from error
    path.write_text(text, encoding="utf-8")


def _rate(average_fps: float | None) -> float:
    """Frames a second of an edit: the video's average, brought to n or n * 1000 / 1001 where it is close to one."""
    if average_fps is None or not math.isfinite(average_fps) or not 1 <= average_fps <= 1000:
        return 25.0
    near = round(average_fps)
    exact = min((float(near), float(Fraction(near * 1000, 1001))), key=lambda fps: abs(fps - average_fps))
    return exact if abs(exact - average_fps) < 0.005 * exact / 24 else average_fps


def _timeline(otio: Any, video: VideoInfo, target: str, spans: Sequence[Shot], rate: float) -> Any:
    time, schema = otio.opentime, otio.schema

    def span_range(start: float, stop: float) -> Any:
        first, last = round(start * rate), round(stop * rate)
        return time.TimeRange(time.RationalTime(first, rate), time.RationalTime(max(1, last - first), rate))

    # An edit list is made of lines: a name must not begin a new one.
    name = "".join(c if c.isprintable() else "_" for c in Path(video.path).name)
    length = max([video.duration_seconds or 0.0, *(span.stop_seconds for span in spans)])
    timeline = schema.Timeline(name=f"{name} highlights", global_start_time=time.RationalTime(0, rate))
    kinds = [schema.TrackKind.Video] + [schema.TrackKind.Audio] * video.has_audio
    for kind in kinds:
        track = schema.Track(name=kind, kind=kind)
        for number, span in enumerate(spans, 1):
            media = schema.ExternalReference(target_url=target, available_range=span_range(0, length))
            shown = span_range(span.start_seconds, span.stop_seconds)
            track.append(schema.Clip(name=f"{name} {number}", media_reference=media, source_range=shown))
        timeline.tracks.append(track)
    return timeline
