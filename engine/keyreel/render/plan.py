"""Which spans of a video make a reel."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from keyreel.types import F32, F64, KeyFrame, Shot

FRACTION = 0.15  # of the video, the default length
MIN_REEL_SECONDS, MAX_REEL_SECONDS = 10.0, 60.0
SPAN_SECONDS = 3.0  # wished length of one span
SNAP_SECONDS = 0.4  # an end this close to a cut or to another span moves onto it
MIN_SPAN_SECONDS = 0.8  # a shorter piece of a shot looks like a flicker
EPSILON = 1e-9

Span = tuple[float, float]


def reel_seconds(asked: float | None, duration_seconds: float) -> float:
    """Length of the reel: as asked, else 15 % of the video within 10 to 60 s; at most the whole video."""
    wished = asked if asked is not None else min(max(FRACTION * duration_seconds, MIN_REEL_SECONDS), MAX_REEL_SECONDS)
    return min(wished, duration_seconds)


def plan_reel(
    *,
    duration_seconds: float,
    shots: Sequence[Shot],
    keyframes: Sequence[KeyFrame],
    importance: F32,
    pts_seconds: F64,
    seconds: float | None = None,
    query_scores: F32 | None = None,
) -> tuple[Shot, ...]:
    """Spans around the most important frames, in time order, disjoint, of the wished length together.

    Spans stay inside their shot, snap to its ends when near, and are merged where they touch. Key-frames come first,
    by weight, then the other sampled frames by importance; with `query_scores` the sampled frames by score. Spans grow
    across a cut only when every shot in use is full.

    Args:
        duration_seconds: length of the video.
        shots: in time order.
        keyframes: any order.
        importance: [T] float32, of the sampled frames.
        pts_seconds: [T] float64, of the sampled frames.
        seconds: wished length of the reel.
        query_scores: [T] float32, how well each sampled frame answers the query.

    Raises:
        ValueError: lengths disagree, or the duration is not a positive number.
    """
    if not (np.isfinite(duration_seconds) and duration_seconds > 0):
        raise ValueError(f"duration_seconds must be positive, got {duration_seconds}")
    for name, values in (("importance", importance), ("query_scores", query_scores)):
        if values is not None and values.shape != pts_seconds.shape:
            raise ValueError(f"{name} {values.shape} and pts_seconds {pts_seconds.shape} must agree")
    total = reel_seconds(seconds, duration_seconds)
    if total > duration_seconds - EPSILON:
        return (Shot(0.0, duration_seconds),)
    cuts = sorted({0.0, duration_seconds} | {shot.start_seconds for shot in shots} | {s.stop_seconds for s in shots})
    cuts = [cut for cut in cuts if 0 <= cut <= duration_seconds]
    wished = SPAN_SECONDS
    if query_scores is None and keyframes:
        # Few key-frames for a long reel: longer spans around them rather than spans around lesser frames.
        wished = min(max(total / len(keyframes), wished), 2 * wished)

    taken: list[Span] = []  # disjoint, in time order
    remaining = total
    for anchor in _anchors(keyframes, importance, pts_seconds, query_scores):
        if remaining < MIN_SPAN_SECONDS:
            break
        gap = _free_gap(anchor, cuts, taken)
        if gap is None or gap[1] - gap[0] < MIN_SPAN_SECONDS:
            continue
        # The remainder must be long enough for a span of its own.
        length = wished if remaining - wished >= MIN_SPAN_SECONDS else remaining
        span = _place(anchor, length, gap, remaining)
        taken.insert(bisect_left(taken, span), span)
        remaining -= span[1] - span[0]
    if not taken:
        anchors = _anchors(keyframes, importance, pts_seconds, query_scores)
        anchor = max(next((t for t in anchors if t < duration_seconds), 0.0), 0.0)
        taken = [(anchor, anchor)]
    taken = _grow(_merge(taken), cuts, remaining)
    return tuple(Shot(start, stop) for start, stop in taken)


def _anchors(
    keyframes: Sequence[KeyFrame], importance: F32, pts_seconds: F64, query_scores: F32 | None
) -> Iterator[float]:
    """Times to show, best first."""
    if query_scores is None:
        for keyframe in sorted(keyframes, key=lambda k: (-k.weight, k.pts_seconds)):
            yield keyframe.pts_seconds
    scores = importance if query_scores is None else query_scores
    for row in np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable"):
        yield float(pts_seconds[row])


def _free_gap(anchor: float, cuts: list[float], taken: list[Span]) -> Span | None:
    """The free part around `anchor` inside its shot."""
    if not cuts[0] <= anchor < cuts[-1]:
        return None
    place = bisect_right(cuts, anchor)
    low, high = cuts[place - 1], cuts[place]
    after = bisect_right(taken, (anchor, np.inf))
    if after:
        low = max(low, taken[after - 1][1])
    if after < len(taken):
        high = min(high, taken[after][0])
    return (low, high) if low <= anchor < high else None


def _place(anchor: float, length: float, gap: Span, max_length: float) -> Span:
    low, high = gap
    if high - low <= min(length + SNAP_SECONDS, max_length):
        return gap
    length = min(length, high - low)
    start = min(max(anchor - length / 2, low), high - length)
    if start - low < SNAP_SECONDS:
        return low, low + length
    if high - start - length < SNAP_SECONDS:
        return high - length, high
    return start, start + length


def _merge(spans: list[Span]) -> list[Span]:
    merged = spans[:1]
    for start, stop in spans[1:]:
        if start <= merged[-1][1] + EPSILON:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _grow(spans: list[Span], cuts: list[float], remaining: float) -> list[Span]:
    """Makes the spans longer by `remaining` in all, inside their shots first."""
    while remaining > EPSILON:
        sides = []
        for row, (start, stop) in enumerate(spans):
            place = bisect_right(cuts, stop)
            if place < len(cuts):
                edge = min(cuts[place], spans[row + 1][0] if row + 1 < len(spans) else cuts[-1])
                sides.append((stop in cuts, edge - stop, row, 1))
            place = bisect_left(cuts, start)
            if place:
                edge = max(cuts[place - 1], spans[row - 1][1] if row else 0.0)
                sides.append((start in cuts, start - edge, row, -1))
        if not sides:
            break
        # Inside the shot first; across a cut only where the piece of the next shot is long enough to be seen.
        crossing, room, row, side = min(
            sides, key=lambda s: (s[0], s[0] and min(s[1], remaining) < min(s[1], MIN_SPAN_SECONDS), -s[1])
        )
        step = min(room, remaining)
        start, stop = spans[row]
        back = 0.0
        if crossing and step < min(room, MIN_SPAN_SECONDS) and stop - start >= 2 * MIN_SPAN_SECONDS:
            back = min(room, MIN_SPAN_SECONDS) - step  # the other end gives way
        spans[row] = (start + back, stop + step + back) if side > 0 else (start - step - back, stop - back)
        remaining -= step
        spans = _merge(spans)
    return spans
