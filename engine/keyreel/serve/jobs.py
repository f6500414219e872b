"""The queue of videos to index. It is on disk and outlives the process.

A job is accepted when its row is on disk. The next start resumes jobs that were queued or running when the process
ended, in whatever way. Adding a video twice is harmless: the library skips known videos.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from keyreel.config import ServeConfig
from keyreel.errors import LibraryError
from keyreel.library.types import Added
from keyreel.runtime.telemetry import span
from keyreel.serve.files import discard, file_name
from keyreel.serve.metrics import Metrics
from keyreel.serve.models import Job, State
from keyreel.serve.security import ApiError, problem, too_busy
from keyreel.types import Progress

_log = logging.getLogger(__name__)

Work = Callable[[Path, Progress, Callable[[], bool]], Added | None]

OPEN = "open-"  # prefix of folders with a link to an open file
KEPT = 1000  # finished jobs to remember
STOP_SECONDS = 5.0  # seconds for a job to notice that it should stop
MAX_TRIES = 3  # a video that crashes the process must not do so at each start
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    path BLOB NOT NULL,
    uploaded INTEGER NOT NULL,
    created REAL NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    video TEXT,
    error TEXT
)"""


class _Running:
    """The state of a running job that is not on disk."""

    def __init__(self) -> None:
        self.progress = 0.0
        self.cancelled = self.interrupted = False  # by a caller; by the end of the service

    def stopped(self) -> bool:
        return self.cancelled or self.interrupted

    def report(self, stage: str, done: float, total: float | None) -> None:
        """Records the progress of the frames; later stages take little time."""
        if stage == "encode" and total:
            self.progress = max(self.progress, min(done / total, 1.0) * 0.9)
        elif stage != "encode":
            self.progress = max(self.progress, 0.95)


