"""Makes copies of videos that browsers can play, on demand.

If only the container is the obstacle, it copies the packets into an MP4 file; else it encodes H.264 and AAC. It makes
one copy at a time. Callers ask repeatedly; when nobody has asked for a while, the work stops.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.chapters import write_remux
from keyreel.render.files import atomic_write
from keyreel.render.reel import write_reel
from keyreel.serve.files import Closing
from keyreel.serve.models import Playable, Problem
from keyreel.serve.security import ApiError, problem, too_busy
from keyreel.types import Shot

LEFT_SECONDS = 10.0  # seconds without a request: the caller has left
MOST = 8  # most copies that wait
# What browsers play in MP4: codecs of the picture with the formats of its pixels, and of the sound.
_PICTURES = {"h264": ("yuv420p", "yuvj420p"), "av1": ("yuv420p", "yuv420p10le"), "vp9": ("yuv420p", "yuv420p10le")}
_SOUNDS = ("aac", "mp3", "opus", "flac", None)


class _Left(Exception):
    """No caller has asked for the copy for a while."""


@dataclass
class _Work:
    asked: float = field(default_factory=time.monotonic)
    progress: float = 0.0
    error: Exception | None = None  # why it failed

    def left(self) -> bool:
        """Whether the caller has left."""
        return time.monotonic() - self.asked > LEFT_SECONDS


class Copies:
    """The copies in a folder. Safe to share between threads.

    Args:
        folder: for the copies only.
        most_bytes: of all copies together; deletes the least recently watched first.
        private: paths to redact in errors.
    """

    def __init__(self, folder: Path, most_bytes: int, private: tuple[str, ...]) -> None:
        self._folder, self._most, self._private = folder, most_bytes, private
        self._works: dict[str, _Work] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keyreel-copies")
        self._closed = False

    def close(self) -> None:
        """Stops the running work."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def ask(self, name: str, open_video: Callable[[], FileIO]) -> Playable:
        """Returns the state of a copy; starts it if there is none.

        Args:
            name: of the content, hexadecimal digits.
            open_video: called in the working thread.

        Raises:
            ApiError: 429, too many wait.
        """
        with self._lock:
            if self.path(name).is_file():
                self._works.pop(name, None)
                return Playable(state="done", progress=1.0, error=None)
            work = self._works.get(name)
            if work is not None and work.error is not None:
                del self._works[name]  # who asks again tries again
                return Playable(state="failed", progress=0.0, error=Problem(**problem(work.error, *self._private)))
            if work is None:
                if len(self._works) >= MOST:
                    raise too_busy("videos to convert", 10)
                work = self._works[name] = _Work()
                self._thread.submit(self._run, name, work, open_video)
            work.asked = time.monotonic()
            return Playable(state="running", progress=round(work.progress, 3), error=None)

    def open(self, name: str) -> FileIO:
        """A copy, open.

        Raises:
            ApiError: 404, it is not made.
        """
        try:
            file = Closing(self.path(name))
            os.utime(self.path(name))  # for `_trim`
        except OSError as error:
            raise ApiError(404, "not_found", "there is no such copy", hint="POST to playable makes it") from error
        return file

    def forget(self, name: str) -> None:
        """Deletes a copy, if there is one."""
        self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Where a copy is once it is made."""
        return self._folder / f"{name}.mp4"

    def _run(self, name: str, work: _Work, open_video: Callable[[], FileIO]) -> None:
        def report(_: str, done: float, total: float | None) -> None:
            work.progress = min(done / total, 1.0) if total else 0.0
            if self._closed or work.left():
                raise _Left

        try:
            report("", 0.0, None)
            self._folder.mkdir(parents=True, exist_ok=True)
            with open_video() as file, Source(cast(BinaryIO, file)) as source:
                self._write(source, self.path(name), report)
            with suppress(FileNotFoundError):  # `forget` deleted it meanwhile
                self._trim(self.path(name))
        except _Left:
            pass
        except Exception as error:  # noqa: BLE001 - it is the answer to whoever asks next
            work.error = error
        with self._lock:
            if work.error is None:
                self._works.pop(name, None)
            for key in [key for key, old in self._works.items() if old.error is not None and old.left()]:
                del self._works[key]

    def _write(self, source: Source, path: Path, report: Callable[[str, float, float | None], None]) -> None:
        info = source.probe()
        with source.open() as container:
            sounds = [own for own in container.streams.audio if own.codec_context is not None]
            sound = sounds[0].codec_context.codec.canonical_name if sounds else None

        def bounded(stage: str, done: float, total: float | None) -> None:
            report(stage, done, total)
            if sum(part.stat().st_size for part in self._folder.glob(".keyreel-*")) > self._most:
                raise RenderError(f"the copy takes more than {self._most} bytes", hint="see play_bytes")

        with atomic_write(path) as made:
            if info.pixel_format in _PICTURES.get(info.codec, ()) and sound in _SOUNDS:
                with suppress(RenderError):
                    write_remux(source, made, bounded)
                    return
            length = info.duration_seconds
            if length is None:
                raise RenderError(f"{source.name}: its length is not known", hint="download the file to watch it")
            write_reel(source, [Shot(0.0, length)], made, progress=bounded)

    def _trim(self, kept: Path) -> None:
        """Deletes the copies that were not watched for longest until the rest fits."""
        copies = sorted(self._folder.glob("*.mp4"), key=lambda path: path.stat().st_mtime, reverse=True)
        copies = [path for path in copies if not path.name.startswith(".")]
        total = kept.stat().st_size
        for path in copies:
            if path != kept:
                total += path.stat().st_size
                if total > self._most:
                    path.unlink(missing_ok=True)
