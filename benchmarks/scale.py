"""How searching and writing grow with shards, and what that means for machines beyond this one.

`search` asks actors of a local Ray, a shard each: in memory as 32-bit numbers, as the product keeps them, and with
10,000,000 rows as 16-bit numbers in a mapped file. All is the product's own code but for where the rows come from.
`recovery` kills the actor of a shard that was read from a library, `commits` writes with several processes. Times are
those of a machine that others may use: CPU-seconds are given beside them. `benchmarks.machines` goes on from there.

Kills under clients: `KEYREEL_CLUSTER_KILLS=50 pytest -m full tests/test_cluster.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import Row, cpu_seconds, parser_of, resident_mib, rows_of, run, timed
from benchmarks.machines import FPS, IN_MEMORY
from benchmarks.made_up import fill, record_of, rows_in
from keyreel.cluster.search import RemoteSearch, ShardActor
from keyreel.config import LibraryConfig
from keyreel.library import upkeep
from keyreel.library.search import SearchIndex
from keyreel.library.shards import open_tables
from keyreel.library.types import Filter
from keyreel.library.vectors import Matrix, Snapshot, Spans
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import SubjectScale
from keyreel.search import Asked
from keyreel.types import F32

WIDTH, K, SHARDS = 256, 10, (1, 2, 4, 8)
OF_VIDEO, OF_SHOT = 5000, 250  # rows
SECONDS = 30.0  # for the queries of one set
SHOTS: dict[str, Any] = {"shot": OF_SHOT, "fps": FPS}


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_file(folder: Path, rows: int) -> Path:
    """[rows, WIDTH] float16 unit vectors; each block is a first one with its columns in another order, some negated."""
    path, draw, block = folder / f"rows-{rows}.f16", np.random.default_rng(19), min(rows, 100_000)
    if path.exists() and path.stat().st_size == 2 * rows * WIDTH:
        return path
    first = draw.standard_normal((block // OF_SHOT, OF_SHOT, WIDTH), np.float32) * 0.5
    first += draw.standard_normal((block // OF_SHOT, 1, WIDTH), np.float32)
    first = first.reshape(-1, WIDTH)
    first = (first / np.linalg.norm(first, axis=1, keepdims=True)).astype(np.float16)
    with path.open("wb") as file:
        for _ in range(rows // block):
            file.write((first[:, draw.permutation(WIDTH)] * draw.choice([-1, 1], WIDTH).astype(np.float16)).tobytes())
    return path


class MappedShard(ShardActor):
    """A shard whose rows are a part of a file, mapped or read into memory."""

    def __init__(self, path: str, first: int, last: int, mapped: bool) -> None:
        count = last - first
        stored = np.memmap(path, np.float16, "r", 2 * WIDTH * first, (count, WIDTH))
        videos, frame = count // OF_VIDEO, np.arange(count) % OF_VIDEO
        none = np.full((count, 4), np.nan, np.float16)
        vectors = stored if mapped else stored.astype(np.float32)
        back = np.zeros(count, np.int32)
        matrix = Matrix(vectors, frame / FPS, frame % OF_SHOT == 0, frame % OF_SHOT == 0, back, none)
        records = tuple(record_of(first // OF_VIDEO + number, OF_VIDEO, **SHOTS) for number in range(videos))
        names = {record.id: number for number, record in enumerate(records)}
        low = np.arange(videos) * OF_VIDEO
        high = low + OF_VIDEO
        spans = Spans(np.arange(videos), low, high, high, high)
        self._index = SearchIndex(_Made(), LibraryConfig(), resolve("cpu", threads=1))  # type: ignore[arg-type]
        self._index._vectors = _Made(Snapshot(1, records, names, matrix, spans))  # type: ignore[assignment]

    def _found(self) -> SearchIndex | None:
        return self._index


class _Made:
    """What the search needs of tables and vectors that do not change."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._snapshot = snapshot

    def model(self) -> tuple[str, str, int]:
        return "made-up", "0" * 64, WIDTH

    def snapshot(self) -> Snapshot | None:
        return self._snapshot


