"""Runs cases one after the other, in a process that may die, against a deadline, and keeps each result.

A kernel that goes wrong can take its process along, or leave it with a device that answers nothing any more. So the
cases run in a worker process, which says one JSON line a case; when it dies, hangs or has lost its device, the case is
recorded as failed and a new worker goes on with the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]
OWN = ("keyreel", "keyreel_kernels", "keyreel_export", "benchmarks")
_ROOT = str(Path(__file__).resolve().parents[2])
GRACE_SECONDS = 8.0  # that a case which was begun before the deadline may take beyond it


class Missing(Exception):
    """What a case needs is not on this machine."""


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement; `run(bench)` gives the values of its row, its status too where that is not "ok"."""

    name: str
    run: Callable[[Any], Row]
    seconds: float = 10.0  # about what it takes: not begun when less is left
    most_seconds: float = 90.0  # taken for hung after this
    quick: bool = True  # part of --quick


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment in `time.time()`, which worker processes share."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.time() + seconds)

    def left(self) -> float:
        return self.at - time.time()


def import_or_missing(module: str, *, package: str | None = None) -> Any:
    """Imports what a case compares with or builds on.

    Raises:
        Missing: it is not installed, or does not load here.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package or module} is not installed ({error})") from error
    except Exception as error:
        # PyNvVideoCodec raises RuntimeError where a library of the driver is missing.
        raise Missing(f"{package or module} does not load: {_said(error)}") from error


# --- in the worker ----------------------------------------------------------------------------------------------------


def run_case(case: Case, bench: Any, deadline: Deadline) -> Row:
    """The row of one case, whatever happens in it. status: ok, missing, failed or not run."""
    if deadline.left() < case.seconds:
        return not_run(case, deadline)
    started = time.perf_counter()
    try:
        row = {"status": "ok", **case.run(bench)}
    except Missing as error:
        row = {"status": "missing", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - one case must not take the others with it
        package = (getattr(error, "name", None) or "").split(".")[0] if isinstance(error, ImportError) else ""
        if package and package not in OWN:
            row = {"status": "missing", "reason": f"{package} is not installed"}
        else:
            # The last place in this repository: what lies below is other people's.
            frames = traceback.extract_tb(error.__traceback__)
            at = [frame for frame in frames if frame.filename.startswith(_ROOT)][-1]
            row = {"status": "failed", "error": _said(error), "where": f"{Path(at.filename).name}:{at.lineno}"}
    return {"case": case.name, **row, "seconds": round(time.perf_counter() - started, 3)}


def not_run(case: Case, deadline: Deadline) -> Row:
    left = max(deadline.left(), 0)
    return {"case": case.name, "status": "not run", "reason": f"{left:.0f} s left, it takes about {case.seconds:.0f}"}


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines)[:500]}"


def work(cases: Sequence[Case], bench: Any, deadline: Deadline, out: IO[str]) -> None:
    """Runs the cases and says each row; ends early when the device is lost."""
    for case in cases:
        row = run_case(case, bench, deadline)
        lost = row["status"] == "failed" and bench.lost()
        out.write(json.dumps({**row, **({"device_lost": True} if lost else {})}) + "\n")
        out.flush()
        if lost:
            return
        bench.free()


# --- in the parent ----------------------------------------------------------------------------------------------------


def supervise(
    cases: Sequence[Case], command: Sequence[str], deadline: Deadline, record: Callable[[Row], None], cwd: Path
) -> None:
    """Has every case run by workers and records a row for each.

    Args:
        command: starts a worker, followed by the names of the cases that it is to run.
    """
    todo = list(cases)
    while todo:
        if deadline.left() < min(case.seconds for case in todo):
            for case in todo:
                record(not_run(case, deadline))
            return
        names = [case.name for case in todo]
        process = subprocess.Popen(
            [*command, *names],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=cwd,
            start_new_session=True,  # so that what a case has started is ended with it
        )
        try:
            for row in _rows(process, todo, deadline):
                record(row)
                todo.pop(0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _rows(process: subprocess.Popen[str], todo: Sequence[Case], deadline: Deadline) -> Iterator[Row]:
    """What a worker says, until it is through or has to be replaced; `todo[0]` is the case that it is at."""
    assert process.stdout is not None
    stdout: IO[str] = process.stdout
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with stdout:
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while todo:
        case = todo[0]
        limit = min(case.most_seconds, max(deadline.left(), 0) + GRACE_SECONDS)
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            error = f"no answer within {limit:.0f} s; its process was ended"
            yield {"case": case.name, "status": "failed", "error": error}
            return
        if line is None:
            error = f"its process ended with code {process.wait()}"
            yield {"case": case.name, "status": "failed", "error": error}
            return
        row = json.loads(line)
        yield row
        if row.get("device_lost"):
            return


class Results:
    """A .jsonl file that grows by whole lines only: it is written aside and renamed."""

    def __init__(self, path: Path, environment: Row) -> None:
        self._path, self._environment = path, environment
        self._text = path.read_text("utf-8") if path.exists() else ""
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._text += json.dumps({**row, "environment": self._environment}) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.part")
        aside.write_text(self._text, encoding="utf-8")
        aside.replace(self._path)
        print(_line(row), file=sys.stderr, flush=True)


def _line(row: Row) -> str:
    values = {key: value for key, value in row.items() if key not in ("case", "status")}
    shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
    return f"{row['status']:8} {row['case']}: {', '.join(shown)[:400]}"
