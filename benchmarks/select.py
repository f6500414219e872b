"""k-means beside scikit-learn.

Case "select": T unit vectors in K clusters. `objective` is the mean cosine of a frame to the mean direction of its
cluster, from the labels alone: more is better. "scenes" are vectors as a video's frames have them: as many scenes as
clusters, of all lengths, in a narrow cone, each with a slow drift and noise. "cloud" has no structure but a subspace
of 16 dimensions, and no order in time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks._common import Row, System, compare, parser_of, run

WIDTH = 512
_SIZES = (("scenes", 300, 8), ("scenes", 3_000, 32), ("cloud", 3_000, 32), ("scenes", 30_000, 32))


def cloud(frames: int, width: int = WIDTH) -> Any:
    """[T, D] float32 unit vectors near a subspace of 16 dimensions: k-means takes tens of rounds, as on real frames."""
    random = np.random.default_rng(0)
    basis = random.standard_normal((16, width), np.float32) / 4
    x = random.standard_normal((frames, 16), np.float32) @ basis
    x += 0.3 * random.standard_normal(x.shape, np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scenes(frames: int, clusters: int, width: int = WIDTH) -> Any:
    """[T, D] float32 unit vectors of as many scenes as clusters, in order of time."""
    random = np.random.default_rng(0)
    bounds = np.sort(random.choice(np.arange(1, frames), clusters - 1, replace=False))
    scene = np.searchsorted(bounds, np.arange(frames), side="right")
    directions = random.standard_normal((2, clusters, width), np.float32) / width**0.5  # what it shows, its drift
    starts = np.concatenate([[0], bounds])
    place = ((np.arange(frames) - starts[scene]) / np.bincount(scene)[scene])[:, None].astype(np.float32) * 2 - 1
    noise = random.standard_normal((frames, width), np.float32) / width**0.5
    cone = random.standard_normal(width, np.float32) / width**0.5
    x = 0.8 * cone + 0.6 * directions[0][scene] + 0.35 * place * directions[1][scene] + 0.25 * noise
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def objective(x: Any, labels: Any) -> float:
    """Mean cosine of a vector to the mean direction of its cluster."""
    sums = np.zeros((int(labels.max()) + 1, x.shape[1]))
    np.add.at(sums, labels, x.astype(np.float64))
    return float(np.linalg.norm(sums, axis=1).sum() / len(x))


def check(x: Any, labels: Any) -> dict[str, float]:
    return {"objective": objective(x, np.asarray(labels, np.int64).ravel())}


def keyreel(x: Any, count: int) -> peers.Run:
    """Farthest-first seeds and spherical k-means with repulsion, as for a given number of key-frames."""
    from keyreel import SelectConfig
    from keyreel_kernels import ops_for

    ops, config, weights = ops_for("cpu"), SelectConfig(), np.ones(len(x), np.float32)
    whole, k = np.array([[0, len(x)]], np.int64), np.array([count], np.int64)
    options = {"penalty": config.penalty, "margin": config.margin, "iterations": 30}

    def cluster() -> Any:
        seeds, _ = ops.seed(x, weights, whole[0], count)
        return ops.cluster(x, weights, whole, k, seeds, **options).labels

    return cluster


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for data, frames, clusters in (("scenes", 120, 4),) if options.quick else _SIZES:
        x = cloud(frames) if data == "cloud" else scenes(frames, clusters)
        systems = [
            System("keyreel", partial(keyreel, x, clusters), partial(check, x)),
            System("scikit-learn n_init=1", partial(peers.scikit_learn, x, clusters), partial(check, x)),
        ]
        params = {"data": data, "frames": frames, "clusters": clusters, "width": WIDTH}
        yield from compare("select", params, systems, runs=5, seconds=2 if options.quick else 15)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
