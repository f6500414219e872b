"""What the tables keep, against the values that were put; verification, compaction and the older format."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from library_process import MODEL, check, made, put

from keyreel.errors import Damaged, LibraryError, ModelMismatch
from keyreel.library import schema
from keyreel.library.schema import RECORDS, TABLES, VECTORS
from keyreel.library.stored import CHUNK
from keyreel.library.table import Tables
from keyreel.library.types import Record
from keyreel.library.upkeep import compact, orphans, upgrade, verify
from keyreel.runtime.bundle import Bundle

Video = tuple[Any, ...]
NO_ROWS: dict[str, Any] = {"generation": "", "frames": 0, "subjects": None}


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    tables = Tables(str(tmp_path / "library"))
    tables.create(**MODEL)
    return tables


def filled(tables: Tables, count: int, first: int = 0) -> dict[str, Video]:
    videos = {f"id{number}": made(number, 1) for number in range(first, first + count)}
    for video in videos.values():
        tables.put(*video)
    return videos


def fragments(tables: Tables, name: str) -> int:
    return int(tables.table(name).stats()["fragment_stats"]["num_fragments"])


def assert_stored(found: Any, vectors: Any) -> None:
    half = vectors.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(found, half / np.sqrt((half**2).sum(1, keepdims=True)), rtol=0, atol=1e-7)


def assert_holds(tables: Tables, videos: dict[str, Video]) -> None:
    """The tables hold these videos and nothing else."""
    assert tables.records() == [videos[id][0] for id in sorted(videos, key=lambda id: videos[id][0].path)]
    for record, rows, previews, extras in videos.values():
        ((_, found),) = tables.rows([record.generation])
        assert_stored(found.vectors, rows.vectors)
        for name in ("pts_seconds", "frame_index", "shot", "keyframe", "weight"):
            np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))
            assert getattr(found, name).dtype == getattr(rows, name).dtype
        assert (found.subjects is None) == (rows.subjects is None)
        if rows.subjects is not None:
            np.testing.assert_array_equal(found.subjects.row, rows.subjects.row)
            assert_stored(found.subjects.vectors, rows.subjects.vectors)
            np.testing.assert_array_equal(found.subjects.region, rows.subjects.region.astype(np.float16))
        shown = tables.previews(record.generation)
        assert [(one.pts_seconds, one.jpeg) for one in shown] == [(one.pts_seconds, one.jpeg) for one in previews]
        for one, other in zip(shown, previews, strict=True):
            np.testing.assert_allclose(one.attention, other.attention, rtol=2e-3)
            assert abs(one.attention.sum(dtype=np.float64) - 1) < 1e-6
            assert tables.preview(record.generation, one.pts_seconds + 1e-4) == one.jpeg
            assert tables.preview(record.generation, one.pts_seconds + 1e-2) is None
        assert tables.extras(record.generation) == extras


def test_what_was_put_comes_back(tables: Tables) -> None:
    videos = filled(tables, 7)
    assert_holds(tables, videos)
    assert_holds(Tables(tables.uri), videos)
    for changed in (
        made(1, 2),
        (dataclasses.replace(made(2, 1)[0], status="failed", error="it's broken", **NO_ROWS),),
    ):
        tables.put(*changed)
    videos["id1"], failed = made(1, 2), tables.records(["id2"])[0]
    assert (failed.status, failed.error, failed.frames) == ("failed", "it's broken", 0)
    assert tables.records(["id1", "nobody", "id1"])[0].fingerprint == "1:2"
    assert tables.drop(["id2", "id2", "nobody"]) == 1
    del videos["id2"]
    videos["id1"] = (tables.records(["id1"])[0], *videos["id1"][1:])
    assert_holds(tables, videos)
    record, rows, *_ = made(9, 1)
    for what in ({"generation": ""}, {"frames": 9}, {"subjects": 9}, {"subjects": None}):
        wrong = dataclasses.replace(record, **what)
        with pytest.raises(ValueError, match="do not fit generation"):
            tables.put(wrong, rows)


def test_rows_are_read_in_one_pass(tables: Tables) -> None:
    videos = filled(tables, 9)
    compact(tables, alone=True)
    videos |= filled(tables, 3, 20)
    wanted = [videos[f"id{n}"][0].generation for n in (20, 3, 8, 0)]
    few = dict(tables.rows([*wanted, "unknown", wanted[0]]))
    many = dict(tables.rows([*wanted, *(f"unknown{n}" for n in range(CHUNK))]))
    assert set(few) == set(many) == set(wanted)
    for generation in wanted:
        np.testing.assert_array_equal(few[generation].vectors, many[generation].vectors)
    assert list(tables.rows([])) == []


def test_looking_for_a_library_imports_no_database(tmp_path: Path) -> None:
    code = "import sys; import keyreel; keyreel.Library('x').exists(); print({'lancedb', 'pyarrow'} & set(sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip() == "set()"
    assert list(tmp_path.iterdir()) == []


def test_a_library_has_one_model_and_a_known_format(tables: Tables, tmp_path: Path) -> None:
    tables.create(**MODEL)
    again = Tables(tables.uri)
    assert again.model() == ("made-up", "ab" * 32, 16)
    for other in ({"model_sha256": "cd" * 32}, {"width": 17}):
        with pytest.raises(ModelMismatch, match="'made-up'"):
            again.create(**MODEL | other)
    for number, metadata in enumerate((None, {"keyreel.format": "4"})):
        columns = schema.schemas(**MODEL)[RECORDS].with_metadata(metadata)
        lancedb.connect(tmp_path / f"{number}").create_table(RECORDS, schema=columns)
        with pytest.raises(LibraryError, match=r"not made by keyreel|has format 4"):
            Tables(str(tmp_path / f"{number}")).model()


# --- several writers --------------------------------------------------------------------------------------------------


def test_a_record_is_renewed_only_while_its_rows_are_its_own(tables: Tables) -> None:
    videos, other = filled(tables, 3), Tables(tables.uri)
    for id, act in (("id0", None), ("id1", lambda: other.put(*made(1, 2))), ("id2", lambda: other.drop(["id2"]))):
        renewed = dataclasses.replace(videos[id][0], path=f"/elsewhere/{id}.mp4", tags=())
        if act is not None:
            act()
        before = other.records()
        assert tables.renew(renewed) == (act is None)
        assert tables.records() == other.records()
        assert (tables.records() == before) == (act is not None)
        assert tables.records([id]) == ([renewed] if act is None else [one for one in before if one.id == id])
    assert verify(tables) == ()


def test_versions_and_own_commits_are_known(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit of one's own is known without reading, or each video would take longer the more there are."""
    filled(tables, 3)
    tables.records()
    other, record = Tables(tables.uri), made(7, 1)[0]
    seen = [other.version()]
    with monkeypatch.context() as patch:
        patch.setattr(tables, "read", lambda *_: pytest.fail("the table was read"))
        tables.put(record, *made(7, 1)[1:])
        seen.append(other.version())
        assert tables.renew(dataclasses.replace(record, tags=()))
        seen.append(other.version())
        assert tables.records(["id7"]) == [dataclasses.replace(record, tags=())]
    assert len(set(seen)) == 3
    other.put(*made(8, 1))
    tables.put(*made(9, 1))
    assert tables.records() == Tables(tables.uri).records()
    assert [record.id for record in tables.records()] == ["id0", "id1", "id2", "id7", "id8", "id9"]


