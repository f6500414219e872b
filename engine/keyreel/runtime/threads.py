"""BLAS on one thread.

For products of small matrices OpenBLAS wakes its threads each time, and they spin: the subject's vectors of six minutes
of video took 5.0 s on two idle cores, and 0.7 s on one thread.
"""

from __future__ import annotations

import threading
from typing import Any

from threadpoolctl import ThreadpoolController


class _OneThread:
    """A context that threads may enter at a time: the first one sets the limit, the last one lifts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: ThreadpoolController | None = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._controller = self._controller or ThreadpoolController()  # looks for the libraries: once
                self._limit = self._controller.limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()


one_blas_thread = _OneThread()
"""`with one_blas_thread:` NumPy's products run on the calling thread alone, in the whole process."""
