"""Which runtime runs a graph on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from keyreel.errors import MissingExtra
from keyreel.runtime.sessions import OnnxRuntimeCudaSession, Session
from keyreel.runtime.tensorrt import open_tensorrt
from keyreel.runtime.tensorrt_build import library

if TYPE_CHECKING:
    from keyreel_kernels.cuda import Cuda


def open_cuda_session(path: Path, cuda: Cuda, *, batch_size: int) -> Session:
    """A graph on the device: on TensorRT where one is installed that has plans for it, else on onnxruntime's provider.

    Raises:
        MissingExtra: neither is installed.
        BackendUnavailable: the graph does not run on the device.
        ModelError: TensorRT cannot build it, or computes something else than it says.
    """
    try:
        supported = library().supports(cuda.capability)
    except MissingExtra:
        supported = False
    return open_tensorrt(path, cuda, batch_size=batch_size) if supported else OnnxRuntimeCudaSession(path, cuda)
