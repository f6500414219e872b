"""The JSON of requests and answers. Times are seconds, addresses are paths on this server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from keyreel.library.types import Extras, Filter, LibraryHit, Preview, Record
from keyreel.serve.files import file_name
from keyreel.serve.security import redact_paths
from keyreel.types import AnsweredBy, Combined, Example, Query, Region

Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
State = Literal["queued", "running", "done", "failed", "cancelled"]
Text = Annotated[str, Field(max_length=1000)]
Frame = Annotated[str, Field(pattern=r"^[0-9a-f]{32}@[0-9]{1,9}(\.[0-9]{1,9})?$")]


class Filters(BaseModel):
    """Restricts videos and times. Conditions that are not given do not restrict."""

    video: Annotated[list[Text], Field(max_length=100, description="ids of videos")] = []
    path: Annotated[Text | None, Field(description="glob over the whole path, */holiday/*.mp4")] = None
    tag: Annotated[list[Text], Field(max_length=100, description="all of them")] = []
    after: Annotated[datetime | None, Field(description="recorded at this time or later; UTC without a zone")] = None
    before: Annotated[datetime | None, Field(description="recorded before this time")] = None
    min_duration: Seconds | None = None
    max_duration: Seconds | None = None
    start: Annotated[Seconds | None, Field(description="frames from this second of their video on")] = None
    stop: Annotated[Seconds | None, Field(description="frames before this second of their video")] = None

    def where(self) -> Filter:
        """Converts it for the library; hashable."""
        return Filter(
            per_video=getattr(self, "per_video", None),
            videos=tuple(self.video),
            path=self.path,
            tags=tuple(self.tag),
            start_seconds=self.start,
            stop_seconds=self.stop,
            min_duration_seconds=self.min_duration,
            max_duration_seconds=self.max_duration,
            after=_timestamp(self.after),
            before=_timestamp(self.before),
        )


class Search(Filters):
    """The parameters of a search."""

    also: Annotated[list[Text], Field(max_length=8, description="texts that must fit, too")] = []
    without: Annotated[list[Text], Field(max_length=8, description="texts that must not fit")] = []
    more: Annotated[list[Frame], Field(max_length=32, description="more like these frames, ID@SECONDS")] = []
    less: Annotated[list[Frame], Field(max_length=32, description="less like these frames, ID@SECONDS")] = []
    per_video: Annotated[int | None, Field(ge=1, description="most moments of one video")] = None
    k: Annotated[int, Field(ge=1, description="most moments")] = 10

    def query(self, of: Query) -> Query | Combined:
        """Adds the conditions to a query; hashable if the query is."""
        also: list[Query] = [*self.also, *map(_example, self.more)]
        without: list[Query] = [*self.without, *map(_example, self.less)]
        return Combined(of, also, without) if also or without else of


class TextSearch(Search):
    """A search by text."""

    q: Annotated[str, Field(min_length=1, description="what is seen")]


class Page(Filters):
    """A part of the list of videos."""

    offset: Annotated[int, Field(ge=0, le=10**9)] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 50


class Moment(BaseModel):
    """A span of a video that answers a query."""

    video_id: str
    video: str  # file name
    start_seconds: float
    stop_seconds: float
    pts_seconds: float
    score: float
    answered_by: AnsweredBy  # the vector that matched: of the whole picture, or of its subject
    region: Region | None  # x, y, width, height of the subject in the best frame, as fractions
    chance: float | None  # that the best frame shows what the text says; null if unknown
    video_score: float
    keyframe_seconds: float
    folded: int
    more: int
    preview: str


class Hits(BaseModel):
    """The answer to a search, best first."""

    query: str | None
    seconds: float
    unknown_words: list[str] = []  # words of the text that the model does not know
    left_out: list[str] = []  # names of videos that were skipped, since their rows are damaged
    matches_well: bool | None = None  # whether the best chance reaches 30 %; null without chances
    hits: list[Moment]


class VideoHits(Hits):
    """The answer to a search in one video."""

    curve: list[tuple[float, float]]  # seconds and score; for long videos the best frame of each stretch


class Video(BaseModel):
    """One line of the list of videos."""

    id: str
    name: str
    status: Literal["ok", "failed"]
    error: str | None
    hint: str | None
    duration_seconds: float | None
    width: int | None
    height: int | None
    frames: int
    tags: list[str]
    date: float | None
    poster: str | None


class Videos(BaseModel):
    """A page of the list of videos."""

    total: int
    videos: list[Video]


class KeyFrame(BaseModel):
    """A key-frame, with the attention map of its subject: [h * w], row by row, sums to 1."""

    pts_seconds: float
    shot: int
    weight: float
    preview: str
    attention: list[float]


class Sprite(BaseModel):
    """Thumbnails of a whole video, one every `step_seconds`, row by row."""

    image: str
    vtt: str
    step_seconds: float
    columns: int
    tile: tuple[int, int]  # width, height


class VideoDetail(Video):
    """A video with its key-frames, shots and scenes."""

    indexed_at: float
    codec: str | None
    average_fps: float | None
    has_audio: bool | None
    file: str | None
    keyframes: list[KeyFrame]
    grid: tuple[int, int]
    attended_area: list[float] | None  # left, top, right, bottom of the grid on the picture, as fractions
    shots: list[tuple[float, float]]
    scenes: list[tuple[float, float]]
    sprite: Sprite | None


class Problem(BaseModel):
    """What went wrong."""

    kind: str
    message: str
    hint: str | None


class Refusal(BaseModel):
    """The answer to a failed request."""

    error: Problem


class Playable(BaseModel):
    """The state of a copy that browsers can play: playable.mp4, when it is done."""

    state: Literal["running", "done", "failed"]
    progress: float
    error: Problem | None


class JobState(BaseModel):
    """A job: a video to index, and its state."""

    id: str
    state: State
    progress: float
    name: str
    video: str | None  # its id in the library, when it is done
    created: float
    error: Problem | None


class Job(JobState):
    """A job with what callers do not see."""

    path: Path
    uploaded: bool  # the service owns the file


class JobList(BaseModel):
    """Jobs, the latest first."""

    jobs: list[JobState]


class JobRequest(BaseModel):
    """A path of a video on the server, under an allowed folder."""

    model_config = ConfigDict(extra="forbid")
    path: Annotated[str, Field(min_length=1, max_length=4096)]


class Like(BaseModel):
    """A frame of a video in the library."""

    video_id: Annotated[str, Field(min_length=1, max_length=1000)]
    seconds: Seconds


class LikeRequest(BaseModel):
    """Searches for moments that look like this frame."""

    model_config = ConfigDict(extra="forbid")
    like: Like


def body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that is JSON or a file."""
    file = {"type": "string", "format": "binary"}
    multipart = {"type": "object", "properties": {"file": file}, "required": ["file"]}
    schema = model.model_json_schema()
    own = {f"#/$defs/{name}": inner for name, inner in schema.pop("$defs", {}).items()}
    # Inlined: a reference would be resolved in the whole document.
    properties = {name: own.get(inner.get("$ref"), inner) for name, inner in schema["properties"].items()}
    schemas = {"application/json": {**schema, "properties": properties}, "multipart/form-data": multipart}
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def moments(hits: Sequence[LibraryHit], base: str) -> list[Moment]:
    """Converts hits of the library; addresses are under `base`."""
    found = []
    for hit in hits:
        preview = _preview(base, hit.video_id, hit.pts_seconds)
        found.append(Moment(**asdict(hit) | {"video": file_name(hit.video), "preview": preview}))
    return found


