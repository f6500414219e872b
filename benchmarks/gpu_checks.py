"""Checks of the kernels on a CUDA device that need no test runner, for sanitizers and profilers.

python -m benchmarks.gpu_checks launches [OPERATION ...]   each kernel at its smallest shapes, against NumPy; "teams":
                                                           k-means by as many blocks as the device lets together
python -m benchmarks.gpu_checks repeat [TIMES [FRAMES]]    k-means gives the same while pictures are made beside it
python -m benchmarks.gpu_checks profile                    k-means and pictures at the sizes of benchmarks.gpu
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks import gpu, gpu_kmeans
from keyreel_kernels import ops_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def launches(*names: str) -> None:
    from kernel_cases import NAMES, case, check_cluster, some_problems

    ops = ops_for("cuda:0")
    for name in names or (*NAMES, "teams"):
        if name == "teams":  # of 8 and of 16 blocks, where the device has them
            for frames in (600, 2100):
                problems = some_problems(np.random.default_rng(0), [frames], 24, 8)
                check_cluster(ops.arrays, *problems, penalty=0.5, margin=0.3, iterations=3)  # type: ignore[arg-type]
        else:
            case(ops.arrays, name)  # type: ignore[arg-type]
        print(name, flush=True)


def repeat(times: str = "200", frames: str = "600") -> None:
    """The other lane launches on the decoding stream, as a decoder does, so that memory changes hands as it will."""
    ops, done = ops_for("cuda:0"), threading.Event()
    x, seeds = gpu_kmeans.problem(1, int(frames))
    control = np.array([[0, int(frames)]]), np.array([gpu_kmeans.CLUSTERS]), seeds
    pictures = np.random.default_rng(1).integers(0, 256, (4, 90, 160, 3), np.uint8)
    size = {"height": 32, "width": 32, "mode": "shortest", "interpolation": "bicubic"}

    def lane() -> None:
        with ops.arrays.scope(ops.arrays.decoding):  # type: ignore[call-arg, attr-defined]
            given = ops.arrays.to_device(pictures)
            while not done.is_set():
                ops.transform(given, **size)

    beside = threading.Thread(target=lane)
    beside.start()
    try:
        with ops.arrays.scope():
            given = ops.arrays.to_device(x[0].astype(np.float16))
            weights = ops.arrays.to_device(np.ones(int(frames), np.float32))
            first: list[bytes] = []
            for n in range(int(times)):
                found = ops.cluster(given, weights, *control, penalty=0.1, margin=0.3, iterations=25)
                got = [ops.arrays.to_host(a).tobytes() for a in (found.labels, found.objective, found.centroids)]
                first = first or got
                if got != first:
                    raise AssertionError(f"run {n} of {times} gives another answer than the first")
    finally:
        done.set()
        beside.join()
    print(f"the same {times} times")


def profile() -> None:
    """Each is launched once or twice: a profiler runs a launch many times."""

    def once(_: gpu.Bench, work: Callable[[], object]) -> gpu.Row:
        work()
        return {"ms_back_to_back": math.inf}

    with mock.patch.object(gpu.Bench, "timed", once):
        bench = gpu.Bench(0, quick=True, video=None, scratch=Path())
        for videos, frames in gpu_kmeans.SHAPES:
            print(gpu_kmeans.keyreel(bench, videos, frames, "float16", gpu_kmeans.PENALTY), flush=True)
        print(gpu.surfaces(bench, **gpu.PICTURES))


if __name__ == "__main__":
    {"launches": launches, "repeat": repeat, "profile": profile}[sys.argv[1]](*sys.argv[2:])
