"""What a library stores of one video: rows, pictures, regions of subjects, the recording date."""

from __future__ import annotations

import time
from datetime import datetime

import numpy as np
from PIL import Image

from keyreel.decode.source import Source
from keyreel.errors import RenderError, SourceError
from keyreel.library.files import FileState, path_of
from keyreel.library.types import Extras, Preview, Rows, Subjects
from keyreel.render.documents import plain
from keyreel.render.pictures import at_most, attended_area, jpeg, picture_at, pictures_at
from keyreel.render.thumbnails import sprite, tile, tile_times, webvtt
from keyreel.search import region, region_on
from keyreel.shots import shot_of
from keyreel.types import KEYFRAME_FACTS, Embedding, Progress, Summary

SPRITE = "sprite.jpg"  # file name of the sprite in the WebVTT
JPEG_QUALITY = 82
_EARLIEST = 86_400.0  # seconds since 1970; a clock that was never set shows an earlier time


def contents(
    summary: Summary, source: Source, preview_height: int, novelty: float, progress: Progress
) -> tuple[Rows, tuple[Preview, ...], Extras]:
    """Makes what a library stores of a video. One more pass decodes the pictures that the analysis did not keep."""
    embedding, frames = summary.embedding, summary.keyframes
    step, tile_seconds = tile_times(summary.stop_seconds)
    tiles = {time: summary.thumbnails[time] for time in tile_seconds if time in summary.thumbnails}
    times = [*(frame.pts_seconds for frame in frames), *(time for time in tile_seconds if time not in tiles)]
    previews: list[Preview] = []
    small = at_most(summary.video.height, summary.video.width, preview_height)
    for done, (place, picture) in enumerate(pictures_at(source, times, small)):
        progress("pictures", float(done), float(len(times)))
        if place < len(frames):
            data, frame = jpeg(Image.fromarray(picture), JPEG_QUALITY), frames[place]
            previews.append(Preview(frame.pts_seconds, data, embedding.attention[frame.sample]))
        else:
            tiles[times[place]] = tile(picture, summary.video)
    shot = shot_of(summary.shots, embedding.pts_seconds)
    area = attended_area(summary.video, summary.config["image"])
    rows = Rows(
        pts_seconds=embedding.pts_seconds,
        frame_index=embedding.frame_index,
        vectors=embedding.vectors,
        shot=shot,
        keyframe=np.isin(np.arange(len(embedding)), [frame.sample for frame in frames]),
        weight=summary.importance,
        subjects=subjects_of(embedding, novelty, area),
    )
    sheet, boxes = sprite([tiles[time] for time in tile_seconds])
    overview = {
        "keyframes": [
            {**{name: getattr(frame, name) for name in KEYFRAME_FACTS}, "shot": int(shot[frame.sample])}
            for frame in frames
        ],
        "sprite": {"step_seconds": step, "columns": sheet.width // boxes[0][2], "tile": boxes[0][2:]},
        "attended_area": area,
        "config": summary.config,
        "warnings": summary.warnings,
    }
    extras = Extras(jpeg(sheet, JPEG_QUALITY), webvtt(boxes, step, summary.stop_seconds, SPRITE), plain(overview))
    return rows, tuple(previews), extras


def frame_of(path: str, state: FileState, shape: tuple[int, int], seconds: float, *, max_height: int) -> bytes | None:
    """Decodes the frame shown at a time as JPEG; None if the file changed since it was indexed, or cannot be read.

    Args:
        path, state: of the file, when it was indexed.
        shape: (height, width) of the upright picture.
        max_height: scale taller pictures down to this, in pixels.
    """
    file = path_of(path)
    try:
        if file is None or FileState.of(file) != state:
            return None
        with Source(file) as source:
            found = jpeg(Image.fromarray(picture_at(source, seconds, at_most(*shape, max_height))), JPEG_QUALITY)
        return found if FileState.of(file) == state else None  # another file may have been there meanwhile
    except (SourceError, RenderError):
        return None


def subjects_of(embedding: Embedding, novelty: float, area: tuple[float, float, float, float]) -> Subjects | None:
    """Selects the subjects whose cosine to their scene is below `novelty`, with the regions of all subjects.

    `area` (left, top, right, bottom) is the part of the picture that the model sees.
    """
    if embedding.subject is None:
        return None
    row = np.flatnonzero(np.vecdot(embedding.vectors, embedding.subject) < novelty)
    regions = [region_on(area, region(weights, embedding.grid)) for weights in embedding.attention]
    return Subjects(row, embedding.subject[row], np.array(regions, np.float32))


def recorded_at(source: Source) -> float | None:
    """Reads the recording time from the file's metadata, in seconds since 1970; None if missing or implausible."""
    with source.open() as container:
        metadata = container.metadata
        for key in ("com.apple.quicktime.creationdate", "creation_time"):
            try:
                seconds = datetime.fromisoformat(metadata.get(key, "")).timestamp()
            except (ValueError, OverflowError, OSError):
                continue
            if _EARLIEST < seconds < time.time() + 86_400:
                return seconds
    return None
