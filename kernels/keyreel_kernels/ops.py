"""The table of operations. A device brings its own column; `ops_for` picks it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from keyreel_kernels import clustering, cpu_kmeans, cpu_search, pictures, reference
from keyreel_kernels.arrays import Arrays, HostArrays
from keyreel_kernels.cuda import Cuda

Operation = Callable[..., Any]
# Each launcher stands in one of these, under the name of the definition; its first argument is the device.
_LAUNCHERS = ("cuda_frames", "cuda_patches", "cuda_kmeans")
_HOST = HostArrays()
_DEVICE = re.compile(r"cuda:(\d+)")


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every operation, with the signature of its NumPy definition, which is the default."""

    device: str
    arrays: Arrays = _HOST
    yuv_to_rgb: Operation = pictures.yuv_to_rgb
    resize: Operation = pictures.resize
    transform: Operation = pictures.transform
    frames_from_surfaces: Operation = pictures.frames_from_surfaces
    normalise: Operation = pictures.normalise
    frame_signals: Operation = pictures.frame_signals
    histogram_distance: Operation = pictures.histogram_distance
    fixed_shift: Operation = reference.fixed_shift
    adaptive_shift: Operation = reference.adaptive_shift
    shift_tokens: Operation = reference.shift_tokens
    shift_pixels: Operation = reference.shift_pixels
    weighted_pool: Operation = reference.weighted_pool
    top_k: Operation = reference.top_k
    temporal_support: Operation = clustering.temporal_support
    seed: Operation = clustering.seed
    assign: Operation = clustering.assign
    objective: Operation = clustering.objective
    update: Operation = clustering.update
    relocate: Operation = clustering.relocate
    cluster: Operation = clustering.cluster
    representatives: Operation = clustering.representatives


def ops_for(device: str) -> Ops:
    """The operations of a device: "cpu" or "cuda:N".

    Raises:
        ValueError: there is no implementation for it.
        ImportError: CuPy is not installed.
        Exception: whatever CuPy raises where the device does not work.
    """
    if device == "cpu":
        # What has a faster form than its definition.
        return Ops(
            device="cpu",
            top_k=cpu_search.top_k,
            temporal_support=cpu_kmeans.temporal_support,
            seed=cpu_kmeans.seed,
            assign=cpu_kmeans.assign,
            cluster=cpu_kmeans.cluster,
            representatives=cpu_kmeans.representatives,
        )
    if named := _DEVICE.fullmatch(device):
        return ops_on(Cuda(int(named[1])))
    raise ValueError(f"no operations for device {device!r}, there are: cpu, cuda:N")


def ops_on(cuda: Cuda) -> Ops:
    """The operations of a CUDA device that is open.

    Each takes CuPy arrays for data and NumPy arrays for what only steers (spans, numbers of clusters, offsets), and
    gives CuPy arrays.
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
