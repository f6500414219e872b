"""What the TensorRT plans of a bundle in half precision are checked against; `keyreel.runtime.tensorrt` builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel.runtime.plans import REFERENCE
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
