"""Files: their names in a library, whether they changed, and whether two have the same content."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from keyreel.decode.source import Source
from keyreel.errors import SourceError
from keyreel.library.types import Record

WHOLE_BYTES = 64 << 20  # read files up to this size whole
BLOCK_BYTES = 1 << 20  # of larger files read blocks of this size, evenly spaced, with the first and the last
_BYTE_PATH = "file://"  # a path that is no text, as a URL with its bytes escaped (RFC 8089)


def name_of(video: str | os.PathLike[str]) -> str:
    """Returns a video's name in a library: its absolute path, or its URL.

    It does not follow symbolic links. A path that is not UTF-8 becomes file:///... with escaped bytes, since tables
    hold text.

    Raises:
        ValueError: an empty name.
        TypeError: not a path.
    """
    given = os.fspath(video)
    if not given or not isinstance(given, str):
        raise (TypeError if given else ValueError)(f"a video in a library has a path or a URL, got {given!r}")
    if given.startswith(_BYTE_PATH + "/"):
        given = os.fsdecode(unquote_to_bytes(given[len(_BYTE_PATH) :]))
    elif isinstance(video, str) and given != "-" and Source(given).path is None:
        return given
    path = os.path.abspath(given)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return _BYTE_PATH + quote(os.fsencode(path))
    return path


def path_of(name: str) -> Path | None:
    """Inverts `name_of`; None for a URL."""
    if name.startswith(_BYTE_PATH):
        return Path(os.fsdecode(unquote_to_bytes(name[len(_BYTE_PATH) :])))
    return Path(name) if os.path.isabs(name) else None


def real_name(name: str) -> str:
    """The name with symbolic links resolved, if possible."""
    path = path_of(name)
    try:
        return name if path is None else name_of(os.path.realpath(path))
    except (OSError, ValueError):
        return name


def names_of(videos: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Returns the names of videos, each file once."""
    names: dict[str, str] = {}
    for name in map(name_of, [videos] if isinstance(videos, (str, os.PathLike)) else videos):
        names.setdefault(real_name(name), name)
    return tuple(names.values())


@dataclass(frozen=True, slots=True)
class FileState:
    """Size and time of the last change of a file."""

    size: int  # bytes
    mtime_ns: int

    @classmethod
    def of(cls, path: Path | None) -> FileState | None:
        """Looks up a regular file; None if there is none. Raises SourceError if the system refuses."""
        if path is None:
            return None
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        return cls(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None

    def fits(self, record: Record) -> bool:
        """Whether the file is unchanged since it was indexed."""
        return (self.size, self.mtime_ns) == (record.size, record.mtime_ns)


def is_gone(name: str) -> bool:
    """Whether a file is missing. On an unreadable disk no file counts as missing."""
    path = path_of(name)
    try:
        return path is not None and FileState.of(path) is None
    except SourceError:
        return False


def _unreadable(path: Path, error: Exception) -> SourceError:
    reason = getattr(error, "strerror", None) or error
    return SourceError(f"{path}: cannot be read: {reason}.", hint="Check its permissions and its disk.")


def fingerprint(path: Path) -> str:
    """Hashes the content of a file: BLAKE2b over its size and bytes, as 32 hexadecimal digits.

    Of a file over 64 MiB it reads only 64 blocks of 1 MiB, evenly spaced. Files of the same size that differ only
    between the blocks count as copies; `force` still indexes them.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
            count = WHOLE_BYTES // BLOCK_BYTES
            whole = size <= WHOLE_BYTES
            step = BLOCK_BYTES if whole else (size - BLOCK_BYTES) / (count - 1)
            for number in range(-(-size // BLOCK_BYTES) if whole else count):
                file.seek(round(number * step))
                digest.update(file.read(BLOCK_BYTES))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


class Catalog:
    """The records of a library by id, by path and by content. Safe to share between threads."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, Record] = {}
        self._by_path: dict[str, str] = {}
        self._by_content: dict[str, dict[str, None]] = {}  # ids, in order
        for record in records:
            self.put(record)

    def find(self, video: str) -> Record | None:
        """Finds a record by id, or by path, which may be relative or contain links."""
        return (self._by_id.get(video) or self.at(name_of(video))) if video else None

    def fitting(self, video: str) -> list[Record]:
        """Finds records by id, path, or glob over the whole path; * also matches slashes. In order of path."""
        if (record := self.find(video)) is not None:
            return [record]
        globs = (video, os.path.abspath(video))
        found = [one for one in list(self._by_id.values()) if any(fnmatchcase(one.path, glob) for glob in globs)]
        return sorted(found, key=lambda record: record.path)

    def at(self, name: str) -> Record | None:
        """Returns the record of a name, or of the file that it links to."""
        path = name if name in self._by_path else real_name(name)
        with self._lock:
            return self._by_id.get(self._by_path.get(path, ""))

    def like(self, content: str) -> list[Record]:
        """Returns the indexed videos with this content."""
        with self._lock:
            found = [self._by_id[id] for id in self._by_content.get(content, ())]
        return [record for record in found if record.status == "ok"] if content else []

    def put(self, record: Record) -> None:
        """Adds or replaces a record."""
        with self._lock:
            old = self._by_id.get(record.id)
            if old is not None:
                self._by_content[old.fingerprint].pop(old.id)
                if self._by_path.get(old.path) == old.id:
                    del self._by_path[old.path]
            self._by_id[record.id] = record
            self._by_path[record.path] = record.id
            self._by_content.setdefault(record.fingerprint, {})[record.id] = None
