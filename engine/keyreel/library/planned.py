"""Decides what to do with a video before decoding it, and says what a run would do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keyreel.config import IndexConfig
from keyreel.decode.source import Source
from keyreel.errors import Failure
from keyreel.library.files import Catalog, FileState, fingerprint, is_gone, path_of
from keyreel.library.types import Planned, Record


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a video, and why."""

    change: Literal["added", "changed", "moved", "copied", "unchanged"]
    why: str
    record: Record | None = None  # record to renew instead of decoding
    twins: tuple[Record, ...] = ()  # videos of the same content, to copy rows from


def is_done(known: Record, path: Path | None, state: FileState | None) -> bool:
    """Whether the library has the current state of the video. Does not open the file."""
    here = path is None if state is None else state.fits(known)
    return known.status == "ok" and here


def compared(name: str, path: Path | None, known: Record | None, content: str, catalog: Catalog, force: bool) -> Choice:
    """Compares the content of a file with the library's.

    Args:
        path: of the file; None for a URL.
        known: its record, if the library has its name.
        content: its fingerprint; "" for a URL.
    """
    twins = () if force else tuple(catalog.like(content))
    if known is not None and any(twin.id == known.id for twin in twins):
        return Choice("unchanged", "its time changed, its content did not", known)
    if known is None:
        for twin in twins:
            other = str(path_of(twin.path))
            if os.path.exists(other) and os.path.samefile(other, str(path)):
                return Choice("unchanged", f"the same file as {twin.path}", twin)
        for twin in twins:
            if is_gone(twin.path):
                return Choice("moved", f"from {twin.path}", twin)
    if twins:
        change = "copied" if known is None else _change(known)
        return Choice(change, f"the same content as {twins[0].path}", twins=twins)
    if known is None:
        return Choice("added", "new")
    same = "forced" if known.status == "ok" else "failed before"
    return Choice(_change(known), same if content == known.fingerprint else "its content changed")


def _change(known: Record) -> Literal["added", "changed", "copied"]:
    """The change of a known video: "added" if it failed before."""
    return "changed" if known.generation else "added"


def planned(name: str, catalog: Catalog, config: IndexConfig, seen: dict[str, str]) -> Planned:
    """Says what indexing would do with a video. Opens only a video that it would decode, to read the headers.

    Args:
        seen: first video of each content in this run; adds this one.
    """
    known = catalog.at(name)
    name = name if known is None else known.path
    path, seconds = path_of(name), None
    try:
        state = FileState.of(path)
        if known is not None and not config.force and is_done(known, path, state):
            return Planned(name, "unchanged", "same size and time of change" if path else "a URL is read once")
        content = "" if path is None or state is None else fingerprint(path)
        choice = compared(name, path, known, content, catalog, config.force)
        first = seen.setdefault(content or name, name)
        if first != name and known is None and not choice.twins and not config.force:
            return Planned(name, "copied", f"the same content as {first}")
        if choice.record is None and not choice.twins:
            with Source(path or name, limits=config.limits) as source:
                seconds = source.probe().duration_seconds
                source.check_duration(seconds or 0.0)
    except Exception as error:  # noqa: BLE001 - as when it is indexed: the others go on
        failure = Failure.of(name, error)
        return Planned(name, "failed", str(failure.error), failure=failure)
    was = choice.record.path if choice.record is not None and choice.change == "moved" else None
    return Planned(name, choice.change, choice.why, seconds, was=was)
