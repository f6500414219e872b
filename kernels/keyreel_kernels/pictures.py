"""Operations on pictures in NumPy, which define what pictures.cu computes: colour, geometry, signals.

Letters: N frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.shift import F32, U8
from keyreel_kernels.surfaces import LUMA_WEIGHTS, Surface, common_size, first_place, resized_size

U16: TypeAlias = NDArray[np.uint16]
Interpolation: TypeAlias = Literal["bicubic", "bilinear", "area"]

HISTOGRAM_BINS = 8  # per colour channel


def yuv_to_rgb(y: U8 | U16, uv: U8 | U16, *, bits: int, standard: str, full_range: bool) -> F32:
    """Converts NV12 (8 bits in u8) or P016 (`bits` in the high end of u16) to R'G'B', ITU-R BT.601/709/2020.

    Chroma is sited as in MPEG-2 (on the left column of each pair, between the two rows) and interpolated linearly.

    Args:
        y: [N, H, W]. uv: [N, ceil(H/2), ceil(W/2), 2], Cb then Cr; or [N, H, W, 2] for 4:4:4.
        standard: "bt601", "bt709" or "bt2020".

    Returns:
        [N, H, W, 3] float32 in 0..1, clipped.
    """
    kr, kb = LUMA_WEIGHTS[standard]
    scale = 2.0 ** (bits - 8)
    pad = 2.0 ** (16 - bits) if y.dtype == np.uint16 else 1.0
    low, span, chroma_span = (
        (0.0, 2.0**bits - 1, 2.0**bits - 1) if full_range else (16 * scale, 219 * scale, 224 * scale)
    )
    height, width = y.shape[1:3]
    luma = (y.astype(np.float32) / pad - low) / span
    chroma = (uv.astype(np.float32) / pad - 128 * scale) / chroma_span
    if uv.shape[1:3] != y.shape[1:3]:
        chroma = _linear(chroma, (np.arange(height) - 0.5) / 2, axis=1)
        chroma = _linear(chroma, np.arange(width) / 2, axis=2)
    cb, cr = chroma[..., 0], chroma[..., 1]
    red = luma + 2 * (1 - kr) * cr
    blue = luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    rgb: F32 = np.clip(np.stack([red, green, blue], axis=-1), 0, 1).astype(np.float32)
    return rgb


def _linear(values: F32, at: NDArray[np.float64], axis: int) -> F32:
    last = values.shape[axis] - 1
    at = np.clip(at, 0, last)
    low = np.floor(at).astype(np.int64)
    fraction = (at - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
    mixed: F32 = values.take(low, axis) * (1 - fraction) + values.take(np.minimum(low + 1, last), axis) * fraction
    return mixed


def resize_weights(old: int, new: int, interpolation: Interpolation) -> F32:
    """Makes the filter of a resize: [new, old] float32 rows that sum to 1, as wide as the reduction, against aliasing.

    Triangle for bilinear, Keys' cubic with a = -0.5 (Keys 1981) for bicubic, a box for area; samples are at pixel
    centres. The weights of Pillow's and torchvision's antialiased resize before rounding. Pillow also clips between the
    two passes, which shows where bicubic overshoots.
    """
    support, ratio = {"area": 0.5, "bilinear": 1.0, "bicubic": 2.0}[interpolation], old / new
    stretch = max(ratio, 1.0)
    centre = (np.arange(new) + 0.5) * ratio
    first = np.maximum((centre - support * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support * stretch + 0.5).astype(np.int64), old)
    at = np.arange(old)[None]
    off = (at + 0.5 - centre[:, None]) / stretch
    x = np.abs(off)
    if interpolation == "area":
        weights = ((off > -0.5) & (off <= 0.5)).astype(np.float64)
    elif interpolation == "bilinear":
        weights = np.maximum(0, 1 - x)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights = np.where((at >= first[:, None]) & (at < last[:, None]), weights, 0)
    normal: F32 = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return normal


def resize(frames: U8 | F32, height: int, width: int, interpolation: Interpolation) -> F32:
    """Resizes [N, H, W, 3] to [N, height, width, 3] float32, antialiased; not clipped, so bicubic overshoots."""
    rows = resize_weights(frames.shape[1], height, interpolation)
    columns = resize_weights(frames.shape[2], width, interpolation)
    half = np.einsum("xw,nhwc->nhxc", columns, frames.astype(np.float32), optimize=True)
    whole: F32 = np.einsum("yh,nhxc->nyxc", rows, half, optimize=True).astype(np.float32)
    return whole


def transform(frames: U8, *, height: int, width: int, mode: str, interpolation: Interpolation, fill: int = 0) -> U8:
    """Converts frames to the model's size, as open_clip's transform does.

    Args:
        frames: [N, H, W, 3] uint8 RGB. mode: as in `resized_size`. fill: value of the padding in mode "longest".

    Returns:
        [N, height, width, 3] uint8; in mode "fit" at most that size.

    Raises:
        ValueError: unknown mode.
    """
    old_height, old_width = frames.shape[1:3]
    new = resized_size(old_height, old_width, height, width, mode)
    height, width = common_size([new], height, width, mode)
    small = frames if new == (old_height, old_width) else _rounded(resize(frames, *new, interpolation))
    return _placed(small, height, width, fill)


def _rounded(frames: F32) -> U8:
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def _placed(frames: U8, height: int, width: int, fill: int) -> U8:
    """Crops larger pictures to their middle and pads smaller ones with `fill`."""
    if frames.shape[1:3] == (height, width):
        return frames
    out = np.full((len(frames), height, width, 3), fill, np.uint8)
    top, left = (first_place(old, new) for old, new in zip(frames.shape[1:3], (height, width), strict=True))
    part = frames[:, max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    out[:, max(-top, 0) :, max(-left, 0) :][:, : part.shape[1], : part.shape[2]] = part
    return out


def frames_from_surfaces(
    surfaces: Sequence[Surface],
    *,
    height: int,
    width: int,
    mode: str,
    interpolation: Interpolation,
    fill: int = 0,
) -> U8:
    """Converts decoded surfaces to upright pictures of the model's size: `yuv_to_rgb`, then `transform`.

    It resizes the coded picture directly, so that non-square pixels need no extra pass.

    Args:
        surfaces: of any sizes, depths and standards. height, width, mode, interpolation, fill: as in `transform`.

    Returns:
        [N, height, width, 3] uint8.

    Raises:
        ValueError: mode "fit" gives the pictures different sizes, or the mode is unknown.
    """
    sizes = [resized_size(*surface.display, height, width, mode) for surface in surfaces]
    height, width = common_size(sizes, height, width, mode)
    out = np.empty((len(surfaces), height, width, 3), np.uint8)
    for n, (surface, size) in enumerate(zip(surfaces, sizes, strict=True)):
        y, *chroma = surface.planes
        uv = chroma[0] if len(chroma) == 1 else np.stack(chroma, axis=-1)
        rgb = yuv_to_rgb(y[None], uv[None], bits=surface.bits, standard=surface.standard, full_range=surface.full_range)
        transpose, flip_rows, flip_columns = surface.orientation
        small = _rounded(resize(rgb * 255, *(size[::-1] if transpose else size), interpolation))
        upright = small.swapaxes(1, 2) if transpose else small
        upright = upright[:, :: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        out[n] = _placed(upright, height, width, fill)[0]
    return out


def frame_signals(frames: U8) -> tuple[F32, F32, F32, F32]:
    """Measures sharpness, brightness and colours of each frame.

    Args:
        frames: [N, H, W, 3] uint8 RGB, N >= 1.

    Returns:
        sharpness [N]: variance of the 4-neighbour Laplacian of the luma (Pech-Pacheco et al. 2000); luma mean [N] and
        standard deviation [N], luma (BT.709 weights on R'G'B') in 0..1; colour histogram [N, 8 * 8 * 8], sums to 1.
        All float32.
    """
    kr, kb = LUMA_WEIGHTS["bt709"]
    luma = frames.astype(np.float32) @ np.array([kr, 1 - kr - kb, kb], np.float32) / 255
    inner = luma[:, 1:-1, 1:-1]
    edges = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    sharpness = edges.var((1, 2)) if edges.size else np.zeros(len(frames), np.float32)
    # The bin's number is the top bits of the three channels side by side.
    coarse = (frames >> 5).astype(np.int64)
    bins = (coarse[..., 0] * HISTOGRAM_BINS + coarse[..., 1]) * HISTOGRAM_BINS + coarse[..., 2]
    histogram = np.stack([np.bincount(row.ravel(), minlength=HISTOGRAM_BINS**3) for row in bins])
    fractions = (histogram / max(bins[0].size, 1)).astype(np.float32)
    return sharpness, luma.mean((1, 2)), luma.std((1, 2)), fractions


def histogram_distance(one: F32, other: F32) -> F32:
    """The distance of two pictures' colours: 1 - intersection of their histograms (Swain & Ballard 1991).

    Args:
        one, other: [N, 8 * 8 * 8] float32, from `frame_signals`; one of them may be [1, 8 * 8 * 8].

    Returns:
        [N] float32 in 0..1.
    """
    distance: F32 = (1 - np.minimum(one, other).sum(1)).clip(0, 1).astype(np.float32)
    return distance
