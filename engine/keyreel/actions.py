"""The work behind a Summary's methods: pictures, outputs, search. It also works after pickling, or save and load."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from keyreel.config import DecodeLimits, OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import RenderError, SourceError
from keyreel.render.modes import check_ending, make_reel, planned_reel, reel_camera
from keyreel.render.notebook import summary_html
from keyreel.render.pictures import at_most, pictures_at
from keyreel.render.save import EMBEDDINGS, save_summary
from keyreel.types import (
    F32,
    KEYFRAME_FACTS,
    U8,
    Combined,
    Embedding,
    Hits,
    KeyFrame,
    Progress,
    Query,
    SearchHit,
    Shot,
    Summary,
    VideoInfo,
)

NOTEBOOK_HEIGHT = 180  # pixels, of the pictures in a notebook


@dataclass(frozen=True, slots=True)
class VideoActions:
    """Implements `SummaryActions` for one video. Without an engine it cannot search."""

    source: Source | None
    find: Callable[[Summary, Query | Combined, int], Hits[SearchHit]] | None = None
    score: Callable[[Summary, str], F32] | None = None  # text -> [T] float32: the score of each sampled frame

    def __reduce__(self) -> Any:
        path = None if self.source is None else self.source.path
        return _reopened, (path, None if self.source is None else self.source.limits)

    def images(self, summary: Summary, max_height: int) -> list[U8]:
        if max_height < 1:
            raise ValueError(f"max_height must be >= 1, got {max_height}")
        size = at_most(summary.video.height, summary.video.width, max_height)
        times = [frame.pts_seconds for frame in summary.keyframes]
        return [picture for _, picture in pictures_at(self._video(summary), times, size)]

    def html(self, summary: Summary) -> str:
        try:
            pictures = self.images(summary, NOTEBOOK_HEIGHT)
        except (SourceError, RenderError, ValueError):  # without the video, a notebook shows the rest
            pictures = []
        return summary_html(summary, pictures)

    def save(self, summary: Summary, folder: Path, output: OutputConfig, progress: Progress | None) -> Path:
        scores = self._scores(summary, output)
        return save_summary(summary, self._video(summary), folder, output, query_scores=scores, progress=progress)

    def render_reel(self, summary: Summary, path: Path, output: OutputConfig) -> tuple[Shot, ...]:
        check_ending(path)
        source = self._video(summary)
        plan = planned_reel(summary, source, output, self._scores(summary, output))
        if not plan.spans:
            raise RenderError(f"{source.name}: there is no reel: {plan.reason}", hint="ask for fewer seconds")
        return make_reel(
            source,
            plan.spans,
            path,
            shots=summary.shots,
            mode=output.reel_mode,
            height=output.reel_height,
            camera=reel_camera(summary, source, output, plan.spans),
        ).spans

    def search(self, summary: Summary, query: Query | Combined, k: int) -> Hits[SearchHit]:
        if self.find is None:
            raise ValueError("a loaded summary has no engine: engine.search(query, [summary]) searches it")
        return self.find(summary, query, k)

    def close(self) -> None:
        if self.source is not None:
            self.source.close()

    def _video(self, summary: Summary) -> Source:
        if self.source is None:
            name = summary.video.path
            raise RenderError(
                f"{name}: the video was not a file, so a copy of its summary cannot read it", hint="summarize it again"
            )
        return self.source

    def _scores(self, summary: Summary, output: OutputConfig) -> F32 | None:
        if output.query is None:
            return None
        if self.score is None:
            raise ValueError("a loaded summary has no engine to rank moments by a query")
        return self.score(summary, output.query)


def _reopened(path: Path | None, limits: DecodeLimits | None) -> VideoActions:
    return VideoActions(None if path is None else Source(path, limits=limits or DecodeLimits()))


def load_summary(folder: Path) -> Summary:
    """Reads the files of a saved summary, see `Summary.load`.

    Raises:
        RenderError: the folder holds no such summary, or its files are damaged.
    """
    again = "save it again with embeddings=True (--embeddings)"
    try:
        document = json.loads((folder / "summary.json").read_text("utf-8"))
        with (folder / EMBEDDINGS).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        return _summary(document, json.loads(str(arrays.pop("video"))), arrays)
    except FileNotFoundError as error:
        raise RenderError(f"{folder}: has no {Path(error.filename).name}", hint=again) from error
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RenderError(f"{folder}: is not a summary that can be read: {reason}", hint=again) from error


def _summary(document: Mapping[str, Any], video: Mapping[str, Any], arrays: dict[str, Any]) -> Summary:
    importance, path = arrays.pop("importance"), video["file"]
    rows, columns = (int(side) for side in arrays.pop("grid"))
    model = document["model"]
    embedding = Embedding(**arrays, grid=(rows, columns), model=model["name"], model_sha256=model["sha256"])
    samples = np.searchsorted(embedding.pts_seconds, [frame["pts_seconds"] for frame in document["keyframes"]])
    return Summary(
        video=VideoInfo(**video["info"]),
        embedding=embedding,
        keyframes=tuple(
            KeyFrame(**{name: frame[name] for name in KEYFRAME_FACTS}, sample=int(sample))
            for frame, sample in zip(document["keyframes"], samples, strict=True)
        ),
        shots=tuple(Shot(**span) for span in document["shots"]),
        scenes=tuple(Shot(**span) for span in document["scenes"]),
        importance=importance,
        device=document["device"]["name"],
        device_reason=document["device"]["reason"],
        config=document["config"],
        warnings=tuple(document["warnings"]),
        timings_seconds=document["timings_seconds"],
        actions=_reopened(None if path is None else Path(path), None),
    )
