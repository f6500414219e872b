"""A query to a library of many frames: from the question to the answer, beside plain searches of the same vectors.

The rows are made up: a video has a direction, its shots lie around that, its frames around those. They are written
through `Store.put`, 500 a video. A query lies near one of the frames (cosine about 0.7). keyreel answers with moments
of videos, out of its matrix in memory; the others give the ten best rows: NumPy and faiss out of memory, LanceDB out of
the library's own table. `recall` is the share of queries whose best row, by float64 arithmetic over the stored
16-bit vectors, a system finds first.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.search import needs_memory
from benchmarks.measure import Folders, Measurement, Params, Prepare

WIDTH, ROWS_A_VIDEO, K = 512, 500, 10
MODEL = ("made up", "0" * 64)
_QUERIES, _SECONDS = 200, 60.0  # of a system: no query is begun after so many seconds
_MOST_SECONDS = 3600.0


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    return [
        Measurement("library", {"rows": rows}, tuple(SYSTEMS), runs=0, rank=rank, most_seconds=_MOST_SECONDS)
        for rank, rows in enumerate((2_000,) if quick else (10_000, 100_000, 1_000_000))
    ]


def place(params: Params, folders: Folders) -> Path:
    return folders.content / f"library-{params['rows']}"


def vectors_of(number: int) -> Any:
    """The vectors of one video, [500, 512] float32, unit length."""
    random = np.random.default_rng([7, number])
    shots = 10
    parts = (random.standard_normal((count, WIDTH), np.float32) for count in (1, shots, ROWS_A_VIDEO))
    video, shot, frame = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts)
    found = video + 0.8 * np.repeat(shot, ROWS_A_VIDEO // shots, axis=0) + 0.5 * frame
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ready(params: Params, folders: Folders) -> None:
    """Writes the library, and the queries with their best rows."""
    needs_memory(6 * params["rows"] * WIDTH * 4 / 2**20)  # what all systems hold together
    folder = place(params, folders)
    if not (folder / "best.npz").exists():
        commits = _write(folder / "library", params["rows"] // ROWS_A_VIDEO)
        queries, best, score = _asked(params["rows"] // ROWS_A_VIDEO)
        (folder / "commits.json").write_text(json.dumps(commits))
        np.savez(folder / "best.npz", queries=queries, best=best, score=score)


def _write(folder: Path, videos: int) -> list[float]:
    """Seconds of each commit."""
    from keyreel.library.store import Store
    from keyreel.library.types import Record, Rows

    store, seconds = Store(str(folder)), []
    store.create(model=MODEL[0], model_sha256=MODEL[1], width=WIDTH)
    there = {record.id for record in store.records()}
    for number in range(videos):
        if f"{number:032x}" in there:
            continue
        count = np.arange(ROWS_A_VIDEO)
        shot = count // 50
        rows = Rows(count / 2.0, count * 15, vectors_of(number), shot, np.ones(ROWS_A_VIDEO, np.float32), ())
        record = Record(
            id=f"{number:032x}",
            path=f"/made-up/{number:06d}.mp4",
            size=1,
            mtime_ns=1,
            fingerprint=f"{number:032x}",
            generation=uuid.UUID(int=number + 1).hex,
            frames=ROWS_A_VIDEO,
            status="ok",
            error=None,
            hint=None,
            tags=(),
            date=None,
            duration_seconds=ROWS_A_VIDEO / 2.0,
            indexed_at=time.time(),
            probe={},
            grid=(1, 1),
            shots=tuple((25.0 * n, 25.0 * (n + 1)) for n in range(10)),
            model=MODEL[0],
            model_sha256=MODEL[1],
        )
        began = time.perf_counter()
        store.put(record, rows, None)
        seconds.append(time.perf_counter() - began)
    store.compact(alone=True)
    store.close()
    return seconds


def _asked(videos: int) -> tuple[Any, Any, Any]:
    """Queries [Q, D], the number of the best row of each and its cosine, both by float64 over what is stored."""
    random = np.random.default_rng(8)
    near = random.integers(0, videos * ROWS_A_VIDEO, _QUERIES)
    noise = random.standard_normal((_QUERIES, WIDTH))
    queries = np.stack([vectors_of(row // ROWS_A_VIDEO)[row % ROWS_A_VIDEO] for row in near])
    queries = queries + noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    best, score = np.full(_QUERIES, -1), np.full(_QUERIES, -np.inf)
    for number in range(videos):
        stored = vectors_of(number).astype(np.float16).astype(np.float64)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        scores = stored @ queries.T.astype(np.float64)
        row, high = scores.argmax(0), scores.max(0)
        better = high > score
        best[better], score[better] = number * ROWS_A_VIDEO + row[better], high[better]
    return queries, best, score


def _all_vectors(params: Params) -> Any:
    found = np.empty((params["rows"], WIDTH), np.float32)
    for number in range(params["rows"] // ROWS_A_VIDEO):
        found[number * ROWS_A_VIDEO : (number + 1) * ROWS_A_VIDEO] = vectors_of(number)
    return found


# Each gives a function: query [D] -> number of the best row.
Search = Callable[[Any], int]


def _keyreel(params: Params, folder: Path) -> Search:
    from keyreel import Library

    library = Library(folder / "library")

    def search(query: Any) -> int:
        hit = library.search(query, k=K)[0]
        return int(hit.video_id, 16) * ROWS_A_VIDEO + round(2 * hit.pts_seconds)

    return search


def _keyreel_videos(params: Params, folder: Path) -> Search:
    from keyreel import Library

    library = Library(folder / "library")

    def search(query: Any) -> int:
        hits = [hit for video in library.search_videos(query, k=K) for hit in video.moments]
        hit = max(hits, key=lambda one: one.score)
        return int(hit.video_id, 16) * ROWS_A_VIDEO + round(2 * hit.pts_seconds)

    return search


def _numpy(params: Params, folder: Path) -> Search:
    vectors = _all_vectors(params)

    def search(query: Any) -> int:
        scores = vectors @ query
        best = np.argpartition(scores, -K)[-K:]
        return int(best[np.argsort(-scores[best])][0])

    return search


def _faiss(params: Params, folder: Path) -> Search:
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(_all_vectors(params))
    return lambda query: int(index.search(query[None], K)[1][0, 0])


def _lancedb(params: Params, folder: Path) -> Search:
    import lancedb

    table = lancedb.connect(str(folder / "library")).open_table("frames")

    def search(query: Any) -> int:
        asked = table.search(query, vector_column_name="vector").distance_type("dot")
        row = asked.select(["generation", "frame_index", "_distance"]).limit(K).to_arrow().to_pylist()[0]
        return (int(row["generation"], 16) - 1) * ROWS_A_VIDEO + row["frame_index"] // 15

    return search


def _system(make: Callable[[Params, Path], Search]) -> Prepare:
    def prepare(params: Params, folders: Folders) -> Callable[[], Any]:
        folder = place(params, folders)
        search, queries = make(params, folder), np.load(folder / "best.npz")["queries"]
        began = time.perf_counter()
        search(queries[0])
        first = time.perf_counter() - began

        def run() -> Any:
            found, seconds, began = [], [], time.perf_counter()
            for query in queries:
                start = time.perf_counter()
                found.append(search(query))
                seconds.append(time.perf_counter() - start)
                if time.perf_counter() - began > _SECONDS:
                    break
            return found, seconds, first

        return run

    return prepare


SYSTEMS: dict[str, Prepare] = {
    "keyreel": _system(_keyreel),
    "keyreel videos": _system(_keyreel_videos),
    "numpy": _system(_numpy),
    "faiss flat": _system(_faiss),
    "lancedb flat": _system(_lancedb),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    found, seconds, first = result
    folder = place(params, folders)
    best = np.load(folder / "best.npz")["best"][: len(found)]
    middle, high = np.percentile(seconds, [50, 99])
    values = {"p50_seconds": middle, "p99_seconds": high, "first_seconds": first, "queries": len(found)}
    values["recall"] = float(np.mean(np.asarray(found) == best))
    if system == "keyreel":
        values["commit_seconds"] = float(np.median(json.loads((folder / "commits.json").read_text())))
    return values
