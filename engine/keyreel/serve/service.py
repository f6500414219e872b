"""What the routes do, apart from HTTP: every call here blocks and belongs in a thread."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from keyreel import Library
from keyreel.config import ServeConfig
from keyreel.errors import LibraryError
from keyreel.library.files import path_of
from keyreel.library.types import Added, Example, Filter, LibraryHit, Record
from keyreel.serve import schemas
from keyreel.serve.batching import Answer, Batcher
from keyreel.serve.jobs import Job, Jobs
from keyreel.serve.limits import Pool
from keyreel.serve.metrics import Metrics
from keyreel.serve.paths import Roots
from keyreel.serve.refusals import Refused, shortened
from keyreel.serve.uploads import discard
from keyreel.types import U8, Progress

_ID = re.compile("[0-9a-f]{32}")


class Service:
    """A library, the queue of jobs, and the bounds on both.

    Args:
        library: with an engine. Where the router was mounted is told with each call, as `base`.

    Raises:
        LibraryError: a library that is no folder needs `config.folder`.
    """

    def __init__(self, library: Library, config: ServeConfig) -> None:
        self.library, self.config = library, config
        self.metrics = Metrics()
        self.pool = Pool(config.threads, config.queue, name="keyreel-serve")
        self.batcher = Batcher(self._search_many, config, self.metrics)
        if config.folder is None and "://" in library.uri:
            raise LibraryError(f"{library.uri} is no folder: give the service one of its own", hint="--folder DIR")
        folder = Path(config.folder or os.path.join(library.uri, "serve")).absolute()
        self.private = (library.uri, str(folder))  # errors do not tell where they lie
        self.jobs = Jobs(folder, self._add, self._forget, config, self.metrics, self.private)
        self.roots = Roots(config.roots)
        self.playable = Roots((*config.roots, self.jobs.uploads))

    def start(self) -> None:
        """Begins to work on jobs, those of the last run first."""
        self.jobs.start()

    def close(self) -> None:
        """Drains the jobs and lets the threads go."""
        self.jobs.drain(self.config.drain_seconds)
        self.batcher.close()
        self.pool.close()

    def ready(self) -> dict[str, object]:
        """Encodes a text and a picture, and searches the library.

        Raises:
            Refused: 503, one of them does not work.
        """
        try:
            engine = self.library.engine
            if engine is None:
                raise ValueError("the library has no engine")
            text = engine.encode_text("a picture of a red square")
            picture = engine.encode_image(np.full((64, 64, 3), (200, 30, 30), np.uint8))
            if not (np.isfinite(text).all() and np.isfinite(picture).all()):
                raise ValueError("the model gives no numbers")
            if self.library.exists():
                self.library.search_many([text[0]], k=1)
        except Exception as error:
            reason = shortened(f"{type(error).__name__}: {error}", *self.private)
            raise Refused(503, "not_ready", reason) from error
        return {"status": "ready", "model": engine.bundle.name, "device": engine.backend.device}

    # --- search ---------------------------------------------------------------------------------------------------

    def check(self, where: Filter, k: int) -> None:
        """Whether a search may be made.

        Raises:
            Refused: 422 too many results wanted, 404 no such video.
        """
        if k > self.config.max_results:
            raise Refused(422, "invalid", f"k must be <= {self.config.max_results}, got {k}")
        for id in where.videos:
            self.record(id)

    def search_picture(self, query: U8 | Example, k: int, where: Filter) -> list[LibraryHit]:
        """The k best moments for a picture or a frame of the library.

        Raises:
            Refused: as `check`.
        """
        self.check(where, k)
        if isinstance(query, Example):
            self.record(query.video)
        return self.library.search(query, k=k, where=where) if self.library.exists() else []

    def moments(self, hits: Sequence[LibraryHit], base: str) -> list[schemas.Moment]:
        """As the API gives them."""
        return [
            schemas.Moment(
                video_id=hit.video_id,
                video=file_name(hit.video),
                start_seconds=hit.start_seconds,
                stop_seconds=hit.stop_seconds,
                pts_seconds=hit.pts_seconds,
                score=hit.score,
                video_score=hit.video_score,
                keyframe_seconds=hit.keyframe_seconds,
                folded=hit.folded,
                preview=preview_address(base, hit.video_id, hit.keyframe_seconds),
            )
            for hit in hits
        ]

    # --- videos ---------------------------------------------------------------------------------------------------

    def record(self, id: str) -> Record:
        """The record of an id; unlike the library's own, a path is no name here.

        Raises:
            Refused: 404.
        """
        # What is no id would be looked for as a path.
        with suppress(LibraryError):
            if _ID.fullmatch(id) and self.library.exists() and (record := self.library.record(id)).id == id:
                return record
        raise Refused(404, "not_found", "there is no such video")

    def page(self, where: Filter, offset: int, limit: int, base: str) -> schemas.Videos:
        """A page of the videos, in order of path."""
        self.check(where, 1)
        records = self.library.list(where) if self.library.exists() else []
        part = records[offset : offset + limit]
        return schemas.Videos(total=len(records), videos=[schemas.Video(**_facts(record, base)) for record in part])

    def detail(self, id: str, base: str) -> schemas.VideoDetail:
        """All that is known of a video.

        Raises:
            Refused: 404.
        """
        record = self.record(id)
        keyframes, sprite, area = [], None, None
        own = f"{base}/api/v1/videos/{quote(id, safe='')}"
        if record.status == "ok":
            overview = self.library.extras(id).overview
            told = {frame["pts_seconds"]: frame for frame in overview["keyframes"]}
            for preview in self.library.previews(id):
                if (frame := told.get(preview.pts_seconds)) is None:
                    continue  # indexed again meanwhile
                keyframes.append(
                    schemas.KeyFrame(
                        pts_seconds=preview.pts_seconds,
                        shot=frame["shot"],
                        weight=frame["weight"],
                        preview=preview_address(base, id, preview.pts_seconds),
                        attention=np.asarray(preview.attention, np.float64).round(6).tolist(),
                    )
                )
            sprite = schemas.Sprite(image=f"{own}/sprite.jpg", vtt=f"{own}/thumbs.vtt", **overview["sprite"])
            area = overview.get("attended_area")
        path = path_of(record.path)
        playable = record.status == "ok" and path is not None and self.playable.holds(os.path.realpath(path))
        return schemas.VideoDetail(
            **_facts(record, base),
            indexed_at=record.indexed_at,
            codec=record.probe.get("codec"),
            average_fps=record.probe.get("average_fps"),
            has_audio=record.probe.get("has_audio"),
            file=f"{own}/file" if playable else None,
            keyframes=keyframes,
            grid=record.grid,
            attended_area=area,
            shots=list(record.shots),
            sprite=sprite,
        )

    def picture(self, id: str, seconds: float | None) -> bytes:
        """The key-frame nearest to a time, or the sprite: JPEG.

        Raises:
            Refused: 404.
        """
        if self.record(id).status != "ok":
            raise Refused(404, "not_found", "the video failed: there are no pictures of it")
        return self.library.extras(id).sprite if seconds is None else self.library.preview(id, seconds)

    def track(self, id: str) -> str:
        """WebVTT of the thumbnails.

        Raises:
            Refused: 404.
        """
        if self.record(id).status != "ok":
            raise Refused(404, "not_found", "the video failed: there are no pictures of it")
        return self.library.extras(id).vtt

    def open(self, id: str) -> tuple[FileIO, str]:
        """(open file, file name) of the video itself.

        Raises:
            Refused: 404, 403 where it is not under an allowed folder any more.
        """
        record = self.record(id)
        path = path_of(record.path)
        if record.status != "ok" or path is None:  # what failed may be any file, and none of a caller's business
            raise Refused(404, "not_found", "the video failed, or it is not on this machine")
        return self.playable.open(path), file_name(record.path)

    def remove(self, id: str) -> None:
        """Takes a video out of the library, and its file where it was uploaded here.

        Raises:
            Refused: 404.
        """
        record = self.record(id)
        self.library.remove([id])
        path = path_of(record.path)
        if path is not None and path.parent.parent == self.jobs.uploads:
            discard(path)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _search_many(self, texts: Sequence[str], k: int, where: Filter) -> list[Answer]:
        self.check(where, k)
        if not self.library.exists():
            return [([], None) for _ in texts]
        weak = self.library.weak_score(where)
        return [(hits, weak) for hits in self.library.search_many(texts, k=k, where=where)]

    def _add(self, path: Path, tell: Progress, stop: Callable[[], bool]) -> Added | None:
        # Jobs may be older than the folders that are allowed now, and links may have been put on the way.
        if not self.playable.holds(os.path.realpath(path)):
            raise Refused(403, "path", "the file is not under a folder that may be read any more")
        return next(iter(self.library.add([path], begin=lambda _: tell, stop=stop)), None)

    def _forget(self, path: Path) -> None:
        for record in self.library.list() if self.library.exists() else ():
            if record.path == str(path):
                self.library.remove([record.id])


def file_name(path: str) -> str:
    """The last part of a path or URL, as text."""
    local = path_of(path)
    name = urlsplit(path).path.rsplit("/", 1)[-1] if local is None else local.name
    return name.encode("utf-8", "replace").decode()


def job_state(job: Job) -> schemas.JobState:
    """As the API gives it."""
    error = None if job.error is None else schemas.Problem(**job.error)
    return schemas.JobState(
        id=job.id,
        state=job.state,
        progress=job.progress,
        name=file_name(str(job.path)),
        video=job.video,
        created=job.created,
        error=error,
    )


def preview_address(base: str, id: str, seconds: float) -> str:
    """Where the picture of a key-frame is."""
    return f"{base}/api/v1/videos/{quote(id, safe='')}/previews/{float(seconds)!r}.jpg"


def _facts(record: Record, base: str) -> dict[str, Any]:
    third = (record.duration_seconds or 0.0) / 3  # the first key-frame is often a title or black
    return {
        "id": record.id,
        "name": file_name(record.path),
        "status": record.status,
        "error": record.error and shortened(record.error, record.path),
        "hint": record.hint,
        "duration_seconds": record.duration_seconds,
        "width": record.probe.get("width"),
        "height": record.probe.get("height"),
        "frames": record.frames,
        "tags": list(record.tags),
        "date": record.date,
        "poster": preview_address(base, record.id, round(third, 3)) if record.status == "ok" else None,
    }
