"""Plans a reel: the spans of a video where most happens, without repeats and flickers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from keyreel.types import F32, F64, Embedding, Shot

FRACTION = 0.15  # default length, as a share of the video
MIN_REEL_SECONDS, MAX_REEL_SECONDS = 10.0, 60.0
# A default reel is at most this share of its video, and a shorter one is none; nor is one that was asked for and would
# be more than this share.
MOST_OF_DEFAULT, SHORTEST_REEL_SECONDS, MOST = 0.5, 3.0, 0.9
SPAN_SECONDS = (2.0, 6.0)  # length of a span, by how long much happens
MIN_SPAN_SECONDS = 1.5  # a shorter one looks like a flicker
APART_SECONDS = 2.0  # least gap of two spans of one shot; a smaller one looks like a mistake
SNAP_SECONDS = 0.4  # ends move to a cut this close, and to a quiet place this close
# A span extends while the score is at least this share of its best sample's; below that share of the video's best
# nothing is shown.
LIVELY, DULL = 0.4, 0.15
# A layout changes by about 0.02 from sample to sample where nothing moves, and by 0.2 to 0.7 where cars pass.
MOVING = 0.1
IMPORTANCE = 0.25  # weight of a frame's importance beside what happens in it
EPSILON = 1e-9

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ReelPlan:
    """The spans of a reel, in time order and disjoint."""

    spans: tuple[Shot, ...]
    reason: str  # why there is no reel, else empty


def reel_seconds(asked: float | None, duration_seconds: float) -> float:
    """Longest length of the reel in seconds: `asked`, else 15 % of the video, 10 to 60 s, at most half of it."""
    if asked is not None:
        return asked
    wished = min(max(FRACTION * duration_seconds, MIN_REEL_SECONDS), MAX_REEL_SECONDS)
    return min(wished, MOST_OF_DEFAULT * duration_seconds)


def interest_of(embedding: Embedding, shots: Sequence[Shot], importance: F32) -> F32:
    """[T] float32 in 0..1: how much happens in each sampled frame, plus a little of its importance.

    What happens is the change of the layout from the sample before; the jump at a cut does not count.
    """
    change = embedding.layout_change.astype(np.float64)
    pts = embedding.pts_seconds
    starts = np.array([shot.start_seconds for shot in shots])
    shot = np.searchsorted(starts, pts + EPSILON, side="right")
    smooth = np.zeros(len(pts))
    for number in np.unique(shot):
        rows = np.flatnonzero(shot == number)
        own = change[rows].copy()
        own[0] = own[1] if len(own) > 1 else 0.0
        padded = np.pad(own, 1, mode="edge")
        smooth[rows] = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    activity = np.clip(smooth / max(float(np.quantile(smooth, 0.95)), MOVING), 0, 1)
    interest: F32 = ((1 - IMPORTANCE) * activity + IMPORTANCE * importance).astype(np.float32)
    return interest


def plan_reel(
    *,
    duration_seconds: float,
    shots: Sequence[Shot],
    pts_seconds: F64,
    scores: F32,
    vectors: F32,
    seconds: float | None = None,
    whole: bool = False,
    similarity_limit: float = 0.97,
    quiet: Callable[[float], float] | None = None,
) -> ReelPlan:
    """Chooses spans of 2 to 6 s around the frames with the best scores, in total at most `seconds` long.

    Spans stay inside their shot; shots shorter than a span are shown together with their neighbours. Ends snap to near
    cuts, else to quiet places in the sound. Similar spans are shown once, and dull ones not at all, which makes the
    reel shorter.

    Args:
        duration_seconds: length of the video.
        shots: in time order.
        pts_seconds: [T] float64, of the sampled frames.
        scores: [T] float32: `interest_of`, or the scores of a query.
        vectors: [T, D] float32, unit length.
        seconds: longest length of the reel.
        whole: show all of a video that is too short for a reel, since the reel has another shape.
        similarity_limit: largest cosine of the best frames of two spans.
        quiet: maps a time to the quietest one within 0.4 s.
    """
    total = reel_seconds(seconds, duration_seconds)
    shortest = SHORTEST_REEL_SECONDS if seconds is None else 0.0
    if total < shortest or total > MOST * duration_seconds:
        if whole:
            return ReelPlan((Shot(0.0, duration_seconds),), "")
        reel = f"a reel of {total:.1f} s" if seconds is not None else "a reel"
        return ReelPlan((), f"the video is {duration_seconds:.1f} s long: {reel} would repeat most of it")
    cuts = sorted({0.0, duration_seconds} | {shot.start_seconds for shot in shots} | {s.stop_seconds for s in shots})
    cuts = [cut for cut in cuts if 0 <= cut <= duration_seconds]
    level = _level(scores)
    least = min(MIN_SPAN_SECONDS, total)

    taken: list[Span] = []  # disjoint, in time order
    shown: list[int] = []  # the best row of each
    remaining = total
    for row in _rows(level, pts_seconds, duration_seconds):
        if remaining < least - EPSILON:
            break
        if shown and (level[row] < DULL or (vectors[shown] @ vectors[row]).max() > similarity_limit):
            continue
        gap = _free_gap(float(pts_seconds[row]), cuts, taken)
        if gap is None or gap[1] - gap[0] < least - EPSILON:
            continue
        span = _place(row, level, pts_seconds, gap, remaining)
        taken.insert(bisect_left(taken, span), span)
        shown.append(row)
        remaining -= span[1] - span[0]
    if quiet is not None:
        taken = _quieted(taken, cuts, least, quiet)
    return ReelPlan(tuple(Shot(start, stop) for start, stop in _merge(taken)), "")


def _level(scores: F32) -> F64:
    """[T] float64: the scores with the tenth percentile at 0 and the best at 1."""
    values = np.nan_to_num(scores.astype(np.float64), nan=-np.inf)
    low, high = float(np.quantile(values, 0.1, method="lower")), float(values.max(initial=-np.inf))
    if not np.isfinite(low) or high - low < EPSILON:
        return np.where(np.isfinite(values), 1.0, 0.0)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def _rows(level: F64, pts: F64, duration: float) -> Iterator[int]:
    """The samples inside the video, best first."""
    order = [int(row) for row in np.argsort(-level, kind="stable") if 0 <= pts[row] < duration]
    return iter(order or [0])


def _free_gap(anchor: float, cuts: list[float], taken: list[Span]) -> Span | None:
    """The free part around `anchor` in its shot; for a short shot, also in its neighbours."""
    place = min(max(bisect_right(cuts, anchor), 1), len(cuts) - 1)
    first, last = place - 1, place
    while cuts[last] - cuts[first] < SPAN_SECONDS[0] - EPSILON and (last < len(cuts) - 1 or first > 0):
        if last < len(cuts) - 1:
            last += 1
        else:
            first -= 1
    low, high = cuts[first], cuts[last]
    after = bisect_right(taken, (anchor, np.inf))
    if after:
        edge = taken[after - 1][1]
        low = max(low, edge if edge in cuts else edge + APART_SECONDS)
    if after < len(taken):
        edge = taken[after][0]
        high = min(high, edge if edge in cuts else edge - APART_SECONDS)
    return (low, high) if low <= max(anchor, 0.0) < high else None


def _place(row: int, level: F64, pts: F64, gap: Span, remaining: float) -> Span:
    """The span around a sample, as long as much happens, within the gap."""
    low, high = gap
    first = last = row
    while first > 0 and pts[first - 1] >= low and level[first - 1] >= LIVELY * level[row]:
        first -= 1
    while last + 1 < len(pts) and pts[last + 1] < high and level[last + 1] >= LIVELY * level[row]:
        last += 1
    begin = float(pts[first])
    end = float(pts[last + 1]) if last + 1 < len(pts) else high
    shortest, longest = SPAN_SECONDS
    length = min(max(min(end, high) - begin, shortest), longest, remaining)
    if high - low <= min(length + SNAP_SECONDS, remaining):
        return gap
    length = min(length, high - low)
    middle = (begin + end) / 2 if end - begin <= length else min(max(float(pts[row]), begin + length / 2), end)
    start = min(max(middle - length / 2, low), high - length)
    if start - low < SNAP_SECONDS:
        return low, low + length
    if high - start - length < SNAP_SECONDS:
        return high - length, high
    return start, start + length


def _quieted(spans: list[Span], cuts: list[float], least: float, quiet: Callable[[float], float]) -> list[Span]:
    """Moves ends that are not at a cut to quiet places, without crossing a cut or another span."""
    found: list[Span] = []
    for number, (start, stop) in enumerate(spans):
        place = bisect_right(cuts, start + EPSILON)
        low = max(cuts[place - 1], found[-1][1] + APART_SECONDS if found else 0.0)
        place = bisect_left(cuts, stop - EPSILON)
        high = min(cuts[place], spans[number + 1][0] - APART_SECONDS if number + 1 < len(spans) else np.inf)
        new_start = quiet(start) if start not in cuts else start
        if not low <= new_start <= stop - least:
            new_start = start
        new_stop = quiet(stop) if stop not in cuts else stop
        if not new_start + least <= new_stop <= high:
            new_stop = stop
        found.append((new_start, new_stop))
    return found


def _merge(spans: list[Span]) -> list[Span]:
    """Joins spans that touch at a cut."""
    merged = spans[:1]
    for (_, before), (start, stop) in pairwise(spans):
        if start <= before + EPSILON:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged
