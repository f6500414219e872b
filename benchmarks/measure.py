"""Systems side by side: each in a process of its own, run in turn, and the rows that come of it.

A worker process (`benchmarks.worker`) prepares one system and then runs it when told to, so that all systems of a
measurement stand ready and take turns: what disturbs the machine disturbs them all. The first run of each warms up, is
checked, and gives the peak memory; the runs after it give the times. CPU-seconds count all threads of the process and
the processes that it has waited for.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Params = Mapping[str, Any]  # of a measurement; goes into the row as it is
Row = dict[str, Any]
Prepare = Callable[[Params, "Folders"], Callable[[], Any]]

UNITS = {
    "cpu_seconds": "s",
    "wall_seconds": "s",
    "peak_mib": "MiB",
    "wrong_frames": "frames",
    "frames": "frames",
    "seconds_off": "s",
    "packets_fed": "packets",
    "packets_read": "packets",
    "difference": "levels",
    "cosine": "1",
    "objective": "1",
    "recall": "1",
    "keyframes": "frames",
    "select_seconds": "s",
    "p50_seconds": "s",
    "p99_seconds": "s",
    "first_seconds": "s",
    "commit_seconds": "s",
    "stop_seconds": "s",
    "queries": "queries",
    "videos": "videos",
    "failed_videos": "videos",
    "media_mib": "MiB",
    "library_mib": "MiB",
    "hours": "h",
    "requests": "requests",
    "errors": "requests",
    "lost": "requests",
    "accepted": "jobs",
    "lost_jobs": "jobs",
    "kills": "kills",
    "lost_videos": "videos",
    "findings": "findings",
}


class Skipped(Exception):
    """What a system needs is not on this machine; the message says what."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things lie."""

    content: Path  # clips, arrays and references made by scripts; kept between runs where the caller names it
    bundles: Path  # models with random weights
    media: Path | None = None  # real clips


@dataclass(frozen=True, slots=True)
class Measurement:
    """One set of parameters and who is measured at it."""

    case: str  # module in benchmarks.cases
    params: Params
    systems: tuple[str, ...]
    runs: int = 3  # timed runs of each system, after the one that warms up
    seconds: float = 60.0  # no new round of runs is begun after this
    rank: int = 0  # what matters less comes later
    most_seconds: float = 240.0  # a single answer that takes longer is a failure

    def __str__(self) -> str:
        return f"{self.case} {' '.join(f'{key}={value}' for key, value in self.params.items())}"


@dataclass(slots=True)
class Outcome:
    """What one system gave."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    status: dict[str, str] = field(default_factory=dict)  # {"skipped": why} or {"failed": why}

    def add(self, said: Mapping[str, Any]) -> None:
        for name, value in said.items():
            self.samples.setdefault(name, []).append(float(value))

    def rows(self, measurement: Measurement, system: str) -> list[Row]:
        """A row for each metric; one row without values where the system was skipped or failed."""
        head = {"case": measurement.case, "params": dict(measurement.params), "system": system}
        if self.status or not self.samples:
            none = {"median": None, "p25": None, "p75": None, "runs": 0}
            return [{**head, "metric": "cpu_seconds", **none, "unit": UNITS["cpu_seconds"], **self.status}]
        return [
            {**head, "metric": name, **spread(values), "unit": UNITS[name]} for name, values in self.samples.items()
        ]


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles (linear between ranks) and number."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "p25": float(low), "p75": float(high), "runs": len(values)}


def measure(measurement: Measurement, folders: Folders, tell: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Runs all systems of a measurement in turn.

    Nothing that a system does ends the measurement: one that lacks a package, raises, dies or hangs has a row that
    says so.
    """
    outcomes = {system: Outcome() for system in measurement.systems}
    ready = Outcome()
    with _worker(measurement, "", folders, ready):
        pass
    workers: dict[str, _Worker] = {}
    try:
        for system, outcome in outcomes.items():
            if ready.status:
                outcome.status = ready.status
                continue
            worker = _Worker(measurement, system, folders, outcome)
            workers[system] = worker
            if worker.ask("first"):
                tell(f"    {system}: {_said(outcome)}")
        began = time.monotonic()
        for done in range(measurement.runs):
            if done and time.monotonic() - began > measurement.seconds:
                break
            order = list(measurement.systems)[done % len(workers or [0]) :] + list(measurement.systems)
            for system in dict.fromkeys(order):
                if system in workers and not outcomes[system].status:
                    workers[system].ask("run")
    finally:
        for worker in workers.values():
            worker.close()
    for system, outcome in outcomes.items():
        tell(f"  {system}: {_said(outcome)}")
    return [row for system, outcome in outcomes.items() for row in outcome.rows(measurement, system)]


def _said(outcome: Outcome) -> str:
    if outcome.status:
        return ", ".join(f"{key}: {value}" for key, value in outcome.status.items())
    return ", ".join(f"{name} {np.median(values):.4g}" for name, values in outcome.samples.items())


@contextmanager
def _worker(measurement: Measurement, system: str, folders: Folders, outcome: Outcome) -> Iterator[_Worker]:
    worker = _Worker(measurement, system, folders, outcome)
    try:
        yield worker
    finally:
        worker.close()


class _Worker:
    """The process of one system; "" makes what the measurement needs and ends."""

    def __init__(self, measurement: Measurement, system: str, folders: Folders, outcome: Outcome) -> None:
        self._outcome, self._most_seconds = outcome, measurement.most_seconds
        self._noise = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - close() closes it
        roots = [*(str(ROOT / name) for name in ("engine", "kernels", "export")), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))},
            start_new_session=True,  # so that what it has started is ended with it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        given = {
            "case": measurement.case,
            "system": system,
            "params": dict(measurement.params),
            "folders": {key: None if value is None else str(value) for key, value in asdict(folders).items()},
        }
        self.ask(json.dumps(given))

    def ask(self, line: str) -> bool:
        """Sends a line and waits for the answer, which goes into the outcome. False where there is none."""
        if self._outcome.status:
            return False
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the empty line says so
        try:
            said = self._lines.get(timeout=self._most_seconds)
        except queue.Empty:
            self._outcome.status = {"failed": f"no answer within {self._most_seconds:.0f} s"}
            return False
        if not said:
            code = self._process.wait()
            self._noise.seek(0)
            last = " ".join(self._noise.read()[-200:].split())
            self._outcome.status = {"failed": f"its process ended with code {code}{': ' if last else ''}{last}"}
            return False
        answer = json.loads(said)
        if "values" not in answer:
            self._outcome.status = answer
            return False
        self._outcome.add(answer["values"])
        return True

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._noise):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
