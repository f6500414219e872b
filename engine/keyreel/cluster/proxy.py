"""Middleware for Ray Serve's HTTP proxies."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from starlette.middleware import Middleware

from keyreel.config import ServeConfig
from keyreel.serve.security import READS, ApiError


def middlewares() -> list[Middleware]:
    """The middlewares, for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Unavailable)]


class Unavailable:
    """Answers 503 if Serve's proxy has no answer.

    The replica may have died during the request, which would become a 500, or between the head of its answer and the
    body: a head is kept back until a part of the body comes. Or there is no replica for longer than a request may take
    (the default of `ServeConfig`); the time to receive a body does not count.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, head = False, None
        bounded = scope["method"] in (*READS, "DELETE")

        async def noted(message: Any) -> None:
            nonlocal begun, head
            deadline.reschedule(None)
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                begun, kept, head = True, head, None
                await send(kept)
            await send(message)

        with suppress(TimeoutError):
            async with asyncio.timeout(ServeConfig().timeout_seconds if bounded else None) as deadline:
                await self._app(scope, receive, noted)
        if not begun:
            hint, headers = "try again in some seconds", {"Retry-After": "1"}
            lost = ApiError(
                503, "lost", "no process answers: the service is starting or stopping", hint=hint, headers=headers
            )
            await lost.response()(scope, receive, send)
