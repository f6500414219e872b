"""The routes of the service."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from keyreel import __version__
from keyreel.chance import matches_well
from keyreel.library.types import Extras, Filter
from keyreel.serve import models, uploads
from keyreel.serve.files import OpenFile, file_name, safe_name
from keyreel.serve.metrics import CONTENT_TYPE
from keyreel.serve.security import LOOPBACK, ApiError, Security, to_api_error, too_busy
from keyreel.serve.service import Service
from keyreel.serve.workers import Answer
from keyreel.types import Combined, Example
from keyreel.types import Query as AnyQuery

PAGE = Path(__file__).with_name("page")
STORYBOARD_STYLE = PAGE.parents[1] / "render" / "page.css"
# Only the page's own files and answers of this service: no inline script or style, no other host.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
API = (
    "Searches a library of videos, and adds videos to it. Times are seconds from the start of a video. "
    "A service with a token wants the header `Authorization: Bearer TOKEN`."
)
MAX_QUERY = 1000  # characters
MAX_UPLOADS = 32  # at a time
UPLOAD_SECONDS = 3600.0  # of one upload; one that stands still ends after the config's timeout_seconds
_STATIC_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# A picture changes when its video is indexed again.
_SHORT = {"Cache-Control": "private, max-age=60"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": models.Refusal, "description": "Refused"},
    422: {"model": models.Refusal, "description": "The request is not valid"},
}


def make_app(service: Service) -> FastAPI:
    """See `keyreel.serve.app`."""
    # FastAPI's own /docs loads scripts from other hosts, ours does not; redirects would trust the Host header.
    app = FastAPI(
        title="keyreel",
        version=__version__,
        description=API,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,  # the methods of generated clients
    )
    app.include_router(make_router(service, alone=True))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: Any) -> Response:
        answer = to_api_error(error)
        assert answer is not None
        return answer.response()

    return app


def make_router(service: Service, *, alone: bool = False) -> APIRouter:
    """See `keyreel.serve.router`.

    Args:
        alone: the application is the service and nothing else: it listens at the config's host, and serves its OpenAPI
            document.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.jobs.start)
        if (engine := service.library.engine) is not None:
            await asyncio.to_thread(engine.chances)  # else the first caller would wait for it
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    config = service.config
    hosts: tuple[str, ...] = config.hosts or LOOPBACK
    if alone and not config.hosts:  # who listens beyond this machine may have any name
        hosts = (*LOOPBACK, config.host) if config.loopback else ("*",)
    security = Security(config, service.metrics, () if "*" in hosts else hosts, service.private)
    public = APIRouter(route_class=security.route(public=True), responses=_ERRORS)
    closed = APIRouter(route_class=security.route(), responses=_ERRORS)
    slow = APIRouter(route_class=security.route(timeout_seconds=UPLOAD_SECONDS), responses=_ERRORS)
    _add_page(public, docs=alone)
    _add_health(public, closed, service)
    if alone:
        # Twice: the page's cookie, which /docs needs where there is a token, is sent under /api/v1/ only.
        @closed.get("/openapi.json", include_in_schema=False)
        @closed.get("/api/v1/openapi.json", include_in_schema=False)
        async def openapi(request: Request) -> dict[str, Any]:
            document: dict[str, Any] = await asyncio.to_thread(request.app.openapi)
            return document

    _add_search(closed, service)
    _add_videos(closed, service)
    _add_jobs(closed, slow, service)
    whole = APIRouter(lifespan=lifespan)
    for part in (public, closed, slow):
        whole.include_router(part)
    return whole


def _base(request: Request) -> str:
    """Where the router is mounted: what comes before its own routes."""
    path: str = request.scope["path"]
    return path.rpartition("/api/v1/")[0]


def _add_page(router: APIRouter, *, docs: bool) -> None:
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _STATIC_TYPES}
    files["storyboard.css"] = STORYBOARD_STYLE
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        files[name] = Path(fastapi_offline.__file__).with_name("static") / name

    @router.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "not_found", "there is no such file")
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(files[name], media_type=_STATIC_TYPES[files[name].suffix], headers=headers)

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return await static("index.html")

    if docs:
        shown = get_swagger_ui_html(
            openapi_url="api/v1/openapi.json",
            title="keyreel API",
            swagger_js_url="static/swagger-ui-bundle.js",
            swagger_css_url="static/swagger-ui.css",
            swagger_favicon_url="static/icon.svg",
        )
        body = bytes(shown.body)
        inline = body.partition(b"<script>")[2].partition(b"</script>")[0]
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        policy = PAGE_POLICY.replace("script-src 'self'", f"script-src 'self' 'sha256-{digest}'")
        policy = policy.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")

        @router.get("/docs", include_in_schema=False)
        async def api_docs() -> Response:
            headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
            return Response(body, media_type="text/html", headers=headers)


