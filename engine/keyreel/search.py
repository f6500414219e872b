"""Turns the scores of frames into moments: spans of a video that answer a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyreel.chance import Chances
from keyreel.runtime.bundle import SubjectScale
from keyreel.shots import shot_of
from keyreel.types import F32, F64, AnsweredBy, Combined, Embedding, Query, Region, SearchHit, Shot

# A scene up to this long is one moment. Of a longer one, the moment is the part that answers:
WHOLE_SECONDS = 20.0
# the frames this near its peak, and on both sides those whose score, a mean over twice that time, stays above this
# fraction of the way from the video's median to the peak, or within this fraction of the peak.
AROUND_SECONDS, HOLDS, NEAR = 2.0, 0.3, 0.1
_ROUNDING = 1e-6  # of scores
# In a long scene the next moment is at least this far away: the frames beside a moment only answer worse.
APART_SECONDS = 10.0
# Weights of conditions beside the query, see `Asked.of`. On pairs of an object and a place (`benchmarks.answers`) the
# mean of two scores worked better than their minimum or the sum of the vectors, and a quarter of the score of unwanted
# things better than less or more. With more weight, examples hide what the text finds.
WITHOUT, MORE, LESS = 0.25, 0.25, 0.1
# A patch belongs to the subject if the map reaches this fraction of its peak.
OUTLINE = 0.5


@dataclass(frozen=True, slots=True)
class FrameScores:
    """The scores of frames for a query."""

    best: F32  # [T, ...] float32: max(<q, scene>, slope <q, subject> + offset), or a sum of these, see `Asked`
    by_subject: NDArray[np.bool_]  # [T, ...] bool: whether the subject scored higher (with the first vector)


class Part(NamedTuple):
    """One text or picture of a query."""

    vector: F32  # [D] float32, unit length
    scale: SubjectScale
    known: float | None  # of a text: fraction of its words that the model knows

    @property
    def is_text(self) -> bool:
        """Whether it is a text."""
        return self.known is not None


@dataclass(frozen=True, slots=True)
class Asked:
    """A query as vectors. The score of a frame is the weighted sum of its scores with each of them."""

    vectors: F32  # [n, D] float32, unit length: the query, then its conditions
    scales: tuple[SubjectScale, ...]
    weights: tuple[float, ...]
    known: tuple[float | None, ...] = ()  # of each text that a frame should show, see `Part`
    chances: Chances | None = None

    @classmethod
    def of(
        cls, query: Query | Combined, part_of: Callable[[Query], Part], chances: Callable[[], Chances | None]
    ) -> Asked:
        """Encodes a query and weighs its conditions.

        The query and the texts of `also` have equal weights that sum to 1. The texts of `without` subtract their mean,
        times `WITHOUT`. Pictures and frames count as relevance feedback (Rocchio 1971), weighted `MORE` and `LESS`.
        """
        query = Combined.of(query)
        first, also, without = part_of(query.query), [*map(part_of, query.also)], [*map(part_of, query.without)]
        alike = 1 / (1 + sum(part.is_text for part in also))
        weights = [alike, *_shared(also, alike, MORE)]
        weights += _shared(without, -WITHOUT / max(sum(part.is_text for part in without), 1), -LESS)
        every = [first, *also, *without]
        known = tuple(part.known for part in (first, *also))
        return cls(
            np.stack([part.vector for part in every]),
            tuple(part.scale for part in every),
            tuple(weights),
            known,
            chances() if any(part is not None for part in known) else None,
        )

    def chance(self, scene: F32, subject: F32 | None, pictures: int) -> float | None:
        """The chance that a frame shows what the texts say: that of the least likely text. Unknown words lower it.

        Args:
            scene, subject: [D] float32; None where the frame has no subject of its own.
            pictures: how many different ones were searched.
        """
        if self.chances is None:
            return None
        return min(
            known * self.chances.of(self.vectors[n], self.scales[n], scene, subject, pictures)
            for n, known in enumerate(self.known)
            if known is not None
        )

    def scores(self, scene: F32, subject: F32 | None) -> FrameScores:
        """The scores of frames [T, D], see `frame_scores`."""
        each = [frame_scores(scene, subject, *one) for one in zip(self.vectors, self.scales, strict=True)]
        return added(each, self.weights)


def _shared(parts: Sequence[Part], text: float, pictures: float) -> list[float]:
    """The weight of each part: one for each text, and one that all pictures share."""
    count = sum(not part.is_text for part in parts)
    return [text if part.is_text else pictures / count for part in parts]


def added(scores: Sequence[FrameScores], weights: Sequence[float]) -> FrameScores:
    """Adds the scores with several vectors, weighted."""
    if len(scores) == 1 and weights[0] == 1:
        return scores[0]
    best = np.zeros_like(scores[0].best)
    for own, weight in zip(scores, weights, strict=True):
        best += np.float32(weight) * own.best
    return FrameScores(best, scores[0].by_subject)


def frame_scores(scene: F32, subject: F32 | None, query: F32, scale: SubjectScale) -> FrameScores:
    """Scores of a query [D], or of Q queries [D, Q], with the better of each frame's two vectors.

    As in a library, a subject counts only if its cosine to the scene is below `scale.novelty`.

    Args:
        scene, subject: [T, D] float32, unit length; without subject, the scenes' scores.
    """
    answer: F32 = scene @ query
    if subject is None:
        return FrameScores(answer, np.zeros(answer.shape, bool))
    other = np.float32(scale.slope) * (subject @ query) + np.float32(scale.offset)
    new = np.vecdot(scene, subject) < scale.novelty
    wins: NDArray[np.bool_] = new.reshape(-1, *[1] * (answer.ndim - 1)) & (other > answer)
    return FrameScores(np.where(wins, other, answer), wins)


def answered(
    hit: SearchHit,
    scores: FrameScores,
    embedding: Embedding,
    area: tuple[float, float, float, float],
    asked: Asked,
    pictures: int,
) -> SearchHit:
    """Completes a hit: which vector of its best frame answered, the region of the subject, and the chance.

    Args:
        area: (left, top, right, bottom) of the map on the picture, see `attended_area`.
        pictures: how many different ones were searched.
    """
    row = int(np.searchsorted(embedding.pts_seconds, hit.pts_seconds))
    scene, subject = embedding.scene[row], None if embedding.subject is None else embedding.subject[row]
    if subject is None:
        return replace(hit, chance=asked.chance(scene, None, pictures))
    where = region_on(area, region(embedding.attention[row], embedding.grid))
    by: AnsweredBy = "subject" if scores.by_subject[row] else "scene"
    new = float(scene @ subject) < asked.scales[0].novelty
    return replace(hit, answered_by=by, region=where, chance=asked.chance(scene, subject if new else None, pictures))


def region(weights: F32, grid: tuple[int, int]) -> Region:
    """The box around the subject: the connected patches around the map's peak that reach OUTLINE of it.

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
    """Converts a region of the model's input to one of the whole picture, clipped to it.

    Args:
        area: (left, top, right, bottom) of the input as fractions of the picture, see `attended_area`.
    """
    left, top, right, bottom = area
    x, y, width, height = part
    edges = left + x * (right - left), top + y * (bottom - top)
    ends = left + (x + width) * (right - left), top + (y + height) * (bottom - top)
    (x, y), (stop_x, stop_y) = ((min(max(a, 0.0), 1.0), min(max(b, 0.0), 1.0)) for a, b in (edges, ends))
    return x, y, stop_x - x, stop_y - y


