"""Adds captions to a reel: the video's text subtitles within its spans, at their time in the reel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from av.container import OutputContainer
from av.packet import Packet
from av.stream import Discard

from keyreel.decode.packets import BROKEN, demux
from keyreel.decode.source import Source
from keyreel.render.sound import origin_of
from keyreel.types import Shot

TEXTS = ("subrip", "mov_text", "webvtt", "ass", "text")  # codecs that FFmpeg decodes to ASS lines
MILLISECONDS = Fraction(1, 1000)
_OVERRIDE = re.compile(r"\{\\[^}]*\}")  # ASS: styles within a line
# The header that FFmpeg's encoders need; the lines use no styles.
_HEADER = b"""[Script Info]
ScriptType: v4.00+
[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


class Line(NamedTuple):
    """A text shown on [start, stop) seconds."""

    start: float
    stop: float
    text: str


def lines_of(source: Source) -> list[Line]:
    """Reads the lines of the first text track, in time order; none without such a track.

    Raises:
        SourceError: the video cannot be opened.
    """
    with source.open() as container:
        known = [track for track in container.streams.subtitles if track.codec_context is not None]
        tracks = [track for track in known if track.codec_context.codec.canonical_name in TEXTS]
        if not tracks:
            return []
        track, origin = tracks[0], origin_of(container)
        for other in container.streams:
            if other.index != track.index:
                other.discard = Discard.all
        found: list[Line] = []
        with suppress(*BROKEN):  # keep the lines so far
            for packet in demux(container, track):
                found += _decoded(packet, origin)
    return sorted(found)


def _decoded(packet: Packet[Any], origin: float) -> Iterator[Line]:
    if not packet.size or packet.pts is None or not packet.duration or packet.time_base is None:
        return
    start = float(packet.pts * packet.time_base) - origin
    with suppress(*BROKEN):
        for subtitle in packet.decode():
            text = bytes(getattr(subtitle, "dialogue", b"")).decode("utf-8", "replace")
            if text := _OVERRIDE.sub("", text).replace("\\N", "\n").strip():
                yield Line(start, start + float(packet.duration * packet.time_base), text)


def in_reel(lines: Sequence[Line], spans: Sequence[Shot]) -> list[Line]:
    """Cuts the lines to the spans, and moves them to their time in the reel."""
    found: list[Line] = []
    begin = 0.0
    for span in spans:
        for line in lines:
            start, stop = max(line.start, span.start_seconds), min(line.stop, span.stop_seconds)
            if stop - start > float(MILLISECONDS):
                shift = begin - span.start_seconds
                found.append(Line(round(start + shift, 3), round(stop + shift, 3), line.text))
        begin += span.duration_seconds
    return found


def in_turn(lines: Sequence[Line]) -> list[Line]:
    """Removes overlaps, which MP4 does not allow: lines shown at the same time become one text for that time."""
    found: list[Line] = []
    for start, stop in pairwise(sorted({time for line in lines for time in line[:2]})):
        text = "\n".join(line.text for line in lines if line.start <= start and stop <= line.stop)
        if found and (found[-1].stop, found[-1].text) == (start, text):
            found[-1] = found[-1]._replace(stop=stop)
        elif text:
            found.append(Line(start, stop, text))
    return found


def add_captions(output: OutputContainer, source: Source, spans: Sequence[Shot]) -> list[Packet[Any]]:
    """Adds a text track to MP4 or Matroska if the source has lines. Returns its packets; mux them first.

    Args:
        output: nothing is written to it yet.
        spans: of the source, in the order of the reel.
    """
    lines = in_turn(in_reel(lines_of(source), spans))
    if not lines:
        return []
    in_mp4 = output.format.name == "mp4"
    stream: Any = output.add_stream("mov_text" if in_mp4 else "subrip")
    stream.codec_context.subtitle_header = _HEADER
    stream.time_base = MILLISECONDS
    packets = []
    for line in lines:
        text = line.text.encode()[:65_535]
        # 3GPP TS 26.245, 5.17: the length, then the text.
        packet: Packet[Any] = Packet(len(text).to_bytes(2, "big") + text if in_mp4 else text)
        packet.pts = packet.dts = round(line.start / MILLISECONDS)
        packet.duration = max(1, round(line.stop / MILLISECONDS) - packet.pts)
        packet.time_base, packet.stream = MILLISECONDS, stream
        packets.append(packet)
    return packets
