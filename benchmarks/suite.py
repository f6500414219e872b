"""What the rows of the suite say, as tables and charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases.encode import ATTENTION
from benchmarks.cases.end_to_end import NAIVE, SUMMARY
from benchmarks.cases.index import SUMMARIZE
from benchmarks.charts import Bar, bars, lines, number
from benchmarks.rows import Group, Results
from benchmarks.targets import FULL_DECODE, ONE_START, targets


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def targets_table(results: Results) -> str:
    return table(["CPU-seconds (search: wall)", "target", "measured", "met"], [one.row() for one in targets(results)])


# --- tables -----------------------------------------------------------------------------------------------------------

# case -> the metrics of its columns, and the system that the ratio is taken against
COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "decode": (("cpu_seconds", "wall_seconds", "peak_mib", "frames", "wrong_frames", "seconds_off"), FULL_DECODE),
    "preprocess": (("cpu_seconds", "wall_seconds", "difference", "cosine"), "RGB + PIL bicubic"),
    "encode": (("cpu_seconds", "wall_seconds", "peak_mib", "cosine"), "onnxruntime fp32"),
    "select": (("cpu_seconds", "wall_seconds", "objective"), ONE_START),
    "search": (("wall_seconds", "cpu_seconds", "peak_mib", "recall"), "numpy"),
    "end_to_end": (("cpu_seconds", "wall_seconds", "peak_mib", "frames", "cosine"), NAIVE),
    "index": (("wall_seconds", "cpu_seconds", "peak_mib", "frames", "media_mib", "library_mib"), SUMMARIZE),
    "library": (("p50_seconds", "p99_seconds", "first_seconds", "peak_mib", "recall", "queries"), "numpy"),
}


def group_table(case: str, group: Group) -> str:
    """All systems of one set of parameters, the quickest first."""
    metrics, against = COLUMNS[case]
    metrics = tuple(one for one in metrics if any(one in rows for rows in group.systems.values()))
    head = ["", *(f"{metric.replace('_', ' ')}" for metric in metrics)]
    compared = against in group.systems and len(group.systems) > 1
    if compared:
        head.append(f"{against} takes")
    order = sorted(group.systems, key=lambda name: group.median(name, metrics[0]) or 0.0)
    rows = []
    for name in order:
        cells = [f"**{name}**" if name.startswith("keyreel") else name]
        cells += [_cell(group.systems[name].get(metric)) for metric in metrics]
        if compared:
            ratio = group.ratio(against, name, metrics[0])
            cells.append("" if ratio is None else f"{number(ratio)}x")
        rows.append(cells)
    rows += [[name, why, *[""] * (len(head) - 2)] for name, why in group.absent.items()]
    return table(head, rows)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["unit"] in ("frames", "packets", "queries"):
        return f"{row['median']:,.0f}"
    middle = number(row["median"])
    if row["unit"] != "s" or row["runs"] < 2:
        return f"{row['median']:.4f}" if row["metric"] in ("cosine", "objective", "recall") else middle
    return f"{middle} ({number(row['p25'])} to {number(row['p75'])})"


def planner_table(results: Results) -> str:
    """What each codec's planner saves."""
    rows = []
    for group in results.groups("decode"):
        fed, read = (group.median("keyreel", name) for name in ("packets_fed", "packets_read"))
        if fed is None or not read:
            continue
        params = group.params
        name = params.get("clip") or f"{params['codec']}, {params['height']}p"
        cells = [name, str(params.get("gop", "")), f"{read:,.0f}", f"{100 * fed / read:.0f} %"]
        cells += [number(group.median(system) or 0) for system in ("keyreel", FULL_DECODE)]
        rows.append([*cells, f"{number(group.ratio(FULL_DECODE, 'keyreel') or 0)}x"])
    head = ["clip", "GOP", "packets", "of them decoded", "keyreel, CPU-s", "full decode, CPU-s", "ratio"]
    return table(head, rows) if rows else ""


def titled(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in params.items()
    )


# --- charts -----------------------------------------------------------------------------------------------------------


