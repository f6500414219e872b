"""The definition of key-frame clustering against loops, enumeration and scikit-learn; J never rises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bounds import AT_MARGIN, AT_REST, FLOAT32, FLOAT64_SUM, ROUNDED_CENTROIDS, SKLEARN_SHARE
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases_kmeans import SEEDED_TWICE, check_seeded_twice
from numpy.typing import NDArray
from planted import DEGENERATE, degenerate, scenes, some_vectors, some_weights, unit

from keyreel_kernels import Ops
from keyreel_kernels.clustering import COVERED, Clusters, label_starts

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

OPS = Ops("cpu")
PENALTIES = st.sampled_from([0.0, 0.1, 1.0, 10.0])
MARGINS = st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0])
DRAWS = st.integers(0, 2**32 - 1)


def run(x: F32, w: F32, k: int, *, penalty: float, margin: float, iterations: int = 100) -> Clusters:
    """One problem over all rows; k is lowered to the number of seeds."""
    rows, _ = OPS.seed(x, w, np.array([0, len(x)]), k)
    k = int((rows[0] >= 0).sum())
    found: Clusters = OPS.cluster(
        x,
        w,
        np.array([[0, len(x)]]),
        np.array([k]),
        rows[:, :k],
        penalty=penalty,
        margin=margin,
        iterations=iterations,
    )
    return found


def objective_by_loops(x: F32, w: F32, c: F32, labels: I64, penalty: float, margin: float) -> float:
    fit = total = closeness = 0.0
    for t in range(len(x)):
        fit += float(w[t]) * sum(float(a) * float(b) for a, b in zip(x[t], c[labels[t]], strict=True))
        total += float(w[t])
    for j, k in itertools.combinations(range(len(c)), 2):
        closeness += max(0.0, sum(float(a) * float(b) for a, b in zip(c[j], c[k], strict=True)) - margin)
    return -fit / max(total, 1e-30) + penalty / len(c) * closeness


def best_objective(x: F32, w: F32, c: F32, penalty: float, margin: float) -> float:
    """J with the best labels."""
    c64 = c.astype(np.float64)
    fit = (w.astype(np.float64) * (x.astype(np.float64) @ c64.T).max(1)).sum() / max(w.astype(np.float64).sum(), 1e-30)
    close = sum(max(0.0, float(a @ b) - margin) for a, b in itertools.combinations(c64, 2))
    return -float(fit) + penalty / len(c) * close


# --- weights and seeds --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 4))
def test_temporal_support_is_what_the_two_best_neighbours_say(number: int, counts: list[int], reach: int) -> None:
    draw = np.random.default_rng(number)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    x = unit(draw.normal(size=(sum(counts), 6)))
    support, smooth = OPS.temporal_support(x, offsets, reach)
    assert (support.dtype, smooth.dtype) == (np.float32, np.float32)
    for start, stop in itertools.pairwise(offsets):
        for t in range(start, stop):
            near = [u for u in range(start, stop) if u != t and abs(u - t) <= reach]
            best = sorted(near, key=lambda u: -float(x[t].astype(np.float64) @ x[u].astype(np.float64)))[:2]
            expected = np.mean([float(x[t] @ x[u]) for u in best]) if best else 1.0
            pairs = x[start:stop].astype(np.float64) @ x[start:stop].astype(np.float64).T
            alike = [u for u in best if pairs[t - start, u - start] > pairs.mean()]
            mean = sum((x[u].astype(np.float64) for u in alike), x[t].astype(np.float64))
            assert support[t] == pytest.approx(expected, abs=FLOAT32)
            np.testing.assert_allclose(smooth[t], mean / np.linalg.norm(mean), atol=FLOAT32)


def seeds_by_loops(x: F32, w: F32, count: int) -> tuple[list[int], list[float]]:
    z, v = x.astype(np.float64), w.astype(np.float64)
    typical = [v[t] * sum(v[u] * (z[t] @ z[u]) for u in range(len(z))) for t in range(len(z))]
    rows = [typical.index(max(typical))]
    gaps = [float(v[rows[0]])]
    while len(rows) < min(count, len(z)):
        apart = [min(1 - z[t] @ z[r] for r in rows) for t in range(len(z))]
        weighted = [v[t] * a if a > COVERED else 0.0 for t, a in enumerate(apart)]
        if max(weighted) <= 0:
            break
        rows.append(weighted.index(max(weighted)))
        gaps.append(float(max(weighted)))
    return rows, gaps


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 14), min_size=1, max_size=4), st.integers(1, 8))
def test_seeds_are_farthest_first_and_nested(number: int, counts: list[int], most: int) -> None:
    draw = np.random.default_rng(number)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    x = unit(draw.normal(size=(sum(counts), 5)))
    w = (0.1 + draw.random(len(x))).astype(np.float32)
    rows, gaps = OPS.seed(x, w, offsets, most)
    assert rows.shape == gaps.shape == (len(counts), most)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets)):
        expected, weighted = seeds_by_loops(x[start:stop], w[start:stop], most)
        assert rows[b].tolist() == [start + r for r in expected] + [-1] * (most - len(expected))
        np.testing.assert_allclose(gaps[b], weighted + [0.0] * (most - len(expected)), atol=FLOAT32)
    for fewer in range(1, most + 1):
        np.testing.assert_array_equal(OPS.seed(x, w, offsets, fewer)[0], rows[:, :fewer])


def test_gaps_reach_two() -> None:
    x = np.array([[1, 0], [1, 0], [-1, 0], [0, 1]], np.float32)
    rows, gaps = OPS.seed(x, np.ones(4, np.float32), np.array([0, 4]), 4)
    assert rows.tolist() == [[0, 2, 3, -1]]
    assert gaps.tolist() == [[1, 2, 1, 0]]


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(1, 6), st.integers(0, 12))
def test_repeats_are_seeded_once(number: int, distinct: int, repeats: int) -> None:
    """Unit vectors of float32 are not quite of length 1: a frame must not look uncovered by its own copy."""
    draw = np.random.default_rng(number)
    kinds = unit(draw.normal(size=(distinct, 16)))
    which = draw.permutation(np.concatenate([np.arange(distinct), draw.integers(distinct, size=repeats)]))
    rows, _ = OPS.seed(kinds[which], np.ones(len(which), np.float32), np.array([0, len(which)]), 20)
    valid = rows[0][rows[0] >= 0]
    assert sorted(which[valid]) == list(range(distinct))


def test_frames_without_weight_are_no_seeds_and_the_scale_of_weights_is_nothing() -> None:
    draw = np.random.default_rng(3)
    x = unit(draw.normal(size=(12, 8)))
    w = draw.random(12).astype(np.float32)
    w[[1, 5, 6]] = 0
    rows, gaps = OPS.seed(x, w, np.array([0, 12]), 12)
    assert set(rows[0].tolist()) == {-1, *range(12)} - {1, 5, 6}
    tiny, small = OPS.seed(x, w * np.float32(2.0**-70), np.array([0, 12]), 12)
    np.testing.assert_array_equal(tiny, rows)
    np.testing.assert_array_equal(small, gaps * np.float32(2.0**-70))
    nothing, _ = OPS.seed(x, np.zeros(12, np.float32), np.array([0, 12]), 3)
    assert nothing.tolist() == [[0, -1, -1]]


# --- the single steps ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(DRAWS, PENALTIES, MARGINS)
def test_objective_and_assignment_equal_loops(number: int, penalty: float, margin: float) -> None:
    draw = np.random.default_rng(number)
    x, w = unit(draw.normal(size=(9, 4))), some_weights(draw, 9)
    spans, k = np.array([[0, 6], [2, 9], [0, 9]]), np.array([2, 3, 1])
    centroids = unit(draw.normal(size=(3, 3, 4)))
    for m in range(3):
        centroids[m, k[m] :] = 0
    labels, similarity = OPS.assign(x, spans, k, centroids)
    value = OPS.objective(x, w, spans, k, centroids, labels, penalty=penalty, margin=margin)
    at = label_starts(spans)
    assert at.tolist() == [0, 6, 13, 22]
    for m, (start, stop) in enumerate(spans):
        own, c = labels[at[m] : at[m + 1]], centroids[m, : k[m]]
        for t in range(start, stop):
            cosines = [float(x[t].astype(np.float64) @ one.astype(np.float64)) for one in c]
            assert own[t - start] == cosines.index(max(cosines))
            assert similarity[at[m] + t - start] == pytest.approx(max(cosines), abs=FLOAT32)
        expected = objective_by_loops(x[start:stop], w[start:stop], c, own, penalty, margin)
        assert value[m] == pytest.approx(expected, abs=FLOAT64_SUM * (1 + penalty))


def test_equal_centroids_go_to_the_lowest() -> None:
    x = np.eye(3, dtype=np.float32)
    centroids = np.eye(3, dtype=np.float32)[None, [1, 0, 1, 0]]
    labels, similarity = OPS.assign(x, np.array([[0, 3]]), np.array([4]), centroids)
    assert labels.tolist() == [1, 0, 0]
    assert similarity.tolist() == [1, 1, 0]


def test_update_is_the_closed_form_where_all_pairs_are_close() -> None:
    """With m = -1 every pair counts, J is linear in each centroid, and the minimiser can be written down."""
    draw = np.random.default_rng(5)
    x, w = unit(draw.normal(size=(20, 6))), draw.random(20).astype(np.float32)
    labels = np.arange(20) % 3
    centroids = unit(draw.normal(size=(1, 3, 6)))
    moved = OPS.update(x, w, np.array([[0, 20]]), np.array([3]), centroids, labels, penalty=0.3, margin=-1.0)
    c = [one.astype(np.float64) for one in centroids[0]]
    total = sum(float(v) for v in w)
    for j in range(3):
        pull = sum(float(w[t]) / total * x[t].astype(np.float64) for t in range(20) if labels[t] == j)
        goal = pull - 0.3 / 3 * sum(c[i] for i in range(3) if i != j)
        c[j] = goal / np.linalg.norm(goal)
    np.testing.assert_allclose(moved[0], c, atol=FLOAT32)


def test_update_without_penalty_is_the_weighted_mean_direction_and_weightless_clusters_stay() -> None:
    draw = np.random.default_rng(6)
    x, w = unit(draw.normal(size=(15, 6))), draw.random(15).astype(np.float32)
    labels = np.arange(15) % 3  # cluster 3 is empty
    w[labels == 1] = 0
    centroids = unit(draw.normal(size=(1, 4, 6)))
    moved = OPS.update(x, w, np.array([[0, 15]]), np.array([4]), centroids, labels, penalty=0.0, margin=0.5)[0]
    for j in (0, 2):
        mean = np.average(x[labels == j].astype(np.float64), axis=0, weights=w[labels == j])
        np.testing.assert_allclose(moved[j], mean / np.linalg.norm(mean), atol=FLOAT32)
    np.testing.assert_array_equal(moved[[1, 3]], centroids[0, [1, 3]])


@settings(max_examples=60, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.integers(1, 7))
def test_no_step_raises_the_objective(number: int, penalty: float, margin: float, k: int) -> None:
    draw = np.random.default_rng(number)
    count = int(draw.integers(1, 30))
    x, w = some_vectors(draw, count, 8), some_weights(draw, count)
    centroids = unit(draw.normal(size=(1, k, 8)))
    centroids[0, int(draw.integers(k))] = -x.mean(0) if x.mean(0).any() else x[0]  # mostly an empty cluster
    centroids = unit(centroids)
    where: dict[str, Any] = {"penalty": penalty, "margin": margin}
    spans, number_of = np.array([[0, count]]), np.array([k])
    rounding = ROUNDED_CENTROIDS * (1 + penalty * k)
    labels, _ = OPS.assign(x, spans, number_of, centroids)
    start = objective_by_loops(x, w, centroids[0], labels, penalty, margin)
    moved = OPS.update(x, w, spans, number_of, centroids, labels, **where)
    after_update = objective_by_loops(x, w, moved[0], labels, penalty, margin)
    assert after_update <= start + rounding
    np.testing.assert_allclose(np.linalg.norm(moved[0], axis=1), 1, atol=FLOAT32)
    relocated = OPS.relocate(x, w, spans, number_of, moved, labels, **where)
    assert best_objective(x, w, relocated[0], penalty, margin) <= after_update + rounding


@settings(max_examples=60, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.integers(2, 6))
def test_relocation_leaves_no_gain_to_an_empty_cluster(number: int, penalty: float, margin: float, k: int) -> None:
    draw = np.random.default_rng(number)
    count = int(draw.integers(2, 25))
    x, w = some_vectors(draw, count, 6), some_weights(draw, count)
    spans, number_of = np.array([[0, count]]), np.array([k])
    # Half of the clusters sit where no frame is.
    centroids = unit(draw.normal(size=(1, k, 6)))
    centroids[0, : -(-k // 2)] = x[draw.integers(count, size=-(-k // 2))]
    centroids[0, -(-k // 2) :] = unit(-x.sum(0) + 1e-3)
    labels, _ = OPS.assign(x, spans, number_of, centroids)
    moved = OPS.relocate(x, w, spans, number_of, centroids, labels, penalty=penalty, margin=margin)[0]
    used = set(labels.tolist())
    np.testing.assert_array_equal(moved[sorted(used)], centroids[0, sorted(used)])
    now, _ = OPS.assign(x, spans, number_of, moved[None])
    value = best_objective(x, w, moved, penalty, margin)
    covered = (x.astype(np.float64) @ moved.astype(np.float64).T).max(1)
    worst = x[int((w * (1 - covered)).argmax())]
    for j in sorted(set(range(k)) - used - set(now.tolist())):
        other = moved.copy()
        other[j] = worst
        assert best_objective(x, w, other, penalty, margin) >= value - ROUNDED_CENTROIDS * (1 + penalty)


def test_empty_clusters_go_to_the_worst_covered_frames() -> None:
    x = scenes(np.random.default_rng(1), [5, 5, 5], 8, 0.02)
    centroids = np.stack([x[0], -x[0], -x[0]])[None]
    spans, k = np.array([[0, 15]]), np.array([3])
    labels = np.zeros(15, np.int64)
    moved = OPS.relocate(x, np.ones(15, np.float32), spans, k, centroids, labels, penalty=0.1, margin=0.8)
    np.testing.assert_array_equal(moved[0, 0], x[0])
    assert {int((x @ one).argmax()) // 5 for one in moved[0]} == {0, 1, 2}


# --- whole runs ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_the_objective_never_rises_and_batches_change_nothing(
    number: int, penalty: float, margin: float, counts: list[int]
) -> None:
    """Ragged videos, each with several K, in one batch; and every problem alone, bit for bit."""
    draw = np.random.default_rng(number)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    x = np.concatenate([some_vectors(draw, count, 8) for count in counts])
    w = np.concatenate([some_weights(draw, count) for count in counts])
    seeds, _ = OPS.seed(x, w, offsets, 7)
    problems = [
        (b, k) for b in range(len(counts)) for k in sorted(set(draw.integers(1, (seeds[b] >= 0).sum() + 1, size=3)))
    ]
    spans = np.array([[offsets[b], offsets[b + 1]] for b, _ in problems])
    ks = np.array([k for _, k in problems])
    own = seeds[[b for b, _ in problems]]
    rules: dict[str, Any] = {"penalty": penalty, "margin": margin, "iterations": 12}
    found = OPS.cluster(x, w, spans, ks, own, **rules)
    again = OPS.cluster(x.copy(), w.copy(), spans, ks, own, **rules)
    at = label_starts(spans)
    assert found.history.shape == (len(ks), 13)
    assert (np.diff(found.history, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.history[:, -1], found.objective)
    labels, similarity = OPS.assign(x, spans, ks, found.centroids)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.similarity, similarity)
    for m, (start, stop) in enumerate(spans):
        rows, c = slice(at[m], at[m + 1]), found.centroids[m, : ks[m]]
        assert 0 <= found.labels[rows].min() <= found.labels[rows].max() < ks[m]
        np.testing.assert_allclose(np.linalg.norm(c, axis=1), 1, atol=FLOAT32)
        assert not found.centroids[m, ks[m] :].any()
        expected = objective_by_loops(x[start:stop], w[start:stop], c, found.labels[rows], penalty, margin)
        assert found.objective[m] == pytest.approx(expected, abs=FLOAT64_SUM * (1 + penalty * ks[m]))
        z, v = x[start:stop].copy(), w[start:stop].copy()
        alone = OPS.cluster(z, v, np.array([[0, stop - start]]), ks[[m]], own[[m], : ks[m]] - start, **rules)
        np.testing.assert_array_equal(alone.centroids[0], c)
        np.testing.assert_array_equal(alone.labels, found.labels[rows])
        np.testing.assert_array_equal(alone.similarity, found.similarity[rows])
        np.testing.assert_array_equal(alone.history[0], found.history[m])
    for name in ("centroids", "labels", "similarity", "objective", "history"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


@settings(max_examples=25, deadline=None)
@given(DRAWS, PENALTIES, MARGINS)
def test_at_rest_no_step_gains(number: int, penalty: float, margin: float) -> None:
    draw = np.random.default_rng(number)
    count = int(draw.integers(4, 30))
    x, w = some_vectors(draw, count, 6), some_weights(draw, count)
    found = run(x, w, 5, penalty=penalty, margin=margin)
    k, spans = found.centroids.shape[1], np.array([[0, count]])
    before = found.centroids, found.labels
    where: dict[str, Any] = {"penalty": penalty, "margin": margin}
    for step in (OPS.update, OPS.relocate):
        moved = step(x, w, spans, np.array([k]), *before, **where)
        assert best_objective(x, w, moved[0], penalty, margin) >= found.objective[0] - AT_REST * (1 + penalty)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_videos(kind: str) -> None:
    x, w, most = degenerate(kind)
    for k in (1, 2, 5, 20):
        found = run(x, w, k, penalty=0.1, margin=0.8)
        assert found.centroids.shape[1] == min(k, most)
        assert np.isfinite(found.history).all()
        assert (np.diff(found.history) <= 0).all()
        assert set(found.labels.tolist()) == set(range(min(k, most)))
        if k >= most and kind != "all zero":
            np.testing.assert_allclose(found.similarity[w > 0], 1, atol=FLOAT32)


@pytest.mark.parametrize(("kinds", "labels"), SEEDED_TWICE)
def test_a_cluster_without_a_frame_goes_where_it_is_needed_or_stays(kinds: int, labels: list[int]) -> None:
    check_seeded_twice(OPS.cluster, kinds, labels)


# --- quality ------------------------------------------------------------------------------------------------------


def partition_optimum(x: F32, w: F32, k: int) -> float:
    """Least J over all partitions, mu = 0: the best centroid of a part gives the length of its weighted sum."""
    z, best = x.astype(np.float64) * w[:, None].astype(np.float64), 0.0
    for labels in itertools.product(range(k), repeat=len(x)):
        parts = (np.array(labels) == np.arange(k)[:, None]) @ z
        best = max(best, float(np.sqrt((parts**2).sum(1)).sum()))
    return -best / float(w.astype(np.float64).sum())


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("k", [2, 3])
def test_no_better_than_the_best_partition_and_as_good_on_scenes(number: int, k: int) -> None:
    draw = np.random.default_rng(number)
    w = (0.2 + draw.random(7)).astype(np.float32)
    x = unit(draw.normal(size=(7, 4)))
    assert run(x, w, k, penalty=0, margin=0.8).objective[0] >= partition_optimum(x, w, k) - ROUNDED_CENTROIDS
    x = scenes(draw, [4, 3] if k == 2 else [3, 2, 2], 4, 0.15)
    found = run(x, w, k, penalty=0, margin=0.8).objective[0]
    assert found == pytest.approx(partition_optimum(x, w, k), abs=AT_REST)


def circle_optimum(x: F32, w: F32, k: int, penalty: float, margin: float, places: int) -> float:
    """Least J over all centroids on a grid of the circle."""
    turn = 2 * np.pi * np.arange(places) / places
    c = np.stack([np.cos(turn), np.sin(turn)], -1)
    cosine = x.astype(np.float64) @ c.T
    close = np.maximum(0, c @ c.T - margin)
    share = w.astype(np.float64) / w.astype(np.float64).sum()
    best = np.inf
    for first in range(places):
        if k == 2:
            fit = share @ np.maximum(cosine[:, [first]], cosine)
            best = min(best, float((-fit + penalty / 2 * close[first]).min()))
            continue
        pair = np.maximum(cosine[:, :, None], cosine[:, None, :])
        fit = np.einsum("t,tij->ij", share, np.maximum(pair, cosine[:, first][:, None, None]))
        total = close + close[first][:, None] + close[first][None]
        best = min(best, float((-fit + penalty / 3 * total).min()))
    return best


@pytest.mark.parametrize(("k", "places"), [(2, 720), (3, 60)])
@pytest.mark.parametrize(("margin", "penalty"), [(-1.0, 0.1), (0.5, 0.1), (0.5, 0.5), (0.8, 0.1), (0.8, 0.5)])
def test_near_the_optimum_with_repulsion(k: int, places: int, margin: float, penalty: float) -> None:
    """Scenes on the circle; nothing on the grid is better by more than the grid is coarse."""
    draw = np.random.default_rng(11)
    angle = np.repeat([0.0, 1.1, 3.0][:k], 2) + 0.2 * draw.normal(size=2 * k)
    x = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    w = (0.5 + draw.random(2 * k)).astype(np.float32)
    found = run(x, w, k, penalty=penalty, margin=margin).objective[0]
    grid = circle_optimum(x, w, k, penalty, margin, places)
    # Half a step away from the optimum J is higher by at most its slope, 1 + the penalty's share, times that half step.
    coarse = (1 + penalty * (k - 1) / 2) * np.pi / places
    assert grid - coarse <= found <= grid + AT_MARGIN


@pytest.mark.parametrize("number", range(3))
def test_as_good_as_scikit_learn(number: int) -> None:
    from sklearn.cluster import KMeans

    def objective_of(labels: I64) -> float:
        sums = [np.linalg.norm(x[labels == j].astype(np.float64).sum(0)) for j in range(6)]
        return -float(sum(sums)) / len(x)

    draw = np.random.default_rng(number)
    for x, share in (
        (scenes(draw, [60, 20, 12, 4, 3, 1], 16, 0.1), FLOAT32),
        (unit(draw.normal(size=(80, 8))), SKLEARN_SHARE),
    ):
        found = run(x, np.ones(len(x), np.float32), 6, penalty=0, margin=0.8)
        rival = KMeans(6, n_init=10, random_state=0).fit_predict(x)
        assert found.objective[0] == pytest.approx(objective_of(found.labels), abs=AT_REST)
        assert found.objective[0] <= objective_of(rival) * (1 - share)


def test_repulsion_spreads_the_centroids() -> None:
    draw = np.random.default_rng(4)
    x, w = unit(1.5 * np.eye(1, 8) + 0.4 * draw.normal(size=(60, 8))), np.ones(60, np.float32)

    def closest(penalty: float) -> float:
        c = run(x, w, 4, penalty=penalty, margin=0.5).centroids[0]
        return max(float(a @ b) for a, b in itertools.combinations(c, 2))

    assert closest(1.0) < closest(0.1) < closest(0.0)


# --- representatives ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(DRAWS)
def test_representatives_equal_loops(number: int) -> None:
    draw = np.random.default_rng(number)
    spans, k = np.array([[0, 7], [3, 10], [9, 10]]), np.array([3, 5, 1])
    count = int((spans[:, 1] - spans[:, 0]).sum())
    labels = np.concatenate([draw.integers(n, size=stop - start) for n, (start, stop) in zip(k, spans, strict=True)])
    similarity = (draw.integers(0, 4, size=count) / 4 - 0.5).astype(np.float32)  # with ties
    clean = draw.random(10) < 0.5
    rows = OPS.representatives(spans, k, labels, similarity, clean)
    assert rows.shape == (3, 5)
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        for j in range(5):
            inside = [t for t in range(start, stop) if j < k[m] and labels[at[m] + t - start] == j]
            allowed = [t for t in inside if clean[t]] or inside
            best = max(allowed, key=lambda t: (similarity[at[m] + t - start], -t), default=-1)
            assert rows[m, j] == best


def test_more_clusters_than_seeds_are_refused() -> None:
    x = np.eye(3, 4, dtype=np.float32)
    seeds = np.array([[0, 1, -1]])
    with pytest.raises(ValueError, match="3 clusters and 2 valid seeds"):
        OPS.cluster(
            x, np.ones(3, np.float32), np.array([[0, 3]]), np.array([3]), seeds, penalty=0.1, margin=0.8, iterations=3
        )
