"""Search over a library against brute force in float64, on made-up stores and on the real one."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from bounds import FLOAT32
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.config import LibraryConfig
from keyreel.errors import Damaged, LibraryError
from keyreel.library import ranking, vectors
from keyreel.library.merge import Search
from keyreel.library.ranking import TEMPERATURE
from keyreel.library.search import SearchIndex, fits
from keyreel.library.table import Tables
from keyreel.library.types import Filter, LibraryHit, Record, Rows, Subjects
from keyreel.runtime.backend import Backend, resolve
from keyreel.runtime.bundle import SubjectScale
from keyreel.search import Asked, moments
from keyreel.types import Example, Shot
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.ops import ops_on

CONFIG = LibraryConfig()
PLAIN = SubjectScale()


def one(vector: Any, scale: SubjectScale = PLAIN) -> Asked:
    return Asked(vector[None], (scale,), (1.0,))


def each(vectors: Any, scales: Sequence[SubjectScale] = ()) -> list[Asked]:
    return [one(vector, scale) for vector, scale in zip(vectors, scales or [PLAIN] * len(vectors), strict=True)]


def search_of(store: Any, config: LibraryConfig = CONFIG, backend: Backend | None = None) -> Search:
    """A search over tables without shards."""
    return Search([SearchIndex(store, config, backend)], lambda _: 0, config.fold_similarity)


def matrix_of(searcher: Search) -> vectors.Snapshot:
    """The state that it holds in memory."""
    (index,) = searcher.shards
    return index._vectors.snapshot()  # type: ignore[attr-defined]


# --- made-up libraries --------------------------------------------------------------------------------------------


class Memory:
    """What a search needs of the tables, in dictionaries."""

    def __init__(self, width: int = 8) -> None:
        self.width, self.commits, self.uri = width, 0, "memory"
        self.videos: dict[str, Record] = {}
        self.blocks: dict[str, Rows] = {}

    def model(self) -> tuple[str, str, int]:
        return "made up", "0" * 64, self.width

    def version(self) -> int:
        return self.commits

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        chosen = [record for record in self.videos.values() if ids is None or record.id in ids]
        return sorted(chosen, key=lambda record: record.path)

    def damaged(self) -> tuple[str, ...]:
        return ()

    def rows(self, generations: Sequence[str]) -> Iterator[tuple[str, Rows]]:
        for name in generations:
            if name in self.blocks:
                yield name, self.blocks[name]

    def put(self, record: Record, block: Rows | None) -> None:
        old = self.videos.get(record.id)
        self.videos[record.id] = record
        if block is not None:
            self.blocks[record.generation] = block
            if old is not None and old.generation != record.generation:
                self.blocks.pop(old.generation, None)
        self.commits += 1

    def drop(self, id: str) -> None:
        self.blocks.pop(self.videos.pop(id).generation, None)
        self.commits += 1


Video = tuple[Record, Rows]


def video(name: str, vectors: Any, *, generation: str | None = None, step: float = 0.5, **about: Any) -> Video:
    """A video whose frames are `step` apart; every third one is a key-frame, a cut lies before every fifth."""
    vectors = np.asarray(vectors, np.float32)
    count, subjects = len(vectors), about.pop("subjects", None)
    pts = np.arange(count) * step
    edges = [0.0, *(pts[5::5] - 0.1), count * step]
    shots = about.pop("shots", tuple((float(a), float(b)) for a, b in itertools.pairwise(edges)))
    record = Record(
        id=name,
        path=about.pop("path", f"/films/{name}.mp4"),
        size=1,
        mtime_ns=1,
        fingerprint=name,
        generation=generation or f"{name}-1",
        frames=count,
        subjects=None if subjects is None else len(subjects),
        status=about.pop("status", "ok"),
        tags=about.pop("tags", ()),
        date=about.pop("date", None),
        duration_seconds=about.pop("duration", count * step),
        indexed_at=0.0,
        shots=shots,
        scenes=about.pop("scenes", ()),
        model="made up",
        model_sha256="0" * 64,
    )
    assert not about, about
    keyframe = np.arange(count) % 3 == 1
    index, weight = np.arange(count), np.ones(count, np.float32)
    return record, Rows(pts, index, vectors, np.zeros(count, np.int64), keyframe, weight, subjects)


def subjects(draw: np.random.Generator, count: int, make: Callable[[int], Any], share: float = 0.5) -> Subjects:
    """Of about so many of `count` frames, with the vectors that `make` gives, and regions of all."""
    row = np.flatnonzero(draw.random(count) < share)
    return Subjects(row, make(len(row)), draw.random((count, 4)).astype(np.float32))


def stored(videos: Sequence[Video]) -> Memory:
    store = Memory(videos[0][1].vectors.shape[1] if videos else 8)
    for record, block in videos:
        store.put(record, block)
    return store


def quarters(draw: np.random.Generator, count: int) -> Any:
    """[count, 8]: four numbers of 1/2 or -1/2, the others 0. Unit length and exact products, full of ties."""
    rows = np.zeros((count, 8), np.float32)
    for row in rows:
        row[draw.choice(8, 4, replace=False)] = draw.choice([-0.5, 0.5], 4)
    return rows


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def scenes(draw: np.random.Generator, count: int, width: int) -> Any:
    """Frames that stay alike for a while."""
    places = draw.normal(size=(count // 6 + 1, width))
    return unit(np.repeat(places, 6, 0)[:count] + 0.4 * draw.normal(size=(count, width)))


# --- brute force --------------------------------------------------------------------------------------------------


def allowed(record: Record, where: Filter) -> bool:
    if where.videos and not {record.id, record.path} & set(where.videos):
        return False
    if where.path is not None and not fnmatch.fnmatchcase(record.path, where.path):
        return False
    if set(where.tags) - set(record.tags):
        return False
    bounds = [
        (record.duration_seconds, where.min_duration_seconds, where.max_duration_seconds, False),
        (record.date, where.after, where.before, True),
    ]
    for value, low, high, half_open in bounds:
        if low is not None and (value is None or value < low):
            return False
        if high is not None and (value is None or (value >= high if half_open else value > high)):
            return False
    return True


def pooled_by_hand(scores: list[float]) -> float:
    shares = [math.exp((score - max(scores)) / TEMPERATURE) for score in scores]
    return math.fsum(a * b for a, b in zip(shares, scores, strict=True)) / math.fsum(shares)


@dataclasses.dataclass
class Look:
    """The frames of one video that a search may see, and their scores."""

    record: Record
    block: Rows
    rows: list[int]
    scores: list[float]
    by_subject: list[bool]

    @property
    def pooled(self) -> float:
        return max(pooled_by_hand(own) for own in self.by_scene().values())

    def by_scene(self) -> dict[int, list[float]]:
        starts, own = [start for start, _ in self.spans], dict[int, list[float]]()
        for row, score in zip(self.rows, self.scores, strict=True):
            own.setdefault(sum(start <= self.block.pts_seconds[row] for start in starts), []).append(score)
        return own

    @property
    def spans(self) -> tuple[tuple[float, float], ...]:
        return self.record.scenes or self.record.shots

    def hits(self, where: Filter) -> list[LibraryHit]:
        pts = self.block.pts_seconds
        scenes = tuple(Shot(*edges) for edges in self.spans)
        stop = scenes[-1].stop_seconds if scenes else self.record.duration_seconds or float(pts[self.rows[-1]])
        found = moments(
            np.array(self.scores), pts[self.rows], scenes, video=self.record.path, stop_seconds=stop, k=len(self.rows)
        )
        answers = []
        for hit in found:
            low = max(hit.start_seconds, -math.inf if where.start_seconds is None else where.start_seconds)
            high = min(hit.stop_seconds, math.inf if where.stop_seconds is None else where.stop_seconds)
            times = [float(time) for time, is_one in zip(pts, self.block.keyframe, strict=True) if is_one]

            def shot(time: float) -> int:
                return sum(time >= begin for begin, _ in self.record.shots[1:])

            row = pts.tolist().index(hit.pts_seconds)
            own = self.block.subjects
            where_it_is = None if own is None else tuple(own.region[row].astype(np.float16).astype(float).tolist())
            by = "subject" if self.by_subject[self.rows.index(row)] else "scene"
            same = [time for time in times if shot(time) == shot(hit.pts_seconds)]
            near = min(same or times or [hit.pts_seconds], key=lambda time: (abs(time - hit.pts_seconds), time))
            answers.append(
                LibraryHit(
                    video=hit.video,
                    start_seconds=low,
                    stop_seconds=high,
                    pts_seconds=hit.pts_seconds,
                    score=hit.score,
                    answered_by=by,
                    region=where_it_is,
                    video_id=self.record.id,
                    keyframe_seconds=near,
                    video_score=self.pooled,
                )
            )
        return answers


def looks(store: Any, query: Any, where: Filter, scale: SubjectScale) -> list[Look]:
    asked, found = query if isinstance(query, Asked) else one(query, scale), []
    for record in store.records():
        if record.status != "ok" or not record.frames or not allowed(record, where):
            continue
        ((_, block),) = store.rows([record.generation])
        low = -math.inf if where.start_seconds is None else where.start_seconds
        high = math.inf if where.stop_seconds is None else where.stop_seconds
        rows = [n for n, time in enumerate(block.pts_seconds) if low <= time < high]
        if rows:
            best, by = np.zeros(len(block)), np.zeros((0, len(block)))
            for vector, own, weight in zip(asked.vectors.astype(np.float64), asked.scales, asked.weights, strict=True):
                exact = block.vectors.astype(np.float64) @ vector
                other = np.full(len(exact), -np.inf)
                if block.subjects is not None:
                    cosines = block.subjects.vectors.astype(np.float64) @ vector
                    other[block.subjects.row] = own.slope * cosines + own.offset
                best += weight * np.maximum(exact, other)
                by = np.concatenate([by, (other > exact)[None]])
            found.append(Look(record, block, rows, [float(best[n]) for n in rows], [bool(by[0, n]) for n in rows]))
    return found


def brute_hits(
    store: Any,
    query: Any,
    k: int,
    where: Filter,
    fold: float = CONFIG.fold_similarity,
    own: Example | None = None,
    scale: SubjectScale = PLAIN,
) -> list[LibraryHit]:
    everything = [(hit, look) for look in looks(store, query, where, scale) for hit in look.hits(where)]
    everything.sort(key=lambda pair: (-pair[0].score, pair[0].video, pair[0].start_seconds))
    kept: list[tuple[LibraryHit, Any]] = []
    for hit, look in everything:
        if len(kept) == k:
            break
        if own and own.video in (hit.video, hit.video_id) and hit.start_seconds <= own.seconds < hit.stop_seconds:
            continue
        mine = [n for n, (other, _) in enumerate(kept) if other.video == hit.video]
        if where.per_video is not None and len(mine) == where.per_video:
            kept[mine[-1]] = dataclasses.replace(kept[mine[-1]][0], more=kept[mine[-1]][0].more + 1), kept[mine[-1]][1]
            continue
        row = look.block.pts_seconds.tolist().index(hit.pts_seconds)
        vector = look.block.vectors[row].astype(np.float64)
        for n, (other, its) in enumerate(kept):
            if other.video != hit.video and float(vector @ its) >= fold - 1e-7:
                kept[n] = dataclasses.replace(other, folded=other.folded + 1), its
                break
        else:
            kept.append((hit, vector))
    return [hit for hit, _ in kept]


def brute_videos(
    store: Any, query: Any, k: int, many: int, where: Filter, scale: SubjectScale = PLAIN
) -> list[tuple[float, str, list[LibraryHit]]]:
    found = [(look.pooled, look.record.path, look.hits(where)[:many]) for look in looks(store, query, where, scale)]
    return sorted(found, key=lambda one: (-one[0], one[1]))[:k]


def same(found: Sequence[LibraryHit], expected: Sequence[LibraryHit], within: float = 0.0) -> None:
    """All fields; scores to `within`, pooled ones to what float64 gives for float32 scores."""
    for a, b in zip(found, expected, strict=True):
        assert a.score == pytest.approx(b.score, abs=within)
        assert a.video_score == pytest.approx(b.video_score, abs=max(within, 1e-12))
        assert dataclasses.replace(a, score=0, video_score=0) == dataclasses.replace(b, score=0, video_score=0)


@contextmanager
def small_blocks() -> Iterator[None]:
    """The edges of blocks, segments and threads, in libraries of a few rows."""
    with patch.multiple(ranking, BLOCK_ROWS=4, GAP_ROWS=2, THREADED_PARTS=2), patch.multiple(vectors, SPARE_ROWS=4):
        yield


# --- against brute force ------------------------------------------------------------------------------------------


TIMES = st.one_of(st.none(), st.sampled_from([0.0, 0.4, 1.0, 2.25, 3.0]))
WHERE = st.builds(
    Filter,
    videos=st.lists(st.sampled_from(["v00", "v03", "/films/v01.mp4"]), max_size=2),
    path=st.one_of(st.none(), st.sampled_from(["*", "*/v0[0-4].mp4", "/films/*3.mp4", "nothing"])),
    tags=st.lists(st.sampled_from(["a", "b"]), max_size=2, unique=True),
    start_seconds=TIMES,
    stop_seconds=TIMES,
    min_duration_seconds=TIMES,
    max_duration_seconds=TIMES,
    after=TIMES,
    before=TIMES,
    per_video=st.sampled_from([None, None, 1, 2]),
)
NO_FILTER = Filter()


@pytest.mark.full
@settings(max_examples=70, deadline=None)
@given(
    number=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 14), min_size=4, max_size=14),
    k=st.one_of(st.integers(1, 5), st.integers(1, 40)),
    share=st.sampled_from([0.0, 0.5]),
    fold=st.sampled_from([0.5, 0.75, 0.98, 1.0]),
    where=st.one_of(st.just(NO_FILTER), WHERE),
    # Numbers with which products and sums stay exact.
    slope=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    offset=st.sampled_from([-0.5, 0.0, 0.25]),
    conditions=st.booleans(),
)
def test_the_answers_are_those_of_brute_force(
    number: int,
    lengths: list[int],
    k: int,
    share: float,
    fold: float,
    where: Filter,
    slope: float,
    offset: float,
    conditions: bool,
) -> None:
    draw = np.random.default_rng(number)
    shown = quarters(draw, 3)  # few pictures: near-duplicates everywhere; without them, ties of different ones
    videos = []
    for n, count in enumerate(lengths):
        frames = np.where(draw.random((count, 1)) < share, shown[draw.integers(0, 3, count)], quarters(draw, count))
        about: dict[str, Any] = {
            "tags": tuple(draw.choice(["a", "b"], draw.integers(0, 3), replace=False).tolist()),
            "date": draw.choice([None, 0.0, 1.0, 2.0, 3.0]),
            "duration": draw.choice([None, count / 2]),
            "status": draw.choice(["ok", "ok", "ok", "failed"]),
        }
        if draw.random() < 0.2:
            about["shots"] = ()
        if count > 5 and draw.random() < 0.5:
            about["scenes"] = ((0.0, 1.1), (1.1, 2.5), (2.5, count / 2))
        if draw.random() < 0.7:
            about["subjects"] = subjects(draw, count, lambda few: quarters(draw, few), draw.choice([0, 0.3, 1]))
        videos.append(video(f"v{n:02d}", frames, **about))
    store = stored([videos[n] for n in draw.permutation(len(videos))])
    queries = np.concatenate([shown[:2], quarters(draw, 1)])
    config = dataclasses.replace(CONFIG, fold_similarity=fold)
    scales = (PLAIN, SubjectScale(slope, offset), SubjectScale(slope, -offset))
    asked = each(queries, scales)
    if conditions:
        asked[1] = Asked(queries[:2], scales[:2], (0.5, 0.5))
        asked[2] = Asked(queries, scales, (0.5, 0.25, -0.25))
    with small_blocks():
        searcher = search_of(store, config)
        together = searcher.hits(asked, k, where)
        ranked = [searcher.videos(query, k, 3, where) for query in asked]
        for n, query in enumerate(asked):
            same(together[n], brute_hits(store, query, k, where, fold))
            assert searcher.hits([query], k, where) == [together[n]]
            # Pooled scores of different videos may differ by less than float64 can tell.
            expected = brute_videos(store, query, len(videos), 3, where)
            assert [hit.score for hit in ranked[n]] == pytest.approx([one[0] for one in expected[:k]], abs=1e-12)
            by_path = {path: hits for _, path, hits in expected}
            for hit in ranked[n]:
                same(hit.moments, by_path[hit.video])
    for record in store.records():
        assert fits(record, where) == allowed(record, where)


def device_backend(cuda: Cuda) -> Backend:
    return dataclasses.replace(resolve("cpu"), device="cuda:0", ops=ops_on(cuda))


def made_up(seed: int, count: int, width: int) -> list[Video]:
    """Every third is without subjects."""
    draw = np.random.default_rng(seed)
    made = []
    for n in range(count):
        frames = scenes(draw, int(draw.integers(1, 90)), width)
        own = subjects(draw, len(frames), lambda few: unit(draw.normal(size=(few, width))))
        made.append(video(f"v{n:03d}", frames, subjects=None if n % 3 == 2 else own))
    return made


def check_against_brute_force(searcher: Search, store: Any, queries: Any) -> None:
    where = Filter(start_seconds=2.0, stop_seconds=20.0)
    scales = [SubjectScale(1.3, 0.05), PLAIN, SubjectScale(0.7, -0.02), SubjectScale(9.0, -0.5)][: len(queries)]
    for chosen in (NO_FILTER, where):
        found = searcher.hits(each(queries, scales), 12, chosen)
        ranked = [searcher.videos(one(own, scales[n]), 7, 2, chosen) for n, own in enumerate(queries)]
        for n, query in enumerate(queries):
            same(found[n], brute_hits(store, query, 12, chosen, scale=scales[n]), 10 * FLOAT32)
            assert searcher.hits(each(query[None], scales[n : n + 1]), 12, chosen) == [found[n]]
            expected = brute_videos(store, query, 7, 2, chosen, scales[n])
            assert [hit.video for hit in ranked[n]] == [path for _, path, _ in expected]
            for hit, (pooled, _, best) in zip(ranked[n], expected, strict=True):
                assert hit.score == pytest.approx(pooled, abs=FLOAT32)
                same(hit.moments, best, FLOAT32)


@pytest.mark.parametrize("queries", [1, 4])
def test_vectors_without_ties(queries: int) -> None:
    store = stored(made_up(1, 30, 64))
    asked = unit(np.random.default_rng(2).normal(size=(queries, 64)))
    with small_blocks():
        check_against_brute_force(search_of(store), store, asked)
    check_against_brute_force(search_of(store, CONFIG, resolve("cpu")), store, asked)


def test_on_a_device(cuda: Cuda) -> None:
    store = stored(made_up(3, 30, 64))
    asked = unit(np.random.default_rng(4).normal(size=(3, 64)))
    before = cuda.bytes_to_host
    searcher = search_of(store, CONFIG, device_backend(cuda))
    assert searcher.hits(each(asked), 3) == search_of(store, CONFIG, device_backend(cuda)).hits(each(asked), 3)
    rows = sum(len(block) for block in store.blocks.values())
    assert cuda.bytes_to_host - before < rows * 64 * 4  # scores come down, the vectors stay
    check_against_brute_force(searcher, store, asked)
    np.testing.assert_array_equal(searcher.vector(Example("v004", 0.2)), store.blocks["v004-1"].vectors[0])
    # Renewed there too: a segment that is half empty is written anew on the device.
    with patch.multiple(vectors, SPARE_ROWS=64):
        searcher = search_of(store, CONFIG, device_backend(cuda))
        searcher.hits(each(asked), 1)
        for n in range(0, 30, 2):
            store.drop(f"v{n:03d}")
        store.put(*video("new", scenes(np.random.default_rng(5), 70, 64)))
        check_against_brute_force(searcher, store, asked)


# --- what is asked ------------------------------------------------------------------------------------------------


def test_an_example_does_not_find_itself() -> None:
    store = stored(made_up(6, 12, 32))
    searcher = search_of(store)
    for example in (Example("v003", 4.6), Example("v003", 4.5), Example("/films/v003.mp4", 1e6), Example("v003", -1.0)):
        pts = store.blocks["v003-1"].pts_seconds
        shown = max([time for time in pts.tolist() if time <= example.seconds], default=0.0)
        row = pts.tolist().index(shown)
        vector = searcher.vector(example)
        np.testing.assert_array_equal(vector, store.blocks["v003-1"].vectors[row])
        expected = brute_hits(store, vector, 9, NO_FILTER, own=Example("v003", shown))
        (found,) = searcher.hits(each(vector[None]), 9, own=[example])
        same(found, expected, FLOAT32)
        assert searcher.hits(each(vector[None]), 1)[0][0].video == "/films/v003.mp4"
        ranked = searcher.videos(one(vector), 50, 1, own=example)
        assert len(ranked) == 11
        assert "/films/v003.mp4" not in [hit.video for hit in ranked]
    with pytest.raises(LibraryError, match="no video 'v999'"):
        searcher.vector(Example("v999", 0.0))


def test_what_cannot_be_searched_for() -> None:
    store = stored([video("v", quarters(np.random.default_rng(0), 4)), video("bad", np.empty((0, 8)), status="failed")])
    searcher = search_of(store)
    query = quarters(np.random.default_rng(1), 1)
    for wrong, what in (
        (query[0], "8 numbers, got queries"),
        (query * np.nan, "finite"),
        (query * 0, "not zero"),
        (query[:, :5], r"8 numbers, got queries \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=what):
            searcher.hits([Asked(wrong, (PLAIN,), (1.0,))], 1)
    with pytest.raises(ValueError, match="k must be"):
        searcher.hits(each(query), 0)
    with pytest.raises(ValueError, match="k must be"):
        searcher.videos(one(query[0]), 1, 0)
    with pytest.raises(LibraryError, match="no video 'w'"):
        searcher.hits(each(query), 1, Filter(videos=["w"]))
    assert searcher.hits(each(query), 1, Filter(videos=["bad"])) == [[]]  # it is in the library, with nothing to find
    assert searcher.hits(each(np.empty((0, 8))), 1) == []
    with pytest.raises(LibraryError, match="no frames"):
        searcher.vector(Example("bad", 0.0))
    assert search_of(Memory()).hits(each(query), 3) == [[]]
    assert search_of(Memory()).videos(one(query[0]), 3) == []
    # The length of a query says nothing.
    assert searcher.hits(each(query * 1000), 3) == searcher.hits(each(query), 3)


# --- kept up to date ----------------------------------------------------------------------------------------------


@pytest.mark.full
@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 2**32 - 1), steps=st.lists(st.sampled_from(["put", "put", "drop", "fail", "move"])))
def test_a_library_that_changes(number: int, steps: list[str]) -> None:
    draw = np.random.default_rng(number)
    store = Memory()
    query = quarters(draw, 1)
    with small_blocks():
        searcher = search_of(store)
        for n, step in enumerate(["put", *steps]):
            name = f"v{draw.integers(0, 6)}"
            if step == "put":
                store.put(*video(name, quarters(draw, draw.integers(1, 20)), generation=f"{name}-{n}"))
            elif name in store.videos:
                record = store.videos[name]
                if step == "drop":
                    store.drop(name)
                elif step == "fail":
                    store.put(dataclasses.replace(record, status="failed"), None)
                else:
                    store.put(dataclasses.replace(record, path=f"/elsewhere/{n}.mp4"), None)
            for k in (1, 3, 20):
                same(searcher.hits(each(query), k)[0], brute_hits(store, query[0], k, NO_FILTER))
            living = sum(record.frames for record in store.records() if record.status == "ok")
            assert len(matrix_of(searcher).matrix.pts_seconds) <= 4 * living + 40


def test_the_matrix_grows_and_shrinks() -> None:
    draw = np.random.default_rng(8)
    frames = unit(draw.normal(size=(4000, 64)))
    videos = [video(f"v{n:02d}", frames) for n in range(50)]
    store = stored(videos[:1])
    searcher = search_of(store)
    first = before = matrix_of(searcher)
    copies = 0
    for one in videos[1:]:
        store.put(*one)
        snapshot = matrix_of(searcher)
        copies += snapshot.matrix is not before.matrix
        before = snapshot
    assert copies <= 3  # each time with room for many more
    # What is removed gives its room back; what a search still looks at stays as it is.
    for n in range(50):
        if n % 10:
            store.drop(f"v{n:02d}")
    renewed = matrix_of(searcher)
    assert len(renewed.matrix.pts_seconds) <= 2 * 5 * 4000 + vectors.SPARE_ROWS
    for seen in (first, snapshot, renewed):
        low = int(seen.spans.low[-1])
        np.testing.assert_array_equal(seen.matrix.vectors[low : low + 4000], frames)


class Waiting(Memory):
    """Its rows come when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()
        self.go.set()

    def rows(self, generations: Sequence[str]) -> Iterator[tuple[str, Rows]]:
        self.asked.set()
        assert self.go.wait(60)
        yield from super().rows(generations)


