"""Key-frame clustering for speed on a CPU; clustering.py is the definition and says what the arguments are.

Products are float32 by BLAS; what they leave open within ROUNDING is computed again in float64, so that seeds and
labels are the definition's, however many threads BLAS has. A round of `cluster` costs what has changed in it: products
with the centroids that moved, sums over the frames that changed their cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.clustering import (
    COVERED,
    F32,
    F64,
    I64,
    STILL,
    TOLERANCE,
    Clusters,
    label_starts,
    moves,
    relocate,
)

# More than products of unit vectors in float32 err by.
ROUNDING = 1e-5
# Rows that are converted to float64 at a time, so that they stay in the cache.
_BLOCK = 256
# Multiplications up to which OpenBLAS leaves a product to the thread that asks: waking the others, which then spin for
# a while, costs twice the CPU time and gains little at these sizes.
_ALONE = 2**18


def temporal_support(x: F32, offsets: I64, reach: int = 3) -> tuple[F32, F32]:
    """clustering.temporal_support: support [N] float32 and smooth [N, D] float32."""
    support, smooth = np.ones(len(x), np.float32), x.copy()
    for start, stop in itertools.pairwise(offsets.tolist()):
        z, count = x[start:stop], stop - start
        if count < 2:
            continue
        near = np.full((count, 2 * reach), -np.inf)
        mean = np.zeros(x.shape[1])
        for low in range(0, count, _BLOCK):
            block = z[low : low + _BLOCK + reach]
            mean += block[:_BLOCK].sum(0, dtype=np.float64) / count
            for step in range(1, min(reach, len(block) - 1) + 1):
                rows = min(_BLOCK, len(block) - step)
                cosine = np.vecdot(block[step : step + rows], block[:rows])
                near[low + step : low + step + rows, 2 * step - 2] = cosine
                near[low : low + rows, 2 * step - 1] = cosine
        # Column 2s-2 is the frame s before, 2s-1 the frame s after.
        away = np.where(np.arange(2 * reach) % 2 == 0, -1, 1) * (np.arange(2 * reach) // 2 + 1)
        usual = float(mean @ mean)
        for own in np.array_split(_open_rows(near, usual), 1 + count // _BLOCK):
            other = (own[:, None] + away).clip(0, count - 1)
            exact = np.vecdot(z[other].astype(np.float64), z[own, None].astype(np.float64))
            near[own] = np.where(np.isfinite(near[own]), exact, -np.inf)
        best = np.argsort(-near, axis=1, kind="stable")[:, :2]
        cosine = np.take_along_axis(near, best, axis=1)
        known = np.isfinite(cosine)
        support[start:stop] = np.where(known, cosine, 0).sum(1) / known.sum(1)
        other = np.arange(count)[:, None] + away[best]
        alike = known & (cosine > usual)
        taken = np.empty((min(count, _BLOCK), x.shape[1]), np.float32)
        for part in _parts(count):
            mixed = smooth[start:stop][part]
            for side in range(2):
                neighbour = taken[: len(mixed)]
                np.take(z, other[part, side], axis=0, out=neighbour, mode="clip")  # no copy to be safe
                neighbour[~alike[part, side]] = 0
                mixed += neighbour
            mixed /= np.maximum(np.sqrt(np.vecdot(mixed, mixed)), np.float32(1e-30))[:, None]
    return support, smooth


def _open_rows(near: F64, usual: float) -> I64:
    """The rows of cosines [T, 2 reach] whose two largest, or their being above `usual`, hang on rounding."""
    largest = -np.sort(-near, axis=1)[:, :3]
    with np.errstate(invalid="ignore"):  # -inf - -inf: neither is there
        tied = -np.diff(largest, axis=1) < ROUNDING
    return np.flatnonzero(tied.any(1) | (np.abs(largest[:, :2] - usual) < ROUNDING).any(1))


def seed(x: F32, w: F32, offsets: I64, count: int) -> tuple[I64, F32]:
    """clustering.seed: rows [B, count] int64 and gaps [B, count] float32.

    A video with a NaN or an infinity among its vectors or weights has no seed: all of its rows are -1.
    """
    rows = np.full((len(offsets) - 1, count), -1, np.int64)
    gaps = np.zeros((len(offsets) - 1, count), np.float32)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        z, v = x[start:stop], w[start:stop]
        total = sum((v[part] @ z[part] for part in _parts(len(z))), np.zeros(x.shape[1]))
        if not np.isfinite(total).all():
            continue
        could = _could_be_most(v, np.vecdot(z, total.astype(np.float32)), ROUNDING * float(v.sum(dtype=np.float64)))
        if len(could) > 1:
            exact = sum((v[part].astype(np.float64) @ z[part].astype(np.float64) for part in _parts(len(z))), 0 * total)
            could = could[[(v[could] * (z[could].astype(np.float64) @ exact)).argmax()]]
        rows[b, 0], gaps[b, 0] = start + could[0], v[could[0]]
        most = min(count, len(z))
        own, gap = np.empty((most, x.shape[1])), np.full(len(z), np.inf, np.float32)
        for n in range(1, most):
            chosen = z[rows[b, n - 1] - start]
            own[n - 1] = chosen
            np.minimum(gap, 1 - np.vecdot(z, chosen), out=gap)
            could = _could_be_most(v, gap, ROUNDING)
            away = 1 - z[could].astype(np.float64) @ own[:n].T
            weighted = v[could].astype(np.float64) * np.where(away > COVERED, away, 0).min(1)
            best = int(weighted.argmax())
            if weighted[best] <= 0:
                break
            rows[b, n], gaps[b, n] = start + could[best], weighted[best]
    return rows, gaps


def _parts(count: int) -> Iterator[slice]:
    return (slice(low, low + _BLOCK) for low in range(0, count, _BLOCK))


def _products(z: F32, c: F32) -> F32:
    """z c^T, [T, K] float32."""
    rows = _ALONE // max(c.size, 1)
    if rows < 8:
        return z @ c.T
    across, out = np.ascontiguousarray(c.T), np.empty((len(z), len(c)), np.float32)
    whole = len(z) // rows * rows
    np.matmul(z[:whole].reshape(-1, rows, z.shape[1]), across, out=out[:whole].reshape(-1, rows, len(c)))
    np.matmul(z[whole:], across, out=out[whole:])
    return out


def _could_be_most(v: F32, values: F32, error: float) -> I64:
    """The rows that may have the largest v * value, with values that err by less than `error`."""
    return np.flatnonzero(v * (values + np.float32(error)) >= (v * (values - np.float32(error))).max())


def assign(x: F32, spans: I64, k: I64, centroids: F32) -> tuple[I64, F32]:
    """clustering.assign: labels [L] int64 and cosines [L] float32."""
    parts = [
        _nearest(x[start:stop], own[:count], _products(x[start:stop], own[:count]))
        for (start, stop), count, own in zip(spans, k, centroids, strict=True)
    ]
    labels, cosines = zip(*parts, strict=True)
    return np.concatenate(labels), np.concatenate(cosines)


def _nearest(z: F32, c: F32, cosine: F32) -> tuple[I64, F32]:
    """Labels [T] and cosines [T], from the float32 products [T, K]; near ties are decided in float64."""
    labels = cosine.argmax(1)
    best: F32 = np.take_along_axis(cosine, labels[:, None], axis=1)[:, 0]
    near = cosine > (best - np.float32(ROUNDING))[:, None]
    if np.count_nonzero(near) > len(z):
        open_ = np.flatnonzero(near.sum(1) > 1)
        exact = z[open_].astype(np.float64) @ c.astype(np.float64).T
        labels[open_], best[open_] = exact.argmax(1), exact.max(1)
    return labels, best


def cluster(
    x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, penalty: float, margin: float, iterations: int
) -> Clusters:
    """clustering.cluster; problems over one span with the same seeds share their first products.

    Raises:
        ValueError: a problem has fewer valid seeds than clusters.
    """
    for m in range(len(k)):
        if len(seeds[m]) < k[m] or (seeds[m, : k[m]] < 0).any():
            raise ValueError(f"problem {m} has {k[m]} clusters and {(seeds[m] >= 0).sum()} valid seeds")
    at = label_starts(spans)
    found = Clusters(
        np.zeros((len(k), int(k.max(initial=1)), x.shape[1]), np.float32),
        np.empty(at[-1], np.int64),
        np.empty(at[-1], np.float32),
        np.empty(len(k)),
        np.empty((len(k), iterations + 1)),
    )
    alike: dict[tuple[int, int, bytes], list[int]] = {}
    for m, (start, stop) in enumerate(spans.tolist()):
        alike.setdefault((start, stop, seeds[m].tobytes()), []).append(m)
    for (start, stop, _), problems in alike.items():
        z, v = x[start:stop], w[start:stop]
        most = int(k[problems].max())
        first = _products(z, x[seeds[problems[0], :most]])
        for m in problems:
            cosine = first[:, : k[m]].copy() if len(problems) > 1 else first  # each changes its own
            problem = _Problem(z, v, x[seeds[m, : k[m]]], cosine, penalty / int(k[m]), margin)
            history = problem.run(iterations)
            found.history[m] = np.pad(history, (0, iterations + 1 - len(history)), mode="edge")
            found.objective[m] = history[-1]
            found.centroids[m, : k[m]] = problem.centroids
            found.labels[at[m] : at[m + 1]], found.similarity[at[m] : at[m + 1]] = problem.labels, problem.similarity
    return found


def representatives(spans: I64, k: I64, labels: I64, similarity: F32, clean: NDArray[np.bool_]) -> I64:
    """clustering.representatives: rows [M, Kmax] int64."""
    rows = np.full((len(k), int(k.max(initial=1))), -1, np.int64)
    problem = np.repeat(np.arange(len(k)), spans[:, 1] - spans[:, 0])
    frame = np.arange(len(labels)) - (label_starts(spans)[:-1] - spans[:, 0])[problem]
    # Clean ones first, the most similar of them first; of equal ones the first stays the first.
    order = np.lexsort((-similarity, ~clean[frame], labels, problem))
    problem, own = problem[order], labels[order]
    first = np.flatnonzero(np.diff(problem, prepend=-1) | np.diff(own, prepend=-1))
    rows[problem[first], own[first]] = frame[order[first]]
    return rows


def _members(rows: I64, labels: I64, count: int) -> Iterator[tuple[int, I64]]:
    """The rows of each label in 0..count-1, a block at a time."""
    order = labels.argsort(kind="stable")
    own, ends = rows[order], np.searchsorted(labels[order], np.arange(count + 1)).tolist()
    for j, (low, high) in enumerate(itertools.pairwise(ends)):
        for part in _parts(high - low):
            yield j, own[low:high][part]


class _Problem:
    """One problem on its way to rest."""

    def __init__(self, z: F32, v: F32, centroids: F32, cosine: F32, mu: float, margin: float) -> None:
        self.z, self.v, self.mu, self.margin = z, v, mu, margin
        self.total = max(float(v.sum(dtype=np.float64)), 1e-30)
        self.centroids, self.cosine = centroids, cosine
        self.labels, self.similarity = _nearest(z, centroids, cosine)
        self.changed = 0  # frames that were moved between shares since these were summed afresh
        self.shares = self._shares(np.zeros(centroids.shape), np.full(len(z), -1), self.labels)
        self.outdated = np.zeros(len(centroids), bool)  # columns of `cosine`

    def run(self, iterations: int) -> list[float]:
        """J at the start and after each round that was taken."""
        history = [self._objective(self.centroids, self.shares)]
        for _ in range(iterations):
            centroids = self._moved()
            if not np.bincount(self.labels, minlength=len(centroids)).all():
                # Rare, so that the definition itself does it.
                span, count = np.array([[0, len(self.z)]]), np.array([len(centroids)])
                weigh = {"penalty": self.mu * len(centroids), "margin": self.margin}
                centroids = relocate(self.z, self.v, span, count, centroids[None], self.labels, **weigh)[0]
            moved = (centroids != self.centroids).any(1)
            if not moved.any():
                break
            # What this leaves behind is not needed again where the round is not taken.
            self.outdated |= moved
            labels, similarity = self.labels, self._settled(centroids)
            if similarity is None:
                if self.outdated.all():
                    self.cosine = _products(self.z, centroids)
                else:
                    self.cosine[:, self.outdated] = _products(self.z, centroids[self.outdated])
                self.outdated[:] = False
                labels, similarity = _nearest(self.z, centroids, self.cosine)
            shares = self._shares(self.shares, self.labels, labels)
            now = self._objective(centroids, shares)
            if not now < history[-1] - STILL:
                break
            self.centroids, self.shares, self.labels, self.similarity = centroids, shares, labels, similarity
            history.append(now)
        return history

    def _objective(self, centroids: F32, shares: F64) -> float:
        c = centroids.astype(np.float64)
        fit = float((shares * c).sum())
        return self.mu * float(np.triu(np.maximum(c @ c.T - self.margin, 0), 1).sum()) - fit if self.mu else -fit

    def _shares(self, shares: F64, before: I64, after: I64) -> F64:
        """(1/W) sum of w z over each cluster, from those before and the frames that changed.

        Afresh once half of the frames have changed, at the cost of adding and subtracting those: products in float32
        err by some 1e-7 of what they sum up, so that after any number of rounds shares err by no more than twice what
        fresh ones do.
        """
        rows = np.flatnonzero(before != after)
        if not len(rows):
            return shares
        self.changed += len(rows)
        if 2 * self.changed >= len(after):
            self.changed, rows = 0, np.arange(len(after))
            shares, steps = np.zeros(shares.shape), [(after, 1 / self.total)]
        else:
            shares, steps = shares.copy(), [(after, 1 / self.total), (before, -1 / self.total)]
        for labels, sign in steps:
            for j, own in _members(rows, labels[rows], len(shares)):
                shares[j] += sign * (self.v[own] @ self.z[own])
        shares[np.bincount(after, weights=self.v, minlength=len(shares)) == 0] = 0  # not what rounding leaves
        return shares

    def _settled(self, centroids: F32) -> F32 | None:
        """The cosines [T] to the centroids the frames have, where no frame can be nearer to another one.

        Angles obey the triangle inequality: a frame is nearer to its centroid than to any that is more than twice as
        far from that as the frame is. cos 2a = 2 cos^2 a - 1.
        """
        c = centroids.astype(np.float64)
        close = c @ c.T
        np.fill_diagonal(close, -1)
        least = np.sqrt(np.clip((close.max(1) + 1) / 2, 0, 1)) + ROUNDING
        mass = np.bincount(self.labels, weights=self.v, minlength=len(c)) / self.total
        if ((self.shares * c).sum(1) < least * mass).any():
            return None  # not even on average
        cosine = np.empty(len(self.z), np.float32)
        for j, own in _members(np.arange(len(self.z)), self.labels, len(c)):
            cosine[own] = np.vecdot(self.z[own], centroids[j])
        return cosine if (cosine > least[self.labels]).all() else None

    def _moved(self) -> F32:
        """clustering.update: the new centroids, [K, D] float32."""
        c, share = self.centroids.astype(np.float64), self.shares
        length = np.sqrt((share**2).sum(1))
        gains = (length >= 1e-12) & (length - (share * c).sum(1) > TOLERANCE)
        goal = np.where(gains[:, None], share / np.maximum(length, 1e-30)[:, None], c)
        if self.mu:
            # Who is close to whom, now and on the way.
            close = np.maximum(np.maximum(c @ c.T, goal @ goal.T), np.maximum(c @ goal.T, goal @ c.T))
            np.fill_diagonal(close, -np.inf)
            if close.max() > self.margin:
                return moves(c, share, self.mu, self.margin).astype(np.float32)
        # No pair repels: each goes where its frames are.
        return goal.astype(np.float32)
