"""Every kernel with every set of defines compiles for every architecture, and no registers spill to memory.

NVRTC is the compiler that CuPy uses; it needs no driver and no device. KEYREEL_NVRTC names the folder of another one,
which is tried too, on the oldest and on the newest kind of device.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keyreel_kernels.cuda import FOLDER, STANDARD, Defines, source_of
from keyreel_kernels.cuda_kmeans import _layout

pytestmark = pytest.mark.full
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
VARIANTS: list[tuple[str, Defines]] = [
    *((file, _layout(blocks)) for file in ("kmeans.cu", "kmeans_seed.cu") for blocks in (1, 2, 4, 8, 16)),
    *((file, ()) for file in ("pictures.cu", "shift.cu")),
]
_ENTRY = re.compile(r'(?:extern\s+"C"\s+__global__\s+void|KR_CLUSTER_KERNEL)\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)')
_USED = re.compile(
    r"Function properties for (\w+)\n[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\n.*?Used (\d+) registers"
)


# What CuPy adds.
CUPY = ("--device-as-default-execution-space", "-ftz=true")


@cache
def nvrtc(folder: str = "") -> Any:
    """The NVRTC library of the package nvidia-cuda-nvrtc, or of a folder; skips where there is none."""
    spec = None if folder else find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else [folder]
    found = sorted(path for place in places for path in Path(place).rglob("libnvrtc.so.*"))
    if not found:
        pytest.skip(f"no NVRTC in {places}")
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # it is opened by its name later
    return ctypes.CDLL(str(found[-1]))


def compiled(
    source: str, file: str, defines: Defines, architecture: int, nvrtc: Callable[[], Any] = nvrtc
) -> tuple[bool, str]:
    """Compiles to machine code: whether it worked, and the log of ptxas."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [STANDARD, *CUPY, *(f"-D{name}={value}" for name, value in defines), f"-arch=sm_{architecture}"]
    given = [option.encode() for option in (*options, "--ptxas-options=-v")]
    assert not nvrtc().nvrtcCreateProgram(ctypes.byref(program), source.encode(), file.encode(), 0, None, None)
    failed = nvrtc().nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc().nvrtcGetProgramLog(program, log)
    nvrtc().nvrtcDestroyProgram(ctypes.byref(program))
    return not failed, log.value.decode()


def name_of(value: object) -> str | None:
    return "-".join(f"{name}{number}" for name, number in value) if isinstance(value, tuple) else None


def test_every_file_is_compiled() -> None:
    assert {file for file, _ in VARIANTS} == {path.name for path in FOLDER.glob("*.cu")}


class Given(Exception):
    """The options that CuPy gives to NVRTC."""


def test_the_flags_are_those_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's own way from a module's options to NVRTC's, as far as that goes without a device."""
    pytest.importorskip("cupy", reason="CuPy is not installed")

    def compiles(options: tuple[str, ...], *_: Any) -> None:
        raise Given(options)

    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.delenv("CUPY_CUDA_COMPILE_WITH_DEBUG", raising=False)
    try:
        core, compiler = import_module("cupy._core.core"), import_module("cupy.cuda.compiler")
        monkeypatch.setattr(compiler, "_use_pch", False)
        monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
        monkeypatch.setattr(compiler, "_get_nvrtc_version", lambda: (13, 0))
        monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda *_: ("-arch=sm_90", "cubin"))
        monkeypatch.setattr(compiler, "_NVRTCProgram", lambda *_, **__: SimpleNamespace(compile=compiles))
        core.compile_with_cache("", (STANDARD,), "90")
    except (ImportError, AttributeError, TypeError) as error:
        pytest.skip(f"this CuPy compiles in another way, its flags are not compared: {error}")
    except Given as given:
        added = [one for one in given.args[0] if not one.startswith("-I") and one not in (STANDARD, "-arch=sm_90")]
    assert sorted(added) == sorted(CUPY)


@pytest.mark.parametrize("other", [False, True], ids=["newest", "other"])
@pytest.mark.parametrize(("file", "defines"), VARIANTS, ids=name_of)
def test_kernels_compile_everywhere_without_spills(file: str, defines: Defines, other: bool) -> None:
    folder = os.environ.get("KEYREEL_NVRTC", "")
    if other and not folder:
        pytest.skip("KEYREEL_NVRTC names no other NVRTC")
    library = partial(nvrtc, folder if other else "")
    library()
    # Thread-block clusters begin with sm_90; the launchers ask for none below.
    tried = ARCHITECTURES[:: len(ARCHITECTURES) - 1] if other else ARCHITECTURES
    wanted = [one for one in tried if one >= 90 or dict(defines).get("CLUSTER", 1) == 1]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(partial(compiled, source_of(file), file, defines, nvrtc=library), wanted))
    kernels = set(_ENTRY.findall(source_of(file))) - {"name"}  # "name" is in the macro in device.cuh
    for done, log in logs:
        assert done, log
        found = _USED.findall(log)
        assert found, log
        assert {kernel for kernel, *_ in found} <= kernels
        for kernel, stack, stores, loads, registers in found:
            assert (int(stack), int(stores), int(loads)) == (0, 0, 0), kernel
            assert 0 < int(registers) <= 255


@pytest.mark.parametrize("file", sorted({file for file, _ in VARIANTS}))
def test_kernels_compile_with_nvcc(file: str, tmp_path: Path) -> None:
    """The compiler people have at hand; the first set of defines, one architecture, no warnings."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    defines = next(defines for name, defines in VARIANTS if name == file)
    path = tmp_path / file
    path.write_text(source_of(file))
    command = ["nvcc", STANDARD, "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin")]
    command += [*(f"-D{name}={value}" for name, value in defines), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
