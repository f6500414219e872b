"""Compiles the kernels as CuPy would, on any machine, and reads what each of them takes.

NVRTC is the compiler that CuPy uses; it needs no driver and no device.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keyreel_kernels.cuda import FOLDER, STANDARD, Defines, source_of

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
_LAUNCHERS = ("cuda_frames", "cuda_patches", "cuda_kmeans")
_USED = re.compile(
    r"Function properties for (\w+)\n[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\n.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes on one architecture; bytes, and registers of a thread."""

    file: str
    kernel: str
    defines: Defines
    architecture: int
    registers: int
    static_shared: int
    stack: int  # local memory: spills, and arrays that are indexed at run time
    spills: int


class CompileError(Exception):
    """The log of a compilation that failed."""


@cache
def library() -> Any:
    """The NVRTC library.

    Raises:
        ImportError: the package nvidia-cuda-nvrtc is not installed.
    """
    spec = find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(path for place in places for path in Path(place).glob("*/lib/libnvrtc.so.*"))
    if not found:
        raise ImportError("nvidia-cuda-nvrtc is not installed")
    return ctypes.CDLL(str(found[-1]))


def variants() -> Iterator[tuple[str, Defines]]:
    """Every kernel file with every set of defines that its launchers use."""
    for name in _LAUNCHERS:
        module = import_module(f"keyreel_kernels.{name}")
        for file, sets in module.VARIANTS.items():
            yield from ((file, defines) for defines in sets)


def files() -> set[str]:
    """The kernel files of the package."""
    return {path.name for path in FOLDER.glob("*.cu")}


def fits(defines: Defines, architecture: int) -> bool:
    """Clusters of blocks begin with sm_90; the launchers ask for none below."""
    return architecture >= 90 or dict(defines).get("CLUSTER", 1) == 1


def log_of(file: str, defines: Defines, architecture: int) -> str:
    """Compiles to machine code and gives the log.

    Raises:
        CompileError: it does not compile.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    options = [STANDARD, *(f"-D{name}={value}" for name, value in defines), f"-arch=sm_{architecture}"]
    given = [option.encode() for option in (*options, "--ptxas-options=-v")]
    source = source_of(file).encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None):
        raise CompileError("nvrtcCreateProgram failed")
    failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    log = text.value.decode()
    if failed:
        raise CompileError(log)
    return log


def read_log(log: str, file: str, defines: Defines, architecture: int) -> list[Resources]:
    """The kernels of a log of ptxas -v, NVRTC's or nvcc's."""
    return [
        Resources(
            file, name, defines, architecture, int(registers), int(shared or 0), int(stack), int(stores) + int(loads)
        )
        for name, stack, stores, loads, registers, shared in _USED.findall(log)
    ]
