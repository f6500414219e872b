"""The vectors of a library in memory, kept up to date while searches go on.

Rows lie in segments that never move: one that is full is followed by another, so that growing copies nothing. A search
works on a `Snapshot`, which never changes; renewing writes behind the rows that any snapshot can see.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from keyreel.errors import Damaged
from keyreel.library.types import BOOL, Block, Record
from keyreel.types import F32, F64, I64
from keyreel_kernels.arrays import Arrays

# Rows of a segment: the first has the fewest, later ones as many as there are already, up to the most.
LEAST_ROWS, MOST_ROWS = 4096, 65_536
# A search waits so long for a renewal of another thread, then goes on with what there is: a video more or less takes
# milliseconds, the first load of a large library minutes.
PATIENCE_SECONDS = 0.25
# Videos may be replaced between a look at the records and one at the rows.
ATTEMPTS = 4


class RowStore(Protocol):
    """What a matrix needs of a store."""

    def version(self) -> tuple[int, ...]: ...
    def records(self, ids: Sequence[str] | None = None) -> list[Record]: ...
    def vectors(self, generations: Sequence[str]) -> Iterator[Block]: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of whole videos, one video after the other."""

    vectors: Any  # [capacity, D] float32 on the device
    pts_seconds: F64  # [capacity] float64
    keyframe: BOOL  # [capacity] bool


class Place(NamedTuple):
    """Where the rows [low, high) of a video lie."""

    segment: int  # number that the segment keeps for as long as it is there
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Spans:
    """Rows of videos, in the order in which they lie in memory; each array is [V] int64."""

    video: I64  # number of the record in its snapshot
    segment: I64
    low: I64
    high: I64

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, which: I64 | BOOL | slice) -> Spans:
        return Spans(self.video[which], self.segment[which], self.low[which], self.high[which])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state of the library."""

    version: tuple[int, ...]
    records: tuple[Record, ...]  # of the videos that can be searched, in order of path
    names: Mapping[str, int]  # ids and paths of all videos -> number of the record, -1 where there is nothing to search
    segments: Mapping[int, Segment]
    spans: Spans
    complete: bool  # whether the rows are here; they are not where they are more than the limit


class Segments:
    """Rows in memory: 4 D + 9 bytes each, and at most a segment more. Not safe to share between threads."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._segments: dict[int, Segment] = {}
        self._filled: dict[int, int] = {}
        self._places: dict[str, Place] = {}
        self._count = 0

    def __contains__(self, generation: str) -> bool:
        return generation in self._places

    def __len__(self) -> int:
        return sum(place.high - place.low for place in self._places.values())

    def hold(self, generation: str, vectors: Any, pts_seconds: F64, keyframe: BOOL) -> None:
        """Takes the rows of a video; the vectors may be on the host or on the device."""
        rows = len(vectors)
        last = self._count - 1
        low = self._filled.get(last, 0)
        if last not in self._segments or low + rows > len(self._segments[last].vectors):
            self._add_segment(rows, int(vectors.shape[1]))
            last, low = self._count - 1, 0
        segment, high = self._segments[last], low + rows
        with self._arrays.scope():
            segment.vectors[low:high] = self._arrays.to_device(vectors)
        segment.pts_seconds[low:high] = pts_seconds
        segment.keyframe[low:high] = keyframe
        self._filled[last] = high
        self._places[generation] = Place(last, low, high)

    def _add_segment(self, rows: int, width: int) -> None:
        size = max(rows, min(max(sum(self._filled.values()), LEAST_ROWS), MOST_ROWS))
        with self._arrays.scope():
            vectors = self._arrays.xp.empty((size, width), np.float32)
        # Pages that nothing was written to take no memory.
        self._segments[self._count] = Segment(vectors, np.zeros(size), np.zeros(size, np.bool_))
        self._filled[self._count] = 0
        self._count += 1

    def keep(self, generations: set[str]) -> None:
        """Lets the other rows go. A segment that is half empty then is written anew, one at a time."""
        self._places = {name: place for name, place in self._places.items() if name in generations}
        living = dict.fromkeys(self._segments, 0)
        for place in self._places.values():
            living[place.segment] += place.high - place.low
        for number in [n for n, rows in living.items() if 2 * rows < self._filled[n] or not rows]:
            if number == self._count - 1:
                self._count += 1  # nothing is appended to it any more
            segment = self._segments.pop(number)
            del self._filled[number]
            for name, place in list(self._places.items()):
                if place.segment == number:
                    own = slice(place.low, place.high)
                    self.hold(name, segment.vectors[own], segment.pts_seconds[own], segment.keyframe[own])

    def rows(self, generation: str) -> int:
        """How many are held of a generation."""
        place = self._places.get(generation)
        return 0 if place is None else place.high - place.low

    def snapshot(self, version: tuple[int, ...], records: Sequence[Record], names: Mapping[str, int]) -> Snapshot:
        """What is held of these records."""
        places = np.array([self._places[record.generation] for record in records], np.int64).reshape(-1, 3)
        order = np.lexsort((places[:, 1], places[:, 0]))
        segment, low, high = places[order].T.copy()
        spans = Spans(order.astype(np.int64), segment, low, high)
        return Snapshot(version, tuple(records), names, dict(self._segments), spans, complete=True)


