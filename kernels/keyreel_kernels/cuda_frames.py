"""The operations of pictures.py on a CUDA device; the kernels are in color.cu.

Frames and planes are CuPy arrays, results too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.cuda import Cuda, Defines
from keyreel_kernels.pictures import HISTOGRAM_BINS, Interpolation, resize_weights
from keyreel_kernels.reference import F32
from keyreel_kernels.surfaces import LUMA_WEIGHTS, Surface, common_size, first_place, resized_size

FILE = "color.cu"
VARIANTS: dict[str, tuple[Defines, ...]] = {FILE: ((),)}
TILE, SPAN, LINES, THREADS = 32, 64, 32, 256  # as in color.cu
_SHARED_BYTES = 3 * (SPAN + TILE) * (LINES + 1) * 4
# The kernel's struct Source.
SOURCE = np.dtype(
    [
        ("planes", np.int64, 3),
        ("pitches", np.int32, 3),
        *((name, np.int32) for name in ("kind", "height", "width", "chroma_step", "chroma_half")),
        *((name, np.int32) for name in ("rows", "columns", "top", "left", "turn")),
        *((name, np.int32) for name in ("row_taps", "row_count", "column_taps", "column_count")),
        ("matrix", np.float32, (3, 4)),
        ("peak", np.float32),
    ],
    align=True,
)
_RGB_BYTES, _RGB_FLOATS, _YUV_BYTES, _YUV_WORDS = range(4)
_BYTES, _FLOATS, _NORMALISED_HALVES = range(3)


def frames_from_surfaces(
    cuda: Cuda,
    surfaces: Sequence[Surface],
    *,
    height: int,
    width: int,
    mode: str,
    interpolation: Interpolation,
    fill: int = 0,
    normalised: tuple[F32, F32] | None = None,
) -> Any:
    """As `pictures.frames_from_surfaces`, all of them in one launch.

    The planes are read on the device's stream; they must stay as they are until it has come to that.
    """
    sizes = [resized_size(*one.display, height, width, mode) for one in surfaces]
    height, width = common_size(sizes, height, width, mode)
    sources = np.zeros(len(surfaces), SOURCE)
    kept = [[cuda.to_device(plane) for plane in surface.planes] for surface in surfaces]
    for source, surface, planes, size in zip(sources, surfaces, kept, sizes, strict=True):
        _describe_planes(source, planes)
        source["matrix"] = _matrix(surface.bits, planes[0].dtype.itemsize, surface.standard, surface.full_range, 255)
        source["peak"] = 255
        transpose, *flips = surface.orientation
        # Where the first tile begins, counted from the end where the axis is flipped.
        starts = [
            new - out - first_place(new, out) if flip else first_place(new, out)
            for new, out, flip in zip(size, (height, width), flips, strict=True)
        ]
        source["rows"], source["columns"] = size[::-1] if transpose else size
        source["top"], source["left"] = starts[::-1] if transpose else starts
        source["turn"] = sum(bit << n for n, bit in enumerate(map(bool, surface.orientation)))
    output = _BYTES if normalised is None else _NORMALISED_HALVES
    return _pictures(cuda, sources, height, width, interpolation, output, fill, normalised)


def transform(
    cuda: Cuda, frames: Any, *, height: int, width: int, mode: str, interpolation: Interpolation, fill: int = 0
) -> Any:
    """As `pictures.transform`."""
    old_height, old_width = frames.shape[1:3]
    new = resized_size(old_height, old_width, height, width, mode)
    height, width = common_size([new], height, width, mode)
    frames = cuda.xp.ascontiguousarray(frames)
    sources = _rgb(frames, *new)
    sources["top"], sources["left"] = first_place(new[0], height), first_place(new[1], width)
    return _pictures(cuda, sources, height, width, interpolation, _BYTES, fill)


def resize(cuda: Cuda, frames: Any, height: int, width: int, interpolation: Interpolation) -> Any:
    """As `pictures.resize`."""
    frames = cuda.xp.ascontiguousarray(frames, None if frames.dtype == np.uint8 else np.float32)
    return _pictures(cuda, _rgb(frames, height, width), height, width, interpolation, _FLOATS)


def yuv_to_rgb(cuda: Cuda, y: Any, uv: Any, *, bits: int, standard: str, full_range: bool) -> Any:
    """As `pictures.yuv_to_rgb`."""
    sources = np.zeros(len(y), SOURCE)
    for n, source in enumerate(sources):
        _describe_planes(source, [y[n], uv[n]])
    sources["matrix"] = _matrix(bits, y.dtype.itemsize, standard, full_range, 1)
    sources["peak"] = 1
    height, width = sources["rows"], sources["columns"] = y.shape[1:]
    return _pictures(cuda, sources, height, width, "area", _FLOATS)


def normalise(cuda: Cuda, frames: Any, mean: F32, std: F32) -> Any:
    """As `pictures.normalise`."""
    count, height, width, _ = frames.shape
    out = cuda.xp.empty((count, 3, height, width), np.float32)
    if out.size:
        pixels = count * height * width
        numbers = (np.int64(pixels), np.int64(height * width), *_scale_and_shift(mean, std))
        blocks = min(-(-pixels // THREADS), 16 * cuda.multiprocessors)
        cuda.launch(FILE, "normalised", (blocks,), (THREADS,), (cuda.xp.ascontiguousarray(frames), out, *numbers))
    return out


def frame_signals(cuda: Cuda, frames: Any) -> tuple[Any, Any, Any, Any]:
    """As `pictures.frame_signals`, which has the shapes."""
    count, height, width, _ = frames.shape
    luma = cuda.xp.empty((count, height, width), np.float32)
    signals = cuda.xp.empty((3, count), np.float32)
    histogram = cuda.xp.empty((count, HISTOGRAM_BINS**3), np.float32)
    if luma.size:
        arrays = (cuda.xp.ascontiguousarray(frames), luma, signals, histogram)
        shared = HISTOGRAM_BINS**3 * 4 + 32 * 4
        cuda.launch(
            FILE, "frame_signals", (count,), (1024,), (*arrays, np.int32(height), np.int32(width)), shared=shared
        )
    return signals[0], signals[1], signals[2], histogram


def histogram_distance(cuda: Cuda, one: Any, other: Any) -> Any:
    """As `pictures.histogram_distance`."""
    count, bins = max(len(one), len(other)) if len(one) and len(other) else 0, one.shape[1]
    out = cuda.xp.empty(count, np.float32)
    if count:
        pair = [cuda.xp.ascontiguousarray(side) for side in (one, other)]
        steps = [np.int32(bins if len(side) > 1 else 0) for side in pair]
        grid = (-(-count // (THREADS // 32)),)
        numbers = (np.int32(count), np.int32(bins), *steps)
        cuda.launch(FILE, "histogram_distances", grid, (THREADS,), (*pair, out, *numbers))
    return out


def _pictures(
    cuda: Cuda,
    sources: NDArray[Any],
    height: int,
    width: int,
    interpolation: Interpolation,
    output: int,
    fill: int = 0,
    normalised: tuple[F32, F32] | None = None,
) -> Any:
    """[N, height, width, 3], or [N, 3, height, width] if normalised; one block for each tile of each picture."""
    shape = (3, height, width) if output == _NORMALISED_HALVES else (height, width, 3)
    out = cuda.xp.empty((len(sources), *shape), (np.uint8, np.float32, np.float16)[output])
    if not out.size:
        return out
    words, end, places = [], sources.nbytes // 4, dict[tuple[int, int], tuple[int, int]]()
    for old, new, name in (("height", "rows", "row"), ("width", "columns", "column")):
        for source in sources:
            size = int(source[old]), int(source[new])
            if size not in places:
                taps, count = _taps(*size, interpolation)
                places[size] = end, count
                words.append(taps)
                end += len(taps)
            source[f"{name}_taps"], source[f"{name}_count"] = places[size]
    table = cuda.xp.asarray(np.concatenate([sources.view(np.int32), *words]))
    tiles = -(-height // TILE) * -(-width // TILE)
    numbers = [np.int32(n) for n in (tiles, height, width, fill, output)]
    arguments = (table, out, *numbers, *_scale_and_shift(*(normalised or (np.zeros(3), np.ones(3)))))
    cuda.launch(FILE, "pictures", (tiles * len(sources),), (THREADS,), arguments, shared=_SHARED_BYTES)
    return out


def _rgb(frames: Any, rows: int, columns: int) -> NDArray[Any]:
    """Sources of contiguous frames [N, H, W, 3], uint8 or float32."""
    sources = np.zeros(len(frames), SOURCE)
    sources["planes"][:, 0] = frames.data.ptr + np.arange(len(frames)) * frames.strides[0]
    sources["pitches"][:, 0] = frames.strides[1]
    sources["kind"] = _RGB_BYTES if frames.dtype == np.uint8 else _RGB_FLOATS
    sources["height"], sources["width"] = frames.shape[1:3]
    sources["rows"], sources["columns"] = rows, columns
    return sources


def _describe_planes(source: Any, planes: Sequence[Any]) -> None:
    y, *chroma = planes
    (height, width), step = y.shape, y.dtype.itemsize
    source["kind"] = _YUV_BYTES if step == 1 else _YUV_WORDS
    source["height"], source["width"] = height, width
    if len(chroma) == 1:
        (uv,) = chroma
        source["planes"] = y.data.ptr, uv.data.ptr, uv.data.ptr + step
        source["pitches"] = y.strides[0], uv.strides[0], uv.strides[0]
        source["chroma_step"], source["chroma_half"] = 2, uv.shape[:2] != y.shape
    else:
        source["planes"] = [plane.data.ptr for plane in planes]
        source["pitches"] = [plane.strides[0] for plane in planes]
        source["chroma_step"] = 1


@lru_cache(maxsize=64)
def _matrix(bits: int, itemsize: int, standard: str, full_range: bool, peak: int) -> F32:
    """[3, 4]: red, green and blue in 0..peak of the samples as they are stored and 1, as in `pictures.yuv_to_rgb`."""
    kr, kb = LUMA_WEIGHTS[standard]
    scale, pad = 2.0 ** (bits - 8), 2.0 ** (8 * itemsize - bits)
    span = (2.0**bits - 1, 2.0**bits - 1) if full_range else (219 * scale, 224 * scale)
    luma = np.array([1 / pad, 0, 0, 0 if full_range else -16 * scale]) / span[0]
    cb, cr = (np.array([0, n == 0, n == 1, 0]) / pad - [0, 0, 0, 128 * scale] for n in range(2))
    red = luma + 2 * (1 - kr) * cr / span[1]
    blue = luma + 2 * (1 - kb) * cb / span[1]
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.asarray(peak * np.stack([red, green, blue]), np.float32)


@lru_cache(maxsize=256)
def _taps(old: int, new: int, interpolation: Interpolation) -> tuple[NDArray[np.int32], int]:
    """The rows of `resize_weights` without their zeros: first tap [new], then weights [new, count]; and count.

    First taps do not fall, so that the taps of neighbours lie between the first of the one and the last of the other.
    """
    weights = resize_weights(old, new, interpolation)
    used = weights != 0
    first = np.minimum.accumulate(used.argmax(1)[::-1])[::-1]
    count = int((old - used[:, ::-1].argmax(1) - first).max())
    first = np.minimum(first, old - count).astype(np.int32)
    taps = np.take_along_axis(weights, first[:, None] + np.arange(count), axis=1)
    return np.concatenate([first, taps.ravel().view(np.int32)]), count


def _scale_and_shift(mean: Any, std: Any) -> list[np.float32]:
    """Six numbers: x scale + shift is (x / 255 - mean) / std."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return [np.float32(n) for n in (*(1 / (255 * std)), *(-mean / std))]
