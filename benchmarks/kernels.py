"""What every kernel takes on every architecture: registers, shared memory, spills. Needs no device.

    python -m benchmarks.kernels

Writes benchmarks/results/kernels.jsonl, one line for each kernel, architecture and set of defines. Shared memory is
what the kernel declares; what a launch adds to it depends on the sizes.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.nvrtc import ARCHITECTURES, Resources, fits, log_of, read_log, variants

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"


def measured() -> list[Resources]:
    """All kernels, compiled with NVRTC."""
    jobs = [(*one, target) for one in variants() for target in ARCHITECTURES if fits(one[1], target)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = list(pool.map(lambda job: log_of(*job), jobs))
    return [one for job, log in zip(jobs, logs, strict=True) for one in read_log(log, *job)]


def main() -> None:
    machine = environment(("keyreel", "nvidia-cuda-nvrtc"))
    rows = [{**asdict(one), "defines": dict(one.defines), "environment": machine} for one in measured()]
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sys.stdout.write(f"{len(rows)} rows in {RESULTS}\n")


if __name__ == "__main__":
    main()
