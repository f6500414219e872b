"""Exact search by way of a copy in 8 bits: integer products bound every score, float32 decides among what is left.

A row x is stored as s x8 with x8 whole numbers up to 127, a query q as r q8 with q8 up to 63. With e = x - s x8 and
f = q - r q8

    |<q, x> - r s <q8, x8>| = |<f, s x8> + <q, e>| <= |f| |s x8| + |q| |e|

by Cauchy and Schwarz, so that a row whose upper bound is below the k-th best lower bound is not among the k best. Every
other row is looked at again in float32: the answer is that of `top_k`, whatever the vectors are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.clustering import F32, F64, I64
from keyreel_kernels.cpu_search import top_k

I8: TypeAlias = NDArray[np.int8]
I32: TypeAlias = NDArray[np.int32]
# Exact products of queries [Q, D] int8, within QUERY, and the stored rows [N, D] int8, within ROW: [Q, N] int32.
Products: TypeAlias = Callable[[I8], I32]

# CPUs without VNNI add pairs of products of unsigned and signed bytes in 16 bits: (63 + 64) * 127 * 2 just fits in.
ROW, QUERY = 127, 63
_SHARD = 65_536
# What float32 adds to the bounds, relative to the vectors' lengths.
_ROUNDING = 1e-5
# Rows of the first shard that set the first bound.
_FIRST = 4096


@dataclass(frozen=True, slots=True)
class _Shard:
    start: int
    scale: F32  # [n]
    largest: float
    length: float  # longest s x8
    error: float  # longest e
    products: Products


class Scan:
    """Exact search over float32 vectors with a quarter of the memory read for each query."""

    def __init__(self, vectors: F32, store: Callable[[I8], Products]) -> None:
        """Makes the copy.

        Args:
            vectors: [N, D] float32, finite; kept and not copied, may be a mapped file.
            store: takes rows [n, D] int8 and gives what multiplies queries with them.
        """
        self.vectors = vectors
        self._shards = []
        for start in range(0, len(vectors), _SHARD):
            rows = np.asarray(vectors[start : start + _SHARD])
            scale, whole = _whole(rows, ROW)
            near = scale[:, None] * whole
            length, error = (float(np.sqrt(np.vecdot(v, v)).max()) for v in (near, rows - near))
            self._shards.append(_Shard(start, scale, float(scale.max()), length, error, store(whole)))

    def top_k(self, queries: F32, k: int) -> tuple[F32, I64]:
        """reference.top_k over the vectors: scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64."""
        k = min(k, len(self.vectors))
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for n, found in enumerate(self._candidates(queries, k) if k > 0 else ()):
            # Rows in rising order, so that ties go to the lowest of all.
            few = 4 * len(found) < len(self.vectors)
            scores[n], best = (one[0] for one in top_k(queries[[n]], self.vectors[found] if few else self.vectors, k))
            rows[n] = found[best] if few else best
        return scores, rows

    def _candidates(self, queries: F32, k: int) -> list[I64]:
        """The rows that may be among the k best of each query, in rising order."""
        scale, whole = _whole(queries, QUERY)
        lost = np.linalg.norm(queries - scale[:, None] * whole, axis=1)
        length = np.linalg.norm(queries, axis=1)
        tracks = [_Track(k) for _ in queries]
        for shard in self._shards:
            products = shard.products(whole)
            bounds = lost * shard.length + length * shard.error + _ROUNDING * length * (shard.length + shard.error)
            for track, own, unit, bound in zip(tracks, products, scale.tolist(), bounds.tolist(), strict=True):
                track.look(shard, own, unit, bound)
        return [track.rows() for track in tracks]


class _Track:
    """What is left of the rows for one query."""

    def __init__(self, k: int) -> None:
        self.k, self.floor = k, -np.inf  # nothing below it is among the k best
        self.lowers = np.empty(0)
        self.found: list[tuple[I64, F64]] = []  # rows and their upper bounds

    def look(self, shard: _Shard, products: I32, unit: float, bound: float) -> None:
        if self.floor == -np.inf:
            # The k-th best of the first rows spares looking at all of a shard.
            some = unit * (products[:_FIRST] * shard.scale[:_FIRST].astype(np.float64))
            if len(some) > self.k:
                self.floor = float(np.partition(some, -self.k)[-self.k]) - bound
        # Whole numbers first: no row has a larger scale than the largest.
        least = (self.floor - bound) / unit / shard.largest
        rows: I64 = np.flatnonzero(products >= math.floor(least)) if least > 0 else np.arange(len(products))
        middle: F64 = unit * products[rows].astype(np.float64) * shard.scale[rows].astype(np.float64)
        near = middle + bound >= self.floor
        rows, middle = rows[near], middle[near]
        self.found.append((shard.start + rows, middle + bound))
        self.lowers = np.concatenate([self.lowers, middle - bound])
        if len(self.lowers) >= self.k:
            self.lowers = np.partition(self.lowers, -self.k)[-self.k :]
            self.floor = max(self.floor, float(self.lowers.min()))

    def rows(self) -> I64:
        rows: I64 = np.concatenate([rows[upper >= self.floor] for rows, upper in self.found])
        return rows


def _whole(vectors: F32, most: int) -> tuple[F32, I8]:
    """Scales [N] float32 and whole numbers [N, D] int8 up to `most` with vectors ~ scale * numbers."""
    scale = np.abs(vectors).max(1, initial=0) / np.float32(most)
    scale[scale == 0] = 1
    return scale, np.rint(vectors / scale[:, None]).astype(np.int8)
