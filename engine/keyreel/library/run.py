"""A run over many videos: threads, progress of each and of all, and stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from keyreel.library.types import Added
from keyreel.types import Progress

T = TypeVar("T")

# How much of a video's work lies behind when a stage begins, and how much the stage is: about what was measured.
_SHARES = {"encode": (0.0, 0.8), "pictures": (0.8, 0.2)}


class Halted(Exception):
    """The caller wants no more: raised where the work is, and ends it."""


class IndexRun:
    """One run over several videos. The callbacks are called from the threads that work, never two at a time.

    Args:
        stop: asked often; True ends the run.
        progress: told ("videos", done, total) for all of them, those under way in parts.
        begin: called with a video's name when work on it begins; gives what is told that video's own stages.
        tell: called with what became of each video, in the order in which they end.
    """

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
        self._problem: Exception | None = None
        self._lock = threading.RLock()
        self._shares: dict[int, float] = {}  # of the videos under way, how much of each is done
        self._done = self._total = 0

    def checkpoint(self) -> None:
        """Raises Halted once the run is to end."""
        if self._ended.is_set() or (self._stop is not None and self._call(self._stop)):
            self._ended.set()
            raise Halted

    def run(self, names: Sequence[str], work: Callable[[str, Progress], Added], workers: int) -> list[Added]:
        """Calls `work` for each name, and gives what came of those that were done, in the order of the names.

        Raises:
            whatever `work` or a callback raises, and KeyboardInterrupt: after the other threads have ended.
        """
        found: dict[int, Added] = {}
        places = iter(range(len(names)))
        self._total = len(names)

        def share() -> None:
            try:
                while (place := self._next(places)) is not None:
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

    # --- inside ---------------------------------------------------------------------------------------------------

    def _next(self, places: Iterator[int]) -> int | None:
        self.checkpoint()
        with self._lock:
            return next(places, None)

    def _one(self, place: int, name: str, work: Callable[[str, Progress], Added]) -> Added:
        own = None if self._begin is None else self._call(self._begin, name)

        def progress(stage: str, done: float, total: float | None) -> None:
            self.checkpoint()
            before, part = _SHARES.get(stage, (0.0, 0.0))
            self._shares[place] = before + part * (min(done / total, 1.0) if total else 0.0)
            if own is not None:
                self._call(own, stage, done, total)
            self._say()

        added = work(name, progress)
        with self._lock:
            self._shares.pop(place, None)
            self._done += 1
        if self._tell is not None:
            self._call(self._tell, added)
        self._say()
        return added

    def _say(self) -> None:
        if self._progress is not None:
            with self._lock:
                self._call(self._progress, "videos", self._done + sum(self._shares.values()), float(self._total))

    def _call(self, callback: Callable[..., T], *values: object) -> T:
        """One callback at a time; an error in one is the caller's, not the video's, and ends the run."""
        with self._lock:
            try:
                return callback(*values)
            except Exception as error:
                self._problem = error
                self._ended.set()
                raise Halted from error
