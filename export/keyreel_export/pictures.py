"""Makes frames of the user's labelled pictures, to fit the subject's side of a model to.

One picture is the place, others move over it; their labels say what the clip shows. Every picture is also used
unchanged. A fifth of the pictures is held out to measure the fit.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from keyreel.config import EncodeConfig, ImageTransform
from keyreel.errors import ModelError
from keyreel.models.calibration import as_seen, resampling_of
from keyreel.types import F32, U8
from keyreel_export.builtin.saliency import outline
from keyreel_export.fit import Frames, marks
from keyreel_export.towers import Tower
from keyreel_kernels import shift

HINT = "a folder of labelled pictures has a subfolder for each label, or a file labels.csv with the columns file,label"
LABELS = "labels.csv"
LARGEST_SIDE = 512  # of a kept picture, in pixels
OUTLINED_SIDE = 128  # of a picture for the search of an outline
FRAMES = 4  # of a clip: the two in the middle have neighbours on both sides
WIDE = 16 / 9  # aspect of videos; some towers squash them to a square
CLIPS_A_PICTURE, CLIPS, MORE_CLIPS = 4, 400, 2000  # clips for each picture; fewest and most clips in all
BYTES = 2 << 30  # most bytes of the clips' tokens
HELD_CLIPS = 200
BATCH = 8  # clips in one run of the tower


@dataclass(frozen=True, slots=True)
class Picture:
    """A labelled picture."""

    image: Image.Image  # RGB
    outline: Image.Image | None  # 255 on the object, if it is on a plain ground
    labels: tuple[str, ...]  # the most specific first


@dataclass(frozen=True, slots=True)
class Clip:
    """A short video of objects in a place."""

    frames: U8  # [FRAMES, H, W, 3]
    things: tuple[Picture, ...]
    place: Picture


def read_pictures(folder: Path) -> list[Picture]:
    """Reads the pictures of a folder and their labels.

    Raises:
        ModelError: no pictures, only one label, or a picture or labels.csv that cannot be read.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", hint=HINT)
    listed = _in_table(folder) if (folder / LABELS).is_file() else _in_subfolders(folder)
    if not listed:
        raise ModelError(f"{folder} holds no labelled pictures", hint=HINT)
    names = {label for _, labels in listed for label in labels}
    if len(names) < 2:
        raise ModelError(
            f"all pictures of {folder} have the label {names.pop()!r}, at least two labels are needed", hint=HINT
        )
    images = [(_read(path), labels) for path, labels in listed]
    return [Picture(image, _outline(image), labels) for image, labels in images]


def _in_table(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    path, listed = folder / LABELS, list[tuple[Path, tuple[str, ...]]]()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if missing := {"file", "label"} - set(table.fieldnames or ()):
                raise ModelError(f"{path} has no column {' and no column '.join(sorted(missing))}", hint=HINT)
            for row in table:
                labels = tuple(label.strip() for label in (row["label"] or "").split(";") if label.strip())
                if not row["file"] or not labels:
                    raise ModelError(f"{path}, line {table.line_num}: no file or no label", hint=HINT)
                listed.append((folder / row["file"], labels))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="it must be CSV in UTF-8") from error
    return listed


def _in_subfolders(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    kinds = Image.registered_extensions()
    return [
        (path, (label.name.replace("_", " "),))
        for label in sorted(folder.iterdir())
        if label.is_dir() and not label.name.startswith(".")
        for path in sorted(label.rglob("*"))
        if path.suffix.lower() in kinds and not path.name.startswith(".")
    ]


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))  # JPEGs decode at a fraction of their size
            image = ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:
        raise ModelError(f"the picture {path} cannot be read: {error}", hint="remove it, or save it again") from error
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
    return image


def _outline(image: Image.Image) -> Image.Image | None:
    small = image.copy()
    small.thumbnail((OUTLINED_SIDE, OUTLINED_SIDE))  # the flood is slow
    found = outline(small)
    return None if found is None else Image.fromarray(found.mask).resize(image.size, Image.Resampling.BILINEAR)


def split(pictures: Sequence[Picture], seed: int) -> tuple[list[Picture], list[Picture]]:
    """Splits pictures into those to fit to, and a fifth of each label to hold out.

    Raises:
        ModelError: too few pictures to put one on another with other labels, in both parts.
    """
    drawn = [pictures[int(n)] for n in np.random.default_rng(seed).permutation(len(pictures))]
    ordered = sorted(drawn, key=lambda picture: picture.labels[0])
    held = ordered[2::5]
    fitted = [picture for n, picture in enumerate(ordered) if n % 5 != 2]
    for part in (fitted, held):
        if not any(_apart(part[0], other) for other in part[1:]):
            raise ModelError(
                f"{len(pictures)} pictures are too few: a fifth is held out, and needs two of different labels",
                hint="give ten pictures or more, as many of each label",
            )
    return fitted, held


def _apart(one: Picture, other: Picture) -> bool:
    return not set(one.labels) & set(other.labels)


def clips(pictures: Sequence[Picture], how: ImageTransform, seed: int) -> Iterator[Clip]:
    """Yields clips without end, for towers of any size.

    One or two pictures, cut out if the outline is known, move or stand on a picture with other labels, with pans, blur
    and compression, as in `builtin.composites.varied`.
    """
    rng = np.random.default_rng(seed)
    while True:
        drawn = rng.integers(len(pictures), size=2 + int(rng.random() < 0.25))
        place, *others = (pictures[int(n)] for n in drawn)
        things = tuple(thing for thing in others if _apart(thing, place))
        if things:
            yield Clip(_moving(things, place, how, rng), things, place)


