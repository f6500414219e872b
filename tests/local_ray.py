"""A Ray on this machine, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Ray's own; its sockets are closed when Python happens to look for them.
WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLIPS = ("natural/bikes.mp4", "natural/chaplin.mp4", "natural/test.mp4", "natural/stream-of-water.mp4")


@contextmanager
def started(cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to a cluster as `index` starts one; skips where there is none."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from keyreel.cluster.indexing import connected

    connection = connected(ray, None, cpus=cpus, gpus=0)
    try:
        connection.__enter__()
    except Exception as error:  # noqa: BLE001 - a sandbox may refuse it its sockets or its shared memory
        pytest.skip(f"Ray does not start here: {type(error).__name__}: {error}")
    try:
        yield ray
    finally:
        connection.__exit__(None, None, None)
