"""Videos whose shots are known: single takes, joins, dissolves, fades, flashes, slides and screens.

Takes are parts of real clips, pictures of dead leaves (`clips`), and photographs under a hand-held camera, with people
or things that pass, changing exposure and quick turns. A boundary is a span of time: of a cut, that of one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.clips import Clip, frames, same_priority
from keyreel.types import U8

Frames: TypeAlias = list[U8]  # [H, W, 3] each
FPS = 25
SIZE = (180, 320)
SCREEN = (360, 640)
SINGLE_TAKES = (  # real clips without a cut: each was looked at
    *("bottle-detection.mp4", "car-detection.mp4", "chaplin.mp4", "flower.mp4", "stream-of-water.mp4", "test.mp4"),
    "internal_emulator_transformer_output.mp4",
)
_SHORTEST = 30  # frames of a take in a join
_DISSOLVE = (8, 26)  # frames
_CREAM, _INK, _NIGHT, _SNOW = (250, 248, 240), (30, 32, 38), (24, 26, 32), (225, 228, 235)
_WORDS = [
    *("revenue", "growth", "quarter", "model", "training", "data", "cluster", "latency", "budget", "users", "region"),
    *("design", "review", "plan", "market", "result", "network", "storage", "failure", "method", "sample", "figure"),
    *("error", "memory", "device", "search", "video", "frame", "vector", "index", "release", "schedule", "a", "the"),
]


@dataclass(frozen=True, slots=True)
class Known:
    """A video and its boundaries, (start, stop) in seconds each: between these the next shot takes over."""

    path: Path
    boundaries: tuple[tuple[float, float], ...]
    seconds: float


# --- takes ------------------------------------------------------------------------------------------------------------


def real(path: Path, count: int, draw: np.random.Generator, first: int | None = None) -> Frames:
    """Up to so many frames of a clip, from a random place on."""
    height, width = SIZE
    found: Frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        total = stream.frames or int(float((stream.duration or 0) * (stream.time_base or 0)) * FPS)
        begin = int(draw.integers(max(1, total - count))) if first is None else first
        for number, frame in enumerate(container.decode(stream)):
            if number >= begin:
                found.append(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray())
            if len(found) == count:
                break
    return found


def leaves(count: int, seed: int) -> Frames:
    """Dead leaves under a moving camera, with objects that move."""
    height, width = SIZE
    made = frames(Clip(height=height, seconds=count // FPS + 1, fps=FPS, seed=seed))
    return [frame.reformat(width, height, "rgb24").to_ndarray() for frame, _ in zip(made, range(count), strict=False)]


def held(photo: Image.Image, passing: Sequence[Image.Image], count: int, draw: np.random.Generator) -> Frames:
    """A photograph under a hand-held camera; now and then something passes, the exposure changes, the camera turns."""
    height, width = SIZE
    scale = 1.9 * max(width / photo.width, height / photo.height)
    wide = photo.convert("RGB").resize(
        (round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC
    )
    room = np.array([wide.width - 1.4 * width, wide.height - 1.4 * height])
    ends = draw.uniform(0.15, 0.85, (2, 2)) * room
    shake = np.cumsum(draw.normal(0, 0.9, (count, 2)), axis=0)
    shake -= np.linspace(0, 1, count)[:, None] * shake[-1]
    quick = draw.random() < 0.4
    turn = np.clip((np.arange(count) - count * 0.45) / (6 if quick else count), 0, 1)[:, None]
    path = np.clip(ends[0] + (ends[1] - ends[0]) * turn + shake, 0, np.maximum(room, 0))
    zoom = 1 + 0.25 * draw.random() * np.linspace(0, 1, count)
    light = 1 + 0.35 * (draw.random() < 0.4) * np.sin(np.linspace(0, draw.uniform(2, 6), count))
    others = [
        (_cut_out(one, draw), draw.integers(-20, count - 10), draw.uniform(4, 22), draw.uniform(0, 0.5))
        for one in passing
    ]
    found: Frames = []
    for number in range(count):
        x, y = path[number]
        w, h = 1.4 * width / zoom[number], 1.4 * height / zoom[number]
        view = wide.crop((round(x), round(y), round(x + w), round(y + h))).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        for one, start, speed, low in others:
            if number >= start:
                view.paste(one, (round((number - start) * speed) - one.width, round(low * height)), one.getchannel("A"))
        lit = np.asarray(view, np.float32) * light[number] + draw.normal(0, 2.5, (height, width, 1))
        found.append(np.clip(lit, 0, 255).astype(np.uint8))
    return found


def _cut_out(photo: Image.Image, draw: np.random.Generator) -> Image.Image:
    """An oval piece of a photograph, as something that passes the camera."""
    height = int(draw.integers(SIZE[0] // 3, SIZE[0]))
    width = int(height * draw.uniform(0.3, 0.8))
    one = photo.convert("RGB").resize((width, height))
    mask = Image.new("L", one.size, 0)
    ImageDraw.Draw(mask).ellipse((0, 0, width, height), fill=255)
    one.putalpha(mask)
    return one


def photographs(trainset: Path, count: int, draw: np.random.Generator) -> list[Image.Image]:
    """Photographs of the validation part, of those that are not tiny."""
    from keyreel_export.builtin.data import read_examples, read_images

    usual = [one for one in read_examples(trainset, "val") if one.source != "tiny-imagenet"]
    chosen = [usual[int(n)] for n in draw.choice(len(usual), count, replace=False)]
    return [image for _, image in sorted(read_images(trainset, chosen), key=lambda pair: pair[0])]


# --- edits ------------------------------------------------------------------------------------------------------------


def joined(
    takes: Sequence[Frames], how: Callable[[U8, U8, float], U8] | None, draw: np.random.Generator
) -> tuple[Frames, list[tuple[int, int]]]:
    """Takes one after the other, and the frames [start, stop) over which each boundary reaches.

    Args:
        how: makes a frame from one of each take and the progress in 0..1; None for hard cuts.
    """
    made, boundaries = list(takes[0]), list[tuple[int, int]]()
    for take in takes[1:]:
        if how is None:
            boundaries.append((len(made), len(made) + 1))
            made += take
            continue
        length = int(draw.integers(*_DISSOLVE))
        start = len(made) - length
        for n in range(length):
            made[start + n] = how(made[start + n], take[n], (n + 1) / (length + 1))
        boundaries.append((start, len(made)))
        made += take[length:]
    return made, boundaries


def dissolve(one: U8, other: U8, share: float) -> U8:
    return ((1 - share) * one + share * other + 0.5).astype(np.uint8)


def through_black(one: U8, other: U8, share: float) -> U8:
    lit, light = (one, 1 - 2 * share) if share < 0.5 else (other, 2 * share - 1)
    return (lit * max(light - 0.05, 0)).astype(np.uint8)


def flashed(take: Frames, draw: np.random.Generator) -> Frames:
    """With a photographer's flashes, of one to three frames."""
    made = list(take)
    for at in draw.choice(np.arange(10, len(made) - 10, 12), 3, replace=False).tolist():
        for n in range(int(draw.integers(1, 4))):
            made[at + n] = np.clip(made[at + n] * 1.6 + draw.uniform(70, 150), 0, 255).astype(np.uint8)
    return made