def test_files_that_a_compaction_took_away_are_read_again(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = filled(tables, 3)
    old, names = tables.open(VECTORS, tables.open(VECTORS).version), {one[0].generation for one in videos.values()}
    compact(tables, alone=True)
    now = tables.table(VECTORS)
    for read in (
        lambda: set(dict(tables.rows(list(names)))),
        lambda: set(tables.read(VECTORS, None)["generation"].to_pylist()),
    ):
        views = [now, old]
        monkeypatch.setattr(tables, "table", lambda _, views=views: views.pop())
        assert read() == names
        assert views == []
        monkeypatch.undo()


# --- upkeep -----------------------------------------------------------------------------------------------------------


def test_removed_videos_give_their_space_back(tables: Tables, tmp_path: Path) -> None:
    videos = filled(tables, 8)
    for number in range(4):
        put(tables, number, 2)
    tables.drop(["id7", "id5"])
    assert verify(tables) == ()
    gone = [videos[f"id{n}"][0] for n in (0, 1, 2, 3, 5, 7)]
    assert orphans(tables, 0.0) == {record.generation: record.rows for record in gone}
    compact(tables)  # others may be at work: rows of the last hour stay
    living = sum(record.rows for record in tables.records())
    assert tables.table(VECTORS).count_rows() > living
    before, given = tables.bytes(), compact(tables, alone=True)
    assert tables.bytes() == before - given
    assert (tables.table(VECTORS).count_rows(), tables.table(RECORDS).count_rows()) == (living, 6)
    assert check(tables) == 6
    fresh = Tables(str(tmp_path / "fresh"))
    fresh.create(**MODEL)
    for record in tables.records():
        put(fresh, *map(int, record.fingerprint.split(":")))
    compact(fresh, alone=True)
    assert abs(tables.bytes() - fresh.bytes()) < 4000


def test_orphans_are_found_and_deleted_after_an_hour(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tables, 2)
    record, rows, *_ = made(6, 1)
    now = time.time_ns()
    monkeypatch.setattr(schema.time, "time_ns", lambda: now - 3601 * 10**9)
    tables.add_rows(schema.vector_rows(tables.table(VECTORS).schema, record, rows))  # and then the writer was killed
    monkeypatch.undo()
    (finding,) = verify(tables)
    assert (finding.kind, finding.repaired) == ("orphans", False)
    assert finding.what.startswith(f"{record.rows} rows of 1 videos")
    compact(tables)
    assert verify(tables) == ()
    assert tables.table(VECTORS).count_rows() == sum(one.rows for one in tables.records())


@pytest.mark.full
def test_small_files_are_merged_now_and_then(tables: Tables) -> None:
    most = 0
    for number in range(40):
        put(tables, number, 1)
        most = max(most, *(fragments(tables, name) for name in TABLES))
    assert most <= 6 + 40 // 8 + 6  # every so many commits, an eighth of the videos, and those since the last look
    assert check(tables) == 40
    assert verify(tables) == ()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(int(os.environ.get("KEYREEL_DAMAGES", "6"))))
