"""Scores to moments: the spans of a video that answer a query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from keyreel.runtime.bundle import SubjectScale
from keyreel.shots import shot_of
from keyreel.types import F32, F64, Embedding, Region, SearchHit, Shot

# A moment extends while the score stays above this fraction of the way from the video's median score to its peak,
HOLDS = 0.5
# and in any case while it is within this fraction of the peak: in a take of one thing the scores hardly differ.
NEAR = 0.1
# and until it lasts so long: less is a flicker to whoever plays it.
LEAST = 1.0
# A patch belongs to the subject where the map reaches this fraction of its largest value.
OUTLINE = 0.5


@dataclass(frozen=True, slots=True)
class FrameScores:
    """How well each frame answers a query."""

    best: F32  # [T, ...] float32: max(<q, scene>, slope <q, subject> + offset)
    by_subject: NDArray[np.bool_]  # [T, ...] whether it was the subject


def frame_scores(scene: F32, subject: F32 | None, query: F32, scale: SubjectScale) -> FrameScores:
    """Scores of a query [D], or of several [D, Q], against the better of each frame's two vectors.

    As in a library, a subject counts only where it says something new: below `scale.novelty`.

    Args:
        scene, subject: [T, D] float32, unit length; no subject, no choice.
    """
    answer: F32 = scene @ query
    if subject is None:
        return FrameScores(answer, np.zeros(answer.shape, bool))
    other = np.float32(scale.slope) * (subject @ query) + np.float32(scale.offset)
    new = np.vecdot(scene, subject) < scale.novelty
    wins: NDArray[np.bool_] = new.reshape(-1, *[1] * (answer.ndim - 1)) & (other > answer)
    return FrameScores(np.where(wins, other, answer), wins)


def answered(
    hit: SearchHit, scores: FrameScores, embedding: Embedding, area: tuple[float, float, float, float]
) -> SearchHit:
    """The hit with which vector of its best frame answered, and where its subject is.

    Args:
        area: (left, top, right, bottom) of the map on the picture, see `attended_area`.
    """
    if embedding.subject is None:
        return hit
    row = int(np.searchsorted(embedding.pts_seconds, hit.pts_seconds))
    where = region_on(area, region(embedding.attention[row], embedding.grid))
    return replace(hit, answered_by="subject" if scores.by_subject[row] else "scene", region=where)


def region(weights: F32, grid: tuple[int, int]) -> Region:
    """The box around the subject: the patches that reach OUTLINE of the map's peak and touch it, side by side.

    Args:
        weights: [P] float32, a row of `Embedding.attention`. grid: (h, w).
    """
    table = weights.reshape(grid)
    strong = table >= OUTLINE * table.max()
    inside = np.zeros(grid, bool)
    inside[np.unravel_index(int(table.argmax()), grid)] = True
    while True:
        grown = inside.copy()
        grown[1:] |= inside[:-1]
        grown[:-1] |= inside[1:]
        grown[:, 1:] |= inside[:, :-1]
        grown[:, :-1] |= inside[:, 1:]
        grown &= strong
        if (grown == inside).all():
            break
        inside = grown
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    x, y = columns[0] / grid[1], rows[0] / grid[0]
    return float(x), float(y), float((columns[-1] + 1) / grid[1] - x), float((rows[-1] + 1) / grid[0] - y)


def region_on(area: tuple[float, float, float, float], part: Region) -> Region:
    """A region of the model's input as one of the whole picture, cut off at its edges.

    Args:
        area: (left, top, right, bottom) of the input as shares of the picture, see `attended_area`.
    """
    left, top, right, bottom = area
    x, y, width, height = part
    edges = left + x * (right - left), top + y * (bottom - top)
    ends = left + (x + width) * (right - left), top + (y + height) * (bottom - top)
    (x, y), (stop_x, stop_y) = ((min(max(a, 0.0), 1.0), min(max(b, 0.0), 1.0)) for a, b in (edges, ends))
    return x, y, stop_x - x, stop_y - y


def moments(
    scores: F32, pts_seconds: F64, shots: Sequence[Shot], *, video: str, stop_seconds: float, k: int
) -> list[SearchHit]:
    """The k best spans of one video, best first; spans do not overlap.

    From the best frame that is not yet part of a moment the span grows over neighbours of the same shot while
    score >= median + HOLDS (peak - median), or within NEAR of the peak; then over the better neighbours until it lasts
    LEAST seconds.

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
        end = shots[shot[peak]].stop_seconds if shots else math.inf
        while min(end, pts_seconds[high + 1] if high + 1 < len(scores) else stop_seconds) - pts_seconds[low] < LEAST:
            beside = [at for at in (low - 1, high + 1) if 0 <= at < len(scores) and free[at] and shot[at] == shot[peak]]
            if not beside:
                break
            at = max(beside, key=lambda at: float(scores[at]))
            low, high = min(low, at), max(high, at)
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
