"""One interface to the memory of a device: the CPU's here, a CUDA device's in cuda.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_DLPACK_HOST = (1, 3)  # kDLCPU and kDLCUDAHost (pinned host memory)


def on_host(array: Any) -> bool:
    """Whether an array with __dlpack__ is in host memory."""
    return array.__dlpack_device__()[0] in _DLPACK_HOST


class Arrays(Protocol):
    """The memory of a device. All data moves to and from the device by its methods."""

    @property
    def xp(self) -> Any:
        """The array module: NumPy or CuPy."""

    def scope(self) -> AbstractContextManager[None]:
        """Makes the device, its stream and its memory pool current in this thread; re-entrant."""

    def join(self) -> None:
        """Synchronises our stream with the caller's current one: earlier work on either precedes later work on both."""

    def to_device(self, array: Any) -> Any:
        """Returns the array on the device, without a copy if it is already there.

        Raises:
            ValueError: the array is on another device.
        """

    def to_host(self, array: Any) -> NDArray[Any]:
        """Returns a NumPy array of the same values. Waits for the device."""


class HostArrays:
    """The memory of the CPU: NumPy arrays, never copied."""

    xp: Any = np

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        pass

    def to_device(self, array: Any) -> NDArray[Any]:
        if isinstance(array, np.ndarray):
            return array
        if not on_host(array):
            raise ValueError("the array is on a device, the engine on the CPU: copy it to the host first")
        return np.from_dlpack(array)

    def to_host(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)
