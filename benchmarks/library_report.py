"""What the rows about libraries say: indexing, search, kills, load, and what a million hours of video would take."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from benchmarks.cases.end_to_end import SUMMARY
from benchmarks.cases.index import AGAIN, RAY, SUMMARIZE
from benchmarks.cases.library import WIDTH
from benchmarks.charts import number
from benchmarks.rows import Group, Results
from benchmarks.suite import table
from keyreel.config import LibraryConfig

FPS = 1.0  # frames of a second of video that are looked at and kept
HOURS = 1_000_000
VIDEO_SECONDS = 600.0  # of the videos in them
CORES, MEMORY_GIB = 64, 512  # of the machines that are counted
DAYS = 30  # that it may take


def index_table(results: Results) -> str:
    """A line for each set of videos and way of indexing it."""
    rows = []
    for group in results.groups("index"):
        for system in group.systems:
            count, wall = group.median(system, "videos"), group.median(system, "wall_seconds")
            if not count or wall is None:
                continue
            cpu, size = group.median(system) or 0.0, group.median(system, "library_mib")
            rows.append(
                [
                    f"{count:,.0f} {group.params['of']}",
                    system,
                    number(count / wall),
                    number(1e3 * wall / count),
                    "" if system == RAY else number(1e3 * cpu / count),
                    "" if size is None else f"{number(size)} MiB, {number(1024 * size / count)} KiB a video",
                ]
            )
    head = ["", "", "videos a second", "ms a video", "CPU-ms a video", "library"]
    return table(head, rows) if rows else ""


def search_table(results: Results) -> str:
    """p50 / p99 in milliseconds: a line for each system, a column for each number of rows."""
    groups = [group for group in results.groups("library") if group.systems]
    systems = list(dict.fromkeys(system for group in groups for system in (*group.systems, *group.absent)))
    rows = [
        [f"**{name}**" if name.startswith("keyreel") else name, *(_latency(g, name) for g in groups)]
        for name in systems
    ]
    return table(["p50 / p99, ms", *(f"{group.params['rows']:,} rows" for group in groups)], rows) if groups else ""


def _latency(group: Group, system: str) -> str:
    middle, high = (group.median(system, metric) for metric in ("p50_seconds", "p99_seconds"))
    if middle is None or high is None:
        return group.absent.get(system, "")
    recall = group.median(system, "recall")
    return f"{number(1e3 * middle)} / {number(1e3 * high)}" + (
        f", recall {recall:.3f}" if recall not in (None, 1) else ""
    )


def service(results: Results) -> str:
    """Kills and load, a sentence each."""
    said = []
    for group in results.groups("kills"):
        kills, lost, findings = (group.median("keyreel", name) for name in ("kills", "lost_videos", "findings"))
        if kills is not None and lost is not None and findings is not None:
            said.append(
                f"Killed with `kill -9` {kills:,.0f} times at random points of {group.params['of']}: {lost:,.0f} "
                f"committed videos lost, {findings:,.0f} findings of `verify`."
            )
    for group in results.groups("load"):
        value = {name: group.median("keyreel serve", name) for name in ("requests", "errors", "lost")}
        spread = [group.median("keyreel serve", name) for name in ("p50_seconds", "p99_seconds")]
        if None in (*value.values(), *spread):
            continue
        said.append(
            f"{group.params['clients']} concurrent clients for {group.params['seconds']} s: {value['requests']:,.0f} "
            f"requests, {value['errors']:,.0f} errors, {value['lost']:,.0f} lost; "
            f"p50 {number(1e3 * (spread[0] or 0))} ms, p99 {number(1e3 * (spread[1] or 0))} ms."
        )
    for group in results.groups("drain"):
        accepted, lost = (group.median("keyreel serve", name) for name in ("accepted", "lost_jobs"))
        if accepted is not None and lost is not None:
            said.append(f"SIGTERM under that load: {accepted:,.0f} jobs had been accepted, {lost:,.0f} were lost.")
    return "\n".join(said)


@dataclass(frozen=True, slots=True)
class Scale:
    """What was measured, for an hour of video or for one video."""

    cpu_seconds: float  # for a second of 1080p video: decoding, ViT-B/32 once a second, key-frames
    library_cpu_seconds: float  # for a video: previews, thumbnails, commit
    commit_seconds: float  # for a video: writing 500 rows, while no one else writes
    look_seconds: float  # for a video that is found unchanged
    stored_mib: float  # for an hour of real video

    @classmethod
    def of(cls, results: Results) -> Scale | None:
        """None where something was not measured."""
        tiny = next((g for g in results.groups("index", of="tiny clips") if SUMMARIZE in g.systems), None)
        real = results.first("index", of="real clips")
        whole = results.first("end_to_end", height=1080, gop=250)
        stores = [group for group in results.groups("library") if group.median("keyreel", "commit_seconds")]
        if tiny is None or real is None or whole is None or not stores:
            return None
        found = (
            *(tiny.median(*names) for names in (("keyreel",), (SUMMARIZE,), ("keyreel", "videos"), (AGAIN,))),
            *(real.median("keyreel", name) for name in ("library_mib", "hours")),
            whole.median(SUMMARY),
            stores[-1].median("keyreel", "commit_seconds"),
        )
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        own, bare, count, again, size, hours, summary, commit = known
        return cls(summary / whole.params["seconds"], (own - bare) / count, commit, again / count, size / hours)


def million(results: Results) -> str:
    """What HOURS hours of video would take, extrapolated in a straight line from what was measured."""
    scale = Scale.of(results)
    if scale is None:
        return ""
    videos, rows = HOURS * 3600 / VIDEO_SECONDS, HOURS * 3600 * FPS
    each = scale.cpu_seconds * VIDEO_SECONDS + scale.library_cpu_seconds  # CPU-seconds for a video
    machines = videos * each / (CORES * DAYS * 86_400)
    busy = each / scale.commit_seconds  # cores whose videos one library can take in
    most = LibraryConfig().exact_rows
    in_memory = MEMORY_GIB * 2**30 / (4 * WIDTH)  # rows
    first = (
        f"**{HOURS:,} hours**, as {videos:,.0f} videos of {VIDEO_SECONDS / 60:.0f} minutes in 1080p, {FPS:g} frame a",
        f"second. Measured: {number(scale.cpu_seconds)} CPU-seconds for a second of video (decoding, ViT-B/32,",
        f"key-frames), {number(scale.library_cpu_seconds)} CPU-seconds for a video (previews, thumbnails, commit),",
        f"{number(scale.stored_mib)} MiB for an hour of short clips. In a straight line:",
        f"{number(videos * each / 3600)} core-hours, or {number(machines)} machines of {CORES} cores for {DAYS} days;",
        f"{number(scale.stored_mib * HOURS / 2**20)} TiB; {number(rows / 1e9)} billion rows.",
    )
    second = (
        f"What breaks first is exact search. Its matrix of float32 ends at {most:,} rows by default, which are",
        f"{number(most / FPS / 3600)} hours; {MEMORY_GIB} GiB of memory hold {number(in_memory / 1e6)} million rows",
        f"of {WIDTH} numbers, {number(in_memory / FPS / 3600)} hours; {number(rows / in_memory)} such machines hold",
        "all. Next is the commit. A table takes one at a time,",
        f"{number(1e3 * scale.commit_seconds)} ms each on a local disk: one library keeps up with {busy:,.0f}",
        f"cores, and the commits alone take {number(videos * scale.commit_seconds / 86_400)} days, on object",
        "storage several times that. Then the list of videos, which every worker holds in memory and reads again for",
        f"each lot that it takes ({number(1e3 * scale.look_seconds)} ms for a video that is unchanged). So: many",
        "libraries, each of what one machine's memory searches, on as many machines, and a query goes to all of them.",
        "Decoding and the model grow with the number of machines: no video knows of another.",
    )
    return "\n\n".join(textwrap.fill(" ".join(part), 120) for part in (first, second))


def section(results: Results) -> str:
    """All of it, as it stands in the README."""
    parts = (index_table(results), search_table(results), service(results), million(results))
    return "\n\n".join(part for part in parts if part)
