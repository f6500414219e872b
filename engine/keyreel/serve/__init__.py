"""The service: serves a library over HTTP, with a web page.

To add it to your own FastAPI application:

    from fastapi import FastAPI
    from keyreel.serve import router

    app = FastAPI()
    app.include_router(router(library), prefix="/video")

The routes are in `app.py`. With a token, every request except those for /healthz and the page's own files must carry
`Authorization: Bearer TOKEN`. A browser fetches pictures and videos without that header, so GET and HEAD also take the
cookie `keyreel_token=TOKEN` (URL-encoded), which the page sets itself, with SameSite=Strict.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from keyreel.config import ServeConfig
from keyreel.errors import RenderError, import_extra

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from keyreel import Library
    from keyreel.serve.service import Service


def router(library: Library, config: ServeConfig | None = None) -> APIRouter:
    """Makes a router with all routes of the service, for another application. Its lifespan starts and drains the jobs.

    It answers only to the host names of this machine, since any web page could point its own name here.
    `ServeConfig(hosts=("films.example.com",))` adds yours, `hosts=("*",)` allows all.

    Args:
        library: has an engine; without one, nobody can search by text or index.
        config: limits, token, host names and folders; by default `ServeConfig()`.

    Raises:
        MissingExtra: FastAPI or what it needs is not installed.
    """
    service = _service(library, config)
    from keyreel.serve.app import make_router

    return make_router(service)


def app(library: Library, config: ServeConfig | None = None) -> FastAPI:
    """Makes an application of the service: `router` at the root, /docs and /openapi.json.

    Raises:
        MissingExtra: FastAPI or what it needs is not installed.
    """
    service = _service(library, config)
    from keyreel.serve.app import make_app

    return make_app(service)


def run(
    library: Library, config: ServeConfig | None = None, *, listening: Callable[[str], None] = lambda _: None
) -> None:
    """Serves until SIGTERM or SIGINT. Then it finishes open requests, and gives running jobs `drain_seconds`.

    The next start resumes unfinished jobs.

    Args:
        listening: called with the address, http://HOST:PORT, when the service accepts connections.

    Raises:
        MissingExtra: uvicorn, FastAPI or what they need is not installed.
        RenderError: the port is in use, or the host is not an address of this machine.
        LibraryError: another server uses the folder, or the folder cannot be written.
    """
    service = _service(library, config)
    import_extra("uvicorn", extra="serve", purpose="keyreel serve")
    import uvicorn

    from keyreel.serve.app import make_app
    from keyreel.serve.connections import Connection, files

    config = service.config
    seconds = max(1, round(config.drain_seconds))
    options = uvicorn.Config(
        make_app(service),
        http=type("Connection", (Connection,), {"header_seconds": config.timeout_seconds}),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=seconds,
        # asyncio accepts this many at once; if it then runs out of files, it never recovers.
        backlog=min(2048, max(16, files() // 8)),
    )
    main = threading.current_thread() is threading.main_thread()
    # uvicorn raises the signal again after it has drained; ignored here, so that the exit status is 0.
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
    try:
        with _listen(config) as listener:
            # Here, since uvicorn would log an error and end the process.
            service.jobs.start()
            host = f"[{config.host}]" if ":" in config.host else config.host
            listening(f"http://{host}:{listener.getsockname()[1]}")
            with suppress(KeyboardInterrupt):  # raised again after the drain
                uvicorn.Server(options).run(sockets=[listener])
    finally:
        service.close()
        if main:
            signal.signal(signal.SIGTERM, previous)


def _service(library: Library, config: ServeConfig | None) -> Service:
    for module in ("fastapi", "fastapi_offline", "python_multipart", "prometheus_client"):
        import_extra(module, extra="serve", purpose="the service")
    from keyreel.serve.service import Service

    return Service(library, config or ServeConfig())


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = f"{config.host}:{config.port}: cannot listen there: {error.strerror or error}"
        raise RenderError(reason, hint="--port takes another port, --host another address of this machine") from error
    # Connections inherit it. asyncio sets it only on sockets whose `proto` is TCP. Without it each answer on a kept
    # connection waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
