"""The service under load: many clients at once, then SIGTERM while they go on and jobs are handed in.

    python -m benchmarks.library_load --library DIR --videos DIR [--clients 64] [--seconds 60] [--jobs 40] [--quick]

The library should hold some videos already; those of the folder are handed in as jobs. Two things are measured. Load:
each client keeps one connection and asks one thing after the other (searches by text, moments of a video, lists,
details, previews); an answer that is not 200 is an error, a request without an answer is lost. Drain: as soon as half
the jobs have been accepted, the service gets SIGTERM, and the clients go on until it takes no connections any more; a
request from before SIGTERM that it does not answer is lost (a later one may meet the end of its connection). Then the
service is started again on the same library: a job that had been accepted and does not end as done is lost. Service
and clients share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.environment import environment
from benchmarks.measure import ROOT, UNITS, spread
from benchmarks.run import PACKAGES, commit

WORDS = (
    "water",
    "a car on a road",
    "people",
    "a bottle",
    "bicycles",
    "a flower",
    "an animal",
    "a face",
    "trees",
    "night",
)
SERVE = """
import json, sys
from keyreel import Engine, Library
from keyreel.config import ServeConfig
from keyreel.serve import run
library, options = json.loads(sys.argv[1])
with Engine.from_pretrained() as engine, Library(library, engine) as opened:
    run(opened, ServeConfig(**options))
"""
_START_SECONDS = _STOP_SECONDS = 120.0


@dataclass(slots=True)
class Tally:
    """What one client met."""

    seconds: list[float] = field(default_factory=list)  # of the answers, in order
    errors: list[str] = field(default_factory=list)
    lost: list[tuple[float, str]] = field(default_factory=list)  # when it was asked, by time.perf_counter()


@contextmanager
def service(library: Path, videos: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A service that is ready, and its port; ended in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"port": port, "roots": [str(videos)]}
    process = subprocess.Popen([sys.executable, "-c", SERVE, json.dumps([str(library), options])])
    try:
        until = time.monotonic() + _START_SECONDS
        while _status(port, "/readyz") != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the service does not become ready")
            time.sleep(0.2)
        yield process, port
    finally:
        process.kill()
        process.wait()


def _status(port: int, path: str) -> int | None:
    try:
        return _ask(http.client.HTTPConnection("127.0.0.1", port, timeout=30), "GET", path)[0]
    except OSError:
        return None


def _ask(connection: http.client.HTTPConnection, verb: str, path: str, body: Any = None) -> tuple[int, bytes]:
    headers = {} if body is None else {"Content-Type": "application/json"}
    connection.request(verb, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def _json(port: int, path: str) -> Any:
    status, body = _ask(http.client.HTTPConnection("127.0.0.1", port, timeout=60), "GET", path)
    if status != 200:
        raise RuntimeError(f"{path}: {status} {body[:200]!r}")
    return json.loads(body)


def questions(videos: Sequence[dict[str, Any]], seed: int) -> Iterator[str]:
    """What one client asks: six of ten searches by text, and one each of four others."""
    random_ = random.Random(seed)
    while True:
        one = random_.choice(videos)
        query = quote(f"{random_.choice(WORDS)} {random_.choice(WORDS)}")
        others = (
            f"/api/v1/videos/{one['id']}/moments?q={query}",
            f"/api/v1/videos?offset={random_.randrange(len(videos))}&limit=10",
            f"/api/v1/videos/{one['id']}",
            str(one["poster"]),
        )
        yield random_.choice((*[f"/api/v1/search?q={query}&k=10"] * 6, *others))


def client(port: int, videos: Sequence[dict[str, Any]], seed: int, stop: threading.Event, tally: Tally) -> None:
    """Asks until it is told to stop, or until nobody takes the connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for path in questions(videos, seed):
        if stop.is_set():
            break
        began = time.perf_counter()
        try:
            if connection.sock is None:
                connection.connect()
        except OSError:
            break  # nothing was asked
        try:
            status, body = _ask(connection, "GET", path)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            tally.lost.append((began, f"{path}: {type(error).__name__}: {error}"))
            continue
        tally.seconds.append(time.perf_counter() - began)
        if status != 200:
            tally.errors.append(f"{path}: {status} {body[:200]!r}")
    connection.close()


