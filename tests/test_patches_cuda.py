"""shift.cu and topk.cu against their definitions: sizes that are multiples of nothing, ends, ties, nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases_patches import (
    cases,
    check_adaptive_shift,
    check_fixed_shift,
    check_shift_pixels,
    check_shift_tokens,
    check_top_k,
    check_weighted_pool,
    on,
    some_linked,
    some_tokens,
)

from keyreel_kernels.cuda import Cuda

DRAWS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5))
DTYPES = st.sampled_from([np.float32, np.float16])


def test_the_cases(cuda: Cuda) -> None:
    cases(cuda)


# --- temporal shift -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(1, 9), GRIDS, st.integers(1, 5), st.integers(1, 40), DTYPES)
def test_adaptive_shift(
    cuda: Cuda, number: int, count: int, grid: tuple[int, int], steps: int, columns: int, dtype: Any
) -> None:
    """Steps beyond the frames, a single frame, a single patch, columns that fill no 16 bytes."""
    draw = np.random.default_rng(number)
    patches = some_tokens(draw, count, grid[0] * grid[1], columns, dtype)
    check_adaptive_shift(cuda, patches, grid, some_linked(draw, count), steps, 0.1)


@pytest.mark.parametrize(
    ("count", "grid", "columns", "steps", "dtype"),
    [
        (50, (3, 11), 72, 3, np.float16),  # several warps along the frames
        (21, (2, 3), 400, 32, np.float32),  # columns in several launches
        (9, (13, 17), 21, 2, np.float32),
        (40, (1, 2), 333, 32, np.float16),
    ],
)
def test_most_decisions_have_a_margin(
    cuda: Cuda, count: int, grid: tuple[int, int], columns: int, steps: int, dtype: Any
) -> None:
    draw = np.random.default_rng(count)
    patches = some_tokens(draw, count, grid[0] * grid[1], columns, dtype)
    linked = np.arange(count) % 15 > 0
    assert check_adaptive_shift(cuda, patches, grid, linked, steps, 0.15) > 0.9


@settings(max_examples=20, deadline=None)
@given(DRAWS, st.integers(1, 8), GRIDS, st.integers(1, 4))
def test_equal_changes_and_steps_are_settled_as_defined(
    cuda: Cuda, number: int, count: int, grid: tuple[int, int], steps: int
) -> None:
    """Unit axes: each change is 0 or 1 exactly, and all is ties."""
    draw = np.random.default_rng(number)
    axes = draw.integers(3, size=(count, grid[0] * grid[1]))
    patches = (np.eye(3)[axes] * 2.0 ** draw.integers(-3, 4, (*axes.shape, 1))).astype(np.float32)
    check_adaptive_shift(cuda, patches, grid, some_linked(draw, count), steps, 0.5, exact=True)


@pytest.mark.parametrize("linked", [[False] * 6, [False] + [True] * 5])
def test_cuts_everywhere_and_nowhere(cuda: Cuda, linked: list[bool]) -> None:
    patches = some_tokens(np.random.default_rng(4), 6, 12, 16, np.float32)
    source = on(cuda, "adaptive_shift", patches, (3, 4), np.array(linked), steps=2, threshold=0.05)
    own = np.broadcast_to(np.arange(6)[:, None], source.shape)
    assert (source == own).all() != linked[1]
    check_adaptive_shift(cuda, patches, (3, 4), np.array(linked), 2, 0.05)


def test_zeros_are_patches_too(cuda: Cuda) -> None:
    patches = np.zeros((4, 6, 8), np.float32)
    patches[2, :3] = 1
    check_adaptive_shift(cuda, patches, (2, 3), np.array([False, True, True, True]), 2, 0.1, exact=True)


def test_windows_with_a_halo_decide_as_the_whole_to_the_bit(cuda: Cuda) -> None:
    """Without any margin: the sums of a frame do not depend on where a window begins."""
    draw = np.random.default_rng(5)
    count, steps, size = 23, 3, 6
    patches, linked = some_tokens(draw, count, 12, 37, np.float16), some_linked(draw, count)
    whole = on(cuda, "adaptive_shift", patches, (3, 4), linked, steps=steps, threshold=0.1)
    for start in range(0, count, size):
        low, stop, high = max(start - steps, 0), min(start + size, count), min(start + size + steps, count)
        inside = linked[low:high].copy()
        inside[0] = False
        part = on(cuda, "adaptive_shift", patches[low:high], (3, 4), inside, steps=steps, threshold=0.1) + low
        np.testing.assert_array_equal(part[start - low : stop - low], whole[start:stop])


@pytest.mark.parametrize(("dtype", "columns", "prefix"), [(np.float16, 24, 1), (np.float16, 5, 3), (np.float32, 12, 5)])
def test_patches_may_be_a_view_behind_a_prefix(cuda: Cuda, dtype: Any, columns: int, prefix: int) -> None:
    draw = np.random.default_rng(columns)
    tokens, linked = some_tokens(draw, 7, prefix + 12, columns, dtype), some_linked(draw, 7)
    with cuda.scope():
        seen = cuda.to_device(tokens)[:, prefix:]
    got = on(cuda, "adaptive_shift", seen, (3, 4), cuda.to_device(linked), steps=2, threshold=0.1)
    packed = on(cuda, "adaptive_shift", tokens[:, prefix:].copy(), (3, 4), linked, steps=2, threshold=0.1)
    np.testing.assert_array_equal(got, packed)


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.integers(0, 20), GRIDS, st.integers(1, 7))
def test_fixed_shift(cuda: Cuda, number: int, count: int, grid: tuple[int, int], step: int) -> None:
    draw = np.random.default_rng(number)
    check_fixed_shift(cuda, count, grid, some_linked(draw, count), float(draw.uniform(0.01, 0.5)), step)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("columns", "prefix"), [(1, 0), (3, 1), (8, 5), (40, 2), (264, 1)])
def test_shift_tokens(cuda: Cuda, dtype: Any, columns: int, prefix: int) -> None:
    draw = np.random.default_rng(columns)
    bits = draw.integers(256, size=(5, prefix + 7, columns * np.dtype(dtype).itemsize)).astype(np.uint8)
    check_shift_tokens(cuda, bits.view(dtype), draw.integers(5, size=(5, 7)), prefix)


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 7), (12, 2)])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (13, 20), (7, 9), (19, 134)])
def test_shift_pixels(cuda: Cuda, grid: tuple[int, int], height: int, width: int) -> None:
    draw = np.random.default_rng(height)
    frames = draw.integers(256, size=(3, height, width, 3)).astype(np.uint8)
    check_shift_pixels(cuda, frames, draw.integers(3, size=(3, grid[0] * grid[1])), grid)


def test_nothing_to_shift(cuda: Cuda) -> None:
    none = np.zeros(0, bool)
    check_fixed_shift(cuda, 0, (2, 3), none, 0.25, 1)
    assert on(cuda, "adaptive_shift", np.zeros((0, 6, 8), np.float32), (2, 3), none, steps=2, threshold=0.1).size == 0
    check_shift_tokens(cuda, np.zeros((0, 7, 8), np.float32), np.zeros((0, 6), np.int64), 1)
    check_shift_pixels(cuda, np.zeros((0, 4, 6, 3), np.uint8), np.zeros((0, 6), np.int64), (2, 3))
    assert on(cuda, "weighted_pool", *(np.zeros((0, *s), np.float32) for s in ((6, 8), (6,), (6,))), 1.0).size == 0


# --- pooling and search -------------------------------------------------------------------------------------------


def shares(draw: np.random.Generator, *shape: int) -> Any:
    values = draw.random(shape) ** 3
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(DRAWS, st.integers(1, 4), st.integers(1, 40), st.integers(1, 300), DTYPES, st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_weighted_pool(
    cuda: Cuda, number: int, rows: int, places: int, columns: int, dtype: Any, strength: float
) -> None:
    draw = np.random.default_rng(number)
    values = (draw.normal(size=(rows, places, columns)) + 1).astype(dtype)
    check_weighted_pool(cuda, values, shares(draw, rows, places), shares(draw, rows, places), strength)


@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
def test_a_map_of_zeros_under_all_of_the_weight(cuda: Cuda, strength: float) -> None:
    values = np.eye(4, dtype=np.float32)[None]
    weights, attention = np.array([[0.5, 0.5, 0, 0]], np.float32), np.array([[0, 0, 0.5, 0.5]], np.float32)
    check_weighted_pool(cuda, values, weights, attention, strength)


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.integers(1, 9), st.integers(0, 400), st.integers(0, 70), st.integers(1, 30), DTYPES)
def test_top_k_with_ties(cuda: Cuda, number: int, queries: int, count: int, k: int, columns: int, dtype: Any) -> None:
    """Small whole numbers: products are exact, and full of ties."""
    draw = np.random.default_rng(number)
    q, x = (draw.integers(-2, 3, (n, columns)).astype(np.float32) for n in (queries, count))
    check_top_k(cuda, q, x.astype(dtype), k, exact=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("queries", "count", "columns", "k"),
    [(1, 1000, 100, 10), (5, 700, 136, 33), (23, 500, 72, 7), (70, 300, 20, 3), (2, 2500, 24, 1024)],
)
def test_top_k_of_real_vectors(cuda: Cuda, dtype: Any, queries: int, count: int, columns: int, k: int) -> None:
    """One pass and several, one block and several, lists that fill up again and again."""
    draw = np.random.default_rng(queries)
    q, x = draw.normal(size=(queries, columns)).astype(np.float32), draw.normal(size=(count, columns)).astype(dtype)
    check_top_k(cuda, q, x, k)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_top_k_of_rising_and_of_equal_rows(cuda: Cuda, dtype: Any) -> None:
    """The worst order, in which every row enters, and no order at all."""
    rising = np.arange(900, dtype=np.float32)[:, None] * np.ones(8, np.float32)
    check_top_k(cuda, np.ones((2, 8), np.float32), rising.astype(dtype), 20, exact=True)
    check_top_k(cuda, np.ones((2, 8), np.float32), np.ones((900, 8), dtype), 70, exact=True)
    signs = np.where(np.arange(300) % 2, 0.0, -0.0)[:, None].astype(dtype)
    check_top_k(cuda, np.ones((1, 1), np.float32), signs, 9, exact=True)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e5, 1e20])
def test_queries_of_any_size_against_halves(cuda: Cuda, size: float) -> None:
    """A query is split into halves at a scale of its own."""
    draw = np.random.default_rng(3)
    q = (draw.normal(size=(3, 40)) * size * 10.0 ** draw.uniform(-4, 0, (3, 40))).astype(np.float32)
    check_top_k(cuda, q, draw.normal(size=(200, 40)).astype(np.float16), 12)


def test_what_is_not_a_number_comes_last(cuda: Cuda) -> None:
    vectors = np.ones((150, 4), np.float32)
    vectors[::2] = np.nan
    vectors[1] = -np.inf
    scores, rows = on(cuda, "top_k", np.ones((1, 4), np.float32), vectors, 150)
    assert rows[0, :74].tolist() == list(range(3, 150, 2))
    assert (scores[0, :74] == 4).all()
    assert (scores[0, 74:] == -np.inf).all()
    assert sorted(rows[0, 74:].tolist()) == sorted({1, *range(0, 150, 2)})


def test_nothing_to_find(cuda: Cuda) -> None:
    for queries, count, k in ((0, 5, 2), (2, 0, 3), (2, 5, 0)):
        check_top_k(cuda, np.ones((queries, 8), np.float32), np.ones((count, 8), np.float32), k)


def test_too_many_results_are_refused(cuda: Cuda) -> None:
    with pytest.raises(ValueError, match=r"1025.*1024"):
        on(cuda, "top_k", np.ones((1, 8), np.float32), np.ones((2000, 8), np.float16), 1025)
