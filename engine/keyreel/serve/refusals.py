"""What the service answers when it does not do what was asked, always {"error": {"kind", "message", "hint"}}."""

from __future__ import annotations

import errno
import json
import math
import sqlite3
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from keyreel.errors import KeyreelError, LibraryError, SourceError, SourceNotFound
from keyreel.library.files import path_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP. kind: one word for programs. message, hint: for people.
    """

    def __init__(
        self, status: int, kind: str, message: str, *, hint: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.hint = status, kind, message, hint
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """As it stands in JSON, without the outer "error"."""
        return {"kind": self.kind, "message": self.message, "hint": self.hint}

    def response(self) -> Response:
        """The answer."""
        # ASCII: a message may quote what no UTF-8 can hold.
        body = json.dumps({"error": self.document()}).encode("ascii")
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def too_busy(what: str, retry_seconds: float) -> Refused:
    """429, with the time after which it is worth to come back."""
    wait = str(max(1, math.ceil(retry_seconds)))
    return Refused(
        429, "busy", f"too many {what} wait already", hint=f"try again in {wait} s", headers={"Retry-After": wait}
    )


def shortened(text: str, *names: str) -> str:
    """A message with no more than the last part of these paths: where files lie is nobody's business."""
    for path in filter(None, map(path_of, names)):
        if path.parent != path.parent.parent:
            folder = f"{path.parent}/"
            # As they are, and as a record spells bytes that are no text.
            text = text.replace(folder, "").replace(folder.encode("utf-8", "backslashreplace").decode(), "")
    return text


def refusal(error: Exception, *private: str) -> Refused | None:
    """What an exception means to a caller; None for one that nobody foresaw.

    Args:
        private: paths to be `shortened`.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        parts = (f"{'.'.join(str(place) for place in one['loc'])}: {one['msg']}" for one in error.errors())
        return Refused(422, "invalid", "; ".join(parts), hint="see /openapi.json")
    if isinstance(error, HTTPException):
        kind = {404: "not_found", 405: "method", 400: "invalid"}.get(error.status_code, "http")
        return Refused(error.status_code, kind, str(error.detail), headers=error.headers)
    if isinstance(error, TimeoutError):
        return Refused(504, "timeout", "it took too long", hint="ask for less, or try again when there is less to do")
    if isinstance(error, sqlite3.OperationalError) or (isinstance(error, OSError) and error.errno in _FULL):
        return Refused(507, "storage", "the disk of the service is full or cannot be written")
    if isinstance(error, KeyreelError):
        status, kind = 500, "failed"
        if isinstance(error, SourceError):
            status, kind = (404, "not_found") if isinstance(error, SourceNotFound) else (422, "source")
        elif isinstance(error, LibraryError):
            status, kind = 503, "library"
        return Refused(status, kind, shortened(error.args[0], *private), hint=error.hint)
    return None
