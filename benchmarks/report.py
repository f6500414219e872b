"""Puts the committed results into the README, between their markers, and into tables and charts of their own.

python -m benchmarks.report            prints what belongs into the README
python -m benchmarks.report --write    writes README.md, RESULTS.md, the model card and charts/*.svg

All of it comes from benchmarks/results/*.jsonl and from nothing else. Of the suite (`benchmarks.run`) only what has
rows is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import library_report, quality_report, suite
from benchmarks.cases import NAMES
from benchmarks.markers import marked
from benchmarks.rows import Results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = ROOT / "benchmarks" / "charts"
TABLES = ROOT / "benchmarks" / "RESULTS.md"


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


def speed(results: Results) -> str:
    """The suite in the README: targets, charts, what the planner saves."""
    if results.last is None:
        return ""
    drawn = suite.charts(results)
    shown = [f"![{name.removesuffix('.svg').replace('_', ' ')}](benchmarks/charts/{name})" for name in README_CHARTS]
    parts = [
        suite.targets_table(results),
        *(line for line, name in zip(shown, README_CHARTS, strict=True) if name in drawn),
        suite.planner_table(results),
        _machine(results),
    ]
    return "\n\n".join(part for part in parts if part)


README_CHARTS = ("decode.svg", "end_to_end.svg")


def _machine(results: Results) -> str:
    assert results.last is not None
    machine = results.last["environment"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; medians of interleaved runs, {_dates(results)}, the last at "
        f"commit {results.last['commit']} (each row in benchmarks/results names its own). All systems, spreads and "
        "memory: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    )


def _dates(results: Results) -> str:
    first, last = min(results.dates), max(results.dates)
    return first if first == last else f"{first} to {last}"


def tables(results: Results) -> str:
    """benchmarks/RESULTS.md: everything that was measured."""
    assert results.last is not None
    machine = results.last["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Results",
        "Written by `python -m benchmarks.report --write` from the rows in `benchmarks/results`. Medians, with the "
        "quartiles in brackets; every system ran in a process of its own, in turns with the others.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; {versions}.",
    ]
    charts = suite.charts(results)
    for case in NAMES:
        groups = results.groups(case)
        if groups:
            parts.append(f"## {case.replace('_', ' ')}")
        drawn = [name for name in charts if name.removesuffix(".svg").startswith(case)]
        parts += [f"![{name.removesuffix('.svg').replace('_', ' ')}](charts/{name})" for name in drawn]
        if case == "scaling":
            parts += [suite.scaling_table(results, of) for of in dict.fromkeys(one.params["of"] for one in groups)]
            continue
        for group in groups:
            parts += [f"### {suite.titled(group.params)}", suite.group_table(case, group)]
    return "\n\n".join(parts) + "\n"


SECTIONS = {"keyframes": keyframes, "memory": memory, "kernels": kernels, "quality": quality_report.section}


def filled(readme: str, results: Results | None = None) -> str:
    """The README with the results of today's files between its markers; the suite's needs a place once it has rows."""
    results = Results(RESULTS) if results is None else results
    found = {name: section() for name, section in SECTIONS.items()}
    if results.last is not None or "<!-- speed -->" in readme:
        found["speed"] = speed(results)
    at_scale = library_report.section(results)
    if at_scale or "<!-- library -->" in readme:
        found["library"] = at_scale
    return marked(readme, found, "README.md")


def files(results: Results) -> dict[Path, str]:
    """What else is written, by path."""
    if results.last is None:
        return {}
    return {TABLES: tables(results), **{CHARTS / name: drawn for name, drawn in suite.charts(results).items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    path, results = ROOT / "README.md", Results(RESULTS)
    if not parser.parse_args().write:
        print(
            "\n\n".join(
                [*(section() for section in SECTIONS.values()), speed(results), library_report.section(results)]
            )
        )
        return
    path.write_text(filled(path.read_text("utf-8"), results), encoding="utf-8")
    for file, text in {**files(results), **quality_report.files()}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
