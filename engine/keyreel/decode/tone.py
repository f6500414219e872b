"""Maps HDR to SDR by the formulas of the standards, in a colour table that FFmpeg applies.

A table of 65^3 colours takes 0.15 s to make, and is five times as fast as the formulas at 1080p. It also has values
outside 0..1, so that clipping follows interpolation. The mean difference from the formulas is under 0.2 of 255; single
channels of very saturated, almost black colours differ by up to 60.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame

from keyreel.types import F32, F64, U8

REFERENCE_WHITE_NITS = 203.0  # ITU-R BT.2408: HDR reference white, mapped to the white of SDR
SOURCE_PEAK_NITS = 1000.0  # the usual peak of HDR masters; brighter light is clipped
PLANAR = "gbrp16le"  # the pixel format that FFmpeg maps fastest

_KNOTS = 65  # of the table, on each axis
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)  # ITU-R BT.2020, table 4
_RGB_2020_TO_709 = np.array(  # ITU-R BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


class ToneMap:
    """Maps pictures of one size.

    Args:
        height, width: of the pictures.
        transfer: "pq" or "hlg".
        wide_gamut: the primaries are those of BT.2020.
    """

    def __init__(self, height: int, width: int, transfer: str, wide_gamut: bool) -> None:
        self._kind = height, width, transfer, wide_gamut
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add("buffer", f"video_size={width}x{height}:pix_fmt={PLANAR}:time_base=1/1")
        with tempfile.NamedTemporaryFile("w", prefix="keyreel-", suffix=".cube") as file:
            file.write(_cube(transfer, wide_gamut))
            file.flush()
            table = self._graph.add("lut3d", file=file.name, interp="tetrahedral")
        self._graph.link_nodes(source, table, self._graph.add("buffersink")).configure()

    def fits(self, frame: VideoFrame, transfer: str, wide_gamut: bool) -> bool:
        """Whether it maps such pictures."""
        return self._kind == (frame.height, frame.width, transfer, wide_gamut)

    def __call__(self, frame: VideoFrame) -> U8:
        """Maps a full-range picture of format PLANAR to [H, W, 3] uint8 in BT.709."""
        self._graph.vpush(frame)
        mapped = self._graph.vpull()
        picture = np.empty((frame.height, frame.width, 3), np.uint8)
        planes: Any = mapped.planes
        for plane, channel in zip(planes, (1, 2, 0), strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
            picture[..., channel] = rows[:, 1 : 2 * frame.width : 2]  # the high byte, rounded by the table
        return picture


@lru_cache(maxsize=2)
def _cube(transfer: str, wide_gamut: bool) -> str:
    """The table in Adobe's Cube LUT format 1.0: red changes fastest."""
    axis = np.round(np.linspace(0, 65535, _KNOTS)).astype(np.uint16)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    code = tone_map(np.stack([red, green, blue], -1), transfer, wide_gamut=wide_gamut)
    values = (code * (255 * 256) + 128) / 65535  # so that the high byte of the 16 bits is the nearest of 8
    return f"LUT_3D_SIZE {_KNOTS}\n" + "%.6f %.6f %.6f\n" * (values.size // 3) % tuple(values.ravel().tolist())


def tone_map(rgb: Any, transfer: str, *, wide_gamut: bool = True) -> F32:
    """Maps [..., 3] uint16 full-range PQ or HLG code values to float32 BT.709 code values.

    The result is not clipped to 0..1; below 0 the gamma acts on the magnitude.

    Steps: display light by the transfer's EOTF (HLG on a display of 1000 nits); compression of its BT.2020 luminance by
    the EETF of ITU-R BT.2390 (5.4.1) from SOURCE_PEAK_NITS to REFERENCE_WHITE_NITS, with the same ratio for R, G and B
    to keep the hue; BT.2020 primaries to BT.709 (ITU-R BT.2087); gamma 1/2.4 (ITU-R BT.1886).

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
    return np.asarray(np.copysign(np.power(np.abs(light), np.float32(1 / 2.4)), light), np.float32)


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
