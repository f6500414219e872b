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
from keyreel.serve.guard import LOOPBACK, secure
from keyreel.serve.refusals import refusal
from keyreel.serve.routes import make_router
from keyreel.serve.service import Service


def make_app(service: Service) -> FastAPI:
    """See `keyreel.serve.app`."""
    # The usual pages of documentation load scripts from elsewhere.
    # Redirects to a path with or without a slash would lead to whatever the Host header says.
    made = FastAPI(title="keyreel", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    config = service.config
    own = (*LOOPBACK, config.host) if config.loopback and not config.hosts else ()
    made.include_router(make_router(service, hosts=own, alone=True))

    @made.exception_handler(HTTPException)
    async def unknown(_: Request, error: Any) -> Response:
        refused = refusal(error)
        assert refused is not None
        return secure(refused.response())

    return made


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
    # uvicorn drains, then raises the signal again: whoever asked for an orderly end gets one, with exit status 0.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
    try:
        with _listening(config) as there:
            # uvicorn would log what goes wrong here, and end the process.
            service.start()
            host = f"[{config.host}]" if ":" in config.host else config.host
            listening(f"http://{host}:{there.getsockname()[1]}")
            with suppress(KeyboardInterrupt):  # raised again after the drain
                server.run(sockets=[there])
    finally:
        service.close()
        if main:
            signal.signal(signal.SIGTERM, before)


def _listening(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = f"{config.host}:{config.port}: cannot listen there: {error.strerror or error}"
        raise RenderError(reason, hint="--port takes another port, --host another address of this machine") from error
