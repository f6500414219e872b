"""Runs ONNX graphs on a CPU with OpenVINO."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra
from keyreel.runtime.bundle import cache_root

Precision = Literal["f32", "bf16"]

_CACHE_SECONDS = 30 * 86400.0  # OpenVINO never deletes graphs compiled for older versions
_dtypes = threading.Lock()


def image_precision() -> Precision:
    """The precision of the image tower: bf16 if the CPU supports it, else float32.

    With AVX512_BF16, bf16 ran four towers 1.5 to 2.1 times as fast, with tokens at cosine >= 0.99997.
    """
    return "bf16" if "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


class OpenVINOSession:
    """A graph on OpenVINO's CPU device, for any number of rows. Safe to share between threads.

    Only the backbone, which takes most of the time, may run in bf16. The compiled graph is cached in the user's cache
    folder. With 0 `threads` OpenVINO chooses the number of threads.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        core, cache = _core(), cache_root() / "openvino"
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": image_precision() if path.stem == "backbone" else "f32",
            # Several streams of a few cores share the rows of a call, which takes 5 to 20 % less CPU time than all
            # cores at each operator, but makes a single row slower: texts come one at a time.
            "PERFORMANCE_HINT": "LATENCY" if path.stem == "text" else "THROUGHPUT",
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        with contextlib.suppress(OSError):  # without a cache each start compiles, for a second
            cache.mkdir(parents=True, exist_ok=True)
            settings["CACHE_DIR"] = str(cache)
        try:
            self._model = core.compile_model(str(path), "CPU", settings)
        except Exception as error:  # OpenVINO's own errors have no common public base
            raise ModelError(f"{path} cannot be loaded: {error}", hint="export the model again") from error
        if not self._model.get_property("LOADED_FROM_CACHE"):
            _delete_stale(cache)
        self._name = path.name
        self._streams = int(self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._ports = {port.any_name: port for port in self._model.inputs}
        # Two threads in a process's first `to_dtype` deadlock (OpenVINO 2026.4: a C++ static made under the GIL).
        with _dtypes:
            self._types = {name: port.element_type.to_dtype() for name, port in self._ports.items()}
        self.inputs: tuple[str, ...] = tuple(self._ports)
        # `any_name` of an output may be that of an inner tensor; its node has the graph's name.
        nodes = (port.node.friendly_name for port in self._model.outputs)
        self.outputs: tuple[str, ...] = tuple(name.removesuffix("/sink_port_0") for name in nodes)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One inference. Feeds must have the graph's names, dtypes and shapes.

        Raises:
            ModelError: the graph does not take such feeds.
        """
        if self._model is None:
            raise ValueError("the session is closed")
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        rows = self._rows(arrays)
        # The split depends only on the number of rows, so that two runs agree bit by bit.
        size = -(-rows // self._streams)
        parts = [
            {name: array[start : start + size] if array.ndim else array for name, array in arrays.items()}
            for start in range(0, rows, size)
        ]
        requests = [self._model.create_infer_request() for _ in parts]  # 0.02 ms each; shared ones would need a lock
        try:
            for request, part in zip(requests, parts, strict=True):
                request.start_async(part, share_inputs=True)
            for request in requests:
                request.wait()
        except Exception as error:  # OpenVINO's own errors have no common public base
            for request in requests:  # a running request still reads the feeds
                with contextlib.suppress(Exception):
                    request.wait()
            raise ModelError(f"{self._name} cannot be run: {error}", hint="export the model again") from error
        results = zip(*([tensor.data for tensor in request.output_tensors] for request in requests), strict=True)
        return {name: np.concatenate(pieces) for name, pieces in zip(self.outputs, results, strict=True)}

    def _rows(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Checks the feeds, and returns their number of rows. OpenVINO would cast other dtypes."""
        import openvino

        fits = arrays.keys() == self._ports.keys() and all(
            array.dtype == self._types[name]
            and self._ports[name].partial_shape.compatible(openvino.PartialShape(list(array.shape)))
            for name, array in arrays.items()
        )
        sizes = {len(array) for array in arrays.values() if array.ndim}
        if not fits or len(sizes) != 1 or sizes == {0}:
            expected = {name: (str(port.element_type), str(port.partial_shape)) for name, port in self._ports.items()}
            got = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
            raise ModelError(f"{self._name} takes {expected}, got {got}", hint="export the model again")
        return sizes.pop()

    def close(self) -> None:
        """Frees the graph. Wait for running calls first. Idempotent."""
        self._model = None
        self._ports = {}


def _delete_stale(cache: Path) -> None:
    for blob in cache.glob("*.blob"):
        with contextlib.suppress(OSError):  # deleted by another process, or owned by another user
            seen = blob.stat()
            if max(seen.st_atime, seen.st_mtime) < time.time() - _CACHE_SECONDS:
                blob.unlink()


@functools.cache
def _core() -> Any:
    # On import OpenVINO reports to Google Analytics, from a forked process, unless this package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_extra("openvino", extra="openvino", purpose="running a model on OpenVINO").Core()
    except MissingExtra:
        raise
    except Exception as error:  # ImportError of a broken wheel, or OpenVINO's own error
        hint = "pip install --force-reinstall openvino, or set KEYREEL_CPU_RUNTIME=onnxruntime"
        raise BackendUnavailable(f"OpenVINO does not start: {error}", probe="openvino", hint=hint) from error
