"""cpu_kmeans.py against clustering.py: ragged videos, ties, repeats, no weights, blocks, and however many threads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bounds import FLOAT32
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases_kmeans import (
    SEEDED_TWICE,
    check_cluster,
    check_degenerate,
    check_seeded_twice,
    some_problems,
    unclear_labels,
)
from planted import DEGENERATE, planted, some_video, unit
from threadpoolctl import threadpool_limits

from keyreel_kernels import clustering, cpu_kmeans
from keyreel_kernels.clustering import COVERED, STILL, label_starts

DRAWS = st.integers(0, 2**32 - 1)
PENALTIES = st.sampled_from([0.0, 0.1, 1.0, 10.0])
MARGINS = st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0])
COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=3)


# --- whole runs ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, COUNTS, st.integers(1, 40))
def test_runs_equal_the_definition(number: int, penalty: float, margin: float, counts: list[int], width: int) -> None:
    problems = some_problems(np.random.default_rng(number), counts, width, 9)
    check_cluster(None, *problems, penalty=penalty, margin=margin, iterations=8)


@pytest.mark.parametrize(("margin", "penalty"), [(0.8, 0.1), (0.5, 0.1), (0.8, 0.0)])
def test_every_number_of_clusters_of_planted_scenes(margin: float, penalty: float) -> None:
    """As the automatic number has it: one span, one seeding, K up to 31; a good part is clear to the end."""
    x, scene = planted(3)
    w = np.where(scene < 0, 1e-3, 1).astype(np.float32)
    seeds, _ = cpu_kmeans.seed(x, w, np.array([0, len(x)]), 32)
    k = np.arange(1, 33, 3)
    spans = np.repeat(np.array([[0, len(x)]]), len(k), axis=0)
    rules: dict[str, Any] = {"penalty": penalty, "margin": margin, "iterations": 30}
    _, clear = check_cluster(None, x, w, spans, k, np.repeat(seeds, len(k), axis=0), **rules)
    assert clear >= len(k) / 3


@pytest.mark.parametrize("kind", ["scenes", "noise"])
def test_more_frames_than_a_block_and_many_clusters(kind: str) -> None:
    draw = np.random.default_rng(9)
    centre = draw.normal(size=(60, 64))
    x = unit((centre[draw.integers(60, size=1500)] if kind == "scenes" else 0) + 0.6 * draw.normal(size=(1500, 64)))
    w = (0.1 + draw.random(1500)).astype(np.float32)
    seeds, _ = clustering.seed(x, w, np.array([0, 1500]), 70)
    np.testing.assert_array_equal(cpu_kmeans.seed(x, w, np.array([0, 1500]), 70)[0], seeds)
    state = (x, w, np.array([[0, 1500], [0, 1500]]), np.array([70, 6]), np.repeat(seeds, 2, axis=0))
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 25}
    found, expected = cpu_kmeans.cluster(*state, **rules), clustering.cluster(*state, **rules)
    # A frame that is unclear on the way may go to the other of two clusters, and a few may follow.
    assert (found.labels == expected.labels).mean() > 0.999
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.centroids[1, :6], axis=1), 1, atol=FLOAT32)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_videos(kind: str) -> None:
    check_degenerate(None, kind, atol=FLOAT32)


@pytest.mark.parametrize(("kinds", "labels"), SEEDED_TWICE)
def test_a_cluster_without_a_frame_goes_where_it_is_needed_or_stays(kinds: int, labels: list[int]) -> None:
    check_seeded_twice(cpu_kmeans.cluster, kinds, labels)


def test_problems_with_other_seeds_over_one_span_do_not_share_them() -> None:
    draw = np.random.default_rng(2)
    x, w = unit(draw.normal(size=(40, 12))), np.ones(40, np.float32)
    seeds = np.stack([draw.permutation(40)[:5] for _ in range(4)])
    k, spans = np.array([5, 3, 5, 2]), np.array([[0, 40]] * 3 + [[20, 40]])
    seeds[3] = 20 + seeds[3] % 20
    _, clear = check_cluster(None, x, w, spans, k, seeds, penalty=0.0, margin=0.8, iterations=10)
    assert clear >= 2


def test_threads_and_another_run_change_nothing() -> None:
    draw = np.random.default_rng(6)
    x, w = unit(draw.normal(size=(1200, 96))), np.ones(1200, np.float32)
    offsets, spans, k = np.array([0, 1200]), np.array([[0, 1200]] * 2), np.array([24, 9])
    runs = []
    for threads in (1, 1, 2):
        with threadpool_limits(threads):
            seeds, gaps = cpu_kmeans.seed(x, w, offsets, 24)
            again = np.repeat(seeds, 2, axis=0)
            runs.append((seeds, gaps, cpu_kmeans.cluster(x, w, spans, k, again, penalty=0.1, margin=0.8, iterations=9)))
    for seeds, gaps, found in runs[1:]:
        np.testing.assert_array_equal(seeds, runs[0][0])
        np.testing.assert_array_equal(gaps, runs[0][1])
        np.testing.assert_array_equal(found.labels, runs[0][2].labels)
        np.testing.assert_allclose(found.history, runs[0][2].history, atol=STILL)
    for name in ("centroids", "similarity", "history"):
        np.testing.assert_array_equal(getattr(runs[0][2], name), getattr(runs[1][2], name))


def test_more_clusters_than_seeds_are_refused() -> None:
    x, seeds = np.eye(3, 4, dtype=np.float32), np.array([[0, 1, -1]])
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 3}
    with pytest.raises(ValueError, match="3 clusters and 2 valid seeds"):
        cpu_kmeans.cluster(x, np.ones(3, np.float32), np.array([[0, 3]]), np.array([3]), seeds, **rules)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_numbers_are_refused(bad: float) -> None:
    x, w = unit(np.random.default_rng(0).normal(size=(12, 6))), np.ones(12, np.float32)
    x[7, 2] = bad
    rows, _ = cpu_kmeans.seed(x, w, np.array([0, 5, 12]), 3)
    assert (rows[0] >= 0).all()
    assert (rows[1] == -1).all()
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 4}
    with pytest.raises(ValueError, match="problem 1 has 3 clusters and 0 valid seeds"):
        cpu_kmeans.cluster(x, w, np.array([[0, 5], [5, 12]]), np.array([3, 3]), rows, **rules)


def test_sums_do_not_drift_over_rounds() -> None:
    draw = np.random.default_rng(4)
    x, w = unit(draw.normal(size=(300, 16))), draw.random(300).astype(np.float32)
    labels = draw.integers(3, size=300)

    def errs(problem: Any) -> float:
        exact = np.zeros((3, 16))
        np.add.at(exact, labels, w[:, None].astype(np.float64) * x / w.sum(dtype=np.float64))
        return float(np.abs(problem.shares - exact).max())

    problem = cpu_kmeans._Problem(x, w, x[:3], x @ x[:3].T, 0.1, 0.8)
    problem.shares = problem._shares(problem.shares, problem.labels, labels)
    for _ in range(3000):
        before = labels
        labels = np.where(draw.random(300) < 0.2, draw.integers(3, size=300), before)
        problem.shares = problem._shares(problem.shares, before, labels)
    assert errs(problem) < 1e-8


# --- steps --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(DRAWS, COUNTS, st.integers(1, 30), st.integers(1, 20))
def test_assign(number: int, counts: list[int], width: int, most: int) -> None:
    """Labels are the definition's also where float32 cannot tell: copies of a centroid, and others beside them."""
    draw = np.random.default_rng(number)
    x, _, offsets = some_video(draw, counts, width)
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    k = draw.integers(1, most + 1, size=len(counts))
    centroids = np.zeros((len(counts), most, width), np.float32)
    for m, count in enumerate(k):
        own = x[draw.integers(len(x), size=count)].astype(np.float64)
        centroids[m, :count] = unit(own + draw.choice([0, 1e-7, 1e-6, 0.3]) * draw.normal(size=own.shape))
    labels, similarity = cpu_kmeans.assign(x, spans, k, centroids)
    expected, cosine = clustering.assign(x, spans, k, centroids)
    np.testing.assert_allclose(similarity, cosine, atol=FLOAT32)
    # Two ways to sum in float64 differ by 1e-16: what is closer than 1e-14 counts as equal.
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        exact = x[start:stop].astype(np.float64) @ centroids[m, : k[m]].astype(np.float64).T
        own, other = (some[at[m] : at[m + 1], None] for some in (labels, expected))
        differ = np.abs(np.take_along_axis(exact, own, 1) - np.take_along_axis(exact, other, 1))
        assert differ.max() < 1e-14
    clear = ~unclear_labels(x, spans, k, centroids)
    np.testing.assert_array_equal(labels[clear], expected[clear])


