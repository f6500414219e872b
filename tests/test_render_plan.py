from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.render.plan import plan_reel, reel_seconds
from keyreel.types import KeyFrame, Shot


def keyframe(pts: float, weight: float) -> KeyFrame:
    return KeyFrame(pts, int(pts * 25), 0, weight, 0.9, 0.5, 0)


def cut_up(lengths: list[float]) -> tuple[Shot, ...]:
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    return tuple(Shot(float(a), float(b)) for a, b in itertools.pairwise(ends))


def plan(shots, keyframes, seconds, span_seconds=3.0, query_scores=None, step=0.5):
    duration = shots[-1].stop_seconds
    pts = np.arange(0, duration, step)
    importance = np.linspace(0, 1, len(pts), dtype=np.float32)
    scores = None if query_scores is None else query_scores(pts).astype(np.float32)
    return plan_reel(
        duration_seconds=duration,
        shots=shots,
        keyframes=keyframes,
        importance=importance,
        pts_seconds=pts,
        seconds=seconds,
        span_seconds=span_seconds,
        query_scores=scores,
    )


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.floats(0.02, 40), min_size=1, max_size=30),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12),
    asked=st.one_of(st.none(), st.floats(0.05, 200)),
    span=st.floats(0.2, 20),
    by_query=st.booleans(),
)
def test_spans_are_inside_sorted_disjoint_and_as_long_as_asked(lengths, places, asked, span, by_query):
    shots = cut_up(lengths)
    duration = shots[-1].stop_seconds
    spans = plan(
        shots,
        [keyframe(place * duration, weight) for place, weight in places],
        asked,
        span,
        (lambda pts: np.sin(pts)) if by_query else None,
    )
    assert spans[0].start_seconds >= 0
    assert spans[-1].stop_seconds <= duration + 1e-9
    assert all(one.start_seconds < one.stop_seconds for one in spans)
    assert all(one.stop_seconds < two.start_seconds for one, two in itertools.pairwise(spans))
    assert sum(s.duration_seconds for s in spans) == pytest.approx(reel_seconds(asked, duration), abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.floats(2, 20), min_size=4, max_size=20),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 1)), min_size=1, max_size=8),
    share=st.floats(0.05, 0.5),
)
def test_no_flicker_of_a_shot_at_either_end(lengths, places, share):
    shots = cut_up(lengths)
    duration = shots[-1].stop_seconds
    seconds = max(1.0, share * duration)
    for span in plan(shots, [keyframe(p * duration, w) for p, w in places], seconds):
        for shot in shots:
            shown = min(span.stop_seconds, shot.stop_seconds) - max(span.start_seconds, shot.start_seconds)
            assert shown <= 1e-6 or shown >= min(0.8, shot.duration_seconds) - 1e-6


def test_default_length():
    assert reel_seconds(None, 30) == 10
    assert reel_seconds(None, 200) == 30
    assert reel_seconds(None, 5000) == 60
    assert reel_seconds(None, 4) == 4
    assert reel_seconds(7, 4) == 4
    assert reel_seconds(7, 400) == 7


def test_heaviest_keyframes_are_shown_and_snapped_to_their_shots():
    shots = cut_up([20.0, 20.0, 20.0, 20.0])
    frames = [keyframe(20.3, 0.5), keyframe(10.0, 0.1), keyframe(59.8, 0.3), keyframe(70.0, 0.1)]
    spans = plan(shots, frames, 6.0)
    assert [(s.start_seconds, s.stop_seconds) for s in spans] == [(20.0, 23.0), (57.0, 60.0)]


def test_near_ends_snap_and_touching_spans_merge():
    shots = cut_up([10.0, 3.2, 10.0])
    spans = plan(shots, [keyframe(8.2, 0.4), keyframe(11.0, 0.6)], 6.2)
    assert [(s.start_seconds, s.stop_seconds) for s in spans] == [pytest.approx((7.0, 13.2))]


def test_query_ranks_before_weight():
    shots = cut_up([30.0, 30.0])
    frames = [keyframe(5.0, 1.0)]
    spans = plan(shots, frames, 3.0, query_scores=lambda pts: -np.abs(pts - 45.0))
    assert [(s.start_seconds, s.stop_seconds) for s in spans] == [(43.5, 46.5)]


def test_rejects_arrays_that_disagree():
    with pytest.raises(ValueError, match="must agree"):
        plan_reel(
            duration_seconds=5.0,
            shots=(Shot(0, 5),),
            keyframes=(),
            importance=np.zeros(3, np.float32),
            pts_seconds=np.zeros(4),
        )
    with pytest.raises(ValueError, match="positive"):
        plan_reel(
            duration_seconds=float("nan"),
            shots=(),
            keyframes=(),
            importance=np.zeros(0, np.float32),
            pts_seconds=np.zeros(0),
        )
