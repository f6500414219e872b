"""Renders the clip of `keyreel demo`, so that the first run needs neither a video nor a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from keyreel.types import F32, U8

HEIGHT, WIDTH, FPS, SAMPLE_RATE = 360, 640, 25, 48_000

Painter = Callable[[ImageDraw.ImageDraw, float], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """A part of the clip: picture, length and tone."""

    caption: str
    seconds: float
    background: tuple[int, int, int]
    paint: Painter  # paint(draw, time in the scene, 0..1)
    tone_hertz: float


def _circle(colour: str) -> Painter:
    def paint(draw: ImageDraw.ImageDraw, part: float) -> None:
        x, y = 140 + 360 * part, 180 + 40 * np.sin(6 * part)
        draw.ellipse([x - 90, y - 90, x + 90, y + 90], fill=colour)

    return paint


def _square(colour: str) -> Painter:
    def paint(draw: ImageDraw.ImageDraw, part: float) -> None:
        x, size = 320 + 120 * np.cos(3 * part), 150 + 60 * part
        draw.rectangle([x - size / 2, 180 - size / 2, x + size / 2, 180 + size / 2], fill=colour)

    return paint


def _triangle(colour: str) -> Painter:
    def paint(draw: ImageDraw.ImageDraw, part: float) -> None:
        x = 460 - 280 * part
        draw.polygon([(x, 70), (x - 120, 280), (x + 120, 280)], fill=colour)

    return paint


def _sunset(draw: ImageDraw.ImageDraw, part: float) -> None:
    for y in range(0, 240, 4):
        share = y / 240
        draw.rectangle([0, y, WIDTH, y + 4], fill=(int(90 + 165 * share), int(40 + 110 * share), int(110 - 60 * share)))
    top = 130 + 90 * part
    draw.ellipse([270, top, 370, top + 100], fill=(255, 220, 90))
    draw.rectangle([0, 240, WIDTH, HEIGHT], fill=(30, 40, 80))


def _night(draw: ImageDraw.ImageDraw, part: float) -> None:
    rng = np.random.default_rng(3)
    for x, y, size in zip(rng.uniform(0, WIDTH, 90), rng.uniform(0, HEIGHT, 90), rng.uniform(1, 3, 90), strict=True):
        x = float((x + 60 * part) % WIDTH)
        draw.ellipse([x - size, y - size, x + size, y + size], fill=(255, 255, 235))


def _chequerboard(draw: ImageDraw.ImageDraw, part: float) -> None:
    shift = int(40 * part)
    for row in range(-1, 10):
        for column in range(-1, 17):
            if (row + column) % 2 == 0:
                x, y = column * 40 + shift, row * 40
                draw.rectangle([x, y, x + 39, y + 39], fill="black")


SCENES = (
    Scene("a red circle", 4.0, (40, 70, 190), _circle("red"), 262),
    Scene("a green square", 3.0, (255, 255, 255), _square("green"), 294),
    Scene("a sunset", 6.0, (0, 0, 0), _sunset, 330),
    Scene("a yellow triangle", 3.0, (120, 40, 130), _triangle("yellow"), 349),
    Scene("a night sky with stars", 5.0, (8, 10, 30), _night, 392),
    Scene("a chequerboard", 3.0, (255, 255, 255), _chequerboard, 440),
)


def demo_frames() -> Iterator[U8]:
    """Yields the frames of the clip: [360, 640, 3] uint8, 25 per second, with a little camera noise."""
    rng = np.random.default_rng(0)
    for scene in SCENES:
        count = round(scene.seconds * FPS)
        for n in range(count):
            image = Image.new("RGB", (WIDTH, HEIGHT), scene.background)
            scene.paint(ImageDraw.Draw(image), n / max(count - 1, 1))
            noise = rng.integers(-4, 5, (HEIGHT, WIDTH, 1))
            yield np.clip(np.asarray(image).astype(np.int16) + noise, 0, 255).astype(np.uint8)


def demo_sound() -> F32:
    """Makes the sound: a tone for each scene, [samples] float32 at 48 kHz."""
    tones = []
    for scene in SCENES:
        at = np.arange(round(scene.seconds * SAMPLE_RATE)) / SAMPLE_RATE
        fade = np.minimum(1, np.minimum(at, at[::-1]) / 0.05)
        tones.append(0.1 * fade * np.sin(2 * np.pi * scene.tone_hertz * at))
    return np.concatenate(tones).astype(np.float32)


def write_demo(path: Path) -> None:
    """Writes the clip as MP4 with H.264 and AAC."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "20"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = output.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for picture in demo_frames():
            output.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(video.encode(None))
        sound = demo_sound()
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, start, Fraction(1, SAMPLE_RATE)
            output.mux(audio.encode(block))
        output.mux(audio.encode(None))
