"""The temporal shift in NumPy, which defines what shift.cu computes.

Letters: T frames, P patches (grid h x w), C token width, H x W pixels.
"""

from __future__ import annotations

import itertools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

U8: TypeAlias = NDArray[np.uint8]
F32: TypeAlias = NDArray[np.float32]
I64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

# The camera's displacements (dy, dx) in patches, in the order in which ties go to the first; as in shift.cu.
OFFSETS = sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda o: (abs(o[0]) + abs(o[1]), *o))
# Added to the mean cosine of (0, 0): the camera counts as still unless a displacement explains more.
STILL_BONUS = 0.005
# Products of this many multiplications run on one thread (OpenBLAS: SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD).
# Larger ones are computed in parts if these have at least this width.
_ONE_THREAD, _LEAST_WIDTH = 4 * 65_536, 32


def fixed_shift(count: int, grid: tuple[int, int], linked: Bools, *, fraction: float, step: int) -> I64:
    """Shifts a fixed fraction of the patches by `step` frames, alternately back and ahead.

    The patches are spread evenly over the grid.

    Args:
        linked: [T] bool, whether frame t belongs to the same shot as frame t-1; linked[0] is False.

    Returns:
        [T, P] int64: the source frame of each patch.
    """
    patches = np.arange(grid[0] * grid[1])
    # Patch i is chosen where the running total crosses an integer: evenly spread, never more than the fraction. Each
    # row is rotated by one more place than the row above; otherwise some grids would get whole columns.
    order = np.floor((patches + 1) * fraction).astype(np.int64)
    row, column = np.divmod(patches, grid[1])
    rotated = row * grid[1] + (column - row) % grid[1]
    chosen = (order > np.floor(patches * fraction))[rotated]
    direction = np.where(order % 2 == 1, -1, 1)[rotated]
    steps = np.full(count, step, np.int64)
    return _sources(steps, np.broadcast_to(chosen, (count, len(patches))), direction, linked)


