"""Exact search: the k rows of vectors [N, D] that have the highest inner product with each query [Q, D].

Each function takes the vectors, the queries, k and a folder for what has to lie on disk, and gives what returns rows
[Q, k]. Vectors have unit length.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Search = Callable[[], Any]


def memory_pass(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    """Reads every byte of the vectors once, with as many threads as there are cores. Finds nothing: a floor."""
    words = vectors.reshape(-1).view(np.uint64)
    count = os.cpu_count() or 1
    pool, parts = ThreadPoolExecutor(count), np.array_split(words, count)

    def run() -> Any:
        for _ in pool.map(np.bitwise_or.reduce, parts):
            pass
        return np.full((len(queries), k), -1)

    return run


def keyreel(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    from keyreel_kernels import ops_for

    ops = ops_for("cpu")
    return lambda: ops.top_k(queries, vectors, k)[1]


def keyreel_scan(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    """A copy in 8 bits bounds every score; float32 decides among what is left."""
    from keyreel.scan import exact_scan

    scan = exact_scan(vectors)
    return lambda: scan.top_k(queries, k)[1]


def numpy(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    """A matrix product and argpartition."""

    def run() -> Any:
        scores = queries @ vectors.T
        best = np.argpartition(scores, -k, axis=1)[:, -k:]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        return np.take_along_axis(best, order, 1)

    return run


def faiss(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    import faiss as library

    index = library.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return lambda: index.search(queries, k)[1]


def usearch(dtype: str) -> Callable[[Any, Any, int, Path], Search]:
    """Its exact search over an array of "float32", "float16" or "int8" (times 127, cosines then)."""

    def prepare(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
        from usearch.index import MetricKind, search

        def stored(array: Any) -> Any:
            # In parts: 1 M vectors at once would take twice the memory.
            parts = np.array_split(array, max(len(array) // 50_000, 1))
            scaled = ([np.round(127 * part / np.abs(part).max()) for part in parts]) if dtype == "int8" else parts
            return np.concatenate([part.astype(dtype) for part in scaled])

        own, asked = stored(vectors), stored(queries)
        metric = MetricKind.Cos if dtype == "int8" else MetricKind.IP
        return lambda: search(own, asked, k, metric, exact=True).keys.reshape(len(queries), k)

    return prepare


def lancedb(vectors: Any, queries: Any, k: int, folder: Path) -> Search:
    """A scan of a table on disk without an index."""
    import lancedb as library
    import pyarrow

    database = library.connect(str(folder / f"lancedb-{len(vectors)}"))
    if "vectors" not in database.list_tables().tables:

        def batches() -> Any:
            for start in range(0, len(vectors), 50_000):
                part = vectors[start : start + 50_000]
                column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part.reshape(-1)), part.shape[1])
                numbers = pyarrow.array(np.arange(start, start + len(part)))
                yield pyarrow.record_batch([numbers, column], names=["row", "vector"])

        first = next(batches())
        database.create_table("vectors", batches(), schema=first.schema)
    table = database.open_table("vectors")

    def run() -> Any:
        found = []
        for query in queries:
            asked = table.search(query).distance_type("dot").select(["row"]).limit(k)
            found.append(asked.to_arrow()["row"].to_numpy())
        return np.stack(found)

    return run
