"""A model of random weights from a file to a checked bundle: `keyreel models install --from`, as its users start it.

`peak_of_file` is the largest memory of the process over the size of the checkpoint.

    python -m benchmarks.install -o benchmarks/results/install.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks._common import Row, System, compare, parser_of, run
from keyreel.models.template import Template


def write_checkpoint(architecture: str, folder: Path) -> Path:
    """Random weights, and CLIP's merges beside them."""
    from keyreel_export.torchvision_cpu import import_open_clip

    path, rng = folder / "weights.safetensors", np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in Template.find(architecture).tensors.items()
    }
    tensors |= {name: np.abs(values) for name, values in tensors.items() if name.endswith("running_var")}
    save_file(tensors, path)
    ranks = import_open_clip().get_tokenizer(architecture).bpe_ranks
    merges = sorted(ranks, key=ranks.__getitem__)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}), "utf-8")
    return path


def installing(architecture: str, checkpoint: Path, precision: str) -> Callable[[], float]:
    out = checkpoint.parent / "bundle"
    given = ("--from", checkpoint, "--name", "random", "--precision", precision, "-o", out, "-q")
    command = [sys.executable, "-m", "keyreel", "models", "install", architecture, *map(str, given)]

    def work() -> float:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(command, capture_output=True, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return peak / checkpoint.stat().st_size

    return work


def memory(peak: float) -> dict[str, float]:
    return {"peak_of_file": peak}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    architecture = "MobileCLIP2-S0" if options.quick else "ViT-B-32"
    checkpoint = write_checkpoint(architecture, options.content)
    for precision in ("fp32",) if options.quick else ("fp32", "fp16"):
        system = System("keyreel", partial(installing, architecture, checkpoint, precision), memory)
        yield from compare("install", {"model": architecture, "precision": precision}, [system])


if __name__ == "__main__":
    sys.exit(run(parser_of(__doc__), measure))
