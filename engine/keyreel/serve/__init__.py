"""The service: a library over HTTP, with one web page.

Put a search box into a FastAPI application of your own:

    from fastapi import FastAPI
    from keyreel.serve import router

    app = FastAPI()
    app.include_router(router(library), prefix="/video")

The routes are in `app.py`. With a token, every request except those for /healthz and the page's own files must carry
`Authorization: Bearer TOKEN`. A browser fetches pictures and videos without that header, so GET and HEAD also take the
cookie `keyreel_token=TOKEN` (URL-encoded), which the page sets itself, with SameSite=Strict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from keyreel.config import ServeConfig
from keyreel.errors import import_extra

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from keyreel import Library


def router(library: Library, config: ServeConfig | None = None) -> APIRouter:
    """All routes of the service, for another application; its lifespan starts and drains the jobs.

    Args:
        library: with an engine; without one nothing can be searched by text or indexed.

    Raises:
        MissingExtra: FastAPI or what it needs is not installed.
    """
    _require()
    from keyreel.serve.app import make_router
    from keyreel.serve.service import Service

    return make_router(Service(library, config or ServeConfig()))


def app(library: Library, config: ServeConfig | None = None) -> FastAPI:
    """The service as an application: `router` at the root, and /openapi.json.

    Raises:
        MissingExtra: FastAPI or what it needs is not installed.
    """
    _require()
    from keyreel.serve.server import make_app
    from keyreel.serve.service import Service

    return make_app(Service(library, config or ServeConfig()))


def run(
    library: Library, config: ServeConfig | None = None, *, listening: Callable[[str], None] = lambda _: None
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes open requests and gives running jobs `drain_seconds`.

    Jobs that were accepted and not finished are resumed at the next start.

    Args:
        listening: called with the address, http://HOST:PORT, once the service takes connections.

    Raises:
        MissingExtra: uvicorn, FastAPI or what they need is not installed.
        RenderError: the port is taken, or the host is not an address of this machine.
        LibraryError: another server works in the same folder, or the folder cannot be written.
    """
    _require()
    import_extra("uvicorn", extra="serve", purpose="keyreel serve")
    from keyreel.serve.server import serve

    serve(library, config or ServeConfig(), listening)


def _require() -> None:
    for module in ("fastapi", "python_multipart", "prometheus_client"):
        import_extra(module, extra="serve", purpose="the service")
