"""Spherical k-means with a diversity penalty, in NumPy: the definition of what kmeans.cu computes.

The objective of one problem, a video of T frames with unit vectors z, weights w and K unit centroids c:

    J = -(1/W) sum_t w_t <z_t, c_a(t)>  +  (mu/K) sum_{j<k} max(0, <c_j, c_k> - m),     W = sum_t w_t

This is the weighted spherical k-means of Dhillon & Modha (2001) plus a hinge loss for pairs of centroids closer than m.
No step raises J, and nothing is random.

Problems come in batches over ragged videos: x [N, D] holds the frames of all videos one after the other; a problem is a
span of rows [start, stop) and a number of clusters, so that several K of one video are several problems over one span.
Labels and similarities of all problems are concatenated in the order of the problems. Everywhere: w [N] float32 weights
>= 0; spans [M, 2] int64 rows; k [M] int64; labels [L] int64; penalty mu >= 0 and margin m of J. Each video and each
problem has at least one frame. Sums are float64; ties go to the lowest index.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]

# Frames before and after one that are its neighbours.
REACH = 3
# A frame closer than this to a seed is covered: 1 - cosine of two equal unit vectors in float32 is not quite 0.
COVERED = 1e-6
# A move must lower J by more than this: smaller gains are rounding.
TOLERANCE = 1e-10
# A problem stops when a round gains less than this.
STILL = 1e-7
# Most multiply-adds of a product that OpenBLAS computes in the calling thread. Waking other threads costs more CPU time
# than that, and results would depend on their number.
_ONE_THREAD = 2**18
# How far to move a centroid towards the minimiser, which is exact only while the set of close pairs is the same.
STEPS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Clusters:
    """The result for M problems; L is the sum of their numbers of frames."""

    centroids: F32  # [M, Kmax, D] float32, unit length; rows from k[m] on are zero
    labels: I64  # [L] int64
    similarity: F32  # [L] float32: cosine of each frame to its centroid
    objective: F64  # [M] float64: J at the end
    history: F64  # [M, iterations + 1] float64: J after each round, the last value repeated


def label_starts(spans: I64) -> I64:
    """[M+1] int64: the start of each problem's labels in the concatenated arrays."""
    starts: I64 = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])]).astype(np.int64)
    return starts


# --- weights and seeds --------------------------------------------------------------------------------------------


def neighbour_similarity(x: F32, offsets: I64) -> tuple[F32, F32]:
    """Computes the similarity of each frame to the REACH frames before and after it, and smooths the vectors.

    Args:
        x: [N, D] float32 unit vectors of all videos. offsets: [B+1] int64, rows of each video.

    Returns:
        similarity [N] float32: mean cosine of a frame to its two most similar neighbours; 1 for the only frame of a
        video. smooth [N, D] float32: unit mean of the frame and of those of the two that are more similar to it than
        two random frames of the video (the mean cosine of all pairs is |mean x|^2). It has less noise and does not mix
        scenes.
    """
    similarity, smooth = np.empty(len(x), np.float32), np.empty(x.shape, np.float32)
    for start, stop in itertools.pairwise(offsets.tolist()):
        z, count = x[start:stop].astype(np.float64), stop - start
        near = np.full((count, 2 * REACH), -np.inf)
        for step in range(1, min(REACH, count - 1) + 1):
            cosine = np.vecdot(z[step:], z[:-step])
            near[step:, 2 * step - 2] = cosine
            near[:-step, 2 * step - 1] = cosine
        best = np.argsort(-near, axis=1, kind="stable")[:, :2]
        cosine = np.take_along_axis(near, best, axis=1)
        known = np.isfinite(cosine)
        mean = np.where(known, cosine, 0).sum(1) / np.maximum(known.sum(1), 1)
        similarity[start:stop] = np.where(known.any(1), mean, 1)
        # Column 2s-2 is the frame s before, 2s-1 the frame s after.
        other = np.arange(count)[:, None] + np.where(best % 2 == 0, -1, 1) * (best // 2 + 1)
        similar = known & (cosine > (z.mean(0) ** 2).sum())
        mixed = z.copy()
        for side in range(2):
            rows = np.flatnonzero(similar[:, side])
            mixed[rows] += z[other[rows, side]]
        smooth[start:stop] = mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-30)
    return similarity, smooth


