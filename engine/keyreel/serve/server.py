"""The service as an application of its own, and as a process."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from keyreel import Library
from keyreel.config import ServeConfig
from keyreel.errors import RenderError
from keyreel.serve.app import make_router
from keyreel.serve.security import LOOPBACK, to_api_error
from keyreel.serve.service import Service


def make_app(service: Service) -> FastAPI:
    """See `keyreel.serve.app`."""
    # FastAPI's own documentation pages load scripts from other hosts; redirects would trust the Host header.
    app = FastAPI(title="keyreel", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    config = service.config
    own = (*LOOPBACK, config.host) if config.loopback and not config.hosts else ()
    app.include_router(make_router(service, hosts=own, alone=True))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: Any) -> Response:
        answer = to_api_error(error)
        assert answer is not None
        return answer.response()

    return app


def serve(library: Library, config: ServeConfig, listening: Callable[[str], None]) -> None:
    """See `keyreel.serve.run`."""
    service = Service(library, config)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        )
    )
    main = threading.current_thread() is threading.main_thread()
    # uvicorn raises the signal again after it has drained; ignored here, so that the exit status is 0.
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
    try:
        with _listening(config) as listener:
            # Here and not in uvicorn, which would log an error and end the process.
            service.jobs.start()
            host = f"[{config.host}]" if ":" in config.host else config.host
            listening(f"http://{host}:{listener.getsockname()[1]}")
            with suppress(KeyboardInterrupt):  # raised again after the drain
                server.run(sockets=[listener])
    finally:
        service.close()
        if main:
            signal.signal(signal.SIGTERM, previous)


def _listening(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = f"{config.host}:{config.port}: cannot listen there: {error.strerror or error}"
        raise RenderError(reason, hint="--port takes another port, --host another address of this machine") from error