def moments(
    scores: F32, pts_seconds: F64, scenes: Sequence[Shot], *, video: str, stop_seconds: float, k: int
) -> list[SearchHit]:
    """Finds the k best moments of one video, best first. They do not overlap.

    A moment is the scene of the best frame that is in no moment yet. Of a scene longer than `WHOLE_SECONDS` it is the
    part around that frame that answers.

    Args:
        scores: [T] float32 cosines to the query.
        pts_seconds: [T] float64, rising.
        scenes: in time order, see `scenes.find_scenes`; () treats the video as one scene.
        stop_seconds: end of the video.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if not scenes:
        scenes = [Shot(float(pts_seconds[0]), max(stop_seconds, float(pts_seconds[-1])))]
    scene_of = shot_of(scenes, pts_seconds)
    free = np.ones(len(scores), bool)
    found: list[SearchHit] = []
    while len(found) < k and free.any():
        peak = int(np.where(free, scores, -np.inf).argmax())
        scene = scenes[scene_of[peak]]
        first, last = np.searchsorted(scene_of, (scene_of[peak], scene_of[peak] + 1)).tolist()
        low, high = first, last
        if scene.duration_seconds > WHOLE_SECONDS:
            low, high = _part(scores, pts_seconds, free, peak, first, last)
        if (low, high) != (first, last):
            beside = pts_seconds[low] - APART_SECONDS, pts_seconds[high - 1] + APART_SECONDS
            near = slice(*np.clip(np.searchsorted(pts_seconds, beside), first, last).tolist())
            free[near] = False
        free[low:high] = False
        # The first frame may have begun before the analysed part of the video.
        start = min(scene.start_seconds, float(pts_seconds[low])) if low == first else float(pts_seconds[low])
        stop = max(scene.stop_seconds, float(pts_seconds[last - 1])) if high == last else float(pts_seconds[high])
        found.append(SearchHit(video, start, stop, float(pts_seconds[peak]), float(scores[peak])))
    return found


def _part(scores: F32, pts_seconds: F64, free: NDArray[np.bool_], peak: int, first: int, last: int) -> tuple[int, int]:
    """[low, high): the rows around a peak that answer, of the scene [first, last)."""
    typical, best = float(np.median(scores)), float(scores[peak])
    floor = min(typical + HOLDS * (best - typical), best - NEAR * abs(best))
    first, last = _run(free, peak, first, last)
    near = np.abs(pts_seconds[first:last] - pts_seconds[peak]) <= AROUND_SECONDS
    step = (pts_seconds[last - 1] - pts_seconds[first]) / max(last - first - 1, 1)
    half = round(AROUND_SECONDS / step) if step else 0
    padded = np.pad(scores[first:last].astype(np.float64), half, mode="edge")
    means = np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")
    holds = np.zeros(len(scores), bool)
    holds[first:last] = near | (means >= floor - _ROUNDING)
    return _run(holds, peak, first, last)


def _run(holds: NDArray[np.bool_], peak: int, first: int, last: int) -> tuple[int, int]:
    """[low, high): the run of true rows around a peak, within [first, last)."""
    fails = np.flatnonzero(~holds[first:last]) + first
    place = int(np.searchsorted(fails, peak))
    return int(fails[place - 1]) + 1 if place else first, int(fails[place]) if place < len(fails) else last


def best_hits(hits: Sequence[SearchHit], k: int) -> list[SearchHit]:
    """The k best hits of several videos; equal scores in order of name and time."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.video, hit.start_seconds))[:k]
