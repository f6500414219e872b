"""A library that is spread over shards answers as one that is not; growing it loses nothing."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, run
from library_process import MODEL, content
from test_library_search import quarters, search_of, stored, subjects, unit, video

from keyreel import Library
from keyreel.chance import Chances
from keyreel.cli.documents import Index, Reshard
from keyreel.config import LibraryConfig
from keyreel.errors import Damaged, LibraryError
from keyreel.library import schema
from keyreel.library.merge import Search
from keyreel.library.search import SearchIndex
from keyreel.library.shards import Shards, names_at, open_tables, reshard
from keyreel.library.table import Tables
from keyreel.library.types import Filter, Preview
from keyreel.runtime.bundle import ChanceScale, SubjectScale
from keyreel.search import Asked
from keyreel.types import Combined, Example

VIDEOS = 40
WIDTH = 8


def films(seed: int, count: int = VIDEOS) -> list[Any]:
    """Made-up videos: some full of ties, some near-duplicates of each other, a third without subjects."""
    draw = np.random.default_rng(seed)
    made, shared = [], unit(draw.normal(size=(12, WIDTH)))
    for number in range(count):
        frames = int(draw.integers(1, 30))
        vectors = quarters(draw, frames) if number % 2 else shared[draw.integers(0, 12, frames)]
        own = None if number % 3 == 2 else subjects(draw, frames, lambda n: unit(draw.normal(size=(n, WIDTH))))
        record, rows = video(
            f"{number:02}",
            vectors,
            subjects=own,
            tags=("odd",) if number % 2 else ("even", "third")[: 1 + (number % 3 == 0)],
            date=float(number),
            duration=frames * 0.5,
        )
        record = dataclasses.replace(
            record, model="made-up", model_sha256=MODEL["model_sha256"], subjects=rows.counts[1], indexed_at=1.0
        )
        made.append((record, rows))
    return made


def fill(tables: Tables | Shards, videos: list[Any]) -> None:
    tables.create(**{**MODEL, "width": WIDTH})
    for record, rows in videos:
        shown = [Preview(float(time), b"jpeg", np.ones(4, np.float32)) for time in rows.pts_seconds[rows.keyframe]]
        tables.of(record.id).put(record, rows, shown)


def some_filter(draw: np.random.Generator) -> Filter:
    def maybe(value: Any) -> Any:
        return value if draw.random() < 0.3 else None

    return Filter(
        videos=[f"/films/{n:02}.mp4" for n in draw.integers(0, VIDEOS, 5)] if draw.random() < 0.2 else (),
        path=maybe("*[02468].mp4"),
        tags=[("odd", "even", "third")[draw.integers(3)]] if draw.random() < 0.3 else (),
        start_seconds=maybe(float(draw.integers(4))),
        stop_seconds=maybe(4.0 + float(draw.integers(8))),
        min_duration_seconds=maybe(3.0),
        after=maybe(float(draw.integers(20))),
        before=maybe(20.0 + float(draw.integers(20))),
        per_video=[None, 1, 2, 3][draw.integers(4)],
    )


def some_query(draw: np.random.Generator) -> Any:
    def part() -> Any:
        if draw.random() < 0.3:
            return Example(f"/films/{draw.integers(VIDEOS):02}.mp4", float(draw.integers(8)))
        return quarters(draw, 1)[0] if draw.random() < 0.5 else unit(draw.normal(size=WIDTH))

    return Combined(
        part(), also=[part()] if draw.random() < 0.2 else (), without=[part()] if draw.random() < 0.2 else ()
    )


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same videos in one shard, in three and in five."""
    folder, videos = tmp_path_factory.mktemp("shards"), films(1)
    for shards in (1, 3, 5):
        fill(open_tables(str(folder / str(shards)), shards=shards), videos)
    return [folder / str(shards) for shards in (1, 3, 5)]


