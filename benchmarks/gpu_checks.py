"""Checks of the kernels on a CUDA device that need no test runner, for sanitizers and profilers.

python -m benchmarks.gpu_checks launches [OPERATION ...]   each kernel at its smallest shapes, against NumPy
python -m benchmarks.gpu_checks repeat [TIMES [FRAMES]]    k-means gives the same while pictures are made beside it
python -m benchmarks.gpu_checks sweep                      k-means by blocks of a team: one JSON line each
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

from keyreel_kernels import cuda_kmeans, ops_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def launches(*names: str) -> None:
    from kernel_cases import NAMES, case

    ops = ops_for("cuda:0")
    for name in names or NAMES:
        case(ops.arrays, name)  # type: ignore[arg-type]
        print(name, flush=True)


def _problem(frames: int, clusters: int = 32, width: int = 512) -> tuple[object, ...]:
    from benchmarks.select import cloud

    spans, count = np.array([[0, frames]]), np.array([clusters])
    seeds = np.sort(np.random.default_rng(0).choice(frames, clusters, replace=False))[None]
    return cloud(frames, width).astype(np.float16), np.ones(frames, np.float32), spans, count, seeds


def repeat(times: str = "200", frames: str = "600") -> None:
    """The other lane launches on the decoding stream, as a decoder does, so that memory changes hands as it will."""
    ops, done = ops_for("cuda:0"), threading.Event()
    x, w, *control = _problem(int(frames))
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
            given, weights = ops.arrays.to_device(x), ops.arrays.to_device(w)
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


def sweep() -> None:
    ops, own = ops_for("cuda:0"), cuda_kmeans.blocks
    for frames in (600, 3000):
        x, w, *control = _problem(frames)
        with ops.arrays.scope():
            given, weights = ops.arrays.to_device(x), ops.arrays.to_device(w)
            for size in (1, 2, 4, 8):
                cuda_kmeans.blocks = lambda *_, size=size: size
                taken = []
                for _ in range(6):  # the first compiles
                    began = time.perf_counter()
                    ops.cluster(given, weights, *control, penalty=0.1, margin=0.8, iterations=25)
                    ops.arrays.synchronize()
                    taken.append(time.perf_counter() - began)
                row = {"case": "sweep", "frames": frames, "blocks": size, "ms": 1e3 * min(taken)}
                print(json.dumps(row), flush=True)
    cuda_kmeans.blocks = own


if __name__ == "__main__":
    {"launches": launches, "repeat": repeat, "sweep": sweep}[sys.argv[1]](*sys.argv[2:])
