"""Runs kernels on the CPU under a sanitizer, in a process of its own: python sanitized_kernels.py NAME...

NAME is an operation ("seed"), or one of the faults planted below, which must be found. The sanitizer's library must be
preloaded, as `command` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
from cuda_on_host import HostedCupy, HostedModule
from kernel_cases import case

from keyreel_kernels import cuda as kernels
from keyreel_kernels import cuda_kmeans
from keyreel_kernels.cuda import Cuda

# Exit code of a run with a finding.
FOUND = 66
# Library, flavour of the emulation, flags. "threads": each CUDA thread is a system thread, so that two accesses without
# a barrier between them are seen as a race.
SANITIZERS = {
    "thread": ("libtsan.so", "threads", ("-fsanitize=thread", "-g1")),
    "address": (
        "libasan.so",
        "fibers",
        (
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr",
            "-fno-sanitize-recover=all",
            "-static-libubsan",
            "-O1",
            "-g1",
        ),
    ),
}
_HEAD = (
    'extern "C" __global__ void planted(int* out, int n) {\n'
    "    KR_SHARED(int, shared);\n    const int i = threadIdx.x;\n"
)
FAULTS = {
    "race": "    shared[i] = i;\n    out[i] = shared[(i + 1) % n];\n}\n",
    "outside": "    shared[i + 1] = i;\n    __syncthreads();\n    out[i] = shared[i];\n}\n",
    "overflow": "    shared[i] = i + 0x7fffffff - n / 2;\n    __syncthreads();\n    out[i] = shared[i];\n}\n",
}


def library(name: str) -> Path | None:
    """The sanitizer's library, if the compiler has one."""
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    path = Path(done.stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


def command(sanitizer: str, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment to run this file with.

    Raises:
        FileNotFoundError: there is no such sanitizer here.
    """
    found = library(SANITIZERS[sanitizer][0])
    if found is None:
        raise FileNotFoundError(f"{SANITIZERS[sanitizer][0]} is not installed")
    options = {
        "LD_PRELOAD": str(found),
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode={FOUND}:report_signal_unsafe=0",
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:exitcode={FOUND}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:exitcode={FOUND}",
        "OPENBLAS_NUM_THREADS": "1",
        "KEYREEL_SANITIZER": sanitizer,
    }
    return [sys.executable, __file__, *names], {**os.environ, **options}


def sanitized(sanitizer: str) -> Cuda:
    """A device of four multiprocessors: few blocks, many rounds, and one video gets two blocks."""
    cuda_kmeans.THREADS = 64  # of a block of kmeans.cu, which works with any number of warps

    class Module(HostedModule):
        _, flavour, extra = SANITIZERS[sanitizer]

    class Cupy(HostedCupy):
        RawModule = Module

    return Cuda(0, cupy=Cupy(sms=4))


def plant(cuda: Cuda, fault: str) -> None:
    prelude = (kernels.FOLDER / "device.cuh").read_text("utf-8")
    with patch.object(kernels, "source_of", lambda _: f"{prelude}\n{_HEAD}{FAULTS[fault]}"):
        with cuda.scope():
            out = cuda.cupy.zeros(64, np.int32)
        cuda.launch("planted.cu", "planted", (1,), (64,), (out, np.int32(64)), shared=4 * 64)


def main() -> None:
    del os.environ["LD_PRELOAD"]  # the compiler runs without
    cuda = sanitized(os.environ["KEYREEL_SANITIZER"])
    for name in sys.argv[1:]:
        if name in FAULTS:
            plant(cuda, name)
        else:
            case(cuda, name)


if __name__ == "__main__":
    main()
