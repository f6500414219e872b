"""What a store keeps: against the values that were put, written down another way."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from library_process import MODEL, check, made

from keyreel.errors import Damaged, LibraryError, ModelMismatch
from keyreel.library import schema, upkeep
from keyreel.library.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "library"))
    store.create(**MODEL)
    return store


def filled(store: Store, count: int, first: int = 0) -> dict[str, tuple]:
    videos = {f"id{number}": made(number, 1) for number in range(first, first + count)}
    for video in videos.values():
        store.put(*video)
    return videos


def test_opening_and_asking_makes_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "library"))
    assert not store.exists()
    for ask in (store.model, store.version, store.records, store.compact, store.verify, lambda: store.drop(["a"])):
        with pytest.raises(LibraryError, match="there is no library at"):
            ask()
    assert list(tmp_path.iterdir()) == []
    store.create(**MODEL)
    assert store.exists()
    assert store.records() == []


def test_model_is_that_of_the_first(store: Store, tmp_path: Path) -> None:
    store.create(**MODEL)
    again = Store(store.uri)
    assert again.model() == ("made-up", "ab" * 32, 16)
    for other in ({"model_sha256": "cd" * 32}, {"width": 17}):
        with pytest.raises(ModelMismatch, match="'made-up'"):
            again.create(**MODEL | other)
    assert again.model() == ("made-up", "ab" * 32, 16)
    import lancedb

    for table, metadata in (("videos", None), ("videos", {"keyreel.format": "2"})):
        folder = tmp_path / f"foreign{bool(metadata)}"
        columns = schema.schemas(**MODEL)[table].with_metadata(metadata)
        lancedb.connect(folder).create_table(table, schema=columns)
        with pytest.raises(LibraryError, match=r"not made by keyreel|has format 2"):
            Store(str(folder)).model()


def test_what_was_put_comes_back(store: Store) -> None:
    videos = filled(store, 7)
    for reader in (store, Store(store.uri)):
        assert reader.records() == [videos[id][0] for id in sorted(videos)]
        for id, (record, rows, extras) in videos.items():
            assert reader.extras(id) == extras
            (block,) = reader.vectors([record.generation])
            half = rows.vectors.astype(np.float16).astype(np.float64)
            unit = half / np.sqrt((half**2).sum(1, keepdims=True))
            np.testing.assert_allclose(block.vectors, unit, rtol=0, atol=1e-7)
            assert block.vectors.dtype == np.float32
            for name in ("pts_seconds", "frame_index", "shot", "weight"):
                np.testing.assert_array_equal(getattr(block, name), getattr(rows, name))
                assert getattr(block, name).dtype == getattr(rows, name).dtype
            shown = {preview.pts_seconds: preview for preview in rows.previews}
            assert block.keyframe.tolist() == [pts in shown for pts in rows.pts_seconds.tolist()]
            previews = reader.previews(record.generation)
            assert {one.pts_seconds: one.jpeg for one in previews} == {pts: one.jpeg for pts, one in shown.items()}
            for one in previews:
                np.testing.assert_allclose(one.attention, shown[one.pts_seconds].attention, rtol=2e-3)
                assert abs(one.attention.sum(dtype=np.float64) - 1) < 1e-6
                assert reader.preview(record.generation, one.pts_seconds + 1e-4) == one.jpeg
                assert reader.preview(record.generation, one.pts_seconds + 1e-2) is None


def test_rows_are_checked_before_they_are_written(store: Store) -> None:
    record, rows, extras = made(1, 1)
    for wrong in ((record, None, extras), (dataclasses.replace(record, generation=""), rows, extras)):
        with pytest.raises(ValueError):
            store.put(*wrong)
    with pytest.raises(ValueError, match="of 9 frames"):
        store.put(dataclasses.replace(record, frames=9), rows, extras)
    assert store.table("frames").count_rows() == 0


def test_many_generations_are_read_in_one_pass(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreel.library import store as module

    videos = filled(store, 9)
    store.compact(alone=True)
    videos |= filled(store, 3, 20)
    wanted = [videos[f"id{n}"][0].generation for n in (20, 3, 8, 0)]
    few = {block.generation: block for block in store.vectors([*wanted, "unknown", wanted[0]])}
    monkeypatch.setattr(module, "CHUNK", 2)
    many = {block.generation: block for block in store.vectors([*wanted, "unknown", wanted[0]])}
    assert set(few) == set(many) == set(wanted)
    for generation in wanted:
        np.testing.assert_array_equal(few[generation].vectors, many[generation].vectors)
    assert list(store.vectors([])) == []


def test_newest_row_counts_and_rows_can_be_kept(store: Store) -> None:
    filled(store, 3)
    seen = Store(store.uri)
    old = seen.records(["id1"])[0]
    assert seen.records(["id1", "nobody", "id1"]) == [old]
    moved = dataclasses.replace(old, path="/made/up/000.mp4", tags=())
    store.put(moved, None, None)
    failed = dataclasses.replace(made(2, 1)[0], status="failed", error="it's broken", generation="", frames=0)
    store.put(failed, None, None)
    assert seen.records() == Store(store.uri).records() == [moved, made_like(seen, 0), failed]
    assert seen.extras("id1") == made(1, 1)[2]
    with pytest.raises(LibraryError, match="nothing to show"):
        seen.extras("id2")
    changed = made(1, 2)
    store.put(*changed)
    assert seen.records(["id1"]) == [changed[0]]
    assert seen.extras("id1") == changed[2]
    assert len(list(seen.vectors([changed[0].generation]))) == 1
    check(seen)


def made_like(store: Store, number: int):
    (record,) = store.records([f"id{number}"])
    return dataclasses.replace(made(number, 1)[0], generation=record.generation)


def test_newest_goes_by_sequence_and_only_then_by_the_clock() -> None:
    rows = [
        {"id": id, "sequence": s, "written": w} for id, s, w in (("a", 2, 5), ("a", 3, 1), ("b", 1, 1), ("b", 1, 4))
    ]
    for order in (rows, rows[::-1]):
        best = schema.newest(order)
        assert {id: (row["sequence"], row["written"]) for id, row in best.items()} == {"a": (3, 1), "b": (1, 4)}


@pytest.mark.parametrize("act", ["changes", "removes"])
def test_rows_that_are_kept_are_there(store: Store, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Another process changes or removes a video, and its rows are deleted, while its record is renewed."""
    filled(store, 2)
    moved = dataclasses.replace(store.records(["id1"])[0], path="/elsewhere.mp4")
    other, changed, real = Store(store.uri), made(1, 2), upkeep.append

    def late(*arguments):
        monkeypatch.setattr(upkeep, "append", real)
        other.put(*changed) if act == "changes" else other.drop(["id1"])
        other.compact(alone=True)
        return real(*arguments)

    monkeypatch.setattr(upkeep, "append", late)
    with pytest.raises(upkeep.Superseded, match=r"elsewhere\.mp4: was changed or removed by someone else"):
        store.put(moved, None, None)
    expected = [changed[0]] if act == "changes" else []
    assert store.records(["id1"]) == Store(store.uri).records(["id1"]) == expected
    assert store.verify() == ()
    with pytest.raises(upkeep.Superseded):  # known by now
        store.put(moved, None, None)
    # A clock that goes back does not hide what comes later.
    for tag in ("old", "new"):
        store.put(dataclasses.replace(store.records(["id0"])[0], tags=(tag,)), None, None)
        assert Store(store.uri).records(["id0"])[0].tags == (tag,)
        monkeypatch.setattr(time, "time_ns", lambda: 5)