def seed(x: F32, w: F32, offsets: I64, count: int) -> tuple[I64, F32]:
    """Farthest-first seeding, weighted: the most typical frame, then repeatedly the worst-covered one (Gonzalez 1985).

    The seeds of K clusters are the first K: one seeding serves every K.

    Args:
        x: [N, D] float32 unit vectors. w: [N] float32 weights >= 0. offsets: [B+1] int64. count: most seeds a video.

    Returns:
        rows [B, count] int64 into x; -1 after every frame of the video is covered, and everywhere if the video has a
        NaN or infinity. And the weighted gap of each seed, w (1 - cosine to the nearest earlier seed), [B, count]
        float32: the weight for the first seed, 0 without a seed.
    """
    rows = np.full((len(offsets) - 1, count), -1, np.int64)
    gaps = np.zeros((len(offsets) - 1, count), np.float32)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        z, v = x[start:stop].astype(np.float64), w[start:stop].astype(np.float64)
        total = (v[:, None] * z).sum(0)
        if not np.isfinite(total).all():
            continue
        gap = np.full(len(z), np.inf)
        chosen = int((v * np.vecdot(z, total)).argmax())
        rows[b, 0], gaps[b, 0] = start + chosen, v[chosen]
        for n in range(1, min(count, len(z))):
            away = 1 - np.vecdot(z, z[chosen])
            gap = np.minimum(gap, np.where(away > COVERED, away, 0))
            chosen = int((v * gap).argmax())
            if v[chosen] * gap[chosen] <= 0:
                break
            rows[b, n], gaps[b, n] = start + chosen, v[chosen] * gap[chosen]
    return rows, gaps


# --- the steps of one problem -------------------------------------------------------------------------------------
# z [T, D] float64 frames, v [T] float64 weights, c [K, D] float64 centroids, mu the penalty divided by K.


def _products(a: F64, b: F64) -> F64:
    """a b^T, some rows of a at a time."""
    rows = _ONE_THREAD // max(b.size, 1)
    if rows < 8:
        return a @ b.T
    across, out, whole = np.ascontiguousarray(b.T), np.empty((len(a), len(b))), len(a) // rows * rows
    np.matmul(a[:whole].reshape(-1, rows, a.shape[1]), across, out=out[:whole].reshape(-1, rows, len(b)))
    np.matmul(a[whole:], across, out=out[whole:])
    return out


def nearest(z: F64, c: F64) -> tuple[I64, F64]:
    """The nearest centroid of each frame: labels [T] int64 and cosines [T] float64."""
    cosine = _products(z, c)
    labels = cosine.argmax(1)
    return labels, np.take_along_axis(cosine, labels[:, None], axis=1)[:, 0]


def objective(v: F64, cosine: F64, c: F64, mu: float, margin: float) -> float:
    """J, from the cosine [T] of each frame to its centroid."""
    close = np.triu(np.maximum(0, _products(c, c) - margin), 1).sum() if mu else 0.0
    return float(mu * close - v @ cosine / max(v.sum(), 1e-30))


def move(z: F64, v: F64, c: F64, labels: I64, mu: float, margin: float) -> F64:
    """Moves each centroid in turn to the minimum of J, given the others and the set of close pairs.

    With S_j = (1/W) sum of w z over cluster j and C the centroids closer to c_j than the margin, J is linear in c_j on
    that set, so its minimiser is normalise(S_j - mu sum_C c). The move is shortened or skipped if leaving the set would
    raise J. Clusters without weight stay.
    """
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=len(c)))[:-1])
    sums = np.stack([(v[rows, None] * z[rows]).sum(0) for rows in members]) / max(v.sum(), 1e-30)
    if not mu:
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        gains = length - np.vecdot(sums, c)[:, None] > TOLERANCE
        return np.where(gains, sums / np.maximum(length, 1e-30), c)
    c = c.copy()
    for j in np.flatnonzero(sums.any(1)).tolist():
        excess = _excess(c, j, c[j], margin)
        goal = sums[j] - mu * c[excess > 0].sum(0)
        length = math.sqrt(goal @ goal)
        # The hinges lie above their linear parts, so that no move gains more than the linear minimiser promises.
        if length < 1e-12 or length - goal @ c[j] <= TOLERANCE:
            continue
        goal /= length
        cost = mu * excess.sum() - sums[j] @ c[j]
        for step in STEPS:
            moved = (1 - step) * c[j] + step * goal
            moved /= max(math.sqrt(moved @ moved), 1e-30)
            if mu * _excess(c, j, moved, margin).sum() - sums[j] @ moved < cost - TOLERANCE:
                c[j] = moved
                break
    return c


