"""Short videos of labelled objects that move over photographs of places, with a still camera or a pan.

Nothing is annotated: the pictures' labels say what is seen, and where an object was put is known. Frames are wide
pictures squashed to a square, as the engine does, so an object is narrower than its picture by 9/16.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from keyreel_export.builtin.data import F32, SIZE, U8, Example, read_images
from keyreel_export.builtin.saliency import PLACES, Object, outline

OBJECTS = frozenset({"tiny-imagenet", "caltech101", "imagenet-sample", "grocery"})
FRAMES = 4  # of a clip to train on: the two in the middle have neighbours on both sides


@dataclass(frozen=True, slots=True)
class Clips:
    """V videos of F frames each."""

    frames: U8  # [V, F, SIZE, SIZE, 3]
    things: tuple[tuple[Example, ...], ...]  # the objects of each video, the place last


@dataclass(frozen=True, slots=True)
class Tracked(Clips):
    """Videos of one object each, and where it is."""

    boxes: F32  # [V, F, 4]: left, top, right, bottom in pixels


def read_parts(trainset: Path, examples: Sequence[Example]) -> tuple[dict[Example, Image.Image], ...]:
    """Pictures of labelled objects, and of places, by example."""
    kept = [example for example in examples if example.labels and example.source in OBJECTS | PLACES]
    found = {kept[index]: image for index, image in read_images(trainset, kept)}
    ordered = sorted(found, key=lambda example: example.member)
    objects = {example: found[example] for example in ordered if example.source in OBJECTS}
    return objects, {example: found[example] for example in ordered if example.source in PLACES}


def moving(
    objects: Mapping[Example, Image.Image],
    places: Mapping[Example, Image.Image],
    *,
    size: int,
    pan: int,
    count: int,
    seed: int = 1,
) -> Tracked:
    """What is measured: `count` videos of six frames, each of another object `size` lines tall that crosses a place in
    a straight line, under a camera that pans by `pan` pixels a frame.
    """
    rng, length = np.random.default_rng(seed), 6
    names, grounds = list(objects), list(places)
    width = size * 9 // 16
    frames, boxes, things = [], [], []
    for number in rng.choice(len(names), count, replace=False):
        ground = grounds[rng.integers(len(grounds))]
        wide = places[ground].resize((SIZE + pan * length, SIZE), Image.Resampling.BICUBIC)
        small = objects[names[number]].resize((width, size), Image.Resampling.BICUBIC)
        left, top = rng.integers(0, SIZE + 1 - width, 2), rng.integers(0, SIZE + 1 - size, 2)
        for n in range(length):
            frame = wide.crop((pan * n, 0, pan * n + SIZE, SIZE))
            x, y = (int(ends[0] + (ends[1] - ends[0]) * n / (length - 1)) for ends in (left, top))
            frame.paste(small, (x, y))
            frames.append(np.asarray(frame))
            boxes.append((x, y, x + width, y + size))
        things.append((names[number], ground))
    boxed = np.array(boxes, np.float32).reshape(count, length, 4)
    return Tracked(np.stack(frames).reshape(count, length, SIZE, SIZE, 3), tuple(things), boxed)


def varied(
    objects: Mapping[Example, Image.Image], places: Mapping[Example, Image.Image], *, count: int, seed: int
) -> Clips:
    """What is trained on: one object or two of 26 to 90 lines, cut out where the outline is known, that move or stand;
    pans, blur and compression.
    """
    rng = np.random.default_rng(seed)
    names, grounds = list(objects), list(places)
    frames, things = [], []
    for _ in range(count):
        ground = grounds[rng.integers(len(grounds))]
        chosen = [names[int(n)] for n in rng.integers(len(names), size=1 + (rng.random() < 0.25))]
        pan = rng.uniform(-10, 10, 2) * (rng.random(2) < 0.4)
        paths = [_path(objects[name], rng) for name in chosen]
        room = np.ceil(np.abs(pan) * (FRAMES - 1)).astype(int)
        wide = places[ground].resize((SIZE + int(room[0]), SIZE + int(room[1])), Image.Resampling.BICUBIC)
        blur, quality = rng.random() < 0.25, int(rng.integers(15, 60)) if rng.random() < 0.25 else None
        for n in range(FRAMES):
            start = np.where(pan >= 0, pan * n, pan * n + room)
            frame = wide.transform(
                (SIZE, SIZE), Image.Transform.AFFINE, (1, 0, start[0], 0, 1, start[1]), Image.Resampling.BILINEAR
            )
            for picture, mask, first, step in paths:
                frame.paste(picture, tuple((first + n * step).round().astype(int).tolist()), mask)
            if blur:
                frame = frame.filter(ImageFilter.GaussianBlur(1.0))
            if quality:
                stream = io.BytesIO()
                frame.save(stream, "JPEG", quality=quality)
                frame = Image.open(stream)
            frames.append(np.asarray(frame))
        things.append((*chosen[::-1], ground))
    return Clips(np.stack(frames).reshape(count, FRAMES, SIZE, SIZE, 3), tuple(things))


def _path(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image | None, F32, F32]:
    """An object's picture at its size, its mask if it is cut out, its first place and its step a frame, in pixels."""
    thing: Object | None = outline(image) if rng.random() < 0.5 else None
    mask = None
    if thing is not None:
        mask = Image.fromarray(thing.mask)
        image, mask = image.crop(mask.getbbox()), mask.crop(mask.getbbox())
    height = int(rng.integers(26, 91))
    width = int(np.clip(height * 9 / 16 * (image.width / image.height if mask else 1), 8, 90))
    ends = np.stack([rng.integers(0, SIZE + 1 - side, 2) for side in (width, height)], axis=1).astype(np.float32)
    step = (ends[1] - ends[0]) / 5 * (rng.random() < 0.8)
    if mask is not None:
        mask = mask.resize((width, height), Image.Resampling.BILINEAR)
    return image.resize((width, height), Image.Resampling.BICUBIC), mask, ends[0], step