def test_damage_is_found_and_repaired(tables: Tables, seed: int) -> None:
    videos = filled(tables, 5)
    compact(tables, alone=True)
    videos |= filled(tables, 3, 5)
    rng, kind = random.Random(seed), ("flip", "cut", "remove")[seed % 3]
    # A file of the newest state: the rows of either table, or (every other time) the newest manifest.
    folder = Path(tables.uri) / f"{rng.choice(TABLES)}.lance"
    newest = sorted((folder / "_versions").glob("*.manifest"))[0]
    path = newest if seed % 2 and kind != "remove" else rng.choice(sorted((folder / "data").iterdir()))
    whole = path.read_bytes()
    at, broken = rng.randrange(len(whole)), bytearray(whole)
    for place in range(at, min(at + 40, len(whole))):
        broken[place] ^= 0xFF
    path.write_bytes(whole[:at] if kind == "cut" else bytes(broken))
    if kind == "remove":
        path.unlink()
    damaged = Tables(tables.uri)
    found, repaired = verify(damaged), verify(damaged, repair=True)
    assert [one.kind for one in found] == [one.kind for one in repaired][: len(found)]
    assert all(one.repaired for one in repaired)
    assert verify(damaged) == ()
    # What is called sound is what was put; the others are failed or gone, and can be added again.
    sound = {record.id: record for record in damaged.records() if record.status == "ok"}
    failed = [record for record in damaged.records() if record.status == "failed"]
    assert sound == {id: videos[id][0] for id in sound}
    assert all("rows were damaged" in (one.error or "") and one.frames == 0 for one in failed)
    assert {one.path for one in failed} == {path for one in repaired for path in one.videos}
    if len(sound) < len(videos):
        assert {one.kind for one in found} & {"unreadable", "manifest"}
    for id in set(videos) - set(sound):
        damaged.put(*made(int(id[2:]), 1))
    assert check(damaged) == len(videos)
    assert verify(damaged) == ()


