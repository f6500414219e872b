"""What the packets of a video tell without being decoded: the order and the times of its frames, and who needs whom.

A frame's time is its packet's pts, so that frames can be counted and picked before anything is decoded. That holds
where each packet has a pts and the order of pts is the order of display; where it does not surely hold, `PlanBroken`
says that all must be decoded.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from keyreel.decode.bitstream import Bitstream, Coded, Entry, bitstream
from keyreel.decode.sampling import PlanBroken
from keyreel.types import F64, I64

TIME_BASE = Fraction(1, 90_000)  # where the container names none
_UNKNOWN = -(1 << 63)  # a time that is missing


@dataclass(frozen=True, slots=True)
class Clock:
    """Ticks to seconds from the stream's start."""

    numerator: int
    denominator: int
    zero: int

    @classmethod
    def of(cls, stream: VideoStream, first_ticks: int) -> Clock:
        """Starts at the stream's start_time, or at its first frame where that is earlier or start_time is unknown."""
        base = stream.time_base or TIME_BASE
        zero = first_ticks if stream.start_time is None else min(stream.start_time, first_ticks)
        return cls(base.numerator, base.denominator, zero)

    def seconds(self, ticks: int) -> float:
        return (ticks - self.zero) * self.numerator / self.denominator

    def ticks(self, seconds: float) -> int:
        return self.zero + math.floor(seconds * self.denominator / self.numerator)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Packets of one stream, N in decode order from a place where decoding may begin, M of them shown as frames."""

    pts: I64  # [N] in ticks, no two alike among those that are shown
    dts: I64  # [N] in ticks, pts where missing
    size: I64  # [N] bytes
    keyframe: NDArray[np.bool_]  # [N] as the container says
    entry: NDArray[np.uint8]  # [N] Entry
    spare: NDArray[np.bool_]  # [N] no other packet needs it
    shown: I64  # [M] packet of each frame, in display order
    end_ticks: int  # where the last frame is no longer shown
    clock: Clock  # of the stream
    promised_seconds: float  # how long the container says the stream is, 0 where it does not
    place: int = 0  # packets of the stream before the first one
    last: bool = True  # no frames follow

    @property
    def ticks(self) -> I64:
        """[M] pts of the frames in display order."""
        return self.pts[self.shown]

    @property
    def starts(self) -> F64:
        """[M] seconds from which each frame is shown, in display order."""
        return (self.ticks - self.clock.zero) * self.clock.numerator / self.clock.denominator

    def entries(self, ranks: Sequence[int] | I64) -> I64:
        """The packet with which decoding must begin, for each frame in display order that is asked for.

        A picture that leads an open entry (coded after it, shown before it) may need the pictures before that one, so
        that it begins an entry earlier.
        """
        doors, packets = np.flatnonzero(self.entry), self.shown[np.asarray(ranks, np.int64)]
        door = np.searchsorted(doors, packets, side="right") - 1
        while np.any(late := (self.entry[doors[door]] == Entry.OPEN) & (self.pts[doors[door]] > self.pts[packets])):
            door -= late
            if door.min(initial=0) < 0:
                raise PlanBroken
        return doors[door]


class Ledger:
    """Notes what each packet of a stream says, in decode order.

    Args:
        container: at its start.
        stream: its video.

    Raises:
        PlanBroken: its codec is not known.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        context = stream.codec_context
        reader = bitstream(context.codec.canonical_name, bytes(context.extradata or b""))
        if reader is None:
            raise PlanBroken
        self._reader: Bitstream = reader
        self._stream = stream
        self._promised = promised_seconds(container, stream) or 0.0
        self._clock: Clock | None = None
        self._pts, self._dts, self._size = array("q"), array("q"), array("q")
        self._flags, self._entry = bytearray(), bytearray()  # key, hidden; Entry
        self._spare, self._shown = bytearray(), bytearray()
        self._order = array("q")  # rises in the order of display
        self._last = (_UNKNOWN, 0)  # pts and duration of what is shown last

    def __len__(self) -> int:
        return len(self._pts)

    @property
    def told(self) -> int:
        """Packets about which all is known."""
        return len(self._entry)

    def add(self, packet: Packet[VideoStream]) -> None:
        """The next packet.

        Raises:
            PlanBroken: it is damaged or odd.
        """
        pts = packet.pts
        if packet.is_corrupt or (len(self) and packet.has_sidedata("new_extradata")):
            raise PlanBroken
        answers = self._reader.read(bytes(packet), key=packet.is_keyframe, disposable=packet.is_disposable)
        self._pts.append(_UNKNOWN if pts is None else pts)
        self._dts.append(self._pts[-1] if packet.dts is None else packet.dts)
        self._size.append(packet.size)
        self._flags.append(packet.is_keyframe | packet.is_discard << 1)
        if pts is not None and not packet.is_discard:
            self._last = max(self._last, (pts, packet.duration or 0))
        self._take(answers)

    def end(self) -> None:
        """After the last packet.

        Raises:
            PlanBroken: packets are missing, or there is none.
        """
        self._take(self._reader.end())
        if self.told != len(self) or not len(self):
            raise PlanBroken

    def _take(self, answers: list[Coded]) -> None:
        for coded in answers:
            place = self.told
            shown = coded.shown == 1 and not self._flags[place] & 2
            if not coded.certain or coded.shown > 1 or (shown and self._pts[place] == _UNKNOWN):
                raise PlanBroken
            self._shown.append(shown)
            self._spare.append(coded.spare)
            self._entry.append(coded.entry)
            self._order.append(place if coded.order is None else coded.order)

    def entry(self, place: int) -> Entry:
        """Whether decoding may begin with a packet about which all is known."""
        return Entry(self._entry[place])

    def trails(self, place: int, door: int) -> bool:
        """True for a picture that is shown after an entry before it."""
        return bool(self._shown[place]) and self._pts[place] > self._pts[door]

    def shown_from(self, first: int, stop: int) -> int | None:
        """Lowest pts of the packets [first, stop) that are shown, in ticks."""
        return min((self._pts[n] for n in range(first, stop) if self._shown[n]), default=None)

    def timeline(self, first: int = 0, stop: int | None = None, until: int | None = None) -> Timeline:
        """Of the packets [first, stop), all of them known.

        Args:
            first: decoding may begin there.
            stop: by default the end of the stream.
            until: frames from these ticks on belong to another timeline.

        Raises:
            PlanBroken: the rank of a packet's pts is not surely the place of its frame.
        """
        cut = slice(first, stop)
        pts, shown = np.array(self._pts[cut], np.int64), np.frombuffer(bytes(self._shown[cut]), np.bool_)
        entry = np.frombuffer(bytes(self._entry[cut]), np.uint8)
        if not entry[0]:
            raise PlanBroken
        if first and entry[0] == Entry.OPEN:
            shown = shown & (pts >= pts[0])  # the leading pictures are the timeline's before
        order = np.argsort(pts, kind="stable")
        order = order[shown[order]]
        # Where a container does not state when each packet is shown, FFmpeg guesses, and files keep what was guessed.
        in_step = np.all(np.diff(np.array(self._order[cut], np.int64)[order]) > 0)
        if not in_step or not _continuous(pts, shown, entry, order):
            raise PlanBroken
        last = until is None
        if until is None:
            until = self._last[0] + (self._last[1] or int(np.diff(pts[order[-2:]]).sum()) or 1)
        else:
            order = order[pts[order] < until]
            if not len(order):
                raise PlanBroken
        keyframe = (np.frombuffer(bytes(self._flags[cut]), np.uint8) & 1) > 0
        spare = np.frombuffer(bytes(self._spare[cut]), np.bool_)
        dts, size = np.array(self._dts[cut], np.int64), np.array(self._size[cut], np.int64)
        self._clock = self._clock or Clock.of(self._stream, int(pts[order[0]]))
        return Timeline(pts, dts, size, keyframe, entry, spare, order, until, self._clock, self._promised, first, last)


