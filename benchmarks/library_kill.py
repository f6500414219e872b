"""What is left of a library whose writer is killed at random points: the crash test, as often as one likes.

    python -m benchmarks.library_kill [--kills 200] [--seed 5]

The test (`tests/test_library_crash.py`) compares after each kill what the library holds with what had been committed,
and in the end with a library that nobody disturbed. It stops at the first difference, and then there is no row.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.library_load import write
from benchmarks.measure import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library_kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", default="5")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "library.jsonl")
    given = parser.parse_args()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "tests/test_library_crash.py", "-k", "killed_at_any_point"],
        cwd=ROOT,
        env={**os.environ, "KEYREEL_KILLS": str(given.kills), "KEYREEL_KILLS_SEED": given.seed},
        check=False,
    )
    if done.returncode:
        return done.returncode
    metrics: dict[str, list[float]] = {"kills": [given.kills], "lost_videos": [0], "findings": [0]}
    params = {"of": "adding, changing, removing and compacting"}
    return write(given.output, "keyreel", [("kills", params, metrics)])


if __name__ == "__main__":
    raise SystemExit(main())
