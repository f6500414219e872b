"""Exact search at the speed of memory on a CPU; reference.top_k is the definition."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from keyreel_kernels.reference import F32, I64

# Rows whose scores are looked at together, and rows that stay in the cache while several queries pass over them.
_ROWS, _CACHED = 8192, 256

# Threads pay from two parts of this size on.
_ROWS_A_PART = 4 * _ROWS


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def top_k(queries: F32, vectors: F32, k: int) -> tuple[F32, I64]:
    """reference.top_k: scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64; holds no more than 8192 scores a
    query and core.

    Best with rows of `vectors` that lie one after the other in memory, which may be a mapped file.
    """
    # Several parts a core: one that is held up by other work does not hold up the answer.
    parts = min(4 * usable_cores(), len(vectors) // _ROWS_A_PART)
    if len(queries) != 1 or parts < 2:  # a product with several queries has the threads of BLAS
        return _best(queries, vectors, k)
    edges = np.linspace(0, len(vectors), parts + 1).astype(np.int64).tolist()
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = pool.map(lambda low, high: _best(queries, vectors[low:high], k), edges[:-1], edges[1:])
        scores, rows = zip(*found, strict=True)
    merged = np.concatenate(scores, axis=1)
    # Parts come in the order of their rows, so that a stable order settles ties by row.
    order = np.argsort(-merged, axis=1, kind="stable")[:, :k]
    shifted = np.concatenate([own + low for low, own in zip(edges, rows, strict=False)], axis=1)
    return np.take_along_axis(merged, order, axis=1), np.take_along_axis(shifted, order, axis=1)


def _best(queries: F32, vectors: F32, k: int) -> tuple[F32, I64]:
    k = min(k, len(vectors))
    best = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
    across = np.ascontiguousarray(queries.T)
    scores = np.empty((_ROWS, len(queries)), np.float32)
    for start in range(0, len(vectors) if k > 0 else 0, _ROWS):
        block = vectors[start : start + _ROWS]
        if len(queries) == 1:
            # Row by row: a matrix-vector product of BLAS takes twice as long as memory does.
            np.vecdot(block, queries[0], out=scores[: len(block), 0])
        else:
            for low in range(0, len(block), _CACHED):
                np.matmul(block[low : low + _CACHED], across, out=scores[low : min(low + _CACHED, len(block))])
        # NaN is below all others: what is compared with it, or is it, stays in the race.
        floors = np.array([held[-1] if len(held) == k else np.nan for held, _ in best], np.float32)
        new = ~(scores[: len(block)] <= floors)
        for n in np.flatnonzero(new.any(0)):
            held, rows = best[n]
            fresh = np.flatnonzero(new[:, n])
            merged, rows = np.concatenate([held, scores[fresh, n]]), np.concatenate([rows, start + fresh])
            if len(merged) > 2 * k:
                kept = ~(-merged > np.partition(-merged, k - 1)[k - 1])
                merged, rows = merged[kept], rows[kept]
            # What is held comes from lower rows, so that a stable order settles ties by row.
            order = np.argsort(-merged, kind="stable")[:k]
            best[n] = merged[order], rows[order]
    return (
        np.array([held for held, _ in best], np.float32).reshape(len(queries), k),
        np.array([rows for _, rows in best], np.int64).reshape(len(queries), k),
    )
