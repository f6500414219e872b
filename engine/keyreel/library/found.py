"""From scores to moments and videos: the ranking, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np

from keyreel.library.scores import Scores
from keyreel.library.types import Example, Filter, LibraryHit, Record, VideoHit
from keyreel.search import moments
from keyreel.shots import shot_of
from keyreel.types import F32, F64, SearchHit, Shot
from keyreel_kernels.arrays import Arrays

# Two vectors of 512 numbers that are the same have a cosine this close to 1 in float32.
_ROUNDING = 1e-6


class Moment(NamedTuple):
    """A moment and where its best frame lies."""

    hit: SearchHit
    span: int
    row: int  # in the span's segment


class Found:
    """What one pass over the vectors found. Nothing here is done for every video in Python, only for the best ones."""

    def __init__(self, scores: Scores, where: Filter, fold_similarity: float, arrays: Arrays) -> None:
        self._scores, self._where, self._arrays = scores, where, arrays
        self._snapshot, self._spans = scores.snapshot, scores.spans
        self._alike = fold_similarity - _ROUNDING

    def hits(self, query: int, k: int, own: Example | None) -> list[LibraryHit]:
        """The k best moments, near-duplicates of other videos folded, without the one that `own` lies in."""
        wanted = k + (own is not None)
        while True:
            ranked = self._best(query, wanted)
            kept, folded = self._folded([moment for moment in ranked if not self._holds(moment, own)], k)
            if len(kept) == k or len(ranked) < wanted:
                return [
                    self._hit(query, moment, self._scores.video_score(query, moment.span), count)
                    for moment, count in zip(kept, folded, strict=True)
                ]
            wanted *= 4

    def videos(self, query: int, k: int, moments: int, own: Example | None) -> list[VideoHit]:
        """The k best videos, without that of `own`."""
        pooled = self._scores.pooled[query]
        if own is not None and (left_out := self._snapshot.names.get(own.video)) is not None:
            pooled = np.where(self._spans.video == left_out, -np.inf, pooled)
        likely = _largest(pooled, min(k, int(np.isfinite(pooled).sum())), self._scores.pooled_slack)
        scored = [(-self._scores.video_score(query, span), int(self._spans.video[span]), span) for span in likely]
        found = []
        for negative, number, span in sorted(scored)[:k]:
            record = self._snapshot.records[number]
            best = [self._hit(query, moment, -negative, 0) for moment in self._moments(query, span, moments)]
            found.append(VideoHit(record.path, record.id, -negative, tuple(best)))
        return found

    # --- the ranking ----------------------------------------------------------------------------------------------

    def _best(self, query: int, k: int) -> list[Moment]:
        """The k best moments of all videos, in the order of score, path and time.

        The best frame of a video's first moment is the video's best frame, and no moment of it has a better one. Let
        the videos be in the order of (best frame, path). The first moments of the first k of them are k moments, and
        each moment of any other video comes after all of these: its score is no higher than its video's best frame,
        and where that is the same its path comes later. So the k best moments are moments of the first k videos.
        Their scores are at least the k-th video's best frame, so that a video needs no more moments than it has frames
        like that.
        """
        best = self._scores.best[query]
        spans = _largest(best, k, self._scores.slack)
        floor = -np.inf
        if len(best) >= k:
            exact = [(-float(self._scores.of(query, span).max()), int(self._spans.video[span]), span) for span in spans]
            first = sorted(exact)[:k]
            floor, spans = -first[-1][0], [span for _, _, span in first]
        found = []
        for span in spans:
            count = int((self._scores.of(query, span) >= floor).sum())
            found += self._moments(query, span, min(k, count))
        found.sort(key=lambda moment: (-moment.hit.score, moment.hit.video, moment.hit.start_seconds))
        return found[:k]

    def _moments(self, query: int, span: int, k: int) -> list[Moment]:
        record, (low, pts) = self._record(span), self._times(span)
        shots = tuple(Shot(*edges) for edges in record.shots)
        ends = [*(shot.stop_seconds for shot in shots[-1:]), record.duration_seconds, float(pts[-1])]
        stop = next(end for end in ends if end is not None)
        hits = moments(self._scores.of(query, span), pts, shots, video=record.path, stop_seconds=stop, k=k)
        rows = low + np.searchsorted(pts, [hit.pts_seconds for hit in hits])
        return [Moment(self._clipped(hit), span, row) for hit, row in zip(hits, rows.tolist(), strict=True)]

    def _clipped(self, hit: SearchHit) -> SearchHit:
        """A shot may reach beyond the times that were asked for."""
        start, stop = self._where.start_seconds, self._where.stop_seconds
        if start is None and stop is None:
            return hit
        low = hit.start_seconds if start is None else max(hit.start_seconds, start)
        return replace(
            hit, start_seconds=low, stop_seconds=hit.stop_seconds if stop is None else min(hit.stop_seconds, stop)
        )

    def _folded(self, ranked: Sequence[Moment], k: int) -> tuple[list[Moment], list[int]]:
        """Keeps k moments, best first; each of the others stands behind the first that it is a near-duplicate of."""
        kept: list[Moment] = []
        counts: list[int] = []
        videos: list[int] = []
        vectors: list[F32] = []
        for moment in ranked:
            if len(kept) == k:
                break
            vector, video = self._vector(moment), int(self._spans.video[moment.span])
            if kept:
                alike = (np.stack(vectors) @ vector >= self._alike) & (np.array(videos) != video)
                if alike.any():
                    counts[int(alike.argmax())] += 1
                    continue
            kept.append(moment)
            counts.append(0)
            videos.append(video)
            vectors.append(vector)
        return kept, counts

    def _holds(self, moment: Moment, own: Example | None) -> bool:
        if own is None or self._snapshot.names.get(own.video) != int(self._spans.video[moment.span]):
            return False
        # The frame that the example is: shown from its time on, so that a time between two frames is the first's.
        _, pts = self._times(moment.span)
        shown = float(pts[max(int(np.searchsorted(pts, own.seconds, side="right")) - 1, 0)])
        return moment.hit.start_seconds <= shown < moment.hit.stop_seconds or moment.hit.pts_seconds == shown

    # --- rows -----------------------------------------------------------------------------------------------------

    def _record(self, span: int) -> Record:
        return self._snapshot.records[int(self._spans.video[span])]

    def _times(self, span: int) -> tuple[int, F64]:
        """The first row of a span and the times of its frames."""
        low, high = int(self._spans.low[span]), int(self._spans.high[span])
        return low, self._snapshot.segments[int(self._spans.segment[span])].pts_seconds[low:high]

    def _vector(self, moment: Moment) -> F32:
        rows = self._snapshot.segments[int(self._spans.segment[moment.span])].vectors
        vector: F32 = self._arrays.to_host(rows[moment.row : moment.row + 1])[0]
        return vector

    def _hit(self, query: int, moment: Moment, video_score: float, folded: int) -> LibraryHit:
        known = {field.name: getattr(moment.hit, field.name) for field in fields(SearchHit)}
        keyframe = self._keyframe(moment)
        return LibraryHit(
            **known,
            video_id=self._record(moment.span).id,
            keyframe_seconds=keyframe,
            video_score=video_score,
            folded=folded,
        )

    def _keyframe(self, moment: Moment) -> float:
        """The nearest key-frame in the moment's shot, else the nearest one; the best frame where there is none."""
        at, record = moment.hit.pts_seconds, self._record(moment.span)
        whole = self._snapshot.spans
        (own,) = np.flatnonzero(whole.video == self._spans.video[moment.span])
        rows = slice(int(whole.low[own]), int(whole.high[own]))
        segment = self._snapshot.segments[int(whole.segment[own])]
        times = segment.pts_seconds[rows][segment.keyframe[rows]]
        if not len(times):
            return at
        shots = tuple(Shot(*edges) for edges in record.shots)
        if shots:
            here = shot_of(shots, times) == shot_of(shots, np.array([at]))
            times = times[here] if here.any() else times
        return float(times[np.abs(times - at).argmin()])


def _largest(values: F32 | F64, k: int, slack: float) -> Sequence[int]:
    """Where the k largest are, and all that may be among them when each is off by `slack`; in no order."""
    if k >= len(values):
        return list(range(len(values)))
    if k < 1:
        return []
    chosen: list[int] = np.flatnonzero(values >= np.partition(values, -k)[-k] - 2 * slack).tolist()
    return chosen
