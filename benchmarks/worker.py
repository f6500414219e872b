"""The process of one system: prepares it, then runs it whenever a line says so, and answers with one JSON line each.

The first line says what to prepare. "first" warms up, checks the result and gives the peak memory; "run" gives times.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Folders, Skipped

OWN = ("keyreel", "keyreel_kernels", "keyreel_export", "benchmarks")
SHORTEST_SECONDS = 0.2  # what takes less is run several times in a row: clocks of CPU time are coarse


def cpu_seconds() -> float:
    """Of all threads of this process and of the processes that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mib() -> float:
    """Most memory this process has held; unlike ru_maxrss it does not count what the parent held when it started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise Skipped("/proc/self/status has no VmHWM")


class Timed:
    """Runs one system and takes the time."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run, self._loops = run, 1

    def first(self) -> tuple[dict[str, float], Any]:
        """The peak memory, and the result to check."""
        began = time.perf_counter()
        result = self._run()
        wall = time.perf_counter() - began
        if wall < SHORTEST_SECONDS:
            # Once more: what the first run has to set up is not what the others take.
            began = time.perf_counter()
            self._run()
            wall = max(time.perf_counter() - began, 1e-7)
            self._loops = max(1, math.ceil(SHORTEST_SECONDS / wall))
        return {"peak_mib": peak_mib()}, result

    def again(self) -> dict[str, float]:
        """Seconds of one run."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        for _ in range(self._loops):
            self._run()
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        return {"cpu_seconds": cpu / self._loops, "wall_seconds": wall / self._loops}


def why(error: BaseException) -> dict[str, str]:
    """The answer of a system that cannot be measured: skipped where something is missing, else failed."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Skipped):
        return {"skipped": text}
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] not in OWN:
        return {"skipped": f"not installed: {text}"}
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return {"failed": f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"}


def main() -> None:
    # Whatever libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    given = json.loads(sys.stdin.readline())
    params, system = given["params"], given["system"]
    folders = Folders(**{key: None if value is None else Path(value) for key, value in given["folders"].items()})
    try:
        case = importlib.import_module(f"benchmarks.cases.{given['case']}")
        if not system:
            case.ready(params, folders)
            say({"values": {}})
            return
        timed = Timed(case.SYSTEMS[system](params, folders))
        say({"values": {}})
        for line in sys.stdin:
            if line.strip() == "first":
                values, result = timed.first()
                say({"values": {**values, **case.check(system, params, folders, result)}})
            else:
                say({"values": timed.again()})
    except Exception as error:  # noqa: BLE001 - said to the parent, which goes on with the other systems
        say(why(error))


if __name__ == "__main__":
    main()
