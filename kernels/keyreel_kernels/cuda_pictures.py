"""The operations of pictures.py on a CUDA device: launches of pictures.cu. Frames and planes are CuPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.cuda import Cuda
from keyreel_kernels.pictures import HISTOGRAM_BINS, Interpolation, resize_weights
from keyreel_kernels.shift import F32
from keyreel_kernels.surfaces import LUMA_WEIGHTS, Surface, common_size, first_place, resized_size

FILE = "pictures.cu"
TILE, SPAN, LINES, THREADS = 32, 64, 32, 256  # as in pictures.cu
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
    ],
    align=True,
)
_RGB_BYTES, _YUV_BYTES, _YUV_WORDS = range(3)


def frames_from_surfaces(
    cuda: Cuda,
    surfaces: Sequence[Surface],
    *,
    height: int,
    width: int,
    mode: str,
    interpolation: Interpolation,
    fill: int = 0,
) -> Any:
    """`pictures.frames_from_surfaces` in one launch. The planes must stay unchanged until the stream has read them."""
    sizes = [resized_size(*one.display, height, width, mode) for one in surfaces]
    height, width = common_size(sizes, height, width, mode)
    sources = np.zeros(len(surfaces), SOURCE)
    kept = [[cuda.to_device(plane) for plane in surface.planes] for surface in surfaces]
    for source, surface, planes, size in zip(sources, surfaces, kept, sizes, strict=True):
        _describe_planes(source, planes)
        source["matrix"] = _matrix(surface.bits, planes[0].dtype.itemsize, surface.standard, surface.full_range)
        transpose, *flips = surface.orientation
        # Where the first tile begins, counted from the end if the axis is flipped.
        starts = [
            new - out - first_place(new, out) if flip else first_place(new, out)
            for new, out, flip in zip(size, (height, width), flips, strict=True)
        ]
        source["rows"], source["columns"] = size[::-1] if transpose else size
        source["top"], source["left"] = starts[::-1] if transpose else starts
        source["turn"] = sum(bit << n for n, bit in enumerate(map(bool, surface.orientation)))
    return _pictures(cuda, sources, height, width, interpolation, fill)


def transform(
    cuda: Cuda, frames: Any, *, height: int, width: int, mode: str, interpolation: Interpolation, fill: int = 0
) -> Any:
    """`pictures.transform`."""
    old_height, old_width = frames.shape[1:3]
    new = resized_size(old_height, old_width, height, width, mode)
    height, width = common_size([new], height, width, mode)
    frames = cuda.xp.ascontiguousarray(frames)
    sources = np.zeros(len(frames), SOURCE)
    sources["planes"][:, 0] = frames.data.ptr + np.arange(len(frames)) * frames.strides[0]
    sources["pitches"][:, 0] = frames.strides[1]
    sources["kind"] = _RGB_BYTES
    sources["height"], sources["width"] = old_height, old_width
    sources["rows"], sources["columns"] = new
    sources["top"], sources["left"] = first_place(new[0], height), first_place(new[1], width)
    return _pictures(cuda, sources, height, width, interpolation, fill)


def frame_signals(cuda: Cuda, frames: Any) -> tuple[Any, Any, Any, Any]:
    """`pictures.frame_signals`."""
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
    """`pictures.histogram_distance`."""
    return (1 - cuda.xp.minimum(one, other).sum(1)).clip(0, 1)


def _pictures(
    cuda: Cuda, sources: NDArray[Any], height: int, width: int, interpolation: Interpolation, fill: int
) -> Any:
    """[N, height, width, 3] uint8; a block per tile of each picture."""
    out = cuda.xp.empty((len(sources), height, width, 3), np.uint8)
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
    arguments = (table, out, *(np.int32(n) for n in (tiles, height, width, fill)))
    cuda.launch(FILE, "pictures", (tiles * len(sources),), (THREADS,), arguments, shared=_SHARED_BYTES)
    return out


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
def _matrix(bits: int, itemsize: int, standard: str, full_range: bool) -> F32:
    """[3, 4]: red, green and blue in 0..255 of the stored samples and 1, as in `pictures.yuv_to_rgb`."""
    kr, kb = LUMA_WEIGHTS[standard]
    scale, pad = 2.0 ** (bits - 8), 2.0 ** (8 * itemsize - bits)
    span = (2.0**bits - 1, 2.0**bits - 1) if full_range else (219 * scale, 224 * scale)
    luma = np.array([1 / pad, 0, 0, 0 if full_range else -16 * scale]) / span[0]
    cb, cr = (np.array([0, n == 0, n == 1, 0]) / pad - [0, 0, 0, 128 * scale] for n in range(2))
    red = luma + 2 * (1 - kr) * cr / span[1]
    blue = luma + 2 * (1 - kb) * cb / span[1]
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.asarray(255 * np.stack([red, green, blue]), np.float32)


@lru_cache(maxsize=256)
def _taps(old: int, new: int, interpolation: Interpolation) -> tuple[NDArray[np.int32], int]:
    """The rows of `resize_weights` without their zeros: first tap [new], then weights [new, count]; and count.

    First taps never decrease, so that a tile's taps lie between the first of its first row and the last of its last.
    """
    weights = resize_weights(old, new, interpolation)
    used = weights != 0
    first = np.minimum.accumulate(used.argmax(1)[::-1])[::-1]
    count = int((old - used[:, ::-1].argmax(1) - first).max())
    first = np.minimum(first, old - count).astype(np.int32)
    taps = np.take_along_axis(weights, first[:, None] + np.arange(count), axis=1)
    return np.concatenate([first, taps.ravel().view(np.int32)]), count
