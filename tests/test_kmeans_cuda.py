"""kmeans.cu against clustering.py: every layout of a launch, every type of vector, ties, ends, degenerate videos."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from bounds import FLOAT32
from cuda_on_host import host_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases_kmeans import (
    I64,
    SEEDED_TWICE,
    as_kind,
    cases,
    check_cluster,
    check_degenerate,
    check_seeded_twice,
    on,
    some_problems,
    unclear_labels,
)
from planted import DEGENERATE, embedding_of, planted, scenes, some_video, unit

from keyreel.config import SelectConfig
from keyreel.select import select_keyframes
from keyreel_kernels import clustering, cuda_kmeans, ops_for
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.cuda_kmeans import ROUNDING
from keyreel_kernels.ops import ops_on

DRAWS = st.integers(0, 2**32 - 1)
PENALTIES = st.sampled_from([0.0, 0.1, 1.0, 10.0])
MARGINS = st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0])
KINDS = st.sampled_from(["float16", "bfloat16", "float32"])
# What the launches differ in: whether blocks form clusters, whether frames stay in shared memory.
DEVICES: dict[str, dict[str, Any]] = {
    "one multiprocessor": {"sms": 1},
    "large": {"sms": 64},
    "small memory": {"shared_bytes": 12 << 10, "sms": 3},
    "no clusters": {"capability": (7, 5), "sms": 3},
    "no clusters, small memory": {"capability": (7, 5), "shared_bytes": 12 << 10, "sms": 5},
}


@functools.cache
def device(name: str) -> Cuda:
    return host_cuda(**DEVICES[name])


def test_the_cases(cuda: Cuda) -> None:
    cases(cuda)


# --- whole runs ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(1, 40), KINDS)
def test_runs_equal_the_definition(
    cuda: Cuda, number: int, penalty: float, margin: float, counts: list[int], width: int, kind: str
) -> None:
    draw = np.random.default_rng(number)
    problems = some_problems(draw, counts, width, 9)
    check_cluster(cuda, *problems, kind=kind, penalty=penalty, margin=margin, iterations=8)


@pytest.mark.parametrize(
    ("name", "counts", "blocks", "stays"),
    [
        ("one multiprocessor", [37, 90, 5], 1, True),
        ("large", [100, 70], 2, True),
        ("large", [130], 4, True),
        ("large", [300], 8, True),
        ("small memory", [450], 8, False),
        ("no clusters", [61, 33, 7, 40], 1, True),
        ("no clusters, small memory", [130, 120, 90, 70], 1, False),
        ("no clusters, small memory", [110], 0, True),
        ("no clusters, small memory", [310], 0, False),
    ],
)
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_every_layout(name: str, counts: list[int], blocks: int, stays: bool, kind: str) -> None:
    """Clusters of 1, 2, 4, 8 blocks, all blocks of the device; frames that stay and frames that are brought again."""
    where, draw = device(name), np.random.default_rng(len(counts))
    number = {"float16": cuda_kmeans.HALF, "float32": cuda_kmeans.FLOAT}[kind]
    clear = total = 0
    for penalty in (0.0, 0.3):
        x, w, spans, k, seeds = some_problems(draw, counts, 24, 12)
        lengths = spans[:, 1] - spans[:, 0]
        long = cuda_kmeans.is_long(where, number, 24, k, lengths)
        layout = cuda_kmeans.plan(where, number, 24, int(k.max()), lengths[long == long[0]], long=bool(long[0]))
        assert layout.cluster == blocks
        assert (lengths[0] <= layout.blocks * layout.capacity) == stays
        _, sure = check_cluster(where, x, w, spans, k, seeds, kind=kind, penalty=penalty, margin=0.5, iterations=20)
        clear, total = clear + sure, total + len(k)
    assert clear >= total / 4


@pytest.mark.parametrize("most", [40, 70])
def test_few_clusters_beside_many_of_narrow_vectors(cuda: Cuda, most: int) -> None:
    """What has room in shared memory follows from the problem with the most clusters, for all problems."""
    draw = np.random.default_rng(6)
    x, w = unit(draw.normal(size=(160, 24))), np.ones(160, np.float32)
    spans, k = np.array([[0, 75], [75, 160]]), np.array([32, most])
    seeds = np.full((2, most), -1)
    for m, (start, stop) in enumerate(spans):
        seeds[m, : k[m]] = start + draw.permutation(stop - start)[: k[m]]
    check_cluster(cuda, x, w, spans, k, seeds, penalty=0.5, margin=0.3, iterations=6)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_real_width(cuda: Cuda, kind: str) -> None:
    problems = some_problems(np.random.default_rng(4), [64, 33], 512, 12)
    _, clear = check_cluster(cuda, *problems, kind=kind, penalty=0.1, margin=0.8, iterations=25)
    assert clear >= 2


def test_more_clusters_than_shared_memory_holds(cuda: Cuda) -> None:
    """Beyond 32 the panels change, the products lie in device memory; beyond 64 all blocks work together."""
    draw = np.random.default_rng(5)
    x = unit(draw.normal(size=(90, 8)))
    w = (0.5 + draw.random(90)).astype(np.float32)
    seeds, _ = clustering.seed(x, w, np.array([0, 90]), 70)
    for k in (40, 70):
        spans = np.array([[0, 90]])
        found, _ = check_cluster(cuda, x, w, spans, np.array([k]), seeds, penalty=0.2, margin=0.7, iterations=6)
        assert len(set(found.labels.tolist())) == k


def test_two_runs_are_equal_bit_by_bit(cuda: Cuda) -> None:
    x, w, spans, k, seeds = some_problems(np.random.default_rng(6), [70, 40], 30, 8)
    rules: dict[str, Any] = {"penalty": 1.0, "margin": 0.3, "iterations": 9}
    one, two = (on(cuda, "cluster", x, w, spans, k, seeds, **rules) for _ in range(2))
    for name in ("centroids", "labels", "similarity", "objective", "history"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_videos(cuda: Cuda, kind: str) -> None:
    check_degenerate(cuda, kind, atol=ROUNDING / 10)


@pytest.mark.parametrize(("kinds", "labels"), SEEDED_TWICE)
def test_a_cluster_without_a_frame_goes_where_it_is_needed_or_stays(cuda: Cuda, kinds: int, labels: list[int]) -> None:
    check_seeded_twice(functools.partial(on, cuda, "cluster"), kinds, labels)


@pytest.mark.parametrize("number", range(2))
def test_planted_scenes_give_the_same_keyframes(cuda: Cuda, number: int) -> None:
    x, _ = planted(number, width=48)
    rules = SelectConfig(keyframes=8)
    chosen = [
        select_keyframes(embedding_of(x), rules, ops, duration_seconds=180.0) for ops in (ops_for("cpu"), ops_on(cuda))
    ]
    assert len(chosen[0].keyframes) == 8
    for one, two in zip(chosen[0].keyframes, chosen[1].keyframes, strict=True):
        assert (one.sample, one.frame_index, one.pts_seconds) == (two.sample, two.frame_index, two.pts_seconds)
        assert one.score == pytest.approx(two.score, abs=ROUNDING)
    np.testing.assert_allclose(chosen[0].importance, chosen[1].importance, atol=20 * ROUNDING)


# --- steps --------------------------------------------------------------------------------------------------------


def some_state(number: int) -> tuple[Any, ...]:
    """x, w, spans, k, centroids and labels that come from nowhere; some clusters without a frame, some close pairs."""
    draw = np.random.default_rng(number)
    counts = draw.integers(1, 40, size=2)
    width = int(draw.integers(2, 30))
    x, w, offsets = some_video(draw, counts.tolist(), width)
    w += np.float32(0.01)
    spans, k = np.array([[0, offsets[1]], [offsets[1], offsets[2]], [0, offsets[2]]]), draw.integers(1, 8, size=3)
    centroids = np.zeros((3, k.max(), width), np.float32)
    for m in range(3):
        near = unit(draw.normal(size=(1, width)) + 0.6 * draw.normal(size=(k[m], width)))
        centroids[m, : k[m]] = near
    lengths = spans[:, 1] - spans[:, 0]
    labels = np.concatenate([draw.integers(count, size=length) for count, length in zip(k, lengths, strict=True)])
    return x, w, spans, k, centroids, labels


@settings(max_examples=25, deadline=None)
@given(DRAWS, KINDS)
def test_assign(cuda: Cuda, number: int, kind: str) -> None:
    x, _, spans, k, centroids, _ = some_state(number)
    given_x, x = as_kind(x, kind)
    labels, similarity = on(cuda, "assign", given_x, spans, k, centroids)
    expected, cosine = clustering.assign(x, spans, k, centroids)
    clear = ~unclear_labels(x, spans, k, centroids)
    np.testing.assert_array_equal(labels[clear], expected[clear])
    np.testing.assert_allclose(similarity, cosine, atol=ROUNDING)


def test_ties_go_to_the_lowest_index(cuda: Cuda) -> None:
    """Equal centroids, in one step of eight, in two, in two panels, in shared memory and beyond."""
    draw = np.random.default_rng(7)
    x = unit(draw.normal(size=(50, 12)))
    spans = np.array([[0, 50]])
    for k in (3, 9, 20, 50, 80):
        own = x[draw.integers(5, size=k)][None]
        labels, _ = on(cuda, "assign", x, spans, np.array([k]), own)
        firsts = [own[0].tolist().index(row.tolist()) for row in own[0]]
        assert [firsts[label] for label in labels] == labels.tolist()


@settings(max_examples=25, deadline=None)
@given(DRAWS, PENALTIES, MARGINS, KINDS)
def test_objective_update_and_relocation(cuda: Cuda, number: int, penalty: float, margin: float, kind: str) -> None:
    x, w, spans, k, centroids, labels = some_state(number)
    given_x, x = as_kind(x, kind)
    weigh: dict[str, Any] = {"penalty": penalty, "margin": margin}
    state = (w, spans, k, centroids, labels)
    scale = 1 + penalty * k
    value = on(cuda, "objective", given_x, *state, **weigh)
    assert (np.abs(value - clustering.objective(x, *state, **weigh)) <= ROUNDING / 10 * scale).all()
    for name in ("update", "relocate"):
        moved = on(cuda, name, given_x, *state, **weigh)
        expected = getattr(clustering, name)(x, *state, **weigh)
        assert moved.shape == expected.shape
        for m, count in enumerate(k):
            pairs = np.concatenate([centroids[m, :count], expected[m, :count]]).astype(np.float64)
            apart = np.abs(pairs @ pairs.T - margin)[~np.eye(2 * count, dtype=bool)]
            if penalty == 0 or apart.min() > ROUNDING:
                np.testing.assert_allclose(moved[m], expected[m], atol=1e-4 if name == "update" else 0)
        # Where they may differ, J does not.
        values = [clustering.objective(x, w, spans, k, c, labels, **weigh) for c in (moved, expected)]
        if name == "update":
            assert (np.abs(values[0] - values[1]) <= ROUNDING * scale).all()


def test_empty_clusters_go_to_the_worst_covered_frames(cuda: Cuda) -> None:
    x = scenes(np.random.default_rng(1), [5, 5, 5], 8, 0.02)
    centroids = np.stack([x[0], -x[0], -x[0]])[None]
    state = (np.ones(15, np.float32), np.array([[0, 15]]), np.array([3]), centroids, np.zeros(15, np.int64))
    moved = on(cuda, "relocate", x, *state, penalty=0.1, margin=0.8)
    np.testing.assert_array_equal(moved, clustering.relocate(x, *state, penalty=0.1, margin=0.8))
    assert {int((x @ one).argmax()) // 5 for one in moved[0]} == {0, 1, 2}


# --- before and after ---------------------------------------------------------------------------------------------


def check_seeds(cuda: Cuda, number: int, counts: list[int], width: int, most: int, kind: str) -> None:
    x, w, offsets = some_video(np.random.default_rng(number), counts, width)
    given_x, x = as_kind(x, kind)
    rows, gaps = on(cuda, "seed", given_x, w, offsets, most)
    expected, sizes = clustering.seed(x, w, offsets, most)
    for b in range(len(counts)):
        # Frames as far as each other within rounding, or as good as covered, may be taken in another order.
        same = int(np.append(rows[b] != expected[b], True).argmax())
        np.testing.assert_allclose(gaps[b, :same], sizes[b, :same], atol=FLOAT32)
        if same < most:
            np.testing.assert_allclose(gaps[b, same], sizes[b, same], atol=2 * clustering.COVERED)


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9), KINDS)
def test_seeds(cuda: Cuda, number: int, counts: list[int], width: int, most: int, kind: str) -> None:
    check_seeds(cuda, number, counts, width, most, kind)


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_seeds_in_every_layout(name: str) -> None:
    check_seeds(device(name), 3, [290, 31], 24, 8, "float32")
    check_seeds(device(name), 4, [90], 24, 8, "float16")


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 4), KINDS)
def test_temporal_support(cuda: Cuda, number: int, counts: list[int], width: int, reach: int, kind: str) -> None:
    x, _, offsets = some_video(np.random.default_rng(number), counts, width)
    given_x, x = as_kind(x, kind)
    support, smooth = on(cuda, "temporal_support", given_x, offsets, reach)
    expected, mean = clustering.temporal_support(x, offsets, reach)
    np.testing.assert_allclose(support, expected, atol=FLOAT32)
    wrong = np.abs(smooth - mean).max(1) > FLOAT32
    for start, stop in itertools.pairwise(offsets):
        # Which neighbours are the most alike, and more alike than usual, must hang on more than rounding.
        cosine = x[start:stop].astype(np.float64) @ x[start:stop].astype(np.float64).T
        for t in np.flatnonzero(wrong[start:stop]):
            near = [cosine[t, u] for u in range(stop - start) if u != t and abs(u - t) <= reach] + [cosine.mean()]
            assert np.diff(np.sort(near)).min() < FLOAT32


def test_representatives(cuda: Cuda) -> None:
    draw = np.random.default_rng(2)
    spans, k = np.array([[0, 7], [3, 1100], [9, 10]]), np.array([3, 5, 1])
    count = (spans[:, 1] - spans[:, 0]).tolist()
    labels = np.concatenate([draw.integers(n, size=length) for n, length in zip(k, count, strict=True)])
    similarity = draw.choice(np.array([-0.5, -0.25, -0.0, 0.0, 0.5], np.float32), size=len(labels))  # with ties
    for share in (0.5, 0.001):
        clean = draw.random(1100) < share
        rows = on(cuda, "representatives", spans, k, labels, similarity, clean)
        np.testing.assert_array_equal(rows, clustering.representatives(spans, k, labels, similarity, clean))


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_no_numbers_are_refused(cuda: Cuda, bad: float, weight: float) -> None:
    """By way of the seeds, which come to the host anyway; with seeds from elsewhere, J says it."""
    x, w = unit(np.random.default_rng(0).normal(size=(12, 6))), np.ones(12, np.float32)
    x[7, 2], w[7] = bad, weight
    rows, _ = on(cuda, "seed", x, w, np.array([0, 5, 12]), 3)
    assert (rows[0] >= 0).all()
    assert (rows[1] == -1).all()
    spans, k, rules = np.array([[0, 5], [5, 12]]), np.array([3, 3]), {"penalty": 0.1, "margin": 0.8, "iterations": 4}
    with pytest.raises(ValueError, match="problem 1 has 3 clusters and 0 valid seeds"):
        on(cuda, "cluster", x, w, spans, k, rows, **rules)
    found = on(cuda, "cluster", x, w, spans, k, np.array([[0, 1, 2], [5, 6, 8]]), **rules)
    assert np.isfinite(found.objective[0])
    assert not np.isfinite(found.objective[1])
    assert ((found.labels >= 0) & (found.labels < 3)).all()


def test_what_makes_no_sense_is_refused(cuda: Cuda) -> None:
    x, w = np.eye(3, 4, dtype=np.float32), np.ones(3, np.float32)
    span, one, seeds = np.array([[0, 3]]), np.array([1]), np.array([[0, 1, -1]])
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 3}
    with pytest.raises(ValueError, match="3 clusters and 2 valid seeds"):
        on(cuda, "cluster", x, w, span, np.array([3]), seeds, **rules)
    with pytest.raises(ValueError, match="needs a frame"):
        on(cuda, "cluster", x, w, np.array([[1, 1]]), one, seeds, **rules)
    with pytest.raises(ValueError, match="needs a frame"):
        on(cuda, "seed", x, w, np.array([0, 0, 3]), 2)
    with pytest.raises(TypeError, match="float64"):
        on(cuda, "cluster", x.astype(np.float64), w, span, one, seeds, **rules)


# --- launches -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([((7, 5), 64), ((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)]),
    st.integers(1, 200),
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.lists(st.integers(1, 1_000_000), min_size=1, max_size=20),
    st.integers(0, 2),
)
def test_launches_fit_the_device(
    kind: tuple[tuple[int, int], int], sms: int, width: int, most: int, counts: list[int], number: int
) -> None:
    where = host_cuda(capability=kind[0], shared_bytes=kind[1] << 10, sms=sms)
    lengths: I64 = np.array(counts)
    long = cuda_kmeans.is_long(where, number, width, np.full(len(counts), most), lengths)
    for one in set(long.tolist()):
        layout = cuda_kmeans.plan(where, number, width, most, lengths[long == one], long=one)
        assert layout.shared <= where.shared_bytes
        assert layout.teams * layout.blocks <= max(sms, layout.blocks)
        assert 1 <= layout.slices <= layout.blocks
        assert layout.capacity >= 4
        assert layout.tile % 8 == 0 < layout.tile <= 32
        assert layout.cluster <= 1 or kind[0] >= (9, 0)
        if one:
            assert layout.blocks <= sms  # a cooperative launch has room for one block a multiprocessor
        if layout.cluster and not one and lengths[long == one].max() <= layout.blocks * layout.capacity:
            assert layout.blocks == 1 or lengths.max() > layout.capacity or layout.blocks * len(lengths) <= sms


def test_launches_on_a_large_device() -> None:
    """600 frames of 512 halves stay in four blocks; one video has eight; 100,000 frames have every multiprocessor."""
    where = host_cuda(sms=132)
    many, one, long = np.full(256, 600), np.array([600]), np.array([100_000])
    layout = cuda_kmeans.plan(where, cuda_kmeans.HALF, 512, 32, many, long=False)
    assert (layout.cluster, layout.teams, layout.capacity) == (4, 33, 152)
    layout = cuda_kmeans.plan(where, cuda_kmeans.HALF, 512, 32, one, long=False)
    assert (layout.cluster, layout.teams, layout.capacity) == (8, 1, 76)
    assert cuda_kmeans.is_long(where, cuda_kmeans.HALF, 512, np.array([32]), long).all()
    layout = cuda_kmeans.plan(where, cuda_kmeans.HALF, 512, 32, long, long=True)
    assert (layout.cluster, layout.blocks) == (0, 132)


@pytest.mark.parametrize(
    ("frames", "width", "count", "scenes", "kind"), [(2500, 64, 100, 60, np.float32), (5000, 64, 16, 30, np.float16)]
)
def test_long_videos_and_many_clusters(cuda: Cuda, frames: int, width: int, count: int, scenes: int, kind: Any) -> None:
    """Sizes at which sums are long and the frames do not fit a cluster's shared memory."""
    rng = np.random.default_rng(frames)
    centre = rng.normal(size=(scenes, width))
    x = centre[rng.integers(0, scenes, frames)] + 0.6 * rng.normal(size=(frames, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(kind)
    whole, w = x.astype(np.float32), rng.random(frames).astype(np.float32) + np.float32(0.1)
    span, k, weigh = np.array([[0, frames]]), np.array([count]), {"penalty": 0.1, "margin": 0.8, "iterations": 30}
    seeds, _ = clustering.seed(whole, w, np.array([0, frames]), count)
    ops = ops_on(cuda)
    there, weights = cuda.to_device(x), cuda.to_device(w)
    np.testing.assert_array_equal(cuda.to_host(ops.seed(there, weights, np.array([0, frames]), count)[0]), seeds)
    want = clustering.cluster(whole, w, span, k, seeds, **weigh)
    got = ops.cluster(there, weights, span, k, seeds, **weigh)
    assert len(np.unique(want.history)) > 5  # rounds
    np.testing.assert_array_equal(cuda.to_host(got.labels), want.labels)
    np.testing.assert_allclose(cuda.to_host(got.objective), want.objective, atol=1e-6)