def test_a_changed_number_is_noticed(tables: Tables) -> None:
    """The file format would not notice: its files hold no checksums."""
    videos = filled(tables, 3)
    file = next((Path(tables.uri) / f"{VECTORS}.lance/data").iterdir())
    whole = file.read_bytes()
    # Four numbers of the second vector of one video, turned round.
    needles = {id: video[1].vectors.astype(np.float16)[1].tobytes()[:8] for id, video in videos.items()}
    (id,) = [id for id, needle in needles.items() if needle in whole]
    file.write_bytes(whole.replace(needles[id], needles[id][::-1]))
    damaged = Tables(tables.uri)
    (finding,) = verify(damaged)
    assert (finding.kind, finding.what) == ("unreadable", f"1 rows of {VECTORS}: the checksum is wrong")
    assert [one.kind for one in verify(damaged, repair=True)] == ["unreadable", "incomplete"]
    assert {one.id for one in damaged.records() if one.status == "failed"} == {id}


@pytest.mark.parametrize("what", ["vector", "region", "row"])
def test_a_subject_that_is_damaged_is_noticed(tables: Tables, what: str) -> None:
    videos = filled(tables, 3)
    record, rows, *_ = videos["id1"]
    where = f"generation = '{record.generation}' AND kind = '{'scene' if what == 'region' else 'subject'}'"
    if what == "row":
        tables.delete(VECTORS, where + f" AND row = {rows.subjects.row[0]}")
    else:
        values = {"vector": [0.25] * 16, "region": [0.0, 0.0, 0.5, 0.5]}
        tables.table(VECTORS).update(where=where, values={what: values[what]})
    found = verify(tables)
    assert [one.kind for one in found] == ["incomplete" if what == "row" else "unreadable"]
    assert [one.kind for one in verify(tables, repair=True)][-1] == "incomplete"
    left = {one.id: one for one in tables.records()}
    assert left["id1"].status == "failed"
    count = {"row": 1, "vector": len(rows.subjects), "region": len(rows)}[what]
    assert left["id1"].error == f"{count} of its {record.rows} rows were damaged"
    assert (left["id0"], left["id2"]) == (videos["id0"][0], videos["id2"][0])


def test_a_table_without_any_sound_version(tables: Tables) -> None:
    filled(tables, 1)
    for manifest in (Path(tables.uri) / f"{RECORDS}.lance/_versions").glob("*.manifest"):
        manifest.write_bytes(b"nothing")
    damaged = Tables(tables.uri)
    assert damaged.exists()
    assert [one.kind for one in verify(damaged)] == ["manifest"]
    for work in (damaged.records, lambda: verify(damaged, repair=True)):
        with pytest.raises(Damaged):
            work()


def test_no_folder_at_a_uri() -> None:
    """LanceDB's store in memory stands for an object store: nothing may ask for a folder."""
    tables = Tables("memory://library")
    assert not tables.exists()
    tables.create(**MODEL)
    filled(tables, 3)
    assert (check(tables), tables.drop(["id1"])) == (3, 1)
    assert (tables.bytes(), compact(tables, alone=True)) == (None, 0)
    assert tables.table(VECTORS).count_rows() == sum(record.rows for record in tables.records())
    assert verify(tables) == ()


