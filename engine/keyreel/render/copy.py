"""Makes a lossless reel: copies the packets of picture and sound, as fast as they can be read.

A span can begin where a decoder starts anew, and end where all coded frames have been shown. The ends of the spans move
to the nearest such places.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.packet import Packet

from keyreel.decode.headers import spliced
from keyreel.decode.packets import BROKEN
from keyreel.decode.runs import Packets
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.source import Source
from keyreel.decode.timeline import TIME_BASE, Timeline
from keyreel.errors import RenderError
from keyreel.render.captions import add_captions
from keyreel.render.files import atomic_write
from keyreel.render.sound import SoundReader
from keyreel.types import F64, I64, Progress, Shot

MOVE_SECONDS = 0.75  # farthest move of an end of a span
LEAST_SECONDS = 1.5  # shortest span, unless it was shorter before
EPSILON = 1e-6

# By container: the codecs of picture and sound that its players support.
CONTAINERS = {
    ".mp4": (("h264", "hevc", "av1"), ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac")),
    ".mkv": (("vp8", "vp9"), ("opus", "vorbis", "aac", "mp3", "flac")),
}
# MP4's names for codecs with parameter sets in the packets.
_TAGS = ("avc1", "avc3", "hvc1", "hev1")
# Negative composition offsets: without them B-pictures need an edit list, which some players ignore.
MP4_OPTIONS = {"movflags": "+faststart+negative_cts_offsets"}


class NotCopyable(Exception):
    """The spans cannot be copied; the message says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Packets [first, stop) in decoding order, shown on [start_ticks, stop_ticks); without those shown earlier."""

    first: int
    stop: int
    start_ticks: int
    stop_ticks: int


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What to copy for each span, and into which container."""

    timeline: Timeline
    pieces: tuple[Piece, ...]
    spans: tuple[Shot, ...]  # moved
    suffix: str  # ".mp4" or ".mkv"


def plan_copy(source: Source, spans: Sequence[Shot], shots: Sequence[Shot]) -> CopyPlan:
    """Moves the ends of the spans to places where packets can be cut.

    An end moves by 0.75 s at most, never over a cut. The spans stay disjoint.

    Args:
        spans: disjoint.
        shots: of the video, in time order.

    Raises:
        NotCopyable: no such place is near, or no container takes the packets.
        SourceError: the video cannot be read.
    """
    suffix = _container(source)
    timeline = source.timeline()
    if timeline is None:
        raise NotCopyable("its packets do not tell where decoding can start")
    if timeline.fields:
        raise NotCopyable("its pictures are interlaced")
    clock = timeline.clock
    cuts = sorted({0.0, *(shot.start_seconds for shot in shots)})
    entries, entry_seconds = _entries(timeline)
    exits, exit_ticks = _exits(timeline)
    exit_seconds = _seconds(timeline, exit_ticks)
    pieces, moved = dict[Shot, Piece](), dict[Shot, Shot]()
    stopped = -np.inf
    for span in sorted(spans, key=lambda span: span.start_seconds):
        low, high = _between(cuts, span.start_seconds)
        fits = (entry_seconds >= max(low, stopped) - EPSILON) & (entry_seconds < high - EPSILON)
        start = _nearest(entry_seconds, fits, span.start_seconds)
        if start is None:
            raise NotCopyable(f"no key frame to start at within {MOVE_SECONDS} s of {span.start_seconds:.2f} s")
        least = entry_seconds[start] + min(span.duration_seconds, LEAST_SECONDS)
        low, high = _between(cuts, span.stop_seconds - 2 * EPSILON)
        fits = (exit_seconds > max(low, least - EPSILON)) & (exit_seconds <= high + EPSILON)
        stop = _nearest(exit_seconds, fits & (exits > entries[start]), span.stop_seconds)
        if stop is None:
            raise NotCopyable(f"no frame to end at within {MOVE_SECONDS} s of {span.stop_seconds:.2f} s")
        first = int(entries[start])
        pieces[span] = Piece(first, int(exits[stop]), int(timeline.pts[first]), int(exit_ticks[stop]))
        moved[span] = Shot(clock.seconds(pieces[span].start_ticks), clock.seconds(pieces[span].stop_ticks))
        stopped = moved[span].stop_seconds
    return CopyPlan(timeline, tuple(pieces[span] for span in spans), tuple(moved[span] for span in spans), suffix)


