"""Clips made by a seeded script: natural-like pictures that move, with grain and cuts, in several codecs and GOPs.

    python -m benchmarks.content FOLDER     makes all clips that the suite uses, so that a later run finds them

A scene is a picture of "dead leaves" (Lee, Mumford and Huang 2001: discs that hide each other, with radii after a power
law, have the statistics of natural images), each disc with a texture of 1/f noise. The camera pans and zooms over it,
ten objects move before it, each on its own way, and every frame has fresh grain. Scenes change with hard cuts.

How much detail and motion there is was set so that x264 spends on it what it spends on real clips with the same
settings: about 0.4 bits a pixel on key frames (six real clips: 0.13 to 0.55) and 0.04 on others (0.015 to 0.05).
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
VERSION = 2  # of the pictures: goes into the names of the files, so that an old cache is not taken for new
SCENE_FRAMES = 131  # in no step with the GOPs
_TILE = 512
_GRAIN = 3  # the luma of a picture ends that far below what would wrap

# Encoder and options; {gop} is filled in. Fixed threads, since some encoders give other bytes with other numbers.
_ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": (
        "libx264",
        {"preset": "veryfast", "crf": "23", "bf": "3", "g": "{gop}", "keyint_min": "{gop}", "sc_threshold": "0"},
    ),
    "hevc": (
        "libx265",
        {
            "preset": "superfast",
            "x265-params": "log-level=none:crf=26:bframes=3:keyint={gop}:min-keyint={gop}:scenecut=0:pools=2",
        },
    ),
    "vp9": (
        "libvpx-vp9",
        {
            "deadline": "good",
            "cpu-used": "5",
            "row-mt": "1",
            "crf": "34",
            "b": "0",
            "lag-in-frames": "16",
            "auto-alt-ref": "1",
            "g": "{gop}",
            "keyint_min": "{gop}",
        },
    ),
    "av1": (
        "libsvtav1",
        {"preset": "11", "crf": "38", "g": "{gop}", "svtav1-params": "keyint={gop}:scd=0:lp=2"},
    ),
    "mpeg2": ("mpeg2video", {"bf": "2", "g": "{gop}", "keyint_min": "{gop}", "sc_threshold": "1000000000", "q": "5"}),
}
FFMPEG_NAMES = {"mpeg2": "mpeg2video"}


@dataclass(frozen=True, slots=True)
class Clip:
    """What a clip is."""

    codec: str = "h264"
    gop: int = 60  # frames from key frame to key frame
    height: int = 1080  # 16:9
    seconds: int = 30
    fps: int = 30
    repeats: int = 1  # the packets that many times over, for long videos
    seed: int = 1

    @property
    def width(self) -> int:
        return round(self.height * 16 / 9 / 2) * 2

    @property
    def name(self) -> str:
        return "-".join(f"{key[0]}{value}" for key, value in asdict(self).items()) + f"-v{VERSION}.mp4"


def clip(folder: Path, wanted: Clip) -> Path:
    """The clip's file; made if it is not there."""
    path = folder / wanted.name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{wanted.name}"
    if wanted.repeats > 1:
        once = Clip(**{**asdict(wanted), "repeats": 1})
        _repeat(clip(folder, once), aside, wanted.repeats)
    else:
        _encode(aside, wanted)
    aside.replace(path)
    return path


