"""Indexing by Ray: what a library holds afterwards is what one machine puts there, whatever befalls the workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import local_ray
import pytest
from library_process import content

from keyreel.config import IndexConfig
from keyreel.engine import Engine
from keyreel.library.library import Library
from keyreel.library.types import Added

pytest.importorskip("lancedb", reason="libraries need lancedb")
ray: Any = pytest.importorskip("ray", reason="Ray is not installed")

import keyreel.cluster.indexing as own  # noqa: E402 - Ray is known to be there by now

pytestmark = [pytest.mark.full, *local_ray.WARNINGS]
QUERIES = ("a man in a hat", "running water", "bicycles in a street")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray.started(cpus=2):
        yield


@pytest.fixture(scope="module")
def clips(media: Callable[[str], Path]) -> list[Path]:
    return [media(name) for name in local_ray.CLIPS]


@pytest.fixture(scope="module")
def alone(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that one machine makes of the clips."""
    folder = tmp_path_factory.mktemp("alone") / "library"
    with Engine.from_pretrained(threads=1) as engine, Library(folder, engine) as library:
        assert [added.change for added in library.add(clips)] == ["added"] * len(clips)
    return folder


def assert_equal(found: Path, expected: Path) -> None:
    with (
        Engine.from_pretrained(threads=1) as engine,
        Library(found, engine) as mine,
        Library(expected, engine) as right,
    ):
        assert mine.verify() == ()
        assert content(mine._tables) == content(right._tables)
        for query in QUERIES:
            hits = mine.search(query, k=5)
            assert hits == right.search(query, k=5)
            assert len(hits) == 5


@pytest.mark.usefixtures("cluster")
def test_the_library_is_the_one_that_a_single_machine_makes(clips: list[Path], alone: Path, tmp_path: Path) -> None:
    told: list[Added] = []
    gone = tmp_path / "gone.mp4"
    found = own.index([*clips, gone, clips[0]], tmp_path / "library", IndexConfig(workers=2), tell=told.append)
    assert found == told
    by_path = {Path(added.path): added for added in found}
    assert len(found) == len(by_path) == len(clips) + 1
    assert all(by_path[clip].change == "added" and by_path[clip].failure is None for clip in clips)
    assert by_path[gone].change == "failed"
    assert by_path[gone].failure is not None
    assert by_path[gone].failure.error.exit_code == 3  # that of a missing source
    assert "gone.mp4" in str(by_path[gone].failure.error)
    assert all(added.record is None for added in found)
    assert_equal(tmp_path / "library", alone)
    again = own.index(clips, tmp_path / "library", IndexConfig(workers=2))
    assert {added.change for added in again} == {"unchanged"}


@pytest.mark.usefixtures("cluster")
def test_dead_workers_and_deadly_videos(
    clips: list[Path], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker dies once; one video kills each worker that begins it."""
    once, deadly = tmp_path / "once", tmp_path / "deadly.mp4"
    deadly.write_bytes(clips[0].read_bytes())

    class Mortal(own.Worker):
        def add(self, video: str) -> Added:
            if video == str(deadly) or not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().add(video)

    monkeypatch.setattr(own, "Worker", Mortal)
    found = {
        Path(added.path): added for added in own.index([*clips, deadly], tmp_path / "library", IndexConfig(workers=2))
    }
    assert "its worker died 3 times" in str(found.pop(deadly).failure)
    assert {path: added.change for path, added in found.items()} == dict.fromkeys(clips, "added")
    assert_equal(tmp_path / "library", alone)


@pytest.mark.usefixtures("cluster")
def test_a_model_that_is_missing_fails_each_video(clips: list[Path], tmp_path: Path) -> None:
    found = own.index(clips[:2], tmp_path / "library", model="no-such-model")
    assert [added.failure and added.failure.error.exit_code for added in found] == [4, 4]


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ValueError, match="workers must be in 1"):
        own.index(["a.mp4"], "library", IndexConfig(workers=0))
    assert own.index([], "library") == []


@pytest.mark.usefixtures("cluster")
def test_ray_reports_nothing_and_has_no_dashboard() -> None:
    @ray.remote
    def reports() -> bool:
        from ray._common.usage import usage_lib

        return bool(usage_lib.usage_stats_enabled())

    assert ray.get(reports.remote()) is False
    assert ray.get_runtime_context().worker.node.address_info["webui_url"] in ("", None)
