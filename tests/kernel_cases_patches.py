"""The kernels of shift.cu and topk.cu against their definitions, as checks that tests and the sanitizers run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from bounds import FLOAT32, FLOAT32_SUM
from numpy.typing import NDArray

from keyreel_kernels import cuda_patches, reference
from keyreel_kernels.cuda import Cuda

Bools = NDArray[np.bool_]
# A decision on change hangs on a dot product of unit vectors, and on means of such.
MARGIN = 2 * FLOAT32


def on(cuda: Cuda, name: str, *arrays: Any, **options: Any) -> Any:
    """Runs an operation with its NumPy arrays copied up, and nothing copied down meanwhile."""
    with cuda.scope():
        args = [cuda.to_device(array) if isinstance(array, np.ndarray) else array for array in arrays]
        before = cuda.bytes_to_host
        found = getattr(cuda_patches, name)(cuda, *args, **options)
        assert cuda.bytes_to_host == before
    return tuple(cuda.to_host(one) for one in found) if isinstance(found, tuple) else cuda.to_host(found)


def some_linked(draw: np.random.Generator, count: int) -> Bools:
    linked = draw.random(count) < 0.8
    linked[:1] = False
    return linked


def some_tokens(draw: np.random.Generator, count: int, places: int, columns: int, dtype: Any) -> Any:
    """Patches that move by themselves, some of them still, in some frames all of them."""
    steps = draw.normal(size=(count, places, columns)) * (draw.random((count, places, 1)) < 0.5)
    steps *= draw.uniform(0, 2, (count, 1, 1)) * (draw.random((count, 1, 1)) < 0.8)
    return (draw.normal(size=(1, places, columns)) + np.cumsum(steps, axis=0)).astype(dtype)


# --- temporal shift -----------------------------------------------------------------------------------------------


def undecided(patches: Any, linked: Bools, steps: int, threshold: float) -> Bools:
    """[T, P]: where the definition, followed in float64, decides by less than MARGIN."""
    count, places = patches.shape[:2]
    e = patches.astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
    shot, half = np.cumsum(~linked), places // 2
    out = np.zeros((count, places), bool)
    for t in range(count):
        change = np.zeros((steps, places))
        for s in range(1, steps + 1):
            if s <= t and shot[t] == shot[t - s]:
                change[s - 1] = 1 - (e[t] * e[t - s]).sum(-1)
        if change.max() < threshold - MARGIN:
            continue  # nothing moves, whatever the step
        most = np.sort(change)[:, places - math.ceil(places / 4) :].mean(1)
        far = most - most.max() / 2
        step = next((s for s in range(steps) if far[s] >= 0), 0)
        if most.any() and (np.abs(far[: step + 1]) < MARGIN).any():
            out[t] = True
            continue
        own = change[step]
        if own.any():
            out[t] |= np.abs(own - threshold) < MARGIN
            if half > 0:
                last, after = np.sort(own)[::-1][half - 1 : half + 1]
                out[t] |= (last - after < MARGIN) & (np.abs(own - last) < MARGIN) & (own > threshold - MARGIN)
    return out


def check_adaptive_shift(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Bools, steps: int, threshold: float, *, exact: bool = False
) -> float:
    """The share of decisions with a margin, all of which are the definition's."""
    got = on(cuda, "adaptive_shift", patches, grid, linked, steps=steps, threshold=threshold)
    expected = reference.adaptive_shift(patches.astype(np.float32), grid, linked, steps=steps, threshold=threshold)
    assert got.dtype == np.int64
    clear = np.ones(got.shape, bool) if exact else ~undecided(patches, linked, steps, threshold)
    np.testing.assert_array_equal(np.where(clear, got, -1), np.where(clear, expected, -1))
    return float(clear.mean()) if clear.size else 1.0


def check_fixed_shift(cuda: Cuda, count: int, grid: tuple[int, int], linked: Bools, share: float, step: int) -> None:
    got = on(cuda, "fixed_shift", count, grid, linked, share=share, step=step)
    expected = reference.fixed_shift(count, grid, linked, share=share, step=step)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def check_shift_tokens(cuda: Cuda, tokens: Any, source: Any, prefix: int) -> None:
    got = on(cuda, "shift_tokens", tokens, source, prefix)
    expected = reference.shift_tokens(tokens, source, prefix)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def check_shift_pixels(cuda: Cuda, frames: Any, source: Any, grid: tuple[int, int]) -> None:
    got = on(cuda, "shift_pixels", frames, source, grid)
    np.testing.assert_array_equal(got, reference.shift_pixels(frames, source, grid))


# --- pooling and search -------------------------------------------------------------------------------------------


def check_weighted_pool(cuda: Cuda, values: Any, weights: Any, attention: Any, strength: float) -> None:
    got = on(cuda, "weighted_pool", values, weights, attention, strength)
    expected = reference.weighted_pool(values.astype(np.float32), weights, attention, strength)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=FLOAT32_SUM)


def check_top_k(cuda: Cuda, queries: Any, vectors: Any, k: int, *, exact: bool = False) -> None:
    """Scores within rounding; rows the definition's where they are apart by more, all of them where it is exact."""
    scores, rows = on(cuda, "top_k", queries, vectors, k)
    expected = reference.top_k(queries, vectors.astype(np.float32), k)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert scores.shape == rows.shape == expected[0].shape
    if exact:
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_array_equal(scores, expected[0])
        return
    if not scores.size:
        return
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    sizes = np.linalg.norm(queries.astype(np.float64), axis=1), np.linalg.norm(vectors.astype(np.float64), axis=1)
    margin = FLOAT32 * sizes[0][:, None] * sizes[1].max()
    order = np.argsort(-products, axis=1, kind="stable")
    best = np.take_along_axis(products, order, axis=1)
    assert (np.abs(scores - np.take_along_axis(products, rows, axis=1)) <= margin).all()
    assert (np.abs(scores - best[:, : scores.shape[1]]) <= margin).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    apart = np.diff(best, axis=1) < -2 * margin
    edge = np.ones((len(best), 1), bool)
    clear = (np.concatenate([edge, apart], 1) & np.concatenate([apart, edge], 1))[:, : rows.shape[1]]
    np.testing.assert_array_equal(np.where(clear, rows, -1), np.where(clear, order[:, : rows.shape[1]], -1))
    assert all(len(set(found)) == len(found) for found in rows.tolist())


def cases(cuda: Cuda) -> None:
    """One small run of each kernel, on more than one block where there may be several."""
    draw = np.random.default_rng(0)
    grid, linked = (3, 5), np.array([False, True, True, True, False, True])
    for dtype, columns in ((np.float32, 19), (np.float16, 264)):
        tokens = some_tokens(draw, 6, 15, columns, dtype)
        check_adaptive_shift(cuda, tokens, grid, linked, 3, 0.1)
        source = draw.integers(6, size=(6, 13))
        check_shift_tokens(cuda, tokens, source, 2)
        weights, attention = draw.random((2, 6, 15)).astype(np.float32)
        check_weighted_pool(cuda, tokens, weights, attention, 1.5)
    check_fixed_shift(cuda, 6, grid, linked, 0.3, 1)
    for width in (9, 12):
        frames = draw.integers(256, size=(6, 7, width, 3)).astype(np.uint8)
        check_shift_pixels(cuda, frames, draw.integers(6, size=(6, 15)), grid)
    for dtype in (np.float16, np.float32):
        q, x = draw.integers(-2, 3, (3, 20)).astype(np.float32), draw.integers(-2, 3, (150, 20)).astype(dtype)
        check_top_k(cuda, q, x, 5, exact=True)
