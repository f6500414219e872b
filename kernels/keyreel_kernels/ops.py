"""The table of operations. A device brings its own column; `ops_for` picks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keyreel_kernels import clustering, reference

Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of every operation, with the signature of its NumPy definition."""

    device: str
    yuv_to_rgb: Operation = reference.yuv_to_rgb
    resize: Operation = reference.resize
    transform: Operation = reference.transform
    normalise: Operation = reference.normalise
    frame_signals: Operation = reference.frame_signals
    histogram_distance: Operation = reference.histogram_distance
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
    """The operations of a device.

    Raises:
        ValueError: there is no implementation for it.
    """
    if device != "cpu":
        raise ValueError(f"no operations for device {device!r}, there are: cpu")
    return Ops(device="cpu")