# --- slides and screens -----------------------------------------------------------------------------------------------


def slides(
    draw: np.random.Generator, photos: Sequence[Image.Image], *, soft: bool
) -> tuple[Frames, list[tuple[int, int]]]:
    """A talk: five to eight slides of a deck, a pointer that wanders; with `soft`, they dissolve."""
    dark, made, boundaries = draw.random() < 0.4, Frames(), list[tuple[int, int]]()
    pictures = [_slide(draw, photos, dark=dark) for _ in range(int(draw.integers(5, 9)))]
    spot = np.array([300.0, 200.0])
    for number, picture in enumerate(pictures):
        before = pictures[number - 1] if number else picture
        ramp = int(draw.integers(6, 14)) if soft and number else 0
        if number:
            boundaries.append((len(made), len(made) + max(ramp, 1)))
        aim = draw.uniform((20, 20), (SCREEN[1] - 20, SCREEN[0] - 20))
        length = int(draw.integers(60, 160))
        for n in range(length):
            share = (n + 1) / (ramp + 1)
            shown = picture if share >= 1 else Image.blend(before, picture, share)
            if length // 3 < n < length // 2:
                spot += (aim - spot) / 10
            made.append(_with_pointer(shown, spot))
    return made, boundaries


def screens(draw: np.random.Generator) -> tuple[Frames, list[tuple[int, int]]]:
    """An editor: lines are typed, the caret blinks, the text scrolls; then another window comes to the front."""
    made, boundaries = Frames(), list[tuple[int, int]]()
    font = ImageFont.load_default(13)
    for window in range(3):
        if window:
            boundaries.append((len(made), len(made) + 1))
        ground, ink = [(_NIGHT, _SNOW), (_CREAM, _INK), ((30, 45, 60), (235, 220, 190))][window]
        lines = [" " * int(draw.integers(0, 9)) + _sentence(draw, 4, 9) for _ in range(60)]
        typed = _sentence(draw, 8, 12)
        for n in range(150):
            page = Image.new("RGB", (SCREEN[1], SCREEN[0]), ground)
            pen = ImageDraw.Draw(page)
            if window == 2:
                pen.rectangle((0, 0, 150, SCREEN[0]), fill=(20, 30, 40))
            scrolled = int(np.clip(n - 90, 0, 45)) * 5
            text = [*lines[:12], typed[: max(0, n - 10)], *lines[12:]]
            for row, line in enumerate(text):
                pen.text((165 if window == 2 else 20, 10 + 18 * row - scrolled), line, ink, font)
            if n % 24 < 12:
                pen.rectangle((400, 330, 407, 344), fill=ink)
            made.append(np.asarray(page))
    return made, boundaries