class Jobs:
    """The queue, and the threads that work on it.

    Args:
        folder: of the queue and the uploads; created at the start. One process at a time may use it.
        work: adds one video to the library; reports progress, checks whether to stop; returns None if stopped.
        forget: removes a failed video from the library, by path.
        known: whether the library has a video, by path.
        private: paths to redact in errors.
    """

    part_seconds = 0.0  # younger partial uploads belong to other processes

    def __init__(
        self,
        folder: Path,
        work: Work,
        forget: Callable[[Path], None],
        known: Callable[[Path], bool],
        config: ServeConfig,
        metrics: Metrics,
        private: Sequence[str] = (),
    ) -> None:
        self.folder, self.uploads = folder, folder / "uploads"
        self._work, self._forget, self._known = work, forget, known
        self._config, self._metrics = config, metrics
        self._private = tuple(private)
        self._changed = threading.Condition(threading.RLock())
        self._base: sqlite3.Connection | None = None
        self._lock: BinaryIO | None = None
        self._running: dict[str, _Running] = {}
        self._threads: list[threading.Thread] = []
        self._coming: list[int] = []  # bytes of the uploads in progress
        self._ending = False
        metrics.watch(self.counts, self.stored_bytes)

    def start(self) -> None:
        """Starts the threads, and resumes unfinished jobs. Idempotent.

        Raises:
            LibraryError: another process uses this folder, or it cannot be written.
        """
        with self._changed:
            if self._base is not None:
                return
            try:
                self.uploads.mkdir(parents=True, exist_ok=True)
                self._lock = (self.folder / "lock").open("wb")
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._open()
            except BlockingIOError as error:
                if self._lock:
                    self._lock.close()
                hint = "stop it, or give this one another folder"
                raise LibraryError(f"{self.folder}: another server works here", hint=hint) from error
            except (OSError, sqlite3.Error) as error:
                hint = "give the service a folder that it may write (--folder)"
                raise LibraryError(f"{self.folder}: cannot be used: {error}", hint=hint) from error
            self._ending = False
            for number in range(self._config.job_threads):
                # Daemons: a video that hangs in a decoder must not keep the process alive.
                thread = threading.Thread(target=self._run, name=f"keyreel-job-{number}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def check_room(self) -> None:
        """Raises ApiError 429 if the queue is full, 503 if the service is ending."""
        with self._changed:
            if self._ending:
                raise _ending()
            self.start()
            if self.counts()["queued"] >= self._config.max_jobs:
                raise too_busy("jobs", 10)

    @contextmanager
    def space(self, length: int | None) -> Iterator[int]:
        """Reserves space for an upload during the block. Yields how many bytes it may take.

        Args:
            length: bytes of the whole request, if known.

        Raises:
            ApiError: 507, the uploads have reached `ServeConfig.upload_quota`.
        """
        most, quota = self._config.upload_bytes, self._config.upload_quota
        if quota is None:
            yield most
            return
        with self._changed:
            left = quota - self.stored_bytes() - sum(self._coming)
            wanted = most if length is None else min(length, most)
            if left < min(wanted, quota) or left <= 0:
                kept = f"the uploads may take {quota} bytes and {max(left, 0)} are left"
                raise ApiError(507, "storage", kept, hint="remove videos that were uploaded, or raise --upload-quota")
            self._coming.append(min(wanted, left))
        try:
            yield min(most, left)
        finally:
            with self._changed:
                self._coming.remove(min(wanted, left))

    def stored_bytes(self) -> int:
        """Bytes of all complete uploads."""
        size = 0
        # A job may end and delete its folder meanwhile. Unlike `Path.glob`, this skips missing folders.
        for name in glob.iglob("*/*", root_dir=self.uploads, include_hidden=True):
            with suppress(FileNotFoundError):
                size += (self.uploads / name).stat().st_size
        return size

    def submit(self, path: Path, *, id: str | None = None, part: Path | None = None) -> Job:
        """Accepts a job. When it returns, the job is on disk.

        Args:
            part: a complete upload on disk, named after the id; it is renamed to `path`.

        Raises:
            ApiError: 429, the queue is full; 503, the service is ending.
        """
        id = id or uuid.uuid4().hex
        with self._changed:
            self.check_room()
            self._write(
                "INSERT INTO jobs (id, state, path, uploaded, created) VALUES (?, 'queued', ?, ?, ?)",
                (id, os.fsencode(path), part is not None, time.time()),
            )
            if part is not None:  # if the process ends before, the next start renames it
                _rename(part, path)
            self._write(
                "DELETE FROM jobs WHERE state IN ('done', 'failed', 'cancelled') AND number <= "
                "(SELECT max(number) FROM jobs) - ?",
                (KEPT,),
            )
            self._changed.notify_all()
            return self.get(id)

    def get(self, id: str) -> Job:
        """Returns a job.

        Raises:
            ApiError: 404.
        """
        found = self._read("WHERE id = ?", (id,))
        if not found:
            raise ApiError(404, "not_found", "there is no such job")
        return found[0]

    def latest(self) -> list[Job]:
        """All remembered jobs, the latest first."""
        return self._read("ORDER BY number DESC")

    def counts(self) -> dict[str, int]:
        """The number of jobs in each state."""
        with self._changed:
            rows = [] if self._base is None else self._base.execute("SELECT state, count(*) FROM jobs GROUP BY state")
            return {"queued": 0, "running": 0, **dict(rows)}

    def cancel(self, id: str) -> Job:
        """Removes a job from the queue, or stops a running one. A job that is over does not change.

        Raises:
            ApiError: 404.
        """
        with self._changed:
            job = self.get(id)
            if job.state == "queued":
                self._end(job, "cancelled")
            elif id in self._running:
                self._running[id].cancelled = True
        if job.state == "queued":
            self._discard(job)
        return self.get(id)

    def drain(self, seconds: float) -> None:
        """Waits up to `seconds` for running jobs, then stops them and queues them again. Blocks. Idempotent."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, timeout=seconds)
            for running in self._running.values():
                running.interrupted = True
        # Jobs stop between batches of frames. One that does not is abandoned; its row stays "running".
        until = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            if self._base and self._lock and not any(thread.is_alive() for thread in self._threads):
                self._base.close()
                self._base = None
                self._threads.clear()
                self._lock.close()

    def _open(self) -> None:
        base = sqlite3.connect(self.folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        base.row_factory = sqlite3.Row
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute(_SCHEMA)
        self._base = base
        for job in self._read("WHERE state = 'running' AND tries >= ?", (MAX_TRIES,)):
            self._discard(job)
            message = f"the service ended {MAX_TRIES} times while at work on it"
            self._end(job, "failed", error={"kind": "crashed", "message": message, "hint": None})
        self._write("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
        for part in self.uploads.glob("*.part"):
            accepted = self._read("WHERE id = ?", (part.stem,))
            if accepted:
                _rename(part, accepted[0].path)
                continue
            with suppress(FileNotFoundError):
                if part.stat().st_mtime <= time.time() - self.part_seconds:
                    part.unlink()
        self._sweep()

    def _sweep(self) -> None:
        """Deletes leftovers of a killed process: uploads whose job ended without a video, and links to open files."""
        for folder in self.folder.glob(f"{OPEN}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.uploads.glob("*/*"):
            found = self._read("WHERE id = ?", (path.parent.name,))
            if found and found[0].state in ("failed", "cancelled"):
                self._discard(found[0])
            elif not found and not self._known(path):  # of a forgotten job
                discard(path)

    def _run(self) -> None:
        while not self._ending:
            try:
                self._next()
            except sqlite3.Error:  # a full disk: the rows stay, and the next call tries again
                _log.exception("the queue of jobs cannot be written")
                time.sleep(1)

    def _next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self.counts()["queued"])
            if self._ending:
                return
            job = self._read("WHERE state = 'queued' ORDER BY number LIMIT 1")[0]
            self._write("UPDATE jobs SET state = 'running', tries = tries + 1 WHERE id = ?", (job.id,))
            running = self._running[job.id] = _Running()
        began = time.perf_counter()
        added, error = None, None
        try:
            with span("keyreel.job"):
                added = self._work(job.path, running.report, running.stopped)
        except Exception as caught:  # noqa: BLE001 - the job ends, the thread goes on
            error = caught
        if added is not None and added.failure is not None:
            error = added.failure.error
        state: State = "failed"
        if error is None and added is not None:
            state = "done"
        elif running.stopped():
            state = "cancelled" if running.cancelled else "queued"
        if state in ("failed", "cancelled"):
            self._discard(job)
        with self._changed:
            del self._running[job.id]
            self._changed.notify_all()
            self._metrics.job_seconds.observe(time.perf_counter() - began)
            if state == "queued":  # interrupted by the end of the service
                self._write("UPDATE jobs SET state = 'queued', tries = tries - 1 WHERE id = ?", (job.id,))
            elif state == "failed":
                error = error or LibraryError("the file no longer exists")
                names = (str(job.path), added.path if added else "", *self._private)
                self._end(job, state, error=problem(error, *names))
            else:
                record = added.record if added else None
                self._end(job, state, video=record.id if record and state == "done" else None)

    def _discard(self, job: Job) -> None:
        """Deletes an upload that did not become a video: nobody can see it, and it would fill the disk.

        Not under the lock: the library may be slow.
        """
        if job.uploaded:
            try:
                self._forget(job.path)
                discard(job.path)
            except Exception:  # noqa: BLE001 - the job is over all the same
                _log.exception("%s cannot be removed", job.path.name)

    def _end(self, job: Job, state: State, *, video: str | None = None, error: Mapping[str, Any] | None = None) -> None:
        self._write(
            "UPDATE jobs SET state = ?, video = ?, error = ? WHERE id = ?",
            (state, video, error and json.dumps(error), job.id),
        )
        self._metrics.jobs_ended.labels(state).inc()

    def _write(self, statement: str, values: tuple[Any, ...] = ()) -> None:
        if self._base is None:
            raise _ending()
        self._base.execute(statement, values)

    def _read(self, rest: str, values: tuple[Any, ...] = ()) -> list[Job]:
        with self._changed:
            if self._base is None:
                return []
            return [self._job(row) for row in self._base.execute(f"SELECT * FROM jobs {rest}", values).fetchall()]

    def _job(self, row: sqlite3.Row) -> Job:
        path, running = Path(os.fsdecode(row["path"])), self._running.get(row["id"])
        progress = running.progress if running else float(row["state"] == "done")
        found = dict(row) | {"path": path, "error": row["error"] and json.loads(row["error"])}
        return Job(**found, progress=progress, name=file_name(str(path)))


def _ending() -> ApiError:
    return ApiError(503, "ending", "the service is ending", headers={"Retry-After": "10"})


def _rename(part: Path, path: Path) -> None:
    """Renames an upload, durably."""
    path.parent.mkdir(exist_ok=True)
    part.rename(path)
    for folder in (path.parent, path.parent.parent):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
