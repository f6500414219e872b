"""The definition of the temporal shift against loops in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from bounds import FLOAT32
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import adaptive_by_loops, change_by_loops, neighbour, panned, some_linked, some_tokens

from keyreel_kernels import Ops

OPS = Ops("cpu")
DRAWS = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(
    DRAWS,
    st.integers(1, 9),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.0625, 0.125, 0.25, 0.375, 0.5]),
    st.integers(1, 3),
)
def test_fixed_shift_equals_a_loop(number: int, count: int, grid: tuple[int, int], fraction: float, step: int) -> None:
    linked = some_linked(np.random.default_rng(number), count)
    found = OPS.fixed_shift(count, grid, linked, fraction=fraction, step=step)
    part, places = Fraction(fraction), grid[0] * grid[1]
    # Every 1/fraction-th patch in running order, back and ahead in turn; row r is then rotated right by r places.
    even = [i for i in range(places) if math.floor((i + 1) * part) > math.floor(i * part)]
    reach = {}
    for n, i in enumerate(even):
        row, column = divmod(i, grid[1])
        reach[row * grid[1] + (column + row) % grid[1]] = step if n % 2 else -step
    assert len(reach) == math.floor(places * part)
    assert (found.dtype, found.shape) == (np.int64, (count, places))
    for t in range(count):
        assert found[t].tolist() == [neighbour(t, reach[i], linked) if i in reach else t for i in range(places)]


@pytest.mark.parametrize("side", [7, 8, 14, 16])
def test_fixed_shift_is_even_over_rows_columns_and_directions(side: int) -> None:
    linked = np.array([False, True, True])
    source = OPS.fixed_shift(3, (side, side), linked, fraction=0.25, step=1)[1].reshape(side, side)
    moved = source != 1
    assert moved.sum() == side * side // 4
    for counts in (moved.sum(0), moved.sum(1)):
        assert counts.min() >= side // 4 - 1
        assert counts.max() <= side // 4 + 2
    assert abs(int((source == 0).sum()) - int((source == 2).sum())) <= 1


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.integers(1, 10), st.tuples(st.integers(1, 4), st.integers(1, 5)), st.integers(1, 4))
def test_adaptive_shift_equals_a_loop(number: int, count: int, grid: tuple[int, int], steps: int) -> None:
    draw = np.random.default_rng(number)
    linked, patches = some_linked(draw, count), some_tokens(draw, count, grid[0] * grid[1], 8, np.float32)
    found = OPS.adaptive_shift(patches, grid, linked, steps=steps, threshold=0.1)
    expected, close = adaptive_by_loops(patches, grid, linked, steps, 0.1)
    np.testing.assert_array_equal(found[~close], expected[~close])


@settings(max_examples=60, deadline=None)
@given(
    DRAWS,
    st.integers(1, 7),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.integers(1, 20),
    st.integers(1, 9),
    st.booleans(),
)
def test_patch_change_equals_a_loop(
    number: int, count: int, grid: tuple[int, int], columns: int, steps: int, moving: bool
) -> None:
    """Where no displacement leads by so little that float32 may decide otherwise."""
    draw = np.random.default_rng(number)
    places = grid[0] * grid[1]
    shape: Any = grid if moving else places
    patches = (panned if moving else some_tokens)(draw, count, shape, columns, np.float32)
    patches[draw.random((count, places)) < 0.05] = 0
    linked = some_linked(draw, count)
    expected, close = change_by_loops(patches, grid, linked, steps)
    found = OPS.patch_change(patches, grid, linked, steps=steps)
    assert (found.dtype, found.shape) == (np.float32, (count, places))
    assert 0 <= found.min() <= found.max() <= 2
    np.testing.assert_allclose(found[~close], expected[~close], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("way", [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
def test_patch_change_takes_out_the_motion_of_the_camera(way: tuple[int, int]) -> None:
    """Orthogonal patches under a camera that moves by one patch a frame and follows an object in the middle."""
    (h, w), (dy, dx), middle = (5, 6), way, (2, 3)
    axes = np.eye((h + 2) * (w + 2) + 1, dtype=np.float32)
    world = axes[1:].reshape(h + 2, w + 2, -1)
    patches = np.stack([world[1 + dy * t : 1 + dy * t + h, 1 + dx * t : 1 + dx * t + w] for t in (-1, 0, 1)])
    patches[:, *middle] = axes[0]
    expected = np.zeros((h, w))
    for row, column in np.ndindex(h, w):
        for sign in (-1, 1):
            other = row + sign * dy, column + sign * dx
            outside = not (0 <= other[0] < h and 0 <= other[1] < w)
            expected[row, column] += 0.5 * (outside or middle in ((row, column), other))
    found = OPS.patch_change(patches.reshape(3, h * w, -1), (h, w), np.array([False, True, True]), steps=1)
    np.testing.assert_array_equal(found[1].reshape(h, w), expected)


def test_an_object_that_moves_by_a_patch_does_not_explain_itself_away() -> None:
    axes = np.eye(21, dtype=np.float32)
    patches = np.stack([axes[:20]] * 3)
    for t, place in enumerate((6, 7, 8)):
        patches[t, place] = axes[20]
    found = OPS.patch_change(patches, (4, 5), np.array([False, True, True]), steps=1)
    expected = np.zeros((3, 20))
    expected[0, [6, 7]] = expected[2, [7, 8]] = expected[1, 7] = 1
    expected[1, [6, 8]] = 0.5
    np.testing.assert_array_equal(found, expected)


def test_a_camera_is_still_unless_a_displacement_explains_more() -> None:
    """Even pictures: all displacements explain as much. A lead below the bonus does not count, one above it does."""
    linked = np.array([False, True])
    assert not OPS.patch_change(np.ones((2, 12, 4), np.float32), (3, 4), linked, steps=3).any()
    for lead, expected in ((0.004, [0.004] * 9), (0.006, [0.006] + [0.0] * 8)):
        # One row, each patch turned against the one before it; a move by one patch turns all of them back.
        angle = np.arccos(1 - lead) * (np.arange(9) + np.array([[0], [1]]))
        patches = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
        found = OPS.patch_change(patches, (1, 9), linked, steps=1)
        np.testing.assert_allclose(found[0], expected, atol=FLOAT32)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_shift_tokens_equals_a_loop(prefix: int) -> None:
    draw = np.random.default_rng(prefix)
    tokens = draw.normal(size=(4, prefix + 6, 3)).astype(np.float32)
    before, source = tokens.copy(), draw.integers(4, size=(4, 6))
    found = OPS.shift_tokens(tokens, source, prefix)
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(found[:, :prefix], tokens[:, :prefix])
    for t, i in np.ndindex(4, 6):
        np.testing.assert_array_equal(found[t, prefix + i], tokens[source[t, i], prefix + i])


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 7), (12, 2)])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (10, 11), (7, 9)])
def test_shift_pixels_equals_a_loop(grid: tuple[int, int], height: int, width: int) -> None:
    draw = np.random.default_rng(height)
    frames = draw.integers(0, 256, (3, height, width, 3), np.uint8)
    source = draw.integers(3, size=(3, grid[0] * grid[1]))
    expected = np.zeros_like(frames)
    for t, r, c in np.ndindex(3, *grid):
        rows = slice(r * height // grid[0], (r + 1) * height // grid[0])
        columns = slice(c * width // grid[1], (c + 1) * width // grid[1])
        expected[t, rows, columns] = frames[source[t, r * grid[1] + c], rows, columns]
    np.testing.assert_array_equal(OPS.shift_pixels(frames, source, grid), expected)
