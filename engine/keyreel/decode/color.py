"""From a decoded frame to an upright RGB picture: matrix, range, size, rotation, HDR to SDR.

One swscale conversion goes from the coded picture straight to RGB at the wanted size (its filters widen when they
scale down, so nothing aliases); turning, cropping and padding are done on the small picture. Wide-gamut SDR is shown
as it is.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter

from keyreel.config import DecodeLimits, ImageTransform
from keyreel.types import F32, F64, U8
from keyreel_kernels.surfaces import first_place, resized_size

REFERENCE_WHITE_NITS = 203.0  # ITU-R BT.2408: HDR reference white, which becomes the white of SDR
SOURCE_PEAK_NITS = 1000.0  # what HDR is commonly mastered at; brighter light is clipped

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

_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)  # ITU-R BT.2020, table 4
_RGB_2020_TO_709 = np.array(  # ITU-R BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def transfer_of(frame: VideoFrame) -> str:
    """ "pq" (SMPTE ST 2084), "hlg" (ARIB STD-B67) or "sdr" (everything else)."""
    return {int(ColorTrc.SMPTE2084): "pq", int(ColorTrc.ARIB_STD_B67): "hlg"}.get(frame.color_trc, "sdr")


def matrix_of(colorspace: int, coded_height: int, transfer: str) -> Colorspace:
    """The YUV matrix: what the stream says, else BT.2020 for HDR, BT.601 up to 576 lines, BT.709 above.

    Args:
        colorspace: the stream's MatrixCoefficients (ITU-T H.273); 2 is unspecified.
        coded_height: lines of the coded picture.
        transfer: as `transfer_of` gives it.
    """
    if colorspace in _MATRICES:
        return _MATRICES[colorspace]
    if transfer != "sdr":
        return Colorspace.BT2020
    return Colorspace.ITU601 if coded_height <= 576 else Colorspace.ITU709


def rotation_degrees(frame: VideoFrame) -> int:
    """How far the coded picture is turned clockwise to be shown: 0, 90, 180 or 270.

    FFmpeg's angle counts counter-clockwise (av_display_rotation_get).
    """
    return round(-frame.rotation / 90) * 90 % 360


def orientation_of(frame: VideoFrame) -> Orientation:
    """(transpose, flip rows, flip columns), in this order, that bring the coded picture upright.

    The display matrix holds 16.16 numbers: a shown point is (a x + c y, b x + d y), libavutil/display.h. Anything
    between quarter turns goes to the nearest one.
    """
    try:
        data = {kind.type.name: kind for kind in _side_data(frame)}.get("DISPLAYMATRIX")
    except ValueError:  # a kind of side data that PyAV does not know hides all of it; flips go unnoticed then
        return {90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}.get(
            rotation_degrees(frame), (False, False, False)
        )
    if data is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _side_data(frame: VideoFrame) -> list[Any]:
    found: Any = frame.side_data
    return [found[i] for i in range(len(found))]


def display_size(
    frame: VideoFrame, sample_aspect_ratio: Fraction | None, orientation: Orientation | None = None
) -> tuple[int, int]:
    """(height, width) of the upright picture with square pixels; the lines of the coded picture are kept.

    A sample aspect ratio beyond 1:16 or 16:1 is a mistake in the file and is taken as 1.
    """
    ratio = sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 16) <= ratio <= 16:
        ratio = Fraction(1)
    height, width = frame.height, max(1, round(frame.width * ratio))
    transpose = orientation_of(frame)[0] if orientation is None else orientation[0]
    return (width, height) if transpose else (height, width)


class Converter:
    """Makes upright RGB pictures of the frames of one stream.

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
        self.tone_mapped: str | None = None  # the transfer that was mapped to SDR, once there was one

    def __call__(self, frame: VideoFrame) -> U8:
        """[H, W, 3] uint8 RGB, upright.

        Raises:
            ValueError: the picture would pass `max_pixels`, as a hostile aspect ratio makes it.
        """
        orientation = self._orientation_of(frame)
        height, width = display_size(frame, self._ratio, orientation)
        if self._transform is not None:
            height, width = resized_size(
                height, width, self._transform.height, self._transform.width, self._transform.mode
            )
        if height * width > self._max_pixels:
            raise ValueError(f"{width} x {height} pixels, allowed are {self._max_pixels}")
        transpose, flip_rows, flip_columns = orientation
        transfer = transfer_of(frame)
        scaled = self._scale(frame, (width, height) if transpose else (height, width), transfer)
        picture: Any = scaled.to_ndarray()
        if frame.format.name.startswith(("gray", "ya")) and frame.color_range == ColorRange.MPEG:
            picture = _FULL_OF_LIMITED[picture]  # swscale takes grey as full range, whatever it is told
        if transfer != "sdr":
            picture = tone_map(picture, transfer, wide_gamut=frame.color_primaries != ColorPrimaries.BT709)
            self.tone_mapped = transfer
        if transpose:
            picture = picture.swapaxes(0, 1)
        picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(self._cropped_or_padded(picture))

    def _orientation_of(self, frame: VideoFrame) -> Orientation:
        """Looked up once for each angle: `VideoFrame.side_data` ties the frame into a reference cycle.

        Frames in a cycle are freed only when the garbage collector runs, which at 1080p means hundreds of megabytes.
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
            format="rgb24" if transfer == "sdr" else "rgb48le",
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


def tone_map(rgb: Any, transfer: str, *, wide_gamut: bool = True) -> U8:
    """HDR to SDR: [H, W, 3] uint16 full-range PQ or HLG code values to [H, W, 3] uint8, BT.709 colours.

    Display light from the transfer's EOTF (HLG on a display of 1000 nits); its BT.2020 luminance compressed by the
    EETF of ITU-R BT.2390 (5.4.1) from SOURCE_PEAK_NITS to REFERENCE_WHITE_NITS, the ratio applied to R, G and B, so
    that hue stays; BT.2020 primaries to BT.709 (ITU-R BT.2087), clipped; gamma 1/2.4 (ITU-R BT.1886).

    Args:
        rgb: code values, 65535 is the nominal peak.
        transfer: "pq" or "hlg".
        wide_gamut: the primaries are those of BT.2020.
    """
    light = _light_of_code(transfer)[rgb]
    luminance = light @ _LUMA_2020
    if transfer == "hlg":
        # OOTF of ITU-R BT.2100: the display's gamma of 1.2 acts on luminance; 1000 nits is the nominal peak.
        gain = SOURCE_PEAK_NITS * np.power(np.maximum(luminance, 1e-6), np.float32(0.2))
        light *= gain[..., None]
        luminance *= gain
    knots, gains = _gain_of_luminance()
    light *= np.interp(luminance, knots, gains).astype(np.float32)[..., None]
    if wide_gamut:
        light = light @ _RGB_2020_TO_709.T
    code = np.power(np.clip(light, 0, 1), np.float32(1 / 2.4))
    return np.asarray(code * 255 + 0.5, np.uint8)


@lru_cache(maxsize=2)
def _light_of_code(transfer: str) -> F32:
    """[65536] light of each code value: nits for "pq", scene light in 0..1 for "hlg"."""
    code = np.arange(65536) / 65535
    return np.asarray(pq_to_nits(code) if transfer == "pq" else hlg_to_scene(code), np.float32)


@lru_cache(maxsize=1)
def _gain_of_luminance() -> tuple[F64, F64]:
    """Knots in nits, and the factor there from nits to SDR light, where 1 is white."""
    code = np.linspace(1e-3, 1, 2048)
    nits = pq_to_nits(code)
    shown = pq_to_nits(eetf(code, SOURCE_PEAK_NITS, REFERENCE_WHITE_NITS))
    return nits, shown / nits / REFERENCE_WHITE_NITS


def pq_to_nits(code: F64) -> F64:
    """SMPTE ST 2084 EOTF: code in 0..1 to nits in 0..10000."""
    root = np.power(code, 1 / 78.84375)
    ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return np.asarray(10000 * np.power(ratio, 1 / 0.1593017578125))


def nits_to_pq(nits: F64 | float) -> F64:
    """Inverse of `pq_to_nits`."""
    power = np.power(np.asarray(nits) / 10000, 0.1593017578125)
    return np.asarray(np.power((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power), 78.84375))


def hlg_to_scene(code: F64) -> F64:
    """Inverse OETF of ARIB STD-B67 (ITU-R BT.2100): code in 0..1 to scene light in 0..1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.asarray(np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12))


def eetf(code: F64, source_nits: float, target_nits: float) -> F64:
    """Electro-electrical transfer function of ITU-R BT.2390 (5.4.1), PQ code to PQ code, black at 0.

    Below the knee nothing changes; above it a Hermite spline ends at the target's peak.
    """
    peak = nits_to_pq(source_nits)
    top = nits_to_pq(target_nits) / peak
    knee = 1.5 * top - 0.5
    level = np.minimum(code / peak, 1)
    t = (level - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    return np.asarray(np.where(level < knee, level, spline) * peak)
