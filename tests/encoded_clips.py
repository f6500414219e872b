"""Short clips of seeded content, made with any encoder that FFmpeg has, whose settings are a value.

`encode(path, codec="libx264", frames=48, size=(96, 64), gop=12, options={"bf": "3"}, container="ts")` is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np
from numpy.typing import NDArray

from benchmarks.clips import same_priority

_NONE: Mapping[str, str] = MappingProxyType({})
_FORMATS = {
    "ts": "mpegts",
    "mkv": "matroska",
    "mpg": "mpeg",
    "vob": "vob",
    "264": "h264",
    "265": "hevc",
    "mpv": "mpeg2video",
    "wmv": "asf",
}
_CONTAINERS = {
    "libvpx": "webm",
    "libvpx-vp9": "webm",
    "mpeg1video": "mpg",
    "mpeg2video": "ts",
    "mpeg4": "avi",
    "ffv1": "mkv",
    "prores_ks": "mov",
    "dnxhd": "mov",
    "flv": "flv",
    "h263p": "mov",
    "h263": "mov",
    "msmpeg4": "avi",
    "wmv1": "avi",
    "wmv2": "avi",
    "mjpeg": "avi",
    "huffyuv": "avi",
    "png": "mov",
}
_PIXELS = {
    "mjpeg": "yuvj420p",
    "prores_ks": "yuv422p10le",
    "dnxhd": "yuv422p",
    "huffyuv": "yuv422p",
    "png": "rgb24",
}
# One thread and fixed work, so that the same clip comes out each time.
_DEFAULTS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "fast", "crf": "26"},
    "libx265": {"preset": "fast", "crf": "28", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libsvtav1": {"preset": "10", "crf": "40", "svtav1-params": "lp=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "200000"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "200000"},
    "dnxhd": {"profile": "dnxhr_lb"},
}
_JOINED = ("x264-params", "x265-params", "svtav1-params")  # settings are added to the defaults, not put in their place


def encode(
    path: Path,
    *,
    codec: str,
    frames: int = 48,
    size: tuple[int, int] = (96, 64),
    gop: int = 12,
    options: Mapping[str, str] = _NONE,
    container: str | None = None,
    vfr: bool = False,
    interlaced: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a clip; the same arguments give the same pictures.

    Args:
        path: of the file; the container's name becomes its suffix.
        codec: FFmpeg's name of the encoder.
        frames: how many, at 25 a second.
        size: (width, height).
        gop: at most that many frames from one key frame to the next.
        options: of the encoder, as FFmpeg names them.
        container: its usual suffix; by default one that fits the codec.
        vfr: frames are shown for 1 to 5 ticks of 1/25 s.
        interlaced: coded so, top field first.
        seed: of the content and of the times.

    Returns:
        The file.
    """
    container = container or _CONTAINERS.get(codec, "mp4")
    path = path.with_suffix(f".{container}")
    settings = {"g": str(gop), **_DEFAULTS.get(codec, {})}
    for name, value in options.items():
        settings[name] = f"{settings[name]}:{value}" if name in _JOINED and name in settings else value
    if interlaced:
        settings["flags"] = settings.get("flags", "") + "+ilme+ildct"
    ticks = np.cumsum(np.random.default_rng(seed).integers(1, 6, frames)) if vfr else np.arange(frames)
    # CI saw the muxer refuse a clip once, and take the same settings before that; 5,000 tries to see it again did not.
    # Of these encoders only SVT-AV1 has threads of its own, so that it alone may differ from run to run.
    for attempts_left in (2, 1, 0) if codec == "libsvtav1" else (0,):
        try:
            _write(path, codec, settings, ticks.tolist(), container, size, seed)
            break
        except av.error.FFmpegError:
            if not attempts_left:
                raise
    return path


def _write(
    path: Path,
    codec: str,
    settings: Mapping[str, str],
    ticks: Sequence[int],
    container: str,
    size: tuple[int, int],
    seed: int,
) -> None:
    with same_priority(), av.open(path, "w", format=_FORMATS.get(container, container)) as output:
        stream = output.add_stream(codec, rate=25, options=dict(settings))
        stream.width, stream.height = size
        stream.pix_fmt = _PIXELS.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 25)
        for tick, picture in zip(ticks, _pictures(len(ticks), size, seed), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _pictures(frames: int, size: tuple[int, int], seed: int) -> Iterator[NDArray[np.uint8]]:
    """[H, W, 3]: textures that pan, a patch that moves against them, noise, a cut each 31 frames."""
    width, height = size
    texture = _texture(size, seed)
    grain = np.random.default_rng(seed + 1).integers(-6, 7, (4, height, width, 1))
    for n in range(frames):
        scene, step = divmod(n, 31)
        picture = np.roll(texture[scene % len(texture)], (step, 2 * step), (0, 1)).astype(np.int64)
        top, left = (3 * n) % (height - 16), (5 * n) % (width - 16)
        picture[top : top + 16, left : left + 16] = 255 - picture[top : top + 16, left : left + 16]
        yield np.clip(picture + grain[n % 4], 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _texture(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """[4, H, W, 3], smooth."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (4, -(-height // 8), -(-width // 8), 3))
    fine = np.repeat(np.repeat(coarse, 8, 1), 8, 2)[:, :height, :width].astype(np.float64)
    for axis in (1, 2):
        fine = sum(np.roll(fine, shift, axis) for shift in range(-3, 4)) / 7
    return fine.astype(np.uint8)
