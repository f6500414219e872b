"""Clips with known flashes and beeps, and summaries with made-up vectors, for the tests of the outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import ArrayLike
from planted import embedding_of, unit

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.types import KeyFrame, Shot, Summary

BEEP_SECONDS = 0.1
TONE_HZ = 1000
FLASHES = [0.6, 1.6, 2.6, 3.6, 4.6, 5.6, 6.6, 7.6]
STEADY = [n / 25 for n in range(225)]
# Gaps of 13 to 77 ms, with frames at the flashes: what a phone writes.
_gaps = np.cumsum(np.random.default_rng(3).choice([0.013, 0.021, 0.040, 0.077], 260))
VARIABLE = sorted({round(t, 3) for t in [0.0, *_gaps, *FLASHES, *(f + BEEP_SECONDS for f in FLASHES)] if t < 9})


def in_reel(times: Iterable[float], spans: Iterable[Shot]) -> list[float]:
    """Where times of the source come to lie in the reel."""
    places, before = list[float](), 0.0
    for span in spans:
        places += [before + t - span.start_seconds for t in times if span.start_seconds <= t < span.stop_seconds]
        before += span.duration_seconds
    return places


def beeps(seconds: float, times: Iterable[float], rate: int) -> np.ndarray:
    """[2, N] float32: 1 kHz for 0.1 s at each of the times, silence between."""
    place = np.arange(round(seconds * rate)) / rate
    loud = np.zeros(place.shape, bool)
    for time in times:
        loud |= (place >= time) & (place < time + BEEP_SECONDS)
    return np.tile(np.where(loud, 0.8 * np.sin(2 * np.pi * TONE_HZ * place), 0), (2, 1)).astype(np.float32)


def write_clip(
    path: Path,
    frame_times: Sequence[float],
    flashes: Sequence[float] = (),
    *,
    size: tuple[int, int] = (96, 160),
    sound: str | None = "aac",
    rate: int = 44100,
    silent: tuple[float, float] | None = None,
    sound_starts: float = 0.0,
    colours: Sequence[ArrayLike] | None = None,
) -> Path:
    """Writes a clip that is white for 0.1 s at each flash, with a beep at the same times, else grey.

    `colours` are those of the frames instead, or whole pictures.

    Times are seconds, those of frames are rounded to milliseconds. No sound is written in [start, stop) of `silent`
    and before `sound_starts`. The path's suffix is the container, `sound` FFmpeg's name of the encoder.
    """
    length = frame_times[-1] + 0.04
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "12", "g": "50"})
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        video.codec_context.colorspace = video.codec_context.color_primaries = video.codec_context.color_trc = 1
        audio = out.add_stream(sound, rate=rate, layout="stereo") if sound else None
        for number, time in enumerate(frame_times):
            lit = any(flash <= time + 1e-6 < flash + BEEP_SECONDS for flash in flashes)
            colour = colours[number] if colours is not None else ((255,) * 3 if lit else (40 + number % 8,) * 3)
            picture = np.broadcast_to(np.array(colour, np.uint8), (*size, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if audio is not None:
            samples = beeps(length, flashes, rate)
            chunk = audio.codec_context.frame_size or 1024
            for first in range(0, samples.shape[1] - chunk + 1, chunk):
                if first / rate < sound_starts or (silent and silent[0] <= first / rate < silent[1]):
                    continue
                block = np.ascontiguousarray(samples[:, first : first + chunk])
                sample_format = audio.codec_context.format.name
                if sample_format == "s16":
                    block = (block.T.reshape(1, -1) * 32767).round().astype(np.int16)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout="stereo")
                frame.rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


def onsets(path: Path) -> tuple[list[float], list[float]]:
    """(flash times, beep times) of a clip in seconds, by the time of each frame. Beeps are half a second apart."""
    flashes, dark = [], True
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            bright = frame.to_ndarray(format="gray").mean() > 150
            if bright and dark:
                flashes.append(frame.time)
            dark = not bright
    beeps = [-1.0]
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.15)
            times = float(frame.time) + loud / frame.sample_rate
            beeps += [t for t in times[:1].tolist() if t > beeps[-1] + 0.5]
    return flashes, beeps[1:]


def decode_sound(path: Path) -> tuple[np.ndarray, float]:
    """([2, N] float32 at the file's rate, time of the first sample)."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), frames[0].time


def atoms(path: Path) -> list[str]:
    """Names of the top-level boxes of an MP4, in order (ISO/IEC 14496-12, 4.2)."""
    data, place, names = path.read_bytes(), 0, []
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        names.append(data[place + 4 : place + 8].decode("latin-1"))
        place += size if size >= 8 else len(data)
    return names


def make_summary(
    source: Source,
    *,
    keyframes: int = 4,
    fps: float = 4.0,
    shots: Sequence[float] = (),
    warnings: tuple[str, ...] = (),
) -> Summary:
    """A summary of a real clip with made-up vectors, evenly spread key-frames, cuts at `shots`.

    Each attention map has one bump that walks from corner to corner.
    """
    with FrameStream(source, Sampling("fps", fps=fps), transform=ImageTransform(8, 8, "squash")) as stream:
        batches = list(stream)
    pts = np.concatenate([batch.pts_seconds for batch in batches])
    count = len(pts)
    y, x = np.mgrid[0:7, 0:7]
    along = 6 * np.linspace(0, 1, count)[:, None, None]
    bump = np.exp(-((y - along) ** 2 + (x - along) ** 2) / 4) + 0.02
    embedding = dataclasses.replace(
        embedding_of(unit(np.random.default_rng(0).normal(size=(count, 8)))),
        pts_seconds=pts,
        frame_index=np.concatenate([batch.frame_index for batch in batches]),
        attention=(bump / bump.sum(axis=(1, 2), keepdims=True)).reshape(count, -1).astype(np.float32),
        grid=(7, 7),
    )
    rows = np.unique(np.linspace(0, count - 1, keyframes + 2)[1:-1].round().astype(int))
    weights = np.arange(1, len(rows) + 1) / sum(range(1, len(rows) + 1))
    info = source.probe()
    duration = info.duration_seconds or float(pts[-1])
    return Summary(
        video=info,
        embedding=embedding,
        keyframes=tuple(
            KeyFrame(float(pts[row]), int(embedding.frame_index[row]), number, float(weight), 0.9, 0.75, int(row))
            for number, (row, weight) in enumerate(zip(rows, weights, strict=True))
        ),
        shots=tuple(Shot(a, b) for a, b in itertools.pairwise([0.0, *shots, duration])),
        scenes=(Shot(0.0, shots[0] if shots else duration), *([Shot(shots[0], duration)] if shots else [])),
        importance=(0.5 + 0.5 * np.sin(np.arange(count) / 3)).astype(np.float32),
        device="cpu",
        device_reason="asked for",
        config={
            "image": {"height": 224, "width": 224, "mode": "shortest"},
            "select": {"similarity_limit": 0.97},
            "fps": fps,
            "span": (1, 2),
        },
        warnings=warnings,
        timings_seconds={"decode": 0.5, "encode": 1.0, "fuse": 0.1, "select": 0.05, "total": 1.7},
        actions=None,  # what only an Engine can do is not used here
    )
