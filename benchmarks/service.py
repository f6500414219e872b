"""The service and a library over months: what hostile or patient callers, and thousands of commits, cost the others.

Case "service": the time of one caller's searches by text while nobody else is there, while others hold silent
connections, while others drip the bodies of requests, and with a new connection for each. Case "commits": a library
after so many commits, one video each: memory of the process, and the time to look at one video and to search.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import resource
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks._common import Row, parser_of, rows_of, run
from benchmarks.clips import small_clips
from benchmarks.index import service
from keyreel import Engine, Library
from keyreel.library import upkeep
from keyreel.runtime.memory import bound_arenas

DRIP = (
    b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{"
)


def searches(address: str, count: int, *, kept: bool) -> list[float]:
    """Seconds of each search by text of one caller."""
    seconds = []
    with ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=address, timeout=60))
        for number in range(count):
            if not kept:
                client = stack.enter_context(httpx.Client(base_url=address, timeout=60))
            began = time.perf_counter()
            client.get(f"/api/v1/search?q=thing+{number}").raise_for_status()
            seconds.append(time.perf_counter() - began)
    return seconds


def held(stack: ExitStack, address: str, count: int, first: bytes) -> list[socket.socket]:
    """So many connections that send the first bytes of a request and no more."""
    parts, made = urlsplit(address), []
    for _ in range(count):
        with contextlib.suppress(OSError):
            opened = stack.enter_context(socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5))
            opened.sendall(first)
            made.append(opened)
    return made


def under_pressure(library: Path, quick: bool) -> Iterator[tuple[Row, dict[str, list[float]]]]:
    count, others = (5, 20) if quick else (100, 2000)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others = min(others, limit - 200)
    with service(library, library) as (_, address):
        searches(address, 3, kept=True)
        for who, first, crowd, kept in (
            ("nobody", b"", 0, True),
            ("nobody, a new connection each", b"", 0, False),
            ("silent connections", b"", others, False),
            ("dripping bodies", DRIP, min(others, 300), False),
        ):
            with ExitStack() as stack:
                held(stack, address, crowd, first)
                yield {"others": who, "connections": crowd}, {"answer_seconds": searches(address, count, kept=kept)}


def commits(folder: Path, clip: Path, most: int) -> Iterator[tuple[Row, dict[str, list[float]]]]:
    """Each commit is a video of its own, with vectors of its own and the pictures of `clip`."""
    draw = np.random.default_rng(0)
    bound_arenas()  # as the command line does
    with Engine.from_pretrained(device="cpu", threads=1) as engine, Library(folder / "library", engine) as library:
        library.add([clip])
        tables, [first] = library._tables, library.list()
        ((_, rows),) = tables.rows([first.generation])
        previews, extras = tables.previews(first.generation), tables.extras(first.generation)
        for number in range(most + 1):
            if number % max(most // 4, 1) == 0:
                library.search("a dog")
                yield {"commits": number}, looked_at(library, first.id)
            vectors = draw.normal(size=rows.vectors.shape).astype(np.float32)
            own = dataclasses.replace(rows, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
            names = {"id": uuid.uuid4().hex, "generation": uuid.uuid4().hex, "path": f"/videos/{number}.mp4"}
            tables.put(dataclasses.replace(first, **names), own, previews, extras)
            upkeep.tidy(tables)


def looked_at(library: Library, video: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"details_seconds": [], "search_seconds": []}
    for _ in range(9):
        began = time.perf_counter()
        library.record(video), library.extras(video), library.previews(video)
        found["details_seconds"].append(time.perf_counter() - began)
        began = time.perf_counter()
        library.search("a dog")
        found["search_seconds"].append(time.perf_counter() - began)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {**found, "resident_mib": [pages * resource.getpagesize() / 2**20]}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    clips = small_clips(options.content, 4)
    with tempfile.TemporaryDirectory(dir=options.content) as folder:
        with (
            Engine.from_pretrained(device="cpu", threads=1) as engine,
            Library(Path(folder) / "served", engine) as made,
        ):
            made.add(clips)
        for params, found in under_pressure(Path(folder) / "served", options.quick):
            yield from rows_of("service", params, "keyreel", found)
        for params, found in commits(Path(folder), clips[0], 8 if options.quick else 2000):
            yield from rows_of("commits", params, "keyreel", found)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
