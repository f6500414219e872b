"""Finds scenes: joins similar neighbouring shots, and divides long shots that change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from keyreel.runtime.bundle import SCENE_SIMILARITY
from keyreel.shots import shot_of
from keyreel.types import F32, F64, Shot

# The shortest part of a shot.
LEAST_SECONDS = 4.0


def find_scenes(
    vectors: F32, pts_seconds: F64, shots: Sequence[Shot], alike: float = SCENE_SIMILARITY
) -> tuple[Shot, ...]:
    """Finds the scenes of a video.

    It first divides each shot where its two sides differ most, repeatedly, while the cosine of their mean vectors is at
    most `alike`. Then it joins the two most similar neighbours, repeatedly, while their cosine is higher.

    Args:
        vectors: [T, D] float32, unit length, of the sampled frames.
        pts_seconds: [T] float64, rising.
        shots: in time order, without gaps.
        alike: the cosine, see `Bundle.scene_similarity`; by default that of the built-in model.
    """
    sums = np.concatenate([np.zeros((1, vectors.shape[1])), np.cumsum(vectors, axis=0, dtype=np.float64)])
    shot = shot_of(shots, pts_seconds)
    first = np.searchsorted(shot, np.arange(len(shots) + 1))
    starts: list[float] = []
    rows: list[int] = []  # first row of each part
    for own, low, high in zip(shots, first[:-1].tolist(), first[1:].tolist(), strict=True):
        if low == high and rows:
            continue  # too short to contain a sample
        starts.append(own.start_seconds)
        rows.append(low)
        for cut in _divided(sums, pts_seconds, low, high, alike):
            starts.append(float(pts_seconds[cut]))
            rows.append(cut)
    edges = [*rows, len(vectors)]
    parts = [sums[high] - sums[low] for low, high in itertools.pairwise(edges)]
    near = [_cosine(one, other) for one, other in itertools.pairwise(parts)]
    while near and max(near) > alike:
        at = int(np.argmax(near))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del starts[at + 1], near[at]
        for beside in (at - 1, at):
            if 0 <= beside < len(near):
                near[beside] = _cosine(parts[beside], parts[beside + 1])
    stops = [*starts[1:], shots[-1].stop_seconds]
    return tuple(Shot(start, stop) for start, stop in zip(starts, stops, strict=True))


def _divided(sums: F64, pts_seconds: F64, low: int, high: int, alike: float) -> list[int]:
    """The rows within a shot [low, high) at which a new part begins, rising."""
    own = sums[low : high + 1]
    square = np.vecdot(own, own)
    cuts, left = list[int](), [(0, high - low)]
    while left:
        start, stop = left.pop()
        inside = np.arange(start + 1, stop)
        times = pts_seconds[low + inside]
        ends = pts_seconds[low + start] + LEAST_SECONDS, pts_seconds[low + stop - 1] - LEAST_SECONDS
        inside = inside[(times >= ends[0]) & (times <= ends[1])]
        if not len(inside):
            continue
        # |sum|^2 of both sides, without differences of vectors, which would need the memory of all vectors again.
        before = square[inside] - 2 * (own[inside[0] : inside[-1] + 1] @ own[start]) + square[start]
        after = square[inside] - 2 * (own[inside[0] : inside[-1] + 1] @ own[stop]) + square[stop]
        # Squared distances to the means, which k-means minimises, add up to n - |sum|^2 / n on each side.
        cut = int(inside[(before / (inside - start) + after / (stop - inside)).argmax()])
        if _cosine(own[cut] - own[start], own[stop] - own[cut]) <= alike:
            cuts.append(low + cut)
            left += [(start, cut), (cut, stop)]
    return sorted(cuts)


def _cosine(one: F64, other: F64) -> float:
    return float(one @ other) / max(math.sqrt(float((one @ one) * (other @ other))), 1e-12)