def test_searches_go_on_while_another_thread_renews() -> None:
    draw = np.random.default_rng(9)
    store, query = Waiting(), quarters(draw, 1)
    store.put(*video("v0", quarters(draw, 5)))
    searcher = search_of(store)
    before = searcher.hits(each(query), 50)
    store.put(*video("v1", quarters(draw, 5)))
    store.asked.clear()
    store.go.clear()
    late: list[Any] = []
    other = threading.Thread(target=lambda: late.append(searcher.hits(each(query), 50)))
    other.start()
    try:
        assert store.asked.wait(60)
        assert searcher.hits(each(query), 50) == before
    finally:
        store.go.set()
        other.join(60)
    same(late[0][0], brute_hits(store, query[0], 50, NO_FILTER))
    assert searcher.hits(each(query), 50) == late[0]


class Busy(Memory):
    """Somebody replaces a video whenever its records were read, `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        found = super().records(ids)
        if self.times:
            self.times -= 1
            draw = np.random.default_rng(self.times)
            self.put(*video("v0", quarters(draw, 3 + self.times), generation=f"v0-b{self.times}"))
        return found


def test_a_video_that_is_replaced_between_two_looks() -> None:
    draw = np.random.default_rng(10)
    store, query = Busy(0), quarters(draw, 1)
    for n in range(3):
        store.put(*video(f"v{n}", quarters(draw, 4)))
    searcher = search_of(store)
    store.times = 2
    found = searcher.hits(each(query), 50)[0]
    assert store.times == 0
    same(found, brute_hits(store, query[0], 50, NO_FILTER))


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_limit_of_moments_of_one_video(limit: int) -> None:
    draw = np.random.default_rng(12)
    store, query = stored([video(f"v{n}", quarters(draw, 19)) for n in range(3)]), quarters(draw, 1)
    where = Filter(per_video=limit)
    for k in (1, 3, 50):
        found = search_of(store).hits(each(query), k, where)[0]
        same(found, brute_hits(store, query[0], k, where))
        assert max(Counter(hit.video for hit in found).values()) <= limit
    assert sum(hit.more for hit in found) > 0 or limit == 5
    with pytest.raises(ValueError, match="per_video must be >= 1"):
        search_of(store).hits(each(query), 1, Filter(per_video=0))


def test_rows_that_are_missing_or_no_vectors() -> None:
    draw = np.random.default_rng(11)
    store, query = stored([video("v0", quarters(draw, 4)), video("v1", quarters(draw, 4))]), quarters(draw, 1)
    whole = store.blocks.pop("v1-1")
    store.videos["v1"] = dataclasses.replace(store.videos["v1"], digest=3)
    whole = dataclasses.replace(whole, digest=3)
    wrong = dataclasses.replace(whole, vectors=whole.vectors * np.float32(np.nan))
    rest = stored([video("v0", quarters(np.random.default_rng(11), 4))])
    for block in (None, wrong, dataclasses.replace(whole, digest=7)):
        if block is not None:
            store.blocks["v1-1"] = block
        searcher = search_of(store)
        same(searcher.hits(each(query), 50)[0], brute_hits(rest, query[0], 50, NO_FILTER))
        assert searcher.left_out == (store.videos["v1"].path,)
    store.blocks["v1-1"] = whole
    searcher = search_of(store)
    same(searcher.hits(each(query), 50)[0], brute_hits(store, query[0], 50, NO_FILTER))
    assert searcher.left_out == ()
    store.blocks.clear()
    with pytest.raises(Damaged, match=r"no video.*v0\.mp4.*rows"):
        search_of(store).hits(each(query), 5)


# --- the real store -----------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path) -> Callable[[int, int], Tables]:
    def make(videos: int, width: int) -> Tables:
        store = Tables(str(tmp_path / "library"))
        store.create(model="made up", model_sha256="0" * 64, width=width)
        for record, block in made_up(12, videos, width):
            store.put(record, block)
        return store

    return make


def mirrored(store: Tables) -> Memory:
    """What it holds, in memory: brute force looks at each video more often than one likes to read it."""
    records = store.records()
    blocks = dict(store.rows([record.generation for record in records]))
    return stored([(record, blocks[record.generation]) for record in records])


def test_the_real_store(library: Callable[[int, int], Tables]) -> None:
    store = library(12, 32)
    asked = unit(np.random.default_rng(13).normal(size=(2, 32)))
    searcher = search_of(store)
    check_against_brute_force(searcher, mirrored(store), asked)
    store.drop(["v002"])
    store.put(*video("v005", scenes(np.random.default_rng(14), 30, 32), generation="v005-2"))
    check_against_brute_force(searcher, mirrored(store), asked)
    # Beyond memory, without an index: rows are compared one by one.
    check_against_brute_force(search_of(store, dataclasses.replace(CONFIG, exact_rows=0)), mirrored(store), asked)


@pytest.mark.full
def test_an_index_beyond_memory(library: Callable[[int, int], Tables]) -> None:
    store = library(60, 32)
    draw = np.random.default_rng(15)
    asked = unit(draw.normal(size=(8, 32)))
    near, exact = search_of(store, dataclasses.replace(CONFIG, exact_rows=0)), search_of(store)
    indices = store.table("vectors").list_indices
    exact.build()
    assert indices() == []
    near.build()
    near.build()  # once is enough
    assert sorted(column for index in indices() for column in index.columns) == ["generation", "vector"]
    for where in (NO_FILTER, Filter(start_seconds=3.0, stop_seconds=15.0), Filter(path="*[0-4].mp4")):
        found, expected = near.hits(each(asked), 10, where), exact.hits(each(asked), 10, where)
        shared = [len(set(a) & set(b)) for a, b in zip(found, expected, strict=True)]
        assert np.sum(shared) >= 0.95 * 10 * len(asked)
    example = Example("v007", 3.0)
    np.testing.assert_array_equal(near.vector(example), exact.vector(example))
    # What is not in the index yet is found all the same.
    new = video("new", scenes(draw, 40, 32))
    store.put(*new)
    (hits,) = near.hits(each(new[1].vectors[7:8]), 1)
    assert (hits[0].video_id, hits[0].pts_seconds) == ("new", new[1].pts_seconds[7])
    # ... and nothing of what was removed.
    store.drop(["new"])
    assert {hit.video_id for hit in near.hits(each(new[1].vectors[7:8]), 10)[0]}.isdisjoint({"new"})
    assert len(near.hits(each(asked[:1]), 100_000)[0]) == len(exact.hits(each(asked[:1]), 100_000)[0])


@pytest.mark.parametrize("with_index", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_subject_is_found_beyond_memory(tmp_path: Path, with_index: bool) -> None:
    """Its cosine is not the largest of all: those of scenes and of subjects have different scales."""
    draw, width = np.random.default_rng(16), 32
    query = np.eye(width, dtype=np.float32)[0]

    def at(cosine: float, count: int) -> Any:
        rest = unit(np.c_[np.zeros(count), draw.normal(size=(count, width - 1))])
        return (cosine * query + np.sqrt(1 - cosine**2) * rest).astype(np.float32)

    def with_subject(name: str, scene: float, subject: float) -> Video:
        own = Subjects(np.array([4]), at(subject, 1), draw.random((30, 4)).astype(np.float32))
        return video(name, at(scene, 30), subjects=own)

    store = Tables(str(tmp_path / "library"))
    store.create(model="made up", model_sha256="0" * 64, width=width)
    for n in range(40):
        store.put(*with_subject(f"subject{n:02d}", 0.1, 0.5))
        store.put(*video(f"scene{n:02d}", at(0.3 + n / 1000, 30)))
    for made in (with_subject("both", 0.35, 0.6), with_subject("hidden", 0.0, 0.8)):
        store.put(*made)
    scale = SubjectScale(2.0, -1.0)  # 0.8 -> 0.6, 0.6 -> 0.2, 0.5 -> 0
    near, exact = search_of(store, dataclasses.replace(CONFIG, exact_rows=0)), search_of(store)
    if with_index:
        near.build()
    (hits,) = near.hits(each(query[None], [scale]), 3)
    assert [hit.video_id for hit in hits][:2] == ["hidden", "both"]
    assert [hit.answered_by for hit in hits][:2] == ["subject", "scene"]
    assert (hits[0].pts_seconds, hits[0].score) == (2.0, pytest.approx(0.6, abs=2e-3))
    assert [hits] == exact.hits(each(query[None], [scale]), 3)
    best = near.videos(one(query, scale), 3)
    assert [hit.video_id for hit in best] == ["hidden", "both", "scene39"]
    assert best == exact.videos(one(query, scale), 3)
    assert [hit.video_id for hit in near.hits(each(query[None]), 3)[0]][:2] == ["hidden", "both"]