def _container(source: Source) -> str:
    """The suffix of the container for this picture and sound."""
    with source.open() as container:
        stream = source.require_video(container)
        picture = stream.codec_context.codec.canonical_name
        if container.format.name == "avi":
            raise NotCopyable("AVI has no display times")
        if stream.codec_context.codec_tag.strip("\0") in ("dvh1", "dvhe", "dav1"):
            raise NotCopyable("Dolby Vision cannot be copied")
        sounds = container.streams.audio[:1]
        sound = sounds[0].codec_context.codec.canonical_name if sounds and sounds[0].codec_context else None
        if sounds and sound is None:
            raise NotCopyable("its audio codec is unknown")
    for suffix, (pictures, allowed) in CONTAINERS.items():
        if picture in pictures and (sound is None or sound in allowed):
            return suffix
    what = picture if sound is None or all(picture not in pictures for pictures, _ in CONTAINERS.values()) else sound
    raise NotCopyable(f"{what} is not copied: few players read it in MP4 or Matroska")


def _entries(timeline: Timeline) -> tuple[I64, F64]:
    """(packets at which a piece may begin, seconds of each), in time order."""
    places = np.flatnonzero(timeline.joint)
    return places, _seconds(timeline, timeline.pts[places])


def _exits(timeline: Timeline) -> tuple[I64, I64]:
    """(packets before which a piece may end, ticks at which its last frame ends), in time order.

    There all coded frames have been shown, so the piece has exactly its frames.
    """
    shown = np.zeros(len(timeline.pts), np.bool_)
    shown[timeline.shown] = True
    limits = np.iinfo(np.int64)
    before = np.maximum.accumulate(np.where(shown, timeline.pts, limits.min))
    after = np.minimum.accumulate(np.where(shown, timeline.pts, limits.max)[::-1])[::-1]
    places = np.flatnonzero(before[:-1] < after[1:]) + 1
    places = places[after[places] < limits.max]
    return np.append(places, len(shown)), np.append(after[places], timeline.end_ticks)


def _seconds(timeline: Timeline, ticks: I64) -> F64:
    clock = timeline.clock
    return (ticks - clock.zero) * clock.numerator / clock.denominator


def _between(cuts: Sequence[float], seconds: float) -> tuple[float, float]:
    """The cuts around a time."""
    place = bisect_right(cuts, seconds + EPSILON)
    return cuts[max(place - 1, 0)], cuts[place] if place < len(cuts) else np.inf


def _nearest(seconds: F64, fits: Any, wished: float) -> int | None:
    """The index of the nearest time that fits, within the allowed distance."""
    places = np.flatnonzero(fits & (np.abs(seconds - wished) <= MOVE_SECONDS + EPSILON))
    return int(places[np.abs(seconds[places] - wished).argmin()]) if len(places) else None


def write_copy(source: Source, plan: CopyPlan, path: Path, *, progress: Progress | None = None) -> None:
    """Writes the pieces one after the other.

    Frames keep their distances in time. Sound stays in step to half a packet (at most 12 ms for AAC at 44.1 kHz).

    Args:
        path: the file, with the plan's suffix; its folder must exist.
        progress: called with ("reel", seconds done, seconds in all).

    Raises:
        NotCopyable: the file differs from the planned one, or the container refuses its packets.
        RenderError: the file cannot be written.
        SourceError: the video cannot be opened.
    """
    try:
        with (
            atomic_write(path) as made,
            source.open() as container,
            closing(SoundReader(source)) as sound,
            av.open(str(made), "w", options=MP4_OPTIONS if plan.suffix == ".mp4" else {}) as output,
        ):
            try:
                _write(_Copy(source, plan, container, output), sound, progress)
                output.close()  # writes the rest
            except PlanBroken as error:
                raise NotCopyable("the file changed after it was read") from error
            except BROKEN as error:
                raise NotCopyable(f"the container refuses its packets: {error}") from error
    except OSError as error:
        raise RenderError(
            f"{path}: the reel cannot be written: {error}", hint="check that the folder exists and the disk has space"
        ) from error


