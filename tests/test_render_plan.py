"""Which spans make a reel."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.render.plan import plan_reel, reel_seconds
from keyreel.types import F64, KeyFrame, Shot


def keyframe(pts: float, weight: float) -> KeyFrame:
    return KeyFrame(pts, int(pts * 25), 0, weight, 0.9, 0.5, 0)


def cut_up(lengths: list[float]) -> tuple[Shot, ...]:
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    return tuple(Shot(float(a), float(b)) for a, b in itertools.pairwise(ends))


def plan(
    shots: tuple[Shot, ...],
    keyframes: list[KeyFrame],
    seconds: float | None,
    query: Callable[[F64], F64] | None = None,
) -> tuple[Shot, ...]:
    duration = shots[-1].stop_seconds
    pts = np.arange(0, duration, 0.5)
    return plan_reel(
        duration_seconds=duration,
        shots=shots,
        keyframes=keyframes,
        importance=np.linspace(0, 1, len(pts), dtype=np.float32),
        pts_seconds=pts,
        seconds=seconds,
        query_scores=None if query is None else query(pts).astype(np.float32),
    )


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.floats(0.02, 40), min_size=1, max_size=30),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12),
    asked=st.one_of(st.none(), st.floats(0.05, 200)),
    query=st.sampled_from([None, np.sin]),
)
def test_spans_are_sorted_disjoint_and_as_long_as_asked(
    lengths: list[float],
    places: list[tuple[float, float]],
    asked: float | None,
    query: Callable[[F64], F64] | None,
) -> None:
    shots = cut_up(lengths)
    duration = shots[-1].stop_seconds
    spans = plan(shots, [keyframe(place * duration, weight) for place, weight in places], asked, query)
    assert spans[0].start_seconds >= 0
    assert spans[-1].stop_seconds <= duration + 1e-9
    assert all(one.start_seconds < one.stop_seconds for one in spans)
    assert all(one.stop_seconds < two.start_seconds for one, two in itertools.pairwise(spans))
    assert sum(s.duration_seconds for s in spans) == pytest.approx(reel_seconds(asked, duration), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.floats(2, 20), min_size=4, max_size=20),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 1)), min_size=1, max_size=8),
    fraction=st.floats(0.05, 0.5),
)
def test_no_flicker_of_a_shot_at_either_end(
    lengths: list[float], places: list[tuple[float, float]], fraction: float
) -> None:
    shots = cut_up(lengths)
    duration = shots[-1].stop_seconds
    frames = [keyframe(place * duration, weight) for place, weight in places]
    for span in plan(shots, frames, max(1.0, fraction * duration)):
        for shot in shots:
            shown = min(span.stop_seconds, shot.stop_seconds) - max(span.start_seconds, shot.start_seconds)
            assert shown <= 1e-6 or shown >= min(0.8, shot.duration_seconds) - 1e-6


def test_default_length() -> None:
    assert [reel_seconds(None, duration) for duration in (4, 30, 200, 5000)] == [4, 10, 30, 60]
    assert [reel_seconds(7, duration) for duration in (4, 400)] == [4, 7]


def test_spans_by_hand() -> None:
    shots = cut_up([20.0, 20.0, 20.0, 20.0])
    frames = [keyframe(20.3, 0.5), keyframe(10.0, 0.1), keyframe(59.8, 0.3), keyframe(70.0, 0.1)]
    assert plan(shots, frames, 6.0) == (Shot(20.0, 23.0), Shot(57.0, 60.0))  # the heaviest, snapped to their shots
    (merged,) = plan(cut_up([10.0, 3.2, 10.0]), [keyframe(8.2, 0.4), keyframe(11.0, 0.6)], 6.2)
    assert (merged.start_seconds, merged.stop_seconds) == pytest.approx((7.0, 13.2))
    by_query = plan(cut_up([30.0, 30.0]), [keyframe(5.0, 1.0)], 3.0, query=lambda pts: -np.abs(pts - 45.0))
    assert by_query == (Shot(43.5, 46.5),)


def test_arguments_that_disagree() -> None:
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
