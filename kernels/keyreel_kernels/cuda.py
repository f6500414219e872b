"""One CUDA device through CuPy: two streams, a memory pool, and kernels that are compiled once.

CuPy never turns its arrays into NumPy's implicitly: all data leaves the device through `to_host`, which counts it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.arrays import on_host

FOLDER = Path(__file__).parent
STANDARD = "-std=c++17"
# A kernel must ask for more dynamic shared memory than this.
_DEFAULT_SHARED_BYTES = 48 << 10
# A kernel must be allowed more blocks in a thread-block cluster than all devices have. In the driver's cuda.h.
_MOST_PORTABLE, _MOST = 8, 16
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14

Defines: TypeAlias = tuple[tuple[str, int], ...]


@cache
def source_of(file: str) -> str:
    """The source of a kernel file as compiled: device.cuh, then the file with its includes expanded.

    NVRTC has no include path; `#line` keeps each file's line numbers.
    """

    def text(name: str) -> str:
        return f'#line 1 "{name}"\n{(FOLDER / name).read_text("utf-8")}'

    lines = text(file).split("\n")
    for number, line in enumerate(lines):
        if found := re.fullmatch(r'#include "(\w+\.cuh)"', line):
            lines[number] = f'{text(found[1])}\n#line {number + 1} "{file}"'
    return "\n".join([text("device.cuh"), *lines])


class TooManyNeighbours(Exception):
    """The device has no room for a cluster of so many blocks: `Cuda.most_neighbours` is lower now."""


class Cuda:
    """A device with a stream for computing, one for decoding, and one memory pool.

    Safe to share between threads: a stream orders its work. The pool gives memory back to the stream that was current
    when it was taken, at once: what another stream reads must be kept until that one is done.

    Args:
        index: number of the device.
        cupy: the CuPy module.

    Raises:
        ImportError: CuPy is not installed.
        Exception: whatever CuPy raises where the device does not work.
    """

    def __init__(self, index: int = 0, cupy: Any = None) -> None:
        self.cupy = import_module("cupy") if cupy is None else cupy
        self.index = index
        self.bytes_to_host = 0
        self._modules: dict[tuple[str, Defines], Any] = {}
        self._kernels: dict[tuple[str, Defines, str], tuple[Any, int]] = {}  # with the shared memory each may have
        self._thread = threading.local()
        self._counting, self._compiling = threading.Lock(), threading.Lock()
        cuda = self.cupy.cuda
        with cuda.Device(index):
            found = cuda.runtime.getDeviceProperties(index)
            self.stream = cuda.Stream(non_blocking=True)
            self.decoding = cuda.Stream(non_blocking=True)  # so that pictures do not wait behind inference
        self.name = str(found["name"], "utf-8") if isinstance(found["name"], bytes) else str(found["name"])
        self.capability: tuple[int, int] = (int(found["major"]), int(found["minor"]))
        self.multiprocessors = int(found["multiProcessorCount"])
        self.shared_bytes = int(found["sharedMemPerBlockOptin"])
        most = _MOST if self.multiprocessors >= _MOST else _MOST_PORTABLE
        self.most_neighbours = most if self.capability >= (9, 0) else 1  # blocks of a cluster
        self.pool = cuda.MemoryPool()

    def __repr__(self) -> str:
        return f"Cuda({self.index}, {self.name!r}, sm_{self.capability[0]}{self.capability[1]})"

    @property
    def xp(self) -> Any:
        return self.cupy

    @contextmanager
    def scope(self, stream: Any = None) -> Iterator[None]:
        """Makes device, pool and stream current in this thread; re-entrant.

        Args:
            stream: one of ours; by default that of the scope around this one, else `self.stream`.
        """
        cuda, outer = self.cupy.cuda, getattr(self._thread, "stream", None)
        stream = stream or outer or self.stream
        with cuda.Device(self.index), cuda.using_allocator(self.pool.malloc), stream:
            self._thread.stream = stream
            try:
                yield
            finally:
                self._thread.stream = outer

    def join(self) -> None:
        """Synchronises our stream with the caller's current one: earlier work on either precedes later work on both."""
        with self.cupy.cuda.Device(self.index):
            callers = self.cupy.cuda.get_current_stream()
            if callers.ptr != self.stream.ptr:
                self.stream.wait_event(callers.record())
                callers.wait_event(self.stream.record())

    def to_device(self, array: Any) -> Any:
        """Returns CuPy arrays unchanged, copies NumPy arrays, and takes others through DLPack.

        Arrays on this device are not copied.

        Raises:
            ValueError: the array is on another device.
        """
        # Before the scope, whose entry costs microseconds: this is called for every plane of every picture.
        if isinstance(array, self.cupy.ndarray) and array.device.id == self.index:
            return array
        with self.scope():
            if isinstance(array, (np.ndarray, np.generic, float, int, list, tuple)):
                return self.cupy.asarray(array)
            if on_host(array):
                return self.cupy.asarray(np.from_dlpack(array))
            if (index := int(array.__dlpack_device__()[1])) != self.index:
                raise ValueError(f"the array is on cuda:{index}, the engine on cuda:{self.index}")
            return self.cupy.from_dlpack(array)

    def to_host(self, array: Any) -> NDArray[Any]:
        """Returns a NumPy array of the same values. Waits for the stream, and counts in `bytes_to_host`."""
        if isinstance(array, np.ndarray):
            return array
        with self.scope():
            found: NDArray[Any] = array.get()
        with self._counting:
            self.bytes_to_host += found.nbytes
        return found

    def synchronize(self) -> None:
        """Waits for all launched work."""
        for stream in (self.decoding, self.stream):
            stream.synchronize()

    def launch(
        self,
        file: str,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared: int = 0,
        defines: Defines = (),
    ) -> None:
        """Starts a kernel on the stream.

        Args:
            file: of this folder, "kmeans.cu". name: of an `extern "C" __global__` function in it.
            grid, block: up to three numbers. args: CuPy arrays and NumPy scalars of the kernel's own types.
            shared: bytes of dynamic shared memory.
            defines: names and values for the preprocessor; each set is compiled once.

        Raises:
            ValueError: more shared memory than a block can have, or an empty grid.
            TooManyNeighbours: more blocks in a cluster (CLUSTER) than the device has room for.
        """
        if shared > self.shared_bytes:
            raise ValueError(f"{name} asks for {shared} bytes of shared memory, {self.name} has {self.shared_bytes}")
        if not all(grid) or not all(block):
            raise ValueError(f"{name}: a grid of {tuple(grid)} blocks of {tuple(block)} threads is empty")
        many = dict(defines).get("CLUSTER", 1) > _MOST_PORTABLE
        try:
            kernel = self._kernel(file, name, defines, max(shared, _DEFAULT_SHARED_BYTES), many=many)
            with self.scope():
                kernel(tuple(grid), tuple(block), tuple(args), shared_mem=shared)
        except self.cupy.cuda.driver.CUDADriverError as error:
            if not many:
                raise
            # Some architectures have no more, and a part of a device (MIG) may lack neighbours.
            self.most_neighbours = _MOST_PORTABLE
            raise TooManyNeighbours from error

    def _kernel(self, file: str, name: str, defines: Defines, shared: int, *, many: bool) -> Any:
        """The compiled kernel, allowed at least `shared` bytes of dynamic shared memory."""
        with self._compiling, self.cupy.cuda.Device(self.index):
            if (file, defines) not in self._modules:
                options = (STANDARD, *(f"-D{define}={value}" for define, value in defines))
                self._modules[file, defines] = self.cupy.RawModule(code=source_of(file), options=options)
            key = (file, defines, name)
            if key not in self._kernels:
                self._kernels[key] = self._modules[file, defines].get_function(name), _DEFAULT_SHARED_BYTES
                if many:
                    pointer = self._kernels[key][0].kernel.ptr
                    self.cupy.cuda.driver.funcSetAttribute(pointer, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            kernel, allowed = self._kernels[key]
            if shared > allowed:
                kernel.max_dynamic_shared_size_bytes = shared
                self._kernels[key] = kernel, shared
            return kernel
