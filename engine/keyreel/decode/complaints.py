"""Counts the messages that PyNvVideoCodec prints about damaged pictures.

It conceals the damage and returns the picture. The only sign is a line on descriptor 1, where `--json` goes too.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# os.lseek lets other threads run meanwhile. That is asked after every packet, and a change of threads takes longer.
_lseek = ctypes.PyDLL(None).lseek
_lseek.argtypes, _lseek.restype = (ctypes.c_int, ctypes.c_long, ctypes.c_int), ctypes.c_long

_LINE = re.compile(rb"Decode Error occurred for picture \d+\r?\n")


class Complaints:
    """While somebody listens, descriptor 1 is a temporary file; other output is passed on to the real one.

    The lines do not name the decoder. The first one that asks gets the count: with several decoders, perhaps the wrong
    one.
    """

    def __init__(self) -> None:
        self._lock, self._listeners, self._read = threading.Lock(), 0, 0
        self._file = self._real = -1
        atexit.register(self._restore)  # a thread that still decodes must not get the last lines

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Counts messages during the block."""
        with self._lock:
            self._listeners += 1
            if self._listeners == 1:
                with tempfile.TemporaryFile() as file:
                    self._file, self._real, self._read = os.dup(file.fileno()), os.dup(1), 0
                os.dup2(self._file, 1)
        try:
            yield
        finally:
            with self._lock:
                self._listeners -= 1
                if not self._listeners:
                    self._restore()
                    os.close(self._real)
                    os.close(self._file)
                    self._file = self._real = -1

    def _restore(self) -> None:
        if self._real >= 0:
            os.dup2(self._real, 1)
            self._taken()

    def count(self) -> int:
        """The number of damaged pictures since the last call."""
        with self._lock:
            return self._taken()

    def _taken(self) -> int:
        size = _lseek(self._file, 0, os.SEEK_END)  # where the next line goes anyway
        if size == self._read:
            return 0
        rest, found = _LINE.subn(b"", os.pread(self._file, size - self._read, self._read))
        self._read = size
        while rest:
            rest = rest[os.write(self._real, rest) :]
        return found


COMPLAINTS = Complaints()  # one for the process, as descriptor 1
