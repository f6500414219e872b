"""A stream that cannot be rewound, kept in a temporary file as far as it was read."""

from __future__ import annotations

import io
import os
import select
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from keyreel.errors import SourceError

_CHUNK_BYTES = 1 << 16
_WAIT_SECONDS = 0.1
_BEFORE = (b"ftyp", b"styp", b"free", b"skip", b"wide", b"uuid", b"pdin", b"sidx", b"meta")  # boxes that may come first


class Spool:
    """Reads a stream as far as somebody asks, and keeps what was read; safe to share between threads.

    Args:
        file: its rest is the stream.
        name: for messages.
        most_bytes: more are refused.
    """

    def __init__(self, file: BinaryIO, name: str, most_bytes: int) -> None:
        self._file, self._name, self._most = file, name, most_bytes
        # What is there, without waiting until all that is asked for is there.
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)
        self._kept: Any = tempfile.NamedTemporaryFile(prefix="keyreel-", suffix=".video")  # noqa: SIM115
        self._lock = threading.RLock()
        self._size = 0
        self._full = False
        self.complete = False  # the stream has ended

    @property
    def path(self) -> Path:
        """Of the temporary file."""
        return Path(self._kept.name)

    def close(self) -> None:
        """Removes the temporary file."""
        with self._lock:
            self.complete = True
            self._kept.close()

    def read(self, at: int, size: int, checkpoint: Callable[[], None]) -> bytes:
        """Some of the bytes [at, at + size), at least one where the stream is so long.

        Raises:
            SourceError: the stream is longer than allowed, or cannot be read.
        """
        while True:
            with self._lock:
                if at < self._size or self.complete:
                    return b"" if self._kept.closed else os.pread(self._kept.fileno(), size, at)
            self.pull(checkpoint)

    def streams(self, checkpoint: Callable[[], None]) -> bool:
        """False for an MP4 or MOV whose index stands behind its pictures: ISO/IEC 14496-12, 4.2 and 8.1."""
        at = 0
        while True:
            box = b""
            while len(box) < 16 and (more := self.read(at + len(box), 16 - len(box), checkpoint)):
                box += more
            size, kind = int.from_bytes(box[:4], "big"), box[4:8]
            if kind not in _BEFORE:
                return kind != b"mdat"
            at += int.from_bytes(box[8:16], "big") if size == 1 else max(size, 8)

    def finish(self, checkpoint: Callable[[], None]) -> Path:
        """Reads all that is left; the temporary file's path."""
        while not self.complete:
            self.pull(checkpoint)
        return self.path

    def pull(self, checkpoint: Callable[[], None]) -> None:
        """Reads some more, when there is more; a pipe whose writer waits does not keep `checkpoint` from being called.

        Raises:
            SourceError: as `read`.
        """
        checkpoint()
        with self._lock:
            try:
                if self.complete or not self._ready():
                    return
                data = self._read(_CHUNK_BYTES)
            except OSError as error:
                raise SourceError(f"{self._name}: cannot be read: {error.strerror or error}.") from error
            self._full = self._full or self._size + len(data) > self._most
            if self._full:
                raise SourceError(
                    f"{self._name}: more than {self._most} bytes (max_spool_bytes).",
                    hint="Raise max_spool_bytes, or save it to a file and give the path.",
                )
            self._kept.write(data)
            self._kept.flush()
            self._size += len(data)
            self.complete = not data

    def _ready(self) -> bool:
        """False where a read would have to wait, as far as the system tells."""
        # Other objects may hold what they have read already, as this one may before the first read.
        if not self._size or not isinstance(getattr(self._file, "raw", self._file), io.FileIO):
            return True
        try:
            return bool(select.select([self._file.fileno()], [], [], _WAIT_SECONDS)[0])
        except (OSError, ValueError):  # not everywhere a file can be waited for
            return True


class SpoolView:
    """The spooled stream from its start, read once: without a way to seek, so that nobody waits for its end."""

    def __init__(self, spool: Spool, checkpoint: Callable[[], None]) -> None:
        self._spool, self._checkpoint, self._position = spool, checkpoint, 0

    def read(self, size: int) -> bytes:
        data = self._spool.read(self._position, size, self._checkpoint)
        self._position += len(data)
        return data
