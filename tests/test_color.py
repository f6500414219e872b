"""Pixels: each matrix, range, depth and chroma format against the standards' formulas in float64; geometry; HDR."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from keyreel.config import ImageTransform
from keyreel.decode.color import Converter, display_size
from keyreel.decode.tone import PLANAR, ToneMap, tone_map
from keyreel_kernels.surfaces import resized_size

Media = Callable[[str], Path]

# (Kr, Kb) of ITU-R BT.709, BT.601, SMPTE 240M, BT.2020 by MatrixCoefficients of ITU-T H.273.
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
LIMITED, FULL = 1, 2


def rgb_of_yuv(planes: list[NDArray[np.float64]], matrix: int, *, full: bool, bits: int) -> NDArray[np.float64]:
    """The inverse of ITU-R BT.709's items 3.2 to 3.4 in float64, in 0..255, not rounded."""
    kr, kb = WEIGHTS[matrix]
    unit = 2 ** (bits - 8)
    luma_span, chroma_span, black = (2**bits - 1, 2**bits - 1, 0) if full else (219 * unit, 224 * unit, 16 * unit)
    y = (planes[0] - black) / luma_span
    cb, cr = ((plane - 128 * unit) / chroma_span for plane in planes[1:])
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1) * 255, 0, 255)


def even_frame(values: tuple[int, ...], pixel_format: str, bits: int, size: tuple[int, int] = (32, 48)) -> VideoFrame:
    """A frame of one colour."""
    frame = VideoFrame(size[1], size[0], pixel_format)
    for plane, value in zip(frame.planes, values, strict=True):
        count = plane.buffer_size // (1 if bits == 8 else 2)
        plane.update(np.full(count, value, np.uint8 if bits == 8 else np.uint16).tobytes())
    return frame


@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("sampling", ["420", "422", "444"])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_colours_equal_the_formula(matrix: int, color_range: int, sampling: str, bits: int) -> None:
    draw = np.random.default_rng(matrix * 1000 + bits * 10 + color_range)
    low, high = (16 << (bits - 8), 235 << (bits - 8)) if color_range == LIMITED else (0, (1 << bits) - 1)
    for _ in range(12):
        values = tuple(int(v) for v in draw.integers(low, high + 1, 3))
        frame = even_frame(values, f"yuv{sampling}p" + ("" if bits == 8 else f"{bits}le"), bits)
        frame.colorspace, frame.color_range = matrix, color_range
        expected = rgb_of_yuv([np.float64(v) for v in values], matrix, full=color_range == FULL, bits=bits)
        # swscale takes full-range codes of more than 8 bits as value / 2^(bits - 8), 255.75 for 1023.
        bound = 1.5 if color_range == FULL and bits > 8 else 0.52
        assert np.abs(Converter(None, None)(frame) - expected).max() <= bound


@pytest.mark.parametrize(("height", "matrix"), [(240, 6), (576, 6), (578, 1), (1080, 1)])
def test_unspecified_matrix_goes_by_height(height: int, matrix: int) -> None:
    frame = even_frame((120, 60, 200), "yuv420p", 8, (height, 64))
    expected = rgb_of_yuv([np.float64(v) for v in (120, 60, 200)], matrix, full=False, bits=8)
    assert np.abs(Converter(None, None)(frame) - expected).max() <= 0.52


def test_yuvj_is_full_range_whatever_the_tag() -> None:
    frame = even_frame((255, 128, 128), "yuvj420p", 8)
    assert Converter(None, None)(frame).min() == 255


