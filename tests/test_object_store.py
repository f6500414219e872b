"""A library in a bucket of a real S3 server: indexed, killed, resumed, searched, compacted, verified, spread."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from library_process import MODEL, check, content, do, fingerprints, made, start, steps, target
from s3_server import BUCKET, KEY, SECRET, Store, object_store

from keyreel import Engine, Library
from keyreel.config import LibraryConfig
from keyreel.errors import LibraryError
from keyreel.library.shards import open_tables, reshard
from keyreel.library.table import Tables
from keyreel.library.upkeep import compact, orphans, verify

pytestmark = pytest.mark.full
KILLS = int(os.environ.get("KEYREEL_KILLS", "12")) // 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with object_store(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """An address of a library, with credentials in the environment and nowhere else."""
    for name, value in store.credentials.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.mark.parametrize("shards", [1, 2])
def test_videos_are_indexed_and_found(bucket: str, shards: int, media: Callable[[str], Path], tmp_path: Path) -> None:
    """As in a folder."""
    clips = [media("natural/bikes.mp4"), media("natural/chaplin.mp4")]
    uri = f"s3://{BUCKET}/films-{shards}"
    with (
        Engine.from_pretrained(threads=1) as engine,
        Library(uri, engine, config=LibraryConfig(shards=shards)) as there,
        Library(tmp_path / "library", engine) as here,
    ):
        assert not there.exists()
        for library in (there, here):
            assert [added.change for added in library.add(clips)] == ["added", "added"]
        assert [added.change for added in there.add(clips)] == ["unchanged", "unchanged"]
        for query in ("bicycles in a street", "a man in a hat"):
            assert there.search(query, k=6) == here.search(query, k=6)
        assert there.stats().bytes is None
        assert there.compact() == 0
        assert there.verify() == ()
        assert [record.path for record in there.remove([str(clips[0])])] == [str(clips[0])]
        assert [record.path for record in there.list()] == [str(clips[1])]
        hit = there.search("a man in a hat")[0]
        assert there.preview(hit.video_id, hit.keyframe_seconds).startswith(b"\xff\xd8")


def test_a_kill_loses_no_committed_video(bucket: str) -> None:
    """A writer is killed again and again; the next one goes on, and in the end all is there."""
    draw, done = random.Random(1), 0
    for kill in range(KILLS):
        with start(bucket, "sync", kill) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            for _ in range(draw.randrange(4, 30)):
                line = writer.stdout.readline()
                done += line.startswith("done put")
            writer.kill()
        tables = Tables(bucket)
        if tables.exists():
            check(tables)
            assert {finding.kind for finding in verify(tables)} <= {"orphans"}
    assert done
    tables = Tables(bucket)
    tables.create(**MODEL)
    for verb, what in steps(tables, 50):
        do(tables, verb, what)
    assert fingerprints(tables) == {id: "{}:{}".format(*state) for id, state in target(50).items()}
    check(tables)
    compact(tables, alone=True)
    assert orphans(tables, 0.0) == {}
    assert verify(tables) == ()


def test_two_writers_at_once(bucket: str) -> None:
    """Lance commits a version by a PUT that must not replace another's, so no lock is needed beside the bucket."""
    writers = [start(bucket, "write", first, 6) for first in (0, 100)]
    for writer in writers:
        with writer:
            assert writer.stdout is not None
            assert writer.stdout.read().splitlines()[-1] == "done"
        assert writer.returncode == 0
    tables = Tables(bucket)
    expected = {f"id{number}": f"{number}:2" for first in (0, 100) for number in range(first + 1, first + 6)}
    found = fingerprints(tables)
    assert found.pop("id999") in {f"999:{first + 5}" for first in (0, 100)}  # which both wrote
    assert found == expected
    check(tables)
    assert verify(tables) == ()


def test_a_library_is_spread_in_the_bucket(bucket: str) -> None:
    tables = Tables(bucket)
    tables.create(**MODEL)
    for number in range(6):
        tables.put(*made(number, 1))
    whole = content(tables)
    for count in (3, 2):
        assert reshard(bucket, count) == 6
        parts = open_tables(bucket).parts
        assert len(parts) == count
        assert {path: video for part in parts for path, video in content(part).items()} == whole
        assert not Tables(bucket).exists()
    assert not any(Tables(f"{bucket}/shard-{n:04}-of-0003").exists() for n in range(3))


def test_credentials_come_from_the_usual_chain(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a profile's file as well; wrong ones and none are errors that say where, and print no secret."""
    for name in store.credentials:
        monkeypatch.delenv(name, raising=False)
    for name, value in store.place.items():
        monkeypatch.setenv(name, value)
    profile, uri = tmp_path / "credentials", f"s3://{BUCKET}/chain"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    profile.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    tables = Tables(uri)
    tables.create(**MODEL)
    tables.put(*made(1, 1))
    assert check(Tables(uri)) == 1
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-one")
    with pytest.raises(LibraryError, match=r"s3://films/chain cannot be used") as caught:
        Tables(uri).records()
    assert "a-wrong-one" not in str(caught.value)
