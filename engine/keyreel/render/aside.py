"""Files that are either whole or not there."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to: renamed to it at the end, removed after an error or Ctrl-C."""
    # Without the target's own name, which may be as long as a name can be; its suffix names the format to writers.
    made = path.with_name(f".keyreel-{uuid.uuid4().hex[:12]}.part{path.suffix}")
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