def _continuous(pts: I64, shown: NDArray[np.bool_], entry: NDArray[np.uint8], order: I64) -> bool:
    """True where pts neither repeat nor start again, as seen from each entry."""
    if not len(order) or np.any(np.diff(pts[order]) == 0):
        return False
    limits = np.iinfo(np.int64)
    before = np.maximum.accumulate(np.where(shown, pts, limits.min))
    after = np.minimum.accumulate(np.where(shown, pts, limits.max)[::-1])[::-1]
    doors = np.flatnonzero(entry)
    later = doors[1:]
    closed = later[entry[later] == Entry.CLOSED]
    # What is coded before an entry is shown before what is coded after it, but for pictures that lead an open one.
    return bool(
        (entry[0] == Entry.CLOSED or after[0] >= pts[0])
        and np.all(before[later - 1] < pts[later])
        and np.all(pts[doors[:-1]] < after[later])
        and np.all(before[closed - 1] < after[closed])
    )


def promised_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """What the header says of the stream, else of the whole file; None where it says nothing."""
    if stream.duration and stream.duration > 0 and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration and container.duration > 0 else None


def scan(container: InputContainer, stream: VideoStream, checkpoint: Callable[[], None]) -> Timeline:
    """Reads all packets, decodes none.

    Args:
        container: at its start.
        stream: its video.
        checkpoint: called often; raises to stop.

    Raises:
        PlanBroken: not a stream that can be planned for.
    """
    ledger = Ledger(container, stream)
    try:
        for packet in container.demux(stream):
            checkpoint()
            if packet.size:
                ledger.add(packet)
    except av.error.FFmpegError as error:
        raise PlanBroken from error
    ledger.end()
    return ledger.timeline()
