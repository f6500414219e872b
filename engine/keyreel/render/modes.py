"""Makes the reel of a summary: plans the spans, then copies their packets or encodes their frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from keyreel.config import OutputConfig, ReelMode
from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.copy import CONTAINERS, NotCopyable, plan_copy, write_copy
from keyreel.render.pictures import attended_area, pictures_at
from keyreel.render.plan import SNAP_SECONDS, ReelPlan, interest_of, plan_reel
from keyreel.render.reel import HEIGHT, write_reel
from keyreel.render.reframe import Camera, plan_camera, window_of, within_bars
from keyreel.render.sound import SoundReader, quietest
from keyreel.render.thumbnails import tile_transform
from keyreel.types import F32, F64, Progress, Shot, Summary

BAR_PICTURES = 12  # at most, to find black bars in if the analysis kept no thumbnails


@dataclass(frozen=True, slots=True)
class Reel:
    """A written reel."""

    path: Path
    mode: Literal["copy", "encode"]
    reason: str  # why this mode
    spans: tuple[Shot, ...]  # of the reel, after copying moved their ends


def check_ending(path: Path) -> None:
    """Raises RenderError if the file name does not end as a reel's."""
    if path.suffix.lower() not in CONTAINERS:
        what = f"a reel is {' or '.join(CONTAINERS)}, not {path.suffix or 'a file without an ending'}"
        raise RenderError(f"{path}: {what}", hint="name it reel.mp4")


def planned_reel(summary: Summary, source: Source, config: OutputConfig, query_scores: F32 | None = None) -> ReelPlan:
    """Plans the reel of a summary, within the analysed part of the video; see `plan.plan_reel`.

    With `query_scores` and `config.order` "score" the spans are in order of their best frames' scores.
    """
    begin, embedding = summary.shots[0].start_seconds, summary.embedding
    interest = interest_of(embedding, summary.shots, summary.importance)
    scores = interest if query_scores is None else query_scores
    with closing(SoundReader(source)) as sound:

        def quiet(seconds: float) -> float:
            return quietest(sound, seconds + begin, SNAP_SECONDS) - begin

        plan = plan_reel(
            duration_seconds=summary.stop_seconds - begin,
            shots=_moved(summary.shots, -begin),
            pts_seconds=embedding.pts_seconds - begin,
            scores=scores,
            vectors=embedding.joint,
            seconds=config.reel_seconds,
            whole=_has_another_shape(summary, config),
            similarity_limit=summary.config["select"]["similarity_limit"],
            quiet=quiet if summary.video.has_audio else None,
        )
    spans = _moved(plan.spans, begin)
    if query_scores is not None and config.order == "score":
        spans = tuple(sorted(spans, key=lambda span: -_best(span, embedding.pts_seconds, query_scores)))
    return ReelPlan(spans, plan.reason)


def reel_camera(summary: Summary, source: Source, config: OutputConfig, spans: Sequence[Shot]) -> Camera | None:
    """Plans the camera of a reel of another shape; None for whole frames. See `reframe.plan_camera`."""
    if config.aspect is None or not _has_another_shape(summary, config):
        return None
    embedding, pictures = summary.embedding, [*summary.thumbnails.values()]
    if not pictures:
        some = np.linspace(0, len(embedding) - 1, BAR_PICTURES).round().astype(int)
        times = np.unique(embedding.pts_seconds[some]).tolist()
        small = tile_transform(*summary.video.display_size)
        pictures = [picture for _, picture in pictures_at(source, times, small)]
    return plan_camera(
        embedding.attention,
        embedding.grid,
        embedding.pts_seconds,
        area=attended_area(summary.video, summary.config["image"]),
        size=summary.video.display_size,
        shots=summary.shots,
        spans=sorted(spans, key=lambda span: span.start_seconds),
        aspect=config.aspect,
        mode=config.reframe,
        inside=within_bars(pictures),
    )


def _has_another_shape(summary: Summary, config: OutputConfig) -> bool:
    """Whether reel and video have different shapes."""
    return config.aspect is not None and min(window_of(*summary.video.display_size, config.aspect)) < 0.999


def _best(span: Shot, pts: F64, scores: F32) -> float:
    """The best score of a sample in a span."""
    inside = (pts >= span.start_seconds) & (pts < span.stop_seconds)
    return float(scores[inside].max(initial=-np.inf))


def _moved(spans: Iterable[Shot], seconds: float) -> tuple[Shot, ...]:
    return tuple(Shot(span.start_seconds + seconds, span.stop_seconds + seconds) for span in spans)


def make_reel(
    source: Source,
    spans: Sequence[Shot],
    path: Path,
    *,
    shots: Sequence[Shot],
    mode: ReelMode = "auto",
    height: int = HEIGHT,
    camera: Camera | None = None,
    any_container: bool = False,
    progress: Progress | None = None,
) -> Reel:
    """Writes the spans one after the other; copies packets if `mode` and the video allow it.

    Args:
        spans: disjoint, in the order of the reel.
        path: the file; its folder must exist.
        shots: of the video; copying does not move ends over a cut.
        mode: "auto" copies if every span can be copied.
        height, camera: of an encoded picture, see `write_reel`.
        any_container: the suffix of `path` may change, to a container that takes the packets.
        progress: called with ("reel", seconds done, seconds in all).

    Raises:
        RenderError: the spans cannot be copied and `mode` is "copy", or the file cannot be written.
        SourceError: the video cannot be opened.
    """
    if source.path is not None and path.exists() and path.samefile(source.path):
        raise RenderError(f"{path}: is the input video and will not be overwritten", hint="give the reel another name")
    reason = "asked for"
    if mode != "encode":
        try:
            if camera is not None:
                raise NotCopyable("the reel's shape differs from the video's")
            plan = plan_copy(source, spans, shots)
            target = path.with_suffix(plan.suffix) if any_container else path
            if target.suffix.lower() != plan.suffix:
                raise NotCopyable(f"its packets fit into {plan.suffix}, not into {target.suffix or path.name}")
            write_copy(source, plan, target, progress=progress)
            copied = reason if mode == "copy" else "all its parts start and end where packets can be cut"
            return Reel(target, "copy", copied, plan.spans)
        except NotCopyable as error:
            if mode == "copy":
                hint = "encode it: --reel-mode auto (mode='auto')"
                raise RenderError(f"{source.name}: the reel cannot be copied: {error}", hint=hint) from error
            reason = f"cannot be copied: {error}"
    if path.suffix.lower() != ".mp4":
        raise RenderError(f"{path}: an encoded reel is an MP4 file", hint="name it reel.mp4")
    write_reel(source, spans, path, height=height, camera=camera, progress=progress)
    return Reel(path, "encode", reason, tuple(spans))
