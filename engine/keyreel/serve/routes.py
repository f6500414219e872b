"""The routes of the service; what they do stands in `service.py`, what goes in and out in `schemas.py`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Query, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.responses import FileResponse

from keyreel.library.types import Example, Filter
from keyreel.serve import schemas, uploads
from keyreel.serve.guard import Guard
from keyreel.serve.metrics import CONTENT_TYPE
from keyreel.serve.paths import OpenFile
from keyreel.serve.refusals import Refused, too_busy
from keyreel.serve.service import Service, job_state

M = TypeVar("M", bound=BaseModel)

PAGE = Path(__file__).with_name("page")
# Nothing but the page's own files and answers of this service: no inline script or style, no other host.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_STATIC_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# A picture under an address is that of one generation only until its video is indexed again.
_SHORT = {"Cache-Control": "private, max-age=60"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.Refusal, "description": "refused"},
    422: {"model": schemas.Refusal, "description": "not a valid request"},
}


def make_router(service: Service, *, hosts: tuple[str, ...] = (), alone: bool = False) -> APIRouter:
    """See `keyreel.serve.router`.

    Args:
        hosts: names in the Host header that are answered, besides the config's.
        alone: the application is the service and nothing else, so that its OpenAPI document is given out.
    """
    config = service.config
    guard = Guard(config, service.metrics, (*config.hosts, *hosts), service.private)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    whole = APIRouter(lifespan=lifespan)
    public = APIRouter(route_class=guard.route(public=True), responses=_ERRORS)
    closed = APIRouter(route_class=guard.route(), responses=_ERRORS)
    # An upload may take long, the next part of it may not.
    slow = APIRouter(route_class=guard.route(timeout_seconds=config.upload_seconds), responses=_ERRORS)
    _add_page(public)
    _add_health(public, closed, service)
    if alone:

        @closed.get("/openapi.json", include_in_schema=False)
        async def openapi(request: Request) -> dict[str, Any]:
            document: dict[str, Any] = await asyncio.to_thread(request.app.openapi)
            return document

    _add_search(closed, service)
    _add_videos(closed, service)
    _add_files(closed, service)
    _add_jobs(closed, slow, service)
    for part in (public, closed, slow):
        whole.include_router(part)
    return whole


def _base(request: Request) -> str:
    """Where the router is mounted: what comes before its own routes."""
    path: str = request.scope["path"]
    return path.rpartition("/api/v1/")[0]


def _add_page(router: APIRouter) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _STATIC_TYPES}

    def page_file(name: str) -> Response:
        if name not in files:
            raise Refused(404, "not_found", "there is no such file")
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(files[name], media_type=_STATIC_TYPES[files[name].suffix], headers=headers)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file("index.html")

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return page_file(name)


def _add_health(public: APIRouter, closed: APIRouter, service: Service) -> None:
    @public.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @closed.get("/readyz", tags=["health"])
    async def readyz() -> dict[str, Any]:
        """It can do its work: encodes a text and a picture, and searches the library."""
        return await service.pool.run(service.ready)

    @closed.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})


def _add_search(router: APIRouter, service: Service) -> None:
    idle = service.config.timeout_seconds
    # Pictures are held in memory: the next is not read before one is done with.
    pictures = asyncio.Semaphore(service.config.threads)

    async def by_text(text: str, k: int, where: Filter, base: str) -> schemas.Hits:
        began = time.perf_counter()
        if not text.strip() or len(text) > service.config.max_query:
            raise Refused(422, "invalid", f"q must have 1 to {service.config.max_query} characters, got {len(text)}")
        hits, weak = await service.batcher.search(text, k, where)
        seconds = time.perf_counter() - began
        found = service.moments(hits, base)
        return schemas.Hits(query=text, seconds=seconds, weak_score=weak, hits=found)

    @router.get("/api/v1/search", tags=["search"])
    async def search(request: Request, query: Annotated[schemas.TextSearch, Query()]) -> schemas.Hits:
        """The best moments of all videos for a text. Queries that come together share one pass."""
        return await by_text(query.q, query.k, query.where(), _base(request))

    @router.post("/api/v1/search", tags=["search"], openapi_extra=schemas.body(schemas.LikeRequest))
    async def search_picture(request: Request, query: Annotated[schemas.Search, Query()]) -> schemas.Hits:
        """The best moments for a picture, or for a frame of the library."""
        began = time.perf_counter()
        if uploads.kind_of(request) == "multipart/form-data":
            body, config = BytesIO(), service.config
            async with pictures:
                name = await uploads.read_file(request, body, most_bytes=config.image_bytes, idle_seconds=idle)
                pixels = config.image_pixels
                example: Any = await service.pool.run(uploads.picture, body.getvalue(), most_pixels=pixels)
                hits = await service.pool.run(service.search_picture, example, query.k, query.where())
        else:
            document = await uploads.read_json(request, idle_seconds=idle)
            like = _parsed(schemas.LikeRequest, document).like
            name, example = None, Example(like.video_id, like.seconds)
            hits = await service.pool.run(service.search_picture, example, query.k, query.where())
        seconds = time.perf_counter() - began
        return schemas.Hits(query=name, seconds=seconds, hits=service.moments(hits, _base(request)))

    @router.get("/api/v1/videos/{id}/moments", tags=["search"])
    async def moments(
        request: Request, id: str, q: Annotated[str, Query(min_length=1)], k: Annotated[int, Query(ge=1)] = 10
    ) -> schemas.Hits:
        """The best moments of one video for a text."""
        return await by_text(q, k, Filter(videos=(id,)), _base(request))


def _add_videos(router: APIRouter, service: Service) -> None:
    @router.get("/api/v1/videos", tags=["videos"])
    async def videos(request: Request, page: Annotated[schemas.Page, Query()]) -> schemas.Videos:
        """The videos of the library, in order of path."""
        return await service.pool.run(service.page, page.where(), page.offset, page.limit, _base(request))

    @router.get("/api/v1/videos/{id}", tags=["videos"])
    async def video(request: Request, id: str) -> schemas.VideoDetail:
        """All that is known of one video."""
        return await service.pool.run(service.detail, id, _base(request))

    @router.delete("/api/v1/videos/{id}", tags=["videos"], status_code=204)
    async def remove(id: str) -> None:
        """Takes a video out of the library. Its file stays, unless it was uploaded here."""
        await service.pool.run(service.remove, id)


def _add_files(router: APIRouter, service: Service) -> None:
    @router.get("/api/v1/videos/{id}/previews/{seconds}.jpg", tags=["videos"], response_class=Response)
    async def preview(id: str, seconds: schemas.Seconds) -> Response:
        """The key-frame that is nearest to a time, as a JPEG picture."""
        data = await service.pool.run(service.picture, id, seconds)
        return Response(data, media_type="image/jpeg", headers=_SHORT)

    @router.get("/api/v1/videos/{id}/sprite.jpg", tags=["videos"], response_class=Response)
    async def sprite(id: str) -> Response:
        """Small pictures of the whole video in one JPEG picture."""
        return Response(await service.pool.run(service.picture, id, None), media_type="image/jpeg", headers=_SHORT)

    @router.get("/api/v1/videos/{id}/thumbs.vtt", tags=["videos"], response_class=Response)
    async def thumbs(id: str) -> Response:
        """A WebVTT track that says which part of sprite.jpg shows which second."""
        return Response(await service.pool.run(service.track, id), media_type="text/vtt", headers=_SHORT)

    @router.get("/api/v1/videos/{id}/file", tags=["videos"], response_class=Response)
    async def file(id: str) -> Response:
        """The video itself, whole or in ranges; only where it lies under an allowed folder or was uploaded here."""
        opened, name = await service.pool.run(service.open, id)
        return OpenFile(opened, name)

    router.add_api_route("/api/v1/videos/{id}/file", file, methods=["HEAD"], include_in_schema=False)


def _add_jobs(router: APIRouter, slow: APIRouter, service: Service) -> None:
    jobs, uploading = service.jobs, asyncio.Semaphore(service.config.uploads)
    idle = service.config.timeout_seconds

    async def receive(request: Request) -> schemas.JobState:
        """Streams an upload to disk; what is not whole leaves nothing."""
        if uploading.locked():
            raise too_busy("uploads", 10)
        id = uuid.uuid4().hex
        part = jobs.uploads / f"{id}.part"
        async with uploading:
            try:
                with await asyncio.to_thread(part.open, "xb") as file:
                    name = await uploads.read_file(
                        request,
                        file,
                        most_bytes=service.config.upload_bytes,
                        idle_seconds=idle,
                    )
                    service.metrics.upload_bytes.inc(await asyncio.to_thread(uploads.settle, file))
                path = jobs.uploads / id / uploads.safe_name(name)
                return job_state(await asyncio.to_thread(jobs.submit, path, id=id, part=part))
            finally:
                await asyncio.to_thread(part.unlink, missing_ok=True)

    @slow.post("/api/v1/jobs", tags=["jobs"], status_code=202, openapi_extra=schemas.body(schemas.JobRequest))
    async def submit(request: Request) -> schemas.JobState:
        """Accepts a video to be indexed: a path under an allowed folder, or an upload. Accepted jobs are on disk."""
        await asyncio.to_thread(jobs.reserve)
        try:
            if uploads.kind_of(request) == "multipart/form-data":
                return await receive(request)
            asked = _parsed(schemas.JobRequest, await uploads.read_json(request, idle_seconds=idle))
            path = await service.pool.run(service.roots.find, asked.path)
            return job_state(await asyncio.to_thread(jobs.submit, path))
        finally:
            jobs.release()

    @router.get("/api/v1/jobs", tags=["jobs"])
    async def all_jobs() -> schemas.JobList:
        """The jobs, the latest first."""
        found = await service.pool.run(jobs.latest)
        return schemas.JobList(jobs=[job_state(job) for job in found])

    @router.get("/api/v1/jobs/{id}", tags=["jobs"])
    async def job(id: str) -> schemas.JobState:
        """One job."""
        return job_state(await service.pool.run(jobs.get, id))

    @router.delete("/api/v1/jobs/{id}", tags=["jobs"])
    async def cancel(id: str) -> schemas.JobState:
        """Cancels a job; one that is over stays as it is."""
        return job_state(await service.pool.run(jobs.cancel, id))


def _parsed(model: type[M], document: Any) -> M:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        parts = (f"{'.'.join(str(place) for place in one['loc'])}: {one['msg']}" for one in error.errors())
        raise Refused(422, "invalid", "; ".join(parts), hint="see /openapi.json") from error
