"""Scores of queries with all frames of a library, in one pass over the memory."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from keyreel.library.matrix import MOST_ROWS, Snapshot, Spans
from keyreel.types import F32, F64, I64
from keyreel_kernels.arrays import Arrays, usable_cores

# Rows whose scores are looked at together: few enough that they are still in the cache.
BLOCK_ROWS = 8192
# Rows that nobody asked for are scored as well where they are fewer in a row than this: a part of its own costs more.
GAP_ROWS = 2048
# Rows and queries of one product: small enough that BLAS starts no threads of its own, which get in each other's way
# when several of ours multiply. With 16 queries whole blocks took 3 to 5 times the processor time.
TILE_ROWS, TILE_QUERIES = 64, 16
# Parts from which on threads pay.
THREADED_PARTS = 4


def pooled(scores: F32, edges: I64, temperature: float) -> F64:
    """Scores of videos from those of their frames: sum of softmax(s / temperature) s (CLIP-Hitchhiker, Bain et al.
    2022, equation 3, with the frames' own scores as values).

    Args:
        scores: [Q, n] float32. edges: [2 V - 1] int64, from 0: start and end of each video but the end of the last.

    Returns:
        [Q, V] float64.
    """
    exact = scores.astype(np.float64)
    # Of what lies between two videos as well, which falls out again: every second run.
    peak = np.maximum.reduceat(exact, edges, axis=1)
    lengths = np.diff(edges, append=scores.shape[1])
    share = np.exp((exact - np.repeat(peak, lengths, axis=1)) / temperature)
    whole = np.add.reduceat(share, edges, axis=1)[:, ::2]
    return np.asarray(np.add.reduceat(share * exact, edges, axis=1)[:, ::2] / whole)


class Scores:
    """What queries and videos have to do with each other.

    `best` [Q, V] float32 holds the best frame's score of each span, and `pooled` [Q, V] float64 the videos' scores, if
    they are asked for. They are those of `of` and `video_score` to within `slack` and `pooled_slack`: a product of
    several queries adds up in another order than that of one, and what is shown must not hang on who else is asking.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        spans: Spans,
        queries: F32,
        arrays: Arrays,
        temperature: float,
        *,
        with_pooled: bool = False,
    ) -> None:
        """Looks at every row once.

        Args:
            spans: not empty ones. queries: [Q, D] float32, unit length. temperature: see `pooled`.
        """
        self.snapshot, self.spans, self.queries = snapshot, spans, queries
        self._arrays, self._temperature, self._with_pooled = arrays, temperature, with_pooled
        self._on_host = arrays.xp is np
        self._given = None if self._on_host else arrays.to_device(queries)
        # Held for one query only, for which they are small and `of` need not look again.
        self._held: list[F32] | None = [] if self._on_host and len(queries) == 1 else None
        # |fl(<q, x>) - <q, x>| <= D u |q| |x| for any order of the sum (Higham 2002, section 3.1), u = 2^-24.
        self.slack = 0.0 if self._held is not None else 2.1 * queries.shape[1] * 2.0**-24
        # The derivatives of a pooled score add up to no more than 1 + |s - pooled| / temperature.
        self.pooled_slack = self.slack * (1 + 2 / temperature)
        parts = self._parts()
        self._starts = np.array([first for first, _ in parts], np.int64)
        if self._on_host and len(parts) >= THREADED_PARTS:
            with ThreadPoolExecutor(min(usable_cores(), len(parts) // 2)) as pool:
                found = list(pool.map(self._part, parts))
        else:
            found = [self._part(part) for part in parts]
        shape = (len(queries), 0)
        self.best: F32 = np.concatenate([best for best, _, _ in found] or [np.empty(shape, np.float32)], axis=1)
        self.pooled: F64 = np.concatenate([own for _, own, _ in found] or [np.empty(shape)], axis=1)
        if self._held is not None:
            self._held = [own for _, _, own in found]

    def of(self, query: int, span: int) -> F32:
        """[T] float32: scores of the frames of a span; the same whatever the other queries and videos are."""
        low, high = int(self.spans.low[span]), int(self.spans.high[span])
        if self._held is None:
            rows = self.snapshot.segments[int(self.spans.segment[span])].vectors[low:high]
            scores: F32 = self._product(rows, slice(query, query + 1))[0]
        else:
            part = int(np.searchsorted(self._starts, span, side="right")) - 1
            start = int(self.spans.low[self._starts[part]])
            scores = self._held[part][0, low - start : high - start]
        return scores

    def video_score(self, query: int, span: int) -> float:
        """Pooled over the frames of a span."""
        return float(pooled(self.of(query, span)[None], np.zeros(1, np.int64), self._temperature)[0, 0])

    def _parts(self) -> list[tuple[int, int]]:
        """Spans [first, last) that lie close together, about a block of rows each."""
        spans = self.spans
        if not len(spans):
            return []
        block = BLOCK_ROWS if self._on_host else MOST_ROWS
        gap = spans.low[1:] - spans.high[:-1]
        new = (np.diff(spans.segment) != 0) | (gap > GAP_ROWS) | (gap < 0) | (np.diff(spans.low // block) != 0)
        return list(itertools.pairwise([0, *(np.flatnonzero(new) + 1).tolist(), len(spans)]))

    def _part(self, part: tuple[int, int]) -> tuple[F32, F64, F32]:
        own = self.spans[slice(*part)]
        start, stop = int(own.low[0]), int(own.high[-1])
        scores = self._product(self.snapshot.segments[int(own.segment[0])].vectors[start:stop], slice(None))
        edges = np.stack([own.low, own.high], axis=1).ravel()[:-1] - start
        best = np.maximum.reduceat(scores, edges, axis=1)[:, ::2]
        videos = pooled(scores, edges, self._temperature) if self._with_pooled else np.empty((len(scores), 0))
        return best, videos, scores if self._held is not None else scores[:, :0]

    def _product(self, rows: Any, which: slice) -> F32:
        """[Q, n] float32 on the host."""
        if self._given is not None:
            return np.asarray(self._arrays.to_host(self._given[which] @ rows.T), np.float32)
        queries = self.queries[which]
        if len(queries) == 1:
            # Row by row: at the speed of memory, and each row's sum is the same wherever it lies.
            return np.asarray(np.vecdot(rows, queries[0])[None], np.float32)
        scores = np.empty((len(rows), len(queries)), np.float32)
        tiles = range(0, len(queries), TILE_QUERIES)
        across = [np.ascontiguousarray(queries[start : start + TILE_QUERIES].T) for start in tiles]
        for low in range(0, len(rows), TILE_ROWS):
            for start, some in zip(tiles, across, strict=True):
                own = scores[low : low + TILE_ROWS, start : start + TILE_QUERIES]
                np.matmul(rows[low : low + TILE_ROWS], some, out=own)
        return np.ascontiguousarray(scores.T)
