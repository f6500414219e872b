"""Runs TensorRT plans: CuPy arrays in, CuPy arrays out.

A plan runs in execution contexts of two kinds, each used by one thread at a time. Contexts for whole batches never
change shape, so their work is captured once as a CUDA graph and replayed. Contexts for the rest of a batch change
shape, which a captured graph does not allow. Each context has its own buffers at fixed addresses. All work goes to the
one stream of the device, which keeps the order when a context moves to another thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import BackendError, ModelError, OutOfMemory, PlanStale
from keyreel.runtime.bundle import GRAPHS, Bundle
from keyreel.runtime.plans import Arrays, PlanKey, Signature, building, check_plan, read_plan, write_plan
from keyreel.runtime.tensorrt_build import Profile, build_plan, load_tensorrt, profile_for
from keyreel.types import Progress

if TYPE_CHECKING:
    from keyreel_kernels.cuda import Cuda

# Contexts of each kind; more threads wait. Enqueueing a batch takes far less time than computing it.
_MAX_CONTEXTS = 2
_log = logging.getLogger("keyreel.tensorrt")


def open_tensorrt(path: Path, cuda: Cuda, *, batch_size: int, progress: Progress | None = None) -> TensorRTSession:
    """Opens a session of a graph on its cached plan. If none fits, it builds one, which takes seconds to minutes.

    Args:
        batch_size: frames in one inference.
        progress: called during a build, as progress("plan backbone", done, 1.0).
    """
    profile = profile_for(path.stem, batch_size)
    key = PlanKey.of(path, cuda.name, cuda.capability, profile)
    try:
        return TensorRTSession(read_plan(key), cuda, profile, name=path.name)
    except PlanStale as error:
        _log.info("%s: %s", path.name, error)
    with building(key):
        with contextlib.suppress(PlanStale):  # another process may have built it meanwhile
            return TensorRTSession(read_plan(key), cuda, profile, name=path.name)
        with cuda.scope():  # it times its choices on the current device
            plan = build_plan(path, profile, capability=cuda.capability, timing_cache=key.timings(), progress=progress)
        session = TensorRTSession(plan, cuda, profile, name=path.name)
        try:
            cosines = check_plan(path, session.signature, profile.largest, session.run_on_host)
            write_plan(key, plan, cosines)
        except BaseException:
            session.close()
            raise
    if progress is not None:
        progress(f"plan {path.stem}", 1.0, 1.0)
    return session


def build_plans(bundle: Bundle, cuda: Cuda, *, batch_size: int, progress: Progress | None = None) -> None:
    """Builds the missing plans of a bundle, see `open_tensorrt`.

    Raises:
        ModelError: an int8 model, or a plan that cannot be built or gives other values than the graph.
    """
    if bundle.precision == "int8":
        raise ModelError(f"{bundle.name} is in int8, which is for CPUs", hint="take its fp32 or fp16")
    for graph in GRAPHS:
        open_tensorrt(bundle.file(graph), cuda, batch_size=batch_size, progress=progress).close()


class TensorRTSession:
    """A plan, on the device and for the batch sizes of `build_plan`.

    `run` is safe to call from several threads at once.
    """

    def __init__(self, plan: bytes, cuda: Cuda, profile: Profile, *, name: str) -> None:
        self.profile, self._cuda, self._name = profile, cuda, name
        found = load_tensorrt()
        found.complaints.clear()
        with cuda.scope():
            self._runtime = found.module.Runtime(found.logger)
            engine = self._engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise PlanStale(f"TensorRT does not take the plan of {name}: {found.reason()}", hint="build it again")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self._tensors: Signature = {
            name: (
                np.dtype(found.module.nptype(engine.get_tensor_dtype(name))),
                shapes[name][1:] if shapes[name] else None,
            )
            for name in names
        }
        mode = found.module.TensorIOMode.INPUT
        self.inputs: tuple[str, ...] = tuple(name for name in names if engine.get_tensor_mode(name) == mode)
        self.outputs: tuple[str, ...] = tuple(name for name in names if name not in self.inputs)
        self._lock = threading.Lock()
        # None: a context to make when needed. Last in, first out, so that few are made.
        self._contexts: dict[bool, queue.LifoQueue[_Context | None]]
        self._contexts = {whole: queue.LifoQueue() for whole in (True, False)}
        for contexts in self._contexts.values():
            for _ in range(_MAX_CONTEXTS):
                contexts.put(None)

    @property
    def signature(self) -> Signature:
        """dtype and shape of each input."""
        return {name: self._tensors[name] for name in self.inputs}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs any number of rows: in largest batches, then the padded rest.

        Takes and gives CuPy arrays, ready on the device's stream; copies NumPy arrays to the device.

        Raises:
            ValueError: the session is closed.
        """
        if self._engine is None:
            raise ValueError("the session is closed")
        with self._cuda.scope():
            arrays = {name: self._cuda.to_device(array) for name, array in feeds.items()}
            rows, largest = self._rows(arrays), self.profile.largest
            found = {name: self.empty(name, rows) for name in self.outputs}
            for start in range(0, rows, largest):
                stop = min(start + largest, rows)
                with self._context(whole=stop - start == largest) as context:
                    context.run(arrays, found, slice(start, stop))
            return found

    def run_on_host(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """`run` with NumPy arrays in and out."""
        return {name: self._cuda.to_host(array) for name, array in self.run(feeds).items()}

    def close(self) -> None:
        """Frees the plan and its contexts. Wait for running calls first. Idempotent."""
        if self._engine is not None:
            self._cuda.synchronize()  # work on the stream must not outlive its contexts
        self._contexts = {}
        self._engine = self._runtime = None

    def empty(self, name: str, rows: int) -> Any:
        """Allocates an array for a tensor on the device."""
        dtype, dims = self._tensors[name]
        return self._cuda.cupy.empty(() if dims is None else (rows, *dims), dtype)

    def _rows(self, arrays: Mapping[str, Any]) -> int:
        got = {name: (array.dtype, tuple(array.shape[1:]) if array.ndim else None) for name, array in arrays.items()}
        sizes = {len(array) for array in arrays.values() if array.ndim}
        if got != self.signature or len(sizes) != 1:
            shapes = ", ".join(f"{name} {array.dtype} {tuple(array.shape)}" for name, array in arrays.items())
            raise ModelError(f"{self._name} takes {self.signature}, got {shapes}", hint="export the model again")
        return sizes.pop()

    @contextlib.contextmanager
    def _context(self, *, whole: bool) -> Iterator[_Context]:
        """A context for this thread alone, during the block. It is dropped after an error."""
        contexts, kept = self._contexts[whole], None
        context = contexts.get()
        try:
            if context is None:
                with self._lock:
                    context = _Context(self, self._engine, self._cuda, whole=whole)
            yield context
            kept = context
        finally:
            contexts.put(kept)


class _Context:
    """An execution context with its buffers, for one thread at a time."""

    def __init__(self, session: TensorRTSession, engine: Any, cuda: Cuda, *, whole: bool) -> None:
        self._profile, self._inputs, self._cuda = session.profile, session.inputs, cuda
        self._graph: Any = None
        self._may_capture = whole
        self._rows = 0
        hint = "free memory on the device"
        try:
            self._context = engine.create_execution_context()
            names = (*session.inputs, *session.outputs)
            self._buffers = {name: session.empty(name, session.profile.largest) for name in names}
        except MemoryError as error:  # CuPy's error is one
            raise OutOfMemory(f"{cuda.name}: no memory for an execution context", hint=hint) from error
        if self._context is None:
            raise OutOfMemory(f"{cuda.name}: no execution context: {load_tensorrt().reason()}", hint=hint)
        for name, buffer in self._buffers.items():
            self._demand(self._context.set_tensor_address(name, buffer.data.ptr), f"no address for {name}")

    def run(self, feeds: Mapping[str, Any], found: Mapping[str, Any], rows: slice) -> None:
        """Computes `rows` of the feeds into the same rows of `found`."""
        count = rows.stop - rows.start
        size = self._profile.padded(count)
        for name in self._inputs:
            buffer, feed = self._buffers[name], feeds[name]
            if not feed.ndim:
                buffer[...] = feed
                continue
            buffer[:count] = feed[rows]
            if size > count:  # pad with a row of the feed: an old token id may be outside the vocabulary
                buffer[count:size] = buffer[count - 1 : count]
        if size != self._rows:
            self._rows = 0
            for name in self._inputs:
                if self._buffers[name].ndim:
                    shape = (size, *self._buffers[name].shape[1:])
                    self._demand(self._context.set_input_shape(name, shape), f"{name} may not be {shape}")
            self._rows = size
        self._execute()
        for name, array in found.items():
            array[rows] = self._buffers[name][:count]

    def _execute(self) -> None:
        if self._graph is not None:
            self._graph.launch(stream=self._cuda.stream)
            return
        self._demand(self._context.execute_async_v3(self._cuda.stream.ptr), "an inference failed")
        if self._may_capture:
            self._may_capture = False
            self._capture()

    def _capture(self) -> None:
        """Records an inference as a CUDA graph. If that fails, each inference is enqueued."""
        runtime = self._cuda.cupy.cuda.runtime
        # On its own stream, so that work of other threads is not recorded.
        stream = self._cuda.cupy.cuda.Stream(non_blocking=True)
        self._cuda.synchronize()
        try:
            stream.begin_capture(runtime.streamCaptureModeThreadLocal)
            try:
                accepted = self._context.execute_async_v3(stream.ptr)
            finally:
                graph = stream.end_capture()
        except Exception as error:  # noqa: BLE001  CuPy's own errors have no common public base
            _log.info("no CUDA graph: %s", error)
        else:
            self._graph = graph if accepted else None

    def _demand(self, accepted: bool, complaint: str) -> None:
        if not accepted:
            raise BackendError(f"TensorRT: {complaint}: {load_tensorrt().reason()}", hint="use --device cpu")
