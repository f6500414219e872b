"""Each kernel of color.cu once, at small odd shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keyreel_kernels import cuda_frames
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.surfaces import Surface


def random_surface(
    draw: np.random.Generator,
    height: int,
    width: int,
    *,
    bits: int = 8,
    words: bool = False,
    full_chroma: bool = False,
    standard: str = "bt709",
    full_range: bool = False,
    display: tuple[int, int] | None = None,
    orientation: tuple[bool, bool, bool] = (False, False, False),
) -> Surface:
    """Noise on the host. words: uint16, which more than 8 bits are in anyway. display: else the coded size, turned."""
    kind = np.uint16 if words or bits > 8 else np.uint8
    half = -(-height // 2), -(-width // 2), 2
    shapes = [(height, width)] * 3 if full_chroma else [(height, width), half]
    low = 8 * np.dtype(kind).itemsize - bits
    planes = tuple((draw.integers(0, 1 << bits, shape) << low).astype(kind) for shape in shapes)
    shown = display or ((width, height) if orientation[0] else (height, width))
    return Surface(planes, bits, standard, full_range, shown, orientation)


def on_device(cuda: Cuda, surface: Surface, gap: int = 0) -> Surface:
    """The same on the device, each row followed by `gap` samples that belong to nobody."""
    planes: list[Any] = []
    for plane in surface.planes:
        rows = plane.reshape(len(plane), -1)
        padded = cuda.to_device(np.pad(rows, ((0, 0), (0, gap)), constant_values=255))
        part = padded[:, : rows.shape[1]] if gap else padded
        planes.append(part if plane.ndim == 2 else _pairs(part))
    return dataclasses.replace(surface, planes=tuple(planes))


def _pairs(plane: Any) -> Any:
    """[H, 2 W] with rows apart as [H, W, 2], which NumPy and CuPy give as a view."""
    return plane.reshape(plane.shape[0], plane.shape[1] // 2, 2)


def cases(cuda: Cuda) -> None:
    draw = np.random.default_rng(0)
    surfaces = [
        random_surface(draw, 33, 17, orientation=(True, False, True)),
        random_surface(draw, 7, 150, bits=10, full_range=True),
        random_surface(draw, 1, 1, full_chroma=True),
        random_surface(draw, 70, 3, bits=12, full_chroma=True, orientation=(False, True, False)),
    ]
    moments = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.25], np.float32)
    frames = cuda.to_device(draw.integers(0, 256, (3, 37, 45, 3), np.uint8))
    with cuda.scope():
        for normalised in (None, moments):
            cuda_frames.frames_from_surfaces(
                cuda,
                [on_device(cuda, surface, gap=n) for n, surface in enumerate(surfaces)],
                height=35,
                width=41,
                mode="longest",
                interpolation="bicubic",
                normalised=normalised,
            )
        cuda_frames.transform(cuda, frames, height=24, width=24, mode="shortest", interpolation="bilinear")
        cuda_frames.resize(cuda, frames.astype(np.float32), 50, 33, "area")
        y, uv = (cuda.to_device(plane[None]) for plane in surfaces[0].planes)
        cuda_frames.yuv_to_rgb(cuda, y, uv, bits=8, standard="bt601", full_range=False)
        cuda_frames.normalise(cuda, frames, *moments)
        *_, histogram = cuda_frames.frame_signals(cuda, frames)
        cuda_frames.histogram_distance(cuda, histogram, histogram[:1])
    cuda.synchronize()