def _example(frame: str) -> Example:
    id, _, seconds = frame.partition("@")
    return Example(id, float(seconds))


def video(record: Record, base: str) -> Video:
    """Converts a record of the library; addresses are under `base`."""
    third = (record.duration_seconds or 0.0) / 3  # the first key-frame is often a title or black
    return Video(
        id=record.id,
        name=file_name(record.path),
        status=record.status,
        error=record.error and redact_paths(record.error, record.path),
        hint=record.hint,
        duration_seconds=record.duration_seconds,
        width=record.probe.get("width"),
        height=record.probe.get("height"),
        frames=record.frames,
        tags=list(record.tags),
        date=record.date,
        poster=f"{_preview(base, record.id, round(third, 3))}?nearest=true" if record.status == "ok" else None,
    )


def video_detail(
    record: Record, extras: Extras | None, previews: Sequence[Preview], base: str, *, playable: bool
) -> VideoDetail:
    """Converts a record with its key-frames and pictures. `extras` is None for a failed video."""
    own = f"{base}/api/v1/videos/{quote(record.id, safe='')}"
    overview = extras.overview if extras else {"keyframes": []}
    frames = {frame["pts_seconds"]: frame for frame in overview["keyframes"]}
    keyframes = [
        KeyFrame(
            pts_seconds=preview.pts_seconds,
            shot=frame["shot"],
            weight=frame["weight"],
            preview=_preview(base, record.id, preview.pts_seconds),
            attention=np.asarray(preview.attention, np.float64).round(6).tolist(),
        )
        for preview in previews
        if (frame := frames.get(preview.pts_seconds))  # no match: the video was indexed again meanwhile
    ]
    sprite = Sprite(image=f"{own}/sprite.jpg", vtt=f"{own}/thumbs.vtt", **overview["sprite"]) if extras else None
    return VideoDetail(
        **video(record, base).model_dump(),
        indexed_at=record.indexed_at,
        codec=record.probe.get("codec"),
        average_fps=record.probe.get("average_fps"),
        has_audio=record.probe.get("has_audio"),
        file=f"{own}/file" if playable else None,
        keyframes=keyframes,
        grid=record.grid,
        attended_area=overview.get("attended_area"),
        shots=list(record.shots),
        scenes=list(record.scenes),
        sprite=sprite,
    )


def _preview(base: str, id: str, seconds: float) -> str:
    return f"{base}/api/v1/videos/{quote(id, safe='')}/previews/{float(seconds)!r}.jpg"


def _timestamp(moment: datetime | None) -> float | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
