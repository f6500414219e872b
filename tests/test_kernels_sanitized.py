"""All kernels under ThreadSanitizer and AddressSanitizer on the CPU; and both sanitizers on planted faults."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from kernel_cases import NAMES
from sanitized_kernels import FOUND, SANITIZERS, command

pytestmark = pytest.mark.full
# One process for each kernel file, which it compiles once.
CASES = [NAMES[:4], NAMES[4:9], NAMES[9:]]
FAULTS = {
    ("thread", "race"): "data race",
    ("address", "outside"): "heap-buffer-overflow",
    ("address", "overflow"): "signed integer overflow",
}
RUNS = [*((sanitizer, " ".join(case)) for case in CASES for sanitizer in SANITIZERS), *FAULTS]
Results = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Two at a time, started together: most of the time goes to the compiler."""

    def run(sanitizer: str, name: str) -> subprocess.CompletedProcess[str]:
        line, environment = command(sanitizer, name.split())
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        yield {one: pool.submit(run, *one) for one in RUNS}


def result(results: Results, sanitizer: str, name: str) -> subprocess.CompletedProcess[str]:
    try:
        return results[sanitizer, name].result()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_kernels_are_clean(results: Results, sanitizer: str, case: str) -> None:
    done = result(results, sanitizer, case)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[:8000]}"


@pytest.mark.parametrize(("sanitizer", "fault"), FAULTS)
def test_faults_are_found(results: Results, sanitizer: str, fault: str) -> None:
    done = result(results, sanitizer, fault)
    assert done.returncode == FOUND, done.stderr
    assert FAULTS[sanitizer, fault] in done.stderr
    assert "planted" in done.stderr