def _add_health(public: APIRouter, closed: APIRouter, service: Service) -> None:
    @public.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Answers as long as the process is alive."""
        return {"status": "ok"}

    @closed.get("/readyz", tags=["health"])
    async def readyz() -> dict[str, Any]:
        """Checks that searches work. Encodes a text and a picture, and searches the library."""
        return await service.pool.run(service.ready)

    @closed.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})


def _add_search(router: APIRouter, service: Service) -> None:
    idle = service.config.timeout_seconds
    # Pictures are held in memory: the next one is not read before one is done.
    pictures = asyncio.Semaphore(service.config.threads)

    def answer(query: str | None, found: Answer, began: float, base: str) -> models.Hits:
        return models.Hits(
            query=query,
            seconds=time.perf_counter() - began,
            unknown_words=list(found.unknown_words),
            left_out=list(map(file_name, found.left_out)),  # callers must not learn the folders
            matches_well=matches_well(hit.chance for hit in found.hits),
            hits=models.moments(found.hits, base),
        )

    async def by_text(text: str, query: AnyQuery | Combined, k: int, where: Filter, base: str) -> models.Hits:
        began = time.perf_counter()
        if not text.strip() or len(text) > MAX_QUERY:
            raise ApiError(422, "invalid", f"q must have 1 to {MAX_QUERY} characters, got {len(text)}")
        return answer(text, await service.batcher.search(query, k, where), began, base)

    @router.get("/api/v1/search", tags=["search"])
    async def search(request: Request, query: Annotated[models.TextSearch, Query()]) -> models.Hits:
        """Finds the best moments of all videos for a text. Queries that arrive together share one pass."""
        return await by_text(query.q, query.query(query.q), query.k, query.where(), _base(request))

    @router.post("/api/v1/search", tags=["search"], openapi_extra=models.body(models.LikeRequest))
    async def search_picture(request: Request, query: Annotated[models.Search, Query()]) -> models.Hits:
        """Finds the best moments for a picture, or for a frame of the library."""
        began = time.perf_counter()
        if uploads.is_upload(request):
            body = BytesIO()
            async with pictures:
                name = await uploads.read_file(request, body, max_bytes=uploads.IMAGE_BYTES, idle_seconds=idle)
                picture = await service.pool.run(uploads.picture, body.getvalue())
                found = await service.pool.run(service.search, query.query(picture), query.k, query.where())
        else:
            name, like = None, (await uploads.read_json(request, models.LikeRequest, idle_seconds=idle)).like
            example = Example(like.video_id, like.seconds)
            found = await service.pool.run(service.search, query.query(example), query.k, query.where())
        return answer(name, found, began, _base(request))

    @router.get("/api/v1/videos/{id}/moments", tags=["search"])
    async def moments(
        request: Request, id: str, q: Annotated[str, Query(min_length=1)], k: Annotated[int, Query(ge=1)] = 10
    ) -> models.VideoHits:
        """Finds the best moments of one video for a text. Its curve has the score of each frame."""
        found = await by_text(q, q, k, Filter(videos=(id,)), _base(request))
        return models.VideoHits(**dict(found), curve=await service.pool.run(service.curve, id, q))


def _add_videos(router: APIRouter, service: Service) -> None:
    @router.get("/api/v1/videos", tags=["videos"])
    async def videos(request: Request, page: Annotated[models.Page, Query()]) -> models.Videos:
        """Lists the videos of the library, in order of path."""
        return await service.pool.run(service.videos, page, _base(request))

    @router.get("/api/v1/videos/{id}", tags=["videos"])
    async def video(request: Request, id: str) -> models.VideoDetail:
        """Describes one video: its key-frames, shots and scenes."""
        return await service.pool.run(service.detail, id, _base(request))

    @router.delete("/api/v1/videos/{id}", tags=["videos"], status_code=204)
    async def remove(id: str) -> None:
        """Removes a video from the library. Its file stays, unless it was uploaded here."""
        await service.pool.run(service.remove, id)

    @router.get("/api/v1/videos/{id}/previews/{seconds}.jpg", tags=["videos"], response_class=Response)
    async def preview(id: str, seconds: models.Seconds, nearest: bool = False) -> Response:
        """Gives the frame shown at a time, as JPEG. With `nearest` the nearest stored key-frame, which is faster."""
        data = await service.pool.run(service.preview, id, seconds, nearest=nearest)
        return Response(data, media_type="image/jpeg", headers=_SHORT)

    async def extras(id: str) -> Extras:
        return await service.pool.run(service.extras, id)

    @router.get("/api/v1/videos/{id}/sprite.jpg", tags=["videos"], response_class=Response)
    async def sprite(id: str) -> Response:
        """Gives thumbnails of the whole video on one JPEG sheet."""
        return Response((await extras(id)).sprite, media_type="image/jpeg", headers=_SHORT)

    @router.get("/api/v1/videos/{id}/thumbs.vtt", tags=["videos"], response_class=Response)
    async def thumbs(id: str) -> Response:
        """Gives a WebVTT track for a seek bar. Each cue names the part of sprite.jpg that shows its seconds."""
        return Response((await extras(id)).vtt, media_type="text/vtt", headers=_SHORT)

    @router.get("/api/v1/videos/{id}/file", tags=["videos"], response_class=Response)
    async def file(id: str) -> Response:
        """Gives the video file, whole or in ranges. It must lie under an allowed folder, or be uploaded here."""
        return OpenFile(*await service.pool.run(service.open, id))

    router.add_api_route("/api/v1/videos/{id}/file", file, methods=["HEAD"], include_in_schema=False)

    @router.post("/api/v1/videos/{id}/playable", tags=["videos"])
    async def playable(id: str) -> models.Playable:
        """Makes a copy that browsers can play. Repeat this at least every ten seconds until it is done, or it stops."""
        return await service.pool.run(service.playable, id)

    @router.get("/api/v1/videos/{id}/playable.mp4", tags=["videos"], response_class=Response)
    async def playable_file(id: str) -> Response:
        """Gives the copy that browsers can play, whole or in ranges. Answers 404 until it is done."""
        return OpenFile(await service.pool.run(service.open_playable, id), "playable.mp4")


def _add_jobs(router: APIRouter, slow: APIRouter, service: Service) -> None:
    jobs, uploading = service.jobs, asyncio.Semaphore(MAX_UPLOADS)
    idle = service.config.timeout_seconds

    async def receive(request: Request) -> models.JobState:
        """Streams an upload to disk; one that is not whole leaves nothing."""
        if uploading.locked():
            raise too_busy("uploads", 10)
        id = uuid.uuid4().hex
        part = jobs.uploads / f"{id}.part"
        length = request.headers.get("content-length", "")
        async with uploading:
            try:
                space = jobs.space(int(length) if length.isdecimal() else None)
                with space as most, await asyncio.to_thread(part.open, "xb") as file:
                    name = await uploads.read_file(
                        request, file, max_bytes=most, idle_seconds=idle, least_rate=uploads.UPLOAD_RATE
                    )
                    await asyncio.to_thread(file.flush)
                    await asyncio.to_thread(os.fsync, file.fileno())
                service.metrics.upload_bytes.inc(part.stat().st_size)
                path = jobs.uploads / id / safe_name(name)
                return await asyncio.to_thread(jobs.submit, path, id=id, part=part)
            finally:
                await asyncio.to_thread(part.unlink, missing_ok=True)

    @slow.post("/api/v1/jobs", tags=["jobs"], status_code=202, openapi_extra=models.body(models.JobRequest))
    async def submit(request: Request) -> models.JobState:
        """Accepts a video to index: a path under an allowed folder, or an upload. The job is then on disk."""
        # Only a whole upload takes a place in the queue: a body that drips holds none.
        await asyncio.to_thread(jobs.check_room)
        if uploads.is_upload(request):
            return await receive(request)
        asked = await uploads.read_json(request, models.JobRequest, idle_seconds=idle)
        path = await service.pool.run(service.roots.find, asked.path)
        return await asyncio.to_thread(jobs.submit, path)

    @router.get("/api/v1/jobs", tags=["jobs"])
    async def all_jobs() -> models.JobList:
        """Lists the jobs, the latest first."""
        return models.JobList(jobs=[*await service.pool.run(jobs.latest)])

    @router.get("/api/v1/jobs/{id}", tags=["jobs"])
    async def job(id: str) -> models.JobState:
        """Describes one job: its state and progress."""
        return await service.pool.run(jobs.get, id)

    @router.delete("/api/v1/jobs/{id}", tags=["jobs"])
    async def cancel(id: str) -> models.JobState:
        """Cancels a job. A job that is over does not change."""
        return await service.pool.run(jobs.cancel, id)