@pytest.mark.full
@pytest.mark.parametrize("exact_rows", [1_000_000, 0])
def test_200_queries_are_answered_alike(libraries: list[Path], exact_rows: int) -> None:
    """Bit for bit: moments, videos, ties, limits, folded ones, frames as queries; from memory, and without."""
    draw = np.random.default_rng(2)
    whole, *spread = (Library(path, config=LibraryConfig(exact_rows=exact_rows)) for path in libraries)
    folded = more = found = 0
    for number in range(200 if exact_rows else 20):
        where, query, k = some_filter(draw), some_query(draw), int(draw.integers(1, 25))
        hits = whole.search(query, k=k, where=where)
        videos = whole.search_videos(query, k=k, moments=3, where=where)
        for library in spread:
            assert library.search(query, k=k, where=where) == hits, number
            assert library.search_videos(query, k=k, moments=3, where=where) == videos, number
            assert library.left_out() == whole.left_out() == []
        found += len(hits)
        folded += sum(hit.folded for hit in hits)
        more += sum(hit.more for hit in hits)
    assert found > 100  # and all that a search does has happened
    assert folded > 10
    assert more > 10
    for library in (whole, *spread):
        library.close()


@pytest.mark.full
def test_what_else_a_library_says(libraries: list[Path]) -> None:
    whole, *spread = (Library(path) for path in libraries)
    query, examples = unit(np.arange(1.0, 9.0)), [Example("00", 1.0), Example("07", 2.0)]
    for library in spread:
        assert isinstance(library._tables, Shards)
        assert all(part.records() for part in library._tables.parts)
        assert content_of(library) == content_of(whole)
        assert library.list(Filter(tags=["odd"])) == whole.list(Filter(tags=["odd"]))
        assert dataclasses.replace(library.stats(), bytes=0) == dataclasses.replace(whole.stats(), bytes=0)
        assert library.verify() == whole.verify() == ()
        assert library.previews("03")[0].jpeg == whole.previews("03")[0].jpeg == library.preview("03", 0.5)
        for one, other in zip(library.scores(query, "05"), whole.scores(query, "05"), strict=True):
            np.testing.assert_array_equal(one, other)
        assert library.search_many(examples, k=4) == whole.search_many(examples, k=4)
        with pytest.raises(LibraryError, match="no video"):
            library.search(query, where=Filter(videos=["nobody"]))
        library.close()


def content_of(library: Library) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in library._tables.parts:
        merged |= content(part)
    return merged


def test_chances_count_the_pictures_of_all_shards() -> None:
    """A text's chance depends on how many pictures were searched, in all shards together."""
    videos, draw = films(3), np.random.default_rng(4)
    chances = Chances(
        unit(draw.normal(size=(20, WIDTH))).astype(np.float32),
        ChanceScale(tuple("ab"), lead=6.0, pictures=-0.3, offset=0.1),
    )
    parts = [stored(videos[n::3]) for n in range(3)]
    place = {record.id: n for n, part in enumerate(parts) for record in part.records()}
    config = LibraryConfig()
    search = Search([SearchIndex(part, config) for part in parts], place.__getitem__, config.fold_similarity)
    alone = search_of(stored(videos))
    for vector in unit(draw.normal(size=(10, WIDTH))):
        asked = Asked(vector[None], (SubjectScale(slope=1.2, offset=0.05),), (1.0,), (0.5,), chances)
        (found,), (expected,) = search.hits([asked], 8), alone.hits([asked], 8)
        assert found == expected
        assert all(hit.chance is not None and 0 < hit.chance < 0.5 for hit in found)
        assert search.videos(asked, 5) == alone.videos(asked, 5)


AXIS = np.eye(WIDTH, dtype=np.float32)


def stills(letter: str, *pictures: Any) -> list[Any]:
    """Videos of one frame."""
    return [video(f"{letter}{n}", [unit(picture)], duration=0.5) for n, picture in enumerate(pictures)]


ALIKE = [AXIS[0] + 0.01 * n * AXIS[1] for n in range(6)]
BESIDE = [AXIS[0] + side * 0.1 * AXIS[1] for side in (1, -1)]  # near-duplicates of the axis, not of each other
WORSE = [AXIS[0] + (2.0 + n) * AXIS[4 + n] for n in range(3)]


