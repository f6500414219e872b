"""The definition of every operation on frames, patches and vectors, in NumPy.

A device that computes faster must give what these functions give. Letters: T frames, P patches (grid h x w),
C token width, D embedding width, N rows, Q queries, H x W pixels.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
F32: TypeAlias = NDArray[np.float32]
I64: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Interpolation: TypeAlias = Literal["bicubic", "bilinear", "area"]

# Luma weights (Kr, Kb) of ITU-R BT.601-7, BT.709-6 and BT.2020-2 (non-constant luminance).
LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
HISTOGRAM_BINS = 8  # a colour channel


# --- colour and geometry ------------------------------------------------------------------------------------------


def yuv_to_rgb(y: U8 | U16, uv: U8 | U16, *, bits: int, standard: str, full_range: bool) -> F32:
    """NV12 (8 bits in u8) or P016 (`bits` in the high end of u16) to R'G'B', ITU-R BT.601/709/2020.

    Chroma is sited as in MPEG-2: on the left column of each pair, between the two rows; interpolated linearly.

    Args:
        y: [N, H, W]. uv: [N, ceil(H/2), ceil(W/2), 2], Cb then Cr. standard: "bt601", "bt709" or "bt2020".

    Returns:
        [N, H, W, 3] float32 in 0..1, clipped.
    """
    kr, kb = LUMA_WEIGHTS[standard]
    scale = 2.0 ** (bits - 8)
    pad = 2.0 ** (16 - bits) if y.dtype == np.uint16 else 1.0
    low, span, chroma_span = (
        (0.0, 2.0**bits - 1, 2.0**bits - 1) if full_range else (16 * scale, 219 * scale, 224 * scale)
    )
    height, width = y.shape[1:3]
    luma = (y.astype(np.float32) / pad - low) / span
    chroma = (uv.astype(np.float32) / pad - 128 * scale) / chroma_span
    chroma = _linear(chroma, (np.arange(height) - 0.5) / 2, axis=1)
    chroma = _linear(chroma, np.arange(width) / 2, axis=2)
    cb, cr = chroma[..., 0], chroma[..., 1]
    red = luma + 2 * (1 - kr) * cr
    blue = luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    rgb: F32 = np.clip(np.stack([red, green, blue], axis=-1), 0, 1).astype(np.float32)
    return rgb


def _linear(values: F32, at: NDArray[np.float64], axis: int) -> F32:
    last = values.shape[axis] - 1
    at = np.clip(at, 0, last)
    low = np.floor(at).astype(np.int64)
    part = (at - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
    mixed: F32 = values.take(low, axis) * (1 - part) + values.take(np.minimum(low + 1, last), axis) * part
    return mixed


def resize_weights(old: int, new: int, interpolation: Interpolation) -> F32:
    """[new, old] float32 rows that sum to 1: a filter as wide as the reduction, so that nothing aliases.

    Triangle for bilinear, Keys' cubic with a = -0.5 (Keys 1981) for bicubic, a box for area; sample positions at
    pixel centres. The same weights as Pillow's and torchvision's antialiased resize, before their rounding; Pillow also
    clips between the two passes, which shows where bicubic overshoots.
    """
    support, ratio = {"area": 0.5, "bilinear": 1.0, "bicubic": 2.0}[interpolation], old / new
    stretch = max(ratio, 1.0)
    centre = (np.arange(new) + 0.5) * ratio
    first = np.maximum((centre - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(np.int64), old)
    at = np.arange(old)[None]
    x = np.abs((at + 0.5 - centre[:, None]) / stretch)
    if interpolation == "area":
        y = ((at + 0.5 - centre[:, None]) / stretch > -0.5) & ((at + 0.5 - centre[:, None]) / stretch <= 0.5)
        weights = y.astype(np.float64)
    elif interpolation == "bilinear":
        weights = np.maximum(0, 1 - x)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights = np.where((at >= first[:, None]) & (at < last[:, None]), weights, 0)
    normal: F32 = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return normal


def resize(frames: U8 | F32, height: int, width: int, interpolation: Interpolation) -> F32:
    """[N, H, W, 3] -> [N, height, width, 3] float32, antialiased, not clipped: bicubic overshoots."""
    rows = resize_weights(frames.shape[1], height, interpolation)
    columns = resize_weights(frames.shape[2], width, interpolation)
    half = np.einsum("xw,nhwc->nhxc", columns, frames.astype(np.float32), optimize=True)
    whole: F32 = np.einsum("yh,nhxc->nyxc", rows, half, optimize=True).astype(np.float32)
    return whole


def transform(frames: U8, *, height: int, width: int, mode: str, interpolation: Interpolation, fill: int = 0) -> U8:
    """Frames to pictures of the model's size, as open_clip's own transform makes them.

    shortest: the picture covers the size, the middle is cropped. longest: the long side fits, padded with `fill`.
    squash: both sides fit.

    Args:
        frames: [N, H, W, 3] uint8 RGB.

    Returns:
        [N, height, width, 3] uint8, rounded and clipped.
    """
    old_height, old_width = frames.shape[1:3]
    if mode == "squash":
        new_height, new_width = height, width
    elif mode == "shortest":
        # The longer side is cut to an integer, not rounded: torchvision's rule.
        if width * old_height >= height * old_width:
            new_height, new_width = max(height, int(width * old_height / old_width)), width
        else:
            new_height, new_width = height, max(width, int(height * old_width / old_height))
    elif mode == "longest":
        scale = min(height / old_height, width / old_width)
        new_height, new_width = (max(round(n * scale), 1) for n in (old_height, old_width))
    else:
        raise ValueError(f"unknown resize mode {mode!r}, allowed: shortest, longest, squash")
    if (new_height, new_width) == (old_height, old_width):
        small = frames
    else:
        small = np.clip(np.rint(resize(frames, new_height, new_width, interpolation)), 0, 255).astype(np.uint8)
    top, left = round((new_height - height) / 2), round((new_width - width) / 2)
    small = small[:, max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if small.shape[1:3] == (height, width):
        return small
    out = np.full((len(frames), height, width, 3), fill, np.uint8)
    top, left = (height - small.shape[1]) // 2, (width - small.shape[2]) // 2
    out[:, top : top + small.shape[1], left : left + small.shape[2]] = small
    return out


def normalise(frames: U8, mean: F32, std: F32) -> F32:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] float32: (x / 255 - mean) / std, mean and std [3]."""
    return ((frames.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def frame_signals(frames: U8) -> tuple[F32, F32, F32, F32]:
    """What tells a clean frame from a poor one, and one picture from the next.

    Args:
        frames: [N, H, W, 3] uint8 RGB, N >= 1.

    Returns:
        sharpness [N]: variance of the 4-neighbour Laplacian of the luma (Pech-Pacheco et al. 2000); luma mean [N] and
        standard deviation [N], luma (BT.709 weights on R'G'B') in 0..1; colour histogram [N, 8 * 8 * 8], sums to 1.
        All float32.
    """
    kr, kb = LUMA_WEIGHTS["bt709"]
    luma = frames.astype(np.float32) @ np.array([kr, 1 - kr - kb, kb], np.float32) / 255
    inner = luma[:, 1:-1, 1:-1]
    edges = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    sharpness = edges.var((1, 2)) if edges.size else np.zeros(len(frames), np.float32)
    # Bits of the three channels side by side name the bin.
    coarse = (frames >> 5).astype(np.int64)
    bins = (coarse[..., 0] * HISTOGRAM_BINS + coarse[..., 1]) * HISTOGRAM_BINS + coarse[..., 2]
    histogram = np.stack([np.bincount(row.ravel(), minlength=HISTOGRAM_BINS**3) for row in bins])
    share = (histogram / max(bins[0].size, 1)).astype(np.float32)
    return sharpness, luma.mean((1, 2)), luma.std((1, 2)), share


def histogram_distance(one: F32, other: F32) -> F32:
    """How far two pictures' colours differ: 1 - intersection of their histograms (Swain & Ballard 1991).

    Args:
        one, other: [N, 8 * 8 * 8] float32 as `frame_signals` gives them; one of them may be [1, 8 * 8 * 8].

    Returns:
        [N] float32 in 0..1.
    """
    distance: F32 = (1 - np.minimum(one, other).sum(1)).clip(0, 1).astype(np.float32)
    return distance


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
    """Exact search: the k rows with the highest inner product, best first, ties to the lowest row.

    Args:
        queries: [Q, D] float32. vectors: [N, D] float32.

    Returns:
        scores [Q, min(k, N)] float32 and rows [Q, min(k, N)] int64.
    """
    scores = queries @ vectors.T
    k = min(k, scores.shape[1])
    if 0 < k < scores.shape[1]:
        # Everything at or above the k-th best value stays in the race, so that ties are settled by row alone.
        floor = np.partition(scores, -k, axis=1)[:, [-k]]
        keyed = np.where(scores >= floor, scores, -np.inf)
    else:
        keyed = scores
    rows = np.argsort(-keyed, axis=1, kind="stable")[:, :k].astype(np.int64)
    return np.take_along_axis(scores, rows, axis=1), rows
