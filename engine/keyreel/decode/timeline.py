"""The packets of a video, read without decoding: the times and the order of its frames, and where decoding may begin.

A frame's time is its packet's pts, so frames can be counted and chosen before anything is decoded. Where that is not
certain, `PlanBroken` is raised and everything is decoded instead.
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

TIME_BASE = Fraction(1, 90_000)  # where the container names none
_CLOCKS_RESTART = 0x200  # AVFMT_TS_DISCONT
_TRIAL_PACKETS = 24
_REORDERED = 32  # frames that may pass another one on the way from decoding to display

# Codecs in which a key packet needs nothing before it. Of those that predict from other frames, the ones in which
# FFmpeg's `skip_frame` may be set for each packet: libdav1d reads it once, VP9 ignores it, and a VP8 frame that is
# skipped may leave a segment map behind.
_SKIPPABLE = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
_INTRA = ("mjpeg", "prores", "dnxhd", "huffyuv", "ffvhuff", "png", "utvideo", "magicyuv", "jpeg2000", "v210")
_CODECS = {*_SKIPPABLE, *_INTRA, "av1", "vp8", "vp9", "h263", "flv1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "ffv1"}


@dataclass(frozen=True, slots=True)
class Clock:
    """Ticks to seconds from the start of the file, where players put zero."""

    numerator: int
    denominator: int
    zero: int

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream, first_ticks: int, late: int = 0) -> Clock:
        """Starts with the file, or at its first frame where that is earlier or no start is known.

        Args:
            container, stream: of the frames.
            first_ticks: of the first frame.
            late: by so many ticks the frames' pts are too late.
        """
        base, first, start = stream.time_base or TIME_BASE, first_ticks - late, start_seconds(container, stream)
        zero = first if start is None else min(round(start / base), first)
        return cls(base.numerator, base.denominator, zero + late)

    def seconds(self, ticks: int) -> float:
        return (ticks - self.zero) * self.numerator / self.denominator

    def ticks(self, seconds: float) -> int:
        return self.zero + math.floor(seconds * self.denominator / self.numerator)


def leap_seconds(container: InputContainer) -> float:
    """A frame that comes so much later than the one before is no pause: the clock was set anew there.

    Slides and lectures have pauses of minutes; containers in which clocks do start again (TS, PS, FLV) hardly do.
    """
    return 10.0 if clocks_restart(container) else 3600.0


def clocks_restart(container: InputContainer) -> bool:
    """Whether it is a container of recordings that may be joined as they are."""
    return bool(container.format.flags & _CLOCKS_RESTART)


@dataclass(frozen=True, slots=True)
class Timeline:
    """N packets of a stream in decode order, M of them shown as frames."""

    pts: I64  # [N] in ticks
    dts: I64  # [N] in ticks, pts where missing
    size: I64  # [N] bytes
    key: NDArray[np.bool_]  # [N] as the container says
    entry: NDArray[np.bool_]  # [N] decoding may begin there
    joint: NDArray[np.bool_]  # [N] and it may follow packets of another place
    shown: I64  # [M] packet of each frame, in display order
    end_ticks: int  # where the last frame is no longer shown
    clock: Clock
    promised_seconds: float | None  # how long the container says the stream is
    skippable: bool  # FFmpeg may skip frames that no other frame needs
    fields: bool  # a frame may be coded as two fields, in one packet or in two
    pixels: int  # of a coded picture

    @property
    def ticks(self) -> I64:
        """[M] pts of the frames in display order."""
        return self.pts[self.shown]

    @property
    def starts(self) -> F64:
        """[M] seconds from which each frame is shown, in display order."""
        return (self.ticks - self.clock.zero) * self.clock.numerator / self.clock.denominator

    def entries(self, ranks: Sequence[int] | I64) -> I64:
        """The packet at which decoding must begin for each of these frames, given by their place in display order.

        A leading picture (coded after a key frame, shown before it) may need frames before that key frame, so it is
        decoded from an earlier one.
        """
        places, packets = np.flatnonzero(self.entry), self.shown[np.asarray(ranks, np.int64)]
        chosen = np.searchsorted(places, packets, side="right") - 1
        while np.any(leading := (self.pts[places[chosen]] > self.pts[packets]) & (chosen > 0)):
            chosen -= leading
        return places[chosen]


def start_seconds(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """When the earlier of picture and sound begins, on the file's clock; None where neither says it.

    Sound before 0 is what an encoder needs to get going, and is not played.
    """
    starts = [
        start if own.index == stream.index else max(start, Fraction(0))
        for own in (stream, *container.streams.audio)
        if own.start_time is not None and own.time_base
        for start in [own.start_time * own.time_base]
    ]
    return min(starts, default=None)


def promised_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """How many seconds after the file's start the stream ends, as the header has it; None where it says nothing.

    A stream's duration is that of its pictures. A container's is that of everything in it; Matroska counts it from the
    clock's zero, and a recording that begins late is not as long as that.
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
        PlanBroken: frames cannot be told from packets alone.
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
    last = (-(1 << 63), 0)  # pts and duration of the frame that is shown last
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
    times, visible_packets = np.array(pts, np.int64), np.frombuffer(bytes(shown), np.bool_)
    fields = codec == "h264" and (context.field_order or 0) > 1
    _check_order(stream, first, times, visible_packets, np.frombuffer(bytes(entry), np.bool_), fields=fields)
    order = np.argsort(times, kind="stable")
    order = order[visible_packets[order]]
    if (np.diff(times[order]) * float(stream.time_base or TIME_BASE) > leap_seconds(container)).any():
        raise PlanBroken
    late = 0
    if container.format.name == "avi":  # has no pts: FFmpeg's guesses must be the times in the file, later by the same
        ahead = times[order] - np.sort(np.array(dts, np.int64)[visible_packets])
        if (ahead != ahead[0]).any():
            raise PlanBroken
        late = int(ahead[0])
    end = last[0] + (last[1] or int(np.diff(times[order[-2:]]).sum()) or 1)
    return Timeline(
        pts=times,
        dts=np.array(dts, np.int64),
        size=np.array(size, np.int64),
        key=np.frombuffer(bytes(key), np.bool_),
        entry=np.frombuffer(bytes(entry), np.bool_),
        joint=np.frombuffer(bytes(joint), np.bool_),
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
    """Whether the order of pts is surely that of display.

    Where a container does not state pts, FFmpeg guesses them, and files keep what was guessed.

    Raises:
        PlanBroken: it is not.
    """
    rank = np.argsort(np.argsort(pts[shown], kind="stable"))
    passed = np.zeros(len(rank), np.int64)  # frames decoded before each one and shown after it
    for shift in range(1, min(_REORDERED, len(rank))):
        passed[shift:] += rank[:-shift] > rank[shift:]
    depth, announced = int(passed.max(initial=0)), stream.codec_context.reorder_depth
    if len(np.unique(pts[shown])) < len(rank) or not _continuous(pts, shown, entry):
        raise PlanBroken
    if stream.codec_context.codec.canonical_name == "h264" and depth > announced:
        raise PlanBroken  # FFmpeg loses frames where the reordering that it knows of does not suffice
    leading = shown[: len(first)] & (pts[: len(first)] < pts[0])
    if fields or leading.any() or (announced and not depth and not entry.all()):
        _try_out(stream, first, shown, pts, leading)


def _continuous(pts: I64, shown: NDArray[np.bool_], entry: NDArray[np.bool_]) -> bool:
    """True where what is coded before an entry is shown before what is coded after it, except leading pictures."""
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
    """Decodes the first packets: each must give the frame that its pts promises.

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
