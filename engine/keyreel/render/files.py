"""Writes files that are either whole or absent."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD_SECONDS = 86_400.0


def hidden(path: Path, suffix: str = "") -> Path:
    """A new hidden name beside `path`. It does not contain the name of `path`, which may have the greatest length.

    Deletes what a killed process left there more than a day ago.
    """
    with suppress(OSError):
        for left in path.parent.glob(".keyreel-*.part*"):
            if time.time() - left.lstat().st_mtime > OLD_SECONDS:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return path.with_name(f".keyreel-{uuid.uuid4().hex[:12]}.part{suffix}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a hidden name beside `path` to write to.

    It renames the file to `path` at the end, and deletes it after an error or Ctrl-C.
    """
    made = hidden(path, path.suffix)  # writers choose the format by the suffix
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
