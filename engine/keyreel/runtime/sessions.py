"""Runs ONNX graphs: one Session a graph, arrays in, arrays out.

`keyreel.runtime.tensorrt` has the session for TensorRT, `keyreel.runtime.openvino` the one for OpenVINO.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra

if TYPE_CHECKING:
    from keyreel_kernels.cuda import Cuda

# onnxruntime's names of the element types that a bundle's graphs give.
_DTYPES = {"tensor(float)": np.float32}


class Session(Protocol):
    """A loaded graph. `run` is safe to call from several threads at once.

    The arrays are NumPy's on a CPU, CuPy's on a CUDA device.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...
    def close(self) -> None: ...


class OnnxRuntimeSession:
    """A graph on onnxruntime's CPU provider.

    Args:
        path: the .onnx file.
        threads: threads inside one operator; 0 takes what onnxruntime finds.

    Raises:
        MissingExtra: onnxruntime is not installed.
        ModelError: the graph cannot be loaded.
        BackendUnavailable: the session runs elsewhere than asked.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        runtime = import_runtime("cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for the next operator by spinning take the cores that decoding needs: on two cores beside
        # other work they made an inference of one frame cost up to 1.8 times the CPU time, and gained 6 % of the wall
        # time when nothing else ran. Memory arena, memory pattern, denormals as zero and lower levels of optimisation
        # were tried and gained nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors have no common public base
            raise ModelError(f"{path} cannot be loaded: {error}", hint="export the model again") from error
        if self._session.get_providers() != ["CPUExecutionProvider"]:
            got = ", ".join(self._session.get_providers())
            raise BackendUnavailable(f"asked for the CPU, the session runs on {got}", probe="onnxruntime")
        self.inputs: tuple[str, ...] = tuple(node.name for node in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(node.name for node in self._session.get_outputs())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One inference. Feeds must have the graph's names, dtypes and shapes."""
        if self._session is None:
            raise ValueError("the session is closed")
        contiguous = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        try:
            found = self._session.run(None, contiguous)
        except Exception as error:  # onnxruntime's own errors have no common public base
            shapes = {name: (array.dtype.name, array.shape) for name, array in contiguous.items()}
            raise ModelError(f"the graph does not take {shapes}: {error}", hint="export the model again") from error
        return dict(zip(self.outputs, found, strict=True))

    def close(self) -> None:
        """Frees the graph. Idempotent."""
        self._session = None


class OnnxRuntimeCudaSession:
    """A graph on onnxruntime's CUDA provider, on the device's stream; arrays are CuPy's and stay where they are.

    Args:
        path: the .onnx file.
        cuda: the device.

    Raises:
        MissingExtra: onnxruntime is not installed.
        BackendUnavailable: the session does not run on the device.
    """

    _provider, _device = "CUDAExecutionProvider", "cuda"

    def __init__(self, path: Path, cuda: Cuda) -> None:
        runtime = import_runtime("gpu")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        settings = {"device_id": str(cuda.index), "user_compute_stream": str(cuda.stream.ptr)}
        hint = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'keyreel[gpu]'"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot load
                runtime.preload_dlls()  # CUDA's libraries and cuDNN, from the wheels beside it
            with cuda.scope():
                # By default it prints that the provider fails, and takes the CPU.
                self._session = runtime.InferenceSession(
                    str(path), options, providers=[(self._provider, settings)], enable_fallback=0
                )
        except Exception as error:  # onnxruntime's own errors have no common public base
            message = f"{path.name} does not run on {self._provider}: {error}"
            raise BackendUnavailable(message, probe="onnxruntime on cuda", hint=hint) from error
        # It holds what the session runs on, in order; the CPU always stands last, for what computes shapes.
        if self._session.get_providers()[0] != self._provider:
            message = f"asked for {self._provider}, the session runs on {', '.join(self._session.get_providers())}"
            raise BackendUnavailable(message, probe="onnxruntime on cuda", hint=hint)
        self._cuda = cuda
        self._lock = threading.Lock()
        # The stream keeps the order: onnxruntime need not wait for it at the end of each run.
        self._options = runtime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs: tuple[str, ...] = tuple(node.name for node in self._session.get_inputs())
        self._results = {node.name: (_DTYPES[node.type], node.shape[1:]) for node in self._session.get_outputs()}
        self.outputs: tuple[str, ...] = tuple(self._results)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """One inference. Feeds must have the graph's names, dtypes and shapes; NumPy arrays are copied to the device.

        Raises:
            ModelError: the graph does not take such feeds.
        """
        session, cuda = self._session, self._cuda
        if session is None:
            raise ValueError("the session is closed")
        with cuda.scope():
            arrays = {name: cuda.to_device(array) for name, array in feeds.items()}
            # A scalar stays as it is: made contiguous it would become a vector.
            arrays = {name: cuda.cupy.ascontiguousarray(a) if a.ndim else a for name, a in arrays.items()}
            rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
            found = {name: cuda.cupy.empty((rows, *dims), dtype) for name, (dtype, dims) in self._results.items()}
            binding = session.io_binding()
            try:
                for bind, bound in ((binding.bind_input, arrays), (binding.bind_output, found)):
                    for name, array in bound.items():
                        bind(name, self._device, cuda.index, array.dtype.type, array.shape, array.data.ptr)
                with self._lock:
                    session.run_with_iobinding(binding, self._options)
            except Exception as error:  # onnxruntime's own errors have no common public base
                shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
                raise ModelError(f"the graph does not take {shapes}: {error}", hint="export the model again") from error
            return found

    def close(self) -> None:
        """Frees the graph, when all that was put on the stream is done. Idempotent."""
        if self._session is not None:
            self._cuda.synchronize()
        self._session = None


def import_runtime(extra: str) -> Any:
    """The package onnxruntime, as the extra "cpu" or "gpu" brings it.

    Raises:
        MissingExtra: it is not installed.
        BackendUnavailable: it is there but broken.
    """
    found = "it has no InferenceSession"  # what is left when one of its two wheels is removed after both were installed
    try:
        runtime = import_extra("onnxruntime", extra=extra, purpose="running a model")
        if hasattr(runtime, "InferenceSession"):
            return runtime
    except MissingExtra:
        raise
    except ImportError as error:
        found = str(error)
    hint = f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'keyreel[{extra}]'"
    raise BackendUnavailable(f"the package onnxruntime is there but broken: {found}", probe="onnxruntime", hint=hint)
