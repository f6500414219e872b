"""Decoded YUV surfaces, and the geometry of resizing, cropping and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Luma weights (Kr, Kb) of ITU-R BT.601-7, BT.709-6 and BT.2020-2 (non-constant luminance).
LUMA_WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


@dataclass(frozen=True, slots=True)
class Surface:
    """A decoded YUV picture, and how to show it.

    Raises:
        ValueError: planes that do not match, or an unknown depth or standard.
    """

    planes: tuple[Any, ...]  # NumPy or CuPy: y [H, W] and uv [ceil(H/2), ceil(W/2), 2], or y, u, v, each [H, W]
    bits: int  # 8 in uint8, or 8 to 16 in the high bits of uint16
    standard: str  # "bt601", "bt709" or "bt2020"
    full_range: bool
    display: tuple[int, int]  # (height, width) of the upright picture in square pixels
    orientation: tuple[bool, bool, bool] = (False, False, False)  # transpose, flip rows, flip columns, in this order

    def __post_init__(self) -> None:
        shapes = [tuple(int(n) for n in plane.shape) for plane in self.planes]
        kinds = {str(plane.dtype) for plane in self.planes}
        luma = shapes[0] if shapes else ()
        if len(luma) != 2 or not all(luma):
            raise ValueError(f"luma must be [H, W], H and W at least 1, got {shapes}")
        if shapes[1:] not in ([(-(-luma[0] // 2), -(-luma[1] // 2), 2)], [luma, luma]):
            raise ValueError(f"chroma must be [ceil(H/2), ceil(W/2), 2], or two of [H, W], got {shapes}")
        if len(kinds) > 1 or not kinds <= {"uint8", "uint16"} or not 8 <= self.bits <= (8 if "uint8" in kinds else 16):
            raise ValueError(f"samples are 8 bits in uint8 or 8 to 16 in uint16, got {self.bits} in {sorted(kinds)}")
        for plane, shape in zip(self.planes, shapes, strict=True):
            step = plane.dtype.itemsize
            for n, stride in zip(shape[:0:-1], plane.strides[:0:-1], strict=True):
                if n > 1 and stride != step:
                    raise ValueError(f"rows may lie apart, their samples may not: strides {plane.strides} of {shape}")
                step *= n
        if self.standard not in LUMA_WEIGHTS:
            raise ValueError(f"unknown standard {self.standard!r}, allowed: {', '.join(LUMA_WEIGHTS)}")
        if min(self.display) < 1:
            raise ValueError(f"the picture is shown at {self.display}, at least 1 x 1 is allowed")


def resized_size(height: int, width: int, tall: int, wide: int, mode: str) -> tuple[int, int]:
    """(height, width) to scale a picture of height x width to, before cropping or padding to tall x wide.

    shortest: covers the size, then the middle is cropped. longest: fits inside, then is padded. squash: exactly the
    size. fit: fits inside and is never enlarged or padded. `shortest` rounds as torchvision's Resize does (the long
    side down), `longest` as open_clip's ResizeMaxSize.

    Raises:
        ValueError: unknown mode.
    """
    if mode == "squash":
        return tall, wide
    if mode == "shortest":
        if wide * height >= tall * width:
            return max(tall, int(wide * height / width)), wide
        return tall, max(wide, int(tall * width / height))
    if mode not in ("longest", "fit"):
        raise ValueError(f"unknown resize mode {mode!r}, allowed: shortest, longest, squash, fit")
    scale = min(tall / height, wide / width)
    if mode == "fit":
        scale = min(1.0, scale)
    return max(1, min(tall, round(height * scale))), max(1, min(wide, round(width * scale)))


def first_place(old: int, new: int) -> int:
    """The start of the middle `new` pixels of a side of `old`; negative for padding."""
    return round((old - new) / 2) if old >= new else -((new - old) // 2)


def common_size(sizes: Sequence[tuple[int, int]], tall: int, wide: int, mode: str) -> tuple[int, int]:
    """(height, width) of a batch of pictures scaled to `sizes`: the model's size, or in mode "fit" their common one.

    Raises:
        ValueError: mode "fit" and several sizes.
    """
    if mode != "fit" or not sizes:
        return tall, wide
    if len(set(sizes)) > 1:
        raise ValueError(f'mode "fit" gives pictures of several sizes, {sorted(set(sizes))}; a batch has one')
    return sizes[0]
