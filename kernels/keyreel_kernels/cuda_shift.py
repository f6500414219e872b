"""The operations of shift.py on a CUDA device: launches of shift.cu.

Tokens and frames are CuPy arrays, and so are the results; `linked` may be on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keyreel_kernels import shift
from keyreel_kernels.cuda import Cuda

FILE = "shift.cu"
_WARPS = 4  # per block, as in shift.cu


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
    count, places = patches.shape[:2]
    source = cuda.cupy.empty((count, places), np.int64)
    if source.size:
        products, lengths = _products(cuda, patches, grid, steps, moves=1)
        sizes = map(np.int32, (count, places, grid[1], steps))
        args = (products, lengths, _shots(cuda, linked), *sizes, np.float32(threshold), source)
        shared = 4 * (_WARPS * places + steps)
        cuda.launch(FILE, "decide_sources", (count,), (32 * _WARPS,), args, shared=shared)
    return source


def patch_change(cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int) -> Any:
    """`shift.patch_change` on [T, P, C] float32 or float16; [T, P] float32 on the device.

    Displacements whose means differ by less than the rounding of float32 may be chosen otherwise.
    """
    count, places = patches.shape[:2]
    change = cuda.cupy.empty((count, places), np.float32)
    if change.size:
        products, lengths = _products(cuda, patches, grid, steps, moves=len(shift.OFFSETS))
        sizes = map(np.int32, (count, *grid, steps))
        args = (products, lengths, _shots(cuda, linked), *sizes, np.float32(shift.STILL_BONUS), change)
        cuda.launch(FILE, "mean_change", (count,), (32 * _WARPS,), args, shared=4 * 2 * steps)
    return change


def _products(cuda: Cuda, patches: Any, grid: tuple[int, int], steps: int, *, moves: int) -> tuple[Any, Any]:
    """The products [S, moves, T, P] and lengths [T, P] of shift.cu."""
    patches = _tokens(cuda, patches)
    count, places, columns = patches.shape
    size = patches.dtype.itemsize
    if patches.strides[1:] != (columns * size, size):  # a view without a prefix stays a view
        patches = cuda.cupy.ascontiguousarray(patches)
    stride = patches.strides[0]
    aligned = not (patches.data.ptr % 16 or stride % 16 or columns * size % 16)
    products = cuda.cupy.empty((steps, moves, count, places), np.float32)
    lengths = cuda.cupy.empty((count, places), np.float32)
    name = f"{'still' if moves == 1 else 'moved'}_products_{'half' if size == 2 else 'float'}"
    sizes = map(np.int32, (columns, aligned, count, *grid, steps))
    args = (patches, np.int64(stride // size), *sizes, products, lengths)
    cuda.launch(FILE, name, (-(-count * places // _WARPS),), (32 * _WARPS,), args)
    return products, lengths


def shift_tokens(cuda: Cuda, tokens: Any, source: Any, prefix: int) -> Any:
    """`shift.shift_tokens` on float32 or float16."""
    tokens = _tokens(cuda, tokens)
    out = tokens.copy()
    out[:, prefix:] = tokens[cuda.to_device(source), cuda.cupy.arange(prefix, tokens.shape[1])[None]]
    return out


def shift_pixels(cuda: Cuda, frames: Any, source: Any, grid: tuple[int, int]) -> Any:
    """`shift.shift_pixels`."""
    height, width = frames.shape[1:3]
    per_pixel = cuda.to_device(source)[:, cuda.to_device(shift.patch_of_pixels(height, width, grid))]
    return frames[per_pixel, cuda.cupy.arange(height)[None, :, None], cuda.cupy.arange(width)[None, None, :]]


def _tokens(cuda: Cuda, tokens: Any) -> Any:
    tokens = cuda.to_device(tokens)
    return tokens if tokens.dtype in (np.float16, np.float32) else tokens.astype(np.float32)


def _shots(cuda: Cuda, linked: Any) -> Any:
    """[T] int32: the number of the shot that each frame belongs to."""
    return cuda.cupy.cumsum(~cuda.to_device(linked), dtype=np.int32)
