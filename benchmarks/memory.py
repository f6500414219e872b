"""Peak memory of `keyreel summarize` against the length of the video.

    python benchmarks/memory.py VIDEO [--seconds 30] [-o results.jsonl]

Runs the whole job (decode, encode, select, render) in a fresh process each, on the first seconds of the video and on
all of it, and prints the peak resident memory of each with their ratio.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import environment


def measure(video: str, stop_seconds: float | None) -> dict[str, float]:
    """Runs one job in a process of its own."""
    command = [sys.executable, __file__, video, "--child", *(["--seconds", str(stop_seconds)] if stop_seconds else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def child(video: str, stop_seconds: float | None) -> None:
    from keyreel import Engine, Sampling

    started = time.perf_counter()
    with Engine.from_pretrained(device="cpu") as engine, tempfile.TemporaryDirectory() as folder:
        summary = engine.summarize(video, sampling=Sampling(stop_seconds=stop_seconds))
        summary.save(Path(folder) / "out", reel_seconds=10.0)
        seconds = summary.shots[-1].stop_seconds
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "video_seconds": seconds,
        "peak_rss_mb": usage.ru_maxrss / 1024,
        "wall_seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.video, arguments.seconds)
        return
    short, whole = measure(arguments.video, arguments.seconds or 30.0), measure(arguments.video, None)
    result = {
        "case": "memory",
        "video": Path(arguments.video).name,
        "short": short,
        "whole": whole,
        "ratio": whole["peak_rss_mb"] / short["peak_rss_mb"],
        "environment": environment(),
    }
    line = json.dumps(result)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
