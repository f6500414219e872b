"""Scores to moments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyreel.search import best_hits, moments
from keyreel.types import SearchHit, Shot


def test_a_moment_reaches_as_far_as_the_score_holds() -> None:
    scores = np.array([0.0, 0.0, 0.5, 0.9, 1.0, 0.8, 0.1, 0.0, 0.0, 0.0, 0.7, 0.0], np.float32)
    # The median is 0.05: the first moment reaches down to 0.525, the second to 0.375.
    hits = moments(scores, np.arange(12) / 2, (), video="v", stop_seconds=6.0, k=2)
    assert [(h.start_seconds, h.stop_seconds, h.pts_seconds) for h in hits] == [(1.5, 3.0, 2.0), (5.0, 5.5, 5.0)]
    assert hits[0].score == 1.0


def test_a_moment_keeps_to_its_shot_and_takes_its_edges() -> None:
    scores = np.array([0, 0, 0, 1, 1, 1, 1, 0, 0, 0], np.float32)
    shots = (Shot(0, 1.3), Shot(1.3, 2.7), Shot(2.7, 5))
    first, second = moments(scores, np.arange(10) / 2, shots, video="v", stop_seconds=5, k=2)
    assert (first.start_seconds, first.stop_seconds) == (1.3, 2.7)
    assert (second.start_seconds, second.stop_seconds) == (2.7, 3.5)


def test_a_take_of_one_thing_is_one_moment() -> None:
    scores = np.array([0.42, 0.43, 0.41, 0.44, 0.42, 0.45, 0.43, 0.2], np.float32)
    first, second = moments(scores, np.arange(8) / 2, (), video="v", stop_seconds=4.0, k=5)
    assert (first.start_seconds, first.stop_seconds, first.pts_seconds) == (0.0, 3.5, 2.5)
    assert (second.start_seconds, second.stop_seconds) == (3.5, 4.0)


def test_the_last_moment_ends_with_the_video() -> None:
    hits = moments(np.array([0, 0, 1], np.float32), np.array([0, 1, 2.0]), (), video="v", stop_seconds=2.6, k=1)
    assert hits == [SearchHit("v", 2.0, 2.6, 2.0, 1.0)]


@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 39), max_size=5),
    k=st.integers(1, 50),
)
def test_moments_are_disjoint_and_ranked(scores: list[float], cuts: list[int], k: int) -> None:
    pts = np.arange(len(scores)) / 2
    edges = sorted({0.0, *(c / 2 - 0.2 for c in cuts if c < len(scores)), len(scores) / 2})
    shots = tuple(Shot(a, b) for a, b in itertools.pairwise(edges))
    hits = moments(np.array(scores, np.float32), pts, shots, video="v", stop_seconds=len(scores) / 2, k=k)
    assert 1 <= len(hits) <= k
    assert hits[0].score == max(np.float32(scores))
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    spans = sorted((h.start_seconds, h.stop_seconds) for h in hits)
    assert all(a < b for a, b in spans)
    assert all(b <= c + 1e-9 for (_, b), (c, _) in itertools.pairwise(spans))
    assert all(h.start_seconds <= h.pts_seconds < h.stop_seconds for h in hits)


def test_best_hits_of_several_videos() -> None:
    hits = [SearchHit("b", 0, 1, 0, 0.5), SearchHit("a", 0, 1, 0, 0.5), SearchHit("c", 0, 1, 0, 0.9)]
    assert [h.video for h in best_hits(hits, 2)] == ["c", "a"]
    with pytest.raises(ValueError, match="k must be"):
        moments(np.ones(1, np.float32), np.zeros(1), (), video="v", stop_seconds=1, k=0)
