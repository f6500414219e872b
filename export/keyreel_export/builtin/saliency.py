"""Where the object is: pictures of one object with a known outline.

Outlines come without annotation: of a picture before a plain ground, what a flood from the border does not reach. Such
objects are also cut out and put anywhere on a photograph of a place, so that neither the middle of the picture nor an
even ground gives them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from keyreel_export.builtin.data import F32, U8, Example, read_images

PLAIN = frozenset({"caltech101", "pacs", "clothing", "grocery"})  # sources with objects before plain grounds
PLACES = frozenset({"cmu-sun-scenes", "houses"})
TOLERANCE = 24  # of one channel, from the median of the border; a flood takes twice that, summed over the channels
SMALLEST, LARGEST = 0.04, 0.6  # share of the picture that an object covers


@dataclass(frozen=True, slots=True)
class Object:
    """One object before a plain ground."""

    pixels: U8  # [h, w, 3]
    mask: U8  # [h, w], 255 on the object


@dataclass(frozen=True, slots=True)
class Marked:
    """Pictures of one object each."""

    frames: U8  # [N, side, side, 3]
    masks: F32  # [N, rows, columns]: how much of each patch the object covers


def outline(image: Image.Image) -> Object | None:
    """The object of a picture with a plain ground, or None."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(np.int16)
    away = np.abs(border - np.median(border, axis=0)).max(axis=1)
    if (away > TOLERANCE).mean() > 0.1:
        return None
    # A border of one pixel joins all parts of the ground that touch the edges.
    wide = Image.new("RGB", (image.width + 2, image.height + 2), tuple(int(v) for v in np.median(border, axis=0)))
    wide.paste(image, (1, 1))
    marker = (255, 0, 254)
    ImageDraw.floodfill(wide, (0, 0), marker, thresh=2 * TOLERANCE)
    mask = (np.asarray(wide)[1:-1, 1:-1] != marker).any(axis=2)
    clean = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(3))
    mask8 = np.asarray(clean)
    return Object(pixels, mask8) if SMALLEST <= (mask8 > 0).mean() <= LARGEST else None


def find_objects(trainset: Path, examples: Sequence[Example]) -> tuple[list[Object], list[Image.Image]]:
    """Objects with outlines, and photographs of places to put them on."""
    objects: list[tuple[int, Object]] = []
    places: list[tuple[int, Image.Image]] = []
    kept = [example for example in examples if example.source in PLAIN | PLACES]
    for index, image in read_images(trainset, kept):
        if kept[index].source in PLACES:
            places.append((index, image))
        elif (found := outline(image)) is not None:
            objects.append((index, found))
    return [o for _, o in sorted(objects, key=lambda p: p[0])], [p for _, p in sorted(places, key=lambda p: p[0])]


def compose(thing: Object, place: Image.Image, rng: np.random.Generator, side: int) -> tuple[Image.Image, Image.Image]:
    """The object at a random size anywhere on the place; the picture and its mask, both [side, side]."""
    ground = place.resize((side, side), Image.Resampling.BICUBIC)
    picture, mask = Image.fromarray(thing.pixels), Image.fromarray(thing.mask)
    box = mask.getbbox()
    picture, mask = picture.crop(box), mask.crop(box)
    scale = side * rng.uniform(0.25, 0.7) / max(mask.size)
    size = (max(4, int(mask.width * scale)), max(4, int(mask.height * scale)))
    cut, mask = (one.resize(size, Image.Resampling.BILINEAR) for one in (picture, mask))
    at = int(rng.integers(0, side - size[0] + 1)), int(rng.integers(0, side - size[1] + 1))
    ground.paste(cut, at, mask)
    whole = Image.new("L", (side, side))
    whole.paste(mask, at)
    return ground, whole


def marked(
    objects: Sequence[Object], places: Sequence[Image.Image], side: int, grid: tuple[int, int], *, count: int, seed: int
) -> tuple[Marked, Marked]:
    """`count` pictures of objects as they are, and `count` of objects put on places."""
    rng = np.random.default_rng(seed)
    plain: list[tuple[Image.Image, Image.Image]] = []
    composed: list[tuple[Image.Image, Image.Image]] = []
    for place in rng.permutation(len(objects))[:count]:
        thing = objects[int(place)]
        pair = (Image.fromarray(thing.pixels), Image.fromarray(thing.mask))
        plain.append((pair[0].resize((side, side), Image.Resampling.BICUBIC), pair[1].resize((side, side))))
    for _ in range(count):
        thing, ground = objects[int(rng.integers(len(objects)))], places[int(rng.integers(len(places)))]
        composed.append(compose(thing, ground, rng, side))
    return _stack(plain, grid), _stack(composed, grid)


def _stack(pairs: Sequence[tuple[Image.Image, Image.Image]], grid: tuple[int, int]) -> Marked:
    frames = np.stack([np.asarray(image) for image, _ in pairs])
    small = [mask.resize((grid[1], grid[0]), Image.Resampling.BOX) for _, mask in pairs]
    return Marked(frames, np.stack([np.asarray(mask, np.float32) / 255 for mask in small]))
