"""Finds the videos in folders as people have them: a NAS, a phone's memory card, a downloads folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pathspec

# fmt: off
SUFFIXES = frozenset((
    ".264", ".265", ".360", ".3g2", ".3gp", ".3gpp", ".amv", ".asf", ".av1", ".avi", ".divx", ".dv", ".f4v", ".flv",
    ".gif", ".h264", ".h265", ".hevc", ".insv", ".ivf", ".lrv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm", ".ogv",
    ".qt", ".rm", ".rmvb", ".tod", ".trp", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".xvid", ".y4m",
))
# fmt: on
IGNORE_FILE = ".keyreelignore"  # gitignore's syntax, for its folder and those below
_SYSTEM = frozenset(("@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"))
_PARTIAL = re.compile(r"(\.(part|partial|crdownload|download|aria2|opdownload|!qb|!ut)$|^~\$)", re.IGNORECASE)
_TS = rb"(?:.{4})?\x47(?:.{187}|.{191})\x47"
# Suffixes of other files too, and how a video with them begins: .ts is also TypeScript and Qt's translations, .mod also
# music, .qt also an image; .obu, .360 and .dv can be anything.
_HEADS = {
    **dict.fromkeys((".ts", ".m2t", ".trp"), re.compile(_TS, re.DOTALL)),
    **dict.fromkeys((".mod", ".tod"), re.compile(rb"\x00\x00\x01[\xba\xb3]|" + _TS, re.DOTALL)),
    ".dv": re.compile(rb"\x1f\x07\0|.{4}(ftyp|moov)|RIFF", re.DOTALL),
    **dict.fromkeys(
        (".360", ".insv", ".lrv", ".qt"), re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL)
    ),
    ".gif": re.compile(rb"GIF8[79]a"),
}


def videos_in(folder: Path, *, hidden: bool = False) -> tuple[list[Path], Counter[str]]:
    """Lists the videos of a folder and of those below it, in order, and counts the skipped files by reason.

    A file is a video by its suffix, and by its first bytes if other files have that suffix too. It skips what
    `.keyreelignore` names, hidden files, a NAS's thumbnails, recycle bins and unfinished downloads, and does not follow
    links to folders.

    Args:
        folder: where to look.
        hidden: also take hidden and system folders and files.
    """
    found: list[Path] = []
    passed: Counter[str] = Counter()
    rules: dict[str, list[tuple[Path, pathspec.GitIgnoreSpec]]] = {}

    def unreadable(error: OSError) -> None:
        passed["unreadable folders"] += 1

    for name, inside, files in os.walk(folder, onerror=unreadable):
        here = Path(name)
        own = [*rules.get(str(here.parent), []), *_rules_of(here)]
        rules[name] = own
        kept = [
            one for one in inside if (hidden or not is_hidden(one)) and not _is_ignored(here / one, own, folder=True)
        ]
        if len(kept) < len(inside):
            passed["hidden, system or ignored folders"] += len(inside) - len(kept)
        inside[:] = kept
        for file in files:
            path = here / file
            reason = _reason_against(path, own, hidden=hidden)
            if reason is None:
                found.append(path)
            elif reason:
                passed[reason] += 1
    return sorted(found), passed


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to a system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _reason_against(path: Path, rules: list[tuple[Path, pathspec.GitIgnoreSpec]], *, hidden: bool) -> str | None:
    """Why a file is skipped: None for a video, "" for a file that does not look like one."""
    suffix = path.suffix.lower()
    if _PARTIAL.search(path.name):
        return "unfinished downloads"
    if suffix not in SUFFIXES:
        return "" if path.name == IGNORE_FILE else "files that are not videos"
    if not hidden and is_hidden(path.name):
        return "hidden files"
    if _is_ignored(path, rules):
        return f"files listed in {IGNORE_FILE}"
    if path.name in ("reel.mp4", "reel.mkv") and (path.parent / "summary.json").is_file():
        return "reels written by keyreel"
    try:
        if not path.is_file():
            return "files that are not videos"
        if suffix in _HEADS:
            with path.open("rb") as file:
                head = file.read(512)
            if head and not _HEADS[suffix].match(head):
                return f"{suffix} files that are not videos"
    except OSError:
        return None  # opening the video raises the error
    return None


def _rules_of(folder: Path) -> list[tuple[Path, pathspec.GitIgnoreSpec]]:
    try:
        lines = (folder / IGNORE_FILE).read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    import pathspec  # slow to import, and few folders have such a file

    return [(folder, pathspec.GitIgnoreSpec.from_lines(lines))]


def _is_ignored(path: Path, rules: list[tuple[Path, pathspec.GitIgnoreSpec]], *, folder: bool = False) -> bool:
    """Whether the ignore files exclude a path: as in git, the last matching rule of the nearest folder decides."""
    for root, spec in reversed(rules):
        name = path.relative_to(root).as_posix() + ("/" if folder else "")
        if (fits := spec.check_file(name).include) is not None:
            return fits
    return False
