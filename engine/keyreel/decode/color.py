"""Converts decoded frames to upright RGB pictures: matrix, range, size, rotation, HDR to SDR.

One swscale conversion goes from the coded picture to RGB at the wanted size; its filters widen when scaling down, which
avoids aliasing. Rotation, crop and padding work on the small picture. Wide-gamut SDR is not converted.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from keyreel.config import DecodeLimits, ImageTransform
from keyreel.decode.tone import PLANAR, ToneMap
from keyreel.types import U8
from keyreel_kernels.surfaces import first_place, resized_size

# AVColorSpace (ITU-T H.273 MatrixCoefficients) to swscale's matrices.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_FILTERS = {
    "bicubic": Interpolation.BICUBIC,
    "bilinear": Interpolation.BILINEAR,
    "area": Interpolation.AREA,
}
_FULL_OF_LIMITED = np.clip((np.arange(256) - 16) * 255 / 219 + 0.5, 0, 255).astype(np.uint8)
Orientation: TypeAlias = tuple[bool, bool, bool]  # transpose, flip rows, flip columns


def transfer_of(frame: VideoFrame) -> str:
    """The transfer of a frame: "pq" (SMPTE ST 2084), "hlg" (ARIB STD-B67) or "sdr" (everything else)."""
    return {int(ColorTrc.SMPTE2084): "pq", int(ColorTrc.ARIB_STD_B67): "hlg"}.get(frame.color_trc, "sdr")


def matrix_of(colorspace: int, coded_height: int, transfer: str) -> Colorspace:
    """The YUV matrix: the stream's, else BT.2020 for HDR, BT.601 up to 576 lines, BT.709 above.

    Args:
        colorspace: the stream's MatrixCoefficients (ITU-T H.273); 2 is unspecified.
        coded_height: lines of the coded picture.
        transfer: of `transfer_of`.
    """
    if colorspace in _MATRICES:
        return _MATRICES[colorspace]
    if transfer != "sdr":
        return Colorspace.BT2020
    return Colorspace.ITU601 if coded_height <= 576 else Colorspace.ITU709


def rotation_degrees(frame: VideoFrame) -> int:
    """The clockwise rotation that brings the coded picture upright: 0, 90, 180 or 270.

    FFmpeg's angle counts counter-clockwise (av_display_rotation_get).
    """
    return round(-frame.rotation / 90) * 90 % 360


def orientation_of(frame: VideoFrame) -> Orientation:
    """(transpose, flip rows, flip columns), in this order, that bring the coded picture upright.

    The display matrix holds 16.16 numbers: a shown point is (a x + c y, b x + d y), libavutil/display.h. Anything
    between quarter turns goes to the nearest one.
    """
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # an unknown kind of side data makes PyAV fail for all of it; flips are then missed
        return {90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}.get(
            rotation_degrees(frame), (False, False, False)
        )
    if data is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def display_size(
    frame: VideoFrame, sample_aspect_ratio: Fraction | None, orientation: Orientation | None = None
) -> tuple[int, int]:
    """(height, width) of the upright picture with square pixels; keeps the number of coded lines.

    A sample aspect ratio beyond 1:16 or 16:1 is an error in the file and counts as 1.
    """
    ratio = sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 16) <= ratio <= 16:
        ratio = Fraction(1)
    height, width = frame.height, max(1, round(frame.width * ratio))
    transpose = orientation_of(frame)[0] if orientation is None else orientation[0]
    return (width, height) if transpose else (height, width)


class Converter:
    """Converts the frames of one stream to upright RGB pictures.

    Args:
        transform: size of the result; None for the display size.
        sample_aspect_ratio: the stream's; None for square pixels.
        max_pixels: largest picture to make, before the crop.
    """

    def __init__(
        self,
        transform: ImageTransform | None,
        sample_aspect_ratio: Fraction | None,
        max_pixels: int = DecodeLimits().max_pixels,
    ) -> None:
        self._transform, self._ratio, self._max_pixels = transform, sample_aspect_ratio, max_pixels
        self._reformatter = VideoReformatter()
        self._orientation: tuple[int, Orientation] | None = None
        self._tone_map: ToneMap | None = None
        self.tone_mapped: str | None = None  # the HDR transfer that it mapped to SDR, or None

    def __call__(self, frame: VideoFrame) -> U8:
        """[H, W, 3] uint8 RGB, upright.

        Raises:
            ValueError: the picture would exceed `max_pixels`, by a hostile aspect ratio.
        """
        orientation = self._orientation_of(frame)
        height, width = display_size(frame, self._ratio, orientation)
        if self._transform is not None:
            height, width = resized_size(
                height, width, self._transform.height, self._transform.width, self._transform.mode
            )
        if height * width > self._max_pixels:
            raise ValueError(f"{width} x {height} pixels, the limit is {self._max_pixels}")
        transpose, flip_rows, flip_columns = orientation
        transfer = transfer_of(frame)
        scaled = self._scale(frame, (width, height) if transpose else (height, width), transfer)
        picture: Any = self._mapped(scaled, frame, transfer) if transfer != "sdr" else scaled.to_ndarray()
        if frame.format.name.startswith(("gray", "ya")) and frame.color_range == ColorRange.MPEG:
            picture = _FULL_OF_LIMITED[picture]  # swscale always treats grey as full range
        if transpose:
            picture = picture.swapaxes(0, 1)
        picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(self._cropped_or_padded(picture))

    def _mapped(self, scaled: VideoFrame, frame: VideoFrame, transfer: str) -> U8:
        wide_gamut = frame.color_primaries != ColorPrimaries.BT709
        if self._tone_map is None or not self._tone_map.fits(scaled, transfer, wide_gamut):
            self._tone_map = ToneMap(scaled.height, scaled.width, transfer, wide_gamut)
        self.tone_mapped = transfer
        return self._tone_map(scaled)

    def _orientation_of(self, frame: VideoFrame) -> Orientation:
        """The orientation of a frame, cached by angle: `VideoFrame.side_data` puts the frame into a reference cycle.

        Such frames are freed only when the garbage collector runs: at 1080p hundreds of megabytes.
        """
        if self._orientation is None or self._orientation[0] != frame.rotation:
            self._orientation = frame.rotation, orientation_of(frame)
        return self._orientation[1]

    def _scale(self, frame: VideoFrame, size: tuple[int, int], transfer: str) -> VideoFrame:
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        wanted = self._transform.interpolation if self._transform else "bicubic"
        if transfer != "sdr" and size[0] == frame.height:
            # To 16-bit RGB at unscaled height, swscale's "area" and "bilinear" give wrong chroma (FFmpeg 8.0 and 8.1).
            wanted = "bicubic"
        algorithm = _FILTERS[wanted]
        return self._reformatter.reformat(
            frame,
            height=size[0],
            width=size[1],
            format="rgb24" if transfer == "sdr" else PLANAR,
            src_colorspace=matrix_of(frame.colorspace, frame.height, transfer),
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=algorithm | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            threads=1,
        )

    def _cropped_or_padded(self, picture: U8) -> U8:
        transform = self._transform
        if transform is None or transform.mode in ("fit", "squash"):
            return picture
        (height, width), size = picture.shape[:2], (transform.height, transform.width)
        top, left = (first_place(old, new) for old, new in zip((height, width), size, strict=True))
        if transform.mode == "shortest":
            return picture[top : top + size[0], left : left + size[1]]
        padded = np.full((*size, 3), transform.fill, np.uint8)
        padded[-top : height - top, -left : width - left] = picture
        return padded