@contextmanager
def clients(port: int, count: int) -> Iterator[tuple[list[Tally], threading.Event]]:
    """So many clients, for the time of the block and until they have ended."""
    videos = [one for one in _json(port, "/api/v1/videos?limit=100")["videos"] if one["status"] == "ok"]
    stop, tallies = threading.Event(), [Tally() for _ in range(count)]
    threads = [threading.Thread(target=client, args=(port, videos, n, stop, tally)) for n, tally in enumerate(tallies)]
    for thread in threads:
        thread.start()
    try:
        yield tallies, stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def load(library: Path, videos: Path, count: int, seconds: float) -> dict[str, list[float]]:
    with service(library, videos) as (process, port):
        with clients(port, count) as (tallies, _):
            time.sleep(seconds)
        alive = process.poll() is None
    _complain(tallies, time.perf_counter())
    answers = sorted(second for tally in tallies for second in tally.seconds)
    if not answers:
        raise RuntimeError("the service answered nothing: nothing was measured")
    return {
        "requests": [len(answers)],
        "errors": [sum(len(tally.errors) for tally in tallies) + (not alive)],
        "lost": [sum(len(tally.lost) for tally in tallies)],
        "p50_seconds": [answers[len(answers) // 2]],
        "p99_seconds": [answers[len(answers) * 99 // 100]],
    }


def drain(library: Path, videos: Path, count: int, jobs: int) -> dict[str, list[float]]:
    paths = sorted(path for path in videos.rglob("*") if path.is_file())[:jobs]
    accepted: dict[str, Path] = {}
    with service(library, videos) as (process, port), clients(port, count) as (tallies, stop):
        sent = threading.Event()

        def hand_in() -> None:
            for path in paths:
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    status, body = _ask(connection, "POST", "/api/v1/jobs", {"path": str(path)})
                except (OSError, http.client.HTTPException):
                    continue  # not accepted, as far as the caller knows
                if status == 202:
                    accepted[json.loads(body)["id"]] = path
                if len(accepted) >= len(paths) / 2:
                    sent.set()
            sent.set()

        handing = threading.Thread(target=hand_in)
        handing.start()
        sent.wait()
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        code = process.wait(_STOP_SECONDS)
        stopped = time.perf_counter() - began
        handing.join()
        stop.set()
    _complain(tallies, began)
    if not accepted:
        raise RuntimeError("the service accepted no job: nothing was measured")
    if code not in (0, -signal.SIGTERM):
        raise RuntimeError(f"the service ended with {code}")
    with service(library, videos) as (_, port):
        lost = [path for id, path in accepted.items() if not _ends_well(port, id)]
    for path in lost:
        sys.stderr.write(f"lost job: {path}\n")
    return {
        "accepted": [len(accepted)],
        "lost_jobs": [len(lost)],
        "requests": [sum(len(tally.seconds) for tally in tallies)],
        "lost": [sum(asked < began for tally in tallies for asked, _ in tally.lost)],
        "stop_seconds": [stopped],
    }


def _ends_well(port: int, id: str) -> bool:
    until = time.monotonic() + 10 * _START_SECONDS
    while time.monotonic() < until:
        try:
            state = _json(port, f"/api/v1/jobs/{id}")["state"]
        except RuntimeError:
            return False  # nobody knows of it
        if state in ("done", "failed", "cancelled"):
            return bool(state == "done")
        time.sleep(0.2)
    return False


def _complain(tallies: Sequence[Tally], until: float) -> None:
    errors = [line for tally in tallies for line in tally.errors]
    lost = [
        f"{line} ({until - asked:.3f} s before)" for tally in tallies for asked, line in tally.lost if asked < until
    ]
    for line in [*errors, *lost][:10]:
        sys.stderr.write(f"{line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library_load", description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True, help="a library; a copy of it is worked on")
    parser.add_argument("--videos", type=Path, required=True, help="folder whose videos are handed in")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="8 clients, 3 s, 6 jobs")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "library.jsonl")
    given = parser.parse_args()
    given.videos = given.videos.resolve()  # the service takes absolute paths only
    if given.quick:
        given.clients, given.seconds, given.jobs = 8, 3.0, 6
    with tempfile.TemporaryDirectory(prefix="keyreel-load-") as folder:
        library = Path(folder) / "library"
        shutil.copytree(given.library, library)
        params = {"clients": given.clients, "seconds": given.seconds}
        found = [
            ("load", params, load(library, given.videos, given.clients, given.seconds)),
            (
                "drain",
                {"clients": given.clients, "jobs": given.jobs},
                drain(library, given.videos, given.clients, given.jobs),
            ),
        ]
    return write(given.output, "keyreel serve", found)


def write(output: Path, system: str, found: Sequence[tuple[str, dict[str, Any], dict[str, list[float]]]]) -> int:
    """Appends a row for each metric, and prints them; 1 where something was lost."""
    head = {"commit": commit(), "environment": environment((*PACKAGES, "fastapi", "uvicorn"))}
    bad = 0
    with output.open("a", encoding="utf-8") as file:
        for case, params, metrics in found:
            for metric, values in metrics.items():
                row = {"case": case, "params": params, "system": system, "metric": metric}
                file.write(json.dumps({**row, **spread(values), "unit": UNITS[metric], **head}) + "\n")
                print(case, metric, *values)
                bad += metric.startswith(("lost", "errors", "findings")) and any(values)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