def _excess(c: F64, j: int, place: F64, margin: float) -> F64:
    """[K] float64: how much closer than the margin each centroid but the j-th is to `place`."""
    excess: F64 = np.maximum(0, np.vecdot(c, place) - margin)
    excess[j] = 0
    return excess


def relocate(z: F64, v: F64, c: F64, labels: I64, mu: float, margin: float) -> F64:
    """Moves clusters without a frame to the worst-covered frame if that lowers J."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(c)) == 0)
    if not len(empty):
        return c
    c, total = c.copy(), max(v.sum(), 1e-30)
    cosine = nearest(z, np.delete(c, empty, axis=0))[1]
    for j in empty.tolist():
        worst = int((v * (1 - cosine)).argmax())
        gained = np.maximum(cosine, np.vecdot(z, z[worst]))
        before, after = (_excess(c, j, place, margin).sum() for place in (c[j], z[worst]))
        if mu * (after - before) - (v * (gained - cosine)).sum() / total < -TOLERANCE:
            c[j], cosine = z[worst], gained
    return c


# --- all problems -------------------------------------------------------------------------------------------------


def cluster(
    x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, penalty: float, margin: float, iterations: int
) -> Clusters:
    """Runs every problem until J stops falling: move, relocate, assign.

    Args:
        x: [N, D] float32 unit vectors.
        k: at most the number of valid seeds of the problem.
        seeds: [M, Kmax] int64 rows of x, from `seed`.
        iterations: most rounds.

    Raises:
        ValueError: a problem has fewer valid seeds than clusters.
    """
    check_seeds(k, seeds)
    at, shape = label_starts(spans), (len(k), int(k.max(initial=1)), x.shape[1])
    found = Clusters(
        np.zeros(shape, np.float32),
        np.empty(at[-1], np.int64),
        np.empty(at[-1], np.float32),
        np.empty(len(k)),
        np.empty((len(k), iterations + 1)),
    )
    videos = {
        (start, stop): (x[start:stop].astype(np.float64), w[start:stop].astype(np.float64))
        for start, stop in spans.tolist()
    }
    for m, (start, stop) in enumerate(spans.tolist()):
        (z, v), mu = videos[start, stop], penalty / int(k[m])
        c = x[seeds[m, : k[m]]].astype(np.float64)
        labels, cosine = nearest(z, c)
        found.history[m] = objective(v, cosine, c, mu, margin)
        for n in range(1, iterations + 1):
            moved = relocate(z, v, move(z, v, c, labels, mu, margin), labels, mu, margin)
            # Centroids are float32. Rounding may raise J by a few ulp at rest: a round is taken only if it lowers J.
            moved = moved.astype(np.float32).astype(np.float64)
            new, near = nearest(z, moved)
            now = objective(v, near, moved, mu, margin)
            if not now < found.history[m, n - 1] - STILL:
                break
            c, labels, cosine, found.history[m, n:] = moved, new, near, now
        found.centroids[m, : k[m]], found.labels[at[m] : at[m + 1]] = c, labels
        found.similarity[at[m] : at[m + 1]], found.objective[m] = cosine, found.history[m, -1]
    return found


def check_seeds(k: I64, seeds: I64) -> None:
    """Raises ValueError if a problem has fewer valid seeds [M, Kmax] than clusters [M]."""
    for m, count in enumerate(k.tolist()):
        if (valid := int((seeds[m, :count] >= 0).sum())) < count:
            raise ValueError(f"problem {m} has {count} clusters and {valid} valid seeds")


def representatives(spans: I64, k: I64, labels: I64, similarity: F32, clean: NDArray[np.bool_]) -> I64:
    """Finds the frame of each cluster closest to its centroid, among the clean ones if there are any.

    Args:
        similarity: [L] float32, cosine of each frame to its centroid. clean: [N] bool, over the rows of x.

    Returns:
        [M, Kmax] int64 rows of x; -1 for clusters without a frame.
    """
    rows = np.full((len(k), int(k.max(initial=1))), -1, np.int64)
    problem = np.repeat(np.arange(len(k)), spans[:, 1] - spans[:, 0])
    frame = np.arange(len(labels)) - (label_starts(spans)[:-1] - spans[:, 0])[problem]
    # The first of each cluster when sorted by: clean, similarity, row.
    order = np.lexsort((-similarity, ~clean[frame], labels, problem))
    problem, own = problem[order], labels[order]
    first = np.flatnonzero(np.diff(problem, prepend=-1) | np.diff(own, prepend=-1))
    rows[problem[first], own[first]] = frame[order[first]]
    return rows
