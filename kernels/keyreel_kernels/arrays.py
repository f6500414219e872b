"""Where arrays live: host memory here, a CUDA device in cuda.py, behind one interface."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost, which is the host's memory too


def on_host(array: Any) -> bool:
    """Whether an array with __dlpack__ lies in host memory."""
    return array.__dlpack_device__()[0] in _DLPACK_HOST


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

    def join(self) -> None:
        """What the device and the caller's own current stream were given so far is done before what either gets next.

        Arrays of the device come and go between streams in its wake.
        """

    def synchronize(self) -> None:
        """Waits until everything that was launched is done."""

    def to_device(self, array: Any) -> Any:
        """An array on the device: as it is if it is there; by DLPack without a copy; else copied.

        Raises:
            ValueError: it is on another device.
        """

    def to_host(self, array: Any) -> NDArray[Any]:
        """A NumPy array of the same values; waits for the device."""


class HostArrays:
    """NumPy: nothing moves."""

    xp: Any = np
    bytes_to_host = 0

    def scope(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def to_device(self, array: Any) -> NDArray[Any]:
        if isinstance(array, np.ndarray):
            return array
        if not on_host(array):
            raise ValueError("the array is on a device, the engine on the CPU: copy it to the host first")
        return np.from_dlpack(array)

    def to_host(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)
