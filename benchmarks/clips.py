"""Clips made by a seeded script: natural-like pictures that move, with grain and cuts, in several codecs and GOPs.

A scene is a picture of "dead leaves" (Lee, Mumford and Huang 2001: discs that hide each other, whose radii follow a
power law, have the statistics of natural images), each disc with a texture of 1/f noise. The camera pans and zooms,
ten objects move, every frame has fresh grain, and scenes change with hard cuts.

Detail and motion were set so that x264 spends what it spends on real clips with the same settings: about 0.4 bits a
pixel on key frames (six real clips: 0.13 to 0.55) and 0.04 on others (0.015 to 0.05).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
VERSION = 2  # of the pictures; part of the files' names
SCENE_FRAMES = 131  # a prime: cuts and key frames do not coincide
_TILE = 512
_GRAIN = 3  # levels of luma that are added to each frame

# Encoder and options. Fixed threads: some encoders write other bytes with other numbers of them.
_ENCODERS = {
    "h264": ("libx264", "preset=veryfast crf=23 bf=3 g={gop} keyint_min={gop} sc_threshold=0"),
    "hevc": (
        "libx265",
        "preset=superfast x265-params=log-level=none:crf=26:bframes=3:keyint={gop}:min-keyint={gop}:scenecut=0:pools=2",
    ),
    "vp9": (
        "libvpx-vp9",
        "deadline=good cpu-used=5 row-mt=1 crf=34 b=0 lag-in-frames=16 auto-alt-ref=1 g={gop} keyint_min={gop}",
    ),
    "av1": ("libsvtav1", "preset=11 crf=38 g={gop} svtav1-params=keyint={gop}:scd=0:lp=2"),
    "mpeg2": ("mpeg2video", "bf=2 g={gop} keyint_min={gop} sc_threshold=1000000000 q=5"),
}


@dataclass(frozen=True, slots=True)
class Clip:
    codec: str = "h264"
    gop: int = 60  # frames from key frame to key frame
    height: int = 1080  # 16:9
    seconds: int = 30
    fps: int = 30
    seed: int = 1

    @property
    def width(self) -> int:
        return round(self.height * 16 / 9 / 2) * 2

    def params(self) -> dict[str, Any]:
        """As they go into rows of systems that take one frame a second."""
        codec, gop, height, seconds = self.codec, self.gop, self.height, self.seconds
        return {"codec": codec, "gop": gop, "height": height, "fps": 1, "seconds": seconds, "video_fps": self.fps}


def clip(folder: Path, wanted: Clip) -> Path:
    path = folder / f"{'-'.join(map(str, asdict(wanted).values()))}-v{VERSION}.mp4"
    if not path.exists():
        partial = folder / f".{path.name}"
        _encode(partial, wanted)
        partial.replace(path)
    return path


def small_clips(folder: Path, count: int) -> list[Path]:
    """Clips of two seconds, so small that what a library adds to each is most of what they cost."""
    return [clip(folder, Clip(gop=5, height=90, seconds=2, fps=5, seed=seed)) for seed in range(count)]


@contextmanager
def same_priority() -> Iterator[None]:
    """Restores the scheduling of the calling thread.

    SVT-AV1, run by root, gives the thread that opens it real-time priority, which threads started later inherit; two of
    them that wait for each other stop the machine.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _encode(path: Path, wanted: Clip) -> None:
    encoder, options = _ENCODERS[wanted.codec]
    filled = dict(option.split("=", 1) for option in options.format(gop=wanted.gop).split())
    with same_priority(), av.open(str(path), "w", format="mp4") as output:
        stream: Any = output.add_stream(encoder, rate=wanted.fps, options=filled)
        stream.height, stream.width, stream.pix_fmt = wanted.height, wanted.width, "yuv420p"
        stream.codec_context.thread_count = 2
        if encoder == "mpeg2video":
            stream.codec_context.qmin = stream.codec_context.qmax = 5
            stream.codec_context.bit_rate = 40_000_000
        for frame in frames(wanted):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def frames(wanted: Clip) -> Iterator[VideoFrame]:
    """The frames of a clip before they are encoded, yuv420p."""
    random = np.random.default_rng([wanted.seed, wanted.height])
    height, width = wanted.height, wanted.width
    grain = random.integers(0, _GRAIN, (5, height + 16, width + 16), dtype=np.uint8)
    scene: _Scene | None = None
    for number in range(wanted.seconds * wanted.fps):
        place = number % SCENE_FRAMES
        if scene is None or place == 0:
            scene = _Scene(random, height, width)
        luma, chroma = scene.picture(place / SCENE_FRAMES)
        top, left = random.integers(0, 16, 2)
        luma = luma + grain[number % len(grain), top : top + height, left : left + width]
        planes = np.concatenate([luma.ravel(), chroma.ravel()]).reshape(height * 3 // 2, width)
        frame = VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.pts = number
        yield frame


class _Scene:
    """A canvas larger than the picture, the objects that move over it, and the path of the camera."""

    def __init__(self, random: np.random.Generator, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._canvas = _leaves(random, height * 5 // 4 // 16 * 16, width * 5 // 4 // 16 * 16, 120)
        self._from, self._to = random.uniform(0, 1, (2, 3))  # place of the camera (down, across) and its zoom
        self._objects = [_object(random, height) for _ in range(10)]

    def picture(self, t: float) -> tuple[U8, U8]:
        height, width = self._height, self._width
        down, across, zoom = self._from + (self._to - self._from) * t
        rows, columns = (round(size * (1 + 0.2 * zoom) / 2) * 2 for size in (height, width))
        luma, chroma = self._canvas
        top = int(down * (luma.shape[0] - rows)) // 2 * 2
        left = int(across * (luma.shape[1] - columns)) // 2 * 2
        half = (slice(None), slice(top // 2, (top + rows) // 2), slice(left // 2, (left + columns) // 2))
        seen = np.concatenate([luma[top : top + rows, left : left + columns].ravel(), chroma[half].ravel()])
        frame = VideoFrame.from_ndarray(seen.reshape(rows * 3 // 2, columns), format="yuv420p")
        planes = frame.reformat(width, height, interpolation="BILINEAR").to_ndarray().reshape(-1)
        luma = planes[: height * width].reshape(height, width)
        chroma = planes[height * width :].reshape(2, height // 2, width // 2)
        for own_luma, own_chroma, mask, turns, phase in self._objects:
            size, wave = len(mask), 0.5 + 0.5 * np.sin(2 * math.pi * turns * t + phase)
            top, left = (int(wave[i] * (luma.shape[i] - size)) // 2 * 2 for i in range(2))
            np.copyto(luma[top : top + size, left : left + size], own_luma, where=mask)
            top, left, size = top // 2, left // 2, size // 2
            np.copyto(chroma[:, top : top + size, left : left + size], own_chroma, where=mask[::2, ::2])
        return luma, chroma


def _object(random: np.random.Generator, height: int) -> tuple[U8, U8, Any, Any, Any]:
    """A textured disc: luma, chroma, mask, and the turns and phase of its curve."""
    radius = int(random.uniform(0.08, 0.2) * height) // 2 * 2 + 2
    reach = np.arange(-radius, radius) + 0.5
    mask = reach[:, None] ** 2 + reach**2 < radius**2
    pictures = _leaves(random, 2 * radius, 2 * radius, 12)
    return *pictures, mask, random.uniform(0.7, 2.2, 2), random.uniform(0, 2 * math.pi, 2)


def _leaves(random: np.random.Generator, height: int, width: int, count: int) -> tuple[U8, U8]:
    """`count` dead leaves: luma [H, W] and chroma [2, H/2, W/2]."""
    texture = _texture(random)
    repeated = np.tile(texture, (height // _TILE + 1, width // _TILE + 1))[:height, :width]
    luma = 120 + 4 * repeated
    chroma = np.full((2, height // 2, width // 2), 128, np.uint8)
    # Radii with density r^-3 between 0.02 and 0.35 of the height; the largest are painted first, so that all are seen.
    low, high = 0.02 * height, 0.35 * height
    share = random.uniform(0, 1, count)
    radii = np.sort((low**-2 + share * (high**-2 - low**-2)) ** -0.5)[::-1]
    for radius in radii:
        y, x = random.uniform(0, height), random.uniform(0, width)
        top, left = max(int(y - radius), 0), max(int(x - radius), 0)
        rows, columns = np.ogrid[top : min(int(y + radius) + 1, height), left : min(int(x + radius) + 1, width)]
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        grey, contrast = random.uniform(45, 195), random.uniform(0.5, 4)
        window = luma[top : top + inside.shape[0], left : left + inside.shape[1]]
        np.copyto(window, grey + contrast * repeated[: inside.shape[0], : inside.shape[1]], where=inside)
        colours = random.integers(84, 172, 2).astype(np.uint8)
        window = chroma[:, top // 2 : (top + inside.shape[0]) // 2, left // 2 : (left + inside.shape[1]) // 2]
        where = inside[top % 2 :: 2, left % 2 :: 2][: window.shape[1], : window.shape[2]]
        np.copyto(window[:, : where.shape[0], : where.shape[1]], colours[:, None, None], where=where)
    # A lens draws no edge in one pixel.
    for axis in (0, 1):
        luma = (np.roll(luma, 1, axis) + 2 * luma + np.roll(luma, -1, axis)) / 4
    return np.clip(luma, 20, 235 - _GRAIN).astype(np.uint8), chroma


def _texture(random: np.random.Generator) -> NDArray[np.float32]:
    """[512, 512] 1/f noise with mean 0 and deviation 1, periodic."""
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE))
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(random.standard_normal((_TILE, _TILE))) / frequency
    texture: NDArray[np.float32] = np.fft.irfft2(noise, (_TILE, _TILE)).astype(np.float32)
    return texture / texture.std()
