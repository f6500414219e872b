"""k-means over the vectors of a video's frames: keyreel, scikit-learn, faiss, a few lines of NumPy.

`objective` is the mean cosine of a frame to the mean direction of its cluster, from the labels alone: more is better.
Data "scenes" are vectors as a video's frames have them: as many scenes as clusters, of all lengths, in a narrow cone,
each with a slow drift and noise. Data "cloud" have no structure but a subspace of 16 dimensions, and no order in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu_cases.clustering import Problem, problem, quality
from benchmarks.measure import Folders, Measurement, Params, Prepare
from benchmarks.peers import clusterers

SIZES = (("scenes", 300, 8), ("scenes", 3_000, 32), ("cloud", 3_000, 32), ("scenes", 30_000, 32))
TEN = "scikit-learn n_init=10"


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    sizes = (("scenes", 120, 4),) if quick else SIZES
    return [
        Measurement(
            "select",
            {"data": data, "frames": frames, "clusters": clusters, "width": 512},
            tuple(name for name in SYSTEMS if name != TEN or frames < 10_000),  # it takes ten times the one above
            runs=5,
            seconds=2 if quick else 15,
        )
        for data, frames, clusters in sizes
    ]


def given(params: Params) -> Problem:
    frames, width, clusters = params["frames"], params["width"], params["clusters"]
    if params["data"] == "cloud":
        return problem(1, frames, width, clusters)
    random = np.random.default_rng(0)
    bounds = np.sort(random.choice(np.arange(1, frames), clusters - 1, replace=False))
    scene = np.searchsorted(bounds, np.arange(frames), side="right")
    directions = random.standard_normal((2, clusters, width), np.float32) / width**0.5  # what it shows, its drift
    starts = np.concatenate([[0], bounds])
    place = ((np.arange(frames) - starts[scene]) / np.bincount(scene)[scene])[:, None].astype(np.float32) * 2 - 1
    noise = random.standard_normal((frames, width), np.float32) / width**0.5
    cone = random.standard_normal(width, np.float32) / width**0.5
    x = 0.8 * cone + 0.6 * directions[0][scene] + 0.35 * place * directions[1][scene] + 0.25 * noise
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Problem(x[None], np.sort(random.choice(frames, (1, clusters), replace=False)))


def ready(params: Params, folders: Folders) -> None:
    pass


def _system(make: Callable[..., clusterers.Cluster], **options: Any) -> Prepare:
    return lambda params, folders: make(given(params).x[0], params["clusters"], **options)


SYSTEMS: dict[str, Prepare] = {
    "keyreel": _system(clusterers.keyreel),
    "keyreel without repulsion": _system(clusterers.keyreel, penalty=0.0),
    "scikit-learn n_init=1": _system(clusterers.scikit_learn, n_init=1),
    TEN: _system(clusterers.scikit_learn, n_init=10),
    "faiss niter=25": _system(clusterers.faiss),
    "numpy": _system(clusterers.numpy_lloyd),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    return {"objective": quality(given(params), result[None])["fit"]}
