"""Videos in which it is known where a text is answered: joins of real clips, and long takes without a cut.

A join is four captioned clips in a row, up to 20 s of each. A long take is a hand-held camera that dwells on four
photographs of one wide canvas and turns from one to the next; on one of them, a thing comes in for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from benchmarks.shot_clips import FPS, encode
from keyreel.decode.source import Source
from keyreel.types import F32, U8
from keyreel_export.builtin.data import Example, read_examples, read_images

TAKE_FPS = 10
SIZE = (360, 640)
PARTS = 4
SHORTEST, LONGEST = 2.0, 20.0  # seconds of a clip in a join


@dataclass(frozen=True, slots=True)
class Part:
    """What is shown from start to stop, in seconds, and texts that say so."""

    start: float
    stop: float
    texts: tuple[str, ...]
    event: bool = False  # what comes in while all else stays


def join(media: Path, captions: Mapping[str, Sequence[str]], path: Path, seed: int) -> tuple[Part, ...]:
    """Writes four clips in a row, drawn without replacement."""
    draw = np.random.default_rng(seed)
    long = [name for name in captions if _seconds(media / name) >= SHORTEST]
    parts: list[Part] = []

    def pictures() -> Iterator[U8]:
        count = 0
        for name in draw.permutation(long)[:PARTS].tolist():
            shown = _clip(media / name, draw)
            parts.append(Part(count / FPS, (count + len(shown)) / FPS, tuple(captions[name])))
            count += len(shown)
            yield from shown

    encode(path, pictures())
    return tuple(parts)


def _seconds(path: Path) -> float:
    with Source(path) as source:
        return source.probe().duration_seconds or 0.0


def _clip(path: Path, draw: np.random.Generator) -> list[U8]:
    """Up to 20 s of a clip from a random place on, 25 frames a second, cut to 16:9."""
    taken: list[U8] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first = float(draw.uniform(0, max(0.0, _seconds(path) - LONGEST)))
        for frame in container.decode(stream):
            time = float((frame.pts - (stream.start_time or 0)) * (frame.time_base or 0)) - first
            while time >= len(taken) / FPS and len(taken) < LONGEST * FPS:
                # Half the size first: 8K frames are not needed whole.
                scale = max(SIZE[0] / frame.height, SIZE[1] / frame.width)
                small = frame.reformat(round(frame.width * scale), round(frame.height * scale), "rgb24")
                taken.append(np.asarray(ImageOps.fit(small.to_image(), SIZE[::-1])))
            if len(taken) >= LONGEST * FPS:
                break
    return taken


def long_take(trainset: Path, path: Path, seed: int) -> tuple[Part, ...]:
    """Writes a take that dwells 10 to 60 s on each photograph of a canvas, and 60 to 120 s on one of them, during which
    a part of a fifth one stands in the picture for 6 to 15 s; the texts are their labels.
    """
    draw = np.random.default_rng(seed)
    examples = [one for one in read_examples(trainset, "val") if one.labels and one.source != "tiny-imagenet"]
    chosen: list[Example] = []
    while len(chosen) < PARTS + 1:
        one = examples[int(draw.integers(len(examples)))]
        if one.labels[0] not in {label for other in chosen for label in other.labels}:
            chosen.append(one)
    height, width = round(SIZE[0] * 1.25), round(SIZE[1] * 1.25)
    photos = [image for _, image in sorted(read_images(trainset, chosen), key=lambda pair: pair[0])]
    canvas = _canvas([_fit(photo, (width, height)) for photo in photos[:PARTS]], width // 6)
    pitch = width - width // 6
    dwell = draw.uniform(10, 60, PARTS)
    longest = int(draw.integers(PARTS))
    dwell[longest] = draw.uniform(60, 120)
    turn = draw.uniform(1.5, 4, PARTS - 1)
    places: list[float] = []
    parts: list[Part] = []
    for number in range(PARTS):
        start = len(places) / TAKE_FPS
        places += [float(number)] * round(dwell[number] * TAKE_FPS)
        parts.append(Part(start, len(places) / TAKE_FPS, chosen[number].labels[:1]))
        if number < PARTS - 1:
            places += np.linspace(number, number + 1, round(turn[number] * TAKE_FPS)).tolist()
    seconds = draw.uniform(6, 15)
    begin = parts[longest].start + draw.uniform(5, dwell[longest] - seconds - 5)
    parts.append(Part(begin, begin + seconds, chosen[PARTS].labels[:1], event=True))
    side = round(SIZE[0] * draw.uniform(0.5, 0.8))
    thing = _fit(photos[PARTS], (side, side))
    corner = SIZE[0] - side, int(draw.integers(SIZE[1] - side))
    shake = np.zeros((len(places), 2))
    # The hand comes back: a walk that is pulled to its middle.
    for n in range(1, len(shake)):
        shake[n] = 0.97 * shake[n - 1] + draw.normal(0, 2.0, 2)
    light = 1 + 0.15 * np.sin(np.linspace(0, draw.uniform(4, 20), len(places)))

    def views() -> Iterator[U8]:
        for number, (place, (across, down), lit) in enumerate(zip(places, shake, light, strict=True)):
            left = int(np.clip(place * pitch + (width - SIZE[1]) / 2 + across, 0, canvas.shape[1] - SIZE[1]))
            top = int(np.clip((height - SIZE[0]) / 2 + down, 0, canvas.shape[0] - SIZE[0]))
            view = canvas[top : top + SIZE[0], left : left + SIZE[1]] * lit + draw.normal(0, 2.5, (*SIZE, 1))
            if begin <= number / TAKE_FPS < begin + seconds:
                view[corner[0] :, corner[1] : corner[1] + side] = thing
            yield np.clip(view, 0, 255).astype(np.uint8)

    encode(path, views(), fps=TAKE_FPS)
    return tuple(parts)


def _fit(photo: Image.Image, size: tuple[int, int]) -> F32:
    return np.asarray(ImageOps.fit(photo, size), np.float32)


def _canvas(photos: Sequence[F32], seam: int) -> F32:
    """Photographs side by side, one running into the next."""
    ramp = np.linspace(0, 1, seam, dtype=np.float32)[None, :, None]
    wide = photos[0]
    for photo in photos[1:]:
        mixed = (1 - ramp) * wide[:, -seam:] + ramp * photo[:, :seam]
        wide = np.concatenate([wide[:, :-seam], mixed, photo[:, seam:]], axis=1)
    return wide
