"""A library with the built-in model: how fast videos come in, and the service under load.

Case "index": real clips, and many small ones. "keyreel summarize" makes vectors and key-frames and keeps nothing: what
"keyreel" takes beyond it is previews, thumbnails and commits. "keyreel again" is a second run, which finds every video
unchanged. Every other run fills a new library.

Case "load": `keyreel serve` on a library of the real clips. Each client keeps one connection and asks one thing after
the other (searches by text, moments of a video, lists, details, previews); an answer that is not 200 is an error, a
request without an answer is lost. Service and clients share the machine.

What is left after kill -9: `KEYREEL_KILLS=200 pytest -m full tests/test_library_crash.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np

from benchmarks import peers
from benchmarks._common import Absent, Row, System, compare, parser_of, rows_of, run, say
from benchmarks.clips import small_clips

REAL = ("natural", "animation", "format", "broken")  # folders of real clips
_WORDS = ("water", "a car on a road", "people", "a bottle", "bicycles", "a flower", "an animal", "a face", "night")


def summarize(videos: list[Path]) -> peers.Run:
    from keyreel import Engine, KeyreelError

    engine = Engine.from_pretrained(device="cpu")

    def every() -> None:
        for video in videos:
            try:
                engine.summarize(video)
            except KeyreelError:
                continue  # some of the real clips are broken on purpose

    return every


def add(videos: list[Path], folder: Path, *, again: bool = False) -> peers.Run:
    from keyreel import Engine, Library

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


def measure(options: argparse.Namespace) -> Iterator[Row]:
    found = [path for name in REAL for path in sorted((options.media / name).glob("*.*"))]
    some = [("real clips", found[:1] if options.quick else found)]
    some.append(("small clips", small_clips(options.content, 4 if options.quick else 300)))
    for name, videos in some:
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
            yield from compare("index", params, systems, runs=1 if options.quick else 3, limit_seconds=1800)
            clients, seconds = (8, 3.0) if options.quick else (options.clients, options.seconds)
            if name == "real clips":
                place = add(videos, Path(folder))()
                for count, length in ((1, min(seconds, 10.0)), (clients, seconds)):
                    values = load(place, options.media.resolve(), count, length)
                    yield from rows_of("load", {"clients": count, "seconds": length}, "keyreel serve", values)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    raise SystemExit(run(parser, measure))
