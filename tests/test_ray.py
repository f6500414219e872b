"""Indexing by Ray: what a library holds afterwards is what one machine puts there, whatever befalls the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyreel.config import IndexConfig
from keyreel.engine import Engine
from keyreel.library.library import Library
from keyreel.library.types import Added

pytest.importorskip("lancedb", reason="libraries need lancedb")
ray: Any = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.data", reason="Ray Data is not installed")

import keyreel.cluster.ray as own  # noqa: E402 - Ray is known to be there by now

# Ray's own; its sockets are closed when Python happens to look for them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLIPS = ("natural/bikes.mp4", "natural/chaplin.mp4", "natural/test.mp4", "natural/stream-of-water.mp4")
QUERIES = ("a man in a hat", "running water", "bicycles in a street")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two CPUs on this machine, as `index` starts one."""
    try:
        connection = own._connected(None, cpus=2, gpus=0)
        connection.__enter__()
    except Exception as error:  # noqa: BLE001 - a sandbox may refuse it its sockets or its shared memory
        pytest.skip(f"Ray does not start here: {type(error).__name__}: {error}")
    try:
        yield
    finally:
        connection.__exit__(None, None, None)


@pytest.fixture(scope="module")
def clips(media: Callable[[str], Path]) -> list[Path]:
    return [media(name) for name in CLIPS]


@pytest.fixture(scope="module")
def alone(clips: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that one machine makes of the clips."""
    folder = tmp_path_factory.mktemp("alone") / "library"
    with Engine.from_pretrained(threads=1) as engine, Library(folder, engine) as library:
        assert [added.change for added in library.add(clips)] == ["added"] * len(clips)
    return folder


def contents(library: Library) -> dict[str, Any]:
    """All that a library says of each video, but for names and times that differ from run to run."""
    found = {}
    for record in library.list():
        (block,) = library._store.vectors([record.generation])
        extras = library.extras(record.id)
        found[record.path] = (
            (record.id, record.frames, record.shots, record.tags, record.fingerprint, record.model_sha256),
            [getattr(block, name) for name in ("pts_seconds", "frame_index", "vectors", "shot", "keyframe", "weight")],
            [(one.pts_seconds, one.jpeg, one.attention.tolist()) for one in library.previews(record.id)],
            (extras.sprite, extras.vtt, extras.overview["keyframes"]),
        )
    return found


def assert_equal(found: Path, expected: Path) -> None:
    with (
        Engine.from_pretrained(threads=1) as engine,
        Library(found, engine) as mine,
        Library(expected, engine) as right,
    ):
        assert mine.verify() == ()
        own, reference = contents(mine), contents(right)
        assert own.keys() == reference.keys()
        for path, (facts, rows, previews, extras) in reference.items():
            assert own[path][0] == facts
            for array, other in zip(own[path][1], rows, strict=True):
                np.testing.assert_array_equal(array, other)
            assert own[path][2] == previews
            assert own[path][3] == extras
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
    # A line a video, and nothing of what is in it.
    assert all(added.record is None for added in found)
    lines = [own._line(added.path, added) for added in found]
    assert {type(value) for line in lines for value in line.values()} <= {str, float, int}
    assert_equal(tmp_path / "library", alone)
    again = own.index(clips, tmp_path / "library", IndexConfig(workers=2))
    assert {added.change for added in again} == {"unchanged"}


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_is_survived(clips: list[Path], alone: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        """Ends the process of a worker as soon as one is at work on a video."""
        while not killed:
            time.sleep(0.05)
            for name in os.listdir("/proc"):
                if name.isdigit() and _command(name).startswith(b"ray::MapWorker(FlatMap(_Worker)).submit"):
                    os.kill(int(name), signal.SIGKILL)
                    killed.append(int(name))
                    return

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = own.index(clips, tmp_path / "library", IndexConfig(workers=2))
    killer.join(timeout=60)
    assert len(killed) == 1
    assert {Path(added.path): added.change for added in found} == dict.fromkeys(clips, "added")
    assert_equal(tmp_path / "library", alone)


@pytest.mark.usefixtures("cluster")
def test_what_other_workers_did_before_they_died_is_known(clips: list[Path], tmp_path: Path) -> None:
    deadly, done, new = (str(clip) for clip in clips[:3])
    ledger = ray.remote(num_cpus=0)(own._Ledger).remote()
    for _ in range(3):
        ledger.begin.remote(deadly)
    known = own._line(done, Added(done, "added", None, None, 1.5))
    ledger.end.remote(known)
    job = {"uri": str(tmp_path / "library"), "engine": {"threads": 1}, "library": {}, "config": IndexConfig()}
    lines = own._Worker(job, ledger, 3)({"videos": [deadly, done, new]})
    assert [line["path"] for line in lines] == [deadly, done, new]
    assert [line["change"] for line in lines] == ["failed", "added", "added"]
    assert (lines[0]["error"], lines[1]) == (f"{deadly!r}: its worker died 3 times", known)
    with Library(tmp_path / "library") as library:
        assert [record.path for record in library.list()] == [new]
    # The next run begins anew.
    assert ray.get(ledger.known.remote([deadly, done])) == ({deadly: 0, done: 0}, {})
    job["engine"] = {"model": "no-such-model"}
    lines = own._Worker(job, ledger, 3)({"videos": [deadly]})
    assert [(line["change"], line["exit_code"]) for line in lines] == [("failed", 4)]  # that of a missing model


def _command(process: str) -> bytes:
    try:
        return Path("/proc", process, "cmdline").read_bytes()
    except OSError:
        return b""  # ended meanwhile


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