def test_what_cannot_be_reached_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file" / "library", "/proc/library"):  # not even root can make it; nothing is damaged
        with pytest.raises(LibraryError, match="cannot be used") as caught:
            Tables(str(folder)).create(**MODEL)
        assert not isinstance(caught.value, Damaged)
    # A port where nobody listens; options are passed through.
    options = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key", "aws_region"), "a")
    options |= {"endpoint": "http://127.0.0.1:9", "allow_http": "true", "client_max_retries": "0"}
    with pytest.raises(LibraryError, match=r"s3://bucket/library cannot be used.*127\.0\.0\.1:9"):
        Tables("s3://bucket/library", storage_options=options).create(**MODEL)


# --- older formats ----------------------------------------------------------------------------------------------------


def of_older_format(folder: Path, videos: dict[str, Video], number: int) -> dict[str, Any]:
    """Writes the scenes of videos as keyreel did in format 1 or 2; returns the two tables by their new names.

    In format 1 with rows of `videos` that are superseded.
    """
    database, old = lancedb.connect(folder), {}
    later = {"region", "subjects", *schema.LATE, *(["kind"] if number == 1 else [])}
    for name, new in zip(schema.FORMAT_1 if number == 1 else TABLES, TABLES, strict=True):
        columns = schema.schemas(**MODEL)[new]
        fields = [field for field in columns if field.name not in later]
        if number == 1:
            fields = [pa.field(field.name, field.type) for field in fields]
            fields[-1:-1] = [pa.field("sequence", pa.int64())] if new == RECORDS else []
        metadata = columns.metadata | {b"keyreel.format": str(number).encode()}
        old[new] = database.create_table(name, schema=pa.schema(fields, metadata=metadata))
    for place, (record, *contents) in enumerate(videos.values()):
        if contents:
            rows = schema.vector_rows(schema.schemas(**MODEL)[VECTORS], record, *contents)
            rows = rows.filter(pa.array(rows["kind"].to_numpy() == "scene"))
            parts = {name: rows[name].combine_chunks() for name in rows.column_names}
            old[VECTORS].add(schema.checked(old[VECTORS].schema, parts))
        for sequence, path in ((7, "/superseded.mp4"), (10 + place, record.path))[number - 1 :]:
            row = {name: [getattr(record, name)] for name in Record.__slots__} | {"path": [path]}
            row |= {"probe": [json.dumps(record.probe)], "shots": [json.dumps(record.shots)]}
            row |= {"sequence": [sequence], "written": [100 - sequence]}  # a clock that goes back
            old[RECORDS].add(schema.checked(old[RECORDS].schema, row))
    return old


def without_subjects(video: Video, **about: Any) -> Video:
    record, *contents = video
    record = dataclasses.replace(record, subjects=None, **about)
    return (record, dataclasses.replace(contents[0], subjects=None), *contents[1:]) if contents else (record,)


@pytest.mark.parametrize("number", [1, 2])
def test_a_library_of_an_older_format_is_converted(tmp_path: Path, number: int) -> None:
    failed = dataclasses.replace(made(3, 1)[0], status="failed", error="no video", **NO_ROWS)
    videos: dict[str, Video] = {f"id{n}": made(n, 1) for n in range(20)} | {"id3": (failed,)}
    old = of_older_format(tmp_path, videos, number)
    tables = Tables(str(tmp_path))
    assert tables.exists()
    for ask in (tables.records, tables.version, lambda: verify(tables), lambda: tables.create(**MODEL)):
        with pytest.raises(LibraryError, match="has an older format") as caught:
            ask()
        assert f"keyreel library upgrade {tmp_path}" in str(caught.value.hint)
    lost = videos["id5"][0]
    old[VECTORS].delete(f"generation = '{lost.generation}' AND row = 0")
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upgrade(tables, progress=interrupt)
    with pytest.raises(LibraryError, match="has an older format"):
        Tables(str(tmp_path)).records()
    assert upgrade(tables) == 20
    assert upgrade(tables) == 0
    assert seen == [(0, 20), (16, 20)]
    found = {record.id: record for record in tables.records()}
    assert found["id5"].error == f"1 of its {lost.frames} rows were damaged"
    assert found["id3"] == failed
    assert len(found) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.lance", "vectors.lance"]
    assert verify(tables) == ()
    tables.drop(["id3", "id5"])
    converted = {id: without_subjects(video) for id, video in videos.items() if id not in ("id3", "id5")}
    assert_holds(tables, converted)
    tables.put(*made(1, 2))  # subjects come with the next indexing
    tables.put(*made(30, 1))
    converted |= {"id1": made(1, 2), "id30": made(30, 1)}
    for id in ("id1", "id30"):
        converted[id] = (tables.records([id])[0], *converted[id][1:])
        assert converted[id][0].subjects
    assert_holds(tables, converted)
    assert verify(tables) == ()