def checked(block: Block) -> F32:
    """Its vectors.

    Raises:
        Damaged: there are numbers in it that are none, which would spoil the order of all videos.
    """
    if not np.isfinite(block.vectors).all():
        raise Damaged(f"vectors of generation {block.generation} hold values that are not finite", hint=REPAIR)
    return block.vectors


REPAIR = "`keyreel library verify --repair` finds the videos and has them indexed again"


def load(store: RowStore, held: Segments, records: Sequence[Record]) -> list[Record]:
    """Loads what is missing of the records' rows.

    Returns:
        The records whose rows are not there as they should be: their video has been replaced since, or is damaged.
    """
    missing = [record.generation for record in records if held.rows(record.generation) != record.frames]
    for block in store.vectors(missing) if missing else ():
        if len(block):
            held.hold(block.generation, checked(block), block.pts_seconds, block.keyframe)
    return [record for record in records if held.rows(record.generation) != record.frames]


class Matrix:
    """The vectors of all videos, [N, D] float32 in segments on the device. Safe to share between threads.

    Args:
        limit: above so many rows none are held.
    """

    def __init__(self, store: RowStore, arrays: Arrays, limit: int) -> None:
        self._store, self._arrays, self._limit = store, arrays, limit
        self._held = Segments(arrays)
        self._snapshot: Snapshot | None = None
        self._renewing = threading.Lock()

    def snapshot(self) -> Snapshot:
        """The library as it is now. While another thread is renewing: as that one found it, where it is quick, else
        as it was before; the very first time there is nothing to go on with, and every thread waits.

        Raises:
            Damaged: rows are missing or are no vectors.
            LibraryError: the store cannot be read.
        """
        held = self._snapshot
        if held is not None and held.version == self._store.version():
            return held
        if not self._renewing.acquire(timeout=-1 if held is None else PATIENCE_SECONDS):
            return self._snapshot or self.snapshot()
        try:
            held = self._snapshot
            if held is None or held.version != self._store.version():
                self._snapshot = held = self._renewed()
            return held
        finally:
            self._renewing.release()

    def _renewed(self) -> Snapshot:
        lacking: list[Record] = []
        for _ in range(ATTEMPTS):
            version = self._store.version()  # first: what is committed later is seen by the next renewal
            known = self._store.records()
            records = [record for record in known if record.status == "ok" and record.frames]
            names = {name: -1 for record in known for name in (record.id, record.path)}
            names |= {name: number for number, record in enumerate(records) for name in (record.id, record.path)}
            if sum(record.frames for record in records) > self._limit:
                self._held = Segments(self._arrays)
                empty = np.empty(0, np.int64)
                spans = Spans(empty, empty, empty, empty)
                return Snapshot(version, tuple(records), names, {}, spans, complete=False)
            # First, so that what takes the place of old rows does not lie beside them.
            self._held.keep({record.generation for record in records})
            lacking = load(self._store, self._held, records)
            if not lacking:
                return self._held.snapshot(version, records, names)
        raise missing_rows(lacking)


def missing_rows(records: Sequence[Record]) -> Damaged:
    """The error for records whose rows are not there, however often one looks."""
    what = [f"{record.path}: not all of its {record.frames} rows are there" for record in records]
    return Damaged(f"{len(what)} video(s) of the library lack rows, {what[0]}", what, hint=REPAIR)