@pytest.mark.parametrize(
    ("first", "second", "k", "rounds", "shown", "folded"),
    [
        # The others fold already in their own shard.
        (stills("a", ALIKE[0]), stills("b", *ALIKE[1:]) + stills("c", *WORSE), 3, [3], ["a0", "c0", "c1"], [5, 0, 0]),
        # What the second shard gives first is hidden by one of the first's: it has to give more.
        (stills("a", AXIS[0]), stills("b", *BESIDE) + stills("c", *WORSE), 2, [2, 8], ["a0", "c0"], [2, 0]),
    ],
)
def test_near_duplicates_in_other_shards(
    first: list[Any], second: list[Any], k: int, rounds: list[int], shown: list[str], folded: list[int]
) -> None:
    asked_for: list[int] = []

    class Counting(SearchIndex):
        def moments(self, queries: Any, k: int, where: Any, own: Any) -> Any:
            asked_for.append(k)
            return super().moments(queries, k, where, own)

    config = LibraryConfig(fold_similarity=0.99)
    search = Search([Counting(stored(part), config) for part in (first, second)], lambda id: int(id[0] != "a"), 0.99)
    asked = Asked(AXIS[:1], (SubjectScale(),), (1.0,))
    (found,) = search.hits([asked], k)
    assert found == search_of(stored([*first, *second]), config).hits([asked], k)[0]
    assert [hit.video_id for hit in found] == shown
    assert [hit.folded for hit in found] == folded
    assert asked_for[::2] == asked_for[1::2] == rounds


# --- growing ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_resharding_keeps_every_bit(tmp_path: Path) -> None:
    videos, uri = films(5), str(tmp_path / "library")
    fill(Tables(uri), videos)
    with Library(uri) as library:
        before = content_of(library)
        query = unit(np.arange(8.0) - 3)
        hits = library.search(query, k=20)
        for count in (4, 7, 2, 1):
            assert library.reshard(count) == VIDEOS
            assert len(library._tables.parts) == count
            assert content_of(library) == before
            assert library.search(query, k=20) == hits
            assert library.verify() == ()
            assert sorted(path.name for path in tmp_path.glob("library/*")) == [
                *(f"shard-{n:04}-of-{count:04}" for n in range(count)),
                "shards.lance",
            ]
        assert library.reshard(1) == 0
        with pytest.raises(ValueError, match="shards must be in 1"):
            library.reshard(0)


