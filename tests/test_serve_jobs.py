"""Jobs of the service: what was accepted is done, whatever happens to the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from encoded_clips import encode
from served import Served, served, until

from keyreel import Engine, Library
from keyreel.config import ServeConfig
from keyreel.errors import LibraryError, SourceError
from keyreel.library.types import Added
from keyreel.serve import jobs as jobs_module
from keyreel.serve.jobs import Jobs
from keyreel.serve.metrics import Metrics
from keyreel.serve.models import Job, Problem
from keyreel.serve.security import ApiError, to_api_error

VIDEOS = int(os.environ.get("KEYREEL_SERVE_JOBS", "8"))


class Work:
    """Stands for the library: each video takes until it is let go, and what was done is remembered."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.done: list[str] = []
        self.forgotten: list[str] = []
        self.known: set[Path] = set()  # what the library has
        self.go = threading.Semaphore(0)
        self.tell: Callable[..., None] = lambda *_: None
        self.wrong: dict[str, Exception] = {}
        self.forgetting: Callable[[], None] = lambda: None

    def add(self, path: Path, tell: Any, stop: Callable[[], bool]) -> Added | None:
        self.begun.append(path.name)
        self.tell = tell
        while not self.go.acquire(timeout=0.01):
            if stop():
                return None
        if path.name in self.wrong:
            raise self.wrong[path.name]
        self.done.append(path.name)
        return Added(str(path), "added", None, None, 0.0)

    def forget(self, path: Path) -> None:
        self.forgotten.append(path.name)
        self.forgetting()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def jobs(tmp_path: Path, work: Work) -> Iterator[Jobs]:
    with working(tmp_path, work, max_jobs=3) as made:
        yield made


@contextlib.contextmanager
def working(folder: Path, work: Work, **options: Any) -> Iterator[Jobs]:
    config = ServeConfig(**options)
    made = Jobs(folder / "state", work.add, work.forget, work.known.__contains__, config, Metrics(), ("/srv/library",))
    made.start()
    yield made
    made.drain(0)


def submit(jobs: Jobs, name: str | Path, **more: Any) -> Job:
    return jobs.submit(Path("/videos") / name, **more)


def sql(jobs: Jobs, statement: str, *values: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(jobs.folder / "jobs.sqlite", isolation_level=None)) as base:
        return base.execute(statement, values).fetchall()


def upload(jobs: Jobs, name: str) -> Job:
    part = jobs.uploads / f"{name}.part"
    part.write_bytes(b"x")
    return submit(jobs, jobs.uploads / name / name, id=name, part=part)


def test_one_after_another_in_the_order_given(jobs: Jobs, work: Work) -> None:
    made = [submit(jobs, name) for name in ("a", "b", "c")]
    until(lambda: work.begun == ["a"])
    assert [jobs.get(job.id).state for job in made] == ["running", "queued", "queued"]
    assert jobs.counts() == {"queued": 2, "running": 1}
    assert [job.path.name for job in jobs.latest()] == ["c", "b", "a"]
    work.go.release(3)
    until(lambda: all(jobs.get(job.id).state == "done" for job in made))
    assert work.done == ["a", "b", "c"]
    assert [job.progress for job in jobs.latest()] == [1.0] * 3


def test_progress_rises_to_the_end(jobs: Jobs, work: Work) -> None:
    job = submit(jobs, "a")
    until(lambda: work.begun == ["a"])
    seen = [jobs.get(job.id).progress]
    for told in (("encode", 2.0, 10.0), ("encode", 1.0, None), ("encode", 12.0, 10.0), ("thumbnails", 1.0, 3.0)):
        work.tell(*told)
        seen.append(jobs.get(job.id).progress)
    np.testing.assert_allclose(seen, [0.0, 0.18, 0.18, 0.9, 0.95])


def test_cancelled_before_and_while_it_is_worked_on(jobs: Jobs, work: Work) -> None:
    first, second = submit(jobs, "a"), submit(jobs, "b")
    until(lambda: work.begun == ["a"])
    assert jobs.cancel(second.id).state == "cancelled"
    jobs.cancel(first.id)
    until(lambda: jobs.get(first.id).state == "cancelled")
    third = submit(jobs, "c")
    work.go.release()
    until(lambda: jobs.get(third.id).state == "done")
    assert jobs.cancel(third.id).state == "done"
    assert (work.begun, work.done) == (["a", "c"], ["c"])
    with pytest.raises(ApiError, match="no such job"):
        jobs.cancel("nobody")


