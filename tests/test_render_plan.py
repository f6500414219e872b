"""Which spans make a reel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from render_clips import write_clip

from keyreel import Engine
from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.render.modes import planned_reel
from keyreel.render.plan import MIN_SPAN_SECONDS, ReelPlan, interest_of, plan_reel, reel_seconds
from keyreel.render.sound import SoundReader, quietest
from keyreel.types import F64, Shot


def cut_up(lengths: list[float]) -> tuple[Shot, ...]:
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    return tuple(Shot(float(a), float(b)) for a, b in itertools.pairwise(ends))


def plan(
    shots: tuple[Shot, ...],
    scores: Callable[[F64], F64],
    seconds: float | None = None,
    look: Callable[[F64], F64] = lambda pts: pts,
    quiet: Callable[[float], float] | None = None,
) -> ReelPlan:
    """A plan for samples of two a second; `look` is the angle, in tenths of a radian, of each one's vector."""
    duration = shots[-1].stop_seconds
    pts = np.arange(0, duration, 0.5)
    angle = look(pts) / 10
    return plan_reel(
        duration_seconds=duration,
        shots=shots,
        pts_seconds=pts,
        scores=scores(pts).astype(np.float32),
        vectors=np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
        seconds=seconds,
        quiet=quiet,
    )


def busy(*places: tuple[float, float]) -> Callable[[F64], F64]:
    """1 inside the places, less the later the place; 0.1 elsewhere."""
    return lambda pts: np.max(
        [np.where((pts >= a) & (pts < b), 1 - n / 100, 0.1) for n, (a, b) in enumerate(places)], axis=0
    )


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.floats(0.1, 40), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
    asked=st.one_of(st.none(), st.floats(0.5, 200)),
    shift=st.floats(-0.4, 0.4),
)
def test_spans_are_sorted_apart_inside_and_long_enough(
    lengths: list[float], seed: int, asked: float | None, shift: float
) -> None:
    shots = cut_up(lengths)
    duration = shots[-1].stop_seconds
    rng = np.random.default_rng(seed)

    def scores(pts: F64) -> F64:
        return rng.random(len(pts))

    found = plan(shots, scores, asked, look=lambda pts: rng.integers(0, 30, len(pts)), quiet=lambda t: t + shift)
    total = reel_seconds(asked, duration)
    if not found.spans:
        assert f"{duration:.1f} s" in found.reason
        assert total < 3 or total > 0.9 * duration
        return
    assert found.reason == ""
    assert found.spans[0].start_seconds >= 0
    assert found.spans[-1].stop_seconds <= duration + 1e-9
    assert all(one.stop_seconds < two.start_seconds for one, two in itertools.pairwise(found.spans))
    assert all(one.duration_seconds >= min(MIN_SPAN_SECONDS, total) - 1e-6 for one in found.spans)
    # Each end that is moved to a quiet place may make the reel longer by 0.4 s.
    assert sum(s.duration_seconds for s in found.spans) <= total + 0.8 * len(found.spans) + 1e-6


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.floats(2, 20), min_size=4, max_size=20), seed=st.integers(0, 1000))
@example(lengths=[3.8818683753238035, 2, 2, 4, 9, 9, 9, 2.5, 4], seed=642)  # 2 s, but for rounding
def test_no_flicker_of_a_shot_at_either_end(lengths: list[float], seed: int) -> None:
    shots = cut_up(lengths)
    rng = np.random.default_rng(seed)
    spans = plan(shots, lambda pts: rng.random(len(pts)), look=lambda pts: rng.random(len(pts)) * 30).spans
    for span, shot in itertools.product(spans, shots):
        shown = min(span.stop_seconds, shot.stop_seconds) - max(span.start_seconds, shot.start_seconds)
        assert shown <= 1e-6 or shown >= MIN_SPAN_SECONDS - 1e-6


def test_default_length_and_videos_too_short_for_a_reel() -> None:
    assert [reel_seconds(None, duration) for duration in (8, 30, 200, 5000)] == [4, 10, 30, 60]
    assert plan(cut_up([5.0]), busy((1, 3))) == ReelPlan((), "the video is 5.0 s long: a reel would repeat most of it")
    assert plan(cut_up([50.0]), busy((1, 3)), 60.0).reason.endswith("a reel of 60.0 s would repeat most of it")
    assert len(plan(cut_up([7.0]), busy((1, 3))).spans) == 1


