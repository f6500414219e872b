"""Which files the service may touch: those under the allowed folders, once all symbolic links are followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from keyreel.serve.refusals import Refused

_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",  # the same boxes; browsers do not try video/quicktime
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
    ".avi": "video/x-msvideo",
}


class Roots:
    """The allowed folders.

    Args:
        folders: need not exist yet; relative paths of callers are looked for in each, in this order.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]]) -> None:
        self._folders = tuple(os.path.realpath(folder) for folder in folders)

    def find(self, path: str) -> Path:
        """The real path of a regular file that a caller may name.

        Raises:
            Refused: 403 where it leads out of the folders, whether there is such a file or not; 404 where there is
                none; 422 where it is no file.
        """
        if "://" in path or "\0" in path or not path:
            raise Refused(422, "path", "not the path of a file on this machine", hint="URLs are not opened: upload it")
        try:
            tried = [os.path.realpath(os.path.join(folder, path)) for folder in self._folders]
            inside = [real for real in tried if self.holds(real)]
            if not inside:
                raise _outside(path)
            found = next((real for real in inside if os.path.lexists(real)), None)
            if found is None:
                raise Refused(404, "not_found", f"there is no file {path!r}")
            if not stat.S_ISREG(os.stat(found).st_mode):
                raise Refused(422, "path", f"{path!r} is not a file", hint="give the path of one video")
        except (OSError, ValueError) as error:  # a loop of links, a name too long, what no file name can hold
            raise Refused(422, "path", f"not a path that can be read: {type(error).__name__}") from error
        return Path(found)

    def holds(self, real: str) -> bool:
        """Whether a real path lies inside one of the folders."""
        return any(os.path.commonpath((folder, real)) == folder and real != folder for folder in self._folders)

    def open(self, path: Path) -> FileIO:
        """A file for reading, checked once it is open: nobody can put a link in its place meanwhile.

        Raises:
            Refused: as `find`.
        """
        try:
            # Not blocking: a pipe that was put there has no writer.
            opened = _Closing(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            raise Refused(404, "not_found", f"{path.name!r} cannot be opened: {type(error).__name__}") from error
        if not self.holds(os.path.realpath(_own(opened))) or not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            opened.close()
            raise _outside(path.name)
        return opened


class _Closing(FileIO):
    """Closes itself where nobody took it: a caller may leave between the opening and the answer."""

    def __del__(self) -> None:
        self.close()


def _own(file: FileIO) -> str:
    """The name by which this process can open it once more, also when it has no other name any more."""
    return f"/proc/self/fd/{file.fileno()}"


def _outside(path: str) -> Refused:
    return Refused(403, "path", f"{path!r} is not under a folder that may be read", hint="see the option --root")


class OpenFile(FileResponse):
    """A file that is open already, whole or in ranges (RFC 9110); closed when the answer ends, however it does."""

    def __init__(self, file: FileIO, name: str) -> None:
        kind = _TYPES.get(os.path.splitext(name)[1].lower(), "application/octet-stream")
        state, headers = os.fstat(file.fileno()), {"Cache-Control": "private, max-age=60"}
        super().__init__(_own(file), media_type=kind, stat_result=state, headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()
