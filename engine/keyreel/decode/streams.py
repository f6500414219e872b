"""Reads videos that are not files: several readers of one file object, and temporary copies of streams."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from keyreel.errors import SourceError

MAX_SPOOL_BYTES = 8 << 30  # read at a time from a stream
_CHUNK_BYTES = 1 << 20


class FileView:
    """A view of a file object with its own position, so that several containers can read one file object."""

    def __init__(self, file: BinaryIO, lock: threading.Lock) -> None:
        self._file, self._lock, self._position = file, lock, 0

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes at this view's position."""
        with self._lock:
            self._file.seek(self._position)
            data = self._file.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves this view's position, as `io.IOBase.seek`."""
        with self._lock:
            base = 0 if whence == os.SEEK_SET else self._position if whence == os.SEEK_CUR else self._file.seek(0, 2)
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """Returns this view's position."""
        return self._position


def spooled(name: str, file: BinaryIO) -> Any:
    """Copies `file` to a temporary file, up to just over the limit. It is deleted when closed."""
    copy = tempfile.NamedTemporaryFile(prefix="keyreel-", suffix=".video")  # noqa: SIM115
    with reading(name):
        while data := checked(name, file.read(_CHUNK_BYTES)):
            copy.write(data)
            if copy.tell() > MAX_SPOOL_BYTES:
                break
        copy.flush()
    return copy


def check_size(name: str, copy: Any) -> None:
    """Raises SourceError if the copy is over the limit."""
    if copy.tell() > MAX_SPOOL_BYTES:
        raise SourceError(f"{name}: more than {MAX_SPOOL_BYTES} bytes.", hint="Save it to a file and give the path.")


def checked(name: str, data: Any) -> bytes:
    """Returns `data` if it is bytes, else raises TypeError."""
    if not isinstance(data, bytes):
        raise TypeError(f"{name}: read() gave {type(data).__name__}, a binary file object gives bytes")
    return data


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Raises SourceError for an OSError inside the block."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror or error}.") from error
