"""What a library answers: the best moments of all videos, and the best videos."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import translate
from functools import lru_cache
from typing import Any

import numpy as np

from keyreel.config import LibraryConfig
from keyreel.errors import Damaged, LibraryError
from keyreel.library.found import Found
from keyreel.library.index import Candidates, SearchStore
from keyreel.library.matrix import ATTEMPTS, Matrix, Segments, Snapshot, Spans, load, missing_rows
from keyreel.library.scores import Scores
from keyreel.library.types import BOOL, Example, Filter, LibraryHit, Record, VideoHit
from keyreel.runtime.backend import Backend
from keyreel.types import F32
from keyreel_kernels.arrays import Arrays, HostArrays

Own = Sequence[Example | None]

# Filters whose videos are remembered: those of people who type one query after the other.
_REMEMBERED = 32


def fits(record: Record, where: Filter) -> bool:
    """Whether a video is one that the filter names; its times say nothing of a video as a whole."""
    return (
        (not where.videos or record.id in where.videos or record.path in where.videos)
        and (where.path is None or _glob(where.path).match(record.path) is not None)
        and all(tag in record.tags for tag in where.tags)
        and _within(record.duration_seconds, where.min_duration_seconds, where.max_duration_seconds)
        and _within(record.date, where.after, None)
        and (where.before is None or (record.date is not None and record.date < where.before))
    )


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


@lru_cache(maxsize=64)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


class Searcher:
    """Searches a library. Safe to share between threads; a search sees one state of the library.

    Up to `config.exact_rows` frames the answer is that of a look at every frame, from memory: 4 D + 9 bytes a frame.
    Beyond, nothing is held: the table's vector index names candidates, whose videos are read and looked at frame by
    frame, see `index`.

    Args:
        backend: where the vectors are kept and compared; this machine's memory by default.
    """

    def __init__(self, store: SearchStore, config: LibraryConfig, backend: Backend | None = None) -> None:
        self._store, self._config, self._backend = store, config, backend
        self._arrays: Arrays = HostArrays() if backend is None else backend.ops.arrays
        self._matrix = Matrix(store, self._arrays, config.exact_rows)
        self._candidates = Candidates(store, config.exact_rows)
        self._chosen: dict[str, tuple[tuple[int, ...], BOOL]] = {}
        self._width: int | None = None
        self._lock = threading.Lock()

    def hits(self, queries: F32, k: int, where: Filter | None = None, own: Own | None = None) -> list[list[LibraryHit]]:
        """The k best moments for each query, best first; ties in the order of paths and times.

        A moment that is as good as the same as a better one of another video (the cosine of their best frames is at
        least `fold_similarity`) is not shown; the better one's `folded` counts those that rank before the last hit.

        Args:
            queries: [Q, D] float32. k: at least 1; there may be fewer moments.
            own: the examples that the queries are the vectors of, None for others: the moment that an example lies in
                is no answer to it.

        Raises:
            ValueError: not such queries.
            LibraryError: there is no library, or a video that `where` names is not in it.
        """
        given, where = self._checked(queries, k), where or Filter()
        examples = own or [None] * len(given)
        with self._running():
            snapshot = self._matrix.snapshot()
            self._check_width(given)
            if snapshot.complete:
                found = self._found(snapshot, self._spans(snapshot, where), given, where)
                return [found.hits(n, k, examples[n]) for n in range(len(given))]
            return [self._near_hits(query[None], k, where, examples[n]) for n, query in enumerate(given)]

    def videos(
        self, queries: F32, k: int, moments: int = 3, where: Filter | None = None, own: Own | None = None
    ) -> list[list[VideoHit]]:
        """The k best videos for each query, best first, each with its best moments; ties in the order of paths.

        Args:
            moments: of each video, at most.
            queries, k, where, own: as for `hits`; an example's own video is no answer to it.

        Raises:
            ValueError, LibraryError: as `hits`.
        """
        given, where = self._checked(queries, min(k, moments)), where or Filter()
        examples = own or [None] * len(given)
        with self._running():
            snapshot = self._matrix.snapshot()
            self._check_width(given)
            if snapshot.complete:
                found = self._found(snapshot, self._spans(snapshot, where), given, where, with_pooled=True)
                return [found.videos(n, k, moments, examples[n]) for n in range(len(given))]
            answers = []
            for n, query in enumerate(given):
                near, _ = self._near(query, where, 4 * k + 1)
                found = self._found(near, self._in_time(near.spans, near, where), query[None], where, with_pooled=True)
                answers.append(found.videos(0, k, moments, examples[n]))
            return answers

    def vector(self, example: Example) -> F32:
        """[D] float32: the vector of the frame that is shown at that time, the last one before or at it.

        Raises:
            LibraryError: there is no such video, or nothing of it can be searched.
        """
        with self._running():
            snapshot = self._matrix.snapshot()
            number = _number(snapshot, example.video)
            if number < 0:
                raise LibraryError(
                    f"{example.video} has no frames in the library", hint="`keyreel library list` says why"
                )
            if not snapshot.complete:
                snapshot, number = self._read(snapshot, np.array([number])), 0
            (at,) = np.flatnonzero(snapshot.spans.video == number)
            low, high = int(snapshot.spans.low[at]), int(snapshot.spans.high[at])
            segment = snapshot.segments[int(snapshot.spans.segment[at])]
            row = int(np.searchsorted(segment.pts_seconds[low:high], example.seconds, side="right")) - 1
            row = low + max(row, 0)
            vector: F32 = self._arrays.to_host(segment.vectors[row : row + 1])[0].copy()
            return vector

    def index(self) -> bool:
        """Builds the vector index where the library is large enough to need one; says whether it did. Takes minutes.

        New rows are searched one by one until `compact` takes them in.
        """
        return not self._matrix.snapshot().complete and self._candidates.build()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _running(self) -> Any:
        return nullcontext() if self._backend is None else self._backend.running()

    def _found(
        self, snapshot: Snapshot, spans: Spans, queries: F32, where: Filter, *, with_pooled: bool = False
    ) -> Found:
        temperature = self._config.pooling_temperature
        scores = Scores(snapshot, spans, queries, self._arrays, temperature, with_pooled=with_pooled)
        return Found(scores, where, self._config.fold_similarity, self._arrays)

    def _checked(self, queries: F32, k: int) -> F32:
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        given = np.asarray(queries, np.float32)
        if given.ndim != 2:
            raise ValueError(f"queries must be [Q, D], got {given.shape}")
        length = np.linalg.norm(given.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise ValueError("queries must be finite and not zero")
        return np.ascontiguousarray(given / length, np.float32)

    def _check_width(self, queries: F32) -> None:
        if self._width is None:
            self._width = self._store.model()[2]
        if queries.shape[1] != self._width:
            raise ValueError(f"a vector of this library has {self._width} numbers, got {queries.shape[1]}")

    def _videos(self, snapshot: Snapshot, where: Filter) -> BOOL:
        """[V] bool: the records that the filter names."""
        if where.videos:
            numbers = {_number(snapshot, name) for name in where.videos} - {-1}
            chosen = np.zeros(len(snapshot.records), np.bool_)
            chosen[[number for number in numbers if fits(snapshot.records[number], where)]] = True
            return chosen
        key = repr(replace(where, start_seconds=None, stop_seconds=None))
        with self._lock:
            known = self._chosen.get(key)
        if known is not None and known[0] == snapshot.version:
            return known[1]
        chosen = np.array([fits(record, where) for record in snapshot.records], np.bool_)
        with self._lock:
            while len(self._chosen) >= _REMEMBERED:
                self._chosen.pop(next(iter(self._chosen)))
            self._chosen[key] = snapshot.version, chosen
        return chosen

    def _spans(self, snapshot: Snapshot, where: Filter) -> Spans:
        """The rows that a search looks at."""
        spans = snapshot.spans
        if replace(where, start_seconds=None, stop_seconds=None) != Filter():
            spans = spans[self._videos(snapshot, where)[spans.video]]
        return self._in_time(spans, snapshot, where)

    @staticmethod
    def _in_time(spans: Spans, snapshot: Snapshot, where: Filter) -> Spans:
        if where.start_seconds is None and where.stop_seconds is None:
            return spans
        low, high = spans.low.copy(), spans.high.copy()
        for number in np.unique(spans.segment).tolist():
            own, pts = spans.segment == number, snapshot.segments[number].pts_seconds
            for edge, time in ((low, where.start_seconds), (high, where.stop_seconds)):
                if time is not None:
                    # Times rise within a video: so many of its rows lie before.
                    before = np.concatenate([[0], np.cumsum(pts < time)])
                    edge[own] = spans.low[own] + before[spans.high[own]] - before[spans.low[own]]
        return Spans(spans.video, spans.segment, low, high)[low < high]

    # --- beyond memory --------------------------------------------------------------------------------------------

    def _near_hits(self, query: F32, k: int, where: Filter, own: Example | None) -> list[LibraryHit]:
        wanted = 2 * k + 1
        while True:
            near, whole = self._near(query[0], where, wanted)
            hits = self._found(near, self._in_time(near.spans, near, where), query, where).hits(0, k, own)
            if len(hits) == k or whole:
                return hits
            wanted *= 4

    def _near(self, query: F32, where: Filter, wanted: int) -> tuple[Snapshot, bool]:
        """Rows of about so many videos that answer a query best, and whether there are no others."""
        for _ in range(ATTEMPTS):
            snapshot = self._matrix.snapshot()
            chosen = self._videos(snapshot, where)
            try:
                numbers, whole = self._candidates.videos(snapshot, chosen, query, where, wanted)
                return self._read(snapshot, numbers), whole
            except Damaged as error:  # or a video was replaced, or files put together, between two looks
                found = error
        raise found

    def _read(self, snapshot: Snapshot, numbers: Any) -> Snapshot:
        """A small library of these videos of a large one."""
        records = [snapshot.records[number] for number in np.sort(numbers).tolist()]
        held = Segments(self._arrays)
        if lacking := load(self._store, held, records):
            raise missing_rows(lacking)
        names = {name: number for number, record in enumerate(records) for name in (record.id, record.path)}
        return held.snapshot(snapshot.version, records, {**dict.fromkeys(snapshot.names, -1), **names})


def _number(snapshot: Snapshot, name: str) -> int:
    number = snapshot.names.get(name)
    if number is None:
        raise LibraryError(f"there is no video {name!r} in the library", hint="give the id or the whole path")
    return number
