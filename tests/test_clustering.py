"""The definition of key-frame clustering against loops, enumeration and scikit-learn; J never rises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bounds import AT_MARGIN, AT_REST, FLOAT32, FLOAT64_SUM, ROUNDED_CENTROIDS, SKLEARN_SHARE
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SEEDED_TWICE, check_seeded_twice
from numpy.typing import NDArray
from planted import DEGENERATE, degenerate, scenes, some_vectors, some_weights, unit

from keyreel_kernels import Ops
from keyreel_kernels.clustering import COVERED, REACH, Clusters, label_starts, move, nearest, objective, relocate

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

OPS = Ops("cpu")
PENALTIES = st.sampled_from([0.0, 0.1, 1.0, 10.0])
MARGINS = st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0])
DRAWS = st.integers(0, 2**32 - 1)


def exact(draw: np.random.Generator, count: int, width: int) -> tuple[F64, F64]:
    """Frames and weights of one problem, as the steps take them."""
    return some_vectors(draw, count, width).astype(np.float64), some_weights(draw, count).astype(np.float64)


def run(x: F32, w: F32, k: int, *, penalty: float, margin: float, iterations: int = 100) -> Clusters:
    """One problem over all rows; k is lowered to the number of seeds."""
    rows, _ = OPS.seed(x, w, np.array([0, len(x)]), k)
    spans, ks = np.array([[0, len(x)]]), np.array([(rows[0] >= 0).sum()])
    rules: dict[str, Any] = {"penalty": penalty, "margin": margin, "iterations": iterations}
    found: Clusters = OPS.cluster(x, w, spans, ks, rows[:, : ks[0]], **rules)
    return found


def objective_by_loops(x: Any, w: Any, c: Any, labels: Any, penalty: float, margin: float) -> float:
    fit = total = closeness = 0.0
    for t in range(len(x)):
        fit += float(w[t]) * sum(float(a) * float(b) for a, b in zip(x[t], c[labels[t]], strict=True))
        total += float(w[t])
    for j, k in itertools.combinations(range(len(c)), 2):
        closeness += max(0.0, sum(float(a) * float(b) for a, b in zip(c[j], c[k], strict=True)) - margin)
    return -fit / max(total, 1e-30) + penalty / len(c) * closeness


def best_objective(x: Any, w: Any, c: Any, penalty: float, margin: float) -> float:
    """J with the best labels."""
    return objective_by_loops(x, w, c, (x @ c.T).argmax(1), penalty, margin)


# --- weights and seeds --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_neighbour_similarity_equals_loops(number: int, counts: list[int]) -> None:
    draw = np.random.default_rng(number)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    x = unit(draw.normal(size=(sum(counts), 6)))
    similarity, smooth = OPS.neighbour_similarity(x, offsets)
    assert (similarity.dtype, smooth.dtype) == (np.float32, np.float32)
    for start, stop in itertools.pairwise(offsets):
        cosine = x[start:stop].astype(np.float64) @ x[start:stop].astype(np.float64).T
        for t in range(stop - start):
            near = [u for u in range(stop - start) if u != t and abs(u - t) <= REACH]
            best = sorted(near, key=lambda u: -cosine[t, u])[:2]
            expected = np.mean([cosine[t, u] for u in best]) if best else 1.0
            similar = [u for u in best if cosine[t, u] > cosine.mean()]
            mean = sum(x[start + u].astype(np.float64) for u in [t, *similar])
            assert similarity[start + t] == pytest.approx(expected, abs=FLOAT32)
            np.testing.assert_allclose(smooth[start + t], mean / np.linalg.norm(mean), atol=FLOAT32)


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


@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(1, 6), st.integers(0, 12))
def test_repeats_are_seeded_once(number: int, distinct: int, repeats: int) -> None:
    """float32 unit vectors are not exactly of length 1: a frame must not look uncovered by its own copy."""
    draw = np.random.default_rng(number)
    kinds = unit(draw.normal(size=(distinct, 16)))
    which = draw.permutation(np.concatenate([np.arange(distinct), draw.integers(distinct, size=repeats)]))
    rows, _ = OPS.seed(kinds[which], np.ones(len(which), np.float32), np.array([0, len(which)]), 20)
    assert sorted(which[rows[0][rows[0] >= 0]]) == list(range(distinct))


def test_frames_without_weight_are_no_seeds_and_the_scale_of_weights_does_not_matter() -> None:
    draw = np.random.default_rng(3)
    x, w = unit(draw.normal(size=(12, 8))), draw.random(12).astype(np.float32)
    w[[1, 5, 6]] = 0
    rows, gaps = OPS.seed(x, w, np.array([0, 12]), 12)
    assert set(rows[0].tolist()) == {-1, *range(12)} - {1, 5, 6}
    tiny, small = OPS.seed(x, w * np.float32(2.0**-70), np.array([0, 12]), 12)
    np.testing.assert_array_equal(tiny, rows)
    np.testing.assert_array_equal(small, gaps * np.float32(2.0**-70))
    assert OPS.seed(x, np.zeros(12, np.float32), np.array([0, 12]), 3)[0].tolist() == [[0, -1, -1]]


# --- the steps of one problem -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.integers(1, 80))
def test_objective_and_nearest_equal_loops(number: int, penalty: float, margin: float, k: int) -> None:
    draw = np.random.default_rng(number)
    z, v = exact(draw, int(draw.integers(1, 60)), 12)
    c = unit(draw.normal(size=(k, 12))).astype(np.float64)
    labels, cosine = nearest(z, c)
    for t, (label, own) in enumerate(zip(labels, cosine, strict=True)):
        cosines = [float(z[t] @ one) for one in c]
        assert label == cosines.index(max(cosines))
        assert own == pytest.approx(max(cosines), abs=FLOAT64_SUM)
    expected = objective_by_loops(z, v, c, labels, penalty, margin)
    assert objective(v, cosine, c, penalty / k, margin) == pytest.approx(expected, abs=FLOAT64_SUM * (1 + penalty * k))


def test_equal_centroids_go_to_the_lowest() -> None:
    labels, cosine = nearest(np.eye(3), np.eye(3)[[1, 0, 1, 0]])
    assert labels.tolist() == [1, 0, 0]
    assert cosine.tolist() == [1, 1, 0]


def test_move_is_the_closed_form_where_all_pairs_are_close() -> None:
    """With m = -1 every pair counts, J is linear in each centroid, and the minimiser can be written down."""
    draw = np.random.default_rng(5)
    z, v, labels = unit(draw.normal(size=(20, 6))).astype(np.float64), draw.random(20), np.arange(20) % 3
    c = unit(draw.normal(size=(3, 6))).astype(np.float64)
    moved = move(z, v, c, labels, 0.1, -1.0)
    for j in range(3):
        pull = sum(v[t] / v.sum() * z[t] for t in range(20) if labels[t] == j)
        goal = pull - 0.1 * sum(c[i] for i in range(3) if i != j)
        c[j] = goal / np.linalg.norm(goal)
    np.testing.assert_allclose(moved, c, atol=FLOAT64_SUM)


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_move_without_close_pairs_is_the_mean_direction_and_weightless_clusters_stay(margin: float) -> None:
    draw = np.random.default_rng(6)
    z, v = unit(draw.normal(size=(15, 6))).astype(np.float64), draw.random(15)
    labels = np.arange(15) % 3  # cluster 3 is empty
    v[labels == 1] = 0
    c = unit(draw.normal(size=(4, 6))).astype(np.float64)
    moved = move(z, v, c, labels, 0.0 if margin == 0.5 else 0.1, margin)
    for j in (0, 2):
        mean = np.average(z[labels == j], axis=0, weights=v[labels == j])
        np.testing.assert_allclose(moved[j], mean / np.linalg.norm(mean), atol=FLOAT64_SUM)
    np.testing.assert_array_equal(moved[[1, 3]], c[[1, 3]])


@settings(max_examples=60, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.integers(1, 7))
def test_no_step_raises_the_objective(number: int, penalty: float, margin: float, k: int) -> None:
    draw = np.random.default_rng(number)
    z, v = exact(draw, int(draw.integers(1, 30)), 8)
    c = draw.normal(size=(k, 8))
    c[int(draw.integers(k))] = -z.mean(0) if z.mean(0).any() else z[0]  # mostly an empty cluster
    c = unit(c).astype(np.float64)
    labels, mu, rounding = nearest(z, c)[0], penalty / k, FLOAT64_SUM * (1 + penalty * k)
    moved = move(z, v, c, labels, mu, margin)
    after = objective_by_loops(z, v, moved, labels, penalty, margin)
    assert after <= objective_by_loops(z, v, c, labels, penalty, margin) + rounding
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, atol=FLOAT32)
    assert best_objective(z, v, relocate(z, v, moved, labels, mu, margin), penalty, margin) <= after + rounding


@settings(max_examples=60, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.integers(2, 6))
def test_relocation_leaves_no_gain_to_the_last_empty_cluster(
    number: int, penalty: float, margin: float, k: int
) -> None:
    draw = np.random.default_rng(number)
    z, v = exact(draw, int(draw.integers(2, 25)), 6)
    # Half of the clusters are where no frame is.
    c = unit(draw.normal(size=(k, 6))).astype(np.float64)
    c[: -(-k // 2)] = z[draw.integers(len(z), size=-(-k // 2))]
    c[-(-k // 2) :] = unit(-z.sum(0) + 1e-3)
    labels, _ = nearest(z, c)
    moved, used = relocate(z, v, c, labels, penalty / k, margin), sorted(set(labels.tolist()))
    np.testing.assert_array_equal(moved[used], c[used])
    value = best_objective(z, v, moved, penalty, margin)
    worst = z[int((v * (1 - (z @ moved.T).max(1))).argmax())]
    last = max(set(range(k)) - set(used), default=None)  # those before it chose before it did
    if last is not None and last not in nearest(z, moved)[0]:
        moved[last] = worst
        assert best_objective(z, v, moved, penalty, margin) >= value - ROUNDED_CENTROIDS * (1 + penalty)


def test_empty_clusters_go_to_the_worst_covered_frames() -> None:
    z = scenes(np.random.default_rng(1), [5, 5, 5], 8, 0.02).astype(np.float64)
    moved = relocate(z, np.ones(15), np.stack([z[0], -z[0], -z[0]]), np.zeros(15, np.int64), 0.1 / 3, 0.8)
    np.testing.assert_array_equal(moved[0], z[0])
    assert {int((z @ one).argmax()) // 5 for one in moved} == {0, 1, 2}


# --- whole runs ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_the_objective_never_rises_and_batches_change_nothing(
    number: int, penalty: float, margin: float, counts: list[int]
) -> None:
    """Ragged videos, each with several K, in one batch; and every problem alone, bit by bit."""
    draw = np.random.default_rng(number)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    x = np.concatenate([some_vectors(draw, count, 8) for count in counts])
    w = np.concatenate([some_weights(draw, count) for count in counts])
    seeds, _ = OPS.seed(x, w, offsets, 7)
    problems = [
        (b, k) for b in range(len(counts)) for k in sorted(set(draw.integers(1, (seeds[b] >= 0).sum() + 1, size=3)))
    ]
    spans = np.array([[offsets[b], offsets[b + 1]] for b, _ in problems])
    ks, own = np.array([k for _, k in problems]), seeds[[b for b, _ in problems]]
    rules: dict[str, Any] = {"penalty": penalty, "margin": margin, "iterations": 12}
    found = OPS.cluster(x, w, spans, ks, own, **rules)
    at = label_starts(spans)
    assert found.history.shape == (len(ks), 13)
    assert (np.diff(found.history, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.history[:, -1], found.objective)
    for m, (start, stop) in enumerate(spans):
        rows, c = slice(at[m], at[m + 1]), found.centroids[m, : ks[m]]
        labels, cosine = nearest(x[start:stop].astype(np.float64), c.astype(np.float64))
        np.testing.assert_array_equal(found.labels[rows], labels)
        np.testing.assert_array_equal(found.similarity[rows], cosine.astype(np.float32))
        np.testing.assert_allclose(np.linalg.norm(c, axis=1), 1, atol=FLOAT32)
        assert not found.centroids[m, ks[m] :].any()
        expected = objective_by_loops(x[start:stop], w[start:stop], c, found.labels[rows], penalty, margin)
        assert found.objective[m] == pytest.approx(expected, abs=FLOAT64_SUM * (1 + penalty * ks[m]))
        z, v = x[start:stop].copy(), w[start:stop].copy()
        alone = OPS.cluster(z, v, np.array([[0, stop - start]]), ks[[m]], own[[m], : ks[m]] - start, **rules)
        np.testing.assert_array_equal(alone.centroids[0], c)
        np.testing.assert_array_equal(alone.labels, found.labels[rows])
        np.testing.assert_array_equal(alone.history[0], found.history[m])


@settings(max_examples=25, deadline=None)
@given(DRAWS, PENALTIES, MARGINS)
def test_at_rest_no_step_gains(number: int, penalty: float, margin: float) -> None:
    draw = np.random.default_rng(number)
    count = int(draw.integers(4, 30))
    x, w = some_vectors(draw, count, 6), some_weights(draw, count)
    found = run(x, w, 5, penalty=penalty, margin=margin)
    z, v, c = x.astype(np.float64), w.astype(np.float64), found.centroids[0].astype(np.float64)
    for step in (move, relocate):
        moved = step(z, v, c, found.labels, penalty / len(c), margin)
        assert best_objective(x, w, moved, penalty, margin) >= found.objective[0] - AT_REST * (1 + penalty)


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
def test_a_cluster_without_a_frame_moves_where_it_is_needed_or_stays(kinds: int, labels: list[int]) -> None:
    check_seeded_twice(OPS.cluster, kinds, labels)


def test_more_clusters_than_seeds_are_refused() -> None:
    problem = (np.ones(3, np.float32), np.array([[0, 3]]), np.array([3]), np.array([[0, 1, -1]]))
    with pytest.raises(ValueError, match="3 clusters and 2 valid seeds"):
        OPS.cluster(np.eye(3, 4, dtype=np.float32), *problem, penalty=0.1, margin=0.8, iterations=3)


# --- quality ------------------------------------------------------------------------------------------------------


def partition_optimum(x: F32, w: F32, k: int) -> float:
    """Least J over all partitions, mu = 0: the best centroid of a part gives the length of its weighted sum."""
    z, best = x.astype(np.float64) * w[:, None].astype(np.float64), 0.0
    for labels in itertools.product(range(k), repeat=len(x)):
        parts = (np.array(labels) == np.arange(k)[:, None]) @ z
        best = max(best, float(np.sqrt((parts**2).sum(1)).sum()))
    return -best / float(w.astype(np.float64).sum())


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("k", [2, 3])
def test_no_better_than_the_best_partition_and_as_good_on_scenes(number: int, k: int) -> None:
    draw = np.random.default_rng(number)
    w = (0.2 + draw.random(7)).astype(np.float32)
    x = unit(draw.normal(size=(7, 4)))
    assert run(x, w, k, penalty=0, margin=0.8).objective[0] >= partition_optimum(x, w, k) - ROUNDED_CENTROIDS
    x = scenes(draw, [4, 3] if k == 2 else [3, 2, 2], 4, 0.15)
    found = run(x, w, k, penalty=0, margin=0.8).objective[0]
    assert found == pytest.approx(partition_optimum(x, w, k), abs=AT_REST)


@pytest.mark.parametrize(("margin", "penalty"), [(-1.0, 0.1), (0.5, 0.1), (0.5, 0.5), (0.8, 0.1), (0.8, 0.5)])
def test_near_the_optimum_with_repulsion(margin: float, penalty: float) -> None:
    """Two scenes on the circle; no pair of centroids on a grid is better by more than the grid is coarse."""
    draw, places = np.random.default_rng(11), 720
    angle = np.repeat([0.0, 1.1], 2) + 0.2 * draw.normal(size=4)
    x = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    w = (0.5 + draw.random(4)).astype(np.float32)
    found = run(x, w, 2, penalty=penalty, margin=margin).objective[0]
    turn = 2 * np.pi * np.arange(places) / places
    c = np.stack([np.cos(turn), np.sin(turn)], -1)
    cosine, close, share = x.astype(np.float64) @ c.T, np.maximum(0, c @ c.T - margin), w / w.sum()
    grid = min(
        float((penalty / 2 * close[n] - share @ np.maximum(cosine[:, [n]], cosine)).min()) for n in range(places)
    )
    # Half a step away from the optimum J is higher by at most its slope, 1 + half the penalty, times that half step.
    assert grid - (1 + penalty / 2) * np.pi / places <= found <= grid + AT_MARGIN


@pytest.mark.full
@pytest.mark.parametrize("number", range(3))
def test_as_good_as_scikit_learn(number: int) -> None:
    from sklearn.cluster import KMeans

    draw = np.random.default_rng(number)
    for x, share in (
        (scenes(draw, [60, 20, 12, 4, 3, 1], 16, 0.1), FLOAT32),
        (unit(draw.normal(size=(80, 8))), SKLEARN_SHARE),
    ):
        found = run(x, np.ones(len(x), np.float32), 6, penalty=0, margin=0.8)
        rival = KMeans(6, n_init=10, random_state=0).fit_predict(x)
        sums = [np.linalg.norm(x[rival == j].astype(np.float64).sum(0)) for j in range(6)]
        assert found.objective[0] <= -float(sum(sums)) / len(x) * (1 - share)


def test_repulsion_spreads_the_centroids() -> None:
    draw = np.random.default_rng(4)
    x, w = unit(1.5 * np.eye(1, 8) + 0.4 * draw.normal(size=(60, 8))), np.ones(60, np.float32)

    def closest(penalty: float) -> float:
        c = run(x, w, 4, penalty=penalty, margin=0.5).centroids[0]
        return max(float(a @ b) for a, b in itertools.combinations(c, 2))

    assert closest(1.0) < closest(0.1) < closest(0.0)


@settings(max_examples=30, deadline=None)
@given(DRAWS)
def test_representatives_equal_loops(number: int) -> None:
    draw = np.random.default_rng(number)
    spans, k = np.array([[0, 7], [3, 10], [9, 10]]), np.array([3, 5, 1])
    labels = np.concatenate([draw.integers(n, size=size) for n, size in zip(k, np.diff(spans)[:, 0], strict=True)])
    similarity = (draw.integers(0, 4, size=len(labels)) / 4 - 0.5).astype(np.float32)  # with ties
    clean = draw.random(10) < 0.5
    rows = OPS.representatives(spans, k, labels, similarity, clean)
    assert rows.shape == (3, 5)
    at = label_starts(spans)
    for m, (start, stop) in enumerate(spans):
        for j in range(5):
            inside = [t for t in range(start, stop) if j < k[m] and labels[at[m] + t - start] == j]
            allowed = [t for t in inside if clean[t]] or inside
            assert rows[m, j] == max(allowed, key=lambda t: (similarity[at[m] + t - start], -t), default=-1)
