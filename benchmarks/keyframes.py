"""Key-frames on planted scenes beside scikit-learn: scenes found, coverage, flash frames, CPU-seconds.

    python benchmarks/keyframes.py [--draws 100] [-o results.jsonl]

The videos are those of tests/planted.py: 365 vectors, 8 scenes, one of them 55 % of the video, 3 lone flash frames.
Coverage is the mean cosine of a frame to its nearest key-frame, flash frames left out. All ways run on the same draw,
one after the other; CPU-seconds are medians over the draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from environment import environment
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from planted import embedding_of, planted

from keyreel import SelectConfig
from keyreel.select import select_keyframes
from keyreel_kernels import ops_for

OPS = ops_for("cpu")


def ours(x: np.ndarray, draw: int, *, keyframes: int | None) -> list[int]:
    config = SelectConfig(keyframes=keyframes)
    found = select_keyframes(embedding_of(x), config, OPS, duration_seconds=len(x) / 2)
    return [frame.sample for frame in found.keyframes]


def scikit_learn(x: np.ndarray, draw: int, *, n_init: int) -> list[int]:
    model = KMeans(8, n_init=n_init, random_state=draw).fit(x)
    centres = model.cluster_centers_ / np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
    cosine = x @ centres.T
    inside = [np.flatnonzero(model.labels_ == j) for j in range(8)]
    return [int(rows[cosine[rows, j].argmax()]) for j, rows in enumerate(inside) if len(rows)]


WAYS: dict[str, Callable[[np.ndarray, int], list[int]]] = {
    "scikit-learn KMeans, n_init=1, K=8": lambda x, draw: scikit_learn(x, draw, n_init=1),
    "scikit-learn KMeans, n_init=10, K=8": lambda x, draw: scikit_learn(x, draw, n_init=10),
    "keyreel, K=8": lambda x, draw: ours(x, draw, keyframes=8),
    "keyreel, automatic K": lambda x, draw: ours(x, draw, keyframes=None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
    threadpool_limits(1)  # one thread, for all ways alike
    for draw in range(arguments.draws):
        x, scene = planted(draw)
        real = scene >= 0
        for name, way in WAYS.items():
            started = time.process_time()
            chosen = way(x, draw)
            seconds = time.process_time() - started
            found = len(set(scene[chosen]) - {-1})
            covered = float((x[real] @ x[chosen].T).max(1).mean())
            rows[name].append((found, covered, float((scene[chosen] < 0).sum()), len(chosen), seconds))
    for name, values in rows.items():
        table = np.array(values)
        result = {
            "case": "keyframes",
            "way": name,
            "draws": arguments.draws,
            "scenes_of_8": table[:, 0].mean(),
            "scenes_worst": table[:, 0].min(),
            "coverage": table[:, 1].mean(),
            "flashes": table[:, 2].mean(),
            "keyframes_mean": table[:, 3].mean(),
            "keyframes_most": table[:, 3].max(),
            "cpu_seconds_median": float(np.median(table[:, 4])),
            "environment": environment(),
        }
        line = json.dumps(result)
        print(line)
        if arguments.output:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
