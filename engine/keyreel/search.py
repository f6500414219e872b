"""Scores to moments: the spans of a video that answer a query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keyreel.shots import shot_of
from keyreel.types import F32, F64, SearchHit, Shot

# A moment extends while the score stays above this fraction of the way from the video's median score to its peak,
HOLDS = 0.5
# and in any case while it is within this fraction of the peak: in a take of one thing the scores hardly differ.
NEAR = 0.1


def moments(
    scores: F32, pts_seconds: F64, shots: Sequence[Shot], *, video: str, stop_seconds: float, k: int
) -> list[SearchHit]:
    """The k best spans of one video, best first; spans do not overlap.

    From the best frame that is not yet part of a moment the span grows over neighbours of the same shot while
    score >= median + HOLDS (peak - median), or within NEAR of the peak.

    Args:
        scores: [T] float32 cosines to the query.
        pts_seconds: [T] float64, rising.
        shots: in time order; no moment crosses a cut.
        stop_seconds: the end of the video.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    typical = float(np.median(scores))
    shot = shot_of(shots, pts_seconds) if shots else np.zeros(len(scores), np.int64)
    free = np.ones(len(scores), bool)
    found: list[SearchHit] = []
    while len(found) < k and free.any():
        peak = int(np.where(free, scores, -np.inf).argmax())
        best = float(scores[peak])
        floor = min(typical + HOLDS * (best - typical), best - NEAR * abs(best))
        low = high = peak
        while low > 0 and free[low - 1] and shot[low - 1] == shot[peak] and scores[low - 1] >= floor:
            low -= 1
        while high + 1 < len(scores) and free[high + 1] and shot[high + 1] == shot[peak] and scores[high + 1] >= floor:
            high += 1
        free[low : high + 1] = False
        stop = float(pts_seconds[high + 1]) if high + 1 < len(scores) else max(stop_seconds, float(pts_seconds[high]))
        start = float(pts_seconds[low])
        if shots:
            # Samples lie up to one step after a cut: where a moment touches an end of its shot, it takes that end.
            span = shots[shot[peak]]
            stop = min(stop, span.stop_seconds) if span.stop_seconds > pts_seconds[high] else stop
            if low == 0 or shot[low - 1] != shot[low]:
                start = min(start, span.start_seconds)
        found.append(SearchHit(video, start, stop, float(pts_seconds[peak]), best))
    return found


def best_hits(hits: Sequence[SearchHit], k: int) -> list[SearchHit]:
    """The k best of several videos' hits; equal scores in the order of the names and times."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.video, hit.start_seconds))[:k]