def adaptive_shift(patches: F32, grid: tuple[int, int], linked: Bools, *, steps: int, threshold: float) -> I64:
    """Shifts the patches that change most, by the step at which they change. It needs only the patch embeddings.

    Change d[t,i](s) = 1 - <e[t,i], e[t-s,i]> of the unit patch embeddings e. Step: the smallest s in 1..S at which
    the mean change of the most-changed quarter reaches half its maximum over 1..S. Candidates: patches whose change
    at that step passes the threshold, at most half of them. Each decision depends on frames t-S..t, the patch itself
    on t-S..t+S. After the adaptive shift of US 12,216,709, without its learned selectors.

    Args:
        patches: [T, P, C] float32 tokens without prefix. linked: [T] bool, as in `fixed_shift`. steps: S.

    Returns:
        [T, P] int64: the source frame of each patch; its own if not shifted.
    """
    count, places = patches.shape[:2]
    unit = _unit(patches)
    shot = np.cumsum(~linked)
    change = np.zeros((steps, count, places), np.float32)
    for s in range(1, min(steps, count - 1) + 1):
        same_shot = shot[s:] == shot[:-s]
        change[s - 1, s:] = np.where(same_shot[:, None], 1 - (unit[s:] * unit[:-s]).sum(-1), 0)
    quarter = -(-places // 4)
    most = np.sort(change, axis=-1)[..., -quarter:].mean(-1)  # [S, T]
    step = (most >= 0.5 * most.max(0)).argmax(0) + 1  # [T]
    own = change[step - 1, np.arange(count)]  # [T, P]
    rank = np.argsort(np.argsort(-own, axis=1, kind="stable"), axis=1, kind="stable")
    row, column = np.divmod(np.arange(places), grid[1])
    chequered = np.where((row + column) % 2 == 0, -1, 1)
    return _sources(step, (own > threshold) & (rank < places // 2), chequered, linked)


def patch_change(patches: F32, grid: tuple[int, int], linked: Bools, *, steps: int) -> F32:
    """Measures the change of each patch against the frames around, without the camera's displacement.

    Two frames of a shot, at most S apart, are compared at one displacement o of the camera: that of `OFFSETS` with the
    largest mean of <e[t,i], e[u,i+o]> over the patches i whose i+o lies inside the grid, where e are the unit patch
    embeddings; (0, 0) has STILL_BONUS on top. The change of patch i is 1 - <e[t,i], e[u,i+o]>, at o = (0, 0) where i+o
    lies outside, clipped to [0, 2]. The result is its mean over the frames u = t-S..t+S of the same shot without t, and
    0 if there are none; so it depends on frames t-S..t+S only. Global motion estimation by exhaustive block matching,
    on embeddings instead of pixels.

    Two displacements whose means differ by no more than float32 rounds may swap with the order of summation.

    Args:
        patches: [T, P, C] float32 tokens without prefix. linked: [T] bool, as in `fixed_shift`. steps: S.

    Returns:
        [T, P] float32 in [0, 2].
    """
    count, places = patches.shape[:2]
    unit, shot = _unit(patches), np.cumsum(~linked)
    total, pairs = np.zeros((count, places), np.float32), np.zeros(count, np.float32)
    for s in range(1, min(steps, count - 1) + 1):
        same_shot = shot[s:] == shot[:-s]
        early, late = slice(None, -s), slice(s, None)
        # All pairs of patches, though only nine per patch are needed: one matrix product is faster than nine of rows.
        cosines = _products(unit[early], unit[late])
        for own, seen in ((early, cosines), (late, cosines.swapaxes(1, 2))):
            total[own] += np.where(same_shot[:, None], _change_between(seen, grid), 0)
            pairs[own] += same_shot
    total /= np.maximum(pairs, 1)[:, None]
    return total


def _products(one: F32, other: F32) -> F32:
    """[N, P, P]: inner products of the rows of one [N, P, C] and of the other.

    Small products are computed in parts that OpenBLAS does on one thread. For larger ones it wakes threads that spin,
    which took seven times as long on two cores.
    """
    places, width = one.shape[1:]
    step = _ONE_THREAD // (places * places)
    if step < _LEAST_WIDTH:
        return one @ other.swapaxes(1, 2)
    total = one[..., :step] @ other[..., :step].swapaxes(1, 2)
    for first in range(step, width, step):
        part = slice(first, first + step)
        total += one[..., part] @ other[..., part].swapaxes(1, 2)
    return total


def _change_between(cosines: F32, grid: tuple[int, int]) -> F32:
    """[N, P]: the change of each patch of a frame to another, from the cosines [N, P, P] of the one's to the other's.

    One displacement for all patches of a frame: with one for each, an object that moves by a patch would show no
    change.
    """
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    y, x = (np.array(by)[:, None] + at for by, at in zip(zip(*OFFSETS, strict=True), (row, column), strict=True))
    inside = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    there = np.where(inside, y * grid[1] + x, np.arange(len(row)))
    moved = cosines[:, np.arange(len(row)), there]  # [N, 9, P]
    known = np.maximum(inside.sum(1), 1)
    mean = np.where(inside.any(1), (moved * inside).sum(2) / known, -np.inf)
    mean[:, 0] += STILL_BONUS
    best = mean.argmax(1)
    change: F32 = np.clip(1 - moved[np.arange(len(moved)), best], 0, 2)
    return change


def _unit(patches: F32) -> F32:
    unit: F32 = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
    return unit


def _sources(step: I64, chosen: Bools, direction: I64, linked: Bools) -> I64:
    """[T, P]: `step` [T] frames back (direction -1) or ahead (1), [P]; the frame itself at the ends and across cuts."""
    count = len(chosen)
    frame = np.broadcast_to(np.arange(count)[:, None], chosen.shape)
    wanted = frame + direction * step[:, None]
    shot = np.cumsum(~linked)
    inside = (wanted >= 0) & (wanted < count)
    there = np.clip(wanted, 0, count - 1)
    return np.where(chosen & inside & (shot[there] == shot[frame]), there, frame).astype(np.int64)


def shift_tokens(tokens: F32, source: I64, prefix: int) -> F32:
    """Takes each patch token from its source frame; prefix tokens stay.

    Args:
        tokens: [T, R+P, C] float32. source: [T, P] int64. prefix: R.
    """
    out = tokens.copy()
    out[:, prefix:] = tokens[source, np.arange(prefix, tokens.shape[1])[None]]
    return out


def shift_pixels(frames: U8, source: I64, grid: tuple[int, int]) -> U8:
    """Applies the same shift to pictures: patch (r, c) covers rows r*H//h .. (r+1)*H//h, and columns likewise.

    Args:
        frames: [T, H, W, 3] uint8. source: [T, P] int64. grid: (h, w).
    """
    height, width = frames.shape[1:3]
    per_pixel = source[:, patch_of_pixels(height, width, grid)]
    return frames[per_pixel, np.arange(height)[None, :, None], np.arange(width)[None, None, :]]


def patch_of_pixels(height: int, width: int, grid: tuple[int, int]) -> I64:
    """[H, W] int64: the number of the patch that covers each pixel."""
    row = np.searchsorted(np.arange(1, grid[0]) * height // grid[0], np.arange(height), side="right")
    column = np.searchsorted(np.arange(1, grid[1]) * width // grid[1], np.arange(width), side="right")
    return (row[:, None] * grid[1] + column).astype(np.int64)
