"""Which packets must be fed to a decoder to get the wanted frames, and the feeding.

Decoding enters at the last place before a frame where it may begin, leaves out pictures that nobody wants and nothing
refers to, and stops after the last wanted frame of a group. Each frame that comes out is compared with the timeline;
at the first surprise `PlanBroken` says that all must be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.config import Sampling
from keyreel.decode.bitstream import Entry
from keyreel.decode.sampling import TOLERANCE_SECONDS, Decoder, Picture, PlanBroken
from keyreel.decode.timeline import Timeline
from keyreel.types import I64

_SEEK_PACKETS = 256  # reading that many costs more than a seek
_PART_PACKETS = 64  # a part of fewer costs more in starting a decoder than it wins


@dataclass(frozen=True, slots=True)
class Run:
    """What is decoded in one go, by a decoder that knows nothing of what came before.

    Where the next frame needs nothing of what was decoded, the decoder goes on without a new start: draining it costs
    more than it seems where it works on several pictures at a time.
    """

    feed: I64  # packets, rising; the first is an entry
    ranks: list[int]  # of the wanted frames, rising


def runs(timeline: Timeline, ranks: Sequence[int], *, gap: int = 0) -> list[Run]:
    """The packets that the frames of the ranks need.

    Args:
        timeline: of the stream.
        ranks: rising.
        gap: packets that are fed although nobody needs them, sooner than a new start is made.
    """
    needed = ~timeline.spare
    found: list[tuple[list[tuple[int, int]], list[int]]] = []  # spans of packets from an entry on, ranks
    last = -1
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        # A container that seeks makes its decoder forget the pictures that it holds.
        closed = timeline.entry[entry] == Entry.CLOSED and entry - last <= _SEEK_PACKETS
        if not found or (entry > last and (closed or int(needed[last + 1 : entry].sum()) > gap)):
            if not found or not closed:
                found.append(([], []))
            found[-1][0].append((entry, entry))
        spans, wanted = found[-1]
        wanted.append(rank)
        last = max(spans[-1][1], int(timeline.shown[rank]))
        spans[-1] = spans[-1][0], last
    return [
        Run(
            np.union1d(
                np.concatenate([first + np.flatnonzero(needed[first : last + 1]) for first, last in spans]),
                timeline.shown[wanted],
            ),
            wanted,
        )
        for spans, wanted in found
    ]


def parts(timeline: Timeline, ranks: Sequence[int], lanes: int) -> list[list[int]]:
    """Cuts rising ranks at entries, so that each part can be decoded by itself; several for each lane.

    A part is worth the decoder's start: where the frames need too few packets, there is one part.
    """
    sums = np.concatenate(([0], np.cumsum(~timeline.spare)))
    cuts: list[tuple[int, list[int]]] = []  # packets that a group of pictures needs, its ranks
    entry = -1
    for rank, first in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        if first > entry:
            cuts.append((0, []))
            entry = first
        needed, wanted = cuts[-1]
        cuts[-1] = max(needed, int(sums[timeline.shown[rank] + 1] - sums[entry])), wanted
        wanted.append(rank)
    least = max(_PART_PACKETS, sum(needed for needed, _ in cuts) // (4 * lanes))
    found: list[list[int]] = [[]]
    weight = 0
    for needed, wanted in cuts:
        if weight >= least:
            found.append([])
            weight = 0
        found[-1] += wanted
        weight += needed
    return found


def near(timeline: Timeline, sampling: Sampling) -> list[int]:
    """Ranks of cheap frames close to the wanted times start_seconds + n / fps: mode `near`.

    Of the frames of the window whose start lies within the tolerance of a time: the entry that is nearest to it; where
    there is none, the frame for which the fewest packets must be fed beyond those of the frames taken before, the
    nearest of them; where there is none either, the frame shown at that time. None is taken twice.
    """
    tolerance = sampling.tolerance_seconds
    tolerance = 0.5 / sampling.fps if tolerance is None else tolerance
    starts, packets = timeline.starts, timeline.shown
    doors, entries = timeline.entry[packets] > 0, timeline.entries(range(len(packets)))
    sums = np.concatenate(([0], np.cumsum(~timeline.spare)))
    stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
    end = min(stop, timeline.clock.seconds(timeline.end_ticks))
    found: list[int] = []
    last, fed = -1, -1  # rank taken last; packet up to which all that is needed is fed
    for n in count():
        t = sampling.start_seconds + n / sampling.fps
        if t + TOLERANCE_SECONDS >= end:
            return found
        low, high = max(t - tolerance, sampling.start_seconds) - TOLERANCE_SECONDS, t + tolerance + TOLERANCE_SECONDS
        first = max(last + 1, int(np.searchsorted(starts, low)))
        ranks = np.arange(first, int(np.searchsorted(starts, min(high, stop - TOLERANCE_SECONDS), side="right")))
        if not len(ranks):
            ranks = np.array([max(0, int(np.searchsorted(starts, t + TOLERANCE_SECONDS, side="right")) - 1)])
            if ranks[0] <= last:
                continue
        if doors[ranks].any():
            ranks = ranks[doors[ranks]]
        own = packets[ranks]
        # Up to the packet, from its entry or from where all is fed; and the packet itself.
        begun = np.where(entries[ranks] <= fed, np.minimum(fed + 1, own + 1), entries[ranks])
        cost = np.where(doors[ranks], 1, sums[own + 1] - sums[begun] + timeline.spare[own])
        best = int(np.lexsort((np.abs(starts[ranks] - t), np.where(doors[ranks], 0, cost)))[0])
        last, fed = int(ranks[best]), max(fed, int(own[best]))
        found.append(last)
    raise AssertionError  # the loop has no other end


class Packets:
    """The packets of a file by their place in decode order, rising.

    Args:
        container: at its start; nobody else reads it.
        stream: its video.
        timeline: of that stream.
        checkpoint: called often; raises to stop.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, timeline: Timeline, checkpoint: Callable[[], None]
    ) -> None:
        self._container, self._stream, self._timeline, self._checkpoint = container, stream, timeline, checkpoint
        self._packets: Iterator[Packet[VideoStream]] = container.demux(stream)
        self._place = 0  # of the packet that comes next

    def __call__(self, place: int) -> Packet[VideoStream]:
        """The packet at a place.

        Raises:
            PlanBroken: it is not found.
        """
        if not 0 <= place - self._place <= _SEEK_PACKETS:
            self._seek(place)
        while True:
            self._checkpoint()
            packet = self._read()
            if self._where(packet, self._place) is None:
                raise PlanBroken
            self._place += 1
            if self._place > place:
                return packet

    def _where(self, packet: Packet[VideoStream], place: int | None = None) -> int | None:
        """The place of a packet, sought at one place or everywhere; None where it is not clear."""
        timeline = self._timeline
        places = slice(0, len(timeline.pts)) if place is None else slice(place, place + 1)
        same = timeline.size[places] == packet.size
        if packet.pts is not None:
            same &= timeline.pts[places] == packet.pts
        found = np.flatnonzero(same)
        return places.start + int(found[0]) if len(found) == 1 else None

    def _read(self) -> Packet[VideoStream]:
        try:
            return next(packet for packet in self._packets if packet.size)
        except (av.error.FFmpegError, StopIteration) as error:
            raise PlanBroken from error

    def _seek(self, place: int) -> None:
        """Brings the container to a packet at or before `place`.

        Demuxers seek by dts, by pts, by bytes or by an index of their own, so that the first packet read says where one
        is; where that is too far, an earlier entry is tried, and at last the start.
        """
        timeline = self._timeline
        doors = np.flatnonzero(timeline.entry[: place + 1])
        for back in (1, 2, 5, len(doors)):
            door = doors[max(0, len(doors) - back)]
            try:
                self._container.seek(int(min(timeline.dts[door], timeline.pts[door])), stream=self._stream)
            except av.error.FFmpegError:
                continue
            self._packets = self._container.demux(self._stream)
            packet = self._read()
            found = self._where(packet)
            if found is not None and found <= place:
                self._packets = chain((packet,), self._packets)
                self._place = found
                return
        raise PlanBroken


