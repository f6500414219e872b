"""The work of the routes, without HTTP. Every call blocks: run it in a thread."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from keyreel import Library
from keyreel.config import ServeConfig
from keyreel.errors import LibraryError
from keyreel.library.files import path_of
from keyreel.library.types import Added, Extras, Filter, Record
from keyreel.serve import models
from keyreel.serve.files import Roots, discard, file_name, own_name
from keyreel.serve.jobs import OPEN, Jobs
from keyreel.serve.metrics import Metrics
from keyreel.serve.playable import Copies
from keyreel.serve.security import ApiError, redact_paths
from keyreel.serve.workers import Answer, Batcher, Pool
from keyreel.types import Combined, Example, Progress, Query

MAX_RESULTS = 100  # most hits of a search
CURVE_POINTS = 600
_ID = re.compile("[0-9a-f]{32}")


class Service:
    """A library, its queue of jobs, and the limits on both.

    Args:
        make_jobs: makes the queue.

    Raises:
        LibraryError: the library is not a local folder, and there is no `config.folder`.
    """

    def __init__(self, library: Library, config: ServeConfig, make_jobs: Callable[..., Jobs] = Jobs) -> None:
        if config.folder is None and "://" in library.uri:
            raise LibraryError(f"{library.uri} is not a folder: give the service its own folder", hint="--folder DIR")
        folder = Path(config.folder or os.path.join(library.uri, "serve")).absolute()
        self.library, self.config, self.metrics = library, config, Metrics()
        self.private = (library.uri, str(folder))
        self.pool = Pool(config.threads)
        self.batcher = Batcher(self.search_many, self.metrics)
        self.jobs = make_jobs(folder, self._add, self._forget, self._known, config, self.metrics, self.private)
        self.roots = Roots(config.roots)
        self._playable = Roots((*config.roots, self.jobs.uploads))
        self._copies = Copies(folder / "playable", config.play_bytes, self.private)

    def close(self) -> None:
        """Drains the jobs, and ends the threads."""
        self.jobs.drain(self.config.drain_seconds)
        self._copies.close()
        self.batcher.close()
        self.pool.close()

    def ready(self) -> dict[str, object]:
        """Encodes a text and a picture, and searches the library.

        Raises:
            ApiError: 503, one of these failed.
        """
        try:
            engine = self.library.engine
            if engine is None:
                raise ValueError("the library has no engine")
            text = engine.encode_text("a picture of a red square")
            picture = engine.encode_image(np.full((64, 64, 3), (200, 30, 30), np.uint8))
            if not (np.isfinite(text).all() and np.isfinite(picture).all()):
                raise ValueError("the model gives vectors that are not finite")
            if self.library.exists():
                self.library.search_many([text[0]], k=1)
        except Exception as error:
            raise ApiError(503, "not_ready", redact_paths(f"{type(error).__name__}: {error}", *self.private)) from error
        left_out = len(self.library.left_out())  # videos that this search skipped
        return {"status": "ready", "model": engine.bundle.name, "device": engine.backend.device, "left_out": left_out}

    def search(self, query: Query | Combined, k: int, where: Filter) -> Answer:
        return self.search_many([query], k, where)[0]

    def search_many(self, queries: Sequence[Query | Combined], k: int, where: Filter) -> list[Answer]:
        """Finds the k best moments for each query, in one pass."""
        self._check(where, k)
        for part in (part for query in queries for part in Combined.of(query).parts):
            if isinstance(part, Example):
                self.record(part.video, indexed=True)
        if not self.library.exists():
            return [Answer([]) for _ in queries]
        library, found = self.library, self.library.search_many(queries, k=k, where=where)
        return [
            Answer(hits, library.unknown_words(query), library.left_out())
            for query, hits in zip(queries, found, strict=True)
        ]

    def record(self, id: str, *, indexed: bool = False) -> Record:
        """The record of a video, by its id only: callers must not probe paths.

        Args:
            indexed: do not find failed videos, which can be any file that callers must not read.

        Raises:
            ApiError: 404.
        """
        with suppress(LibraryError):
            if _ID.fullmatch(id) and self.library.exists() and (record := self.library.record(id)).id == id:
                if indexed and record.status != "ok":
                    raise ApiError(404, "not_found", "the video failed, so it has no pictures")
                return record
        raise ApiError(404, "not_found", "there is no such video")

    def videos(self, page: models.Page, base: str) -> models.Videos:
        where = page.where()
        self._check(where, 1)
        records = self.library.list(where) if self.library.exists() else []
        found = [models.video(record, base) for record in records[page.offset : page.offset + page.limit]]
        return models.Videos(total=len(records), videos=found)

    def detail(self, id: str, base: str) -> models.VideoDetail:
        record = self.record(id)
        if record.status != "ok":
            return models.video_detail(record, None, (), base, playable=False)
        # In this order: if the video is indexed again in between, the times match the key-frames.
        extras, previews = self.library.extras(id), self.library.previews(id)
        return models.video_detail(record, extras, previews, base, playable=self._readable(record))

    def preview(self, id: str, seconds: float, *, nearest: bool) -> bytes:
        """The frame shown at a time, as JPEG; with `nearest`, or without access to the video, the nearest key-frame."""
        record = self.record(id, indexed=True)
        return self.library.preview(record.id, seconds, decode=self._readable(record) and not nearest)

    def extras(self, id: str) -> Extras:
        return self.library.extras(self.record(id, indexed=True).id)

    def open(self, id: str) -> tuple[FileIO, str]:
        """Opens the video file. Returns it and its file name.

        Raises:
            ApiError: 404; 403, it is no longer under an allowed folder.
        """
        record = self.record(id, indexed=True)
        path = path_of(record.path)
        if path is None:
            raise ApiError(404, "not_found", "the video is not on this machine")
        return self._playable.open(path), file_name(record.path)

    def playable(self, id: str) -> models.Playable:
        """The state of the copy that browsers can play; starts it if there is none.

        Raises:
            ApiError: as `open`; 429, too many copies wait.
        """
        return self._copies.ask(self._allowed(id).fingerprint, lambda: self.open(id)[0])

    def open_playable(self, id: str) -> FileIO:
        """Opens that copy. Raises ApiError as `open`, 404 until it is done."""
        return self._copies.open(self._allowed(id).fingerprint)

    def _allowed(self, id: str) -> Record:
        """The record of a video that callers may read now, else raises ApiError as `open`."""
        self.open(id)[0].close()
        return self.record(id, indexed=True)

    def remove(self, id: str) -> None:
        """Removes a video from the library. Deletes its file if it was uploaded here."""
        record = self.record(id)
        self.library.remove([id])
        self._copies.forget(record.fingerprint)
        path = path_of(record.path)
        if path is not None and path.parent.parent == self.jobs.uploads:
            discard(path)

    def _readable(self, record: Record) -> bool:
        """Whether callers may read the video's file."""
        path = path_of(record.path)
        return path is not None and self._playable.holds(os.path.realpath(path))

    def _check(self, where: Filter, k: int) -> None:
        if k > MAX_RESULTS:
            raise ApiError(422, "invalid", f"k must be <= {MAX_RESULTS}, got {k}")
        for id in where.videos:
            self.record(id)

    def curve(self, id: str, query: str) -> list[tuple[float, float]]:
        """The scores of a video's frames; of many frames the best of each stretch."""
        times, scores = self.library.scores(query, self.record(id, indexed=True).id)
        step = math.ceil(len(scores) / CURVE_POINTS)
        best = [first + int(scores[first : first + step].argmax()) for first in range(0, len(scores), step)]
        return [(round(float(times[row]), 3), round(float(scores[row]), 5)) for row in best]

    def _add(self, path: Path, report: Progress, stop: Callable[[], bool]) -> Added | None:
        # The job may be older than the allowed folders, and a link may have replaced the file. So it reads the very
        # file that it checked, by a link in a separate folder, which keeps the suffix.
        with self._playable.open(path) as file, TemporaryDirectory(prefix=OPEN, dir=self.jobs.folder) as folder:
            held = Path(folder) / path.name
            held.symlink_to(own_name(file))
            return next(iter(self.library.add([path], begin=lambda _: report, stop=stop, held=held)), None)

    def _known(self, path: Path) -> bool:
        return self.library.exists() and any(record.path == str(path) for record in self.library.list())

    def _forget(self, path: Path) -> None:
        for record in self.library.list() if self.library.exists() else ():
            if record.path == str(path):
                self.library.remove([record.id])
