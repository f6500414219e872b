"""A copy of a video with its scenes as chapters: packets are copied as they are, nothing is encoded anew."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
from av.packet import Packet

from keyreel.decode.packets import BROKEN
from keyreel.decode.source import Source
from keyreel.decode.timeline import start_seconds
from keyreel.errors import RenderError
from keyreel.types import Shot

MILLISECONDS = Fraction(1, 1000)


def write_chapters(source: Source, scenes: Sequence[Shot], folder: Path) -> Path:
    """Writes chapters.ffmetadata, and chapters.mp4 or chapters.mkv: picture, sound and text tracks of the source.

    MP4 and MOV become MP4; all other containers become Matroska, which takes nearly every codec.

    Returns:
        the copy of the video.

    Raises:
        RenderError: the container takes no track of the video.
        SourceError: the video cannot be opened.
    """
    (folder / "chapters.ffmetadata").write_text(ffmetadata(scenes), encoding="utf-8")
    with source.open() as container:
        suffix = ".mp4" if "mp4" in container.format.name else ".mkv"
        path = folder / f"chapters{suffix}"
        try:
            with av.open(str(path), "w", options={"movflags": "+faststart"} if suffix == ".mp4" else {}) as output:
                picture = source.require_video(container)
                kept = [picture, *container.streams.audio, *container.streams.subtitles]
                made = {own.index: output.add_stream_from_template(own, opaque=True) for own in kept}
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
                for packet in container.demux(kept):
                    if packet.dts is not None and isinstance(packet, Packet):
                        packet.stream = made[packet.stream.index]
                        output.mux(packet)
        except BROKEN as error:
            path.unlink(missing_ok=True)
            raise RenderError(
                f"{source.name}: its packets cannot be copied into {suffix}: {error}", hint="leave out --chapters"
            ) from error
    return path


def ffmetadata(scenes: Sequence[Shot]) -> str:
    """The scenes as FFmpeg's metadata file: `ffmpeg -i VIDEO -i FILE -map_metadata 1 -codec copy OUT` applies it."""
    lines = [";FFMETADATA1"]
    for number, scene in enumerate(scenes, 1):
        start, stop = round(1000 * scene.start_seconds), round(1000 * scene.stop_seconds)
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={stop}", f"title=Scene {number}"]
    return "\n".join(lines) + "\n"