def _moving(things: Sequence[Picture], place: Picture, how: ImageTransform, rng: np.random.Generator) -> U8:
    size = np.array([how.width, how.height])
    side = int(size.min())
    pan = rng.uniform(-0.09, 0.09, 2) * side * (rng.random(2) < 0.4)
    room = np.ceil(np.abs(pan) * (FRAMES - 1)).astype(int)
    wide = (int(size[0] + room[0]), int(size[1] + room[1]))
    squashed = how.mode == "squash"
    ground = (
        place.image.resize(wide, resampling_of(how))
        if squashed
        else ImageOps.fit(place.image, wide, resampling_of(how))
    )
    paths = [_path(thing, size, rng, 1 / WIDE if squashed else 1.0) for thing in things]
    blur, quality = rng.random() < 0.25, int(rng.integers(15, 60)) if rng.random() < 0.25 else None
    frames: list[U8] = []
    for n in range(FRAMES):
        x, y = np.where(pan >= 0, pan * n, pan * n + room)
        frame = ground.transform(
            (how.width, how.height), Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR
        )
        for picture, mask, first, step in paths:
            frame.paste(picture, tuple((first + n * step).round().astype(int).tolist()), mask)
        if blur:
            frame = frame.filter(ImageFilter.GaussianBlur(side / 112))
        if quality:
            stream = io.BytesIO()
            frame.save(stream, "JPEG", quality=quality)
            frame = Image.open(stream)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def _path(
    thing: Picture, size: Any, rng: np.random.Generator, narrow: float
) -> tuple[Image.Image, Image.Image | None, F32, F32]:
    """A picture at its size, its mask if it is cut out, its first place, and its step per frame in pixels."""
    image, mask = thing.image, thing.outline if rng.random() < 0.5 else None
    if mask is not None:
        box = mask.getbbox()
        image, mask = image.crop(box), mask.crop(box)
    side = int(size.min())
    height = rng.uniform(0.23, 0.81) * side
    wanted = np.array([height * narrow * image.width / image.height, height])
    width, height = (int(n) for n in np.clip(wanted * min(1.0, 0.81 * side / wanted.max()), 4, side))
    if mask is not None:
        mask = mask.resize((width, height), Image.Resampling.BILINEAR)
    first, last = (rng.integers(0, size + 1 - (width, height)).astype(np.float32) for _ in range(2))
    step = (last - first) / 5 * (rng.random() < 0.8)
    return image.resize((width, height), Image.Resampling.BICUBIC), mask, first, step


def moving_frames(
    tower: Tower, drawn: Iterator[Clip], count: int, names: Sequence[str], attention: Callable[[U8, F32], Tensor]
) -> tuple[Frames, Tensor]:
    """The two middle frames of `count` clips.

    Args:
        attention: frames [N, H, W, 3], tokens [N, R+P, C] -> maps [N, P].

    Returns:
        The frames, and the results of `attention`.
    """
    how, prefix, linked = EncodeConfig(), tower.prefix_tokens, np.arange(FRAMES) > 0
    found: list[list[Tensor]] = []
    shown: list[tuple[list[tuple[str, ...]], tuple[str, ...]]] = []
    for first in range(0, count, BATCH):
        group = list(islice(drawn, min(BATCH, count - first)))
        with torch.no_grad():
            tokens = tower(torch.from_numpy(np.concatenate([clip.frames for clip in group]))).numpy()
        for clip, own in zip(group, tokens.reshape(len(group), FRAMES, *tokens.shape[1:]), strict=True):
            patches = own[:, prefix:]
            change = shift.patch_change(patches, tower.grid, linked, steps=how.shift_steps)[1:3]
            maps = attention(clip.frames[1:3], own[1:3])
            found.append([torch.from_numpy(own[1:3].astype(np.float16)), torch.from_numpy(change), maps])
            shown += [([thing.labels for thing in clip.things], clip.place.labels)] * 2
    tokens_, change_, maps_ = (torch.cat(part) for part in zip(*found, strict=True))
    return Frames(tokens_, change_, *marks(shown, names)), maps_


def still_frames(tower: Tower, pictures: Sequence[Picture], how: ImageTransform, names: Sequence[str]) -> Frames:
    """Unchanged pictures, as stills."""
    found: list[Tensor] = []
    for first in range(0, len(pictures), 4 * BATCH):
        frames = np.stack([as_seen(picture.image, how) for picture in pictures[first : first + 4 * BATCH]])
        with torch.no_grad():
            found.append(tower(torch.from_numpy(frames)).half())
    tokens = torch.cat(found)
    change = torch.zeros(len(tokens), tower.grid[0] * tower.grid[1])
    return Frames(tokens, change, *marks([([picture.labels], ()) for picture in pictures], names))


def clip_count(tower: Tower, pictures: int) -> int:
    """The number of clips to fit to."""
    tokens = tower.prefix_tokens + tower.grid[0] * tower.grid[1]
    fitting = BYTES // (2 * 2 * tokens * tower.token_width)  # two frames of two bytes
    return int(min(np.clip(CLIPS_A_PICTURE * pictures, CLIPS, MORE_CLIPS), max(fitting, 1)))
