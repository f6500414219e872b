"""Exact search of a library of many frames, beside plain searches of the same vectors.

The vectors are made up: a video has a direction, its shots lie around that, its frames around those, 500 a video. A
query lies near one of the frames (cosine about 0.7). keyreel answers with moments of videos, the others with the ten
best rows. `recall` is the share of queries whose best row a system finds.

--content must not hold a library of another version of keyreel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks._common import Row, System, compare, parser_of, run, timed
from benchmarks.made_up import fill
from keyreel import Library

WIDTH, K = 512, 10
_ROWS, _SHOTS, _RATE = 500, 10, 250.0  # rows and shots of a video, rows a second
_QUERIES, _SECONDS = 200, 30.0  # no query is begun after so many seconds
_PEERS = {"numpy": peers.numpy, "faiss flat": peers.faiss_flat, "lancedb flat": peers.lancedb_flat}


def vectors_of(number: int) -> Any:
    """[500, 512] float32 unit vectors of one video."""
    random = np.random.default_rng([7, number])
    parts = (random.standard_normal((count, WIDTH), np.float32) for count in (1, _SHOTS, _ROWS))
    video, shot, frame = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts)
    found = video + 0.8 * np.repeat(shot, _ROWS // _SHOTS, axis=0) + 0.5 * frame
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ask(vectors: Any) -> tuple[Any, Any]:
    """Queries [Q, D] and the best row of each, as the library's 16-bit vectors have it."""
    random = np.random.default_rng(8)
    near = vectors[random.integers(0, len(vectors), _QUERIES)]
    noise = random.standard_normal(near.shape).astype(np.float32)
    queries = near + noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    best, score = np.zeros(_QUERIES, np.int64), np.full(_QUERIES, -np.inf)
    for start in range(0, len(vectors), 50_000):
        stored = vectors[start : start + 50_000].astype(np.float16).astype(np.float64)
        scores = stored / np.linalg.norm(stored, axis=1, keepdims=True) @ queries.T
        better = scores.max(0) > score
        best[better], score[better] = start + scores.argmax(0)[better], scores.max(0)[better]
    return queries, best


def keyreel(folder: Path) -> Callable[[Any], int]:
    library = Library(folder / "library")

    def search(query: Any) -> int:
        hit = library.search(query, k=K)[0]
        return int(Path(hit.video).stem) * _ROWS + round(_RATE * hit.pts_seconds)

    return search


def peer(folder: Path, way: Any) -> Callable[[Any], int]:
    return way(np.load(folder / "vectors.npy", mmap_mode="r"), K, folder)


def prepare(folder: Path, make: Callable[[Path], Callable[[Any], int]]) -> peers.Run:
    search, queries = make(folder), np.load(folder / "queries.npy")

    def every() -> tuple[list[int], list[float]]:
        search(queries[0])  # loads what the others find in memory
        return timed(search, queries, _SECONDS)

    return every


def check(best: Any, result: tuple[list[int], list[float]]) -> dict[str, float]:
    found, seconds = result
    middle, high = np.percentile(seconds, [50, 99])
    recall = float(np.mean(np.array(found) == best[: len(found)]))
    return {"p50_seconds": middle, "p99_seconds": high, "queries": len(found), "recall": recall}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for rows in options.rows or ((2_000,) if options.quick else (10_000, 100_000)):
        params, folder = {"rows": rows}, options.content / f"search-{rows}"
        folder.mkdir(exist_ok=True)
        vectors = np.concatenate([vectors_of(number) for number in range(rows // _ROWS)])
        queries, best = ask(vectors)
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "queries.npy", queries)
        if not (folder / "library").exists():
            videos = (vectors_of(number) for number in range(rows // _ROWS))
            fill(str(folder / "library"), videos, width=WIDTH, shot=_ROWS // _SHOTS, fps=_RATE)
        del vectors
        makes = {"keyreel": keyreel, **{name: partial(peer, way=way) for name, way in _PEERS.items()}}
        systems = [System(name, partial(prepare, folder, make), partial(check, best)) for name, make in makes.items()]
        yield from compare("library", params, systems, runs=0, limit_seconds=600)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", help="sizes of the libraries, multiples of 500")
    raise SystemExit(run(parser, measure))
