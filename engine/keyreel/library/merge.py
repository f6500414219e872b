"""Merges the best moments and videos of the shards to those of the whole library, exactly.

Each shard gives the moments that it needs to show k of its own, in order, with the vectors of their best frames.
Merged, these are the first moments that one search over all videos would rank, up to the last one that every shard is
known to have given. Near-duplicates are folded and `Filter.per_video` is counted here, over all shards. If too few
moments remain, the shards give more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from keyreel.library.types import Filter, LibraryHit, VideoHit
from keyreel.search import Asked
from keyreel.types import F32, F64, Example

T = TypeVar("T")
_ROUNDING = 1e-6  # rounding of float32: equal vectors of 512 numbers have a cosine this close to 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A moment of one shard."""

    hit: LibraryHit  # still without chance and number of hidden moments
    scene: F32  # [D] float32, of its best frame
    subject: F32 | None  # [D] float32

    @property
    def order(self) -> tuple[float, str, float]:
        """Key to sort by: score, path, time."""
        return -self.hit.score, self.hit.video, self.hit.start_seconds


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best moments of one shard for one query, best first."""

    moments: Sequence[Candidate]
    whole: bool  # whether the shard has no others


@dataclass(frozen=True, slots=True)
class RankedVideo:
    """A video of one shard."""

    video: str  # path
    video_id: str
    score: float
    moments: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer of one shard."""

    queries: Sequence[Ranked]
    videos: Sequence[RankedVideo]
    pictures: int  # how many different pictures were searched
    left_out: Sequence[str]  # paths of videos with damaged rows


class Shard(Protocol):
    """The interface to one shard, see `search.SearchIndex`."""

    def moments(self, queries: Sequence[Asked], k: int, where: Filter, own: Sequence[Example | None]) -> Answered: ...
    def top_videos(self, query: Asked, k: int, moments: int, where: Filter, own: Example | None) -> Answered: ...
    def vector(self, example: Example) -> F32: ...
    def scores(self, query: Asked, video: str) -> tuple[F64, F32]: ...
    def build(self) -> None: ...


@dataclass(slots=True)
class Kept:
    """A moment to show, and how many it hides, see `LibraryHit`."""

    place: int  # its number in the input
    folded: int = 0
    more: int = 0


def keep(ranked: Iterable[tuple[str, F32]], k: int, per_video: int | None, similarity: float) -> list[Kept]:
    """Takes the first k moments, without near-duplicates in other videos, at most `per_video` of each video.

    Args:
        ranked: video and vector [D] of each moment, best first.
        similarity: near-duplicates have at least this cosine.
    """
    kept: list[Kept] = []
    last: dict[str, Kept] = {}  # of each video
    shown = Counter[str]()
    videos: list[str] = []
    vectors: list[F32] = []
    for place, (video, vector) in enumerate(ranked):
        if shown[video] == per_video:
            last[video].more += 1
            continue
        if kept:
            alike = (np.stack(vectors) @ vector >= similarity - _ROUNDING) & (np.array(videos) != video)
            if alike.any():
                kept[int(alike.argmax())].folded += 1
                continue
        last[video] = Kept(place)
        kept.append(last[video])
        if len(kept) == k:
            break
        shown[video] += 1
        videos.append(video)
        vectors.append(vector)
    return kept


