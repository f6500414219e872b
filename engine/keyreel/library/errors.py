"""The errors of a library; translates LanceDB's to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keyreel.errors import Damaged, KeyreelError, LibraryError

_FULL_DISK = ("no space left", "file too large", "quota", "os error 27", "os error 28")
_CONFLICTS = ("conflict", "concurrent", "preempted", "please retry")
_DENIED = ("permission denied", "read-only", "operation not permitted", "accessdenied", "forbidden")
_UNREACHABLE = ("failed to connect", "retryerror", "error sending request", "not a directory")
_SPARE_BYTES = 1 << 20  # bytes to leave free for manifests and deletions
MAKE = "`keyreel index` or `Library.add` creates one"
REPAIR = "`keyreel library verify --repair`, then `keyreel library update` restore the videos"


class Absent(LibraryError):
    """The library does not exist."""


class Outdated(LibraryError):
    """The library has an older format, or vectors of an earlier model that `upgrade` converts."""


class Conflict(LibraryError):
    """Other writers committed first, again and again."""


class Vanished(Damaged):
    """A file is missing: lost, or deleted by a compaction since the table was opened."""


class Full(LibraryError):
    """The disk is full."""


def ask_for_room(folder: Path | None, size: int) -> None:
    """Raises Full if the disk of the folder has fewer free bytes than `size`."""
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE_BYTES:
        need = f"{(size + _SPARE_BYTES) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise Full(f"the library {folder} cannot be written: {need}", hint="make room on the disk")


def cut_short(uri: str) -> Full:
    """The error for incomplete files that LanceDB committed nevertheless."""
    hint = "free disk space, or raise the limit on the size of files"
    return Full(f"the library {uri} cannot be written: a write was cut short", hint=hint)


def unknown_video(video: str | os.PathLike[str]) -> LibraryError:
    """The error for a video that the library does not have."""
    hint = "`keyreel library list` shows all; give a path, an id or a pattern for the whole path"
    return LibraryError(f"no video of the library matches {os.fspath(video)!r}", hint=hint)


@contextmanager
def lance_errors(uri: str) -> Iterator[None]:
    """Translates LanceDB's errors. They share one type, so the message decides.

    Raises:
        LibraryError: or one of its classes above.
    """
    try:
        yield
    except (KeyreelError, ImportError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0].split(", /")[0]
        small = text.lower()

        def has(words: Sequence[str]) -> bool:
            return any(word in small for word in words)

        if "was not found" in small:
            raise Absent(f"there is no library at {uri}", hint=MAKE) from error
        if has(_FULL_DISK):
            hint = "free disk space; finished videos are safe"
            raise Full(f"the library {uri} cannot be written: {text}", hint=hint) from error
        if has(_CONFLICTS):
            raise Conflict(f"other processes keep changing the library {uri}: {text}", hint="try again") from error
        # Errors of the system have a number, errors about a damaged table have none.
        if has(_DENIED) or has(_UNREACHABLE) or getattr(error, "errno", None):
            raise LibraryError(
                f"the library {uri} cannot be used: {text}", hint="check the address and your access to it"
            ) from error
        kind = Vanished if "not found" in small else Damaged
        hint = "`keyreel library verify --repair` repairs it"
        raise kind(f"the library {uri} cannot be read: {text}", [text], hint=hint) from error
