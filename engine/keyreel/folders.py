"""The videos in a folder as people have them: on a NAS, a phone's card, a downloads folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pathspec

# fmt: off
SUFFIXES = frozenset((
    ".264", ".265", ".360", ".3g2", ".3gp", ".3gpp", ".amv", ".asf", ".av1", ".avi", ".divx", ".dv", ".f4v", ".flv",
    ".gif", ".h264", ".h265", ".hevc", ".insv", ".ivf", ".lrv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogm", ".ogv",
    ".qt", ".rm", ".rmvb", ".tod", ".trp", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".xvid", ".y4m",
))
# fmt: on
IGNORE_FILE = ".keyreelignore"  # in the syntax of gitignore, for its folder and those below
_SYSTEM = frozenset(("@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"))
_PARTIAL = re.compile(r"(\.(part|partial|crdownload|download|aria2|opdownload|!qb|!ut)$|^~\$)", re.IGNORECASE)
_TS = rb"(?:.{4})?\x47(?:.{187}|.{191})\x47"
# Suffixes that other files have too, and how a video with them begins: .ts is also TypeScript and Qt's translations,
# .mod also music, .qt also an image, .obu, .360 and .dv also anything.
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
    """The videos of a folder and those below it, in order, and how many files were passed over, by reason.

    A file is a video by its suffix; where other files have that suffix too, by how it begins. Files and folders that
    `.keyreelignore` names are left out, and so are hidden ones, a NAS's thumbnails, recycle bins and what is still
    being downloaded. Links to folders are not followed.

    Args:
        folder: where to look.
        hidden: take hidden and system folders and files, too.
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
    """Whether a file or a folder is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _reason_against(path: Path, rules: list[tuple[Path, pathspec.GitIgnoreSpec]], *, hidden: bool) -> str | None:
    """None for a video; "" for what nobody takes for one."""
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
        return None  # the error is told where the video is opened
    return None


def _rules_of(folder: Path) -> list[tuple[Path, pathspec.GitIgnoreSpec]]:
    try:
        lines = (folder / IGNORE_FILE).read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [(folder, pathspec.GitIgnoreSpec.from_lines(lines))]


def _is_ignored(path: Path, rules: list[tuple[Path, pathspec.GitIgnoreSpec]], *, folder: bool = False) -> bool:
    """As git decides: the last rule that fits, of the nearest folder first."""
    for root, spec in reversed(rules):
        name = path.relative_to(root).as_posix() + ("/" if folder else "")
        if (fits := spec.check_file(name).include) is not None:
            return fits
    return False