def charts(results: Results) -> dict[str, str]:
    """File name -> SVG, of what there are rows for."""
    found = {
        "decode.svg": _bars(
            results,
            "decode",
            "One frame a second of 1080p H.264: CPU-seconds",
            lambda params: params.get("height") == 1080,
            lambda params: f"{params['seconds']} s, a key frame every {params['gop']} frames",
        ),
        "end_to_end.svg": _bars(
            results,
            "end_to_end",
            "From 1080p H.264 to one ViT-B/32 vector a second: CPU-seconds",
            lambda params: params["height"] == 1080,
            lambda params: f"{params['seconds']} s, a key frame every {params['gop']} frames",
            without=(SUMMARY,),
        ),
        "encode.svg": _bars(
            results,
            "encode",
            "One batch of pictures: CPU-seconds",
            lambda params: True,
            lambda params: f"{params['model']}, {params['images']} pictures",
            without=(ATTENTION,),
        ),
        "search.svg": _bars(
            results,
            "search",
            "Exact search: seconds, all cores",
            lambda params: True,
            lambda params: f"{params['rows']:,} x {params['width']} float32, queries: {params['queries']}",
            metric="wall_seconds",
        ),
    }
    return {name: drawn for name, drawn in found.items() if drawn is not None} | scaling_charts(results)


def _bars(
    results: Results,
    case: str,
    title: str,
    holds: Callable[[dict[str, Any]], bool],
    heading: Callable[[dict[str, Any]], str],
    *,
    metric: str = "cpu_seconds",
    without: tuple[str, ...] = (),
) -> str | None:
    panels = []
    for group in results.groups(case):
        names = [name for name in group.systems if name not in without and group.median(name, metric) is not None]
        if not names or not holds(group.params):
            continue
        panel = []
        for name in sorted(names, key=lambda name, own=group: own.median(name, metric) or 0.0):
            wrong = int(group.median(name, "wrong_frames") or 0)
            note = f"{wrong} wrong frames" if wrong else ""
            panel.append(Bar(name, group.median(name, metric) or 0.0, name.startswith("keyreel"), note))
        panels.append((heading(group.params), panel))
    return bars(title, panels, "s") if panels else None


# of -> the parameter across, its name, the title, the curves as (name, system, metric)
_CURVES = {
    "length": (
        "seconds",
        "seconds of video",
        "Embedding 360p H.264 at 1 fps with the built-in model",
        (("peak memory, MiB", "keyreel", "peak_mib"), ("CPU-seconds", "keyreel", "cpu_seconds")),
    ),
    "rate": (
        "fps",
        "frames sampled a second",
        "Embedding 120 s of 360p H.264 with the built-in model",
        (("peak memory, MiB", "keyreel", "peak_mib"), ("CPU-seconds", "keyreel", "cpu_seconds")),
    ),
    "videos": (
        "videos",
        "videos of 30 s",
        "Embedding several videos with one Engine",
        (("peak memory, MiB", "keyreel", "peak_mib"), ("CPU-seconds", "keyreel", "cpu_seconds")),
    ),
    "clusters": (
        "clusters",
        "clusters",
        "k-means over 3,000 frames: CPU-seconds",
        (
            (ONE_START, ONE_START, "cpu_seconds"),
            ("keyreel", "keyreel", "cpu_seconds"),
        ),
    ),
}


def _grown(results: Results, of: str) -> list[Group]:
    across = _CURVES[of][0]
    return sorted(results.groups("scaling", of=of), key=lambda group: float(group.params[across]))


def scaling_charts(results: Results) -> dict[str, str]:
    """scaling_<of>.svg -> SVG."""
    found = {}
    for of, (across, axis, title, curves) in _CURVES.items():
        drawn = []
        for name, system, metric in curves:
            curve = [(float(group.params[across]), group.median(system, metric)) for group in _grown(results, of)]
            drawn.append((name, [(x, y) for x, y in curve if y]))
        if all(len(curve) > 1 for _, curve in drawn):
            found[f"scaling_{of}.svg"] = lines(title, axis, drawn)
    return found


def scaling_table(results: Results, of: str) -> str:
    """One row for each size and system."""
    across, axis = _CURVES[of][:2]
    metrics = ("cpu_seconds", "wall_seconds", "peak_mib", "frames")
    rows = [
        [f"{group.params[across]:g}", name, *(_cell(measured.get(metric)) for metric in metrics)]
        for group in _grown(results, of)
        for name, measured in group.systems.items()
    ]
    return table([axis, "", *(metric.replace("_", " ") for metric in metrics)], rows) if rows else ""
