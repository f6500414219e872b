"""All kernels under ThreadSanitizer and AddressSanitizer, on the CPU; and the sanitizers on faults that are planted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from sanitized_kernels import FOUND, SANITIZERS, command

CASES = sorted(path.stem for path in Path(__file__).parent.glob("kernel_cases_*.py"))
FAULTS = {
    ("thread", "race"): "data race",
    ("address", "outside"): "heap-buffer-overflow",
    ("address", "overflow"): "signed integer overflow",
}
RUNS = [*((sanitizer, case) for case in CASES for sanitizer in SANITIZERS), *FAULTS]
Results = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Two at a time, begun together: the compiler is most of it."""

    def run(sanitizer: str, name: str) -> subprocess.CompletedProcess[str]:
        line, environment = command(sanitizer, [name])
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        yield {one: pool.submit(run, *one) for one in RUNS}


def result(results: Results, sanitizer: str, name: str) -> subprocess.CompletedProcess[str]:
    try:
        return results[sanitizer, name].result()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_every_launcher_has_cases() -> None:
    assert {"kernel_cases_color", "kernel_cases_kmeans", "kernel_cases_patches"} <= set(CASES)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_clean(results: Results, sanitizer: str, case: str) -> None:
    done = result(results, sanitizer, case)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:8000]}"


@pytest.mark.parametrize(("sanitizer", "fault"), FAULTS)
def test_faults_are_found(results: Results, sanitizer: str, fault: str) -> None:
    done = result(results, sanitizer, fault)
    assert done.returncode == FOUND, done.stderr
    assert FAULTS[sanitizer, fault] in done.stderr
    assert "planted" in done.stderr
