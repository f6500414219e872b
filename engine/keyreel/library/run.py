"""Runs work on many videos: threads, progress of each and of all, stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from keyreel.library.types import Added
from keyreel.types import Progress

T = TypeVar("T")

# Start and share of each stage in the work on a video, measured.
_STAGES = {"encode": (0.0, 0.8), "pictures": (0.8, 0.2)}


class Halted(Exception):
    """Raised inside the work when the caller wants to stop."""


class IndexRun:
    """One run over several videos, with the callbacks of `Library.add`."""

    def __init__(
        self,
        *,
        stop: Callable[[], bool] | None = None,
        progress: Progress | None = None,
        begin: Callable[[str], Progress] | None = None,
        tell: Callable[[Added], None] | None = None,
    ) -> None:
        self._stop, self._progress, self._begin, self._tell = stop, progress, begin, tell
        self._ended = threading.Event()
        self._problem: Exception | None = None  # exception of a callback
        self._lock = threading.RLock()
        self._parts: dict[int, float] = {}  # fraction done of each running video
        self._done = self._total = 0

    def checkpoint(self) -> None:
        """Raises Halted if the run should end."""
        if self._ended.is_set() or (self._stop is not None and self._call(self._stop)):
            self._ended.set()
            raise Halted

    def run(self, names: Sequence[str], work: Callable[[str, Progress], Added], workers: int) -> list[Added]:
        """Calls `work` for each name and returns the results so far, in the order of the names.

        Exceptions of `work` and callbacks, and KeyboardInterrupt, are raised after the other threads have ended.
        """
        found: dict[int, Added] = {}
        places = iter(range(len(names)))
        self._total = len(names)

        def share() -> None:
            try:
                while True:
                    self.checkpoint()
                    with self._lock:
                        place = next(places, None)
                    if place is None:
                        return
                    found[place] = self._one(place, names[place], work)
            except Halted:
                return
            except BaseException:
                self._ended.set()
                raise

        if workers == 1:
            share()
        else:
            with ThreadPoolExecutor(min(workers, max(1, len(names))), "keyreel-index") as pool:
                try:
                    for ended in as_completed([pool.submit(share) for _ in range(workers)]):
                        ended.result()
                finally:
                    self._ended.set()
        if self._problem is not None:
            raise self._problem
        return [found[place] for place in sorted(found)]

    def _one(self, place: int, name: str, work: Callable[[str, Progress], Added]) -> Added:
        own = None if self._begin is None else self._call(self._begin, name)

        def progress(stage: str, done: float, total: float | None) -> None:
            self.checkpoint()
            before, part = _STAGES.get(stage, (0.0, 0.0))
            self._parts[place] = before + part * (min(done / total, 1.0) if total else 0.0)
            if own is not None:
                self._call(own, stage, done, total)
            self._report()

        added = work(name, progress)
        with self._lock:
            self._parts.pop(place, None)
            self._done += 1
        if self._tell is not None:
            self._call(self._tell, added)
        self._report()
        return added

    def _report(self) -> None:
        if self._progress is not None:
            with self._lock:
                self._call(self._progress, "videos", self._done + sum(self._parts.values()), float(self._total))

    def _call(self, callback: Callable[..., T], *values: object) -> T:
        """Calls one callback at a time. Its exception is the caller's error, not the video's, and ends the run."""
        with self._lock:
            try:
                return callback(*values)
            except Exception as error:
                self._problem = error
                self._ended.set()
                raise Halted from error
