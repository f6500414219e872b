"""Spherical k-means with a diversity penalty, in NumPy: the definition of what kmeans.cu computes.

The objective of one problem, a video of T frames with unit vectors z, weights w and K unit centroids c:

    J = -(1/W) sum_t w_t <z_t, c_a(t)>  +  (mu/K) sum_{j<k} max(0, <c_j, c_k> - m),     W = sum_t w_t

the weighted spherical k-means of Dhillon & Modha (2001) plus a hinge on pairs of centroids closer than m. No step
raises J and none draws a random number.

Batch-first over ragged videos: x [N, D] holds the frames of all videos one after the other; a problem is a span of
rows [start, stop) and a number of clusters, so that several K of one video are several problems over one span.
Labels and similarities of all problems lie one after the other, in the order of the problems. Everywhere: w [N]
float32 weights >= 0; spans [M, 2] int64 rows; k [M] int64; centroids [M, Kmax, D] float32, unit length, zero from k[m]
on; labels [L] int64; penalty mu >= 0 and margin m of J. Each video and each problem has a frame. Accumulation is in
float64; ties go to the lowest index.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]

# 1 - cosine of two equal unit vectors in float32 is not quite 0: below this a frame is covered.
COVERED = 1e-6
# Moves that lower J by less are noise of the arithmetic.
TOLERANCE = 1e-10
# A problem whose round gains less is at rest.
STILL = 1e-7
# How far a centroid goes towards the minimiser: the minimiser is exact only while the set of close pairs stays.
STEPS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Clusters:
    """The answer for M problems, L = sum of their numbers of frames."""

    centroids: F32  # [M, Kmax, D] float32, unit length; rows from k[m] on are zero
    labels: I64  # [L] int64
    similarity: F32  # [L] float32: cosine of each frame to its centroid
    objective: F64  # [M] float64: J at the end
    history: F64  # [M, iterations + 1] float64: J after each round, the last value repeated


def label_starts(spans: I64) -> I64:
    """[M+1] int64: where each problem's labels begin in the flat arrays."""
    starts: I64 = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])]).astype(np.int64)
    return starts


