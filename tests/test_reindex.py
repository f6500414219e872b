"""`keyreel library reindex`: another model for a library, resumable, the old answers until the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_bundle
from commands import document, run, write_clip

import keyreel
from keyreel.cli.documents import Index
from keyreel.config import IndexConfig
from keyreel.errors import LibraryError, ModelMismatch
from keyreel.library.reindex import reindex

NAMES = ("a.mp4", "b.mp4", "c.mp4")
BLACK = np.zeros((48, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.write_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def old_engine() -> Iterator[keyreel.Engine]:
    with keyreel.Engine.from_pretrained(device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def new_engine(tiny: Path) -> Iterator[keyreel.Engine]:
    with keyreel.Engine.from_pretrained(str(tiny), device="cpu") as engine:
        yield engine


@pytest.fixture
def library(old_engine: keyreel.Engine, tmp_path: Path) -> Path:
    """Three videos, one of which has moved since: its id is not that of its path."""
    for number, name in enumerate(NAMES):
        write_clip(tmp_path / name, frames=5 + 5 * number)
    with keyreel.Library(tmp_path / "lib", old_engine) as opened:
        opened.add([tmp_path / name for name in NAMES], IndexConfig(tags=("trip",)))
        (tmp_path / "c.mp4").rename(tmp_path / "d.mp4")
        opened.add([tmp_path / "d.mp4"])
    return tmp_path / "lib"


def ids(library: Path) -> dict[str, str]:
    with keyreel.Library(library) as opened:
        return {Path(record.path).name: record.id for record in opened.list()}


def test_all_videos_get_new_vectors_and_keep_their_ids(
    library: Path, new_engine: keyreel.Engine, tmp_path: Path
) -> None:
    before = ids(library)
    with pytest.raises(ModelMismatch):
        keyreel.Library(library, new_engine)
    done = reindex(str(library), new_engine)
    assert (done.done, done.videos, done.left) == (True, 3, ())
    assert ids(library) == before
    assert [path.name for path in library.iterdir() if path.name.startswith("reindex")] == []
    with keyreel.Library(library, new_engine) as opened, keyreel.Library(tmp_path / "fresh", new_engine) as fresh:
        assert {record.tags for record in opened.list()} == {("trip",)}
        fresh.add([tmp_path / name for name in ("a.mp4", "b.mp4", "d.mp4")])
        picture = np.full((48, 64, 3), (200, 10, 30), np.uint8)
        found, wanted = opened.search(picture, k=9), fresh.search(picture, k=9)
        assert [(hit.video, hit.score) for hit in found] == [(hit.video, hit.score) for hit in wanted]
        assert sum(1 + hit.folded for hit in found) == 3  # alike videos are folded
        assert opened.verify() == ()
    (library / f"reindex-{new_engine.bundle.sha256[:12]}").mkdir()  # of a run that was killed at its very end
    assert reindex(str(library), new_engine).done  # nothing is left to do
    assert [path.name for path in library.iterdir() if path.name.startswith("reindex")] == []


@pytest.mark.full
def test_a_library_in_shards(library: Path, old_engine: keyreel.Engine, new_engine: keyreel.Engine) -> None:
    before, picture = ids(library), np.full((48, 64, 3), (200, 10, 30), np.uint8)
    with keyreel.Library(library, old_engine) as opened:
        assert opened.reshard(2) == 3
    stopped = reindex(str(library), new_engine, stop=lambda: True)
    assert (stopped.done, stopped.videos) == (False, 0)
    with keyreel.Library(library, old_engine) as opened:
        assert len(opened.search(picture)) > 0
    assert reindex(str(library), new_engine).done
    assert ids(library) == before
    with keyreel.Library(library, new_engine) as opened:
        assert len(opened._tables.parts) == 2
        assert sum(1 + hit.folded for hit in opened.search(picture, k=9)) == 3
        assert opened.verify() == ()
    assert [path.name for path in library.iterdir() if path.name.startswith("reindex")] == []
    assert reindex(str(library), new_engine).done


def test_it_goes_on_where_it_was_and_the_old_model_answers(
    library: Path, old_engine: keyreel.Engine, new_engine: keyreel.Engine, tmp_path: Path
) -> None:
    with keyreel.Library(library, old_engine) as opened:
        answers = opened.search("a red circle", k=9)
        seen: list[str] = []
        first = reindex(str(library), new_engine, tell=lambda added: seen.append(added.path), stop=lambda: bool(seen))
        assert not first.done
        assert 0 < len(seen) < 3
        assert opened.search("a red circle", k=9) == answers
        write_clip(tmp_path / "e.mp4", frames=7)
        opened.add([tmp_path / "e.mp4"])  # others go on writing with the old model
        opened.remove([tmp_path / "a.mp4"])
    again: list[str] = []
    done = reindex(str(library), new_engine, tell=lambda added: again.append(added.path))
    assert done.done
    assert not set(seen) & set(again)
    assert sorted(ids(library)) == ["b.mp4", "d.mp4", "e.mp4"]


def test_a_video_that_is_gone_keeps_the_old_model(
    library: Path, old_engine: keyreel.Engine, new_engine: keyreel.Engine, tmp_path: Path
) -> None:
    (tmp_path / "b.mp4").unlink()
    kept = reindex(str(library), new_engine)
    assert (kept.done, [Path(record.path).name for record in kept.left]) == (False, ["b.mp4"])
    with keyreel.Library(library, old_engine) as opened:
        assert sum(1 + hit.folded for hit in opened.search("a red circle", k=9)) == 3
    done = reindex(str(library), new_engine, drop_failed=True)
    assert (done.done, done.videos) == (True, 2)
    with keyreel.Library(library, new_engine) as opened:
        assert {Path(r.path).name: r.status for r in opened.list()} == {"a.mp4": "ok", "b.mp4": "failed", "d.mp4": "ok"}
        assert sum(1 + hit.folded for hit in opened.search(BLACK, k=9)) == 2


def test_stopped_between_the_two_tables_it_is_finished_by_the_next_run(
    library: Path, new_engine: keyreel.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keyreel.library.table import Tables

    overwrite = Tables.overwrite

    def killed(tables: Tables, name: str, *rest: object) -> None:
        if name == "records":
            raise KeyboardInterrupt
        overwrite(tables, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Tables, "overwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        reindex(str(library), new_engine)
    monkeypatch.setattr(Tables, "overwrite", overwrite)
    assert reindex(str(library), new_engine).done
    with keyreel.Library(library, new_engine) as opened:
        assert sum(1 + hit.folded for hit in opened.search(BLACK, k=9)) == 3
        assert opened.verify() == ()


def test_the_command(library: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"no video")
    found = document(Index, "library", "reindex", library, "--model", tiny, code=8)
    assert sorted(video["change"] for video in found["videos"]) == ["added", "added", "failed"]
    write_clip(tmp_path / "b.mp4", frames=10)
    done = run("library", "reindex", library, "--model", tiny)
    assert "the library now has the model tiny" in done.stderr
    assert "tiny" in run("library", "stats", library).stdout
    with pytest.raises(LibraryError, match="there is no library"), keyreel.Engine.from_pretrained() as engine:
        reindex(str(tmp_path / "none"), engine)
