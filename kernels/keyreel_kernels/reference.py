"""The definition of every operation on patches and vectors, in NumPy; those on pictures are in pictures.py.

A device that computes faster must give what these functions give. Letters: T frames, P patches (grid h x w),
C token width, D embedding width, N rows, Q queries, H x W pixels.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

U8: TypeAlias = NDArray[np.uint8]
F32: TypeAlias = NDArray[np.float32]
I64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


# --- temporal shift -----------------------------------------------------------------------------------------------


def fixed_shift(count: int, grid: tuple[int, int], linked: Bools, *, share: float, step: int) -> I64:
    """A set share of the patches, spread evenly over the grid, from `step` frames before and after in turn.

    Args:
        linked: [T] bool, whether frame t belongs to the same shot as frame t-1; linked[0] is False.

    Returns:
        [T, P] int64: the frame that each patch is taken from.
    """
    patches = np.arange(grid[0] * grid[1])
    # Patch i is chosen where the running share crosses an integer: evenly spread, never more than the share. Each row
    # is turned by one place more than the row above, or on some grids whole columns would be chosen.
    order = np.floor((patches + 1) * share).astype(np.int64)
    row, column = np.divmod(patches, grid[1])
    turned = row * grid[1] + (column - row) % grid[1]
    chosen = (order > np.floor(patches * share))[turned]
    direction = np.where(order % 2 == 1, -1, 1)[turned]
    steps = np.full(count, step, np.int64)
    return _sources(steps, np.broadcast_to(chosen, (count, len(patches))), direction, linked)


def adaptive_shift(patches: F32, grid: tuple[int, int], linked: Bools, *, steps: int, threshold: float) -> I64:
    """Which patches are taken from which frame, from the patch embeddings alone.

    Change d[t,i](s) = 1 - <e[t,i], e[t-s,i]> of the unit patch embeddings e. Step: the smallest s in 1..S at which
    the mean change of the most-changed quarter reaches half its maximum over 1..S. Candidates: patches whose change
    at that step passes the threshold, at most half of them. Each decision depends on frames t-S..t, the patch itself
    on t-S..t+S. After the adaptive shift of US 12,216,709, without its learned selectors.

    Args:
        patches: [T, P, C] float32 tokens without prefix. linked: [T] bool, as in `fixed_shift`. steps: S.

    Returns:
        [T, P] int64: the frame that each patch is taken from, its own where nothing is shifted.
    """
    count, places = patches.shape[:2]
    unit = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
    change = np.zeros((steps, count, places), np.float32)
    for s in range(1, min(steps, count - 1) + 1):
        reachable = _linked_over(linked, s)
        change[s - 1, s:] = np.where(reachable[s:, None], 1 - (unit[s:] * unit[:-s]).sum(-1), 0)
    quarter = -(-places // 4)
    most = np.sort(change, axis=-1)[..., -quarter:].mean(-1)  # [S, T]
    step = (most >= 0.5 * most.max(0)).argmax(0) + 1  # [T]
    own = change[step - 1, np.arange(count)]  # [T, P]
    rank = np.argsort(np.argsort(-own, axis=1, kind="stable"), axis=1, kind="stable")
    row, column = np.divmod(np.arange(places), grid[1])
    chequered = np.where((row + column) % 2 == 0, -1, 1)
    return _sources(step, (own > threshold) & (rank < places // 2), chequered, linked)


def _linked_over(linked: Bools, step: int) -> Bools:
    """[T] bool: frame t - step exists and no cut lies between it and t."""
    cuts = np.cumsum(~linked)
    out = np.zeros(len(linked), bool)
    out[step:] = cuts[step:] == cuts[:-step]
    return out


def _sources(step: I64, chosen: Bools, direction: I64, linked: Bools) -> I64:
    """The frames to take from: `step` [T] before (direction -1) or after (1), [P]; ends and cuts keep their own."""
    count = len(chosen)
    frame = np.broadcast_to(np.arange(count)[:, None], chosen.shape)
    wanted = frame + direction * step[:, None]
    cuts = np.cumsum(~linked)
    inside = (wanted >= 0) & (wanted < count)
    there = np.clip(wanted, 0, count - 1)
    return np.where(chosen & inside & (cuts[there] == cuts[frame]), there, frame).astype(np.int64)


def shift_tokens(tokens: F32, source: I64, prefix: int) -> F32:
    """Takes each patch token from the frame that `source` names; prefix tokens stay.

    Args:
        tokens: [T, R+P, C] float32. source: [T, P] int64. prefix: R.
    """
    out = tokens.copy()
    out[:, prefix:] = tokens[source, np.arange(prefix, tokens.shape[1])[None]]
    return out


def shift_pixels(frames: U8, source: I64, grid: tuple[int, int]) -> U8:
    """The same choice on the pictures: patch (r, c) covers rows r*H//h .. (r+1)*H//h and columns likewise.

    Args:
        frames: [T, H, W, 3] uint8. source: [T, P] int64. grid: (h, w).
    """
    height, width = frames.shape[1:3]
    row = np.searchsorted(np.arange(1, grid[0]) * height // grid[0], np.arange(height), side="right")
    column = np.searchsorted(np.arange(1, grid[1]) * width // grid[1], np.arange(width), side="right")
    per_pixel = source[:, row[:, None] * grid[1] + column[None, :]]
    return frames[per_pixel, np.arange(height)[None, :, None], np.arange(width)[None, None, :]]


# --- pooling and search -------------------------------------------------------------------------------------------


def weighted_pool(values: F32, weights: F32, attention: F32, strength: float) -> F32:
    """Pools patches with attention: w'[i] proportional to w[i] (P a[i])^gamma, then sum_i w'[i] x[i], unit length.

    Args:
        values: [N, P, D] float32. weights: [N, P] float32, the pooling's own, rows sum to 1. attention: [N, P] float32,
            rows sum to 1. strength: gamma >= 0; 0 and a uniform map leave the weights as they are. P a counts as at
            least 1e-6, so that a map of zeros under all of the weight leaves something to divide by.

    Returns:
        [N, D] float32.
    """
    relative = np.maximum(attention.astype(np.float64) * attention.shape[1], 1e-6)
    biased = weights * relative**strength
    pooled = np.einsum("np,npd->nd", biased / biased.sum(1, keepdims=True), values)
    unit: F32 = (pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    return unit


def top_k(queries: F32, vectors: F32, k: int) -> tuple[F32, I64]:
    """Exact search: the k rows with the highest inner product, best first, ties to the lowest row, NaN last.

    Args:
        queries: [Q, D] float32. vectors: [N, D] float32.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64.
    """
    scores = queries @ vectors.T
    k = min(k, scores.shape[1])
    if 0 < k < scores.shape[1]:
        # Everything at or above the k-th best value stays in the race, so that ties are settled by row alone.
        floor = -np.partition(-scores, k - 1, axis=1)[:, [k - 1]]  # which takes NaN for the largest
        keyed = np.where(scores < floor, np.nan, scores)
    else:
        keyed = scores
    rows = np.argsort(-keyed, axis=1, kind="stable")[:, :k].astype(np.int64)
    return np.take_along_axis(scores, rows, axis=1), rows
