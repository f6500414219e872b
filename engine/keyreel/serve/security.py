"""Checks who may call, adds security headers, and turns errors into answers."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from keyreel.config import ServeConfig
from keyreel.errors import KeyreelError, LibraryError, SourceError, SourceNotFound
from keyreel.library.files import path_of
from keyreel.runtime.telemetry import span
from keyreel.serve.metrics import Metrics

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

COOKIE = "keyreel_token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
READS = ("GET", "HEAD")
CALLER_LEFT = 499  # as in nginx's log
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    # The page sets its own policy.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cache-Control": "no-store",
}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_bearer = HTTPBearer(auto_error=False)


class ApiError(Exception):
    """An error to send to the caller: {"error": {"kind", "message", "hint"}}.

    Args:
        status: HTTP status.
        kind: one word for programs.
        message, hint: for people.
    """

    def __init__(
        self, status: int, kind: str, message: str, *, hint: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.hint = status, kind, message, hint
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """Makes the content of "error"."""
        return {"kind": self.kind, "message": self.message, "hint": self.hint}

    def response(self) -> Response:
        # ASCII: a message may quote characters that UTF-8 cannot encode.
        body = json.dumps({"error": self.document()}).encode("ascii")
        return add_headers(Response(body, self.status, headers=self.headers, media_type="application/json"))


def too_busy(what: str, seconds: int) -> ApiError:
    """Makes a 429 with the seconds to wait."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, "busy", f"too many {what} wait already", hint=f"try again in {seconds} s", headers=headers)


def add_headers(response: Response) -> Response:
    """Adds the headers that restrict what a browser does with the answer."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def redact_paths(text: str, *names: str) -> str:
    """Cuts these paths in a message to their last part: callers must not learn where files are."""
    for path in filter(None, map(path_of, names)):
        if path.parent != path.parent.parent:
            folder = f"{path.parent}/"
            # Records escape bytes that are not UTF-8 with backslashes.
            text = text.replace(folder, "").replace(folder.encode("utf-8", "backslashreplace").decode(), "")
    return text


def to_api_error(error: Exception, *private: str) -> ApiError | None:
    """Converts an exception to an answer; None for a bug.

    Args:
        private: paths to redact.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        parts = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return ApiError(422, "invalid", "; ".join(parts), hint="see /openapi.json")
    if isinstance(error, HTTPException):
        kind = {404: "not_found", 405: "method", 400: "invalid"}.get(error.status_code, "http")
        return ApiError(error.status_code, kind, str(error.detail), headers=error.headers)
    if isinstance(error, TimeoutError):
        return ApiError(504, "timeout", "it took too long", hint="ask for less, or try again when the service is idle")
    if isinstance(error, sqlite3.OperationalError) or (isinstance(error, OSError) and error.errno in _DISK_FULL):
        return ApiError(507, "storage", "the disk of the service is full or cannot be written")
    if isinstance(error, KeyreelError):
        status, kind = 500, "failed"
        if isinstance(error, SourceError):
            status, kind = (404, "not_found") if isinstance(error, SourceNotFound) else (422, "source")
        elif isinstance(error, LibraryError):
            status, kind = 503, "library"
        return ApiError(status, kind, redact_paths(error.args[0], *private), hint=error.hint)
    return None


def problem(error: Exception, *private: str) -> dict[str, Any]:
    """Describes why a job or a copy failed; a bug by its exception. See `to_api_error`."""
    unknown = ApiError(500, "failed", redact_paths(f"{type(error).__name__}: {error}", *private))
    return (to_api_error(error, *private) or unknown).document()


class Security:
    """Applies the rules for every request.

    They are a class of routes, not a middleware, so that they also apply inside another application.

    Args:
        hosts: names in the Host header to answer to; () for all. Without it, any web page could point its own name at
            this machine and read a service on loopback.
        private: paths to redact in errors.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics, hosts: Sequence[str], private: Sequence[str]) -> None:
        self._config, self._metrics, self._private = config, metrics, private
        self._hosts = {host.lower() for host in hosts}

    def route(self, *, public: bool = False, timeout_seconds: float | None = None) -> type[APIRoute]:
        """Makes a class of routes that apply these rules.

        Args:
            public: needs no token.
            timeout_seconds: by default the config's.
        """
        security, seconds = self, timeout_seconds or self._config.timeout_seconds

        class Route(APIRoute):
            def __init__(self, path: str, endpoint: Callable[..., Any], *, summary: str | None = None, **rest: Any):
                first = (endpoint.__doc__ or "").partition(". ")[0].rstrip(".")
                super().__init__(path, endpoint, summary=summary or first, **rest)

            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handler, path = super().get_route_handler(), self.path

                async def handle(request: Request) -> Response:
                    return await security.answer(handler, request, path, public=public, seconds=seconds)

                return handle

        return Route

    async def answer(self, handler: Handler, request: Request, path: str, *, public: bool, seconds: float) -> Response:
        """Calls the handler. Returns its answer or error, with headers, and counts it."""
        began, name = time.perf_counter(), f"{request.method} {path}"
        with self._metrics.at_work.track_inprogress():
            try:
                with span(name):
                    await self._check(request, public=public)
                    async with asyncio.timeout(seconds):
                        response = add_headers(await _unless_caller_leaves(handler, request))
            except Exception as error:  # noqa: BLE001 - a service answers in any case
                answer = to_api_error(error, *self._private)
                if answer is None:
                    _log.exception("%s failed", name)
                    answer = ApiError(500, "internal", type(error).__name__, hint="the log of the server says more")
                response = answer.response()
        self._metrics.requests.labels(request.method, path, str(response.status_code)).inc()
        self._metrics.request_seconds.labels(path).observe(time.perf_counter() - began)
        return response

    async def _check(self, request: Request, *, public: bool) -> None:
        """Checks host, origin and token, before reading the body."""
        host = request.headers.get("host", "")
        if self._hosts and _hostname(host) not in self._hosts:
            hint = "allow it: keyreel serve --answer-to NAME, ServeConfig(hosts=...)"
            raise ApiError(403, "host", f"this service does not answer to the name {host!r}", hint=hint)
        if public:
            return
        origin = request.headers.get("origin")
        if request.method not in READS and origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, "origin", "a page of another site must not change anything here")
        if self._config.token is None:
            return
        # A page cannot send headers for pictures and videos.
        given = unquote(request.cookies.get(COOKIE, "")) if request.method in READS else ""
        if credentials := await _bearer(request):
            given = credentials.credentials.strip()
        if not secrets.compare_digest(given.encode(), self._config.token.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "token", "a token is needed", hint="send Authorization: Bearer TOKEN", headers=headers)


def _hostname(host: str) -> str:
    name = host.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


async def _unless_caller_leaves(handler: Handler, request: Request) -> Response:
    """Calls the handler; stops when the caller disconnects, as a page does that searches while someone types.

    Only for requests without a body, when nothing else reads from the connection.
    """
    if request.method not in READS or request.headers.get("content-length", "0") != "0":
        return await handler(request)
    work, gone = asyncio.ensure_future(handler(request)), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=CALLER_LEFT)
    finally:
        work.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
