"""Threads for what blocks, with a bound on how much may wait for them."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from keyreel.serve.refusals import too_busy

P = ParamSpec("P")
R = TypeVar("R")


class Pool:
    """Runs blocking calls off the event loop.

    Work that was started keeps its place until it has ended, also where nobody waits for it any more (a timeout, a
    caller who left): a slow library fills the pool and is then answered with 429, it does not pile up threads.

    Args:
        threads: calls at a time. queue: calls that may wait for a thread.
    """

    def __init__(self, threads: int, queue: int, *, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most = threads + queue
        self._lock = threading.Lock()
        self.taken = 0

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `work` returns; it does not start if the caller was cancelled before.

        Raises:
            Refused: 429, the queue is full.
        """
        with self._lock:
            if self.taken >= self._most:
                raise too_busy("requests", 1)
            self.taken += 1
        context = contextvars.copy_context()  # of the spans
        future = self._executor.submit(lambda: context.run(work, *args, **kwargs))
        future.add_done_callback(self._release)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Takes no more work and forgets what did not start."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release(self, _: Future[R]) -> None:
        with self._lock:
            self.taken -= 1