def test_an_upgrade_that_ends_between_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = {f"id{n}": made(n, 1) for n in range(3)}
    of_older_format(tmp_path, videos, 2)
    overwrite, written = Tables.overwrite, []

    def killed(self: Tables, name: str, *arguments: Any) -> None:
        written.append(name)
        if written == [VECTORS, RECORDS]:
            raise KeyboardInterrupt
        overwrite(self, name, *arguments)

    monkeypatch.setattr(Tables, "overwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        upgrade(Tables(str(tmp_path)))
    tables = Tables(str(tmp_path))
    with pytest.raises(LibraryError, match="has an older format"):
        tables.records()
    assert upgrade(tables) == 3
    assert written == [VECTORS, RECORDS, RECORDS]
    assert_holds(tables, {id: without_subjects(video) for id, video in videos.items()})


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_scenes_of_an_earlier_model_go_on(tmp_path: Path, number: int) -> None:
    videos: dict[str, Video] = {f"id{n}": made(n, 1) for n in range(3)}
    tables = Tables(str(tmp_path))
    if number < schema.FORMAT:
        of_older_format(tmp_path, videos, number)
    else:
        tables.create(**MODEL)
        for video in videos.values():
            tables.put(*video)
    own, other = {"name": "new", "sha256": "cd" * 32}, {"name": "other", "sha256": "ef" * 32}
    bundle = dataclasses.replace(Bundle.find("builtin"), **own, same_scene={"00" * 32: "", MODEL["model_sha256"]: ""})
    stranger = dataclasses.replace(bundle, **other, same_scene={"00" * 32: ""})
    asked = {"model": "new", "model_sha256": bundle.sha256, "width": 16}
    if number == schema.FORMAT:
        with pytest.raises(LibraryError, match=r"earlier model 'made-up'.*'new'") as caught:
            tables.check_model(**asked, same_scene=bundle.same_scene)
        assert f"keyreel library upgrade {tmp_path}" in str(caught.value.hint)
    # Another model altogether changes the format only.
    assert upgrade(tables, stranger) == (3 if number < schema.FORMAT else 0)
    assert tables.model() == ("made-up", "ab" * 32, 16)
    with pytest.raises(ModelMismatch):
        tables.check_model(stranger.name, stranger.sha256, 16, same_scene=stranger.same_scene)
    assert upgrade(tables, bundle) == 3
    assert upgrade(tables, bundle) == 0
    tables.check_model(**asked, same_scene=bundle.same_scene)
    assert_holds(
        tables,
        {id: without_subjects(v, model="new", model_sha256=bundle.sha256) for id, v in videos.items()},
    )
    assert verify(tables) == ()


@pytest.mark.parametrize("spoilt", [{b"keyreel.width": b"2q6"}, {b"keyreel.format": b"\xff"}, {b"keyreel.model": None}])
def test_a_damaged_description_of_a_library_is_damage(spoilt: dict[bytes, bytes | None]) -> None:
    columns = schema.schemas(**MODEL)[RECORDS]
    about = {key: value for key, value in {**columns.metadata, **spoilt}.items() if value is not None}
    with pytest.raises(Damaged, match=r"metadata .*are damaged"):
        schema.model_of(columns.with_metadata(about))
