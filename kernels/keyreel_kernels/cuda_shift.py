"""The operations of shift.py on a CUDA device: launches of shift.cu.

Tokens and frames are CuPy arrays, and so are the results; `linked` may be on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keyreel_kernels import shift
from keyreel_kernels.cuda import Cuda, Defines

FILE = "shift.cu"
VARIANTS: dict[str, tuple[Defines, ...]] = {FILE: ((),)}
_WARPS = 4  # per block, as in shift.cu
# Shared memory of a block that walks along the frames: small enough for four blocks on a multiprocessor.
_RING_BYTES = 48 << 10
# Warps on a multiprocessor that keep the memory busy, each with one token on its way.
_BUSY_WARPS = 16


def fixed_shift(cuda: Cuda, count: int, grid: tuple[int, int], linked: Any, *, fraction: float, step: int) -> Any:
    """`shift.fixed_shift`: sources [T, P] int64 on the device."""
    xp, shot = cuda.cupy, _shots(cuda, linked)
    # The middle of three frames shows the pattern.
    pattern = shift.fixed_shift(3, grid, np.array([False, True, True]), fraction=fraction, step=1)[1] - 1
    frame = xp.arange(count)[:, None]
    wanted = frame + cuda.to_device(pattern * step)
    there = xp.clip(wanted, 0, max(count - 1, 0))
    return xp.where((there == wanted) & (shot[there] == shot[:, None]), there, frame)


def adaptive_shift(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int, threshold: float
) -> Any:
    """`shift.adaptive_shift` on [T, P, C] float32 or float16; sources [T, P] int64 on the device.

    Decisions that hang on less than the rounding of float32 may differ.
    """
    count, places, columns = patches.shape
    source = cuda.cupy.empty((count, places), np.int64)
    if not source.size:
        return source
    patches, stride, aligned = _patches(cuda, patches)
    size = patches.dtype.itemsize
    name = "patch_products_half" if size == 2 else "patch_products_float"
    width = ring_columns(columns, size, steps)
    span = frames_of_a_warp(count, places, steps, cuda.multiprocessors)
    shape = blocks(places, _WARPS), blocks(count, span)
    products = cuda.cupy.zeros((steps + 1, count, places), np.float32)
    for column in range(0, columns, width):
        part = min(width, columns - column)
        whole = aligned and part * size % 16 == 0
        numbers = map(np.int32, (columns, count, places, column, part, whole, steps, span))
        args = (patches, np.int64(stride), *numbers, products)
        shared = _WARPS * (steps + 2) * 16 * blocks(part * size, 16)
        cuda.launch(FILE, name, shape, (32 * _WARPS,), args, shared=shared)
    sizes = map(np.int32, (count, places, grid[1], steps))
    args = (products, _shots(cuda, linked), *sizes, np.float32(threshold), source)
    shared = 4 * (_WARPS * places + steps)
    cuda.launch(FILE, "decide_sources", (count,), (32 * _WARPS,), args, shared=shared)
    return source


def patch_change(cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int) -> Any:
    """`shift.patch_change` on [T, P, C] float32 or float16; [T, P] float32 on the device.

    Displacements whose means differ by less than the rounding of float32 may be chosen otherwise.
    """
    count, places, columns = patches.shape
    change = cuda.cupy.zeros((count, places), np.float32)
    steps = min(steps, count - 1)
    if not change.size or steps < 1:
        return change
    patches, stride, aligned = _patches(cuda, patches)
    products = cuda.cupy.empty((steps, len(shift.OFFSETS), count, places), np.float32)
    lengths = cuda.cupy.empty((count, places), np.float32)
    sizes = tuple(map(np.int32, (count, *grid, steps)))
    name = "moved_products_half" if patches.dtype.itemsize == 2 else "moved_products_float"
    args = (patches, np.int64(stride), np.int32(columns), np.int32(aligned), *sizes, products, lengths)
    cuda.launch(FILE, name, (blocks(count * places, _WARPS),), (32 * _WARPS,), args)
    args = (products, lengths, _shots(cuda, linked), *sizes, np.float32(shift.STILL_BONUS), change)
    cuda.launch(FILE, "mean_change", (count,), (32 * _WARPS,), args, shared=4 * 2 * steps)
    return change


def blocks(number: int, size: int) -> int:
    """How many blocks of a size it takes."""
    return -(-number // size)


def ring_columns(columns: int, size: int, steps: int) -> int:
    """Columns that one launch handles: steps + 2 rows of them for each warp fit into the block's shared memory."""
    most = _RING_BYTES // _WARPS // (steps + 2) // 16 * 16 // size
    parts = blocks(columns, most)
    return min(blocks(blocks(columns, parts) * size, 16) * 16 // size, most) if columns else 1


def frames_of_a_warp(count: int, places: int, steps: int, multiprocessors: int) -> int:
    """Frames that a warp walks along: short enough to fill the device, long against the `steps` it reads before."""
    wanted = blocks(multiprocessors * _BUSY_WARPS, places)
    return max(blocks(count, wanted), min(2 * steps, count))


def shift_tokens(cuda: Cuda, tokens: Any, source: Any, prefix: int) -> Any:
    """`shift.shift_tokens` on float32 or float16."""
    tokens = cuda.cupy.ascontiguousarray(_tokens(cuda, tokens))
    out = cuda.cupy.empty_like(tokens)
    if out.size:
        row_bytes = tokens.shape[2] * tokens.dtype.itemsize
        word = 16 if row_bytes % 16 == 0 and tokens.data.ptr % 16 == 0 else 2
        rows = tokens.shape[0] * tokens.shape[1]
        numbers = (row_bytes // word, prefix, tokens.shape[1] - prefix)
        args = (tokens, _sources(cuda, source), np.int64(rows), *map(np.int32, numbers), out)
        cuda.launch(FILE, f"gather_tokens_{word}", (blocks(rows, 8),), (256,), args)
    return out


def shift_pixels(cuda: Cuda, frames: Any, source: Any, grid: tuple[int, int]) -> Any:
    """`shift.shift_pixels`."""
    frames = cuda.cupy.ascontiguousarray(frames)
    out = cuda.cupy.empty_like(frames)
    if out.size:
        count, height, width = frames.shape[:3]
        word = 4 if width % 4 == 0 and frames.data.ptr % 4 == 0 else 1
        args = (frames, _sources(cuda, source), *map(np.int32, (height, width, *grid)), out)
        cuda.launch(FILE, f"gather_pixels_{word}", (count * height,), (128,), args)
    return out


def _patches(cuda: Cuda, patches: Any) -> tuple[Any, int, bool]:
    """[T, P, C] with the patches of a frame one after the other, numbers from frame to frame, rows aligned to 16 bytes?

    A view without a prefix stays a view.
    """
    patches = _tokens(cuda, patches)
    count, places, columns = patches.shape
    size = patches.dtype.itemsize
    if patches.strides[1:] != (columns * size, size):
        patches = cuda.cupy.ascontiguousarray(patches)
    stride, rest = divmod(patches.strides[0] if count > 1 else places * columns * size, size)
    return patches, stride, not (rest or patches.data.ptr % 16 or stride * size % 16 or columns * size % 16)


def _tokens(cuda: Cuda, tokens: Any) -> Any:
    tokens = cuda.to_device(tokens)
    return tokens if tokens.dtype in (np.float16, np.float32) else tokens.astype(np.float32)


def _sources(cuda: Cuda, source: Any) -> Any:
    return cuda.cupy.ascontiguousarray(cuda.to_device(source).astype(np.int64, copy=False))


def _shots(cuda: Cuda, linked: Any) -> Any:
    """[T] int32: the number of the shot that each frame belongs to."""
    return cuda.cupy.cumsum(~cuda.to_device(linked), dtype=np.int32)
