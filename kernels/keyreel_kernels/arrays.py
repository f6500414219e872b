"""Where arrays live: host memory here, a CUDA device in cuda.py, behind one interface."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Arrays(Protocol):
    """The memory of a device. Data goes up and comes down through it and in no other way."""

    @property
    def xp(self) -> Any:
        """The array module: NumPy, or CuPy for the device."""

    @property
    def bytes_to_host(self) -> int:
        """How much has left the device so far."""

    def scope(self) -> AbstractContextManager[None]:
        """Makes the device, its stream and its memory pool current in this thread; re-entrant."""

    def to_device(self, array: Any) -> Any:
        """An array on the device: as it is if it is there; by DLPack without a copy; else copied."""

    def to_host(self, array: Any) -> NDArray[Any]:
        """A NumPy array of the same values; waits for the device."""


class HostArrays:
    """NumPy: nothing moves."""

    xp: Any = np
    bytes_to_host = 0

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def to_device(self, array: Any) -> NDArray[Any]:
        return array if isinstance(array, np.ndarray) else np.from_dlpack(array)

    def to_host(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)
