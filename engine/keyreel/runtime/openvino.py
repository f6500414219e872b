"""Runs ONNX graphs on a CPU with OpenVINO."""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra
from keyreel.runtime.bundle import cache_root

Precision = Literal["f32", "bf16"]

# What was compiled and not read for so long is deleted: nobody else does it once the graph or OpenVINO is another.
_KEPT_SECONDS = 30 * 86400.0
_dtypes = threading.Lock()


def image_precision() -> Precision:
    """What the image tower is computed in: bf16 where the CPU multiplies it itself, float32 else.

    OpenVINO names BF16 where the CPU has AMX, AVX512_BF16 or AVX2_VNNI_2. On AVX512_BF16 without AMX, bf16 was 1.5 to
    2.1 times as fast as float32 for ViT-B/32, RN50, MobileCLIP2-S0 and ConvNeXt-B, with tokens at cosine >= 0.99997.

    Raises:
        MissingExtra: OpenVINO is not installed.
        BackendUnavailable: it is there but does not work.
    """
    return "bf16" if "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


def open_openvino(path: Path, *, threads: int = 0) -> OpenVINOSession:
    """A graph of a bundle, as it is best run.

    Only the backbone, where the time goes, may be in bf16: with attention, fusion and text in float32, maps sum to 1
    and vectors have unit length to float32's last digits.
    """
    precision = image_precision() if path.stem == "backbone" else "f32"
    # Texts come one by one, frames in batches.
    return OpenVINOSession(path, threads=threads, precision=precision, spread=path.stem != "text")


class OpenVINOSession:
    """A graph on OpenVINO's CPU device. Takes any number of rows without compiling anew; safe to share between threads.

    The compiled graph is kept under the user's cache folder. OpenVINO compiles again where the file's size or time, its
    own version or the CPU is another; then those that were not read for 30 days are deleted.

    Args:
        path: the .onnx file.
        threads: threads in all; 0 takes what OpenVINO finds.
        precision: what the graph is computed in; inputs and outputs stay as they are.
        spread: shares the rows of a call out to streams of few cores each, where otherwise each operator goes to all
            cores. It costs 5 to 20 % less CPU time, and a lone row takes longer.

    Raises:
        MissingExtra: OpenVINO is not installed.
        BackendUnavailable: it is there but does not work.
        ModelError: the graph cannot be loaded.
    """

    def __init__(self, path: Path, *, threads: int = 0, precision: Precision = "f32", spread: bool = False) -> None:
        core = _core()
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "THROUGHPUT" if spread else "LATENCY",
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        cache = cache_root() / "openvino"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            settings["CACHE_DIR"] = str(cache)
        except OSError:
            pass  # compiled at each start, then, which takes a second more
        try:
            self._model = core.compile_model(str(path), "CPU", settings)
            self._streams = int(self._model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
            self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
            for _ in range(self._streams):
                self._idle.put(self._model.create_infer_request())
        except Exception as error:  # OpenVINO's own errors have no common public base
            raise ModelError(f"{path} cannot be loaded: {error}", hint="export the model again") from error
        if not self._model.get_property("LOADED_FROM_CACHE"):
            _forget_stale(cache)
        self._name = path.name
        self._ports = {port.any_name: port for port in self._model.inputs}
        # The first `to_dtype` of a process fills a table and lets other threads run meanwhile: two that are in it at
        # the same time wait for each other for ever (OpenVINO 2026.4: a static of C++ that is made under the GIL).
        with _dtypes:
            self._types = {name: port.element_type.to_dtype() for name, port in self._ports.items()}
        self.inputs: tuple[str, ...] = tuple(self._ports)
        # A port may have names of inner tensors too, in no order; its node is called as the graph's output.
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
        if any(array.ndim and not len(array) for array in arrays.values()):
            # OpenVINO refuses it too, but the request that was given it may refuse what follows as well.
            raise ModelError(f"{self._name} cannot be run on no rows at all", hint="give it at least one frame or text")
        # How the rows are shared out hangs on their number alone, never on which streams are idle: products of other
        # sizes may round otherwise, and two runs must agree.
        size = max(-(-rows // self._streams), 1)
        parts = [
            {name: array[start : start + size] if array.ndim else array for name, array in arrays.items()}
            for start in range(0, max(rows, 1), size)
        ]
        # One request for certain, the others where no other thread has them.
        requests = [self._idle.get()]
        while len(requests) < len(parts) and not self._idle.empty():
            try:
                requests.append(self._idle.get_nowait())
            except queue.Empty:
                break
        try:
            found = [
                result
                for start in range(0, len(parts), len(requests))
                for result in self._at_once(requests, parts[start : start + len(requests)])
            ]
        finally:
            for request in requests:
                self._idle.put(request)
        return {name: np.concatenate(pieces) for name, *pieces in zip(self.outputs, *found, strict=True)}

    def _at_once(self, requests: Sequence[Any], parts: Sequence[Mapping[str, Any]]) -> list[list[NDArray[Any]]]:
        """The outputs of each part, in order; copies, since a request's own are overwritten by its next run."""
        started: list[Any] = []
        error: Exception | None = None
        for request, part in zip(requests, parts, strict=False):
            try:
                request.start_async(part, share_inputs=True)
            except Exception as caught:  # noqa: BLE001  OpenVINO's own errors have no common public base
                error = caught
                break
            started.append(request)
        for request in started:  # all of them, also after an error: a request that runs still reads the feeds
            try:
                request.wait()
            except Exception as caught:  # noqa: BLE001  as above
                error = caught
        if error is not None:
            shapes = [{name: (array.dtype.name, array.shape) for name, array in part.items()} for part in parts]
            raise ModelError(f"{self._name} cannot be run on {shapes[0]}: {error}", hint="export the model again")
        return [[tensor.data.copy() for tensor in request.output_tensors] for request in started]

    def _rows(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """How many rows the feeds have. OpenVINO would cast what has another dtype."""
        import openvino

        fits = arrays.keys() == self._ports.keys() and all(
            array.dtype == self._types[name]
            and self._ports[name].partial_shape.compatible(openvino.PartialShape(list(array.shape)))
            for name, array in arrays.items()
        )
        sizes = {len(array) for array in arrays.values() if array.ndim}
        if not fits or len(sizes) != 1:
            wanted = {name: (str(port.element_type), str(port.partial_shape)) for name, port in self._ports.items()}
            got = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
            raise ModelError(f"{self._name} takes {wanted}, got {got}", hint="export the model again")
        return sizes.pop()

    def close(self) -> None:
        """Frees the graph; calls that are under way must have ended. Idempotent."""
        self._model = None
        self._idle = queue.SimpleQueue()
        self._ports = {}


def _forget_stale(cache: Path) -> None:
    """Deletes what was compiled and not used for long; a file system may note reads once a day or never."""
    for blob in cache.glob("*.blob"):
        with contextlib.suppress(OSError):  # another process was faster, or it is somebody else's
            seen = blob.stat()
            if max(seen.st_atime, seen.st_mtime) < time.time() - _KEPT_SECONDS:
                blob.unlink()


@functools.cache
def _core() -> Any:
    # On import OpenVINO reports to Google Analytics, from a forked process. Without this package it does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_extra("openvino", extra="openvino", purpose="running a model on OpenVINO").Core()
    except MissingExtra:
        raise
    except Exception as error:  # a broken wheel's ImportError, or OpenVINO's own, which have no common public base
        hint = "pip install --force-reinstall openvino, or set KEYREEL_CPU_RUNTIME=onnxruntime"
        raise BackendUnavailable(f"OpenVINO does not start: {error}", probe="openvino", hint=hint) from error
