"""`keyreel serve --ray local` in a process of its own, the processes of its cluster, and clients that keep asking."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from served import Served

from keyreel import Engine, Library
from keyreel.library.merge import Search
from keyreel.library.search import SearchIndex
from keyreel.library.shards import Shards

SHARD, REPLICA, JOBS = "ray::ShardActor", "ray::ServeReplica", "ray::JobsActor"


@contextmanager
def cluster_served(library: Path, *options: str) -> Iterator[Served]:
    """Starts it on a free port; ended as a person ends it, and killed with all its children if that does not do."""
    command = [sys.executable, "-m", "keyreel", "serve", "--library", str(library), "--ray", "local", "--port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, start_new_session=True) as process:
        lines: list[str] = []
        try:
            yield from _ready(process, lines)
        finally:
            children = [pid for pid, _ in _below(process.pid)]
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for pid in children:
                _kill(pid)


def _ready(process: subprocess.Popen[bytes], lines: list[str]) -> Iterator[Served]:
    assert process.stderr is not None
    late = threading.Timer(400, process.kill)
    late.start()
    for line in process.stderr:
        lines.append(line.decode(errors="replace"))
        if found := re.search(r"serving .* at (http://\S+);", lines[-1]):
            break
    else:
        raise AssertionError("".join(lines[-30:]))
    late.cancel()
    threading.Thread(target=lambda: lines.extend(map(str, process.stderr or ())), daemon=True).start()
    with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
        yield Served(process, client, found[1])


def _below(parent: int) -> list[tuple[int, str]]:
    """The processes below one, with their command lines."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(status[1])
    found, around = [], {parent}
    while around:
        around = {pid for pid, above in parents.items() if above in around}
        found += [(pid, names[pid]) for pid in around]
    return found


def processes(served: Served, kind: str) -> list[int]:
    """Of its cluster, those whose title begins so."""
    return sorted(pid for pid, name in _below(served.process.pid) if name.startswith(kind))


def kill_one(served: Served, kind: str, number: int) -> None:
    if there := processes(served, kind):
        _kill(there[number % len(there)])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Clients:
    """So many that ask one query after the other until they are stopped; what they were answered."""

    def __init__(
        self, served: Served, count: int, queries: list[str], right: Callable[[str, dict[str, Any]], bool]
    ) -> None:
        self.statuses: dict[int, int] = {}
        self.wrong: list[str] = []
        self.partial, self.slowest = 0, 0.0
        self._end, self._lock = threading.Event(), threading.Lock()
        self._served, self._queries, self._right = served, queries, right
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._served.address, timeout=60, trust_env=False) as client:
            while not self._end.is_set():
                query = self._queries[number % len(self._queries)]
                number += 1
                began = time.monotonic()
                try:
                    answer = client.get("/api/v1/search", params={"q": query, "k": 5})
                except httpx.TransportError as error:
                    with self._lock:
                        self.wrong.append(f"{query}: {type(error).__name__}: {error}")
                    continue
                took, good = time.monotonic() - began, answer.status_code == 200
                with self._lock:
                    self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
                    self.slowest = max(self.slowest, took)
                    self.partial += good and bool(answer.json()["left_out"])
                    if (good and not self._right(query, answer.json())) or answer.status_code not in (200, 429, 503):
                        self.wrong.append(f"{query}: {answer.status_code} {answer.text[:300]}")
                if not good:
                    time.sleep(0.05)


def wait_for(http: Any, id: str) -> dict[str, Any]:
    """A job once it is over; while the queue is being started again, the answer is 503."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        answer = http.get(f"/api/v1/jobs/{id}")
        if answer.status_code not in (200, 503):
            raise RuntimeError(answer.text)
        if answer.status_code == 200 and answer.json()["state"] in ("done", "failed", "cancelled"):
            found: dict[str, Any] = answer.json()
            return found
        time.sleep(0.2)
    raise RuntimeError("the job does not end")


Told = tuple[list[str], list[Any]]  # what is left out, and the hits


def answers(engine: Engine, library: Library, queries: Sequence[str]) -> dict[str, list[Told]]:
    """For each query what one machine answers: with all shards, and without each of them that may be lost."""
    tables, found = library._tables, dict[str, list[Told]]()
    assert isinstance(tables, Shards)
    shards = len(tables.parts)
    for count in range(1, shards + 1):
        for numbers in itertools.combinations(range(shards), count):
            parts = [SearchIndex(tables.parts[number], library.config, engine.backend, tables) for number in numbers]
            search = Search(parts, tables.number_of, library.config.fold_similarity)
            for query in queries:
                (hits,) = search.hits(library._asked([query])[0], 5)
                left_out = [f"{shards - count} of {shards} shards"] if count < shards else []
                told = left_out, [(hit.video_id, hit.pts_seconds, hit.score) for hit in hits]
                found.setdefault(query, []).append(told)
    return found


def is_one_of(expected: list[Told], answer: dict[str, Any]) -> bool:
    """Scores to a rounding: texts that are encoded together differ by it from one alone."""
    hits = [(hit["video_id"], hit["pts_seconds"]) for hit in answer["hits"]]
    scores = [hit["score"] for hit in answer["hits"]]
    return any(
        left_out == answer["left_out"]
        and [hit[:2] for hit in told] == hits
        and all(abs(score - hit[2]) < 1e-6 for score, hit in zip(scores, told, strict=True))
        for left_out, told in expected
    )
