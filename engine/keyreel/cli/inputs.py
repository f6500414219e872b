"""What the command line is given: videos, folders of videos, standard input; and how it goes through them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from keyreel.config import DecodeLimits
from keyreel.decode.source import Source
from keyreel.errors import Failure, KeyreelError, MissingExtra, SourceNotFound

VIDEO_SUFFIXES = frozenset(
    f".{end}"
    for end in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mts", "mpg", "mpeg"),
        *("flv", "wmv", "ogv", "3gp", "mxf", "ivf", "vob", "y4m"),
    )
)
SOME_FAILED = 8


def sources(names: Sequence[str], limits: DecodeLimits) -> list[Source | KeyreelError]:
    """One entry a video; folders stand for the videos in them, an error for a folder without any.

    Raises:
        ValueError: an empty name.
    """
    return [found if isinstance(found, KeyreelError) else Source(found, limits=limits) for _, found in within(names)]


def within(names: Sequence[str]) -> Iterator[tuple[str, str | Path | KeyreelError]]:
    """Each name with its videos: itself, those in a folder, or an error for a folder without any.

    Raises:
        ValueError: an empty name.
    """
    for name in names:
        if not name:
            raise ValueError("an empty name is no video")
        path = Path(name)
        if name == "-" or not path.is_dir():
            yield name, name
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        inside = [p for p in inside if not (p.name == "reel.mp4" and (p.parent / "summary.json").is_file())]
        hint = f"files that end in one of: {' '.join(sorted(VIDEO_SUFFIXES))}"
        if not inside:
            yield name, SourceNotFound(f"there is no video in the folder {name!r}", hint=hint)
        for found in inside:
            yield name, found


def listed(text: bytes) -> list[str]:
    """Paths from a list, one a line; between NULs where there are any, as `find -print0` writes them."""
    lines = text.split(b"\0") if b"\0" in text else [line.removesuffix(b"\r") for line in text.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def for_each(
    videos: Sequence[Source | KeyreelError], work: Callable[[Source], None], tell: Callable[[Failure], None]
) -> list[Failure]:
    """Goes on past videos that fail, and tells at once which and why."""
    failed = []
    for video in videos:
        try:
            if isinstance(video, KeyreelError):
                raise video
            work(video)
        except MissingExtra:
            raise  # it would be missing for every video
        except Exception as error:  # noqa: BLE001 - one video must not take the others with it, whatever is wrong with it
            failed.append(Failure.of(video.name if isinstance(video, Source) else "", error))
            tell(failed[-1])
    return failed


def exit_code(failed: Sequence[Failure], succeeded: int) -> int:
    """0; the code that all failures share where nothing succeeded; else that of some of many."""
    codes = {failure.error.exit_code for failure in failed}
    return 0 if not failed else codes.pop() if not succeeded and len(codes) == 1 else SOME_FAILED


def folder_name(source: Source, used: set[str]) -> str:
    """The video's stem; two videos of one stem get folders of their own."""
    stem = source.path.stem if source.path is not None else source.name.strip("<>").replace("/", "-")
    # The stem of "...mp4" is "..", which is another folder altogether.
    stem = stem if stem.strip(".") else "video"
    name, number = stem, 2
    while name in used:
        name, number = f"{stem}-{number}", number + 1
    used.add(name)
    return name
