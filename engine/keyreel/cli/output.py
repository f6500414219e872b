"""What the command line shows: data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from keyreel.cli.bench_results import Bench, Measured, Spread
from keyreel.cli.thumbnails import cards
from keyreel.errors import Failure
from keyreel.library.types import VideoHit
from keyreel.render.documents import to_json
from keyreel.runtime.doctor import Probe
from keyreel.types import SearchHit, Summary

errors = Console(stderr=True, highlight=False)


def say(message: str, *, style: str = "") -> None:
    """One message on stderr."""
    errors.print(shown(message), markup=False, style=style, soft_wrap=True)


def shown(text: str) -> str:
    """Names come from anywhere: what no terminal should act on, or cannot write, becomes a question mark."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say_failed(failure: Failure) -> None:
    text = str(failure.error)
    say(f"{failure.video}: {text}" if failure.video not in text else text, style="red")


def reason(failure: Failure) -> str:
    """Why it failed, without the name of the video."""
    return str(failure.error).removeprefix(f"{failure.video}: ")


def print_failures(failed: Sequence[Failure]) -> None:
    """A table of what failed, why, and what to do about it; on stderr."""
    rows = sorted((escape(shown(failure.video)), escape(shown(reason(failure)))) for failure in failed)
    if rows:
        # A file has no width: nothing is broken there.
        wide = errors if errors.is_terminal else Console(stderr=True, highlight=False, width=400)
        wide.print(_table(("failed", "why"), rows))


def print_json(document: Any) -> None:
    # ASCII: a file name need not be valid in the encoding of stdout.
    print(to_json(document), end="")


def out() -> Console:
    """stdout. A pipe has no width: nothing is cut there."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 400)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def span(start: float, stop: float) -> str:
    return f"{start:.2f} - {stop:.2f} s"


def print_summary(summary: Summary, folder: Path) -> None:
    """One line for the video, one for each key-frame."""
    video, total, console = summary.video, summary.timings_seconds["total"], out()
    console.print(
        f"{video.path}: {counted(len(summary.keyframes), 'key-frame')} and {counted(len(summary.shots), 'shot')} from "
        f"{counted(len(summary.embedding), 'frame')} in {total:.1f} s on {summary.device} -> {folder}",
        markup=False,
        soft_wrap=True,
    )
    for frame in summary.keyframes:
        console.print(f"  {frame.pts_seconds:9.3f} s  {frame.weight:6.1%}", markup=False)


def print_hits(hits: Sequence[SearchHit], pictures: Sequence[Text] = ()) -> None:
    """A table of the moments, best first, or cards where there are pictures; nothing where nothing was found."""
    rows = []
    for hit in hits:
        folded = getattr(hit, "folded", 0)
        name = escape(shown(hit.video)) + (f" (and {folded} much alike)" if folded else "")
        times = span(hit.start_seconds, hit.stop_seconds), f"{hit.pts_seconds:.2f} s"
        rows.append((f"{hit.score:.3f}", *times, name))
    if pictures:
        texts = [f"[b]{moment}[/b]\nscore {score}, best at {best}\n{name}" for score, moment, best, name in rows]
        out().print(cards(pictures, texts))
    elif rows:
        out().print(_table(("score", "moment", "best at", "video"), rows))


def say_weak(hits: Sequence[SearchHit], weak_score: float | None) -> None:
    """Says so where even the best moment hardly matches the text, for models that know how low that is."""
    best = max((hit.score for hit in hits), default=None)
    if best is not None and weak_score is not None and best < weak_score:
        most = f"most matches among so many shots have {weak_score:.3f} or more"
        say(f"nothing matches well: the best score is {best:.3f}, {most}")


def print_videos(videos: Sequence[VideoHit], pictures: Sequence[Text] = ()) -> None:
    """A table of the videos, best first, each with its best moments; cards where there are pictures of them."""
    rows = []
    for video in videos:
        moments = "\n".join(f"{span(m.start_seconds, m.stop_seconds)} ({m.score:.3f})" for m in video.moments)
        rows.append((f"{video.score:.3f}", moments, escape(shown(video.video))))
    if pictures:
        texts = [f"[b]{name}[/b]\nscore {score}\n{moments}" for score, moments, name in rows]
        out().print(cards(pictures, texts))
    elif rows:
        out().print(_table(("score", "moments", "video"), rows))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_probes(found: Sequence[Probe]) -> None:
    """A line for each check, and its fix."""
    console = out()
    for probe in found:
        mark = "ok  " if probe.passed else ("FAIL" if probe.required else "no  ")
        console.print(f"{mark} {probe.name}: {probe.found}", markup=False, soft_wrap=True)
        if probe.fix:
            console.print(f"       fix: {probe.fix}", markup=False, soft_wrap=True)


def print_bench(found: Bench) -> None:
    """A table for each video, one for all of them where there are several, and how it was measured."""
    for measured in (*found.videos, *([found.total] if found.total and len(found.videos) > 1 else [])):
        _print_measured(measured)
    device = f"{found.device} ({found.device_reason}), {counted(found.cores, 'core')} of {found.machine}"
    moved = found.total.bytes_to_host if found.total else 0
    out().print(
        f"{found.model} on {device}\n"
        f"busy: at work in the pipeline, beside the other stages; alone and CPU-s: with nothing beside it\n"
        f"medians of {counted(found.runs, 'run')} (+- half of p25 to p75) after a warm-up of "
        f"{found.warmup_seconds:.1f} s; peak memory {found.peak_memory_bytes / 1e6:.0f} MB"
        + (f"; {moved / 1e6:.1f} MB left the device" if moved else ""),
        markup=False,
        soft_wrap=True,
    )


def _print_measured(found: Measured) -> None:
    console = out()
    console.print(
        f"{found.video}: {found.video_seconds:.1f} s of video, {counted(found.frames, 'frame')} sampled; "
        f"{counted(found.packets_read, 'packet')} read, {found.packets_fed} decoded",
        markup=False,
        soft_wrap=True,
    )
    # Not wider than the narrowest of usual terminals.
    table = Table("", "busy, s", "share", "alone, s", "CPU-s", "of CPU", "frames/s", "x time", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in found.stages:
        table.add_row(
            stage.name,
            _spread(stage.busy_seconds),
            f"{stage.busy_share:.0%}",
            _spread(stage.alone_seconds),
            _spread(stage.alone_cpu_seconds),
            f"{stage.cpu_share:.0%}",
            f"{stage.frames_per_second:.1f}",
            f"{stage.speed:.1f}",
        )
    rate, speed = f"{found.frames / found.seconds.median:.1f}", f"{found.speed.median:.1f}"
    table.add_row("pipeline", _spread(found.seconds), "100%", "", _spread(found.cpu_seconds), "", rate, speed)
    console.print(table)
    said = f"{found.bound_by} bounds: at work {found.bound_share:.0%} of the time; {speed} hours of video an hour"
    for other in found.alternatives:
        said += f"\n--sampling {other.sampling} ({counted(other.frames, 'frame')}): {other.times_as_fast:.1f} x as fast"
    console.print(said + "\n", markup=False, soft_wrap=True)


def _spread(values: Spread) -> str:
    """Three figures, and half of the distance between the quartiles, relative to the median."""
    digits = 3 if values.median < 1 else max(0, 3 - len(str(int(values.median))))
    return f"{values.median:.{digits}f} +-{(values.p75 - values.p25) / 2 / max(values.median, 1e-9):.0%}"
