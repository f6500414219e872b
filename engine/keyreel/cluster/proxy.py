"""What Ray Serve's HTTP proxies do besides passing requests on."""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware

from keyreel.serve.security import ApiError


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Unavailable)]


class Unavailable:
    """Answers 503 where Serve's proxy would answer 500 with a stack: the replica at work on the request has died.

    The service's own answers carry headers of its own, and pass.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        replaced = False

        async def checked(message: Any) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 500:
                names = {name.lower() for name, _ in message["headers"]}
                replaced = b"x-content-type-options" not in names
            if not replaced:
                await send(message)

        await self._app(scope, receive, checked)
        if replaced:
            hint, headers = "try again in some seconds", {"Retry-After": "1"}
            lost = ApiError(503, "lost", "the process that was at work on this has ended", hint=hint, headers=headers)
            await lost.response()(scope, receive, send)