def test_a_full_queue_refuses_and_takes_again(jobs: Jobs, work: Work) -> None:
    submit(jobs, "a")
    until(lambda: work.begun == ["a"])
    for name in ("b", "c", "d"):
        submit(jobs, name)
    for refuse in (jobs.check_room, lambda: submit(jobs, "e")):
        with pytest.raises(ApiError) as refused:
            refuse()
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "10"})
    work.go.release(1)
    until(lambda: len(work.begun) == 2)
    submit(jobs, "e")
    work.go.release(4)
    until(lambda: work.done == ["a", "b", "c", "d", "e"])


def test_uploads_keep_to_their_quota(tmp_path: Path, work: Work) -> None:
    with working(tmp_path, work, upload_quota=100, upload_bytes=80) as jobs:
        upload(jobs, "a")  # one byte
        assert jobs.stored_bytes() == 1
        with jobs.space(60) as most:
            assert most == 80
            with jobs.space(30) as left:  # the first one counts as what it says it is
                assert left == 39
            with pytest.raises(ApiError, match="may take 100 bytes and 39 are left") as refused, jobs.space(40):
                pass
            assert (refused.value.status, refused.value.kind) == (507, "storage")
            with pytest.raises(ApiError), jobs.space(None):  # of any length
                pass
        with jobs.space(None) as most:
            assert most == 80
    with working(tmp_path / "other", work) as jobs, jobs.space(None) as most:
        assert most == ServeConfig().upload_bytes


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_uploads_that_vanish_meanwhile_take_no_space(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    with working(tmp_path, work) as jobs:
        upload(jobs, "a")
        gone = jobs.uploads / "gone"
        gone.mkdir()
        (gone / "b").write_bytes(b"12345")
        assert jobs.stored_bytes() == 6
        scan = os.scandir

        def vanishing(path: str | Path = ".") -> Any:
            if Path(path).name != "gone":
                return scan(path)
            found = scan(path)
            entries = [] if whole else list(found)
            found.close()
            (gone / "b").unlink()
            if whole:
                gone.rmdir()
                return scan(path)
            return contextlib.nullcontext(iter(entries))

        monkeypatch.setattr(os, "scandir", vanishing)
        assert jobs.stored_bytes() == 1
        assert not (gone / "b").exists()


def test_what_a_killed_process_left_is_swept(tmp_path: Path, work: Work) -> None:
    with working(tmp_path, work) as jobs:
        made = {name: upload(jobs, name) for name in ("done", "cancelled", "failed", "forgotten", "known")}
        work.go.release(5)
        until(lambda: jobs.get("known").state == "done")
        for state in ("cancelled", "failed"):
            sql(jobs, "UPDATE jobs SET state = ? WHERE id = ?", state, state)
        sql(jobs, "DELETE FROM jobs WHERE id IN ('forgotten', 'known')")
        folder = jobs.folder / "open-1"
        folder.mkdir()
        (folder / "a.mp4").symlink_to("/proc/self/fd/999")
    work.known.add(made["known"].path)
    with working(tmp_path, work) as jobs:
        assert sorted(path.name for path in jobs.uploads.iterdir()) == ["done", "known"]
        assert not folder.exists()
    assert work.forgotten == ["cancelled", "failed"]


def test_what_fails_says_why_and_an_upload_goes_with_it(jobs: Jobs, work: Work) -> None:
    """And no message tells a folder."""
    work.wrong = {
        "a": SourceError("/videos/a: no video", hint="try another"),
        "b": OSError(5, "broken", str(jobs.uploads / "b" / "b")),
        "c": LibraryError("/srv/library: cannot be written"),
    }
    first, second, third = submit(jobs, "a"), upload(jobs, "b"), submit(jobs, "c")
    assert [one.relative_to(jobs.uploads).as_posix() for one in jobs.uploads.rglob("*")] == ["b", "b/b"]
    work.go.release(3)
    until(lambda: jobs.get(third.id).state == "failed")
    assert [jobs.get(job.id).error for job in (first, second, third)] == [
        Problem(kind="source", message="a: no video", hint="try another"),
        Problem(kind="failed", message="OSError: [Errno 5] broken: 'b'", hint=None),
        Problem(kind="library", message="library: cannot be written", hint=None),
    ]
    assert work.forgotten == ["b"]  # a path of the user's stays in the library as failed
    assert list(jobs.uploads.iterdir()) == []


def test_the_end_puts_back_what_it_interrupts(tmp_path: Path, work: Work) -> None:
    with working(tmp_path, work) as first:
        made = [submit(first, name) for name in ("a", "b")]
        until(lambda: work.begun == ["a"])
    with pytest.raises(ApiError, match="ending"):
        first.check_room()
    assert work.done == []
    with working(tmp_path, work) as second:
        work.go.release(2)
        until(lambda: [second.get(job.id).state for job in made] == ["done", "done"])
    assert work.done == ["a", "b"]


def test_the_end_waits_for_what_is_under_way(jobs: Jobs, work: Work) -> None:
    made = [submit(jobs, name) for name in ("a", "b")]
    until(lambda: work.begun == ["a"])
    threading.Timer(0.2, work.go.release).start()
    jobs.drain(20)
    assert work.done == ["a"]  # and "b" did not begin
    assert dict(sql(jobs, "SELECT id, state FROM jobs")) == {made[0].id: "done", made[1].id: "queued"}


def test_what_was_cancelled_stays_so_when_the_service_ends(jobs: Jobs, work: Work) -> None:
    job = submit(jobs, "a")
    until(lambda: work.begun == ["a"])
    jobs.cancel(job.id)
    jobs.drain(0)
    assert sql(jobs, "SELECT state FROM jobs") == [("cancelled",)]


def test_a_video_that_takes_the_process_with_it_is_given_up(tmp_path: Path, work: Work) -> None:
    """A crash leaves the row at work, without its thread to say how it ended."""
    with working(tmp_path, work) as jobs:
        job = upload(jobs, "a")
        until(lambda: work.begun == ["a"])
    for tries, states in ((1, ("queued", "running")), (2, ("queued", "running")), (3, ("failed",))):
        assert job.path.exists()
        sql(jobs, "UPDATE jobs SET state = 'running', tries = ?", tries)
        with working(tmp_path, work) as again:
            found = again.get(job.id)
        assert found.state in states, tries
    assert found.error is not None
    assert "3 times" in found.error.message
    assert work.forgotten == ["a"]
    assert list(jobs.uploads.iterdir()) == []


def test_a_library_that_cannot_forget_holds_nobody_up(jobs: Jobs, work: Work) -> None:
    """Requests look at the jobs on the event loop, too."""
    entered, go = threading.Event(), threading.Event()

    def fail() -> None:
        entered.set()
        assert go.wait(60)
        raise LibraryError("the disk is full")

    work.forgetting, work.wrong = fail, {"a": SourceError("no video")}
    first, second = upload(jobs, "a"), submit(jobs, "b")
    work.go.release(2)
    assert entered.wait(60)
    other = threading.Thread(target=jobs.counts, daemon=True)
    other.start()
    other.join(20)
    held = other.is_alive()
    go.set()
    assert not held
    until(lambda: jobs.get(second.id).state == "done")
    assert jobs.get(first.id).state == "failed"


def test_uploads_are_finished_or_swept_at_the_start(tmp_path: Path, work: Work) -> None:
    """The process ended between accepting an upload and naming it, and while another one came in."""
    with working(tmp_path, work) as jobs:
        (jobs.uploads / "accepted.part").write_bytes(b"whole")
        (jobs.uploads / "half.part").write_bytes(b"ha")
    values = "('accepted', 'queued', ?, 1, 0)"
    path = str(jobs.uploads / "accepted" / "v.mp4").encode()
    sql(jobs, f"INSERT INTO jobs (id, state, path, uploaded, created) VALUES {values}", path)
    with working(tmp_path, work) as again:
        there = {one.relative_to(again.uploads).as_posix() for one in again.uploads.rglob("*")}
        assert there == {"accepted", "accepted/v.mp4"}
        work.go.release()
        until(lambda: again.get("accepted").state == "done")
    assert work.done == ["v.mp4"]


def test_a_full_disk_loses_nothing(tmp_path: Path, work: Work) -> None:
    """SQLite is told that its file may not grow: what was accepted stays, what comes is refused as such."""

    def fill(jobs: Jobs) -> None:
        for _ in range(200):
            submit(jobs, "x" * 100)

    with working(tmp_path, work) as jobs:
        first = submit(jobs, "a")
        until(lambda: work.begun == ["a"])
        base = jobs._base
        assert base is not None
        (pages,) = base.execute("PRAGMA page_count").fetchone()
        base.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(sqlite3.OperationalError, match="full") as full:
            fill(jobs)
        refused = to_api_error(full.value)
        assert refused is not None
        assert (refused.status, refused.kind) == (507, "storage")
        accepted = [job.id for job in jobs.latest()]
        work.go.release()
        until(lambda: work.done == ["a"])
    with working(tmp_path, work) as again:
        assert [job.id for job in again.latest()] == accepted
        work.go.release(1000)
        until(lambda: all(again.get(id).state == "done" for id in accepted))
    assert first.id in accepted


def test_old_jobs_are_forgotten_and_open_ones_are_not(jobs: Jobs, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "KEPT", 4)
    for name in "abcdefghi":
        submit(jobs, name)
        work.go.release()
        until(lambda: sum(jobs.counts().get(state, 0) for state in ("queued", "running")) == 0)
    assert [job.path.name for job in jobs.latest()] == list("ihgf")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs").resolve() / "videos"
    folder.mkdir()
    for number in range(VIDEOS):
        encode(folder / f"v{number}", codec="libx264", container="mp4", seed=number, frames=25)
    return folder


def call(running: Served, paths: list[Path], accepted: list[str], stopping: threading.Event) -> None:
    """A caller who submits videos, every other one as an upload, and searches, until the service is gone."""
    with httpx.Client(base_url=running.address, timeout=30, trust_env=False) as client:
        for number, path in enumerate(paths):
            body = {"files": {"file": (path.name, path.read_bytes())}} if number % 2 else {"json": {"path": str(path)}}
            try:
                answer = client.post("/api/v1/jobs", **body)
                if answer.status_code == 202:
                    accepted.append(answer.json()["id"])
                else:
                    assert (answer.status_code, stopping.is_set()) == (503, True), answer.text
                client.get("/api/v1/search", params={"q": "x"})
            except httpx.HTTPError:
                assert stopping.is_set()
                return


@pytest.mark.full
def test_no_accepted_job_is_lost(videos: Path, tmp_path: Path) -> None:
    """The process is told to end, then killed, while callers submit paths and uploads and search."""
    accepted: list[str] = []
    paths = sorted(videos.iterdir())
    options = {"roots": [str(videos)], "drain_seconds": 0.1}
    for end, share in ((signal.SIGTERM, paths[: VIDEOS // 2]), (signal.SIGKILL, paths[VIDEOS // 2 :])):
        stopping, enough = threading.Event(), len(accepted) + VIDEOS // 4
        with served(tmp_path / "library", **options) as running, ThreadPoolExecutor(2) as callers:
            calls = [callers.submit(call, running, share[half::2], accepted, stopping) for half in range(2)]
            until(lambda: len(accepted) >= enough or all(one.done() for one in calls))  # noqa: B023 - used at once
            stopping.set()
            assert running.stop(end) == (0 if end == signal.SIGTERM else -end)
            for one in calls:
                one.result(30)
    with served(tmp_path / "library", **options) as running:
        jobs = [running.wait(id, "done", "failed", "cancelled") for id in accepted]
        assert [(job["state"], job["error"]) for job in jobs] == [("done", None)] * len(jobs)
        assert running.stop() == 0
    assert len(jobs) >= 4
    leftovers = {path.suffix for path in (tmp_path / "library" / "serve" / "uploads").rglob("*") if path.is_file()}
    assert leftovers <= {".mp4"}
    # What came out of it is what an undisturbed run gives.
    with Engine.from_pretrained(device="cpu", threads=1) as engine, Library(tmp_path / "library", engine) as library:
        assert library.verify() == ()
        with Library(tmp_path / "other", engine) as other:
            for record in (library.record(job["video"]) for job in jobs):
                (added,) = other.add([record.path])
                assert added.record is not None
                own = [preview.jpeg for preview in library.previews(record.id)]
                assert own == [preview.jpeg for preview in other.previews(added.record.id)]
                assert (record.frames, record.shots) == (added.record.frames, added.record.shots)


@pytest.mark.full
def test_a_job_at_work_tells_how_far_it_is_and_can_be_stopped(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    long = encode(folder / "long", codec="libx264", container="mp4", frames=1800, gop=250)
    with served(folder / "library", roots=[str(folder)]) as running:
        id = running.http.post("/api/v1/jobs", json={"path": str(long)}).json()["id"]
        seen: list[float] = []
        while not seen or (seen[-1] == 0.0 and running.http.get(f"/api/v1/jobs/{id}").json()["state"] != "done"):
            seen.append(running.http.get(f"/api/v1/jobs/{id}").json()["progress"])
        assert 0 < seen[-1] < 1
        assert running.http.delete(f"/api/v1/jobs/{id}").status_code == 200
        assert running.wait(id, "cancelled", "done")["state"] == "cancelled"
        assert running.http.get("/api/v1/videos").json()["total"] == 0
        assert long.exists()
