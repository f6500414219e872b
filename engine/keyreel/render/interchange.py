"""Writes files for editing programs, with OpenTimelineIO: OTIO, CMX 3600 edit lists, markers, scene lists."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keyreel.decode.timeline import Timeline
from keyreel.errors import RenderError, import_extra
from keyreel.render.documents import ReframeEntry, plain
from keyreel.render.pictures import clock
from keyreel.render.reframe import Camera
from keyreel.types import Shot, Summary, VideoInfo

_ADAPTERS = {".otio": "otio_json", ".fcpxml": "fcpx_xml"}
_SCENE_LIST = ["Scene Number", "Start Frame", "Start Timecode", "Start Time (seconds)", "End Frame", "End Timecode"]
_SCENE_LIST += ["End Time (seconds)", "Length (frames)", "Length (timecode)", "Length (seconds)"]


def import_otio(*, edl: bool = False, fcpxml: bool = False) -> Any:
    """Imports opentimelineio, and its adapters for CMX 3600 and Final Cut Pro if wanted.

    Raises:
        MissingExtra: a package is not installed.
    """
    if edl:
        import_extra("otio_cmx3600_adapter", extra="otio", purpose="writing an EDL")
    if fcpxml:
        import_extra("otio_fcpx_xml_adapter", extra="otio", purpose="writing FCPXML")
    return import_extra("opentimelineio", extra="otio", purpose="writing OTIO or an EDL")


def write_otio(
    video: VideoInfo, target: str, spans: Sequence[Shot], path: Path, *, camera: Camera | None = None
) -> None:
    """Writes the reel as an OpenTimelineIO timeline.

    With `camera` each picture clip has an effect "keyreel.reframe"; its metadata are the aspect and the clip's takes,
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
    """Writes the reel as a CMX 3600 edit list, at the nearest rate with a timecode.

    Raises:
        MissingExtra: opentimelineio or its CMX 3600 adapter is not installed.
        RenderError: the adapter refuses the timeline.
    """
    otio = import_otio(edl=True)
    rate = _timecode_rate(video.average_fps)
    _write_edl(otio, _timeline(otio, video, target, spans, rate), rate, path)


def write_markers(summary: Summary, target: str, path: Path) -> None:
    """Writes a timeline of the whole video whose clip has a marker at each key-frame.

    Args:
        target: URL of the video.
        path: its ending chooses the format: .otio; .edl, a CMX 3600 edit list with locators (LOC) for Avid and Resolve;
            .fcpxml for Final Cut Pro.

    Raises:
        MissingExtra: opentimelineio or its adapter is not installed.
        RenderError: the adapter refuses the timeline.
    """
    edl, fcpxml = path.suffix == ".edl", path.suffix == ".fcpxml"
    otio, video = import_otio(edl=edl, fcpxml=fcpxml), summary.video
    rate = _timecode_rate(video.average_fps) if edl or fcpxml else _rate(video.average_fps)
    if fcpxml:
        rate = round(rate, 2)  # the adapter accepts 23.98, not 24000 / 1001; it writes seconds, so nothing drifts
    timeline = _timeline(otio, video, target, [Shot(0.0, summary.stop_seconds)], rate, title="key-frames")
    clip = timeline.video_tracks()[0][0]
    for number, frame in enumerate(summary.keyframes, 1):
        at = otio.opentime.TimeRange(
            otio.opentime.RationalTime(round(frame.pts_seconds * rate), rate), otio.opentime.RationalTime(1, rate)
        )
        clip.markers.append(otio.schema.Marker(f"key-frame {number}", at, otio.schema.MarkerColor.PURPLE))
    if edl:
        _write_edl(otio, timeline, rate, path)
    else:
        _refused(otio, lambda: otio.adapters.write_to_file(timeline, str(path), _ADAPTERS[path.suffix]))


def write_scenes_csv(summary: Summary, timeline: Timeline | None, path: Path) -> None:
    """Writes the shots as PySceneDetect's scene list; its scenes are our shots.

    Frames count from 1, and the end of a scene is its last frame.

    Args:
        timeline: of the video; None computes frame numbers from the average rate.
    """
    rate = _rate(summary.video.average_fps)

    def frames_before(seconds: float) -> int:
        if timeline is None:
            return round(seconds * rate)
        return int(np.searchsorted(timeline.starts, seconds - 1e-6))

    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_SCENE_LIST)
        for number, shot in enumerate(summary.shots, 1):
            ends = shot.start_seconds, shot.stop_seconds
            first, last = map(frames_before, ends)
            counts = first + 1, last, last - first
            times = *ends, shot.duration_seconds
            cells = ([count, clock(at), f"{at:.3f}"] for count, at in zip(counts, times, strict=True))
            rows.writerow([number, *itertools.chain.from_iterable(cells)])


def _write_edl(otio: Any, timeline: Any, rate: float, path: Path) -> None:
    # An edit list has one picture track; the sound goes with the clips.
    del timeline.tracks[1:]
    text = _refused(otio, lambda: otio.adapters.write_to_string(timeline, adapter_name="cmx_3600", rate=rate))
    path.write_text(text, encoding="utf-8")


def _refused(otio: Any, write: Callable[[], Any]) -> Any:
    """Turns exceptions of an adapter into RenderError."""
    try:
        return write()
    except (otio.exceptions.OTIOError, ValueError) as error:
        raise RenderError(f"the timeline cannot be written: {error}", hint="write OTIO instead") from error


def _timecode_rate(average_fps: float | None) -> float:
    """The nearest rate with a timecode."""
    valid = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60000 / 1001, 60.0)
    return min(valid, key=lambda fps: abs(math.log(fps / _rate(average_fps))))


def _rate(average_fps: float | None) -> float:
    """Frames per second of an edit: the video's average, rounded to n or n * 1000 / 1001 if close."""
    if average_fps is None or not math.isfinite(average_fps) or not 1 <= average_fps <= 1000:
        return 25.0
    near = round(average_fps)
    exact = min((float(near), float(Fraction(near * 1000, 1001))), key=lambda fps: abs(fps - average_fps))
    return exact if abs(exact - average_fps) < 0.005 * exact / 24 else average_fps


def _timeline(
    otio: Any, video: VideoInfo, target: str, spans: Sequence[Shot], rate: float, title: str = "highlights"
) -> Any:
    time, schema = otio.opentime, otio.schema

    def span_range(start: float, stop: float) -> Any:
        first, last = round(start * rate), round(stop * rate)
        return time.TimeRange(time.RationalTime(first, rate), time.RationalTime(max(1, last - first), rate))

    # An edit list has lines: a name must not begin a new one.
    name = "".join(c if c.isprintable() else "_" for c in Path(video.path).name)
    length = max([video.duration_seconds or 0.0, *(span.stop_seconds for span in spans)])
    timeline = schema.Timeline(name=f"{name} {title}", global_start_time=time.RationalTime(0, rate))
    kinds = [schema.TrackKind.Video] + [schema.TrackKind.Audio] * video.has_audio
    for kind in kinds:
        track = schema.Track(name=kind, kind=kind)
        for number, span in enumerate(spans, 1):
            media = schema.ExternalReference(target_url=target, available_range=span_range(0, length))
            shown = span_range(span.start_seconds, span.stop_seconds)
            track.append(schema.Clip(name=f"{name} {number}", media_reference=media, source_range=shown))
        timeline.tracks.append(track)
    return timeline
