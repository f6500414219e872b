"""cpu_search.py against reference.py: ties, ends of blocks, rows in the worst order, a mapped file."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from bounds import FLOAT32_SUM
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel_kernels import cpu_search, reference


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 4),
    st.integers(0, 60),
    st.integers(0, 70),
    st.booleans(),
    st.integers(1, 90),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_top_k_with_ties_over_small_blocks(
    number: int, queries: int, count: int, k: int, rising: bool, threaded: int, missing: float
) -> None:
    draw = np.random.default_rng(number)
    # Small whole numbers: products are exact, and full of ties.
    q = draw.integers(-2, 3, (queries, 3)).astype(np.float32)
    x = draw.integers(-2, 3, (count, 3)).astype(np.float32)
    if rising and queries:  # every block has better ones than all before
        x = x[np.argsort(x @ q[0], kind="stable")]
    x[draw.random(len(x)) < missing] = np.nan
    with patch.multiple(cpu_search, _ROWS=8, _CACHED=3, _ROWS_A_PART=threaded):
        scores, rows = cpu_search.top_k(q, x, k)
    expected, order = reference.top_k(q, x, k)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(rows, order)
    for n, own in enumerate(q @ x.T):  # the definition in Python's own words
        assert order[n].tolist() == sorted(range(count), key=lambda row: (np.isnan(own[row]), -own[row], row))[:k]


@pytest.mark.parametrize("queries", [1, 5])
def test_top_k_of_a_mapped_file_and_of_a_view(tmp_path: Path, queries: int) -> None:
    draw = np.random.default_rng(queries)
    q, x = (draw.normal(size=(n, 48)).astype(np.float32) for n in (queries, 20_000))
    np.save(tmp_path / "x.npy", x)
    exact = q.astype(np.float64) @ x.astype(np.float64).T
    for given_x, own in ((np.load(tmp_path / "x.npy", mmap_mode="r"), exact), (x[::3], exact[:, ::3])):
        scores, rows = cpu_search.top_k(q, given_x, 50)
        np.testing.assert_array_equal(rows, np.argsort(-own, axis=1)[:, :50])
        np.testing.assert_allclose(scores, -np.sort(-own, axis=1)[:, :50], rtol=FLOAT32_SUM)
