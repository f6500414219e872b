"""For players: WebVTT tracks of thumbnails, whose pictures lie in one sprite, and of chapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from keyreel.config import ImageTransform
from keyreel.decode.aside import Aside
from keyreel.decode.source import Source
from keyreel.render.pictures import clock
from keyreel.types import U8, Shot, VideoInfo

TILE_EDGE = 160  # pixels, long side of a thumbnail
MOST_TILES = 200
TILE_COLUMNS = 10
STEPS_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)


def tile_times(duration_seconds: float) -> tuple[float, tuple[float, ...]]:
    """(step, times): the regular times of the thumbnails, at most 200, the step a round number of seconds."""
    least = duration_seconds / MOST_TILES
    step = float(next((s for s in STEPS_SECONDS if s >= least), math.ceil(least)))
    return step, tuple(step * n for n in range(max(1, math.ceil(duration_seconds / step - 1e-9))))


def tile_transform(height: int, width: int) -> ImageTransform:
    """From a frame of this size to a thumbnail."""
    scale = TILE_EDGE / max(height, width)
    return ImageTransform(max(1, round(height * scale)), max(1, round(width * scale)), "squash", "area")


def thumbnails_of(source: Source, video: VideoInfo, stop_seconds: float | None) -> Aside | None:
    """What collects the thumbnails while a video is decoded; None where its frames cannot be told in advance.

    Args:
        stop_seconds: where the analysed part ends; None: at the video's end.
    """
    ends = [end for end in (stop_seconds, video.duration_seconds) if end is not None]
    timeline = source.timeline()
    if timeline is None or not ends:
        return None
    return Aside(timeline, tile_times(min(ends))[1], tile_transform(*video.display_size))


def tile(picture: U8, video: VideoInfo) -> U8:
    """A picture of a video, of any size, as a thumbnail."""
    size = tile_transform(*video.display_size)
    small = Image.fromarray(picture).resize((size.width, size.height), Image.Resampling.BOX, reducing_gap=3.0)
    return np.asarray(small)


def sprite(pictures: Sequence[U8]) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """(picture of all thumbnails, (x, y, width, height) of each)."""
    tiles = [Image.fromarray(picture) for picture in pictures]
    width, height = tiles[0].size
    columns = min(len(tiles), TILE_COLUMNS)
    boxes = [(n % columns * width, n // columns * height, width, height) for n in range(len(tiles))]
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for own, (x, y, _, _) in zip(tiles, boxes, strict=True):
        sheet.paste(own, (x, y))
    return sheet, boxes


def chapters(scenes: Sequence[Shot]) -> str:
    """A WebVTT chapters track: a cue for each scene."""
    cues = ["WEBVTT\n"]
    for number, scene in enumerate(scenes, 1):
        cues.append(f"{clock(scene.start_seconds)} --> {clock(scene.stop_seconds)}\nScene {number}\n")
    return "\n".join(cues)


def webvtt(boxes: Sequence[tuple[int, int, int, int]], step_seconds: float, duration_seconds: float, image: str) -> str:
    """A WebVTT thumbnail track: a cue for each tile of the sprite, `image#xywh=x,y,width,height`."""
    cues = ["WEBVTT\n"]
    for place, box in enumerate(boxes):
        start = place * step_seconds
        stop = max(start + 0.001, min(start + step_seconds, duration_seconds))
        cues.append(f"{clock(start)} --> {clock(stop)}\n{image}#xywh={','.join(map(str, box))}\n")
    return "\n".join(cues)