def test_an_interrupted_reshard_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at each commit: until the last one the old library answers; videos that come and go are taken over."""
    videos, uri = films(6, 12), str(tmp_path / "library")
    fill(Tables(uri), videos)
    real, left = Tables.upsert, [0]

    def stopping(self: Tables, *args: Any, **options: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise LibraryError("stopped")
        return real(self, *args, **options)

    monkeypatch.setattr("keyreel.library.shards.CHUNK", 4)
    for steps in (0, 1, 4):
        with monkeypatch.context() as patched:
            patched.setattr(Tables, "upsert", stopping)
            left[0] = steps
            with pytest.raises(LibraryError, match="stopped"):
                reshard(uri, 3)
        tables = open_tables(uri)
        assert isinstance(tables, Tables)
        assert [one.id for one in tables.records()] == [record.id for record, _ in videos]
        gone, (record, rows) = videos.pop(0), films(7, 30)[20 + steps]
        tables.drop([gone[0].id])
        tables.put(record, rows)
        videos.append((record, rows))
        videos.sort(key=lambda one: one[0].path)
    whole = content(Tables(uri))
    assert reshard(uri, 3) == 12
    with Library(uri) as library:
        assert content_of(library) == whole
        assert library.verify() == ()


def test_shards_are_made_once(tmp_path: Path) -> None:
    uri, made = str(tmp_path / "library"), {**MODEL, "width": WIDTH}
    spread = open_tables(uri, shards=3)
    assert not spread.exists()
    early = Library(uri)  # such as a service that begins before the first video is there
    assert not early.exists()
    other = open_tables(uri, shards=2)  # two processes, each with its own wish
    late = open_tables(uri)
    spread.create(**made)
    spread.create(**made)
    with pytest.raises(LibraryError, match="meanwhile"):
        other.create(**made)
    with pytest.raises(LibraryError, match="another process has spread"):
        late.create(**made)
    with pytest.raises(LibraryError, match="has 3 shards, not 4"):
        open_tables(uri, shards=4)
    assert open_tables(uri).exists()
    assert early.exists()
    assert len(early._tables.parts) == 3
    whole = str(tmp_path / "whole")
    Tables(whole).create(**made)
    with pytest.raises(LibraryError, match="has no shards") as caught:
        open_tables(whole, shards=2)
    assert "reshard" in str(caught.value.hint)
    root = Tables(uri)
    root.write_table(
        schema.SHARDS,
        schema.arrow().table({"name": ["../other"]}).replace_schema_metadata({"keyreel.format": str(schema.FORMAT)}),
        new=False,
    )
    with pytest.raises(Damaged, match="damaged list of its shards"):
        names_at(root)


def test_damaged_shards_are_left_out(tmp_path: Path) -> None:
    """A shard none of whose videos can be read is left out by name, as its videos are in a library of one shard."""
    videos, uri = films(8, 12), str(tmp_path / "library")
    spread = open_tables(uri, shards=3)
    fill(spread, videos)
    lost = [record for record, _ in videos if spread.number_of(record.id) == 1]
    assert lost
    spread.parts[1].delete("vectors", "true")
    with Library(uri) as library:
        hits = library.search(unit(np.arange(8.0)), k=50)
        assert library.left_out() == sorted(record.path for record in lost)
        assert {hit.video_id for hit in hits} <= {record.id for record, _ in videos} - {record.id for record in lost}
        assert [finding.kind for finding in library.verify(repair=True)] == ["incomplete"]
        assert {one.id for one in library.list() if one.status == "failed"} == {record.id for record in lost}


def test_writers_of_different_shards_do_not_wait(tmp_path: Path) -> None:
    """While one shard's commit is held up, a commit to another goes through."""
    videos, spread = films(9, 12), open_tables(str(tmp_path / "library"), shards=2)
    spread.create(**{**MODEL, "width": WIDTH})
    sides = [[one for one in videos if spread.number_of(one[0].id) == side] for side in (0, 1)]
    slow, quick = spread.parts
    with slow._writing:  # as while it commits
        writer = threading.Thread(target=slow.put, args=sides[0][0])
        writer.start()
        assert quick.put(*sides[1][0]).id == sides[1][0][0].id
        assert writer.is_alive()
    writer.join()
    assert len(spread.records()) == 2


WRITE = """
import sys
from library_process import made
from keyreel.library import upkeep
from keyreel.library.shards import open_tables
tables = open_tables(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 6):
    video = made(number, 1)
    part = tables.of(video[0].id)
    part.put(*video)
    upkeep.tidy(part, 4)
"""


@pytest.mark.full
def test_processes_write_all_shards_at_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "library")
    open_tables(uri, shards=3).create(**MODEL)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, uri, str(100 * n)], cwd=Path(__file__).parent) for n in range(3)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    with Library(uri) as library:
        expected = {f"id{100 * n + number}" for n, number in itertools.product(range(3), range(6))}
        assert {record.id for record in library.list()} == expected
        assert library.verify() == ()


@pytest.mark.full
def test_the_commands(media: Callable[[str], Path], tmp_path: Path) -> None:
    uri, clip = str(tmp_path / "library"), media("natural/bikes.mp4")
    made = document(Index, "index", clip, "--library", uri, "--shards", 2)
    assert [video["change"] for video in made["videos"]] == ["added"]
    assert len(open_tables(uri).parts) == 2
    wrong = run("index", clip, "--library", uri, "--shards", 3, code=6)
    assert "has 2 shards, not 3" in wrong.stderr
    assert "keyreel library reshard" in wrong.stderr
    spread = document(Reshard, "library", "reshard", uri, "--shards", 3)
    assert spread == {"schema": "keyreel.reshard/1", "library": uri, "shards": 3, "videos": 1}
    assert len(open_tables(uri).parts) == 3
