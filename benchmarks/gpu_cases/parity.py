"""The tests that hold every kernel against NumPy, on the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.runner import Case, Row, import_or_missing

ROOT = Path(__file__).resolve().parents[2]
MARK = "needs_cuda"
_OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed)\b")


def parity(bench: Bench) -> Row:
    """Runs the tests whose `cuda` is the real device; a device that is missing fails them.

    Raises:
        RuntimeError: no test ran.
    """
    import_or_missing("pytest")
    limit = 35 if bench.quick else 150
    command = [sys.executable, "-m", "pytest", "-m", MARK, "-q", "-rfE", "--tb=line", "--color=no"]
    # Tests whose packages are not here cannot be collected; that must not stop the others.
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", *_files()]
    environment = {**os.environ, "KEYREEL_FAIL_WITHOUT_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
        output, within = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as error:
        output, within = _text(error.stdout) + _text(error.stderr), False
    return summed_up(output, within_limit=within, limit_seconds=limit)


def summed_up(output: str, *, within_limit: bool, limit_seconds: float) -> Row:
    """What pytest's output says: how many of each outcome, which failed."""
    lines = output.strip().splitlines()
    if within_limit:
        last = next((line for line in reversed(lines) if _OUTCOME.search(line)), "")
        counts = {outcome.rstrip("s"): int(number) for number, outcome in _OUTCOME.findall(last)}
        ran = counts.get("passed", 0) + counts.get("failed", 0) + counts.get("error", 0)
        if not ran:
            raise RuntimeError(f"no test ran: {' / '.join(lines[-3:])[:400]}")
    else:
        # Its summary was never written: the letters of -q tell how far it came.
        letters = "".join(re.findall(r"^([.FEsx]+)(?:\s+\[\s*\d+%\])?$", output, re.MULTILINE))
        counts = {"passed": letters.count("."), "failed": letters.count("F"), "error": letters.count("E")}
    failures = [line[:300] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    clean = within_limit and not counts.get("failed") and not counts.get("error")
    return {
        "status": "ok" if clean else "failed",
        **counts,
        "within_limit": within_limit,
        "limit_seconds": limit_seconds,
        "failures": failures[:20],
    }


def _files() -> list[str]:
    """Test files that have to do with the device; collecting the others takes longer than running these."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if re.search(rf"\bcuda\b|{MARK}", path.read_text("utf-8"))
    )


def _text(said: bytes | str | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def cases() -> list[Case]:
    return [Case("parity tests", parity, seconds=30, most_seconds=180)]
