"""Decodes the wanted frames of a file from its packets, and as few others as possible.

Decoding begins at the key frame before a wanted frame, and stops after the last wanted frame of a group. In between,
FFmpeg skips unwanted frames that no other frame needs. Each decoded frame is checked against the timeline; at the first
difference it raises `PlanBroken`, and the caller decodes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.decode.decoder import Worker
from keyreel.decode.packets import BROKEN, demux
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.timeline import Timeline

_SEEK_PACKETS = 64  # reading this many takes longer than a seek: 0.3 ms, against 0.03 to 0.13 by container
_READ_PACKETS, _READ_BYTES = 32, 4 << 20  # most that are read at a time; the last packet may exceed it
_PART_PACKETS = 64  # a smaller part is not worth starting a decoder


@dataclass(slots=True)
class Run:
    """Packets [first, stop) to decode in one go, and the wanted frames among them: numbers in display order, rising."""

    first: int
    stop: int
    ranks: list[int]


def runs(timeline: Timeline, ranks: Sequence[int], *, gap: int = 0) -> list[Run]:
    """Finds the packets that these frames need.

    Args:
        timeline: of the stream.
        ranks: rising.
        gap: decode up to this many unneeded packets rather than start anew.
    """
    found: list[Run] = []
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        if not found or entry > found[-1].stop + gap:
            found.append(Run(entry, entry, []))
        # The second field of a frame may be a separate packet, which must not be lost.
        stop = min(int(timeline.shown[rank]) + 1 + timeline.fields, len(timeline.pts))
        found[-1].stop = max(found[-1].stop, stop)
        found[-1].ranks.append(rank)
    return found


def parts(timeline: Timeline, ranks: Sequence[int], workers: int) -> list[list[int]]:
    """Cuts rising ranks at entries, so that parts can be decoded independently; several for each worker.

    A part must be worth the start of a decoder: with too few packets there is one part.
    """
    if not ranks:
        return [[]]
    groups: dict[int, list[int]] = {}  # frames of each entry
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        groups.setdefault(entry, []).append(rank)
    needed = [max(int(timeline.shown[rank]) for rank in own) + 1 - entry for entry, own in groups.items()]
    minimum = max(_PART_PACKETS, sum(needed) // (4 * workers))
    found: list[list[int]] = [[]]
    weight = 0
    for packets, own in zip(needed, groups.values(), strict=True):
        if weight >= minimum:
            found.append([])
            weight = 0
        found[-1] += own
        weight += packets
    return found


class Packets:
    """Reads the packets of a file by their number in decoding order, rising.

    Args:
        container: at its start; nobody else may read it.
        stream: its video.
        timeline: of that stream.
        checkpoint: called often; raises to stop.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, timeline: Timeline, checkpoint: Callable[[], None]
    ) -> None:
        self._container, self._stream, self._timeline, self._checkpoint = container, stream, timeline, checkpoint
        self._packets: Iterator[Packet[VideoStream]] = demux(container, stream)
        self._place = 0  # number of the next packet

    def __call__(self, place: int) -> Packet[VideoStream]:
        """Returns the packet with this number.

        Raises:
            PlanBroken: the packet is not found.
        """
        if not 0 <= place - self._place <= _SEEK_PACKETS:
            self._seek(place)
        while True:
            self._checkpoint()
            packet = self._read()
            if not self._is_at(packet, self._place):
                raise PlanBroken
            self._place += 1
            if self._place > place:
                return packet

    def _is_at(self, packet: Packet[VideoStream], place: int) -> bool:
        timeline = self._timeline
        return place < len(timeline.pts) and (packet.pts, packet.size) == (timeline.pts[place], timeline.size[place])

    def _find(self, packet: Packet[VideoStream]) -> int:
        """The number of a packet; beyond the end if it is unclear."""
        found = np.flatnonzero((self._timeline.pts == packet.pts) & (self._timeline.size == packet.size))
        return int(found[0]) if len(found) == 1 else len(self._timeline.pts)

    def _read(self) -> Packet[VideoStream]:
        try:
            for packet in self._packets:
                if packet.size:
                    return packet
        except BROKEN as error:
            raise PlanBroken from error
        raise PlanBroken

    def _seek(self, place: int) -> None:
        """Moves the container to a packet at or before `place`.

        Demuxers seek by dts, pts, bytes or an index, so only the first packet tells where the container is. If that is
        too far, it tries earlier entries, at last the start.
        """
        timeline = self._timeline
        entries = np.flatnonzero(timeline.entry[: place + 1])
        for back in (1, 2, 5, len(entries)):
            entry = entries[max(0, len(entries) - back)]
            try:
                self._container.seek(int(min(timeline.dts[entry], timeline.pts[entry])), stream=self._stream)
            except BROKEN:
                continue
            self._packets = demux(self._container, self._stream)
            packet = self._read()
            if (found := self._find(packet)) <= place:
                self._packets = chain((packet,), self._packets)
                self._place = found
                return
        raise PlanBroken


