"""Works on the parts of a job in several threads; gives the results in the order of the parts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Generic, TypeVar

P = TypeVar("P")
R = TypeVar("R")

POLL_SECONDS = 0.05
_TOGETHER = 16  # results that are handed over at a time: waking the consumer costs more than making most of them


class Stopped(Exception):
    """The consumer has closed the stream."""


class NoWorker(Exception):
    """No memory for another worker; the open ones do the work."""


class Channel(Generic[R]):
    """A queue of bounded length. `put` and `take` end when `stopped` is set.

    Args:
        length: most results that wait.
        stopped: set it to stop.
    """

    def __init__(self, length: int, stopped: threading.Event) -> None:
        self._queue: queue.Queue[R | BaseException | None] = queue.Queue(length)
        self._stopped = stopped

    def put(self, item: R | BaseException | None) -> None:
        """Adds an item; waits for room.

        Raises:
            Stopped: `stopped` is set.
        """
        while not self._stopped.is_set():
            with suppress(queue.Full):
                return self._queue.put(item, timeout=POLL_SECONDS)
        raise Stopped

    def take(self) -> R | BaseException | None:
        """Waits for an item: a result, an exception to raise, or None at the end or after `stopped`."""
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=POLL_SECONDS)
        return None


def in_order(
    parts: Sequence[P],
    open_worker: Callable[[], AbstractContextManager[Callable[[P], Iterator[R]]]],
    *,
    workers: int,
    ahead: int,
) -> Iterator[R]:
    """Yields the results of all parts in order, while `workers` threads work.

    At most two parts for each worker are in progress, and a worker waits when it is `ahead` results ahead of the
    consumer. Results are passed on several at a time. An error is raised in order, after the results of all earlier
    parts.

    Args:
        parts: of the job; a worker takes the next one.
        open_worker: a context manager, entered in each thread. It may raise NoWorker if another worker is open.
        workers: most threads.
        ahead: most waiting results of a part.
    """
    stopped, lock = threading.Event(), threading.Lock()
    places, room = iter(range(len(parts))), threading.Semaphore(2 * workers)
    together = max(1, min(_TOGETHER, ahead // 4))
    channels: list[Channel[list[R]]] = [Channel(ahead // together, stopped) for _ in parts]

    def take() -> int | None:
        while not room.acquire(timeout=POLL_SECONDS):
            if stopped.is_set():
                return None
        with lock:
            return None if stopped.is_set() else next(places, None)

    def run() -> None:
        place = None
        try:
            with open_worker() as work:
                while (place := take()) is not None:
                    some: list[R] = []
                    try:
                        for item in work(parts[place]):
                            some.append(item)
                            if len(some) == together:
                                channels[place].put(some)
                                some = []
                    finally:
                        if some:
                            channels[place].put(some)
                    channels[place].put(None)
        except NoWorker:
            return
        except BaseException as error:  # noqa: BLE001  raised again by the consumer
            place = take() if place is None else place
            if place is not None:
                with suppress(Stopped):
                    channels[place].put(error)

    threads = [threading.Thread(target=run, name="keyreel-worker", daemon=True) for _ in parts[:workers]]
    for thread in threads:
        thread.start()
    try:
        for channel in channels:
            while (some := channel.take()) is not None:
                if isinstance(some, BaseException):
                    raise some
                yield from some
            room.release()
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
