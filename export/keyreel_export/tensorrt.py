"""Bundles to TensorRT plans, and what the plans of a bundle in half precision are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel.backend import resolve
from keyreel.bundle import Bundle
from keyreel.plans import REFERENCE
from keyreel.session_tensorrt import build_plans
from keyreel.types import Progress
from keyreel_export.verify import Case

_OUTPUTS = {"backbone": "tokens", "attention": "attention", "fusion": "vectors", "text": "vectors"}


def write_reference(folder: Path, cases: Mapping[str, Sequence[Case]]) -> None:
    """Writes down what torch makes of a few inputs in float32, which the graphs of half precision have lost.

    Args:
        folder: of the bundle.
        cases: of each graph; the second is taken, the one of several rows.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for graph, (_, case, *_) in cases.items():
        arrays |= {f"{graph}.{name}": array for name, array in case.feeds.items()}
        arrays[f"{graph}.{_OUTPUTS[graph]}"] = case.expected
    np.savez(folder / REFERENCE, allow_pickle=False, **arrays)


def compile_bundle(bundle: Bundle, *, device: str = "cuda", progress: Progress | None = None) -> None:
    """Builds the TensorRT plans of a bundle for a device of this machine, into the cache, unless they are there.

    Raises:
        BackendUnavailable: there is no such device.
        MissingExtra: TensorRT is not installed.
        ModelError: a plan cannot be built, or does not compute what the graph says.
    """
    backend = resolve(device)
    cuda: Any = backend.ops.arrays
    build_plans(bundle, cuda, batch_size=backend.batch_size, progress=progress)