class Cursor:
    """Decodes frames by their number in display order, rising.

    Args:
        worker: decodes; nobody else may use it.
        timeline: of its stream.
        checkpoint: called often; raises to stop.
        fed: called before each packet goes to the decoder.
        turn: shared by the cursors of a file, entered while one of them reads.
        gap: see `runs`.
        keys: the ranks are key frames, which the decoder must confirm.
    """

    def __init__(
        self,
        worker: Worker,
        timeline: Timeline,
        checkpoint: Callable[[], None],
        fed: Callable[[], None],
        turn: AbstractContextManager[object],
        *,
        gap: int = 0,
        keys: bool = False,
    ) -> None:
        self._packets = Packets(worker.container, worker.stream, timeline, checkpoint)
        self._worker, self._timeline, self._fed, self._gap, self._keys = worker, timeline, fed, gap, keys
        self._turn = turn
        self._rank = np.full(len(timeline.pts), -1)  # rank of each packet's frame, -1 without one
        self._rank[timeline.shown] = np.arange(len(timeline.shown))

    def frames(self, ranks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yields (rank, frame) for each of the ranks; each call goes further ahead in the file.

        Raises:
            PlanBroken: a frame is missing, damaged, or another than expected.
        """
        for run in runs(self._timeline, ranks, gap=self._gap):
            yield from self._decode(run)

    def _decode(self, run: Run) -> Iterator[tuple[int, Any]]:
        timeline, wanted = self._timeline, set(run.ranks)
        start = int(timeline.pts[run.first]) if run.first else None
        ranks = np.sort(self._rank[run.first : run.stop])
        ranks = ranks[ranks >= 0]
        # Leading pictures of the entry may need frames that were not decoded: they can fail, be wrong, or be missing.
        expected = [
            (rank, pts)
            for rank, pts in zip(ranks.tolist(), timeline.ticks[ranks].tolist(), strict=True)
            if start is None or pts >= start
        ]

        def optional(rank: int, pts: int) -> bool:
            return timeline.skippable and rank not in wanted and pts != start

        place = 0
        for packet, needed in self._feed(run, wanted):
            try:
                frames = self._worker.decode(packet, wanted=needed)
            except BROKEN as error:
                if packet is not None and start is not None and packet.pts is not None and packet.pts < start:
                    continue
                raise PlanBroken from error
            for frame in frames:
                if start is not None and frame.pts is not None and frame.pts < start:
                    continue
                while place < len(expected) and expected[place][1] != frame.pts and optional(*expected[place]):
                    place += 1
                if place == len(expected) or expected[place][1] != frame.pts or frame.is_corrupt:
                    raise PlanBroken
                rank = expected[place][0]
                place += 1
                key = frame.pts == start or (self._keys and rank in wanted)
                if not self._worker.agrees(frame, key=key, fields=timeline.fields):
                    raise PlanBroken
                if rank in wanted:
                    yield rank, frame
        if not all(optional(*left) for left in expected[place:]):
            raise PlanBroken
        self._worker.flush()

    def _feed(self, run: Run, wanted: set[int]) -> Iterator[tuple[Any, bool]]:
        """Yields the packets of a run and whether their frames are needed, then None, which drains the decoder."""
        places = iter(range(run.first, run.stop))
        while some := self._read(places):
            for place, packet in some:
                self._fed()
                yield packet, not self._timeline.skippable or int(self._rank[place]) in wanted
        yield None, True

    def _read(self, places: Iterator[int]) -> list[tuple[int, Any]]:
        """The next packets, prepared; none at the end.

        FFmpeg's functions let other threads run, a dozen times a packet. Cursors that read at the same time would wake
        each other at each of them, which takes longer than reading.
        """
        some, size = list[tuple[int, Any]](), 0
        with self._turn:
            for place in places:
                packet = self._packets(place)
                size += packet.size
                some.append((place, self._worker.prepare(packet)))
                if len(some) == _READ_PACKETS or size > _READ_BYTES:
                    break
        return some
