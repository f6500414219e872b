"""The table of operations, and the functions that fill it for a device."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from keyreel_kernels import clustering, pictures, shift
from keyreel_kernels.arrays import Arrays, HostArrays
from keyreel_kernels.cuda import Cuda

Operation = Callable[..., Any]
# A launcher has the name of its definition; the first argument is the device.
_LAUNCHERS = ("cuda_pictures", "cuda_shift", "cuda_kmeans")
_HOST = HostArrays()
_DEVICE = re.compile(r"cuda:(\d+)")


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of each operation; by default the NumPy definitions.

    Other devices have the same signatures.
    """

    device: str
    arrays: Arrays = _HOST
    transform: Operation = pictures.transform
    frames_from_surfaces: Operation = pictures.frames_from_surfaces
    frame_signals: Operation = pictures.frame_signals
    histogram_distance: Operation = pictures.histogram_distance
    fixed_shift: Operation = shift.fixed_shift
    adaptive_shift: Operation = shift.adaptive_shift
    patch_change: Operation = shift.patch_change
    shift_tokens: Operation = shift.shift_tokens
    shift_pixels: Operation = shift.shift_pixels
    neighbour_similarity: Operation = clustering.neighbour_similarity
    seed: Operation = clustering.seed
    cluster: Operation = clustering.cluster
    representatives: Operation = clustering.representatives


def ops_for(device: str) -> Ops:
    """The operations of a device: "cpu" or "cuda:N".

    Raises:
        ValueError: there is no implementation for the device.
        ImportError: CuPy is not installed.
        Exception: CuPy's, if the device does not work.
    """
    if device == "cpu":
        return Ops("cpu")
    if named := _DEVICE.fullmatch(device):
        return ops_on(Cuda(int(named[1])))
    raise ValueError(f"no operations for device {device!r}, there are: cpu, cuda:N")


def ops_on(cuda: Cuda) -> Ops:
    """The operations of an open CUDA device.

    Data are CuPy arrays; control values (spans, numbers of clusters, offsets) are NumPy arrays. Results are CuPy
    arrays.
    """
    modules = [import_module(f"keyreel_kernels.{name}") for name in _LAUNCHERS]

    def launcher(name: str) -> Operation:
        (function,) = (getattr(module, name) for module in modules if hasattr(module, name))

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            with cuda.scope():
                return function(cuda, *args, **options)

        return run

    operations = {field.name: launcher(field.name) for field in fields(Ops) if field.name not in ("device", "arrays")}
    return Ops(device=f"cuda:{cuda.index}", arrays=cuda, **operations)
