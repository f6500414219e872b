"""The time that each stage of a job takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of stages, one job in one thread.

    Args:
        settle: called at the end of a stage, to wait for what it has launched on the device; nothing by default.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}  # of the whole process

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began, busy = time.perf_counter(), time.process_time()
        yield
        self._settle()
        for clock, spent in (
            (self.seconds, time.perf_counter() - began),
            (self.cpu_seconds, time.process_time() - busy),
        ):
            clock[stage] = clock.get(stage, 0.0) + spent