@settings(max_examples=40, deadline=None)
@given(DRAWS, COUNTS, st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 1e-6, 1e-4, 1.0]))
def test_seeds(number: int, counts: list[int], width: int, most: int, apart: float) -> None:
    """Also of frames that differ by next to nothing, so that float32 cannot order them."""
    draw = np.random.default_rng(number)
    x, w, offsets = some_video(draw, counts, width)
    if apart < 1:
        x = unit(x[:1].astype(np.float64) + apart * x)
    rows, gaps = cpu_kmeans.seed(x, w, offsets, most)
    expected, sizes = clustering.seed(x, w, offsets, most)
    for b in range(len(counts)):
        # From the first frames on that are as far as each other, or as good as covered, the order may differ.
        same = int(np.append(rows[b] != expected[b], True).argmax())
        np.testing.assert_allclose(gaps[b, :same], sizes[b, :same], rtol=1e-6, atol=1e-12)
        if same < most:
            assert abs(gaps[b, same] - sizes[b, same]) <= 1e-12 + (sizes[b, same] < 2 * COVERED) * 2 * COVERED


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 4))
def test_temporal_support(number: int, counts: list[int], width: int, reach: int) -> None:
    x, _, offsets = some_video(np.random.default_rng(number), counts, width)
    check_support(x, offsets, reach)


