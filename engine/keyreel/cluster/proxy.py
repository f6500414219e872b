"""What Ray Serve's HTTP proxies do besides passing requests on."""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware

from keyreel.serve.security import ApiError


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Unavailable)]


class Unavailable:
    """Answers 503 where Serve's proxy has no answer: the replica at work on the request has died. The server would
    make that a 500.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        begun = scope["type"] != "http"

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        await self._app(scope, receive, noted)
        if not begun:
            hint, headers = "try again in some seconds", {"Retry-After": "1"}
            lost = ApiError(503, "lost", "the process that was at work on this has ended", hint=hint, headers=headers)
            await lost.response()(scope, receive, send)
