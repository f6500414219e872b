"""Search in 8 bits and float32 against float64 and a sort: nothing that is among the best is ever lost."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from bounds import FLOAT32_SUM
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.scan import exact_scan
from keyreel_kernels import reference, scan
from keyreel_kernels.scan import I8, Products, Scan

DRAWS = st.integers(0, 2**32 - 1)


def by_numpy(rows: I8) -> Products:
    def products(queries: I8) -> np.ndarray:
        # As CPUs without VNNI have it: in no pair of bytes may the 16 bits overflow.
        largest = [int(np.abs(array.astype(int)).max(initial=0)) for array in (queries, rows)]
        assert 2 * (largest[0] + 64) * largest[1] <= np.iinfo(np.int16).max
        return queries.astype(np.int32) @ rows.astype(np.int32).T

    return products


@settings(max_examples=80, deadline=None)
@given(DRAWS, st.integers(0, 4), st.integers(0, 90), st.integers(0, 40), st.sampled_from([1.0, 1e-3, 0.0]))
def test_ties_go_to_the_lowest_row(number: int, queries: int, count: int, k: int, share: float) -> None:
    """Whole numbers, whose products are exact in float32 and full of ties, of lengths far apart; rows of zeros."""
    draw = np.random.default_rng(number)
    q = draw.integers(-2, 3, (queries, 5)).astype(np.float32)
    x = draw.integers(-2, 3, (count, 5)) * 2.0 ** draw.integers(-3, 12 if share else -2, (count, 1))
    x = np.where(draw.random((count, 1)) < 0.1, 0, x).astype(np.float32)
    with patch.multiple(scan, _SHARD=16, _FIRST=7):
        scores, rows = Scan(x, by_numpy).top_k(q, k)
    expected, order = reference.top_k(q, x, k)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(rows, order)


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(1, 70), st.integers(1, 30), st.sampled_from([1.0, 0.1, 0.003, 1e-6]), st.booleans())
def test_no_score_is_better_than_those_found(number: int, width: int, k: int, apart: float, outlier: bool) -> None:
    """Vectors that 8 bits can tell from each other, hardly, and not at all; one number far larger than the others."""
    draw = np.random.default_rng(number)
    x = draw.normal(size=(1, width)) + apart * draw.normal(size=(300, width))
    x[:, 0] *= 1000 if outlier else 1
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    q = np.concatenate([x[:2], draw.normal(size=(2, width)).astype(np.float32)])
    with patch.multiple(scan, _SHARD=64, _FIRST=40):
        scores, rows = Scan(x, by_numpy).top_k(q, k)
    exact = q.astype(np.float64) @ x.astype(np.float64).T
    size = np.linalg.norm(q, axis=1, keepdims=True)
    assert (np.abs(scores + np.sort(-exact, axis=1)[:, :k]) <= FLOAT32_SUM * size).all()
    assert (np.abs(scores - np.take_along_axis(exact, rows, 1)) <= FLOAT32_SUM * size).all()
    assert all(len(set(own.tolist())) == k for own in rows)


@pytest.mark.parametrize(("count", "width", "queries"), [(300, 64, 3), (1000, 37, 1), (1, 1, 2), (129, 512, 32)])
def test_onnxruntime_multiplies_exactly(count: int, width: int, queries: int) -> None:
    stored: list[Products] = []

    def keep(vectors: np.ndarray, store: object) -> None:
        stored.append(store(whole))  # type: ignore[operator]

    draw = np.random.default_rng(count)
    whole = draw.choice(np.array([-127, -126, -1, 0, 1, 127], np.int8), size=(count, width))
    with patch("keyreel.scan.Scan", keep):
        exact_scan(np.empty((0, width), np.float32), threads=1)
    q = draw.choice(np.array([-scan.QUERY, 0, 3, scan.QUERY], np.int8), size=(queries, width))
    np.testing.assert_array_equal(stored[0](q), q.astype(np.int64) @ whole.astype(np.int64).T)


def test_a_mapped_file_and_most_rows_looked_at_once(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(20_000, 128)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.save(tmp_path / "x.npy", x)
    q = (0.5 * x[:6] + 0.05 * draw.normal(size=(6, 128))).astype(np.float32)
    with patch.multiple(scan, _SHARD=8192):
        held = exact_scan(np.load(tmp_path / "x.npy", mmap_mode="r"), threads=1)
    scores, rows = held.top_k(q, 10)
    exact = q.astype(np.float64) @ x.astype(np.float64).T
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :10], rtol=FLOAT32_SUM)
    # The bound is worth something: a hundredth of the rows is looked at again, not all of them.
    assert max(len(own) for own in held._candidates(q, 10)) < 400
