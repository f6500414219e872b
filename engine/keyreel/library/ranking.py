"""Ranks moments and videos by their vectors, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np

from keyreel.library.merge import Candidate, Ranked, RankedVideo, keep
from keyreel.library.types import Filter, LibraryHit, Record
from keyreel.library.vectors import Matrix, Snapshot, Spans
from keyreel.search import Asked, FrameScores, added, moments
from keyreel.shots import shot_of
from keyreel.types import F32, F64, I64, AnsweredBy, Example, Region, SearchHit, Shot
from keyreel_kernels.arrays import Arrays
from keyreel_kernels.cores import usable_cores

TEMPERATURE = 0.1  # of the softmax over the frames of a scene, see `pooled`
# Rows to score together: on a CPU few, to stay in its cache; on a GPU many.
BLOCK_ROWS, DEVICE_ROWS = 8192, 65_536
GAP_ROWS = 2048  # score smaller gaps of unwanted rows too: another block costs more
# Rows and queries of one product on the CPU: small enough that BLAS starts no threads. With 16 queries,
# whole blocks took 3 to 5 times the processor time.
TILE_ROWS, TILE_QUERIES = 64, 16
THREADED_PARTS = 4  # from this many blocks on threads pay off


class Moment(NamedTuple):
    """A moment, and the place of its best frame."""

    hit: SearchHit
    span: int
    row: int  # of the matrix


def pooled(scores: F32, runs: I64, videos: I64) -> F64:
    """Scores videos by their best scene.

    The score of a scene is sum(softmax(s / TEMPERATURE) s) over the scores s of its frames (CLIP-Hitchhiker, Bain et
    al. 2022, equation 3). Over all frames of a video, a low temperature ranks clips worse, and a high one misses short
    events in long videos (`benchmarks.answers`).

    Args:
        scores: [Q, n] float32.
        runs: [M] int64, rising from 0: starts of scenes, and of gaps between videos.
        videos: [2 V - 1] int64: first run and end of each video, without the last end.

    Returns:
        [Q, V] float64.
    """
    exact = scores.astype(np.float64)
    peak = np.maximum.reduceat(exact, runs, axis=1)
    share = np.exp((exact - np.repeat(peak, np.diff(runs, append=scores.shape[1]), axis=1)) / TEMPERATURE)
    each = np.add.reduceat(share * exact, runs, axis=1) / np.add.reduceat(share, runs, axis=1)
    # reduceat includes the gaps between videos; [::2] drops them.
    return np.asarray(np.maximum.reduceat(each, videos, axis=1)[:, ::2])


class Ranking:
    """Scores queries against all frames of some videos, and ranks moments and videos.

    The score of a frame is max(<q, scene>, slope <q, subject> + offset), or <q, scene> if it has no subject.

    For a query with conditions it is the weighted sum over its vectors, see `search.Asked`.

    `_best` [Q, V] float32 and `_pooled` [Q, V] float64 equal `_scores` and `_video_score` within `_slack` and
    `_pooled_slack`, since a product of several queries sums in another order than one. The shown values are computed
    again for each query alone, so that they do not depend on other queries.

    Args:
        spans: the rows to search; none is empty.
        queries: Q of them; the `novelty` of their scales is not used.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        spans: Spans,
        queries: Sequence[Asked],
        where: Filter,
        fold_similarity: float,
        arrays: Arrays,
        *,
        with_pooled: bool = False,
    ) -> None:
        assert snapshot.matrix is not None
        self._snapshot, self._spans, self._queries, self._where = snapshot, spans, queries, where
        self._matrix: Matrix = snapshot.matrix
        self._similarity, self._arrays, self._with_pooled = fold_similarity, arrays, with_pooled
        self._on_host = arrays.xp is np
        self._known: dict[tuple[int, int], FrameScores] = {}  # by query and span
        self._vectors = np.concatenate([query.vectors for query in queries])
        scales = [scale for query in queries for scale in query.scales]
        slope, offset = np.array([(scale.slope, scale.offset) for scale in scales], np.float64).reshape(-1, 2).T
        self._slope, self._offset = slope.astype(np.float32), offset.astype(np.float32)
        self._place = np.cumsum([0, *(len(query.vectors) for query in queries)])  # of the first vector of each
        mix = np.zeros((len(queries), len(scales)), np.float32)
        for row, (query, first) in enumerate(zip(queries, self._place.tolist(), strict=False)):
            mix[row, first : first + len(query.weights)] = query.weights
        self._mix: F32 | None = mix if len(queries) < len(scales) else None
        # |fl(<q, x>) - <q, x>| <= D u |q| |x| for any order of the sum (Higham 2002, section 3.1), u = 2^-24. That of a
        # subject is multiplied by the slope and rounded twice more. A maximum moves no further than its arguments. The
        # sum over the vectors of a query adds as many roundings.
        most = np.maximum(1, slope + np.abs(offset))
        width, weight = self._vectors.shape[1], np.abs(mix).astype(np.float64)
        slack = width * np.maximum(1, slope) + 2 * slope + np.abs(offset)
        self._slack = 2.1 * (weight @ (slack + (0 if self._mix is None else len(scales)) * most)) * 2.0**-24
        # The derivatives of a pooled score add up to no more than 1 + |s - pooled| / temperature.
        self._pooled_slack = self._slack * (1 + 2 * (weight @ most) / TEMPERATURE)
        parts = self._parts()
        if self._on_host and len(parts) >= THREADED_PARTS:
            with ThreadPoolExecutor(min(usable_cores(), len(parts) // 2)) as pool:
                found = list(pool.map(self._part, parts))
        else:
            found = [self._part(part) for part in parts]
        empty = (np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0)))
        self._best: F32 = np.concatenate([best for best, _ in found or [empty]], axis=1)
        self._pooled: F64 = np.concatenate([pool for _, pool in found or [empty]], axis=1)

    def best(self, query: int, k: int, own: Example | None) -> Ranked:
        """The best moments, without that of the example `own`: as many as are needed to show k."""
        wanted = k + (own is not None)
        while True:
            ranked = self._ranked(query, wanted)
            free = [moment for moment in ranked if not self._holds(moment, own)]
            named = ((self._record(moment.span).id, self._vector(moment.row)) for moment in free)
            kept = keep(named, k, self._where.per_video, self._similarity)
            if len(kept) == k or len(ranked) < wanted:
                used = kept[-1].place + 1 if len(kept) == k else len(free)
                return Ranked([self._candidate(query, moment) for moment in free[:used]], whole=len(kept) < k)
            wanted *= 4

    def best_videos(self, query: int, k: int, moments: int, own: Example | None) -> list[RankedVideo]:
        """The k best videos, without that of the example `own`, each with its best moments."""
        scores = self._pooled[query]
        if own is not None and (left_out := self._snapshot.names.get(own.video)) is not None:
            scores = np.where(self._spans.video == left_out, -np.inf, scores)
        likely = _largest(scores, min(k, int(np.isfinite(scores).sum())), float(self._pooled_slack[query]))
        scored = [(-self._video_score(query, span), int(self._spans.video[span]), span) for span in likely]
        found = []
        for negative, number, span in sorted(scored)[:k]:
            record = self._snapshot.records[number]
            best = [self._candidate(query, moment) for moment in self._moments(query, span, moments)]
            found.append(RankedVideo(record.path, record.id, -negative, best))
        return found

    def curve(self, query: int, span: int) -> tuple[F64, F32]:
        """Times and scores of the frames of a span."""
        rows = slice(int(self._spans.low[span]), int(self._spans.high[span]))
        return self._matrix.pts_seconds[rows].copy(), self._scores(query, span).best

    # --- scores ---------------------------------------------------------------------------------------------------

    def _scores(self, query: int, span: int) -> FrameScores:
        """Scores of the frames of a span."""
        if (query, span) not in self._known:
            weights = self._queries[query].weights
            first = int(self._place[query])
            each = [self._scores_of(vector, span) for vector in range(first, first + len(weights))]
            self._known[query, span] = added(each, weights)
        return self._known[query, span]

    def _scores_of(self, vector: int, span: int) -> FrameScores:
        spans = self._spans
        low, high, first, last = (int(edge[span]) for edge in (spans.low, spans.high, spans.first, spans.last))
        one, rows = self._vectors[vector : vector + 1], self._matrix.vectors
        scenes: F32 = self._product(rows[low:high], one)[0]
        if first == last:
            return FrameScores(scenes, np.zeros(len(scenes), np.bool_))
        frames = np.arange(first, last) - self._matrix.back[first:last] - low
        others = self._slope[vector] * self._product(rows[first:last], one)[0] + self._offset[vector]
        best, better = scenes.copy(), np.zeros(len(scenes), np.bool_)
        best[frames] = np.maximum(scenes[frames], others)
        better[frames] = others > scenes[frames]
        return FrameScores(best, better)

    def _video_score(self, query: int, span: int) -> float:
        low, high = int(self._spans.low[span]), int(self._spans.high[span])
        runs = np.union1d(0, np.flatnonzero(self._matrix.begins[low:high]))
        return float(pooled(self._scores(query, span).best[None], runs, np.zeros(1, np.int64))[0, 0])

    def _parts(self) -> list[tuple[int, int]]:
        """Groups [first, last) of spans that lie close together, about a block of rows each."""
        spans = self._spans
        if not len(spans):
            return []
        block = BLOCK_ROWS if self._on_host else DEVICE_ROWS
        new = (spans.low[1:] - spans.last[:-1] > GAP_ROWS) | (np.diff(spans.low // block) != 0)
        return list(itertools.pairwise([0, *(np.flatnonzero(new) + 1).tolist(), len(spans)]))

    def _part(self, part: tuple[int, int]) -> tuple[F32, F64]:
        own = self._spans[slice(*part)]
        start, stop = int(own.low[0]), int(own.last[-1])
        scores = self._product(self._matrix.vectors[start:stop], self._vectors)
        back = self._matrix.back[start:stop]
        rows = np.flatnonzero(back)
        frames = rows - back[rows]
        rows, frames = rows[frames >= 0], frames[frames >= 0]  # other subjects have their scene before the wanted times
        if len(rows):
            others = self._slope[:, None] * scores[:, rows] + self._offset[:, None]
            scores[:, frames] = np.maximum(scores[:, frames], others)
        scores = scores[:, : int(own.high[-1]) - start]
        if self._mix is not None:
            scores = self._mix @ scores
        edges = np.stack([own.low, own.high], axis=1).ravel()[:-1] - start
        best = np.maximum.reduceat(scores, edges, axis=1)[:, ::2]
        if not self._with_pooled:
            return best, np.empty((len(scores), 0))
        begins = self._matrix.begins[start : int(own.high[-1])].copy()
        begins[edges] = True
        runs = np.flatnonzero(begins)
        return best, pooled(scores, runs, np.searchsorted(runs, edges))

    def _product(self, rows: F32, queries: F32) -> F32:
        """[Q, n] float32 on the host."""
        if not self._on_host:
            return np.asarray(self._arrays.to_host(self._arrays.to_device(queries) @ rows.T), np.float32)
        if len(queries) == 1:  # at the speed of memory
            return np.asarray(np.vecdot(rows, queries[0])[None], np.float32)
        scores = np.empty((len(rows), len(queries)), np.float32)
        for start in range(0, len(queries), TILE_QUERIES):
            some = np.ascontiguousarray(queries[start : start + TILE_QUERIES].T)
            for low in range(0, len(rows), TILE_ROWS):
                tile = rows[low : low + TILE_ROWS]
                np.matmul(tile, some, out=scores[low : low + TILE_ROWS, start : start + TILE_QUERIES])
        return np.ascontiguousarray(scores.T)

    # --- moments --------------------------------------------------------------------------------------------------

    def _ranked(self, query: int, k: int) -> list[Moment]:
        """The k best moments of all videos, in order of score, path and time.

        A video's first moment contains the video's best frame. Sort the videos by (best frame, path). The first moments
        of the first k videos are k moments. Every moment of another video ranks after them: its score is at most its
        video's best frame, and with an equal score its path comes later. So the k best moments are in the first k
        videos, and score at least the best frame of the k-th. So no video needs more moments than it has frames with
        such a score.
        """
        likely = _largest(self._best[query], k, float(self._slack[query]))
        exact = sorted(
            (-float(self._scores(query, span).best.max()), int(self._spans.video[span]), span) for span in likely
        )
        floor = -exact[k - 1][0] if len(exact) >= k else -np.inf
        found = []
        for _, _, span in exact[:k]:
            count = int((self._scores(query, span).best >= floor).sum())
            found += self._moments(query, span, min(k, count))
        found.sort(key=lambda moment: (-moment.hit.score, moment.hit.video, moment.hit.start_seconds))
        return found[:k]

    def _moments(self, query: int, span: int, k: int) -> list[Moment]:
        record, low = self._record(span), int(self._spans.low[span])
        pts = self._matrix.pts_seconds[low : int(self._spans.high[span])]
        scenes = tuple(Shot(*edges) for edges in record.scenes or record.shots)
        ends = [*(scene.stop_seconds for scene in scenes[-1:]), record.duration_seconds, float(pts[-1])]
        stop = next(end for end in ends if end is not None)
        scores = self._scores(query, span)
        hits = moments(scores.best, pts, scenes, video=record.path, stop_seconds=stop, k=k)
        rows = np.searchsorted(pts, [hit.pts_seconds for hit in hits])
        answered: list[AnsweredBy] = ["subject" if scores.by_subject[row] else "scene" for row in rows]
        return [
            Moment(replace(self._clipped(hit), answered_by=by, region=self._region(low + row)), span, low + row)
            for hit, row, by in zip(hits, rows.tolist(), answered, strict=True)
        ]

    def _region(self, row: int) -> Region | None:
        x, y, width, height = self._matrix.region[row].astype(float).tolist()
        return None if np.isnan(x) else (x, y, width, height)

    def _clipped(self, hit: SearchHit) -> SearchHit:
        """The hit, cut to the times of the filter: a scene may reach beyond."""
        start, stop = self._where.start_seconds, self._where.stop_seconds
        low = hit.start_seconds if start is None else max(hit.start_seconds, start)
        high = hit.stop_seconds if stop is None else min(hit.stop_seconds, stop)
        return replace(hit, start_seconds=low, stop_seconds=high)

    def _holds(self, moment: Moment, own: Example | None) -> bool:
        """Whether a moment contains the example's frame, the one shown at its time."""
        if own is None or self._snapshot.names.get(own.video) != int(self._spans.video[moment.span]):
            return False
        low, high = int(self._spans.low[moment.span]), int(self._spans.high[moment.span])
        pts = self._matrix.pts_seconds[low:high]
        shown = float(pts[max(int(np.searchsorted(pts, own.seconds, side="right")) - 1, 0)])
        return moment.hit.start_seconds <= shown < moment.hit.stop_seconds or moment.hit.pts_seconds == shown

    def _record(self, span: int) -> Record:
        return self._snapshot.records[int(self._spans.video[span])]

    def _candidate(self, query: int, moment: Moment) -> Candidate:
        hit = LibraryHit(
            **{field.name: getattr(moment.hit, field.name) for field in fields(SearchHit)},
            video_id=self._record(moment.span).id,
            keyframe_seconds=self._keyframe(moment),
            video_score=self._video_score(query, moment.span),
        )
        first, last = int(self._spans.first[moment.span]), int(self._spans.last[moment.span])
        frames = np.arange(first, last) - self._matrix.back[first:last]
        subjects = [self._vector(first + row) for row in np.flatnonzero(frames == moment.row).tolist()]
        return Candidate(hit, self._vector(moment.row), subjects[0] if subjects else None)

    def _vector(self, row: int) -> F32:
        vector: F32 = self._arrays.to_host(self._matrix.vectors[row : row + 1])[0]
        return vector

    def _keyframe(self, moment: Moment) -> float:
        """The nearest key-frame in the moment's shot, else the nearest of all; without key-frames the best frame."""
        at, record = moment.hit.pts_seconds, self._record(moment.span)
        whole = self._snapshot.spans  # also outside the times of the filter
        (own,) = np.flatnonzero(whole.video == self._spans.video[moment.span])
        rows = slice(int(whole.low[own]), int(whole.high[own]))
        times = self._matrix.pts_seconds[rows][self._matrix.keyframe[rows]]
        if not len(times):
            return at
        shots = tuple(Shot(*edges) for edges in record.shots)
        if shots:
            here = shot_of(shots, times) == shot_of(shots, np.array([at]))
            times = times[here] if here.any() else times
        return float(times[np.abs(times - at).argmin()])


def _largest(values: F32 | F64, k: int, slack: float) -> Sequence[int]:
    """Indices, unordered, of the k largest values and of all that may be among them with errors up to `slack`."""
    if k >= len(values):
        return range(len(values))
    if k < 1:
        return []
    chosen: list[int] = np.flatnonzero(values >= np.partition(values, -k)[-k] - 2 * slack).tolist()
    return chosen