def temporal_support(x: F32, offsets: I64, reach: int = 3) -> tuple[F32, F32]:
    """How well the frames around a frame speak for it, and what they say together.

    Args:
        x: [N, D] float32 unit vectors of all videos. offsets: [B+1] int64, rows of each video.
        reach: how many frames before and after count as neighbours.

    Returns:
        support [N] float32: mean cosine of a frame to its two most similar neighbours, 1 for the only frame of a
        video; and smooth [N, D] float32: unit mean of the frame and those of the two that are more like it than two
        frames of the video are on average (the mean cosine of all pairs is |mean x|^2), which has less noise and does
        not mix scenes.
    """
    support, smooth = np.ones(len(x), np.float64), x.astype(np.float64)
    for start, stop in itertools.pairwise(offsets):
        z = x[start:stop].astype(np.float64)
        count = len(z)
        if count < 2:
            continue
        near = np.full((count, 2 * reach), -np.inf)
        for step in range(1, min(reach, count - 1) + 1):
            cosine = (z[step:] * z[:-step]).sum(1)
            near[step:, 2 * step - 2] = cosine
            near[:-step, 2 * step - 1] = cosine
        best = np.argsort(-near, axis=1, kind="stable")[:, :2]
        cosine = np.take_along_axis(near, best, axis=1)
        known = np.isfinite(cosine)
        support[start:stop] = np.where(known, cosine, 0).sum(1) / known.sum(1)
        # Column 2s-2 is the frame s before, 2s-1 the frame s after.
        offset = np.where(best % 2 == 0, -1, 1) * (best // 2 + 1)
        other = np.where(known, np.arange(count)[:, None] + offset, np.arange(count)[:, None])
        alike = known & (cosine > (z.mean(0) ** 2).sum())
        smooth[start:stop] += (z[other] * alike[..., None]).sum(1)
    smooth /= np.maximum(np.linalg.norm(smooth, axis=1, keepdims=True), 1e-30)
    return support.astype(np.float32), smooth.astype(np.float32)


def seed(x: F32, w: F32, offsets: I64, count: int) -> tuple[I64, F32]:
    """Farthest-first seeding: the most typical frame, then always the worst-covered one, weighted (Gonzalez 1985).

    The seeds of K clusters are the first K: one seeding serves every K.

    Args:
        x: [N, D] float32 unit vectors. w: [N] float32 weights >= 0. offsets: [B+1] int64. count: most seeds a video.

    Returns:
        rows [B, count] int64 into x, -1 where a video has no further frame that is not covered; and the weighted gap
        w (1 - cosine to the nearest seed before) at which each was taken, [B, count] float32, 0 in such places; the
        weight itself for the first.
    """
    rows = np.full((len(offsets) - 1, count), -1, np.int64)
    gaps = np.zeros((len(offsets) - 1, count), np.float32)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        z, v = x[start:stop].astype(np.float64), w[start:stop].astype(np.float64)
        gap = np.full(len(z), np.inf)
        chosen = int((v * (z @ (v @ z))).argmax())
        rows[b, 0], gaps[b, 0] = start + chosen, v[chosen]
        for n in range(1, min(count, len(z))):
            away = 1 - z @ z[chosen]
            gap = np.minimum(gap, np.where(away > COVERED, away, 0))
            chosen = int((v * gap).argmax())
            if v[chosen] * gap[chosen] <= 0:
                break
            rows[b, n], gaps[b, n] = start + chosen, v[chosen] * gap[chosen]
    return rows, gaps


def assign(x: F32, spans: I64, k: I64, centroids: F32) -> tuple[I64, F32]:
    """The nearest centroid of each frame by cosine.

    Returns:
        labels [L] int64 and the cosine to that centroid [L] float32.
    """
    labels, cosines = [], []
    for (start, stop), count, own in zip(spans, k, centroids, strict=True):
        cosine = x[start:stop].astype(np.float64) @ own[:count].astype(np.float64).T
        nearest = cosine.argmax(1)
        labels.append(nearest)
        cosines.append(cosine[np.arange(len(nearest)), nearest])
    return np.concatenate(labels).astype(np.int64), np.concatenate(cosines).astype(np.float32)


def objective(x: F32, w: F32, spans: I64, k: I64, centroids: F32, labels: I64, *, penalty: float, margin: float) -> F64:
    """J of each problem, [M] float64."""
    out = np.empty(len(k))
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        c = centroids[m, : k[m]].astype(np.float64)
        own = c[labels[at[m] : at[m + 1]]]
        v = w[start:stop].astype(np.float64)
        closeness = np.triu(np.maximum(0, c @ c.T - margin), 1).sum()
        fit = (v * (x[start:stop].astype(np.float64) * own).sum(1)).sum() / max(v.sum(), 1e-30)
        out[m] = -fit + penalty / k[m] * closeness
    return out


def update(x: F32, w: F32, spans: I64, k: I64, centroids: F32, labels: I64, *, penalty: float, margin: float) -> F32:
    """Moves each centroid, one after the other, to where J is lowest given the others and the set of close pairs.

    With S_j = (1/W) sum of w z over cluster j and C the centroids closer to c_j than `margin`, J is linear in c_j on
    that set, so its minimiser is normalise(S_j - (mu/K) sum_C c). The move is shortened, or left out, where leaving
    the set would raise J. Clusters without weight stay.

    Returns:
        the new centroids, [M, Kmax, D] float32.
    """
    out = centroids.copy()
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        c = out[m, : k[m]].astype(np.float64)
        own, v = labels[at[m] : at[m + 1]], w[start:stop].astype(np.float64)
        inside = own == np.arange(k[m])[:, None]
        share = (inside * v) @ x[start:stop].astype(np.float64) / max(v.sum(), 1e-30)
        out[m, : k[m]] = moves(c, share, penalty / k[m], margin)
    return out


def moves(c: F64, share: F64, mu: float, margin: float) -> F64:
    """The moves of `update` for one problem: c [K, D] float64, in place; share [K, D] float64 the S_j."""
    for j in np.flatnonzero(share.any(1)).tolist():
        excess = _excess(c, j, c[j], margin)
        goal = share[j] - mu * c[excess > 0].sum(0)
        length = math.sqrt(goal @ goal)
        # The hinges lie above their linear parts, so that no move gains more than the linear minimiser promises.
        if length < 1e-12 or length - goal @ c[j] <= TOLERANCE:
            continue
        goal /= length
        cost = mu * excess.sum() - share[j] @ c[j]
        for step in STEPS:
            moved = (1 - step) * c[j] + step * goal
            moved /= max(math.sqrt(moved @ moved), 1e-30)
            if mu * _excess(c, j, moved, margin).sum() - share[j] @ moved < cost - TOLERANCE:
                c[j] = moved
                break
    return c


def _excess(c: F64, j: int, place: F64, margin: float) -> F64:
    """[K] float64: by how much each centroid but the j-th is closer to `place` than the margin allows."""
    excess: F64 = np.maximum(0, c @ place - margin)
    excess[j] = 0
    return excess


def relocate(x: F32, w: F32, spans: I64, k: I64, centroids: F32, labels: I64, *, penalty: float, margin: float) -> F32:
    """Moves clusters without a frame to the worst-covered frame, where that lowers J.

    Returns:
        the new centroids, [M, Kmax, D] float32; assign again afterwards.
    """
    out = centroids.copy()
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        empty = np.flatnonzero(np.bincount(labels[at[m] : at[m + 1]], minlength=k[m]) == 0)
        if not len(empty):
            continue
        z, v = x[start:stop].astype(np.float64), w[start:stop].astype(np.float64)
        c, total = out[m, : k[m]].astype(np.float64), max(v.sum(), 1e-30)
        cosine = (z @ np.delete(c, empty, axis=0).T).max(1) if len(empty) < k[m] else np.full(len(z), -1.0)
        for j in empty.tolist():
            worst = int((v * (1 - cosine)).argmax())
            gained = np.maximum(cosine, z @ z[worst])
            before, after = (_excess(c, j, u, margin).sum() for u in (c[j], z[worst]))
            if penalty / k[m] * (after - before) - (v * (gained - cosine)).sum() / total < -TOLERANCE:
                c[j], cosine = z[worst], gained
        out[m, : k[m]] = c
    return out


def cluster(
    x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, penalty: float, margin: float, iterations: int
) -> Clusters:
    """Runs every problem to rest: move, relocate, assign, until J stands still.

    Args:
        k: at most the number of valid seeds of the problem.
        seeds: [M, Kmax] int64 rows of x, as `seed` gives them.
        iterations: most rounds.

    Raises:
        ValueError: a problem has fewer valid seeds than clusters.
    """
    count = int(k.max(initial=1))
    centroids = np.zeros((len(k), count, x.shape[1]), np.float32)
    for m in range(len(k)):
        if len(seeds[m]) < k[m] or (seeds[m, : k[m]] < 0).any():
            raise ValueError(f"problem {m} has {k[m]} clusters and {(seeds[m] >= 0).sum()} valid seeds")
        centroids[m, : k[m]] = x[seeds[m, : k[m]]]
    weigh: dict[str, Any] = {"penalty": penalty, "margin": margin}
    at = label_starts(spans)
    labels, similarity = assign(x, spans, k, centroids)
    history = np.repeat(objective(x, w, spans, k, centroids, labels, **weigh)[:, None], iterations + 1, axis=1)
    active = np.arange(len(k))
    for n in range(1, iterations + 1):
        own, number = spans[active], k[active]
        before = np.concatenate([labels[at[m] : at[m + 1]] for m in active])
        moved = update(x, w, own, number, centroids[active], before, **weigh)
        moved = relocate(x, w, own, number, moved, before, **weigh)
        after, cosine = assign(x, own, number, moved)
        now = objective(x, w, own, number, moved, after, **weigh)
        # A round is taken only if it lowers J: rounding the centroids to float32 may lift it by a few ulp at rest.
        better = now < history[active, n - 1] - STILL
        starts = label_starts(own)
        for place in np.flatnonzero(better):
            m, rows = active[place], slice(starts[place], starts[place + 1])
            centroids[m], history[m, n:] = moved[place], now[place]
            labels[at[m] : at[m + 1]], similarity[at[m] : at[m + 1]] = after[rows], cosine[rows]
        active = active[better]
        if not len(active):
            break
    return Clusters(centroids, labels, similarity, history[:, -1].copy(), history)


def representatives(spans: I64, k: I64, labels: I64, similarity: F32, clean: NDArray[np.bool_]) -> I64:
    """The frame of each cluster that is closest to its centroid, among the clean ones where there are any.

    Args:
        similarity: [L] float32, cosine of each frame to its centroid. clean: [N] bool, over the rows of x.

    Returns:
        [M, Kmax] int64 rows of x; -1 for clusters without a frame.
    """
    rows = np.full((len(k), int(k.max(initial=1))), -1, np.int64)
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        own, cosine = labels[at[m] : at[m + 1]], similarity[at[m] : at[m + 1]]
        for j in range(k[m]):
            inside = own == j
            wanted = inside & clean[start:stop] if (inside & clean[start:stop]).any() else inside
            if wanted.any():
                rows[m, j] = start + int(np.where(wanted, cosine, -np.inf).argmax())
    return rows
