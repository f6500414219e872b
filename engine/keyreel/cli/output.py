"""Prints data on stdout, everything else on stderr."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keyreel.errors import Failure

if TYPE_CHECKING:
    from pathlib import Path

    from keyreel.library.types import VideoHit
    from keyreel.types import SearchHit, Summary

errors = Console(stderr=True, highlight=False)
_FILE_WIDTH = 400  # columns of a table in a file or pipe, where cells should not fold


def printable(text: str) -> str:
    """Replaces control characters by question marks: file names may contain escape sequences for terminals."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def log(message: str, *, style: str = "") -> None:
    """Prints a message on stderr."""
    errors.print(printable(message), markup=False, style=style, soft_wrap=True)


def log_failures(failed: Sequence[Failure]) -> None:
    """Prints a table of the failed videos and why."""
    if failed:
        console = errors if errors.is_terminal else Console(stderr=True, highlight=False, width=_FILE_WIDTH)
        console.print(_table(("failed", "why"), sorted((failure.video, reason(failure)) for failure in failed)))


def reason(failure: Failure) -> str:
    """The error of a video, without its name."""
    return str(failure.error).removeprefix(f"{failure.video}: ")


def print_line(text: str) -> None:
    """Prints a line on stdout."""
    _stdout().print(printable(text), markup=False, soft_wrap=True)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str | Text]], *, right: int = 0) -> None:
    """Prints a table on stdout, or nothing if it has no rows.

    Args:
        right: how many of the first columns to align to the right.
    """
    if rows:
        _stdout().print(_table(heads, rows, right))


def print_json(document: Any) -> None:
    """Prints a document on stdout, in ASCII: a file name may be invalid in the encoding of stdout."""
    from keyreel.render.documents import to_json

    print(to_json(document), end="")


def print_answer(document: Any, *lines: str, as_json: bool) -> None:
    """Prints the answer of a command on stdout: its document, or its lines for people."""
    if as_json:
        print_json(document)
    for line in () if as_json else lines:
        print_line(line)


def print_csv(columns: Sequence[str], rows: Sequence[object]) -> None:
    """Prints a table with a header on stdout, in UTF-8; names that are not UTF-8 keep their bytes.

    Args:
        columns: attributes of the rows.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([getattr(row, column, None) for column in columns] for row in rows)
    sys.stdout.flush()
    sys.stdout.buffer.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str | Text]], right: int = 0) -> Table:
    table = Table(box=None)
    for number, head in enumerate(heads):
        table.add_column(head, overflow="fold", justify="right" if number < right else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    return table


def plural(number: int, noun: str) -> str:
    """Formats a number with a noun: 1 frame, 2 frames."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def span(start: float, stop: float) -> str:
    """Formats a span: 0:01.0 - 0:02.5."""
    return f"{clock(start)} - {clock(stop)}"


def clock(seconds: float) -> str:
    """Formats seconds as the pages do: 0:13.5."""
    from keyreel.render.pictures import short_clock

    return short_clock(seconds)


def print_summary(summary: Summary, folder: Path, seconds: float) -> None:
    """Prints a line for the video and one for each key-frame.

    Args:
        seconds: how long it took.
    """
    keyframes, shots = plural(len(summary.keyframes), "key-frame"), plural(len(summary.shots), "shot")
    scenes, frames = plural(len(summary.scenes), "scene"), plural(len(summary.embedding), "frame")
    done = f"{keyframes}, {shots} and {scenes} from {frames} in {seconds:.1f} s on {summary.device}"
    print_line(f"{summary.video.path}: {done} -> {folder}")
    for frame in summary.keyframes:
        print_line(f"  {clock(frame.pts_seconds):>9}  {frame.weight:6.1%}")


def print_hits(hits: Sequence[SearchHit]) -> None:
    """Prints a table of moments, best first."""
    from keyreel.chance import percent

    rows = []
    for hit in hits:
        folded = getattr(hit, "folded", 0)
        more = getattr(hit, "more", 0)
        name = (
            hit.video
            + (f" (and {folded} much alike)" if folded else "")
            + (f" (and {more} more in it)" if more else "")
        )
        best = clock(hit.pts_seconds) + (", subject" if hit.answered_by == "subject" else "")
        chance = "" if hit.chance is None else percent(hit.chance)
        rows.append((f"{hit.score:.3f}", chance, span(hit.start_seconds, hit.stop_seconds), best, name))
    print_table(("score", "chance", "moment", "best at", "video"), rows)


def print_videos(videos: Sequence[VideoHit]) -> None:
    """Prints a table of videos, best first, each with its best moments."""
    rows = []
    for video in videos:
        moments = "\n".join(f"{span(m.start_seconds, m.stop_seconds)} ({m.score:.3f})" for m in video.moments)
        rows.append((f"{video.score:.3f}", moments, video.video))
    print_table(("score", "moments", "video"), rows)
