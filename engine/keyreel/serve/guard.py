"""What every request passes: who may ask, how long it may take, what an error looks like, what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import unquote

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from keyreel.config import ServeConfig
from keyreel.runtime.telemetry import span
from keyreel.serve.metrics import Metrics
from keyreel.serve.refusals import Refused, refusal

_log = logging.getLogger(__name__)

COOKIE = "keyreel_token"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SAFE = ("GET", "HEAD")
LEFT = 499  # nobody is there to read it; as in nginx's log
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    # For answers that are no page; the page's own comes with it.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cache-Control": "no-store",
}


class Guard:
    """The rules of one service.

    Args:
        hosts: names in the Host header that are answered; () for all. Without this, any web page could point its own
            name at this machine and read a service that listens on loopback only.
        private: paths of which errors tell no more than the last part.
    """

    def __init__(self, config: ServeConfig, metrics: Metrics, hosts: tuple[str, ...], private: Sequence[str]) -> None:
        self._config, self._metrics, self._private = config, metrics, private
        self._hosts = tuple(map(str.lower, hosts))
        self._token = None if config.token is None else _digest(config.token)

    def route(self, *, public: bool = False, timeout_seconds: float | None = None) -> type[APIRoute]:
        """A class of routes under these rules.

        Args:
            public: needs no token. timeout_seconds: the config's by default.
        """
        guard, seconds = self, timeout_seconds or self._config.timeout_seconds

        class Guarded(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                inner = super().get_route_handler()
                path = self.path

                async def handle(request: Request) -> Response:
                    return await guard.answer(inner, request, path, public=public, seconds=seconds)

                return handle

        return Guarded

    async def answer(
        self,
        inner: Callable[[Request], Awaitable[Response]],
        request: Request,
        path: str,
        *,
        public: bool,
        seconds: float,
    ) -> Response:
        """The answer to one request, in any case one."""
        began = time.perf_counter()
        self._metrics.at_work.inc()
        try:
            with span(f"{request.method} {path}"):
                self._check(request, public=public)
                async with asyncio.timeout(seconds):
                    response = await _unless_left(inner, request)
        except Exception as error:  # noqa: BLE001 - a service answers, whatever happened
            refused = refusal(error, *self._private)
            if refused is None:
                _log.exception("%s %s failed", request.method, path)
                refused = Refused(500, "internal", f"{type(error).__name__}", hint="the log of the server says more")
            response = refused.response()
        finally:
            self._metrics.at_work.dec()
        secure(response)
        self._metrics.requests.labels(request.method, path, str(response.status_code)).inc()
        self._metrics.request_seconds.labels(path).observe(time.perf_counter() - began)
        return response

    def _check(self, request: Request, *, public: bool) -> None:
        host = request.headers.get("host", "")
        if self._hosts and _hostname(host) not in self._hosts:
            hint = "name it in the option hosts"
            raise Refused(403, "host", f"this service does not answer to the name {host!r}", hint=hint)
        if public:
            return
        origin = request.headers.get("origin")
        if request.method not in SAFE and origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "origin", "a page of another site must not change anything here")
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            # A page cannot send a header with a picture or a video.
            given = unquote(request.cookies.get(COOKIE, "")) if request.method in SAFE else ""
        if not hmac.compare_digest(_digest(given.strip()), self._token):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "token", "a token is needed", hint="send Authorization: Bearer TOKEN", headers=headers)


def secure(response: Response) -> Response:
    """With the headers that keep a browser from doing more with the answer than meant."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _digest(token: str) -> bytes:
    # Digests are of one length, so that comparing them tells nothing of the token's.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _hostname(host: str) -> str:
    name = host.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


async def _unless_left(inner: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """Gives a request up when its caller leaves, as a page does that searches while one types.

    Only for requests without a body: nothing else reads from the connection then.
    """
    if request.method not in SAFE or request.headers.get("content-length", "0") != "0":
        return await inner(request)
    work = asyncio.ensure_future(inner(request))
    gone = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=LEFT)
    finally:
        work.cancel()
        gone.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
