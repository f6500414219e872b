"""k-means of unit vectors x [T, D] with K clusters: each gives labels [T]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Cluster = Callable[[], Any]
ROUNDS = 25


def keyreel(x: Any, count: int, *, penalty: float | None = None) -> Cluster:
    """What a summary does for a number of key-frames: seeds from smoothed frames, spherical k-means with repulsion."""
    from keyreel import SelectConfig
    from keyreel.select import ITERATIONS
    from keyreel_kernels import ops_for

    ops, config = ops_for("cpu"), SelectConfig()
    whole, k = np.array([[0, len(x)]], np.int64), np.array([count], np.int64)
    weights = np.ones(len(x), np.float32)
    options = {
        "penalty": config.penalty if penalty is None else penalty,
        "margin": config.margin,
        "iterations": ITERATIONS,
    }

    def run() -> Any:
        _, smooth = ops.temporal_support(x, whole[0])
        seeds, _ = ops.seed(smooth, weights, whole[0], count)
        return ops.cluster(x, weights, whole, k, seeds, **options).labels

    return run


def scikit_learn(x: Any, count: int, *, n_init: int) -> Cluster:
    from sklearn.cluster import KMeans

    return lambda: KMeans(count, n_init=n_init, random_state=0).fit(x).labels_


def faiss(x: Any, count: int) -> Cluster:
    import faiss as library

    def run() -> Any:
        every = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}  # no subset, no warning
        model = library.Kmeans(x.shape[1], count, niter=ROUNDS, seed=0, spherical=True, **every)
        model.train(x)
        return model.index.search(x, 1)[1][:, 0]

    return run


def numpy_lloyd(x: Any, count: int) -> Cluster:
    """Lloyd's algorithm in a few lines, from random frames."""

    def run() -> Any:
        centres = x[np.random.default_rng(0).choice(len(x), count, replace=False)]
        labels = np.zeros(len(x), np.int64)
        for _ in range(ROUNDS):
            labels = (x @ centres.T - (centres**2).sum(1) / 2).argmax(1)
            filled = [x[labels == j] for j in range(count)]
            centres = np.stack([own.mean(0) if len(own) else old for own, old in zip(filled, centres, strict=True)])
        return labels

    return run