class _Copy:
    """The packets of the source, with their times in the output."""

    def __init__(self, source: Source, plan: CopyPlan, container: Any, output: Any) -> None:
        self.plan, self._timeline = plan, plan.timeline
        stream = source.require_video(container)
        self.base = stream.time_base or TIME_BASE
        self._extradata = bytes(stream.codec_context.extradata or b"")
        self._codec = stream.codec_context.codec.canonical_name
        self._read = Packets(container, stream, self._timeline, lambda: None)
        self.video = output.add_stream_from_template(stream, opaque=True)
        if stream.sample_aspect_ratio:  # the container's, which it uses
            self.video.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
        if plan.suffix == ".mp4" and self._codec in ("h264", "hevc"):
            tag = stream.codec_context.codec_tag
            self.video.codec_context.codec_tag = tag if tag in _TAGS else {"h264": "avc1", "hevc": "hvc1"}[self._codec]
        self.audio = None
        if container.streams.audio:
            self.audio = output.add_stream_from_template(container.streams.audio[0], opaque=True)
        self.captions = add_captions(output, source, plan.spans)
        self.output = output
        kept, pts = [], []
        begin = 0
        for piece in plan.pieces:
            own = self._timeline.pts[piece.first : piece.stop]
            places = np.flatnonzero(own >= piece.start_ticks)
            kept.append(places + piece.first)
            pts.append(own[places] - piece.start_ticks + begin)
            begin += piece.stop_ticks - piece.start_ticks
        self.total = begin  # ticks
        self._kept = kept
        self._pts = np.concatenate(pts)
        self._dts = decode_times(self._pts)
        order = np.append(np.sort(self._pts), begin)
        self._lasts = order[np.searchsorted(order, self._pts, side="right")] - self._pts
        # MP4 adds up durations by dts: the last one makes the sum equal the shown time.
        self._lasts[-1] = max(1, begin + self._dts[0] - self._dts[-1])

    def pictures(self) -> Iterator[Iterator[tuple[float, Packet[Any]]]]:
        """Yields (dts in seconds, packet) of each piece."""
        number = 0
        for places in self._kept:
            yield self._piece(number, places)
            number += len(places)

    def _piece(self, number: int, places: I64) -> Iterator[tuple[float, Packet[Any]]]:
        for count, place in enumerate(places.tolist(), number):
            packet = self._read(place)
            if self._codec == "hevc" and count == number:
                packet = self._spliced(packet)
            packet.pts, packet.dts = int(self._pts[count]), int(self._dts[count])
            packet.duration = int(self._lasts[count])
            packet.time_base, packet.stream = self.base, self.video
            yield float(packet.dts * self.base), packet

    def _spliced(self, packet: Packet[Any]) -> Packet[Any]:
        data = bytes(packet)
        changed = spliced(data, self._extradata)
        if changed == data:
            return packet
        fresh: Packet[Any] = Packet(changed)
        fresh.is_keyframe = True
        return fresh


def _write(copy: _Copy, sound: SoundReader, progress: Progress | None) -> None:
    total = float(copy.total * copy.base)
    for caption in copy.captions:
        copy.output.mux(caption)
    begin, heard = 0.0, 0.0  # seconds of the output: start of this piece, end of the sound so far
    for piece, span, pictures in zip(copy.plan.pieces, copy.plan.spans, copy.pictures(), strict=True):
        length = float((piece.stop_ticks - piece.start_ticks) * copy.base)
        placed: list[tuple[float, Packet[Any]]] = []
        if copy.audio is not None:
            placed, heard = _sound_of(sound, span, begin, length, heard)
        for seconds, packet in heapq.merge(pictures, placed, key=lambda pair: pair[0]):
            if packet.stream is not copy.video:
                packet.stream = copy.audio
            elif progress is not None:
                progress("reel", min(max(seconds, begin), begin + length), total)
            copy.output.mux(packet)
        begin += length
    if progress is not None:
        progress("reel", total, total)


def _sound_of(
    reader: SoundReader, span: Shot, begin: float, length: float, heard: float
) -> tuple[list[tuple[float, Packet[Any]]], float]:
    """The sound packets of a span with their seconds in the output, and where the sound ends.

    Packets follow those of the previous span without a gap, as players play them, within half a packet of their
    picture: the first packet is the one whose own time is nearest to its new place.
    """
    found: list[tuple[float, Packet[Any]]] = []
    shift: float | None = None  # from the source's time to the output's
    for packet, seconds in reader.packets(span.start_seconds):
        if seconds is None:
            continue
        lasts = float((packet.duration or 0) * (packet.time_base or 0))
        due = begin + seconds - span.start_seconds
        if shift is None:
            follows = heard if heard > begin - lasts else begin  # or silence before it
            if due + lasts / 2 < follows:
                continue  # the next one is nearer
            shift = (follows if due - follows <= lasts / 2 else due) - seconds
        at = seconds + shift
        if at + lasts / 2 > begin + length:
            break
        found.append((at, packet))
        heard = at + lasts
    for at, packet in found:
        base = packet.time_base or Fraction(1, 1000)
        packet.pts = packet.dts = round(at / base)
    return found, heard


def decode_times(pts: I64) -> I64:
    """[N] int64 dts for packets in decoding order: each picture is decoded when it is shown, or earlier.

    They are the pts in rising order, shifted by the largest number of pictures that any picture is ahead.
    """
    order = np.sort(pts)
    ahead = int((np.arange(len(pts)) - np.searchsorted(order, pts)).max(initial=0))
    if not ahead:
        return order
    step = max(1, int(np.median(np.diff(order))))
    return np.concatenate([order[0] - step * np.arange(ahead, 0, -1), order[:-ahead]])