@contextmanager
def same_priority() -> Iterator[None]:
    """Gives the calling thread its scheduling back.

    SVT-AV1, run by root, makes the thread that opens it a real-time one of the highest priority, and leaves it so; all
    that it starts later is one, too, and two of those that wait for each other stop the whole machine.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _encode(path: Path, wanted: Clip) -> None:
    encoder, options = _ENCODERS[wanted.codec]
    with same_priority(), av.open(str(path), "w", format="mp4") as output:
        filled = {key: value.format(gop=wanted.gop) for key, value in options.items()}
        stream: Any = output.add_stream(encoder, rate=wanted.fps, options=filled)
        stream.height, stream.width, stream.pix_fmt = wanted.height, wanted.width, "yuv420p"
        stream.codec_context.thread_count = 2
        if encoder == "mpeg2video":
            stream.codec_context.qmin = stream.codec_context.qmax = 5
            stream.codec_context.bit_rate = 40_000_000
        for frame in frames(wanted):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _repeat(source: Path, path: Path, repeats: int) -> None:
    """Copies the packets several times, each time later by the length of the clip."""
    with av.open(str(path), "w", format="mp4") as output:
        for turn in range(repeats):
            with av.open(str(source)) as given:
                stream = given.streams.video[0]
                if turn == 0:
                    copied = output.add_stream_from_template(stream)
                assert stream.duration is not None
                for packet in given.demux(stream):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts += turn * stream.duration
                    packet.dts += turn * stream.duration
                    packet.stream = copied
                    output.mux(packet)


# --- pictures ---------------------------------------------------------------------------------------------------------


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
    """A canvas half as large again as the picture, what moves before it, and the way of the camera."""

    def __init__(self, random: np.random.Generator, height: int, width: int) -> None:
        self._height, self._width = height, width
        self._canvas = _leaves(random, height * 5 // 4 // 16 * 16, width * 5 // 4 // 16 * 16, 120)
        self._from, self._to = random.uniform(0, 1, (2, 3))  # place of the camera (down, across) and its zoom
        self._objects = [_Object(random, height, width) for _ in range(10)]

    def picture(self, t: float) -> tuple[U8, U8]:
        """Luma [H, W] and chroma [2, H/2, W/2] at t in [0, 1)."""
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
        for one in self._objects:
            one.paint(luma, chroma, t)
        return luma, chroma


class _Object:
    """A textured disc that crosses the picture on a curve of its own."""

    def __init__(self, random: np.random.Generator, height: int, width: int) -> None:
        radius = int(random.uniform(0.08, 0.2) * height) // 2 * 2 + 2
        self._radius = radius
        self._luma, self._chroma = _leaves(random, 2 * radius, 2 * radius, 12)
        reach = np.arange(-radius, radius) + 0.5
        self._mask = reach[:, None] ** 2 + reach**2 < radius**2
        self._turns, self._phase = random.uniform(0.7, 2.2, 2), random.uniform(0, 2 * math.pi, 2)

    def paint(self, luma: U8, chroma: U8, t: float) -> None:
        size = 2 * self._radius
        wave = 0.5 + 0.5 * np.sin(2 * math.pi * self._turns * t + self._phase)
        top, left = (int(wave[i] * (luma.shape[i] - size)) // 2 * 2 for i in range(2))
        np.copyto(luma[top : top + size, left : left + size], self._luma, where=self._mask)
        top, left, size = top // 2, left // 2, size // 2
        np.copyto(chroma[:, top : top + size, left : left + size], self._chroma, where=self._mask[::2, ::2])


def _leaves(random: np.random.Generator, height: int, width: int, count: int) -> tuple[U8, U8]:
    """`count` dead leaves: luma [H, W] and chroma [2, H/2, W/2]."""
    texture = _texture(random)
    repeated = np.tile(texture, (height // _TILE + 1, width // _TILE + 1))[:height, :width]
    luma = 120 + 4 * repeated
    chroma = np.full((2, height // 2, width // 2), 128, np.uint8)
    # Radii with density r^-3 between 0.02 and 0.35 of the height; the largest lie at the bottom, so that all are seen.
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
    # A lens has no edges of one pixel.
    for axis in (0, 1):
        luma = (np.roll(luma, 1, axis) + 2 * luma + np.roll(luma, -1, axis)) / 4
    return np.clip(luma, 20, 235 - _GRAIN).astype(np.uint8), chroma


def _texture(random: np.random.Generator) -> NDArray[np.float32]:
    """[512, 512] 1/f noise with mean 0 and deviation 1, which continues over its edges."""
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE))
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(random.standard_normal((_TILE, _TILE))) / frequency
    texture: NDArray[np.float32] = np.fft.irfft2(noise, (_TILE, _TILE)).astype(np.float32)
    return texture / texture.std()


def main() -> None:
    import argparse

    from benchmarks.cases import NAMES
    from benchmarks.run import clips_of

    parser = argparse.ArgumentParser(prog="python -m benchmarks.content", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="only what --quick measures")
    arguments = parser.parse_args()
    for wanted in clips_of(NAMES, quick=arguments.quick):
        print(clip(arguments.folder, wanted), flush=True)


if __name__ == "__main__":
    main()
