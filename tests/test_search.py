"""Scores to moments."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import embedding_of, unit

from keyreel.runtime.bundle import SubjectScale
from keyreel.search import (
    APART_SECONDS,
    AROUND_SECONDS,
    HOLDS,
    LESS,
    MORE,
    NEAR,
    OUTLINE,
    WHOLE_SECONDS,
    WITHOUT,
    Asked,
    Part,
    answered,
    best_hits,
    frame_scores,
    moments,
    region,
    region_on,
)
from keyreel.types import F32, F64, Combined, Embedding, SearchHit, Shot

WHOLE = (0.0, 0.0, 1.0, 1.0)


def both(number: int, count: int = 20) -> tuple[Embedding, np.ndarray]:
    """An embedding with subjects, and a query."""
    draw = np.random.default_rng(number)
    scene, subject = unit(draw.normal(size=(2, count, 6)))
    maps = draw.random((count, 12)).astype(np.float32)
    maps /= maps.sum(1, keepdims=True)
    embedding = replace(embedding_of(scene), subject=subject, attention=maps, grid=(3, 4))
    return embedding, unit(draw.normal(size=6))


@settings(deadline=None)
@given(number=st.integers(0, 10_000), slope=st.floats(0.1, 3), offset=st.floats(-0.5, 0.5), novelty=st.floats(-1, 1.1))
def test_the_better_of_both_vectors_answers(number: int, slope: float, offset: float, novelty: float) -> None:
    embedding, query = both(number)
    scale = SubjectScale(slope, offset, novelty)
    found = frame_scores(embedding.scene, embedding.subject, query, scale)
    assert embedding.subject is not None
    for t in range(len(embedding)):
        scene = sum(float(a) * float(b) for a, b in zip(embedding.scene[t], query, strict=True))
        subject = slope * sum(float(a) * float(b) for a, b in zip(embedding.subject[t], query, strict=True)) + offset
        alike = sum(float(a) * float(b) for a, b in zip(embedding.scene[t], embedding.subject[t], strict=True))
        if abs(alike - novelty) < 1e-5 or abs(scene - subject) < 1e-5:
            continue
        wins = subject > scene and alike < novelty  # a subject that says nothing new is not asked
        assert found.by_subject[t] == wins
        assert found.best[t] == pytest.approx(subject if wins else scene, abs=2e-6)
    alone = frame_scores(embedding.scene, None, query, scale)
    np.testing.assert_array_equal(alone.best, embedding.scene @ query)
    assert not alone.by_subject.any()


def test_a_hit_says_which_vector_answered_and_where_the_subject_is() -> None:
    embedding, query = both(4)
    scores = frame_scores(embedding.scene, embedding.subject, query, SubjectScale())
    assert set(scores.by_subject.tolist()) == {True, False}
    asked = Asked(query[None], (SubjectScale(),), (1.0,))
    for row in range(len(embedding)):
        hit = SearchHit("v", 0, 10, float(embedding.pts_seconds[row]), float(scores.best[row]))
        found = answered(hit, scores, embedding, WHOLE, asked, 1)
        assert found.answered_by == ("subject" if scores.by_subject[row] else "scene")
        assert found.region == region(embedding.attention[row], (3, 4))
        assert replace(found, answered_by="scene", region=None) == hit
        inside = answered(hit, scores, embedding, (0.25, 0.0, 0.75, 1.0), asked, 1)
        assert inside.region == pytest.approx(region_on((0.25, 0.0, 0.75, 1.0), found.region))
        assert answered(hit, scores, replace(embedding, subject=None), WHOLE, asked, 1) == hit


@settings(deadline=None)
@given(number=st.integers(0, 10_000), height=st.integers(1, 6), width=st.integers(1, 6), levels=st.integers(1, 4))
def test_a_region_is_the_box_around_the_strong_patches_beside_the_peak(
    number: int, height: int, width: int, levels: int
) -> None:
    draw = np.random.default_rng(number)
    table = draw.integers(1, levels + 1, (height, width)).astype(np.float32)
    table /= table.sum()
    start = next((r, c) for r in range(height) for c in range(width) if table[r, c] == table.max())
    reached, edge = {start}, [start]
    while edge:
        r, c = edge.pop()
        for r2, c2 in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            inside = 0 <= r2 < height and 0 <= c2 < width and (r2, c2) not in reached
            if inside and table[r2, c2] >= OUTLINE * table.max():
                reached.add((r2, c2))
                edge.append((r2, c2))
    rows, columns = [r for r, _ in reached], [c for _, c in reached]
    x, y, wide, high = region(table.reshape(-1), (height, width))
    assert (x, y) == (min(columns) / width, min(rows) / height)
    assert (x + wide, y + high) == pytest.approx(((max(columns) + 1) / width, (max(rows) + 1) / height))


def test_a_region_lies_on_the_whole_picture() -> None:
    part = (0.5, 0.25, 0.5, 0.5)
    assert region_on(WHOLE, part) == part
    # The model sees the middle half of a wide picture, or a tall one with bars at the sides.
    assert region_on((0.25, 0.0, 0.75, 1.0), part) == (0.5, 0.25, 0.25, 0.5)
    assert region_on((-0.5, 0.0, 1.5, 1.0), part) == (0.5, 0.25, 0.5, 0.5)


def test_of_a_long_scene_the_part_that_answers() -> None:
    scores = np.zeros(120, np.float32)
    scores[[40, *range(42, 60)]] = 0.8  # with a dip, which does not end it
    scores[50], scores[100] = 1.0, 0.6
    scenes = (Shot(0, 60.2),)
    first, second = moments(scores, np.arange(120) / 2, scenes, video="v", stop_seconds=60.2, k=2)
    assert first.pts_seconds == 25
    assert first.start_seconds == pytest.approx(20, abs=1.5)
    assert first.stop_seconds == pytest.approx(30, abs=1.5)
    assert (second.start_seconds, second.stop_seconds, second.pts_seconds) == (48, 52.5, 50)


def test_a_long_take_of_one_thing_is_one_moment() -> None:
    scores = np.array([0.42, 0.43, 0.41, 0.44, 0.42, 0.45, 0.43, 0.42] * 20, np.float32)
    [hit] = moments(scores, np.arange(160) / 2, (), video="v", stop_seconds=80.0, k=5)
    assert (hit.start_seconds, hit.stop_seconds, hit.pts_seconds) == (0.0, 80.0, 2.5)


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(-8, 8), min_size=1, max_size=90),
    cuts=st.sets(st.integers(1, 89), max_size=4),
    step=st.sampled_from([0.2, 0.5, 1.0]),
    k=st.sampled_from([1, 4, 50]),
)
def test_moments_are_those_of_a_plain_search(scores: list[int], cuts: set[int], step: float, k: int) -> None:
    count = len(scores)
    first = [0, *sorted(cut for cut in cuts if cut < count), count]  # frame of each scene
    edges = [0.0, *((n - 0.25) * step for n in first[1:-1]), count * step]
    scenes = [Shot(*pair) for pair in itertools.pairwise(edges)]
    eighths, pts = np.array(scores, np.float32) / 8, np.arange(count) * step
    found = moments(eighths, pts, scenes, video="v", stop_seconds=edges[-1], k=k)
    taken: set[int] = set()
    expected = []
    while len(expected) < k and len(taken) < count:
        peak = max(set(range(count)) - taken, key=lambda n: (scores[n], -n))
        scene = sum(peak >= n for n in first[1:])
        whole = [*range(first[scene], first[scene + 1])]
        own = whole
        if scenes[scene].duration_seconds > WHOLE_SECONDS:
            own = around_of(eighths, pts, peak, [n for n in whole if n not in taken])
        if own != whole:
            ends = pts[own[0]] - APART_SECONDS, pts[own[-1]] + APART_SECONDS
            taken |= {n for n in whole if ends[0] <= pts[n] < ends[1]}
        taken |= set(own)
        start = edges[scene] if own[0] == whole[0] else pts[own[0]]
        stop = edges[scene + 1] if own[-1] == whole[-1] else pts[own[-1] + 1]
        expected.append((start, stop, pts[peak], eighths[peak]))
    got = [(hit.start_seconds, hit.stop_seconds, hit.pts_seconds, hit.score) for hit in found]
    np.testing.assert_allclose(got, expected)


def around_of(scores: F32, pts: F64, peak: int, free: list[int]) -> list[int]:
    """The rows beside a peak whose neighbourhood answers, one after the other."""
    low = high = peak
    while low - 1 in free:
        low -= 1
    while high + 1 in free:
        high += 1
    run = range(low, high + 1)
    step = (pts[high] - pts[low]) / max(high - low, 1)
    half = round(AROUND_SECONDS / step) if step else 0
    typical, best = float(np.median(scores)), float(scores[peak])
    floor = min(typical + HOLDS * (best - typical), best - NEAR * abs(best))

    def answers(n: int) -> bool:
        beside = [float(scores[min(max(m, low), high)]) for m in range(n - half, n + half + 1)]
        return abs(pts[n] - pts[peak]) <= AROUND_SECONDS or sum(beside) / len(beside) >= floor - 1e-6

    own = [peak]
    for way in (-1, 1):
        n = peak + way
        while n in run and answers(n):
            own.append(n)
            n += way
    return sorted(own)


def test_best_hits_of_several_videos() -> None:
    hits = [SearchHit("b", 0, 1, 0, 0.5), SearchHit("a", 0, 1, 0, 0.5), SearchHit("c", 0, 1, 0, 0.9)]
    assert [h.video for h in best_hits(hits, 2)] == ["c", "a"]
    with pytest.raises(ValueError, match="k must be"):
        moments(np.ones(1, np.float32), np.zeros(1), (), video="v", stop_seconds=1, k=0)


def test_what_conditions_weigh() -> None:
    names = ["dog", "snow", "wind", "car", "night", "picture", "other"]
    vectors = dict(zip(names, unit(np.random.default_rng(0).normal(size=(7, 5))), strict=True))

    def part_of(name: object) -> Part:
        assert isinstance(name, str)
        return Part(vectors[name], SubjectScale(), None if name in ("picture", "other") else 1.0)

    plain = Asked.of("dog", part_of, lambda: None)
    assert plain.weights == (1,)
    asked = Asked.of(
        Combined("dog", also=["snow", "picture", "wind"], without=["car", "other", "night"]), part_of, lambda: None
    )
    assert asked.weights == pytest.approx((1 / 3, 1 / 3, MORE, 1 / 3, -WITHOUT / 2, -LESS, -WITHOUT / 2))
    pictures = Asked.of(Combined("dog", also=["picture", "other"]), part_of, lambda: None)
    assert pictures.weights == pytest.approx((1, MORE / 2, MORE / 2))
    embedding, _ = both(3)
    scene = np.ascontiguousarray(embedding.scene[:, :5])
    expected = sum(w * (scene.astype(np.float64) @ v) for w, v in zip(asked.weights, asked.vectors, strict=True))
    np.testing.assert_allclose(asked.scores(scene, None).best, expected, atol=1e-6)


def test_a_first_frame_that_began_earlier_is_part_of_its_moment() -> None:
    [hit] = moments(np.ones(2, np.float32), np.array([0.28, 0.8]), (Shot(0.3, 1.0),), video="v", stop_seconds=1.0, k=3)
    assert (hit.start_seconds, hit.stop_seconds, hit.pts_seconds) == (0.28, 1.0, 0.28)


def test_a_mean_that_is_just_enough_holds_whatever_the_rounding() -> None:
    scores = np.array([0] * 9 + [4] * 7 + [8, 1, 5, 8, 4, 8], np.float32) / 8
    scenes = (Shot(0.0, 1.0), Shot(1.0, 22.0))
    first = moments(scores, np.arange(22.0), scenes, video="v", stop_seconds=22.0, k=1)[0]
    assert (first.start_seconds, first.stop_seconds) == (14, 22)
