"""Holds the vectors of a library in memory: one matrix, updated while searches go on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keyreel.errors import Damaged
from keyreel.library.errors import REPAIR
from keyreel.library.shards import Shards
from keyreel.library.table import Tables
from keyreel.library.types import BOOL, F16, I32, Record, Rows
from keyreel.types import F32, F64, I64
from keyreel_kernels.arrays import Arrays

SPARE_ROWS = 65_536  # spare rows for growth, besides an eighth
# Seconds that a search waits for another thread to load; then it uses the old vectors.
PATIENCE_SECONDS = 0.25
ATTEMPTS = 4  # attempts: videos may be replaced between reading records and rows


@dataclass(frozen=True, slots=True)
class Spans:
    """The rows of videos, in the order of the matrix: scenes, then subjects."""

    video: I64  # [V] int64: index of the record in the snapshot
    low: I64  # [V] int64: first scene; one for each frame
    high: I64  # [V] int64: end of the scenes
    first: I64  # [V] int64: first subject, >= high
    last: I64  # [V] int64: end of the subjects

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, which: I64 | BOOL | slice) -> Spans:
        return Spans(*(getattr(self, name)[which] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of whole videos, one after the other. New rows go behind all that are in use, so readers need no lock."""

    vectors: Any  # [capacity, D] float32 on the device
    pts_seconds: F64  # [capacity] float64
    keyframe: BOOL  # [capacity] bool
    begins: BOOL  # [capacity] bool: a scene begins with this frame
    back: I32  # [capacity] int32: rows from the scene to the subject of a frame; 0 for scenes
    region: F16  # [capacity, 4] float16: `Subjects.region` in rows of scenes, NaN without one

    @classmethod
    def empty(cls, rows: int, width: int, arrays: Arrays) -> Matrix:
        """Allocates an unwritten matrix."""
        with arrays.scope():
            vectors = arrays.xp.empty((rows, width), np.float32)
        # Unwritten pages take no memory.
        times, keyframe, begins = np.empty(rows), np.empty(rows, np.bool_), np.empty(rows, np.bool_)
        return cls(vectors, times, keyframe, begins, np.empty(rows, np.int32), np.empty((rows, 4), np.float16))

    def __getitem__(self, rows: slice) -> Matrix:
        return Matrix(*(getattr(self, name)[rows] for name in self.__slots__))

    @classmethod
    def of(cls, rows: Rows, scenes: Sequence[tuple[float, float]]) -> Matrix:
        """The rows of one video, on the CPU."""
        count, own = len(rows), rows.subjects
        place = np.searchsorted(rows.pts_seconds, [start for start, _ in scenes])
        begins = np.isin(np.arange(count), place)
        if own is None:
            none = np.full((count, 4), np.nan, np.float16)
            return cls(rows.vectors, rows.pts_seconds, rows.keyframe, begins, np.zeros(count, np.int32), none)
        back = count + np.arange(len(own)) - own.row
        return cls(
            np.concatenate([rows.vectors, own.vectors]),
            np.concatenate([rows.pts_seconds, rows.pts_seconds[own.row]]),
            np.concatenate([rows.keyframe, np.zeros(len(own), np.bool_)]),
            np.concatenate([begins, np.zeros(len(own), np.bool_)]),
            np.concatenate([np.zeros(count, np.int32), back.astype(np.int32)]),
            np.concatenate([own.region, np.full((len(own), 4), np.nan)]).astype(np.float16),
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A library at one version. It never changes."""

    version: int
    records: tuple[Record, ...]  # of the searchable videos, in order of path
    names: Mapping[str, int]  # id or path of each video -> index of its record, -1 without vectors
    matrix: Matrix | None  # None if the library has more rows than the limit
    spans: Spans
    left_out: tuple[str, ...] = ()  # paths of videos with damaged or incomplete rows


class Vectors:
    """The vectors of all videos, 4 D + 22 bytes a row. Safe to share between threads.

    Args:
        limit: holds nothing if the library has more rows.
        whole: the whole library, if the tables are a shard: all its rows count for the limit.
    """

    def __init__(self, tables: Tables, width: int, arrays: Arrays, limit: int, whole: Shards | None = None) -> None:
        self._tables, self._width, self._arrays, self._limit, self._whole = tables, width, arrays, limit, whole
        self._matrix = Matrix.empty(0, width, arrays)
        # generation -> first scene, first subject, end
        self._places: dict[str, tuple[int, int, int]] = {}
        self._used = 0
        self._snapshot: Snapshot | None = None
        self._loading = threading.Lock()

    def snapshot(self) -> Snapshot:
        """Returns the current state of the library.

        While another thread loads for long, it returns the state before, except the first time.
        """
        held = self._snapshot
        if held is not None and held.version == self._tables.version():
            return held
        if not self._loading.acquire(timeout=-1 if held is None else PATIENCE_SECONDS):
            return self._snapshot or self.snapshot()
        try:
            held = self._snapshot
            if held is None or held.version != self._tables.version():
                self._snapshot = held = self._load()
            return held
        finally:
            self._loading.release()

    def part(self, snapshot: Snapshot, numbers: I64) -> Snapshot:
        """Returns a snapshot of a few videos of a larger one, with their rows."""
        records = [snapshot.records[number] for number in np.sort(numbers).tolist()]
        part = Vectors(self._tables, self._width, self._arrays, self._limit)
        part._matrix = Matrix.empty(sum(record.rows for record in records), self._width, self._arrays)
        lacking = part._hold(records)
        return part._snapshot_of(snapshot.version, records, snapshot.names, lacking)

    def _load(self) -> Snapshot:
        lacking: list[Record] = []
        for _ in range(ATTEMPTS):
            version = self._tables.version()  # before reading, so that the next load sees later commits
            known = self._tables.records()
            records = [record for record in known if record.status == "ok" and record.frames]
            names = [name for record in known for name in (record.id, record.path)]
            counted = records if self._whole is None else self._whole.records()
            if sum(record.rows for record in counted) > self._limit:
                self._matrix, self._places, self._used = Matrix.empty(0, self._width, self._arrays), {}, 0
                spans = Spans(*[np.empty(0, np.int64)] * 5)
                return Snapshot(version, tuple(records), _numbers(records, names), None, spans, self._tables.damaged())
            lacking = self._hold(records)
            if not lacking:
                break
        if lacking and len(lacking) == len(records) and self._whole is None:
            what = [f"{record.path}: its {record.rows} rows are incomplete or damaged" for record in lacking]
            raise Damaged(f"no video of the library can be searched: {what[0]}", what, hint=REPAIR)
        return self._snapshot_of(version, records, names, lacking)

    def _snapshot_of(
        self, version: int, records: Sequence[Record], names: Iterable[str], lacking: Sequence[Record]
    ) -> Snapshot:
        lost = {record.id for record in lacking}
        records = [record for record in records if record.id not in lost]
        left_out = tuple(sorted({*(record.path for record in lacking), *self._tables.damaged()}))
        places = np.array([self._places[record.generation] for record in records], np.int64).reshape(-1, 3)
        order = np.argsort(places[:, 0])
        low, high, last = places[order].T.copy()
        spans = Spans(order.astype(np.int64), low, high, high, last)
        return Snapshot(version, tuple(records), _numbers(records, names), self._matrix, spans, left_out)

    def _hold(self, records: Sequence[Record]) -> list[Record]:
        """Reads the missing rows.

        Returns:
            The records whose rows differ from what was written: replaced meanwhile, or damaged.
        """
        wanted = {record.generation: record for record in records}
        self._places = {name: place for name, place in self._places.items() if name in wanted}
        missing = [name for name in wanted if name not in self._places]
        new, kept = sum(wanted[name].rows for name in missing), sum(end - low for low, _, end in self._places.values())
        if self._used + new > len(self._matrix.pts_seconds) or self._used > 2 * kept + SPARE_ROWS:
            self._move(kept + new)
        for name, rows in self._tables.rows(missing) if missing else ():
            record = wanted[name]
            if not record.describes(rows):
                continue
            block = Matrix.of(rows, record.scenes or record.shots)
            if np.isfinite(block.vectors).all():  # else the videos would get out of order
                self._write(name, block, len(rows))
        return [record for record in records if record.generation not in self._places]

    def _write(self, generation: str, block: Matrix, frames: int) -> None:
        low, end = self._used, self._used + len(block.pts_seconds)
        place = self._matrix[low:end]
        with self._arrays.scope():
            place.vectors[:] = self._arrays.to_device(block.vectors)
        for name in ("pts_seconds", "keyframe", "begins", "back", "region"):
            getattr(place, name)[:] = getattr(block, name)
        self._used = end
        self._places[generation] = low, low + frames, end

    def _move(self, rows: int) -> None:
        """Copies the rows in use into a new matrix with room for at least `rows`."""
        old, places = self._matrix, self._places
        self._matrix = Matrix.empty(rows + rows // 8 + SPARE_ROWS, self._width, self._arrays)
        self._places, self._used = {}, 0
        for name, (low, high, end) in places.items():
            self._write(name, old[low:end], high - low)


def _numbers(records: Sequence[Record], names: Iterable[str]) -> dict[str, int]:
    """id or path -> index of the record; -1 for other names."""
    own = {name: number for number, record in enumerate(records) for name in (record.id, record.path)}
    return dict.fromkeys(names, -1) | own


def vector_at(snapshot: Snapshot, number: int, seconds: float, arrays: Arrays) -> F32:
    """[D] float32: the scene vector of the frame shown at a time; before the first frame, the first."""
    assert snapshot.matrix is not None
    (at,) = np.flatnonzero(snapshot.spans.video == number)
    low, high = int(snapshot.spans.low[at]), int(snapshot.spans.high[at])
    row = low + max(int(np.searchsorted(snapshot.matrix.pts_seconds[low:high], seconds, side="right")) - 1, 0)
    vector: F32 = arrays.to_host(snapshot.matrix.vectors[row : row + 1])[0].copy()
    return vector