# --- searching --------------------------------------------------------------------------------------------------------


def questions(path: Path, rows: int) -> list[Asked]:
    """Queries near a row each."""
    draw, stored = np.random.default_rng(20), np.memmap(path, np.float16, "r", 0, (rows, WIDTH))
    near = stored[np.sort(draw.integers(0, rows, 64))].astype(np.float32)
    near += draw.standard_normal(near.shape).astype(np.float32) / math.sqrt(WIDTH)
    return [Asked(one[None], (SubjectScale(),), (1.0,)) for one in near / np.linalg.norm(near, axis=1, keepdims=True)]


def cpu_of(pids: Sequence[int]) -> float:
    """CPU-seconds of processes."""
    found = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(one[11]) + int(one[12]) for one in found) / os.sysconf("SC_CLK_TCK")


def searched(ray: Any, path: Path, rows: int, shards: int, mapped: bool, seconds: float) -> dict[str, list[float]]:
    edges = [OF_VIDEO * round(rows / OF_VIDEO * number / shards) for number in range(shards + 1)]
    kind = ray.remote(num_cpus=0, max_concurrency=2)(MappedShard)
    actors = [kind.remote(str(path), first, last, mapped) for first, last in itertools.pairwise(edges)]
    ray.get([actor.ready.remote() for actor in actors])
    pids = [pid for pid, _ in ray.get([actor.process.remote() for actor in actors])]
    queries = questions(path, rows)
    search = RemoteSearch(shards, lambda _: 0, 0.98, actors.__getitem__, wait=True, seconds=600.0)
    search.hits(queries[:1], K)
    before = cpu_of(pids)
    _, took = timed(lambda query: search.hits([query], K), queries, seconds)
    cpu, alone = (cpu_of(pids) - before) / len(took), list[float]()
    for actor in actors:

        def ask(query: Asked, actor: Any = actor) -> Any:
            return ray.get(actor.ask.remote("moments", [query], K, Filter(), [None]))

        alone.append(statistics.median(timed(ask, queries, seconds / shards)[1]))
    memory = sum(most for _, most in ray.get([actor.process.remote() for actor in actors]))
    for actor in actors:
        ray.kill(actor)
    low, middle, high = np.percentile(took, [25, 50, 99])
    return {
        "p50_seconds": [low, middle, float(np.percentile(took, 75))],
        "p99_seconds": [high],
        "cpu_seconds": [cpu],
        "slowest_alone_seconds": [max(alone)],
        "actors_mib": [memory / 2**20],
        "driver_mib": [resident_mib()],
        "queries": [len(took)],
    }


# --- recovery ---------------------------------------------------------------------------------------------------------


def recovered(ray: Any, uri: str, shards: int, kills: int) -> dict[str, list[float]]:
    """Seconds from a kill to a partial answer, and to a whole one; and what reading a shard takes."""
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(ShardActor)
    actors = [kind.remote(uri, number, None, "cpu") for number in range(shards)]
    ray.get([actor.ready.remote() for actor in actors])
    tables = open_tables(uri)
    search = RemoteSearch(shards, tables.number_of, 0.98, actors.__getitem__, wait=False, seconds=60.0)
    query = Asked(np.eye(1, WIDTH, dtype=np.float32), (SubjectScale(),), (1.0,))
    right, found = search.hits([query], K), dict[str, list[float]](partial_seconds=[], recovery_seconds=[])
    for number in range(kills):
        pid, _ = ray.get(actors[number % shards].process.remote())
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while not search.left_out:
            search.hits([query], K)
        found["partial_seconds"].append(time.perf_counter() - began)
        while search.left_out:
            time.sleep(0.01)
            hits = search.hits([query], K)
        found["recovery_seconds"].append(time.perf_counter() - began)
        if hits != right:
            raise RuntimeError("the answer after a recovery is another one")
    for actor in actors:
        ray.kill(actor)
    began = time.perf_counter()
    for part in tables.parts:
        SearchIndex(part, LibraryConfig()).refresh()
    rows = sum(record.rows for record in tables.records())
    return {**found, "read_rows_a_second": [rows / (time.perf_counter() - began)]}