def _slide(draw: np.random.Generator, photos: Sequence[Image.Image], *, dark: bool) -> Image.Image:
    ground, ink = (_NIGHT, _SNOW) if dark else (_CREAM, _INK)
    page = Image.new("RGB", (SCREEN[1], SCREEN[0]), ground)
    pen = ImageDraw.Draw(page)
    pen.text((40, 28), _sentence(draw, 2, 5).title(), ink, ImageFont.load_default(34))
    pen.rectangle((0, SCREEN[0] - 8, SCREEN[1], SCREEN[0]), fill=(70, 110, 170))  # what all slides of a deck share
    kind = draw.random()
    wide = SCREEN[1] // 2 if kind > 0.5 else SCREEN[1]
    for row in range(int(draw.integers(2, 6))):
        pen.text(
            (60, 100 + 44 * row),
            "• " + _sentence(draw, 2, 4 if wide < SCREEN[1] else 7),
            ink,
            ImageFont.load_default(19),
        )
    if kind > 0.75:
        page.paste(photos[int(draw.integers(len(photos)))].convert("RGB").resize((250, 190)), (360, 100))
    elif kind > 0.5:
        for bar, height in enumerate(draw.uniform(30, 190, 5)):
            pen.rectangle((370 + 48 * bar, 300 - height, 400 + 48 * bar, 300), fill=(90, 140, 200))
    return page


def _sentence(draw: np.random.Generator, low: int, high: int) -> str:
    return " ".join(draw.choice(_WORDS, int(draw.integers(low, high + 1))))


def _with_pointer(page: Image.Image, spot: NDArray[np.float64]) -> U8:
    shown = page.copy()
    x, y = (float(value) for value in spot)
    ImageDraw.Draw(shown).polygon([(x, y), (x, y + 14), (x + 10, y + 10)], fill=(0, 0, 0), outline=(255, 255, 255))
    return np.asarray(shown)


# --- files ------------------------------------------------------------------------------------------------------------


def encode(path: Path, pictures: Iterable[U8], *, fps: int = FPS) -> int:
    """Encodes pictures [H, W, 3] with x264, whose key frames are its own choice. Returns how many."""
    count = 0
    with same_priority(), av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "24"})
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 2
        for count, picture in enumerate(pictures, 1):
            if count == 1:
                stream.height, stream.width = picture.shape[:2]
            frame = VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = count - 1, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return count


def write(path: Path, made: Frames, boundaries: Sequence[tuple[int, int]]) -> Known:
    encode(path, made)
    return Known(path, tuple((start / FPS, stop / FPS) for start, stop in boundaries), len(made) / FPS)
