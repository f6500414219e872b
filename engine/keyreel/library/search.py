"""Searches a library for the best moments and the best videos.

Up to `LibraryConfig.exact_rows` vectors it compares the query with every frame, in memory. With more vectors it holds
none: an index over the stored vectors finds candidates. It is LanceDB's IVF_RQ (RabitQ, one bit per dimension). With
100,000 vectors of 512 numbers it took 24 CPU-seconds to build and 7 MB, with a recall@10 of 1.0 in 11 ms a search (0.98
with 300,000). IVF_FLAT, IVF_SQ, IVF_PQ and IVF_HNSW_SQ took longer to build; the first, second and last were ten times
as large, with a recall of 0.96 to 0.99. Rows that the index lacks are compared one by one. All frames of the
candidates' videos are then scored with the stored vectors. So scores, moments and their order are exact, and the index
can only miss a video.

The index is searched for scenes and subjects separately, since their cosines have different scales. If a scene makes a
video one of the k best, fewer than k videos have a better scene, whatever their subjects; likewise for subjects. So the
k best of each kind suffice. For a query with conditions, it can miss a video with the best sum that has neither the
best scene nor the best subject for any of them.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import translate
from functools import lru_cache
from typing import Any

import numpy as np

from keyreel.config import LibraryConfig
from keyreel.errors import Damaged, LibraryError, import_extra
from keyreel.library.errors import REPAIR, lance_errors
from keyreel.library.merge import Answered, Ranked
from keyreel.library.ranking import Ranking
from keyreel.library.schema import SCENE, SUBJECT, VECTORS, quoted
from keyreel.library.shards import Shards
from keyreel.library.table import Tables
from keyreel.library.types import BOOL, Filter, Record
from keyreel.library.vectors import ATTEMPTS, Snapshot, Spans, Vectors, vector_at
from keyreel.runtime.backend import Backend
from keyreel.search import Asked
from keyreel.types import F32, F64, I64, Example
from keyreel_kernels.arrays import Arrays, HostArrays

# Frames to request for each wanted video: the best ones are often of one scene.
FRAMES_A_VIDEO = 16
# With at most this many rows, all videos of a filter are candidates.
FEW_ROWS = 65_536
# With at most this many videos, the query to the table names them; with more, other rows are dropped afterwards.
FEW_VIDEOS = 1000
_log = logging.getLogger(__name__)
# Rows in one part of the index, rounds of its clustering, and parts to search: at least this many and this fraction of
# all, or recall would fall as libraries grow.
ROWS_A_PART, ROUNDS = 1000, 20
PROBES, PROBES_FRACTION = 64, 0.2


class SearchIndex:
    """Searches one shard, or a library without shards, see `merge.Search`. Safe to share between threads.

    A search sees one state of the library. Methods raise ValueError if a query has another length than the vectors, and
    LibraryError if there is no library, or no video that `where` or an example names.

    Args:
        backend: the device that holds and compares the vectors; by default the CPU.
        whole: the whole library, if this is a shard: all its rows count for `exact_rows`.
    """

    def __init__(
        self,
        tables: Tables,
        config: LibraryConfig,
        backend: Backend | None = None,
        whole: Shards | None = None,
    ) -> None:
        self._tables, self._config, self._backend = tables, config, backend
        self._arrays: Arrays = HostArrays() if backend is None else backend.ops.arrays
        self._width = tables.model()[2]
        self._vectors = Vectors(tables, self._width, self._arrays, config.exact_rows, whole)
        self._last: tuple[tuple[int, str], BOOL] | None = None  # a filter, and the videos that it allows

    def refresh(self) -> None:
        """Reads new rows, so that no search has to."""
        with self._running():
            self._vectors.snapshot()

    def moments(self, queries: Sequence[Asked], k: int, where: Filter, own: Sequence[Example | None]) -> Answered:
        """The part of `Search.hits` that this shard contributes, see `merge`.

        Raises:
            ValueError: k < 1, or a query has another length than the vectors.
        """
        given = self._checked(queries, k)
        if where.per_video is not None and where.per_video < 1:
            raise ValueError(f"per_video must be >= 1, got {where.per_video}")
        with self._running():
            snapshot = self._vectors.snapshot()
            _log_way(snapshot)
            chosen = self._chosen(snapshot, where)
            left_out = set(snapshot.left_out)
            if snapshot.matrix is not None:
                ranking = self._ranking(snapshot, chosen, given, where)
                found = [ranking.best(n, k, own[n]) for n in range(len(given))]
            else:
                found = [self._near_best(query, k, where, own[n], left_out) for n, query in enumerate(given)]
            return Answered(found, (), _pictures(snapshot, chosen), tuple(left_out))

    def top_videos(self, query: Asked, k: int, moments: int, where: Filter, own: Example | None) -> Answered:
        """The part of `Search.videos` that this shard contributes, see `merge`."""
        given = self._checked([query], min(k, moments))
        with self._running():
            snapshot = self._vectors.snapshot()
            _log_way(snapshot)
            chosen = self._chosen(snapshot, where)
            pictures = _pictures(snapshot, chosen)
            if snapshot.matrix is None:
                snapshot, _ = self._near(given[0], where, 4 * k + 1)
                chosen = np.ones(len(snapshot.records), np.bool_)
            ranking = self._ranking(snapshot, chosen, given, where, with_pooled=True)
            return Answered((), ranking.best_videos(0, k, moments, own), pictures, snapshot.left_out)

    def vector(self, example: Example) -> F32:
        """[D] float32: the scene vector of the frame shown at that time, the last one at or before it."""
        with self._running():
            snapshot, number = self._one(example.video)
            return vector_at(snapshot, number, example.seconds, self._arrays)

    def scores(self, query: Asked, video: str) -> tuple[F64, F32]:
        """Times and scores of the frames of a video, [T] float64 and [T] float32."""
        given = self._checked([query], 1)
        with self._running():
            snapshot, number = self._one(video)
            chosen = np.arange(len(snapshot.records)) == number
            return self._ranking(snapshot, chosen, given, Filter()).curve(0, 0)

    def build(self) -> None:
        """Builds the vector index if there is none and the library is large enough to need one. Takes minutes.

        New rows are compared one by one until `compact` adds them to the index.
        """
        table = self._tables.table(VECTORS)
        if self._vectors.snapshot().matrix is not None or any("vector" in i.columns for i in table.list_indices()):
            return
        kinds = import_extra("lancedb.index", extra="library", purpose="a vector index")
        parts = max(1, table.count_rows() // ROWS_A_PART)
        kind = kinds.IvfRq(distance_type="l2", num_partitions=parts, max_iterations=ROUNDS)
        with lance_errors(self._tables.uri):
            # The rows of candidates are read by generation, which would read every row without an index.
            table.create_index("generation", config=kinds.BTree())
            table.create_index("vector", config=kind)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _one(self, video: str) -> tuple[Snapshot, int]:
        """A snapshot with the rows of one video, and the number of its record."""
        snapshot = self._vectors.snapshot()
        number = _number(snapshot, video)
        if number < 0:
            raise LibraryError(f"{video} has no frames in the library", hint="`keyreel library list` says why")
        if snapshot.matrix is None:
            snapshot, number = self._vectors.part(snapshot, np.array([number])), 0
            if not snapshot.records:
                raise Damaged(f"the rows of {video} are damaged", snapshot.left_out, hint=REPAIR)
        return snapshot, number

    def _running(self) -> Any:
        return nullcontext() if self._backend is None else self._backend.running()

    def _checked(self, queries: Sequence[Asked], k: int) -> list[Asked]:
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        return [replace(query, vectors=self._units(query.vectors)) for query in queries]

    def _units(self, vectors: F32) -> F32:
        given = np.asarray(vectors, np.float32)
        if given.ndim != 2 or given.shape[1] != self._width:
            raise ValueError(f"a vector of this library has {self._width} numbers, got queries {given.shape}")
        length = np.linalg.norm(given.astype(np.float64), axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise ValueError("queries must be finite and not zero")
        return np.ascontiguousarray(given / length, np.float32)

    def _chosen(self, snapshot: Snapshot, where: Filter) -> BOOL:
        """[V] bool: the records that the filter allows."""
        if where.videos:
            numbers = {_number(snapshot, name) for name in where.videos} - {-1}
            chosen = np.zeros(len(snapshot.records), np.bool_)
            chosen[[number for number in numbers if fits(snapshot.records[number], where)]] = True
            return chosen
        key = snapshot.version, repr(replace(where, start_seconds=None, stop_seconds=None))
        last = self._last
        if last is None or last[0] != key:  # cached: people type one query after another
            self._last = last = key, np.array([fits(record, where) for record in snapshot.records], np.bool_)
        return last[1]

    def _ranking(
        self,
        snapshot: Snapshot,
        chosen: BOOL,
        queries: Sequence[Asked],
        where: Filter,
        *,
        with_pooled: bool = False,
    ) -> Ranking:
        spans = snapshot.spans
        spans = spans if chosen.all() else spans[chosen[spans.video]]
        spans = _in_time(spans, snapshot, where)
        fold = self._config.fold_similarity
        return Ranking(snapshot, spans, queries, where, fold, self._arrays, with_pooled=with_pooled)

    # --- beyond memory --------------------------------------------------------------------------------------------

    def _near_best(self, query: Asked, k: int, where: Filter, own: Example | None, left_out: set[str]) -> Ranked:
        wanted = 2 * k + 1
        while True:
            near, whole = self._near(query, where, wanted)
            ranked = self._ranking(near, np.ones(len(near.records), np.bool_), [query], where).best(0, k, own)
            if not ranked.whole or whole:
                left_out.update(near.left_out)
                return ranked
            wanted *= 4

    def _near(self, query: Asked, where: Filter, wanted: int) -> tuple[Snapshot, bool]:
        """The videos with the best frames, about `wanted` of them, and whether there are no others."""
        for attempt in range(ATTEMPTS):
            snapshot = self._vectors.snapshot()
            try:
                numbers, whole = self._candidates(snapshot, self._chosen(snapshot, where), query, where, wanted)
                part = self._vectors.part(snapshot, numbers)
            except Damaged:  # or a compaction between two reads
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            if len(part.records) == len(numbers) or attempt == ATTEMPTS - 1:
                return part, whole
        raise AssertionError("unreachable")

    def _candidates(
        self, snapshot: Snapshot, chosen: BOOL, query: Asked, where: Filter, wanted: int
    ) -> tuple[I64, bool]:
        numbers = np.flatnonzero(chosen)
        rows = np.array([record.rows for record in snapshot.records], np.int64)
        if len(numbers) <= wanted or rows[numbers].sum() <= min(self._config.exact_rows, FEW_ROWS):
            return numbers, True
        known = {snapshot.records[number].generation: number for number in numbers.tolist()}
        conditions = []
        if len(known) <= FEW_VIDEOS and len(known) < len(rows):
            conditions.append(f"generation IN ({quoted(known)})")
        if where.start_seconds is not None:
            conditions.append(f"pts_seconds >= {float(where.start_seconds)!r}")
        if where.stop_seconds is not None:
            conditions.append(f"pts_seconds < {float(where.stop_seconds)!r}")
        probes = max(PROBES, int(PROBES_FRACTION * rows.sum() / ROWS_A_PART))
        kinds = [SCENE, SUBJECT] if any(snapshot.records[number].subjects for number in numbers.tolist()) else [SCENE]
        found: dict[int, None] = {}
        whole = True
        for vector, kind in itertools.product(_sought(query), kinds):
            some, all_of_kind = self._nearest(vector, [f"kind = '{kind}'", *conditions], known, wanted, probes)
            found |= dict.fromkeys(some)
            whole &= all_of_kind
        return np.array(list(found), np.int64), whole

    def _nearest(
        self, query: F32, conditions: Sequence[str], known: Mapping[str, int], wanted: int, probes: int
    ) -> tuple[list[int], bool]:
        """Finds the videos with the rows nearest to a query, at least `wanted`, and whether there are no others.

        Args:
            known: generation -> number of the video, for the allowed videos.
        """
        limit = wanted * FRAMES_A_VIDEO
        while True:
            search = self._tables.table(VECTORS).search(query, vector_column_name="vector").distance_type("l2")
            # Searches more parts if a filter leaves too few rows.
            search = search.minimum_nprobes(probes).maximum_nprobes(0).limit(limit)
            search = search.where(" AND ".join(conditions), prefilter=True).select(["generation", "_distance"])
            with lance_errors(self._tables.uri):
                names = search.to_arrow()["generation"].to_pylist()
            found = list(dict.fromkeys(known[name] for name in names if name in known))
            if len(found) >= wanted or len(names) < limit:
                return found, len(names) < limit
            limit *= 4


def _log_way(snapshot: Snapshot) -> None:
    way = "every vector is compared" if snapshot.matrix is not None else "an index names candidates"
    _log.info("%d videos are searched: %s", len(snapshot.records), way)


def _pictures(snapshot: Snapshot, chosen: BOOL) -> int:
    """The number of shots of the chosen videos."""
    return sum(len(snapshot.records[number].shots) for number in np.flatnonzero(chosen).tolist())


def _sought(query: Asked) -> F32:
    """[n, D]: the vectors to search the index for.

    For a query with conditions these are their sum, which is exact for scenes, and each vector that must fit, since the
    scene may answer one and the subject another.
    """
    if len(query.weights) == 1:
        return query.vectors
    weights = np.array(query.weights, np.float32)
    whole = weights @ query.vectors
    return np.concatenate([whole[None] / max(float(np.linalg.norm(whole)), 1e-12), query.vectors[weights > 0]])


# --- filters ----------------------------------------------------------------------------------------------------------


def fits(record: Record, where: Filter) -> bool:
    """Whether a filter allows a video; ignores the filter's times."""
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


def _in_time(spans: Spans, snapshot: Snapshot, where: Filter) -> Spans:
    """The rows within the times of the filter."""
    if where.start_seconds is None and where.stop_seconds is None:
        return spans
    assert snapshot.matrix is not None
    low, high, first, last = spans.low, spans.high, spans.first, spans.last
    used = int(last.max(initial=0))

    def edges(time: float) -> tuple[I64, I64]:
        """The places of a time among scenes and subjects of each video; times rise within both."""
        before = np.concatenate([[0], np.cumsum(pts_seconds[:used] < time)])
        return spans.low + before[spans.high] - before[spans.low], spans.first + before[spans.last] - before[
            spans.first
        ]

    pts_seconds = snapshot.matrix.pts_seconds
    if where.start_seconds is not None:
        low, first = edges(where.start_seconds)
    if where.stop_seconds is not None:
        high, last = edges(where.stop_seconds)
    return Spans(spans.video, low, high, first, last)[low < high]


def _number(snapshot: Snapshot, name: str) -> int:
    number = snapshot.names.get(name)
    if number is None:
        raise LibraryError(f"there is no video {name!r} in the library", hint="give the id or the whole path")
    return number
