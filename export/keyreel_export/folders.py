"""Folders that are replaced whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keyreel.errors import ModelError


def check_replaceable(folder: Path, foreign: Callable[[Path], str | None]) -> None:
    """Refuses to replace a file, or a folder in which `foreign` finds something that an export did not write."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file", hint="name a folder")
    name = foreign(folder) if folder.is_dir() and any(folder.iterdir()) else None
    if name is not None:
        raise ModelError(f"{folder} holds {name}, which is no part of an export", hint="name another folder")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, put in the place of `folder` at the end, removed after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".keyreel-export-") as aside:
        made = Path(aside) / "made"
        made.mkdir()
        yield made
        if folder.exists():
            folder.rename(Path(aside) / "replaced")
        made.rename(folder)
