"""Reads the packets of a video without decoding: times and order of the frames, and where decoding may begin.

The time of a frame is the pts of its packet, so frames can be counted and chosen before decoding. If that is not
certain, it raises `PlanBroken`, and the caller decodes everything.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from keyreel.decode.headers import FrameNumbers, Keys, is_shown
from keyreel.decode.packets import BROKEN
from keyreel.decode.sampling import PlanBroken
from keyreel.types import F64, I64

TIME_BASE = Fraction(1, 90_000)  # if the container states none
_CLOCKS_RESTART = 0x200  # AVFMT_TS_DISCONT
_TRIAL_PACKETS = 24
_REORDERED = 32  # most frames that are decoded before, but shown after another

# Codecs whose key packets need no earlier packets. Below: codecs with prediction for which FFmpeg's `skip_frame` can
# change with each packet. libdav1d reads it once, VP9 ignores it, and a skipped VP8 frame can change the segment map.
_SKIPPABLE = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
_INTRA = ("mjpeg", "prores", "dnxhd", "huffyuv", "ffvhuff", "png", "utvideo", "magicyuv", "jpeg2000", "v210")
_CODECS = {*_SKIPPABLE, *_INTRA, "av1", "vp8", "vp9", "h263", "flv1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "ffv1"}


@dataclass(frozen=True, slots=True)
class Clock:
    """Converts ticks to seconds from the start of the file, which players show as zero."""

    numerator: int
    denominator: int
    zero: int

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream, first_ticks: int, late: int = 0) -> Clock:
        """Starts at the file's start, or at the first frame if that is earlier or no start is known.

        Args:
            container, stream: of the frames.
            first_ticks: of the first frame.
            late: the pts of the frames are too late by this many ticks.
        """
        base, first, start = stream.time_base or TIME_BASE, first_ticks - late, start_seconds(container, stream)
        zero = first if start is None else min(round(start / base), first)
        return cls(base.numerator, base.denominator, zero + late)

    def seconds(self, ticks: int) -> float:
        """Converts ticks to seconds."""
        return (ticks - self.zero) * self.numerator / self.denominator

    def ticks(self, seconds: float) -> int:
        """Converts seconds to ticks."""
        return self.zero + math.floor(seconds * self.denominator / self.numerator)


def leap_seconds(container: InputContainer) -> float:
    """Seconds: a larger step from frame to frame is not a pause, but a reset of the clock.

    Slides and lectures have pauses of minutes; containers whose clocks start again (TS, PS, FLV) hardly have.
    """
    return 10.0 if clocks_restart(container) else 3600.0


def clocks_restart(container: InputContainer) -> bool:
    """Whether recordings in this container can be joined by joining the files."""
    return bool(container.format.flags & _CLOCKS_RESTART)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The N packets of a stream in decoding order, and its M frames in display order."""

    pts: I64  # [N] in ticks
    dts: I64  # [N] in ticks, pts where missing
    size: I64  # [N] bytes
    key: NDArray[np.bool_]  # [N] by the container
    entry: NDArray[np.bool_]  # [N] decoding may begin here
    joint: NDArray[np.bool_]  # [N] and also after packets of another place
    shown: I64  # [M] number of each frame's packet, in display order
    end_ticks: int  # end of the last frame, in ticks
    clock: Clock
    promised_seconds: float | None  # duration by the container
    skippable: bool  # FFmpeg may skip frames that no other frame needs
    fields: bool  # a frame may be two fields, in one packet or two
    pixels: int  # of a coded picture

    @property
    def ticks(self) -> I64:
        """[M] int64 pts of the frames, in display order."""
        return self.pts[self.shown]

    @property
    def starts(self) -> F64:
        """[M] float64: the second at which each frame appears, in display order."""
        return (self.ticks - self.clock.zero) * self.clock.numerator / self.clock.denominator

    def entries(self, ranks: Sequence[int] | I64) -> I64:
        """The packets at which decoding of these frames must begin. `ranks`: numbers in display order.

        A leading picture (coded after a key frame, shown before it) may need frames before that key frame, so its
        decoding begins at an earlier one.
        """
        places, packets = np.flatnonzero(self.entry), self.shown[np.asarray(ranks, np.int64)]
        chosen = np.searchsorted(places, packets, side="right") - 1
        while np.any(leading := (self.pts[places[chosen]] > self.pts[packets]) & (chosen > 0)):
            chosen -= leading
        return places[chosen]


