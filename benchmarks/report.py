"""Puts the committed results into the README, between their markers.

python benchmarks/report.py            prints them
python benchmarks/report.py --write    writes README.md
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one results file, oldest first."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def keyframes() -> str:
    found = rows("keyframes")
    lines = [
        "| | scenes found of 8 (worst draw) | coverage | flash frames | key-frames (most) | CPU-s, median |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['way']} | {row['scenes_of_8']:.2f} ({row['scenes_worst']:.0f}) | {row['coverage']:.4f} "
            f"| {row['flashes']:.2f} | {row['keyframes_mean']:.2f} ({row['keyframes_most']:.0f}) "
            f"| {row['cpu_seconds_median']:.4f} |"
        )
    machine = found[-1]["environment"]
    lines += [
        "",
        "Coverage: mean cosine of a frame to its nearest key-frame. The automatic number runs every K from 1 to 32.",
        f"{found[-1]['draws']} draws, one thread, {machine['cpu']} with {machine['cores']} shared cores, scikit-learn "
        f"{machine['versions']['scikit-learn']}.",
    ]
    return "\n".join(lines)


def memory() -> str:
    row = rows("memory")[-1]
    short, whole, machine = row["short"], row["whole"], row["environment"]
    return (
        f"Summarising and rendering {whole['video_seconds']:.0f} s of 1080p H.264 peaks at {whole['peak_rss_mb']:.0f} "
        f"MB, its first {short['video_seconds']:.0f} s at {short['peak_rss_mb']:.0f} MB\n(one run each, "
        f"{whole['cpu_seconds']:.0f} and {short['cpu_seconds']:.0f} CPU-seconds, {machine['cpu']} with "
        f"{machine['cores']} shared cores)."
    )


def kernels() -> str:
    found = rows("kernels")
    lines = [
        "| file | kernels | most registers, sm_90 | most registers, any | static shared memory | spilled bytes |",
        "|---|---|---|---|---|---|",
    ]
    for file in sorted({row["file"] for row in found}):
        own = [row for row in found if row["file"] == file]
        hopper = max(row["registers"] for row in own if row["architecture"] == 90)
        most = max(own, key=lambda row: row["registers"])
        lines.append(
            f"| {file} | {len({row['kernel'] for row in own})} | {hopper} "
            f"| {most['registers']} (sm_{most['architecture']}, `{most['kernel']}`) "
            f"| {max(row['static_shared'] for row in own)} | {max(row['spills'] for row in own)} |"
        )
    known = ", ".join(f"sm_{one}" for one in sorted({row["architecture"] for row in found}))
    version = found[-1]["environment"]["versions"]["nvidia-cuda-nvrtc"]
    lines += ["", f"All variants of all kernels, {known}; NVRTC {version} (`benchmarks/kernels.py`)."]
    return "\n".join(lines)


SECTIONS = {"keyframes": keyframes, "memory": memory, "kernels": kernels}


def filled(readme: str) -> str:
    """The README with the results of today's files between its markers."""
    for name, section in SECTIONS.items():
        block = f"<!-- {name} -->\n{section()}\n<!-- /{name} -->"
        readme, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, readme, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md has {count} places for {name}")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    path = ROOT / "README.md"
    if parser.parse_args().write:
        path.write_text(filled(path.read_text("utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(section() for section in SECTIONS.values()))


if __name__ == "__main__":
    main()
