"""The reel's spans for editing programs: OpenTimelineIO and CMX 3600 edit lists, through their own library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from keyreel.errors import RenderError, import_extra
from keyreel.render.documents import ReframeEntry, plain
from keyreel.render.reframe import Camera
from keyreel.types import Shot, VideoInfo


def import_otio(*, edl: bool = False) -> Any:
    """opentimelineio, with its CMX 3600 adapter where an EDL is wanted.

    Raises:
        MissingExtra: one of them is not installed.
    """
    if edl:
        import_extra("otio_cmx3600_adapter", extra="otio", purpose="writing an EDL")
    return import_extra("opentimelineio", extra="otio", purpose="writing OTIO or an EDL")


def write_otio(
    video: VideoInfo, target: str, spans: Sequence[Shot], path: Path, *, camera: Camera | None = None
) -> None:
    """Writes the reel as an OpenTimelineIO timeline.

    With `camera` each picture clip has an effect "keyreel.reframe", whose metadata are the aspect and the clip's takes
    as in summary.json.

    Raises:
        MissingExtra: opentimelineio is not installed.
    """
    otio = import_otio()
    timeline = _timeline(otio, video, target, spans, _rate(video.average_fps))
    if camera is not None:
        whole = plain(ReframeEntry.of(camera))
        for span, clip in zip(spans, timeline.video_tracks()[0], strict=True):
            own = [t for t in whole["takes"] if span.start_seconds <= t["start_seconds"] < span.stop_seconds]
            reframe = {"keyreel": {**whole, "takes": own}}
            clip.effects.append(otio.schema.Effect("reframe", "keyreel.reframe", reframe))
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
