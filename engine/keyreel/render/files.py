"""Files that are either whole or not there."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD_SECONDS = 86_400.0


def hidden(path: Path, suffix: str = "") -> Path:
    """A new hidden name beside `path`, without its name, which may be as long as a name can be.

    What an earlier process left there more than a day ago, since it was killed, is deleted.
    """
    with suppress(OSError):
        for left in path.parent.glob(".keyreel-*.part*"):
            if time.time() - left.lstat().st_mtime > OLD_SECONDS:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return path.with_name(f".keyreel-{uuid.uuid4().hex[:12]}.part{suffix}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to: renamed to it at the end, removed after an error or Ctrl-C."""
    made = hidden(path, path.suffix)  # the suffix names the format to writers
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
