"""Makes the pictures of search hits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from keyreel.config import ImageTransform
from keyreel.decode.source import Source
from keyreel.render.files import atomic_write
from keyreel.render.pictures import jpeg, pictures_at
from keyreel.types import U8, SearchHit

PREVIEW = ImageTransform(360, 640, mode="fit", interpolation="area")
QUALITY = 85


def hit_pictures(hits: Sequence[SearchHit], sources: Mapping[str, Source]) -> list[U8]:
    """Decodes the best frame of each hit, [H, W, 3] uint8, at most 640 x 360, in one pass over each video.

    Args:
        sources: of the hits' videos, by name.
    """
    pictures: dict[int, U8] = {}
    for video in dict.fromkeys(hit.video for hit in hits):
        own = [n for n, hit in enumerate(hits) if hit.video == video]
        for place, picture in pictures_at(sources[video], [hits[n].pts_seconds for n in own], PREVIEW):
            pictures[own[place]] = picture
    return [pictures[n] for n in range(len(hits))]


def save_previews(hits: Sequence[SearchHit], pictures: Sequence[U8 | bytes], folder: Path) -> list[SearchHit]:
    """Writes the pictures as hit_01.jpg, hit_02.jpg, ... Returns the hits with their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for number, (hit, picture) in enumerate(zip(hits, pictures, strict=True), start=1):
        path = folder / f"hit_{number:02d}.jpg"
        with atomic_write(path) as made:
            made.write_bytes(picture if isinstance(picture, bytes) else jpeg(Image.fromarray(picture), QUALITY))
        named.append(dataclasses.replace(hit, preview=str(path)))
    return named