def test_as_long_as_much_happens_within_two_to_six_seconds() -> None:
    shots = cut_up([100.0])
    # A moment, four seconds, half a minute; the best first, and what is dull not at all.
    spans = plan(shots, busy((10, 10.5), (30, 34), (60, 90)), 13.0).spans
    assert spans == (Shot(9.25, 11.25), Shot(30.0, 34.0), Shot(60.0, 66.0))
    # There is room for two more of the half minute, the last one shorter.
    longer = plan(shots, busy((10, 10.5), (30, 34), (60, 90)), 20.0).spans
    assert longer == (*spans, Shot(68.0, 74.0), Shot(76.0, 78.0))


def test_ends_snap_to_cuts_and_stay_in_their_shot() -> None:
    shots = cut_up([20.0, 20.0, 20.0])
    assert plan(shots, busy((20, 23), (57.7, 59.7)), 6.0).spans == (Shot(20.0, 23.0), Shot(58.0, 60.0))
    # Shots shorter than a span are shown with the next.
    flicker = cut_up([20.0, 0.6, 0.7, 0.8, 20.0])
    (span,) = plan(flicker, busy((20.5, 21)), 3.0).spans
    assert (span.start_seconds, span.stop_seconds) == pytest.approx((20.0, 22.1))


def test_what_is_alike_is_shown_once() -> None:
    shots, lively = cut_up([30.0, 30.0, 30.0]), busy((10, 13), (40, 43), (70, 73))
    assert len(plan(shots, lively).spans) == 3
    assert plan(shots, lively, look=lambda pts: np.where(pts < 60, 0, 9)).spans == (Shot(10, 13), Shot(70, 73))


def test_ends_move_to_quiet_places_but_not_from_a_cut() -> None:
    shots = cut_up([20.0, 20.0])
    spans = plan(shots, busy((10, 13), (20, 23)), 6.0, quiet=lambda t: t + 0.3).spans
    assert [(s.start_seconds, s.stop_seconds) for s in spans] == [(10.3, 13.3), (20.0, 23.3)]


def test_the_quietest_place_by_the_loudness_of_each_moment(tmp_path: Path) -> None:
    """Beeps of 0.1 s: a quiet place is any time outside them, and a place that is quiet already stays."""
    beeps = [1.0, 1.2, 1.4, 1.75]
    clip = write_clip(tmp_path / "beeps.mkv", [n / 25 for n in range(100)], beeps, sound="pcm_s16le", rate=48000)
    with Source(clip) as source:
        sound = SoundReader(source)
        for time in (1.05, 1.45):
            found = quietest(sound, time, 0.4)
            assert abs(found - time) <= 0.4
            assert all(not beep - 0.03 < found < beep + 0.13 for beep in beeps)
        assert quietest(sound, 2.5, 0.4) == 2.5
        sound.close()


@pytest.mark.full
def test_cars_on_a_road_rather_than_the_road(engine: Engine, media: Callable[[str], Path]) -> None:
    """Cars cross the picture from 4.5 to 9, 14.5 to 19.5 and 25.4 to 28.4 s; else the road is empty."""
    with Source(media("natural/car-detection.mp4")) as source:
        summary = engine.summarize(source)
        spans = planned_reel(summary, source, OutputConfig()).spans
        interest = interest_of(summary.embedding, summary.shots, summary.importance)
    pts = summary.embedding.pts_seconds
    cars = [(4.4, 9.5), (14.4, 20.0), (25.4, 28.5)]
    assert {round(float(t)) for t in pts[interest > 0.7]} <= {5, 6, 7, 8, 15, 16, 17, 18, 19, 26, 27, 28}
    shown = sum(
        max(0.0, min(span.stop_seconds, stop) - max(span.start_seconds, start))
        for span, (start, stop) in itertools.product(spans, cars)
    )
    assert shown >= 0.95 * sum(span.duration_seconds for span in spans)
    assert len(spans) >= 2


def test_a_short_video_is_shown_whole_where_the_reel_has_another_shape() -> None:
    given: dict[str, Any] = {
        "duration_seconds": 5.0,
        "shots": [Shot(0.0, 5.0)],
        "pts_seconds": np.arange(0, 5, 0.5),
        "scores": np.linspace(0, 1, 10, dtype=np.float32),
        "vectors": np.eye(10, dtype=np.float32),
    }
    assert plan_reel(**given).spans == ()
    assert plan_reel(**given, whole=True) == ReelPlan((Shot(0.0, 5.0),), "")
    assert plan_reel(**given, whole=True, seconds=2.0) == plan_reel(**given, seconds=2.0)
