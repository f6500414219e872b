"""Makes WebVTT tracks for players: thumbnails, whose pictures are in one sprite, and chapters."""

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
    """(step, times) of the thumbnails in seconds: at most 200 regular times, with a round step."""
    least = duration_seconds / MOST_TILES
    step = float(next((s for s in STEPS_SECONDS if s >= least), math.ceil(least)))
    return step, tuple(step * n for n in range(max(1, math.ceil(duration_seconds / step - 1e-9))))


def tile_transform(height: int, width: int) -> ImageTransform:
    """The transform of a frame of this size to a thumbnail."""
    scale = TILE_EDGE / max(height, width)
    return ImageTransform(max(1, round(height * scale)), max(1, round(width * scale)), "squash", "area")


def thumbnails_of(source: Source, video: VideoInfo, stop_seconds: float | None) -> Aside | None:
    """Makes the collector of thumbnails for the decoding; None if the packets do not tell the frames.

    Args:
        stop_seconds: end of the analysed part; None: the end of the video.
    """
    ends = [end for end in (stop_seconds, video.duration_seconds) if end is not None]
    timeline = source.timeline()
    if timeline is None or not ends:
        return None
    return Aside(timeline, tile_times(min(ends))[1], tile_transform(*video.display_size))


def tile(picture: U8, video: VideoInfo) -> U8:
    """Scales a picture of a video to a thumbnail."""
    size = tile_transform(*video.display_size)
    small = Image.fromarray(picture).resize((size.width, size.height), Image.Resampling.BOX, reducing_gap=3.0)
    return np.asarray(small)


def sprite(pictures: Sequence[U8]) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Joins thumbnails: (one picture, (x, y, width, height) of each)."""
    tiles = [Image.fromarray(picture) for picture in pictures]
    width, height = tiles[0].size
    columns = min(len(tiles), TILE_COLUMNS)
    boxes = [(n % columns * width, n // columns * height, width, height) for n in range(len(tiles))]
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for own, (x, y, _, _) in zip(tiles, boxes, strict=True):
        sheet.paste(own, (x, y))
    return sheet, boxes


def chapters(scenes: Sequence[Shot]) -> str:
    """Makes a WebVTT chapters track: a cue for each scene."""
    cues = ["WEBVTT\n"]
    for number, scene in enumerate(scenes, 1):
        cues.append(f"{clock(scene.start_seconds)} --> {clock(scene.stop_seconds)}\nScene {number}\n")
    return "\n".join(cues)


def webvtt(boxes: Sequence[tuple[int, int, int, int]], step_seconds: float, duration_seconds: float, image: str) -> str:
    """Makes a WebVTT thumbnail track: a cue for each tile of the sprite, `image#xywh=x,y,width,height`."""
    cues = ["WEBVTT\n"]
    for place, box in enumerate(boxes):
        start = place * step_seconds
        stop = max(start + 0.001, min(start + step_seconds, duration_seconds))
        cues.append(f"{clock(start)} --> {clock(stop)}\n{image}#xywh={','.join(map(str, box))}\n")
    return "\n".join(cues)
