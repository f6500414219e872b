"""Thumbnails for players: one picture of many small ones, and a WebVTT track that says which shows which time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.cpu import FrameStream
from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.pictures import clock
from keyreel.types import U8, Progress

TILE_EDGE = 160  # pixels, long side of a thumbnail
MOST_TILES = 200
TILE_COLUMNS = 10
STEPS_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)


def tile_times(duration_seconds: float) -> tuple[float, tuple[float, ...]]:
    """(step, times): the regular times of the thumbnails, at most 200, the step a round number of seconds."""
    least = duration_seconds / MOST_TILES
    step = float(next((s for s in STEPS_SECONDS if s >= least), math.ceil(least)))
    return step, tuple(step * n for n in range(max(1, math.ceil(duration_seconds / step - 1e-9))))


def sprite(
    source: Source, times: Sequence[float], *, progress: Progress | None = None
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """(picture of all thumbnails, (x, y, width, height) of each); fewer boxes than times where decoding ends early.

    Args:
        progress: called with ("thumbnails", done, total).

    Raises:
        RenderError: nothing could be decoded.
    """
    info = source.probe()
    scale = TILE_EDGE / max(info.width, info.height)
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    transform = ImageTransform(height, width, "squash", "area")
    tiles: list[U8] = []
    with FrameStream(source, Sampling("times", times=tuple(times)), transform=transform) as frames:
        for batch in frames:
            tiles.extend(batch.data)
            if progress is not None:
                progress("thumbnails", float(len(tiles)), float(len(times)))
    if not tiles:
        raise RenderError(f"{source.name}: no frame for the thumbnails could be decoded")
    columns = min(len(tiles), TILE_COLUMNS)
    rows = math.ceil(len(tiles) / columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    boxes = []
    for place, tile in enumerate(tiles):
        y, x = (place // columns) * height, (place % columns) * width
        sheet[y : y + height, x : x + width] = tile
        boxes.append((x, y, width, height))
    return Image.fromarray(sheet), boxes


def webvtt(boxes: Sequence[tuple[int, int, int, int]], step_seconds: float, duration_seconds: float, image: str) -> str:
    """A WebVTT thumbnail track: a cue for each tile of the sprite, `image#xywh=x,y,width,height`."""
    cues = ["WEBVTT\n"]
    for place, box in enumerate(boxes):
        start = place * step_seconds
        stop = max(start + 0.001, min(start + step_seconds, duration_seconds))
        cues.append(f"{clock(start)} --> {clock(stop)}\n{image}#xywh={','.join(map(str, box))}\n")
    return "\n".join(cues)
