"""Every kernel with every set of defines compiles for every architecture, and none keeps registers in memory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from keyreel_kernels.cuda import STANDARD, Defines, source_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.nvrtc import (  # noqa: E402
    ARCHITECTURES,
    CompileError,
    files,
    fits,
    library,
    log_of,
    read_log,
    variants,
)

# Each with the reason why it may: spills that are not in a loop that counts.
MAY_SPILL: dict[str, str] = {}
VARIANTS = sorted(variants())
_ENTRY = re.compile(r'(?:extern\s+"C"\s+__global__\s+void|KR_CLUSTER_KERNEL)\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)')


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    try:
        library()
    except ImportError as error:
        pytest.skip(str(error))


def name_of(value: object) -> str | None:
    return "-".join(f"{name}{value}" for name, value in value) if isinstance(value, tuple) else None


def test_the_launchers_name_every_file() -> None:
    assert {file for file, _ in VARIANTS} == files()


@pytest.mark.parametrize(("file", "defines"), VARIANTS, ids=name_of)
def test_kernels_compile_everywhere_without_spills(file: str, defines: Defines) -> None:
    wanted = [architecture for architecture in ARCHITECTURES if fits(defines, architecture)]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(partial(log_of, file, defines), wanted))
    kernels = set(_ENTRY.findall(source_of(file))) - {"name"}  # "name": of the macro in device.cuh
    for architecture, log in zip(wanted, logs, strict=True):
        found = read_log(log, file, defines, architecture)
        assert {one.kernel for one in found} <= kernels
        assert found, log
        for one in found:
            assert 0 < one.registers <= 255
            assert one.kernel in MAY_SPILL or (one.stack, one.spills) == (0, 0), one


@pytest.mark.parametrize("file", sorted(files()))
def test_kernels_compile_with_nvcc(file: str, tmp_path: Path) -> None:
    """The compiler people have at hand; the first set of defines, one architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    defines = next(defines for name, defines in VARIANTS if name == file)
    path = tmp_path / "kernels.cuh"
    path.write_text(source_of(file))
    (tmp_path / "kernels.cu").write_text('#include "kernels.cuh"\n')
    command = ["nvcc", STANDARD, "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin")]
    command += [*(f"-D{name}={value}" for name, value in defines), str(tmp_path / "kernels.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    found, ours = (read_log(log, file, defines, 90) for log in (done.stderr, log_of(file, defines, 90)))
    assert {one.kernel for one in found} == {one.kernel for one in ours}


def test_a_kernel_that_spills_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        'extern "C" __global__ void __launch_bounds__(64) heavy(float* x, int n) {\n'
        "    float kept[64];\n"
        "    for (int i = 0; i < 64; ++i) kept[i] = x[i];\n"
        "    for (int i = 0; i < n; ++i) kept[(i * n) % 64] += kept[i % 64];\n"
        "    for (int i = 0; i < 64; ++i) x[i] = kept[i];\n"
        "}\n"
    )
    monkeypatch.setattr("benchmarks.nvrtc.source_of", lambda _: source)
    (found,) = read_log(log_of("heavy.cu", (), 80), "heavy.cu", (), 80)
    assert found.kernel == "heavy"
    assert found.stack >= 256
    monkeypatch.setattr("benchmarks.nvrtc.source_of", lambda _: "not CUDA")
    with pytest.raises(CompileError, match=r"heavy\.cu"):
        log_of("heavy.cu", (), 80)
