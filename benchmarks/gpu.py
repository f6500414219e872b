"""Proves and measures keyreel on a CUDA device: one JSON line a case.

    python -m benchmarks.gpu [--quick] [--video CLIP] [--only WORDS] [-o results.jsonl]

In order of importance: the parity tests; our kernels; the chain from a file to a summary, with NVDEC alone beside it;
other people's kernels on the same inputs; ceilings of the card; the encoder on the runtimes that are there; a thousand
files. A case whose package is missing says so, one that fails says how, and one that no longer fits into the time
(2 minutes with --quick, else 8) is recorded as not run.

Exit codes: 1 when a case or a parity test failed; 5 without a CUDA device, and then nothing is written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import PACKAGES, environment
from benchmarks.gpu_cases import clustering, encoders, kernels, parity, video
from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.runner import Case, Deadline, Results, supervise, work

ROOT = Path(__file__).resolve().parents[1]
SOME_FAILED, NO_DEVICE = 1, 5
QUICK_SECONDS, FULL_SECONDS = 110.0, 470.0  # with what is left for the last case to end in
GPU_PACKAGES = (
    *("cupy-cuda13x", "nvidia-cuda-nvrtc", "PyNvVideoCodec", "tensorrt", "tensorrt-rtx", "onnxruntime-gpu"),
    *("triton", "flash-kmeans", "fastkmeans", "jax", "open_clip_torch"),
)
_QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "compute_cap",
)


def all_cases(*, quick: bool) -> list[Case]:
    """Every case, the most important first."""
    clusters, others, videos, models = clustering.cases(), kernels.cases(), video.cases(), encoders.cases()
    ours = [case for case in clusters if "keyreel" in case.name]
    closest = [case for case in clusters if "flash-kmeans" in case.name or "CUDA graph" in case.name]
    rest = [case for case in clusters if case not in ours and case not in closest]
    order = [
        *parity.cases(),
        *(case for case in ours if case.quick),
        *videos[:3],
        *(case for case in others if case.quick),
        *(case for case in closest if case.quick),
        *videos[3:5],
        *models[:2],
        *(case for case in (*ours, *closest) if not case.quick),
        *rest,
        *(case for case in others if not case.quick),
        *videos[5:],
        *models[2:],
    ]
    return [case for case in order if case.quick or not quick]


def device_name(device: int) -> str | None:
    """The name of the CUDA device, None where there is none that CuPy can use."""
    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount() <= device:
            return None
        return str(cupy.cuda.runtime.getDeviceProperties(device)["name"], "utf-8")
    except Exception:  # noqa: BLE001 - not installed, no driver, no device: all the same here
        return None


def machine(device: int, name: str) -> dict[str, Any]:
    """The environment of each row: what environment.py says, and the card as nvidia-smi sees it."""
    found: dict[str, Any] = {**environment((*PACKAGES, *GPU_PACKAGES)), "gpu": name}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", f"--id={device}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        found["nvidia_smi"] = dict(zip(_QUERY, (value.strip() for value in done.stdout.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        found["nvidia_smi"] = f"{type(error).__name__}: {error}"
    import cupy

    found["cuda_runtime"] = cupy.cuda.runtime.runtimeGetVersion()
    found["cuda_driver"] = cupy.cuda.runtime.driverGetVersion()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="what matters most, in 2 minutes instead of 8")
    parser.add_argument("--device", type=int, default=0, help="number of the CUDA device")
    parser.add_argument("--video", type=Path, help="decode this clip instead of one that is rendered")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names have one of these words in them")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.jsonl")
    parser.add_argument("--worker", nargs="+", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = all_cases(quick=arguments.quick)
    if arguments.worker:
        run_worker(arguments, cases)
        return 0
    deadline = Deadline.after(QUICK_SECONDS if arguments.quick else FULL_SECONDS)
    name = device_name(arguments.device)
    if name is None:
        print(f"no CUDA device {arguments.device} that CuPy can use: nothing is measured", file=sys.stderr)
        return NO_DEVICE
    if arguments.only:
        cases = [case for case in cases if any(word in case.name for word in arguments.only)]
    results = Results(arguments.output, {**machine(arguments.device, name), "quick": arguments.quick})
    # So that a checkout will do, without an installation.
    roots = [*(str(ROOT / name) for name in ("engine", "kernels", "export")), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", str(arguments.device), "--stop-at", str(deadline.at)]
    command += ["--quick"] if arguments.quick else []
    command += ["--video", str(arguments.video.resolve())] if arguments.video else []
    # Clips are rendered once, also when a worker has to be replaced.
    with tempfile.TemporaryDirectory(prefix="keyreel-benchmark-") as scratch:
        supervise(cases, [*command, "--scratch", scratch, "--worker"], deadline, results.add, ROOT)
    counts = Counter(row["status"] for row in results.rows)
    said = ", ".join(f"{number} {status}" for status, number in counts.items())
    print(f"{said} -> {arguments.output}", file=sys.stderr)
    return SOME_FAILED if counts["failed"] else 0


def run_worker(arguments: argparse.Namespace, cases: list[Case]) -> None:
    """Runs the cases that the parent names and says their rows on stdout, which nothing else may write to."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # JAX would take most of the memory for itself when it is first used.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    wanted = set(arguments.worker)
    bench = Bench(arguments.device, quick=arguments.quick, video=arguments.video, scratch=arguments.scratch)
    work([case for case in cases if case.name in wanted], bench, Deadline(arguments.stop_at), out)


if __name__ == "__main__":
    raise SystemExit(main())