def test_grey_alpha_palette_and_rgb() -> None:
    draw = np.random.default_rng(0)
    rgb = draw.integers(0, 256, (32, 48, 3), np.uint8)
    convert = Converter(None, None)
    np.testing.assert_array_equal(convert(VideoFrame.from_ndarray(rgb, "rgb24")), rgb)
    rgba = np.concatenate([rgb, draw.integers(0, 256, (32, 48, 1), np.uint8)], -1)
    np.testing.assert_array_equal(convert(VideoFrame.from_ndarray(rgba, "rgba")), rgb)
    np.testing.assert_array_equal(convert(VideoFrame.from_ndarray(rgb.transpose(0, 1, 2), "gbrp")), rgb)
    for color_range, level in ((LIMITED, (126 - 16) / 219 * 255.0), (FULL, 126.0), (0, 126.0)):
        grey = even_frame((126,), "gray", 8)
        grey.color_range = color_range
        assert np.abs(convert(grey) - level).max() <= 0.52
    argb = np.stack([np.full(256, 255), np.arange(256), 255 - np.arange(256), np.arange(256) // 2], -1).astype(np.uint8)
    index = draw.integers(0, 256, (32, 48), np.uint8)
    palette = VideoFrame.from_ndarray((index, argb), "pal8")  # type: ignore[arg-type]
    np.testing.assert_array_equal(convert(palette), argb[index][..., 1:])


def bilinear_chroma(plane: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Chroma at the luma's places, taps sited left in each pair of columns and midway between two lines."""
    rows = np.arange(height) if plane.shape[0] == height else (np.arange(height) - 0.5) / 2
    columns = np.arange(width) if plane.shape[1] == width else np.arange(width) / 2
    for axis, at in ((0, rows), (1, columns)):
        low = np.clip(np.floor(at).astype(int), 0, plane.shape[axis] - 1)
        high = np.clip(low + 1, 0, plane.shape[axis] - 1)
        share = np.clip(at - low, 0, 1).reshape((-1, 1) if axis == 0 else (1, -1))
        plane = np.take(plane, low, axis) * (1 - share) + np.take(plane, high, axis) * share
    return plane


def planes_of(frame: VideoFrame, bits: int) -> list[NDArray[np.float64]]:
    out = []
    for plane in frame.planes:
        values = np.frombuffer(plane, np.uint8 if bits == 8 else "<u2").reshape(plane.height, -1)
        out.append(bilinear_chroma(values[:, : plane.width].astype(np.float64), frame.height, frame.width))
    return out


# --- geometry


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    size=st.integers(1, 512),
    mode=st.sampled_from(["s", "l", "f"]),
)
def test_sizes_as_torchvision_and_open_clip(height: int, width: int, size: int, mode: str) -> None:
    transform = {"s": "shortest", "l": "longest", "f": "fit"}[mode]
    got = resized_size(height, width, size, size, transform)
    if mode == "s":  # torchvision.transforms.Resize(size)
        long = int(size * max(height, width) / min(height, width))
        assert got == ((size, long) if height <= width else (long, size))
    elif mode == "l":  # open_clip.transform.ResizeMaxSize
        scale = size / float(max(height, width))
        assert got == tuple(min(size, max(1, round(side * scale))) for side in (height, width))
    else:
        assert got[0] <= min(size, height)
        assert got[1] <= min(size, width)
        assert got == (height, width) or size in got


def ramp(height: int, width: int) -> VideoFrame:
    """Red rises to the right, green rises downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return VideoFrame.from_ndarray(
        np.stack([across, down, np.full_like(down, 77)], -1).round().astype(np.uint8), "rgb24"
    )


@pytest.mark.parametrize(("height", "width"), [(90, 161), (161, 90), (128, 128), (64, 64), (33, 190)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash", "fit"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "area"])
def test_crop_and_padding_are_centred(height: int, width: int, mode: str, interpolation: str) -> None:
    transform = ImageTransform(64, 64, mode, interpolation, fill=9)  # type: ignore[arg-type]
    out = Converter(transform, None)(ramp(height, width)).astype(float)
    high, wide = resized_size(height, width, 64, 64, mode)
    assert out.shape == ((high, wide, 3) if mode == "fit" else (64, 64, 3))
    sizes = ((height, high), (width, wide))
    whole = [((np.arange(new) + 0.5) * old / new - 0.5) / (old - 1) * 255 for old, new in sizes]
    top, left = (0, 0) if mode in ("fit", "squash") else (round((high - 64) / 2.0), round((wide - 64) / 2.0))
    if mode == "longest":
        top, left = -((64 - high) // 2), -((64 - wide) // 2)
        inside = np.zeros((64, 64), bool)
        inside[-top : -top + high, -left : -left + wide] = True
        assert (out[~inside] == 9).all()
        out = out[inside].reshape(high, wide, 3)
        top = left = 0
    rows, columns = whole[0][top : top + out.shape[0]], whole[1][left : left + out.shape[1]]
    # Away from the edges, where filters repeat the border. A ramp's slope is 255 / n a pixel, so a shift would show.
    inner = (slice(3, -3), slice(3, -3))
    assert np.abs(out[..., 0] - columns)[inner].max() <= 1.5
    assert np.abs(out[..., 1] - rows[:, None])[inner].max() <= 1.5
    assert np.abs(out[..., 2] - 77).max() <= 1


def test_scaling_down_does_not_alias() -> None:
    """One-pixel stripes become even grey, not bands."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for interpolation in ("bicubic", "bilinear", "area"):
        transform = ImageTransform(50, 50, "squash", interpolation)  # type: ignore[arg-type]
        out = Converter(transform, None)(VideoFrame.from_ndarray(stripes, "rgb24"))
        assert np.abs(out.astype(int) - 127)[2:-2, 2:-2].max() <= 8


def test_sample_aspect_ratio() -> None:
    frame = VideoFrame(800, 640, "yuv420p")
    assert display_size(frame, Fraction(64, 45)) == (640, 1138)
    assert display_size(frame, Fraction(1, 2)) == (640, 400)
    assert display_size(frame, None) == (640, 800)
    assert display_size(frame, Fraction(1, 100_000)) == (640, 800)


def test_a_hostile_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="the limit is"):
        Converter(ImageTransform(224, 224), None)(VideoFrame(16384, 2, "gray"))
    with pytest.raises(ValueError, match="the limit is 100"):
        Converter(None, None, 100)(VideoFrame(16, 16, "gray"))


# --- HDR


def slow_tone_map(code: tuple[int, int, int], transfer: str) -> list[float]:
    """The same chain for one pixel, in scalars written from the standards."""

    def eotf_pq(value: float) -> float:  # SMPTE ST 2084, equation 4.1
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = value ** (1 / m2)
        return 10000.0 * (max(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)

    def inverse_pq(nits: float) -> float:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        power = (nits / 10000) ** m1
        return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** m2

    signal = [value / 65535 for value in code]
    weights = (0.2627, 0.6780, 0.0593)
    if transfer == "pq":
        light = [eotf_pq(value) for value in signal]
    else:  # ITU-R BT.2100, table 5: inverse OETF, then OOTF with gamma 1.2 for 1000 nits
        a = 0.17883277
        b, c = 1 - 4 * a, 0.5 - a * math.log(4 * a)
        scene = [v * v / 3 if v <= 0.5 else (math.exp((v - c) / a) + b) / 12 for v in signal]
        luminance = sum(w * v for w, v in zip(weights, scene, strict=True))
        light = [1000 * luminance**0.2 * v for v in scene] if luminance else [0.0] * 3
    luminance = sum(w * v for w, v in zip(weights, light, strict=True))
    gain = 1.0
    if luminance > 0:
        top = inverse_pq(203) / inverse_pq(1000)
        level = min(inverse_pq(luminance) / inverse_pq(1000), 1)
        knee = 1.5 * top - 0.5
        if level >= knee:
            t = (level - knee) / (1 - knee)
            level = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * top
        gain = eotf_pq(level * inverse_pq(1000)) / luminance
    shown = [gain * v / 203 for v in light]
    matrix = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
    return [255 * min(max(sum(m * v for m, v in zip(r, shown, strict=True)), 0), 1) ** (1 / 2.4) for r in matrix]


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_tone_mapping_equals_the_slow_way(transfer: str) -> None:
    codes = np.random.default_rng(4).integers(0, 65536, (6, 30, 3)).astype(np.uint16)
    codes[0, :15] = np.linspace(0, 65535, 15).astype(np.uint16)[:, None]
    mine = tone_map(codes, transfer).clip(0, 1) * 255
    expected = np.array([[slow_tone_map(tuple(int(v) for v in pixel), transfer) for pixel in row] for row in codes])
    assert np.abs(mine - expected).max() <= 0.25


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_the_table_of_colours_is_close_to_the_formulas(transfer: str) -> None:
    rng = np.random.default_rng(5)
    light = rng.uniform(0.05, 0.75, (20, 33, 1))
    codes = (np.clip(light + rng.normal(0, 0.02, (20, 33, 3)), 0, 1) * 65535).astype(np.uint16)
    mapped = ToneMap(20, 33, transfer, True)
    expected = np.array([[slow_tone_map(tuple(int(v) for v in pixel), transfer) for pixel in row] for row in codes])
    for _ in range(2):
        away = np.abs(mapped(VideoFrame.from_ndarray(codes, PLANAR)) - expected)
        assert away.mean() <= 0.3
        assert np.quantile(away, 0.99) <= 2


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_frames_are_recognised_and_mapped(transfer: str) -> None:
    values = (600, 480, 560)
    frame = even_frame(values, "yuv420p10le", 10)
    frame.colorspace, frame.color_range, frame.color_primaries = 9, LIMITED, 9
    frame.color_trc = 16 if transfer == "pq" else 18
    convert = Converter(ImageTransform(8, 8, "squash"), None)
    out = convert(frame)
    rgb = rgb_of_yuv([np.float64(v) for v in values], 9, full=False, bits=10) / 255 * 65535
    expected = slow_tone_map(tuple(round(v) for v in rgb), transfer)  # type: ignore[arg-type]
    assert np.abs(out - np.array(expected)).max() <= 1.5
    assert convert.tone_mapped == transfer


@pytest.mark.parametrize(
    "name", ["testsrc2_hdr.mp4", "testsrc2_12bit_hdr.mp4", "h264_10bits.mp4", "bt709_full_range.mp4"]
)
@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("divide", [1, 2])
def test_the_filter_does_not_change_the_colours(media, name: str, interpolation: str, divide: int) -> None:  # type: ignore[no-untyped-def]
    with av.open(str(media(f"format/{name}"))) as container:
        frame = next(container.decode(video=0))
    full = Converter(None, None)(frame)
    height, width = full.shape[0] // divide, full.shape[1] // divide
    small = Converter(ImageTransform(height, width, "squash", interpolation), None)(frame)  # type: ignore[arg-type]
    blocks = full[: height * divide, : width * divide].reshape(height, divide, width, divide, 3).mean((1, 3))
    assert np.abs(small - blocks).mean() < 4
