"""Thousands of short clips made by a seeded script: two seconds, two shots, 160 x 90, all different.

    python -m benchmarks.tiny FOLDER COUNT

A shot is the way of a camera over one of 64 pictures as in `benchmarks.content`, on a path and with colours of its own.
The clips are so small that what a library adds to each video, and not decoding, is what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame

from benchmarks.content import U8, _leaves

VERSION = 1
HEIGHT, WIDTH, FPS, SECONDS = 90, 160, 5, 2
_PICTURES, _SHOTS = 64, 2
_FOLDER = 1000  # clips in one folder


def clips(folder: Path, count: int) -> list[Path]:
    """The first `count` clips; those that are not there are made. A clip is the same whatever `count` is."""
    paths = [folder / f"tiny-v{VERSION}" / f"{number // _FOLDER:03d}" / f"{number:06d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}")
            _encode(aside, number)
            aside.replace(path)
    return paths


def _encode(path: Path, number: int) -> None:
    with av.open(str(path), "w", format="mp4") as output:
        options = {"preset": "ultrafast", "crf": "28", "g": str(FPS)}
        stream: Any = output.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames(number):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def frames(number: int) -> Iterator[VideoFrame]:
    """The frames of a clip before they are encoded, yuv420p."""
    random = np.random.default_rng([VERSION, number])
    pictures = random.choice(_PICTURES, _SHOTS, replace=False)
    count = SECONDS * FPS
    for shot, picture in enumerate(pictures):
        luma, chroma = _picture(int(picture))
        begin, end = random.uniform(0, 1, (2, 2))
        tint = random.integers(-30, 31, (2, 1, 1))
        for step in range(count // _SHOTS):
            place = begin + (end - begin) * step / (count // _SHOTS)
            top, left = (
                int(at * (size - wanted)) // 2 * 2
                for at, size, wanted in zip(place, luma.shape, (HEIGHT, WIDTH), strict=True)
            )
            seen = luma[top : top + HEIGHT, left : left + WIDTH]
            colour = chroma[:, top // 2 : (top + HEIGHT) // 2, left // 2 : (left + WIDTH) // 2]
            colour = np.clip(colour.astype(np.int16) + tint, 16, 240).astype(np.uint8)
            planes = np.concatenate([seen.ravel(), colour.ravel()]).reshape(HEIGHT * 3 // 2, WIDTH)
            frame = VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = shot * (count // _SHOTS) + step
            yield frame


@cache
def _picture(number: int) -> tuple[U8, U8]:
    return _leaves(np.random.default_rng([VERSION, 1 << 20, number]), 3 * HEIGHT // 2 * 2, 3 * WIDTH, 60)


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    arguments = parser.parse_args()
    print(clips(arguments.folder, arguments.count)[-1].parent.parent)


if __name__ == "__main__":
    main()
