"""The videos of a command: files, folders, standard input; and the loop over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from keyreel.cli.output import log
from keyreel.config import DecodeLimits
from keyreel.errors import Failure, KeyreelError, MissingExtra, SourceNotFound
from keyreel.folders import SUFFIXES, videos_in

if TYPE_CHECKING:
    from keyreel.cli.progress import Bars
    from keyreel.decode.source import Source
    from keyreel.types import Progress

SOME_FAILED = 8


def sources(names: Sequence[str], limits: DecodeLimits, *, hidden: bool) -> list[Source | KeyreelError]:
    """Finds the videos of the names, and makes an error for each folder without a video."""
    from keyreel.decode.source import Source

    found = within(names, hidden=hidden)
    return [one if isinstance(one, KeyreelError) else Source(one, limits=limits) for _, one in found]


def within(
    names: Sequence[str], *, hidden: bool, quiet: bool = False
) -> Iterator[tuple[str, str | Path | KeyreelError]]:
    """Yields each name with its videos: itself, those in a folder, or an error for a folder without a video.

    Args:
        names: of the command line.
        hidden: see `videos_in`.
        quiet: do not print what is skipped in a folder.
    """
    for name in names:
        if not name:
            raise ValueError("a video's name must not be empty")
        if name == "-" or not os.path.isdir(name):
            yield name, name
            continue
        inside, passed = videos_in(Path(name), hidden=hidden)
        if passed and not quiet:
            skipped = ", ".join(f"{what} ({count})" for what, count in sorted(passed.items()))
            log(f"{name}: skipped {skipped}", style="dim")
        if not inside:
            hint = f"files that end in one of: {' '.join(sorted(SUFFIXES))}"
            if any(Path(name).glob("*.lance")):
                hint = f'it is a library: `keyreel search "a dog" --library {name}` searches it'
            yield name, SourceNotFound(f"there is no video in the folder {name!r}", hint=hint)
        for found in inside:
            yield name, found


def listed(text: bytes) -> list[str]:
    """Reads paths, one on each line; separated by NULs if there are any, as `find -print0` writes them."""
    lines = text.split(b"\0") if b"\0" in text else [line.removesuffix(b"\r") for line in text.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def for_each(
    videos: Sequence[Source | KeyreelError],
    bars: Bars,
    work: Callable[[Source, Progress], None],
    parts: Mapping[str, tuple[float, float]],
) -> list[Failure]:
    """Calls `work` with each video and the callback of its bar. Prints why videos fail, and returns the failures.

    Args:
        parts: see `Bars.start`.
    """
    failures = []
    for video in videos:
        name = "" if isinstance(video, KeyreelError) else video.name
        try:
            if isinstance(video, KeyreelError):
                raise video
            work(video, bars.start(name, parts))
        except MissingExtra:
            raise  # it is missing for every video
        except Exception as error:  # noqa: BLE001 - a video that fails must not stop the others
            failures.append(Failure.of(name, error))
            text = str(failures[-1].error)
            log(text if name in text else f"{name}: {text}", style="red")
        finally:
            bars.finish()
    return failures


def exit_for(failed: Sequence[Failure], succeeded: int) -> None:
    """Exits after failures: with their common code if nothing succeeded, else with 8."""
    codes = {failure.error.exit_code for failure in failed}
    if codes:
        raise typer.Exit(codes.pop() if not succeeded and len(codes) == 1 else SOME_FAILED)


def folder_name(source: Source, used: set[str]) -> str:
    """The video's stem, numbered if already used."""
    stem = source.path.stem if source.path is not None else source.name.strip("<>").replace("/", "-")
    stem = stem if stem.strip(".") else "video"  # the stem of "...mp4" is ".."
    name, number = stem, 2
    while name in used:
        name, number = f"{stem}-{number}", number + 1
    used.add(name)
    return name
