"""Runs ONNX graphs: one Session a graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import BackendUnavailable, ModelError, import_extra


class Session(Protocol):
    """A loaded graph. `run` is safe to call from several threads at once."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...
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
        runtime = import_extra("onnxruntime", extra="cpu", purpose="running a model on the CPU")
        if not hasattr(runtime, "InferenceSession"):
            # What is left of the package when one of its two wheels was removed after both had been installed.
            raise BackendUnavailable(
                "the package onnxruntime is there but broken",
                probe="onnxruntime",
                hint="pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'keyreel[cpu]'",
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
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