@pytest.mark.parametrize("count", [255, 256, 257, 259, 515])
def test_temporal_support_over_blocks(count: int) -> None:
    draw = np.random.default_rng(count)
    x = unit(np.cumsum(draw.normal(size=(count, 8)), axis=0))
    check_support(x, np.array([0, count]), 3)


def check_support(x: Any, offsets: Any, reach: int) -> None:
    support, smooth = cpu_kmeans.temporal_support(x, offsets, reach)
    expected, mean = clustering.temporal_support(x, offsets, reach)
    assert (support.dtype, smooth.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(support, expected, atol=FLOAT32)
    wrong = np.abs(smooth - mean).max(1) > FLOAT32
    for start, stop in itertools.pairwise(offsets):
        # Which neighbours are the most alike, and more alike than usual, must hang on more than rounding of float64.
        cosine = x[start:stop].astype(np.float64) @ x[start:stop].astype(np.float64).T
        for t in np.flatnonzero(wrong[start:stop]):
            near = [cosine[t, u] for u in range(stop - start) if u != t and abs(u - t) <= reach] + [cosine.mean()]
            assert np.diff(np.sort(near)).min() < 1e-14


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_representatives(number: int, share: float) -> None:
    draw = np.random.default_rng(number)
    spans, k = np.array([[0, 7], [3, 110], [9, 10]]), np.array([3, 5, 1])
    count = (spans[:, 1] - spans[:, 0]).tolist()
    labels = np.concatenate([draw.integers(n, size=length) for n, length in zip(k, count, strict=True)])
    similarity = draw.choice(np.array([-0.5, -0.25, -0.0, 0.0, 0.5], np.float32), size=len(labels))  # with ties
    clean = draw.random(110) < share
    rows = cpu_kmeans.representatives(spans, k, labels, similarity, clean)
    np.testing.assert_array_equal(rows, clustering.representatives(spans, k, labels, similarity, clean))