def test_other_rows_may_come_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a compaction at the same time: nothing is taken for cut short, and nobody's rows are deleted."""
    videos = filled(store, 3)
    real = store.fresh_table

    class Turned:
        def __init__(self, name: str) -> None:
            self.table = real(name)

        def __getattr__(self, name: str) -> object:
            return getattr(self.table, name)

        def take_offsets(self, offsets: list[int]) -> object:
            return self.table.take_offsets([0])

    monkeypatch.setattr(store, "fresh_table", Turned)
    videos["id5"] = made(5, 1)
    store.put(*videos["id5"])
    assert store.records() == [videos[id][0] for id in sorted(videos)]
    assert (check(store), store.verify()) == (4, ())


def test_own_commits_are_known_without_reading(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each video would take longer the more there are."""
    filled(store, 3)
    store.records()
    monkeypatch.setattr(store, "rows", lambda *_: pytest.fail("the table was read"))
    record, rows, extras = made(7, 1)
    store.put(record, rows, extras)
    store.put(dataclasses.replace(record, tags=()), None, None)
    assert store.records(["id7"]) == [dataclasses.replace(record, tags=())]
    monkeypatch.undo()
    assert store.records() == Store(store.uri).records()
    Store(store.uri).put(*made(8, 1))
    store.put(*made(9, 1))
    assert [record.id for record in store.records()] == ["id0", "id1", "id2", "id7", "id8", "id9"]


def test_files_that_a_compaction_took_away_are_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = filled(store, 3)
    old = store.fresh_table("frames")
    old.checkout(old.version)
    store.compact(alone=True)
    views = [store.table("frames"), old]
    assert store.read(lambda: views.pop().search().to_arrow()).num_rows == store.table("frames").count_rows()
    views = [store.table("frames"), old]
    monkeypatch.setattr(store, "table", lambda name: views.pop())
    assert {block.generation for block in store.vectors([one[0].generation for one in videos.values()])} == {
        one[0].generation for one in videos.values()
    }


def test_a_library_of_an_early_keyreel(tmp_path: Path) -> None:
    import lancedb

    for name, columns in schema.schemas(**MODEL).items():
        fields = [field for field in columns if field.name not in ("sprite", "check")]
        old = schema.arrow().schema(fields, metadata=columns.metadata)
        lancedb.connect(tmp_path).create_table(name, schema=old)
    store = Store(str(tmp_path))
    for ask in (store.verify, store.records, store.compact, lambda: store.create(**MODEL)):
        with pytest.raises(LibraryError, match=r"an early keyreel made this library: .* has no check"):
            ask()


def test_version_changes_with_each_commit_of_anyone(store: Store) -> None:
    other = Store(store.uri)
    seen = [other.version()]
    record, rows, extras = made(1, 1)
    for act in (
        lambda: store.put(record, rows, extras),
        lambda: store.put(record, None, None),
        lambda: store.drop(["id1"]),
    ):
        act()
        seen.append(other.version())
    assert len(set(seen)) == len(seen)
    assert other.version() == seen[-1]


def test_dropped_videos_give_their_space_back(store: Store) -> None:
    videos = filled(store, 8)
    for number in range(4):
        store.put(*made(number, 2))
    assert store.drop(["id7", "id5", "id7", "nobody"]) == 2
    assert [record.id for record in store.records()] == ["id0", "id1", "id2", "id3", "id4", "id6"]
    with pytest.raises(LibraryError, match="id5"):
        store.extras("id5")
    assert store.verify() == ()
    assert upkeep._orphans(store, 0.0) == {
        videos[f"id{n}"][0].generation: videos[f"id{n}"][0].frames for n in (0, 1, 2, 3, 5, 7)
    }
    # Others may be at work: rows of the last hour stay.
    store.compact()
    assert store.table("frames").count_rows() > sum(record.frames for record in store.records())
    before = store.bytes()
    given = store.compact(alone=True)
    assert store.bytes() == before - given
    assert store.table("frames").count_rows() == sum(record.frames for record in store.records())
    assert store.table("videos").count_rows() == 6
    assert check(store) == 6
    fresh = Store(store.uri + "-fresh")
    fresh.create(**MODEL)
    for record in store.records():
        number, state = map(int, record.fingerprint.split(":"))
        fresh.put(*made(number, state))
    fresh.compact(alone=True)
    assert abs(store.bytes() - fresh.bytes()) < 2000


def test_orphans_are_told_and_deleted_after_an_hour(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(store, 2)
    record, rows, extras = made(5, 1)
    real = schema.time.time_ns
    monkeypatch.setattr(schema.time, "time_ns", lambda: real() - 3601 * 10**9)
    frames = store.table("frames")
    frames.add(schema.frames_table(frames.schema, record, rows, extras))  # and then the writer was killed
    monkeypatch.undo()
    (finding,) = store.verify()
    assert (finding.kind, finding.repaired) == ("orphans", False)
    assert finding.what.startswith(f"{len(rows)} rows of 1 videos")
    store.compact()
    assert store.verify() == ()
    assert frames.count_rows() == sum(one.frames for one in store.records())


def test_small_files_are_put_together_by_themselves(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "library"), compact_every=8)
    store.create(**MODEL)
    most = 0
    for number in range(60):
        store.put(*made(number, 1))
        stats = [store.table(name).stats()["fragment_stats"]["num_fragments"] for name in schema.TABLES]
        most = max(most, *stats)
    assert most <= 8 + 60 // 8 + 8  # compact_every, an eighth of the videos, and those since the last look
    assert store.table("frames").stats()["fragment_stats"]["num_fragments"] < 20
    assert check(store) == 60
    assert store.verify() == ()


@pytest.mark.parametrize("seed", range(int(os.environ.get("KEYREEL_DAMAGES", "6"))))
def test_damage_is_found_and_repaired(store: Store, tmp_path: Path, seed: int) -> None:
    videos = filled(store, 5)
    store.compact(alone=True)
    videos |= filled(store, 3, 5)
    rng = random.Random(seed)
    kind = ("flip", "cut", "remove")[seed % 3]
    # A file of the newest state: the rows of either table, or (every other time) the newest manifest.
    table = rng.choice(schema.TABLES)
    folder = Path(store.uri) / f"{table}.lance"
    newest = sorted((folder / "_versions").glob("*.manifest"))[0]
    manifest = seed % 2 == 1 and kind != "remove"
    path = newest if manifest else rng.choice(sorted((folder / "data").iterdir()))
    whole = path.read_bytes()
    broken = bytearray(whole)
    at = rng.randrange(len(whole))
    for place in range(at, min(at + 40, len(whole))):
        broken[place] ^= 0xFF
    path.write_bytes(whole[:at] if kind == "cut" else bytes(broken))
    if kind == "remove":
        path.unlink()
    damaged = Store(store.uri)
    found = damaged.verify()
    repaired = damaged.verify(repair=True)
    assert [one.kind for one in found] == [one.kind for one in repaired][: len(found)]
    assert all(one.repaired for one in repaired)
    assert damaged.verify() == ()
    # What is said to be sound is what was put; the others are failed or gone, and can be added again.
    sound = [record for record in damaged.records() if record.status == "ok"]
    for record in sound:
        assert record == videos[record.id][0]
    check_these(damaged, sound)
    failed = [record for record in damaged.records() if record.status == "failed"]
    assert all("rows were damaged" in record.error and record.frames == 0 for record in failed)
    assert {record.path for record in failed} == {path for one in repaired for path in one.videos}
    if len(sound) < len(videos):
        assert {one.kind for one in found} & {"unreadable", "manifest"}
    for id in set(videos) - {record.id for record in sound}:
        damaged.put(*made(int(id[2:]), 1))
    assert check(damaged) == len(videos)
    assert damaged.verify() == ()


def check_these(store: Store, records: list) -> None:
    for record in records:
        (block,) = store.vectors([record.generation])
        rows = made(int(record.id[2:]), 1)[1]
        np.testing.assert_array_equal(block.pts_seconds, rows.pts_seconds)
        np.testing.assert_allclose(block.vectors, rows.vectors, atol=1e-3)


def test_a_changed_number_is_noticed(store: Store) -> None:
    """The file format would not: its files hold no checksums."""
    filled(store, 3)
    before = store.records()
    rows = {record.id: made(int(record.id[2:]), 1)[1] for record in before}
    # Four numbers of the second vector of one video, turned round.
    needles = {id: row.vectors.astype(np.float16)[1].tobytes()[:8] for id, row in rows.items()}
    file = next((Path(store.uri) / "frames.lance/data").iterdir())
    whole = file.read_bytes()
    (id,) = [id for id, needle in needles.items() if needle in whole]
    file.write_bytes(whole.replace(needles[id], needles[id][::-1]))
    damaged = Store(store.uri)
    (finding,) = damaged.verify()
    assert (finding.kind, finding.what) == ("unreadable", "1 rows of frames: the checksum is wrong")
    assert [one.kind for one in damaged.verify(repair=True)] == ["unreadable", "incomplete"]
    statuses = {record.id: record.status for record in damaged.records()}
    assert statuses == {one.id: "failed" if one.id == id else "ok" for one in before}


def test_a_table_without_any_sound_version(store: Store) -> None:
    filled(store, 1)
    for manifest in (Path(store.uri) / "videos.lance/_versions").glob("*.manifest"):
        manifest.write_bytes(b"nothing")
    damaged = Store(store.uri)
    assert damaged.exists()
    assert [one.kind for one in damaged.verify()] == ["manifest"]
    with pytest.raises(Damaged):
        damaged.records()
    with pytest.raises(Damaged):
        damaged.verify(repair=True)


def test_no_folder_at_a_uri() -> None:
    """LanceDB's store in memory stands for an object store: nothing may ask for a folder."""
    store = Store("memory://library")
    assert not store.exists()
    store.create(**MODEL)
    filled(store, 3)
    assert check(store) == 3
    assert store.drop(["id1"]) == 1
    assert (store.bytes(), store.compact(alone=True)) == (None, 0)
    assert store.table("frames").count_rows() == sum(record.frames for record in store.records())
    assert store.verify() == ()


def test_what_cannot_be_reached_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LibraryError, match="cannot be used"):
        Store(str(tmp_path / "file" / "library")).create(**MODEL)
    with pytest.raises(LibraryError, match="cannot be used") as caught:
        Store("/proc/library").create(**MODEL)  # not even root can make it, and nothing is damaged
    assert not isinstance(caught.value, Damaged)
    # A port where nobody listens; options are passed through.
    options = {
        "aws_access_key_id": "a",
        "aws_secret_access_key": "b",
        "aws_region": "c",
        "endpoint": "http://127.0.0.1:9",
        "allow_http": "true",
        "client_max_retries": "0",
    }
    with pytest.raises(LibraryError, match=r"s3://bucket/library cannot be used.*127\.0\.0\.1:9"):
        Store("s3://bucket/library", storage_options=options).create(**MODEL)


def test_nothing_is_loaded_before_it_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from keyreel.library.store import Store; store = Store(sys.argv[1]); assert not store.exists(); "
        "print(sorted({'lancedb', 'pyarrow'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "library")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    shutil.rmtree(tmp_path / "library", ignore_errors=True)
