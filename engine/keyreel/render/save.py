"""Writes all outputs of a summary: into a hidden folder beside the target, which it then renames."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET
from PIL import Image

from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.chapters import write_chapters
from keyreel.render.documents import SUMMARY, ReelEntry, ReframeEntry, SummaryDocument, summary_document, to_json
from keyreel.render.files import hidden
from keyreel.render.interchange import import_otio, write_edl, write_markers, write_otio, write_scenes_csv
from keyreel.render.modes import make_reel, planned_reel, reel_camera
from keyreel.render.pictures import at_most, contact_sheet, jpeg, keyframe_name, pictures_at, shrink
from keyreel.render.reframe import Camera
from keyreel.render.storyboard import link_to, picture_edge, storyboard_page
from keyreel.render.thumbnails import chapters, sprite, tile, tile_times, webvtt
from keyreel.types import F32, Progress, Summary

_log = logging.getLogger(__name__)
REPLACE = "replace keyreel's own files in it: --overwrite (overwrite=True)"
OURS = {"summary.json", "scenes.vtt", "keyframes", "contact.jpg", "storyboard.html"}
OURS |= {"reel.mp4", "reel.mkv", "reel.otio", "reel.edl", "thumbs.vtt", "thumbs.jpg", "scenes.csv"}
OURS |= {"markers.otio", "markers.edl", "markers.fcpxml", "chapters.mp4", "chapters.mkv", "chapters.ffmetadata"}
EMBEDDINGS = "embeddings.npz"
OURS.add(EMBEDDINGS)
CONTACT_EDGE = 960


def save_summary(
    summary: Summary,
    source: Source,
    folder: Path,
    config: OutputConfig,
    *,
    query_scores: F32 | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the outputs of `config` into `folder`. Returns the folder.

    It replaces an empty folder, or one that holds only an earlier summary of the same video; with `overwrite` any
    folder, but keeps its other files. After an error or Ctrl-C the target has not changed, and nothing half-written is
    left. If a kill left the target's earlier content under a hidden name, this puts it back first.

    Args:
        summary: what to write.
        source: the video.
        folder: created with its parents if missing.
        config: which outputs.
        query_scores: [T] float32: scores of the sampled frames for `config.query`, to plan the reel.
        progress: called with ("pictures" | "reel", done, total).

    Raises:
        RenderError: the folder must not be replaced, or an output cannot be made.
        MissingExtra: the packages for OTIO or EDL are not installed.
        SourceError: the video cannot be read again.
    """
    target = folder.resolve()
    made = hidden(target)
    try:
        _recover(target)
        _check_replaceable(target, source, summary.video.path, overwrite=config.overwrite)
        if config.otio or config.edl or config.markers:  # before the work, not after it
            import_otio(edl=config.edl or config.markers == "edl", fcpxml=config.markers == "fcpxml")
        target.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        _write_all(summary, source, made, target, config, query_scores, progress)
        _swap(made, target)
    except OSError as error:
        raise RenderError(
            f"{folder}: cannot be written: {error}", hint="check the disk space and your permission to write there"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write_all(
    summary: Summary,
    source: Source,
    made: Path,
    target: Path,
    config: OutputConfig,
    query_scores: F32 | None,
    progress: Progress | None,
) -> None:
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    files, small = _write_pictures(summary, source, made, config, progress, seconds)
    reel: ReelEntry | None = None
    camera: Camera | None = None
    if config.reel or config.otio or config.edl:
        plan = planned_reel(summary, source, config, query_scores)
        camera = reel_camera(summary, source, config, plan.spans)
        reframed = UNSET if camera is None else ReframeEntry.of(camera)
        reel = ReelEntry(None, plan.spans, None, plan.reason or "not asked for", reframed)
    if config.reel and reel is not None and reel.spans:
        reel_began = time.perf_counter()
        written = make_reel(
            source,
            reel.spans,
            made / "reel.mp4",
            shots=summary.shots,
            mode=config.reel_mode,
            height=config.reel_height,
            camera=camera,
            any_container=True,
            progress=progress,
        )
        seconds["reel"] = time.perf_counter() - reel_began
        reel = replace(reel, file=written.path.name, spans=written.spans, mode=written.mode, reason=written.reason)
    spans = () if reel is None else reel.spans
    media = source.path.absolute().as_uri() if source.path is not None else summary.video.path
    if config.otio and spans:
        write_otio(summary.video, media, spans, made / "reel.otio", camera=camera)
    if config.edl and spans:
        write_edl(summary.video, media, spans, made / "reel.edl")

    if config.markers:
        write_markers(summary, media, made / f"markers.{config.markers}")
    if config.scenes_csv:
        write_scenes_csv(summary, source.timeline(), made / "scenes.csv")
    if config.chapters:
        write_chapters(source, summary.scenes, made)
    if config.embeddings:
        _write_embeddings(summary, source, made / EMBEDDINGS)

    def document() -> SummaryDocument:
        seconds["render"] = seconds["total"] = time.perf_counter() - began
        return summary_document(summary, files, reel, seconds)

    if config.storyboard:
        link = link_to(source.path, target) if source.path is not None else None
        page = storyboard_page(summary, document(), pictures=small, video_link=link)
        (made / "storyboard.html").write_text(page, encoding="utf-8")
    (made / "scenes.vtt").write_text(chapters(summary.scenes), encoding="utf-8")
    (made / "summary.json").write_text(to_json(document()), encoding="ascii")


def _write_embeddings(summary: Summary, source: Source, path: Path) -> None:
    """Writes the arrays of the Embedding by name, the importance, and facts about the video that summary.json lacks."""
    embedding, file = summary.embedding, None if source.path is None else str(source.path)
    named = {own.name: getattr(embedding, own.name) for own in fields(embedding)}
    arrays: dict[str, Any] = {
        name: np.asarray(value) for name, value in named.items() if not isinstance(value, str | None)
    }
    video = json.dumps({"info": asdict(summary.video), "file": file})
    np.savez(path, importance=summary.importance, video=np.array(video), **arrays)


def _write_pictures(
    summary: Summary,
    source: Source,
    made: Path,
    config: OutputConfig,
    progress: Progress | None,
    seconds: dict[str, float],
) -> tuple[list[str], list[Image.Image]]:
    """Writes key-frames, contact sheet and thumbnails. One pass decodes the pictures that the analysis did not keep.

    Returns:
        The file names of the key-frames, and small pictures of them for the storyboard.
    """
    (made / "keyframes").mkdir()
    keyframes, quality, duration = summary.keyframes, config.jpeg_quality, summary.stop_seconds
    step, tile_seconds = tile_times(duration) if config.thumbnails else (0.0, ())
    tiles = {time: summary.thumbnails[time] for time in tile_seconds if time in summary.thumbnails}
    times = [*(k.pts_seconds for k in keyframes), *(time for time in tile_seconds if time not in tiles)]
    files: list[str] = []
    contact: list[Image.Image] = []
    small: list[Image.Image] = []
    pictures = pictures_at(source, times, at_most(summary.video.height, summary.video.width, config.keyframe_height))
    for done, (place, picture) in enumerate(pictures, 1):
        if place < len(keyframes):
            files.append(f"keyframes/{keyframe_name(place + 1, times[place])}")
            (made / files[-1]).write_bytes(jpeg(Image.fromarray(picture), quality))
            contact.append(shrink(picture, CONTACT_EDGE if len(keyframes) <= 4 else CONTACT_EDGE // 2))
            small.append(shrink(picture, picture_edge(len(keyframes))))
        else:
            tiles[times[place]] = tile(picture, summary.video)
        if progress is not None:
            progress("pictures", done, len(times))
    sheet = contact_sheet(contact, [k.pts_seconds for k in keyframes])
    (made / "contact.jpg").write_bytes(jpeg(sheet, quality))
    if tiles:
        began = time.perf_counter()
        sheet, boxes = sprite([tiles[time] for time in tile_seconds])
        (made / "thumbs.jpg").write_bytes(jpeg(sheet, quality))
        (made / "thumbs.vtt").write_text(webvtt(boxes, step, duration, "thumbs.jpg"), encoding="utf-8")
        seconds["thumbnails"] = time.perf_counter() - began
    return files, small


def _check_replaceable(target: Path, source: Source, video: str, *, overwrite: bool) -> None:
    """Raises RenderError if the target must not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RenderError(f"{target}: is a file; the outputs need a folder", hint="give another folder")
    # Replacing deletes: never the video, the working folder or the home folder.
    precious = [Path.cwd(), Path(os.path.expanduser("~"))]
    if source.path is not None:
        precious.append(source.path.resolve())
    for path in precious:
        if path.is_relative_to(target):
            raise RenderError(
                f"{target}: holds {path} and will not be replaced", hint="give another folder, or one in it"
            )
    names = {entry.name for entry in target.iterdir()}
    if overwrite or not names:
        return
    earlier = _summarised(target / "summary.json")
    if earlier is None:
        raise RenderError(
            f"{target}: exists and is not a summary of keyreel", hint=f"give another folder, or {REPLACE}"
        )
    if os.path.abspath(earlier) != os.path.abspath(video):
        raise RenderError(f"{target}: holds the summary of {earlier}", hint=f"give another folder, or {REPLACE}")
    if foreign := sorted(names - OURS):
        raise RenderError(
            f"{target}: holds an earlier summary and also {', '.join(foreign[:5])}",
            hint=f"move these away, give another folder, or {REPLACE}",
        )


def _summarised(path: Path) -> str | None:
    """The video of an earlier summary.json; None for other files."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return str(document["video"]["path"]) if document["schema"] == SUMMARY else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _swap(made: Path, target: Path) -> None:
    """Renames the new folder to the target; if that fails, puts the old one back.

    It deletes only our own outputs of the old folder; other files move into the new one.
    """
    if not target.exists():
        os.rename(made, target)
        return
    old = made.with_name(f"{made.stem}-{_mark(target)}.old")
    try:
        os.rename(target, old)
        os.rename(made, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    _clear(old, target)


def _clear(old: Path, target: Path) -> None:
    """Moves the files that are not ours from the old folder to the new one, and deletes the rest."""
    for entry in old.iterdir():
        if entry.name not in OURS:
            if os.path.lexists(target / entry.name):
                raise _left(old, target, f"there is a new {entry.name}")
            os.rename(entry, target / entry.name)
    gone = hidden(target)  # from here on a kill leaves nothing that would be put back
    os.rename(old, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _recover(target: Path) -> None:
    """Ends a swap that a kill has interrupted: the old folder goes back, or away if the new one is in place."""
    for old in target.parent.glob(f".keyreel-*-{_mark(target)}.old"):
        if (target / "summary.json").exists():
            _clear(old, target)
            continue
        try:
            os.rename(old, target)
        except OSError as error:
            raise _left(old, target, str(error)) from error
        _log.warning("%s: a run was killed while it replaced this folder; the earlier content is back", target)


def _mark(target: Path) -> str:
    """The part of an old folder's name that tells whose it is; the target's name itself may be too long."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def _left(old: Path, target: Path, why: str) -> RenderError:
    what = f"{target}: a run was killed; the earlier content is in {old} and cannot go back: {why}"
    return RenderError(what, hint=f"move away what is in {target}, and run this again")
