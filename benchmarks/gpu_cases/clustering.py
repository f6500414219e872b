"""Clustering: kmeans.cu and its peers on the same vectors from the same initial centroids.

Vectors lie near a subspace of 16 dimensions with noise around, as those of real frames do: k-means then takes tens of
rounds to come to rest, where vectors without structure are at rest after one. Everyone may stop at rest who can. Time
stands beside quality: `inertia`, the mean squared distance to the mean of the own cluster, and `fit`, the mean cosine
to it, both from the labels alone and in the same way for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.runner import Case, Row

WIDTH, CLUSTERS, ROUNDS = 512, 32, 25
SHAPES = ((256, 600), (1, 600), (1, 3000), (1, 100_000))
# SelectConfig's; repeated here since importing keyreel needs more packages than the kernels do.
PENALTY, MARGIN = 0.1, 0.8
_CHECKED_VIDEOS = 16  # quality is computed on the host


@dataclass(frozen=True, slots=True)
class Problem:
    """B videos of T frames each."""

    x: np.ndarray[Any, np.dtype[np.float32]]  # [B, T, D] unit vectors
    seeds: np.ndarray[Any, np.dtype[np.int64]]  # [B, K] frames of each video, the initial centroids

    @property
    def first(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[B, K, D] the initial centroids."""
        return np.take_along_axis(self.x, self.seeds[:, :, None], axis=1)


@lru_cache(maxsize=len(SHAPES))
def problem(videos: int, frames: int, width: int = WIDTH, clusters: int = CLUSTERS, *, seed: int = 0) -> Problem:
    random = np.random.default_rng(seed)
    basis = random.standard_normal((16, width), np.float32) / 4
    x = random.standard_normal((videos, frames, 16), np.float32) @ basis
    x += 0.3 * random.standard_normal(x.shape, np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    seeds = np.stack([np.sort(random.choice(frames, min(clusters, frames), replace=False)) for _ in range(videos)])
    return Problem(x, seeds)


def quality(given: Problem, labels: np.ndarray[Any, Any]) -> Row:
    """inertia and fit of labels [B, T], over the first videos."""
    inertia, fit, frames = 0.0, 0.0, 0
    for x, own in zip(given.x[:_CHECKED_VIDEOS], labels[:_CHECKED_VIDEOS], strict=True):
        order = np.argsort(own, kind="stable")
        starts = np.flatnonzero(np.diff(own[order], prepend=-1))
        sums = np.add.reduceat(x[order].astype(np.float64), starts, axis=0)
        counts = np.diff(np.append(starts, len(own)))
        length = (sums**2).sum(1)
        inertia += float((x.astype(np.float64) ** 2).sum() - (length / counts).sum())
        fit += float(np.sqrt(length).sum())
        frames += len(x)
    return {"inertia": inertia / frames, "fit": fit / frames, "quality_videos": min(len(labels), _CHECKED_VIDEOS)}


def keyreel(bench: Bench, videos: int, frames: int, dtype: str, penalty: float, **size: int) -> Row:
    given = problem(videos, frames, **size)
    arrays = bench.arrays
    starts = np.arange(videos, dtype=np.int64) * frames
    spans = np.stack([starts, starts + frames], axis=1)
    count = given.seeds.shape[1]
    with arrays.scope():
        x = arrays.to_device(given.x.reshape(videos * frames, -1).astype(dtype))
        weights = arrays.to_device(np.ones(len(x), np.float32))
        seeds = arrays.to_device(given.seeds + starts[:, None])

        def work() -> Any:
            return bench.ops.cluster(
                x,
                weights,
                spans,
                np.full(videos, count, np.int64),
                seeds,
                penalty=penalty,
                margin=MARGIN,
                iterations=ROUNDS,
            )

        row = bench.measure(work)
        before = arrays.bytes_to_host
        found = work()
        inside = arrays.bytes_to_host - before
        labels = arrays.to_host(found.labels).reshape(videos, frames)
        history = arrays.to_host(found.history)
    # A round that is not taken repeats the value before it.
    rounds = (np.diff(history, axis=1) != 0).sum(1)
    return {
        **row,
        **quality(given, labels),
        "rounds_mean": float(rounds.mean()),
        "rounds_most": int(rounds.max()),
        "bytes_to_host": inside,
    }


def cases() -> list[Case]:
    """All of it: ours first, so that a short run has them."""
    from benchmarks.gpu_cases import peers

    ours, others = [], []
    for videos, frames in SHAPES:
        shape = f"cluster {videos}x{frames}"
        for dtype, penalty, quick in (("float16", 0.0, True), ("float16", PENALTY, True), ("float32", PENALTY, False)):

            def own(bench: Bench, at: tuple[Any, ...] = (videos, frames, dtype, penalty)) -> Row:
                return keyreel(bench, *at)

            name = f"{shape} {dtype}: keyreel{f', penalty {penalty}' if penalty else ''}"
            ours.append(Case(name, own, seconds=6, quick=quick))
        for name, way, takes in peers.PEERS:
            if videos > 1 and not takes.batches:
                continue

            def other(bench: Bench, way: Any = way, at: tuple[int, int] = (videos, frames)) -> Row:
                given = problem(*at)
                row, labels = way(bench, given)
                return {**row, **quality(given, labels)}

            others.append(Case(f"{shape}: {name}", other, seconds=takes.seconds, quick=takes.quick and frames <= 600))
    return ours + others
