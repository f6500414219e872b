"""Files on this machine: those that callers may name, and those that they upload."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from keyreel.library.files import path_of
from keyreel.serve.security import ApiError

_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",  # the same boxes as MP4; browsers refuse video/quicktime
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
    ".avi": "video/x-msvideo",
}


class Roots:
    """The folders whose files callers may read, with all symbolic links resolved.

    Args:
        folders: need not exist; relative paths of callers are searched in each, in this order.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]]) -> None:
        self._folders = tuple(os.path.realpath(folder) for folder in folders)

    def find(self, path: str) -> Path:
        """Resolves the path of a regular file that a caller names.

        Raises:
            ApiError: 403, outside the folders, even if there is no such file; 404, no such file; 422, not a file.
        """
        if "://" in path or "\0" in path or not path:
            raise ApiError(422, "path", "not the path of a file on this machine", hint="URLs are not opened: upload it")
        try:
            tried = [os.path.realpath(os.path.join(folder, path)) for folder in self._folders]
            inside = [real for real in tried if self.holds(real)]
            if not inside:
                raise _outside(path)
            found = next((real for real in inside if os.path.lexists(real)), None)
            if found is None:
                raise ApiError(404, "not_found", f"there is no file {path!r}")
            if not stat.S_ISREG(os.stat(found).st_mode):
                raise ApiError(422, "path", f"{path!r} is not a file", hint="give the path of one video")
        except (OSError, ValueError) as error:  # a loop of links, a name that is too long or impossible
            raise ApiError(422, "path", f"not a path that can be read: {type(error).__name__}") from error
        return Path(found)

    def holds(self, real: str) -> bool:
        """Whether a real path is in one of the folders."""
        return any(os.path.commonpath((folder, real)) == folder and real != folder for folder in self._folders)

    def open(self, path: Path) -> FileIO:
        """Opens a file for reading. It checks the open file, so nobody can replace it by a link in between.

        Raises:
            ApiError: as `find`.
        """
        try:
            # Non-blocking: somebody may have put a pipe there.
            opened = Closing(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            raise ApiError(404, "not_found", f"{path.name!r} cannot be opened: {type(error).__name__}") from error
        if not self.holds(os.path.realpath(own_name(opened))) or not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            opened.close()
            raise _outside(path.name)
        return opened


class OpenFile(FileResponse):
    """Answers with an open file, whole or in ranges (RFC 9110); closes it at the end."""

    def __init__(self, file: FileIO, name: str) -> None:
        kind = _TYPES.get(os.path.splitext(name)[1].lower(), "application/octet-stream")
        state, headers = os.fstat(file.fileno()), {"Cache-Control": "private, max-age=60"}
        super().__init__(own_name(file), media_type=kind, stat_result=state, headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


class Closing(FileIO):
    """A file that closes itself if unused: a caller may leave between opening and answer."""

    def __del__(self) -> None:
        self.close()


def own_name(file: FileIO) -> str:
    """A path by which this process can open the file again, even if it was renamed or deleted."""
    return f"/proc/self/fd/{file.fileno()}"


def _outside(path: str) -> ApiError:
    return ApiError(403, "path", f"{path!r} is not under a folder that may be read", hint="see the option --root")


def file_name(path: str) -> str:
    """The last part of a path or URL, as text."""
    local = path_of(path)
    name = urlsplit(path).path.rsplit("/", 1)[-1] if local is None else local.name
    return name.encode("utf-8", "replace").decode()


def safe_name(name: str) -> str:
    """Makes a file name that is safe for file systems and shells; keeps the suffix."""
    base = re.split(r"[/\\]", name)[-1]
    base = re.sub(r"[^\w .,()+=@-]", "_", base).strip(" .-") or "video"
    stem, ending = os.path.splitext(base)
    return _cut(stem, 120) + _cut(ending, 16)


def _cut(text: str, most: int) -> str:
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def discard(path: Path) -> None:
    """Deletes an upload and its folder."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        path.parent.rmdir()