def start_seconds(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """The earlier start of picture and sound, in seconds on the file's clock; None if neither is stated.

    Sound before 0 is priming of the encoder, which players skip.
    """
    starts = [
        start if own.index == stream.index else max(start, Fraction(0))
        for own in (stream, *container.streams.audio)
        if own.start_time is not None and own.time_base
        for start in [own.start_time * own.time_base]
    ]
    return min(starts, default=None)


def promised_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """The end of the stream by the header, in seconds after the file's start; None if not stated.

    A stream's duration is that of its pictures, a container's that of all streams. Matroska counts from zero of the
    clock, so a recording that begins late is shorter.
    """
    start = start_seconds(container, stream) or Fraction(0)
    if stream.duration is not None and stream.time_base is not None:
        own = Fraction(0) if stream.start_time is None else stream.start_time * stream.time_base
        return float(max(own - start, Fraction(0)) + stream.duration * stream.time_base)
    if container.duration is None:
        return None
    seconds = Fraction(container.duration, av.time_base)
    return float(seconds - start if "matroska" in container.format.name and 0 < start < seconds else seconds)


def scan(
    container: InputContainer,
    stream: VideoStream,
    packets: Iterable[Packet[VideoStream]],
    checkpoint: Callable[[], None],
) -> Timeline:
    """Reads all packets.

    Args:
        container: of the stream.
        stream: its video; its decoder may be used.
        packets: of the stream, from its start.
        checkpoint: called often; raises to stop.

    Raises:
        PlanBroken: the packets do not tell the frames.
    """
    context = stream.codec_context
    codec = context.codec.canonical_name
    if codec not in _CODECS:
        raise PlanBroken
    extradata = bytes(context.extradata or b"")
    keys = Keys(codec, extradata, context.pix_fmt or "")
    numbers = FrameNumbers(extradata) if codec == "h264" else None
    pts, dts, size = array("q"), array("q"), array("q")
    key, entry, joint, shown = bytearray(), bytearray(), bytearray(), bytearray()
    first: list[Packet[VideoStream]] = []
    last = (-(1 << 63), 0)  # pts and duration of the last frame in display order
    try:
        for packet in packets:
            checkpoint()
            if not packet.size:
                continue
            if packet.pts is None or packet.is_corrupt or (pts and packet.has_sidedata("new_extradata")):
                raise PlanBroken
            visible = is_shown(codec, packet) and not packet.is_discard
            if numbers is not None and not numbers.follow(bytes(packet)):
                raise PlanBroken
            pts.append(packet.pts)
            dts.append(packet.pts if packet.dts is None else packet.dts)
            size.append(packet.size)
            key.append(packet.is_keyframe)
            enters = visible and packet.is_keyframe and keys.is_entry(packet)
            joint.append(enters and keys.is_joint(packet))
            entry.append(not len(entry) or enters)
            shown.append(visible)
            if visible:
                last = max(last, (packet.pts, packet.duration or 0))
            if len(first) < _TRIAL_PACKETS:
                first.append(packet)
                keys.learn(packet)
    except BROKEN as error:
        raise PlanBroken from error
    if not any(shown):
        raise PlanBroken
    times, visible_packets = np.array(pts, np.int64), np.frombuffer(shown, np.bool_)
    fields = codec == "h264" and (context.field_order or 0) > 1
    entries = np.frombuffer(entry, np.bool_)
    _check_order(stream, first, times, visible_packets, entries, fields=fields)
    order = np.argsort(times, kind="stable")
    order = order[visible_packets[order]]
    if (np.diff(times[order]) * float(stream.time_base or TIME_BASE) > leap_seconds(container)).any():
        raise PlanBroken
    late = 0
    if container.format.name == "avi":  # no pts: FFmpeg's guesses must equal the times in the file, up to a constant
        ahead = times[order] - np.sort(np.array(dts, np.int64)[visible_packets])
        if (ahead != ahead[0]).any():
            raise PlanBroken
        late = int(ahead[0])
    end = last[0] + (last[1] or int(np.diff(times[order[-2:]]).sum()) or 1)
    return Timeline(
        pts=times,
        dts=np.array(dts, np.int64),
        size=np.array(size, np.int64),
        key=np.frombuffer(key, np.bool_),
        entry=entries,
        joint=np.frombuffer(joint, np.bool_),
        shown=order,
        end_ticks=end,
        clock=Clock.of(container, stream, int(times[order[0]]), late),
        promised_seconds=promised_seconds(container, stream),
        skippable=codec in _SKIPPABLE and not fields and keys.skippable and (numbers is None or numbers.known),
        fields=fields,
        pixels=stream.width * stream.height,
    )


def _check_order(
    stream: VideoStream,
    first: list[Packet[VideoStream]],
    pts: I64,
    shown: NDArray[np.bool_],
    entry: NDArray[np.bool_],
    *,
    fields: bool,
) -> None:
    """Checks that the order of pts is the order of display.

    If a container has no pts, FFmpeg guesses them, and files made with it keep the guesses.

    Raises:
        PlanBroken: it is not certain.
    """
    rank = np.argsort(np.argsort(pts[shown], kind="stable"))
    passed = np.zeros(len(rank), np.int64)  # frames decoded before each one and shown after it
    for shift in range(1, min(_REORDERED, len(rank))):
        passed[shift:] += rank[:-shift] > rank[shift:]
    depth, announced = int(passed.max(initial=0)), stream.codec_context.reorder_depth
    if len(np.unique(pts[shown])) < len(rank) or not _continuous(pts, shown, entry):
        raise PlanBroken
    if stream.codec_context.codec.canonical_name == "h264" and depth > announced:
        raise PlanBroken  # FFmpeg loses frames if the stream reorders more than it states
    leading = shown[: len(first)] & (pts[: len(first)] < pts[0])
    if fields or leading.any() or (announced and not depth and not entry.all()):
        _try_out(stream, first, shown, pts, leading)


def _continuous(pts: I64, shown: NDArray[np.bool_], entry: NDArray[np.bool_]) -> bool:
    """Whether frames coded before an entry are shown before those coded after it, except leading pictures."""
    limits = np.iinfo(np.int64)
    before = np.maximum.accumulate(np.where(shown, pts, limits.min))
    after = np.minimum.accumulate(np.where(shown, pts, limits.max)[::-1])[::-1]
    places = np.flatnonzero(entry)
    later = places[1:]
    return bool(np.all(before[later - 1] < pts[later]) and np.all(pts[places[:-1]] < after[later]))


def _try_out(
    stream: VideoStream,
    first: list[Packet[VideoStream]],
    shown: NDArray[np.bool_],
    pts: I64,
    leading: NDArray[np.bool_],
) -> None:
    """Decodes the first packets, and checks that each gives the frame of its pts.

    Raises:
        PlanBroken: frames are missing or in another order.
    """
    context = stream.codec_context
    try:
        context.flush_buffers()
        frames = [frame.pts for packet in [*first, None] for frame in context.decode(packet)]
    except BROKEN as error:
        raise PlanBroken from error
    expected = np.sort(pts[: len(first)][shown[: len(first)]]).tolist()
    if frames != expected:
        raise PlanBroken
