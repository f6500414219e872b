"""Copies a whole video packet by packet: with its scenes as chapters, or into another container."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from keyreel.decode.packets import BROKEN
from keyreel.decode.source import Source
from keyreel.decode.timeline import start_seconds
from keyreel.errors import RenderError
from keyreel.render.captions import MILLISECONDS
from keyreel.render.copy import MP4_OPTIONS
from keyreel.types import Progress, Shot


def write_chapters(source: Source, scenes: Sequence[Shot], folder: Path) -> Path:
    """Writes chapters.ffmetadata, and chapters.mp4 or chapters.mkv with the source's picture, sound and text tracks.

    MP4 and MOV become MP4, all others Matroska, which takes nearly every codec.

    Returns:
        The path of the copy.

    Raises:
        RenderError: the container does not take any track of the video.
        SourceError: the video cannot be opened.
    """
    (folder / "chapters.ffmetadata").write_text(ffmetadata(scenes), encoding="utf-8")
    with source.open() as container:
        suffix = ".mp4" if "mp4" in container.format.name else ".mkv"
        path = folder / f"chapters{suffix}"
        try:
            with av.open(str(path), "w", options=MP4_OPTIONS if suffix == ".mp4" else {}) as output:
                picture = source.require_video(container)
                offset = start_seconds(container, picture) or Fraction(0)
                output.set_chapters(
                    [
                        {
                            "id": number,
                            "start": round((offset + Fraction(scene.start_seconds)) / MILLISECONDS),
                            "end": round((offset + Fraction(scene.stop_seconds)) / MILLISECONDS),
                            "time_base": MILLISECONDS,
                            "metadata": {"title": f"Scene {number}"},
                        }
                        for number, scene in enumerate(scenes, 1)
                    ]
                )
                kept = [picture, *container.streams.audio, *container.streams.subtitles]
                _copy(source, container, output, kept)
        except BROKEN as error:
            path.unlink(missing_ok=True)
            raise RenderError(
                f"{source.name}: its packets cannot be copied into {suffix}: {error}", hint="leave out --chapters"
            ) from error
    return path


def write_remux(source: Source, path: Path, progress: Progress) -> None:
    """Copies the picture and the first sound track into an MP4 file.

    Args:
        progress: called with ("remux", seconds done, seconds in all).

    Raises:
        RenderError: MP4 does not take these codecs.
        SourceError: the video cannot be opened.
    """
    total = source.probe().duration_seconds
    with source.open() as container:
        try:
            with av.open(str(path), "w", format="mp4", options=MP4_OPTIONS) as output:
                kept = [source.require_video(container), *container.streams.audio[:1]]
                _copy(source, container, output, kept, lambda seconds: progress("remux", seconds, total))
        except BROKEN as error:
            raise RenderError(f"{source.name}: its packets cannot be copied into MP4: {error}") from error


def _copy(
    source: Source,
    container: Any,
    output: Any,
    kept: Sequence[Any],
    tell: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Copies the packets of these streams of the container."""
    streams = {own.index: output.add_stream_from_template(own, opaque=True) for own in kept}
    held: dict[int, list[Any]] = {}  # packets before the first one of their stream with a dts
    begun: set[int] = set()
    for packet in container.demux(kept):
        if not packet.size:
            continue
        if packet.pts is None:
            raise RenderError(f"{source.name}: its packets have no display times", hint="AVI and MPEG-PS often do not")
        if packet.is_keyframe:
            tell(max(0.0, float(packet.pts * packet.time_base)))
        index = packet.stream.index
        packets = [packet]
        if index not in begun:  # Matroska stores no dts; FFmpeg derives them after some packets
            held.setdefault(index, []).append(packet)
            if packet.dts is None:
                continue
            begun.add(index)
            packets = held.pop(index)
            step, first = packet.duration or 1, packet.dts
            for ahead, early in enumerate(reversed(packets)):
                early.dts = first - ahead * step
        for own in packets:
            own.stream = streams[index]
            output.mux(own)
    if held:
        raise RenderError(f"{source.name}: its packets have no decoding times")


def ffmetadata(scenes: Sequence[Shot]) -> str:
    """Formats scenes as metadata for FFmpeg; `ffmpeg -i VIDEO -i FILE -map_metadata 1 -codec copy OUT` applies it."""
    lines = [";FFMETADATA1"]
    for number, scene in enumerate(scenes, 1):
        start, stop = round(1000 * scene.start_seconds), round(1000 * scene.stop_seconds)
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={stop}", f"title=Scene {number}"]
    return "\n".join(lines) + "\n"