# --- writing ----------------------------------------------------------------------------------------------------------


def unit_vectors(draw: np.random.Generator, count: int) -> F32:
    vectors = draw.standard_normal((count, WIDTH), np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def write(uri: str, writer: int, shards: int, videos: int, begin: Any, ended: Any) -> None:
    """In a process of its own: so many videos, all to shard `writer` modulo their number."""
    tables, draw = open_tables(uri), np.random.default_rng(writer)
    ids = (f"{writer}-{number}" for number in itertools.count())
    names = [id for id in itertools.islice(ids, 40 * shards * videos) if tables.number_of(id) == writer % shards]
    part, rows = tables.parts[writer % shards], rows_in(unit_vectors(draw, 120), shot=40, fps=FPS)
    part.records()
    begin.wait()
    before = cpu_seconds()
    for id in names[:videos]:
        part.put(replace(record_of(0, 120, shot=40, fps=FPS), id=id, path=f"/{id}.mp4", generation=id), rows)
        upkeep.tidy(part)
    ended.put(cpu_seconds() - before)


def commits(folder: Path, writers: int, shards: int, videos: int) -> dict[str, list[float]]:
    uri = str(folder / f"commits-{writers}-{shards}")
    open_tables(uri, shards=shards).create(model="made-up", model_sha256="0" * 64, width=WIDTH)
    spawn = multiprocessing.get_context("spawn")
    begin, ended = spawn.Barrier(writers + 1), spawn.Queue()
    processes = [spawn.Process(target=write, args=(uri, n, shards, videos, begin, ended)) for n in range(writers)]
    for process in processes:
        process.start()
    begin.wait()
    began = time.perf_counter()
    cpu = sum(ended.get() for _ in processes)
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    there = len(open_tables(uri).records())
    if there != writers * videos:
        raise RuntimeError(f"{there} videos instead of {writers * videos}")
    return {"commits_a_second": [there / seconds], "cpu_seconds": [cpu / there]}


def on_ray(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    import ray

    from keyreel.cluster.indexing import connected

    per_shard, large = (10_000, 40_000) if options.quick else (250_000, 10_000_000)
    seconds, shards = (1.0, (1, 2)) if options.quick else (SECONDS, SHARDS)
    in_memory = [*((per_shard * count, count) for count in shards), (4 * per_shard, 1)]
    sets = [(rows, count, IN_MEMORY) for rows, count in in_memory]
    sets += [(large, count, "mapped file, 16 bits") for count in shards]
    with connected(ray, None, cpus=2, gpus=0):
        for rows, count, kept in sets:
            path = rows_file(options.content, large if kept != IN_MEMORY else per_shard * max(4, *shards))
            found = searched(ray, path, rows, count, kept != IN_MEMORY, seconds)
            params = {"rows": rows, "shards": count, "width": WIDTH, "kept": kept}
            yield from rows_of("scale-search", params, "keyreel", found)
        rows, count = (20_000, 2) if options.quick else (200_000, 4)
        draw = np.random.default_rng(21)
        videos = (unit_vectors(draw, OF_VIDEO) for _ in range(rows // OF_VIDEO))
        fill(str(folder / "recovery"), videos, width=WIDTH, shards=count, **SHOTS)
        found = recovered(ray, str(folder / "recovery"), count, 2 if options.quick else 8)
        yield from rows_of("scale-recovery", {"rows": rows, "shards": count, "width": WIDTH}, "keyreel", found)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=options.content) as made:
        folder = Path(made)
        for writers, count in ((1, 1), (2, 2)) if options.quick else ((1, 1), (4, 1), (4, 4)):
            found = commits(folder, writers, count, 6 if options.quick else 60)
            yield from rows_of("scale-commits", {"writers": writers, "shards": count}, "keyreel", found)
        with redirect_stdout(sys.stderr):  # Ray prints there when a worker has died; stdout is for rows
            rows = list(on_ray(options, folder))
        yield from rows


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
