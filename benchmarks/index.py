"""A library with the built-in model: how fast videos come in, what commits leave, and the service under load.

Case "index": real clips, and many small ones. "keyreel summarize" makes vectors and key-frames and keeps nothing: what
"keyreel" takes beyond it is previews, thumbnails and commits. "keyreel again" is a second run, which finds every video
unchanged. Every other run fills a new library.

Case "load": `keyreel serve` on a library of the real clips. Each client keeps one connection and asks one thing after
the other (searches by text, moments of a video, lists, details, previews); an answer that is not 200 is an error, a
request without an answer is lost. Service and clients share the machine.

Case "service": the time of one caller's searches by text while nobody else is there, while others hold silent
connections, while others drip the bodies of requests, and with a new connection for each. Case "commits": a library
after so many commits, one video each: memory of the process, and the time to look at one video and to search.

What is left after kill -9: `KEYREEL_KILLS=200 pytest -m full tests/test_library_crash.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import numpy as np

from benchmarks import peers
from benchmarks._common import Absent, Row, System, compare, parser_of, resident_mib, rows_of, run, say, timed
from benchmarks.clips import small_clips
from keyreel import Engine, KeyreelError, Library
from keyreel.library import upkeep
from keyreel.runtime.memory import bound_arenas

REAL = ("natural", "animation", "format", "broken")  # folders of real clips
_WORDS = ("water", "a car on a road", "people", "a bottle", "bicycles", "a flower", "an animal", "a face", "night")
DRIP = (
    b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n{"
)


def summarize(videos: list[Path]) -> peers.Run:
    engine = Engine.from_pretrained(device="cpu")

    def every() -> None:
        for video in videos:
            try:
                engine.summarize(video)
            except KeyreelError:
                continue  # some of the real clips are broken on purpose

    return every


def add(videos: list[Path], folder: Path, *, again: bool = False) -> peers.Run:
    engine = Engine.from_pretrained(device="cpu")

    def into(place: Path) -> Path:
        with Library(place, engine) as library:
            library.add(videos)
        return place

    if again:
        return partial(into, into(folder / "again"))
    return lambda: into(Path(tempfile.mkdtemp(dir=folder)) / "library")


def check(videos: list[Path], place: Path | None) -> dict[str, float]:
    """How many videos, and the size of the library."""
    if place is None:
        return {"videos": len(videos)}
    size = sum((Path(at) / name).stat().st_size for at, _, names in os.walk(place) for name in names)
    return {"videos": len(videos), "library_mib": size / 2**20}


@contextmanager
def service(library: Path, videos: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--library", str(library), "--root", str(videos), "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "keyreel", "serve", *options], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=60) as patient:  # retries for a minute
            patient.get(f"{address}/readyz").raise_for_status()
        yield process, address
    finally:
        process.kill()
        process.wait()


def questions(videos: Sequence[Row], seed: int) -> Iterator[str]:
    """What one client asks: six of ten searches by text, and one each of four others."""
    draw = random.Random(seed)
    while True:
        one, query = draw.choice(videos), quote(f"{draw.choice(_WORDS)} {draw.choice(_WORDS)}")
        others = (
            f"/api/v1/videos/{one['id']}/moments?q={query}",
            f"/api/v1/videos?offset={draw.randrange(len(videos))}&limit=10",
            f"/api/v1/videos/{one['id']}",
            str(one["poster"]),
        )
        yield draw.choice((*[f"/api/v1/search?q={query}&k=10"] * 6, *others))


def ask(address: str, videos: Sequence[Row], seed: int, until: float) -> tuple[list[float], list[str], list[str]]:
    """One client, until a moment of time.monotonic(): seconds of its answers, errors, what was not answered."""
    seconds, errors, lost = [], [], []
    with httpx.Client(base_url=address, timeout=60) as client:
        for path in questions(videos, seed):
            began = time.monotonic()
            if began > until:
                break
            try:
                answer = client.get(path)
            except httpx.TransportError as error:
                lost.append(f"{path}: {type(error).__name__}: {error}")
                continue
            seconds.append(time.monotonic() - began)
            if answer.status_code != 200:
                errors.append(f"{path}: {answer.status_code} {answer.text[:200]}")
    return seconds, errors, lost


def load(library: Path, videos: Path, count: int, seconds: float) -> dict[str, list[float]]:
    with service(library, videos) as (process, address), ThreadPoolExecutor(count) as pool:
        listed = httpx.get(f"{address}/api/v1/videos?limit=100", timeout=60).json()["videos"]
        known = [video for video in listed if video["status"] == "ok"]
        until = time.monotonic() + seconds
        found = list(pool.map(lambda seed: ask(address, known, seed, until), range(count)))
        alive = process.poll() is None
    answers, errors, lost = (sorted(one for own in part for one in own) for part in zip(*found, strict=True))
    for line in (*errors, *lost)[:10]:
        say(line)
    if not answers:
        raise RuntimeError("the service answered nothing: nothing was measured")
    middle, high = np.percentile(answers, [50, 99]).tolist()
    counts = {"requests": [len(answers)], "errors": [len(errors) + (not alive)], "lost": [len(lost)]}
    return {**counts, "p50_seconds": [middle], "p99_seconds": [high]}


def searches(address: str, count: int, *, kept: bool) -> list[float]:
    """Seconds of each search by text of one caller, with one connection or a new one for each."""
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=address, timeout=60)) for _ in range(1 if kept else count)]

        def search(number: int) -> None:
            clients[number % len(clients)].get(f"/api/v1/search?q=thing+{number}").raise_for_status()

        _, found = timed(search, range(count))
    return found


def hold(stack: ExitStack, address: str, count: int, first: bytes) -> None:
    """Opens so many connections that send the first bytes of a request and no more."""
    parts = urlsplit(address)
    for _ in range(count):
        with suppress(OSError):
            opened = stack.enter_context(socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5))
            opened.sendall(first)


def under_pressure(library: Path, videos: Path, *, quick: bool) -> Iterator[tuple[Row, dict[str, list[float]]]]:
    count, others = (5, 20) if quick else (100, min(2000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200))
    with service(library, videos) as (_, address):
        searches(address, 3, kept=True)
        for who, first, crowd in (
            ("nobody", b"", 0),
            ("nobody, a new connection each", b"", 0),
            ("silent connections", b"", others),
            ("dripping bodies", DRIP, min(others, 300)),
        ):
            with ExitStack() as stack:
                hold(stack, address, crowd, first)
                found = searches(address, count, kept=who == "nobody")
            yield {"others": who, "connections": crowd}, {"answer_seconds": found}


def commits(folder: Path, clip: Path, most: int) -> Iterator[tuple[Row, dict[str, list[float]]]]:
    """Each commit is a video of its own, with vectors of its own and the pictures of `clip`."""
    draw = np.random.default_rng(0)
    bound_arenas()  # as the command line does
    with Engine.from_pretrained(device="cpu", threads=1) as engine, Library(folder / "library", engine) as library:
        library.add([clip])
        tables, [first] = library._tables, library.list()
        ((_, rows),) = tables.rows([first.generation])
        previews, extras = tables.previews(first.generation), tables.extras(first.generation)

        def look(id: str) -> None:
            library.record(id), library.extras(id), library.previews(id)

        for number in range(most + 1):
            if number % max(most // 4, 1) == 0:
                library.search("a dog")
                _, details = timed(look, 9 * [first.id])
                _, searched = timed(library.search, 9 * ["a dog"])
                found = {"details_seconds": details, "search_seconds": searched, "resident_mib": [resident_mib()]}
                yield {"commits": number}, found
            vectors = draw.normal(size=rows.vectors.shape).astype(np.float32)
            own = dataclasses.replace(rows, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
            names = {"id": uuid.uuid4().hex, "generation": uuid.uuid4().hex, "path": f"/videos/{number}.mp4"}
            tables.put(dataclasses.replace(first, **names), own, previews, extras)
            upkeep.tidy(tables)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    quick, media = options.quick, options.media.resolve()
    real = [path for name in REAL for path in sorted((media / name).glob("*.*"))]
    small = small_clips(options.content, 4 if quick else 300)
    with tempfile.TemporaryDirectory(dir=options.content) as folder:
        for params, found in commits(Path(folder), small[0], 8 if quick else 2000):
            yield from rows_of("commits", params, "keyreel", found)
    for name, videos in (("real clips", real[:1] if quick else real), ("small clips", small)):
        params = {"of": name, "videos": len(videos)}
        if not videos:
            yield from rows_of("index", params, "keyreel", Absent("there are no clips in --media"))
            continue
        with tempfile.TemporaryDirectory(dir=options.content) as folder:
            checked = partial(check, videos)
            systems = [
                System("keyreel summarize", partial(summarize, videos), checked),
                System("keyreel", partial(add, videos, Path(folder)), checked),
                System("keyreel again", partial(add, videos, Path(folder), again=True), checked),
            ]
            yield from compare("index", params, systems, runs=1 if quick else 3, limit_seconds=1800)
            if name == "real clips":
                place = add(videos, Path(folder))()
                for clients, seconds in ((1, 3.0), (8, 3.0)) if quick else ((1, 10.0), (64, 60.0)):
                    found = load(place, media, clients, seconds)
                    yield from rows_of("load", {"clients": clients, "seconds": seconds}, "keyreel serve", found)
                for params, found in under_pressure(place, media, quick=quick):
                    yield from rows_of("service", params, "keyreel", found)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