class Search:
    """Searches all shards of a library. Safe to share between threads.

    Args:
        shards: of the library, in their order.
        number_of: the shard of a video, by its id.
        similarity: `LibraryConfig.fold_similarity`.
    """

    def __init__(self, shards: Sequence[Shard], number_of: Callable[[str], int], similarity: float) -> None:
        self.shards, self._number_of, self._similarity = shards, number_of, similarity
        self.left_out: tuple[str, ...] = ()  # paths of videos that the last search skipped

    def hits(
        self, queries: Sequence[Asked], k: int, where: Filter | None = None, own: Sequence[Example | None] = ()
    ) -> list[list[LibraryHit]]:
        """Finds the k best moments for each query, best first; ties in order of path and time.

        It hides near-duplicates of a better moment of another video: the cosine of their best frames is at least
        `similarity`. `folded` of the better one counts those that would rank before the last hit.

        Args:
            queries: Q of them.
            k: at least 1; there may be fewer moments.
            own: for each query the example that it is the vector of, or None. The moment that contains the example is
                not a hit.
        """
        where, own = where or Filter(), own or [None] * len(queries)
        found: list[list[LibraryHit]] = [[] for _ in queries]
        waiting, most, left_out = list(range(len(queries))), k, set[str]()
        while waiting:
            some, theirs = [queries[n] for n in waiting], [own[n] for n in waiting]
            asked = [replace(query, chances=None) for query in some]

            def moments(where: Filter, shard: Shard) -> Answered:
                return shard.moments(asked, most, where, theirs)  # noqa: B023 - called in this round

            answers = self.ask(moments, where)
            pictures = sum(answer.pictures for answer in answers)
            left_out.update(path for answer in answers for path in answer.left_out)
            short = []
            for place, n in enumerate(waiting):
                ranked, whole = _merged([answer.queries[place] for answer in answers])
                kept = keep(((m.hit.video_id, m.scene) for m in ranked), k, where.per_video, self._similarity)
                found[n] = [
                    replace(_shown(queries[n], ranked[one.place], pictures), folded=one.folded, more=one.more)
                    for one in kept
                ]
                if len(kept) < k and not whole:
                    short.append(n)
            waiting, most = short, 4 * most
        self.left_out = tuple(sorted(left_out))
        return found

    def videos(
        self, query: Asked, k: int, moments: int = 3, where: Filter | None = None, own: Example | None = None
    ) -> list[VideoHit]:
        """Finds the k best videos, best first, each with its best moments; ties in order of path.

        Args:
            moments: the most moments of a video.
            query, k, where, own: as for `hits`; the video of an example is not a hit.
        """
        asked = replace(query, chances=None)
        answers = self.ask(lambda where, shard: shard.top_videos(asked, k, moments, where, own), where or Filter())
        pictures = sum(answer.pictures for answer in answers)
        self.left_out = tuple(sorted({path for answer in answers for path in answer.left_out}))
        best = sorted(
            (video for answer in answers for video in answer.videos),
            key=lambda video: (-video.score, video.video, video.video_id),
        )
        return [
            VideoHit(one.video, one.video_id, one.score, tuple(_shown(query, m, pictures) for m in one.moments))
            for one in best[:k]
        ]

    def vector(self, example: Example) -> F32:
        """See `SearchIndex.vector`."""
        return self.ask_one(self._number_of(example.video), lambda shard: shard.vector(example))

    def scores(self, query: Asked, video: str) -> tuple[F64, F32]:
        """See `SearchIndex.scores`."""
        asked = replace(query, chances=None)
        return self.ask_one(self._number_of(video), lambda shard: shard.scores(asked, video))

    def build(self) -> None:
        """See `SearchIndex.build`."""
        for number in range(len(self.shards)):
            self.ask_one(number, lambda shard: shard.build())

    def ask(self, call: Callable[[Filter, Shard], Answered], where: Filter) -> list[Answered]:
        """Calls the shards that the filter allows, one after the other, and returns their answers."""
        return [call(own, self.shards[number]) for number, own in self.parts_of(where)]

    def ask_one(self, number: int, call: Callable[[Shard], T]) -> T:
        """Calls one shard."""
        return call(self.shards[number])

    def parts_of(self, where: Filter) -> list[tuple[int, Filter]]:
        """The shards that a filter allows, with the filter for each: only ids of its own videos."""
        if len(self.shards) == 1 or not where.videos:
            return [(number, where) for number in range(len(self.shards))]
        own: dict[int, list[str]] = {}
        for id in where.videos:
            own.setdefault(self._number_of(id), []).append(id)
        return [(number, replace(where, videos=tuple(ids))) for number, ids in sorted(own.items())]


def _merged(shards: Sequence[Ranked]) -> tuple[list[Candidate], bool]:
    """Merges the moments of all shards, up to where one shard's list ends; and whether there are no others."""
    ends = [shard.moments[-1].order for shard in shards if not shard.whole]
    every = sorted((moment for shard in shards for moment in shard.moments), key=lambda moment: moment.order)
    return [moment for moment in every if not ends or moment.order <= min(ends)], not ends


def _shown(query: Asked, moment: Candidate, pictures: int) -> LibraryHit:
    """The hit with its chance."""
    return replace(moment.hit, chance=query.chance(moment.scene, moment.subject, pictures))
