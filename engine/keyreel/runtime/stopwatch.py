"""How long each stage of a job is at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of stages, one job in one thread.

    Args:
        settle: called before a stage's end is read; waits for the device, so that what a stage has only launched is
            counted as its own. Nothing by default: a job that is not measured need not wait.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}  # of the whole process: a stage's own where nothing else runs

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
