"""Runs an ONNX graph on the CPU with few optimisations: `python -P half_runner.py GRAPH FEEDS.npz OUT.npz`.

`verify` runs graphs in half precision in this process: onnxruntime 1.31 crashes while it optimises some of them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime


def main(graph: str, given: str, got: str) -> None:
    """FEEDS.npz holds "<index>.<input>" arrays; OUT.npz gets the outputs of each feed as "<index>.<number>"."""
    feeds: dict[int, dict[str, Any]] = {}
    with np.load(given, allow_pickle=False) as file:
        for key in file.files:
            index, name = key.split(".", 1)
            feeds.setdefault(int(index), {})[name] = file[key]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    results = {
        f"{index}.{number}": array
        for index, feed in feeds.items()
        for number, array in enumerate(session.run(None, feed))
    }
    np.savez(got, allow_pickle=False, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
