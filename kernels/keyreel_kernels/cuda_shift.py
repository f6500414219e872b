"""The operations of shift.py on a CUDA device, with CuPy.

Tokens and frames are CuPy arrays, and so are the results; `linked` may be on the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keyreel_kernels import shift
from keyreel_kernels.cuda import Cuda


def fixed_shift(cuda: Cuda, count: int, grid: tuple[int, int], linked: Any, *, fraction: float, step: int) -> Any:
    """`shift.fixed_shift`: sources [T, P] int64 on the device."""
    return shift.fixed_sources(cuda.cupy, count, grid, cuda.to_device(linked), fraction, step)


def adaptive_shift(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int, threshold: float
) -> Any:
    """`shift.adaptive_shift` on [T, P, C] float32 or float16; sources [T, P] int64 on the device.

    Decisions that hang on less than the rounding of float32 may differ.
    """
    patches = cuda.to_device(patches).astype(np.float32, copy=False)
    return shift.adaptive_sources(cuda.cupy, patches, grid, cuda.to_device(linked), steps, threshold)


def patch_change(cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Any, *, steps: int) -> Any:
    """`shift.patch_change` on [T, P, C] float32 or float16; [T, P] float32 on the device.

    Displacements whose means differ by less than the rounding of float32 may be chosen otherwise.
    """
    patches = cuda.to_device(patches).astype(np.float32, copy=False)
    return shift.change_of_patches(cuda.cupy, patches, grid, cuda.to_device(linked), steps)


def shift_tokens(cuda: Cuda, tokens: Any, source: Any, prefix: int) -> Any:
    """`shift.shift_tokens` on float32 or float16."""
    tokens = cuda.to_device(tokens)
    out = tokens.copy()
    out[:, prefix:] = tokens[cuda.to_device(source), cuda.cupy.arange(prefix, tokens.shape[1])[None]]
    return out


def shift_pixels(cuda: Cuda, frames: Any, source: Any, grid: tuple[int, int]) -> Any:
    """`shift.shift_pixels`."""
    height, width = frames.shape[1:3]
    per_pixel = cuda.to_device(source)[:, cuda.to_device(shift.patch_of_pixels(height, width, grid))]
    return frames[per_pixel, cuda.cupy.arange(height)[None, :, None], cuda.cupy.arange(width)[None, None, :]]
