"""Runs ONNX graphs with onnxruntime: one session for each graph, arrays in, arrays out.

`openvino.py` and `tensorrt.py` have sessions with the same interface.
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

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra, pip_install

if TYPE_CHECKING:
    from keyreel_kernels.cuda import Cuda


class Session(Protocol):
    """A loaded graph. `run` is safe to call from several threads at once.

    Arrays are NumPy arrays on a CPU, CuPy arrays on a CUDA device.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]: ...
    def close(self) -> None: ...


class OnnxRuntimeSession:
    """A graph on onnxruntime's CPU provider. With 0 `threads` onnxruntime chooses how many one operator takes."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        runtime = import_runtime("cpu")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take cores from decoding. On two busy cores they cost up to 1.8 times the
        # CPU time of an inference; on idle cores they saved 6 % of the wall time.
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
        """One inference. Feeds must have the graph's names, dtypes and shapes.

        Raises:
            ModelError: the graph does not take such feeds.
        """
        if self._session is None:
            raise ValueError("the session is closed")
        contiguous = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        try:
            found = self._session.run(None, contiguous)
        except Exception as error:  # onnxruntime's own errors have no common public base
            raise _refused(contiguous, error) from error
        return dict(zip(self.outputs, found, strict=True))

    def close(self) -> None:
        """Frees the graph. Idempotent."""
        self._session = None


class OnnxRuntimeCudaSession:
    """A graph on onnxruntime's CUDA provider, on the device's stream. Arrays are CuPy arrays and stay on the device.

    A convolution is planned anew, for milliseconds, whenever the number of rows changes (microsoft/onnxruntime#23006).
    So frames are filled up to the most rows that came before: a video's last batch is as large as the others.
    """

    _provider, _device = "CUDAExecutionProvider", "cuda"

    def __init__(self, path: Path, cuda: Cuda) -> None:
        runtime = import_runtime("gpu")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        settings = {
            "device_id": str(cuda.index),
            "user_compute_stream": str(cuda.stream.ptr),
            "cudnn_conv_algo_search": "HEURISTIC",  # the default tries every algorithm at each plan
        }
        probe, hint = "onnxruntime on cuda", _reinstall("gpu")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot load
                runtime.preload_dlls()  # CUDA's libraries and cuDNN, from their wheels
            with cuda.scope():
                # With fallback, the CPU would replace a provider that fails.
                self._session = runtime.InferenceSession(
                    str(path), options, providers=[(self._provider, settings)], enable_fallback=0
                )
        except Exception as error:  # onnxruntime's own errors have no common public base
            message = f"{path.name} does not run on {self._provider}: {error}"
            raise BackendUnavailable(message, probe=probe, hint=hint) from error
        # In order of preference; the CPU is always last, for shape computations.
        if self._session.get_providers()[0] != self._provider:
            message = f"asked for {self._provider}, the session runs on {', '.join(self._session.get_providers())}"
            raise BackendUnavailable(message, probe=probe, hint=hint)
        self._cuda = cuda
        self._lock = threading.Lock()
        self._most = 0  # rows of frames
        # The stream keeps the order: onnxruntime need not wait at the end of a run.
        self._options = runtime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.inputs: tuple[str, ...] = tuple(node.name for node in self._session.get_inputs())
        self._dims = {node.name: node.shape[1:] for node in self._session.get_outputs()}
        self.outputs: tuple[str, ...] = tuple(self._dims)

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
            # `ascontiguousarray` would make a scalar a vector.
            arrays = {name: cuda.cupy.ascontiguousarray(a) if a.ndim else a for name, a in arrays.items()}
            rows = max((len(array) for array in arrays.values() if array.ndim), default=0)
            size = rows
            if rows and any(array.ndim > 2 for array in arrays.values()):  # not token ids
                size = self._most = max(rows, self._most)
            if size > rows:
                more = {n: cuda.cupy.repeat(a[-1:], size - rows, axis=0) for n, a in arrays.items() if a.ndim}
                arrays |= {name: cuda.cupy.concatenate([arrays[name], rest]) for name, rest in more.items()}
            found = {name: cuda.cupy.empty((size, *dims), np.float32) for name, dims in self._dims.items()}
            binding = session.io_binding()
            try:
                for bind, bound in ((binding.bind_input, arrays), (binding.bind_output, found)):
                    for name, array in bound.items():
                        bind(name, self._device, cuda.index, array.dtype.type, array.shape, array.data.ptr)
                with self._lock:
                    session.run_with_iobinding(binding, self._options)
            except Exception as error:  # onnxruntime's own errors have no common public base
                raise _refused(arrays, error) from error
            return {name: array[:rows] for name, array in found.items()}

    def close(self) -> None:
        """Frees the graph, after all work on the stream is done. Idempotent."""
        if self._session is not None:
            self._cuda.synchronize()
        self._session = None


def _refused(feeds: Mapping[str, Any], error: Exception) -> ModelError:
    shapes = {name: (array.dtype.name, array.shape) for name, array in feeds.items()}
    return ModelError(f"the graph does not take {shapes}: {error}", hint="export the model again")


def import_runtime(extra: str) -> Any:
    """Imports onnxruntime, of the extra "cpu" or "gpu".

    Raises:
        MissingExtra: it is not installed.
        BackendUnavailable: it is installed but broken.
    """
    found = "it has no InferenceSession"  # leftovers after one of its two wheels was uninstalled
    try:
        runtime = import_extra("onnxruntime", extra=extra, purpose="running a model")
        if hasattr(runtime, "InferenceSession"):
            return runtime
    except MissingExtra:
        raise
    except ImportError as error:
        found = str(error)
    message = f"the package onnxruntime is installed but broken: {found}"
    raise BackendUnavailable(message, probe="onnxruntime", hint=_reinstall(extra))


def _reinstall(extra: str) -> str:
    return f"pip uninstall -y onnxruntime onnxruntime-gpu && {pip_install(extra)}"
