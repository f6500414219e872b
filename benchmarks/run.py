"""Measures keyreel beside its peers on this machine: one JSON line for each metric of each system.

    python -m benchmarks.run [--quick] [--only decode,search] [--missing] [-o FILE] [--content DIR] [--bundles DIR]

Rows are appended as each measurement ends, so that a run which is stopped loses only the measurement it was at;
`--missing` goes on from there. A peer that is not installed has a row that says so, and one that fails has one that
says how; the exit code is 1 where keyreel itself fails. `python -m benchmarks.report` makes tables and charts of them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.cases import NAMES
from benchmarks.content import Clip
from benchmarks.environment import environment
from benchmarks.measure import ROOT, Folders, Measurement, Row, measure

PACKAGES = (
    *("keyreel", "numpy", "av", "pillow", "onnxruntime", "openvino", "torch", "open_clip_torch", "timm"),
    *("opencv-python-headless", "torchcodec", "decord", "scikit-learn", "faiss-cpu", "usearch", "lancedb"),
)


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0] + ("+" if said[1] else "")


def all_measurements(names: Iterable[str], folders: Folders, *, quick: bool) -> list[Measurement]:
    """What the cases measure, what matters most first."""
    modules = [importlib.import_module(f"benchmarks.cases.{name}") for name in names]
    return sorted((one for module in modules for one in module.measurements(quick, folders)), key=lambda one: one.rank)


def clips_of(names: Iterable[str], *, quick: bool) -> list[Clip]:
    """The clips that cases use, each once."""
    modules = [importlib.import_module(f"benchmarks.cases.{name}") for name in names]
    found = [one for module in modules if hasattr(module, "clips") for one in module.clips(quick=quick)]
    return list(dict.fromkeys(found))


def run(measurements: Sequence[Measurement], folders: Folders, output: Path, *, stop_at: float = math.inf) -> list[Row]:
    """Measures, appends the rows to the file and says on stderr what came out.

    Args:
        stop_at: no measurement is begun after this moment of `time.monotonic()`.
    """
    rows: list[Row] = []
    head = {"commit": commit()}
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, measurement in enumerate(measurements, start=1):
        if time.monotonic() > stop_at:
            _tell(f"no time left for {measurement} (--minutes, --only)")
            continue
        _tell(f"[{number}/{len(measurements)}] {measurement}")
        began = time.monotonic()
        found = [
            {**row, **head, "environment": environment(PACKAGES)} for row in measure(measurement, folders, tell=_tell)
        ]
        with output.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in found))
        rows += found
        _tell(f"  took {time.monotonic() - began:.0f} s")
    return rows


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "suite.jsonl")
    parser.add_argument("--content", type=Path, help="keeps clips and arrays here; by default they are made anew")
    parser.add_argument("--bundles", type=Path, help="folder of models with random weights; missing ones are exported")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no measurement after these")
    parser.add_argument("--missing", action="store_true", help="only what the output has no row of")
    parser.add_argument("--media", type=Path, default=ROOT.parent / "shared" / "media", help="real clips")
    arguments = parser.parse_args(words)
    names = arguments.only or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    began = time.monotonic()
    with ExitStack() as stack:
        content = arguments.content or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keyreel-content-")))
        folders = Folders(
            content=content.resolve(),
            bundles=(arguments.bundles or content / "bundles").resolve(),
            media=arguments.media.resolve() if arguments.media.is_dir() else None,
        )
        wanted = all_measurements(names, folders, quick=arguments.quick)
        if arguments.missing and arguments.output.exists():
            lines = arguments.output.read_text(encoding="utf-8").splitlines()
            there = [(row["case"], row["params"]) for row in map(json.loads, lines)]
            wanted = [one for one in wanted if (one.case, one.params) not in there]
        rows = run(wanted, folders, arguments.output, stop_at=began + 60 * arguments.minutes)
    failed = [row for row in rows if "failed" in row]
    own = [row for row in failed if row["system"].startswith("keyreel")]
    skipped = [row for row in rows if "skipped" in row]
    minutes = (time.monotonic() - began) / 60
    _tell(f"{len(rows)} rows, {len(skipped)} skipped, {len(failed)} failed, {minutes:.1f} min -> {arguments.output}")
    return 1 if own else 0


if __name__ == "__main__":
    raise SystemExit(main())