class Cursor:
    """Gets frames by their place in display order, rising, with as little decoding as is safe.

    Args:
        fetch: gives the packet at a place, rising.
        decoder: of that stream; nobody else feeds it.
        timeline: of that stream.
        fed: called before each packet that is fed; may raise to stop.
        gap: see `runs`.
        keys: key frames are asked for, and the decoder must agree that they are.
    """

    def __init__(
        self,
        fetch: Callable[[int], Packet[VideoStream]],
        decoder: Decoder,
        timeline: Timeline,
        fed: Callable[[], None],
        *,
        gap: int = 0,
        keys: bool = False,
    ) -> None:
        self._fetch, self._decoder, self._timeline, self._fed = fetch, decoder, timeline, fed
        self._gap, self._keys = gap, keys
        self._rank = np.full(len(timeline.pts), -1)  # of each packet's frame, -1 where there is none
        self._rank[timeline.shown] = np.arange(len(timeline.shown))

    def frames(self, ranks: Sequence[int]) -> Iterator[tuple[int, Picture]]:
        """(rank, frame) of each of the ranks.

        Raises:
            PlanBroken: a frame is missing or damaged, or comes as a surprise.
        """
        for run in runs(self._timeline, ranks, gap=self._gap):
            yield from self._decode(run)

    def _decode(self, run: Run) -> Iterator[tuple[int, Picture]]:
        timeline, wanted = self._timeline, set(run.ranks)
        # Pictures that lead the entry may need what was not fed: they may fail, come out wrong, or not at all.
        first = int(run.feed[0])
        floor = int(timeline.pts[first]) if timeline.entry[first] == Entry.OPEN else -math.inf
        ranks = np.sort(self._rank[run.feed])
        expected = [int(rank) for rank in ranks[ranks >= 0] if timeline.pts[timeline.shown[rank]] >= floor]
        place = 0
        for packet in self._feed(run):
            leads = packet is not None and packet.pts is not None and packet.pts < floor
            try:
                frames = self._decoder.decode(packet)
            except av.error.FFmpegError as error:
                if leads:
                    continue
                raise PlanBroken from error
            for frame in frames:
                if frame.pts is not None and not floor <= frame.pts < timeline.end_ticks:
                    continue  # the one that comes next is needed by pictures that lead it
                rank = expected[place] if place < len(expected) else -1
                place += 1
                if rank < 0 or timeline.pts[timeline.shown[rank]] != frame.pts or frame.is_corrupt:
                    raise PlanBroken
                if rank in wanted:
                    if self._keys and not frame.key_frame:
                        raise PlanBroken
                    yield rank, frame
        if place < len(expected):
            raise PlanBroken
        self._decoder.flush()

    def _feed(self, run: Run) -> Iterator[Packet[VideoStream] | None]:
        """The packets of a run, then None, which drains the decoder."""
        for place in run.feed.tolist():
            packet = self._fetch(place)
            self._fed()
            yield packet
        yield None
