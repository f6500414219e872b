"""Files that are either whole or not there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def hidden(path: Path, suffix: str = "") -> Path:
    """A new hidden name beside `path`, without its name, which may be as long as a name can be."""
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
