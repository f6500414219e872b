"""The definition of operations on pictures against loops in float64, Pillow, swscale and the standards."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from bounds import CODED_COLOUR, FLOAT32, FLOAT32_SUM, PILLOW_LEVELS, SWSCALE_LEVELS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import random_surface
from numpy.typing import NDArray
from PIL import Image

from keyreel_kernels import Ops, pictures
from keyreel_kernels.surfaces import Surface, resized_size

F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

OPS = Ops("cpu")
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}
# ITU-R BT.601-7 section 2.5.1, BT.709-6 item 3.2, BT.2020-2 table 4: E'Y of E'R, E'G, E'B.
LUMA = {"bt601": (0.299, 0.587, 0.114), "bt709": (0.2126, 0.7152, 0.0722), "bt2020": (0.2627, 0.6780, 0.0593)}
# The divisors of (B' - Y') and (R' - Y') as the same documents print them.
DIVISORS = {"bt601": (1.772, 1.402), "bt709": (1.8556, 1.5748), "bt2020": (1.8814, 1.4746)}


def noise(draw: np.random.Generator, *shape: int, low: int = 0, high: int = 256) -> U8:
    return draw.integers(low, high, shape, np.uint8)


# --- colour -------------------------------------------------------------------------------------------------------


def forward_matrix(standard: str) -> F64:
    """R'G'B' in 0..1 -> Y' in 0..1, Cb and Cr in -0.5..0.5."""
    luma = np.array(LUMA[standard])
    blue, red = DIVISORS[standard]
    return np.stack([luma, (np.array([0, 0, 1]) - luma) / blue, (np.array([1, 0, 0]) - luma) / red])


def codes_of(ycc: F64, bits: int, full_range: bool) -> F64:
    """ITU-T H.273 equations 8-23 to 8-31, not rounded."""
    unit = 2 ** (bits - 8)
    if full_range:
        return ycc * (2**bits - 1) + np.array([0, 128 * unit, 128 * unit])
    return (ycc * np.array([219, 224, 224]) + np.array([16, 128, 128])) * unit


def ramps(rows: F64, columns: F64) -> F64:
    """[len(rows), len(columns), 3] R'G'B' in 0..1, linear in both directions, at any places."""
    down, right = np.broadcast_arrays(rows[:, None] / 64, columns[None] / 96)
    return np.stack([0.2 + 0.5 * right, 0.7 - 0.4 * down, 0.25 + 0.25 * right + 0.3 * down], -1)


@pytest.mark.parametrize("standard", sorted(LUMA))
@pytest.mark.parametrize("full_range", [False, True])
def test_smooth_pictures_equal_swscale(standard: str, full_range: bool) -> None:
    height, width = 64, 96
    forward = forward_matrix(standard).T
    y = np.rint(codes_of(ramps(np.arange(height), np.arange(width)) @ forward, 8, full_range))[..., 0].astype(np.uint8)
    uv = codes_of(ramps(np.arange(height / 2) * 2 + 0.5, np.arange(width / 2) * 2) @ forward, 8, full_range)[..., 1:]
    uv = np.rint(uv).astype(np.uint8)
    frame = VideoFrame.from_ndarray(np.concatenate([y, uv.reshape(height // 2, width)]), format="nv12")
    matrices = {"bt601": Colorspace.SMPTE170M, "bt709": Colorspace.ITU709, "bt2020": Colorspace.BT2020}
    picture = VideoReformatter().reformat(
        frame,
        format="rgb24",
        src_colorspace=matrices[standard],
        src_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
    )
    got = pictures.yuv_to_rgb(y[None], uv[None], bits=8, standard=standard, full_range=full_range)[0] * 255
    assert np.abs(got - picture.to_ndarray())[2:-2, 2:-2].max() <= SWSCALE_LEVELS


# --- geometry -----------------------------------------------------------------------------------------------------


def weight_of(interpolation: str, x: float) -> float:
    x = abs(x)
    if interpolation == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:  # Keys 1981, equation 15, a = -1/2
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
@example(199, 67)
@example(3, 400)
def test_area_weights_are_a_box(old: int, new: int) -> None:
    got = pictures.resize_weights(old, new, "area")
    np.testing.assert_allclose(got.sum(1), 1, atol=FLOAT32)
    used = got > 0
    # One block of equal weights a row, as long as the reduction to within a pixel, in rising order.
    assert (np.diff(np.pad(used, ((0, 0), (1, 1))).astype(int), axis=1) == 1).sum(1).tolist() == [1] * new
    length = used.sum(1)
    assert (np.abs(length - max(old / new, 1)) < 1).all()
    np.testing.assert_allclose(got.max(1), 1 / length, atol=FLOAT32)
    assert (np.diff(used.argmax(1)) >= 0).all()


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize("size", [(45, 60), (31, 200), (130, 41), (90, 121), (1, 1), (180, 242)])
def test_resize_equals_pillow(interpolation: Any, size: tuple[int, int]) -> None:
    draw = np.random.default_rng(size[0])
    # Away from black and white: there Pillow clips bicubic's overshoot between its two passes.
    low, high = (64, 192) if interpolation == "bicubic" else (0, 256)
    frames = noise(draw, 2, 90, 121, 3, low=low, high=high)
    got = pictures.resize(frames, *size, interpolation)
    assert (got.dtype, got.shape) == (np.float32, (2, *size, 3))
    for n in range(2):
        expected = Image.fromarray(frames[n]).resize(size[::-1], FILTERS[interpolation])
        assert np.abs(np.rint(got[n]) - np.asarray(expected, np.float64)).max() <= PILLOW_LEVELS


def pillow_transform(image: U8, size: tuple[int, int], mode: str, interpolation: str, fill: int) -> U8:
    """open_clip's transform by the rules its parts document, in whole numbers."""
    tall, wide = size
    high, broad = image.shape[:2]
    if mode == "squash":
        new = size
    elif mode == "shortest":
        # torchvision's Resize: the side that binds fits, the other is int(size * long / short). CenterCrop: round.
        ratio = max(Fraction(tall, high), Fraction(wide, broad))
        new = (math.floor(high * ratio), math.floor(broad * ratio))
    else:
        ratio = min(Fraction(tall, high), Fraction(wide, broad))
        new = (round(high * ratio), round(broad * ratio))
    resized = Image.fromarray(image).resize(new[::-1], FILTERS[interpolation])
    if mode == "shortest":
        top, left = round((new[0] - tall) / 2.0), round((new[1] - wide) / 2.0)
        return np.asarray(resized.crop((left, top, left + wide, top + tall)))
    canvas = Image.new("RGB", (wide, tall), (fill, fill, fill))
    canvas.paste(resized, ((wide - new[1]) // 2, (tall - new[0]) // 2))
    return np.asarray(canvas)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 48), (37, 37), (32, 56), (56, 32)])
@pytest.mark.parametrize("old", [(72, 128), (128, 72), (97, 53), (53, 97), (48, 48), (61, 61), (20, 23), (30, 101)])
def test_transform_equals_pillow_and_torchvisions_rules(
    old: tuple[int, int], size: tuple[int, int], interpolation: Any, mode: str
) -> None:
    frames = noise(np.random.default_rng(old[0]), 1, *old, 3, low=64, high=192)
    got = OPS.transform(frames, height=size[0], width=size[1], mode=mode, interpolation=interpolation, fill=77)
    assert (got.dtype, got.shape) == (np.uint8, (1, *size, 3))
    expected = pillow_transform(frames[0], size, mode, interpolation, 77)
    assert np.abs(got[0].astype(int) - expected.astype(int)).max() <= PILLOW_LEVELS


def test_transform_keeps_a_picture_of_the_right_size_and_clips() -> None:
    frames = noise(np.random.default_rng(0), 2, 24, 24, 3, high=2) * np.uint8(255)
    for mode in ("shortest", "longest", "squash"):
        same = OPS.transform(frames, height=24, width=24, mode=mode, interpolation="bicubic")
        np.testing.assert_array_equal(same, frames)
    larger = OPS.transform(frames, height=60, width=60, mode="squash", interpolation="bicubic")
    plain = pictures.resize(frames, 60, 60, "bicubic")
    np.testing.assert_array_equal(larger, np.rint(np.clip(plain, 0, 255)).astype(np.uint8))
    with pytest.raises(ValueError, match="'zoom', allowed: shortest, longest, squash, fit"):
        OPS.transform(frames, height=24, width=24, mode="zoom", interpolation="bicubic")


def test_a_line_of_pixels_still_becomes_a_picture() -> None:
    frames = noise(np.random.default_rng(0), 1, 1, 300, 3)
    got = OPS.transform(frames, height=16, width=16, mode="longest", interpolation="bilinear", fill=9)
    assert (got[0, [0, 6, 8, 15]] == 9).all()
    assert (got[0, 7] != 9).any()


@pytest.mark.parametrize(("height", "width"), [(9, 12), (3, 3), (2, 5), (1, 1)])
def test_frame_signals_equal_loops(height: int, width: int) -> None:
    frames = noise(np.random.default_rng(height), 3, height, width, 3)
    frames[1] = 200
    sharpness, mean, spread, histogram = OPS.frame_signals(frames)
    assert {a.dtype for a in (sharpness, mean, spread, histogram)} == {np.dtype(np.float32)}
    for n in range(3):
        luma = [
            [sum(float(v) * k for v, k in zip(p, LUMA["bt709"], strict=True)) / 255 for p in row] for row in frames[n]
        ]
        edges = [
            luma[r - 1][c] + luma[r + 1][c] + luma[r][c - 1] + luma[r][c + 1] - 4 * luma[r][c]
            for r in range(1, height - 1)
            for c in range(1, width - 1)
        ]
        counts = np.zeros(512)
        for red, green, blue in frames[n].reshape(-1, 3).tolist():
            counts[red // 32 * 64 + green // 32 * 8 + blue // 32] += 1 / (height * width)
        assert sharpness[n] == pytest.approx(np.var(edges) if edges else 0, rel=FLOAT32_SUM, abs=FLOAT32)
        assert mean[n] == pytest.approx(np.mean(luma), rel=FLOAT32_SUM)
        assert spread[n] == pytest.approx(np.std(luma), rel=FLOAT32_SUM, abs=FLOAT32)
        np.testing.assert_allclose(histogram[n], counts, atol=FLOAT32)


def test_histogram_distance_equals_a_loop() -> None:
    draw = np.random.default_rng(0)
    one, other = (h / h.sum(1, keepdims=True) for h in draw.random((2, 5, 512)).astype(np.float32))
    expected = [
        1 - sum(min(float(a), float(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(one, other, strict=True)
    ]
    np.testing.assert_allclose(OPS.histogram_distance(one, other), expected, atol=1e-5)
    np.testing.assert_allclose(OPS.histogram_distance(one, one), 0, atol=1e-5)
    apart = np.eye(512, dtype=np.float32)[[3, 9]]
    np.testing.assert_array_equal(OPS.histogram_distance(apart, apart[::-1]), [1, 1])
    np.testing.assert_array_equal(OPS.histogram_distance(apart, apart[:1]), [0, 1])


# --- surfaces -----------------------------------------------------------------------------------------------------

ORIENTATIONS = list(itertools.product((False, True), repeat=3))
# White, yellow, cyan, green, magenta, red, blue, black.
BARS = np.array(
    [(255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)]
)
# Y', Cb, Cr of the same in 8 bits and limited range, as test charts print them.
BAR_CODES = {
    "bt601": "235 128 128  210 16 146  170 166 16  145 54 34  106 202 222  81 90 240  41 240 110  16 128 128",
    "bt709": "235 128 128  219 16 138  188 154 16  173 42 26  78 214 230  63 102 240  32 240 118  16 128 128",
}


@pytest.mark.parametrize("standard", sorted(BAR_CODES))
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full_chroma", [False, True])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_colour_bars(standard: str, bits: int, full_chroma: bool, orientation: tuple[bool, bool, bool]) -> None:
    """Bars of 12 x 40 coded pixels; each upright pixel is looked up where its middle lies in the coded picture."""
    codes = np.array(BAR_CODES[standard].split(), int).reshape(8, 3)
    held = (codes << (bits - 8) << (16 - bits)).astype(np.uint16) if bits > 8 else codes.astype(np.uint8)
    coded = np.repeat(held, 12, axis=0)[None].repeat(40, 0)
    parts = [coded[..., n] for n in range(3)] if full_chroma else [coded[..., 0], coded[::2, ::2, 1:]]
    planes = tuple(np.ascontiguousarray(part) for part in parts)
    display = (96, 40) if orientation[0] else (40, 96)
    surface = Surface(planes, bits, standard, False, display, orientation)
    size = (48, 20) if orientation[0] else (20, 48)
    got = OPS.frames_from_surfaces([surface], height=size[0], width=size[1], mode="fit", interpolation="area")[0]
    assert got.shape == (*size, 3)
    for row, column in np.ndindex(*size):
        at = [row, column]
        for axis in range(2):
            at[axis] = size[axis] - 1 - at[axis] if orientation[1 + axis] else at[axis]
        along = at[0] if orientation[0] else at[1]
        if along % 6 not in (0, 5):  # chroma of neighbours runs into the outermost
            assert np.abs(got[row, column].astype(int) - BARS[along // 6]).max() <= CODED_COLOUR


def slow_weights(old: int, new: int, interpolation: str) -> F64:
    out, stretch = np.zeros((new, old)), max(old / new, 1.0)
    for n in range(new):
        for at in range(old):
            off = (at + 0.5 - (n + 0.5) * (old / new)) / stretch
            inside = float(-0.5 < off <= 0.5)
            out[n, at] = inside if interpolation == "area" else weight_of(interpolation, off)
        out[n] /= out[n].sum()
    return out


def slow_rgb(surface: Surface) -> F64:
    """[H, W, 3] R'G'B' in 0..1, one pixel after the other."""
    y, *chroma = (np.asarray(plane, np.float64) for plane in surface.planes)
    if surface.planes[0].dtype == np.uint16:
        y, *chroma = (plane / 2 ** (16 - surface.bits) for plane in (y, *chroma))
    zero, one = (codes_of(np.full(3, v), surface.bits, surface.full_range) for v in (0.0, 1.0))
    inverse = np.linalg.inv(forward_matrix(surface.standard))
    out = np.zeros((*y.shape, 3))
    for r, c in np.ndindex(*y.shape):
        if len(chroma) == 2:
            pair = np.array([plane[r, c] for plane in chroma])
        else:
            pair = np.zeros(2)
            for rr, cc in np.ndindex(*chroma[0].shape[:2]):
                row = min(max(r, 0.5), 2 * chroma[0].shape[0] - 1.5)
                column = min(c, 2 * chroma[0].shape[1] - 2)
                part = max(0, 1 - abs(row - 2 * rr - 0.5) / 2) * max(0, 1 - abs(column - 2 * cc) / 2)
                pair += part * chroma[0][rr, cc]
        ycc = (np.array([y[r, c], *pair]) - zero) / (one - zero)
        out[r, c] = np.clip(inverse @ ycc, 0, 1)
    return out


def slow_picture(surface: Surface, height: int, width: int, mode: str, interpolation: str, fill: int) -> F64:
    """[height, width, 3] levels, not rounded."""
    new = resized_size(*surface.display, height, width, mode)
    transpose, flip_rows, flip_columns = surface.orientation
    rgb = slow_rgb(surface) * 255
    size = new[::-1] if transpose else new
    rows, columns = (slow_weights(o, n, interpolation) for o, n in zip(rgb.shape[:2], size, strict=True))
    scaled = np.clip(np.einsum("yh,xw,hwc->yxc", rows, columns, rgb), 0, 255)
    out = np.full((*(new if mode == "fit" else (height, width)), 3), float(fill))
    for r, c in np.ndindex(*out.shape[:2]):
        at = []
        for place, shown, whole, flip in zip((r, c), out.shape[:2], new, (flip_rows, flip_columns), strict=True):
            moved = place + round((whole - shown) / 2) if whole >= shown else place - (shown - whole) // 2
            at.append(whole - 1 - moved if flip else moved)
        if 0 <= at[0] < new[0] and 0 <= at[1] < new[1]:
            out[r, c] = scaled[at[1], at[0]] if transpose else scaled[at[0], at[1]]
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_pictures_equal_a_loop(data: st.DataObject, seed: int) -> None:
    side, shown = st.integers(1, 9), st.integers(1, 12)
    surface = random_surface(
        np.random.default_rng(seed),
        *data.draw(st.tuples(side, side)),
        bits=data.draw(st.sampled_from([8, 8, 10, 12, 16])),
        words=data.draw(st.booleans()),
        full_chroma=data.draw(st.booleans()),
        standard=data.draw(st.sampled_from(sorted(LUMA))),
        full_range=data.draw(st.booleans()),
        display=data.draw(st.tuples(shown, shown)),
        orientation=data.draw(st.sampled_from(ORIENTATIONS)),
    )
    size, mode = data.draw(st.tuples(side, side)), data.draw(st.sampled_from(["shortest", "longest", "squash", "fit"]))
    filter_ = data.draw(st.sampled_from(sorted(FILTERS)))
    found = OPS.frames_from_surfaces(
        [surface], height=size[0], width=size[1], mode=mode, interpolation=filter_, fill=77
    )
    expected = slow_picture(surface, *size, mode, filter_, 77)
    assert (found.dtype, found.shape) == (np.uint8, (1, *expected.shape))
    assert np.abs(found[0] - expected).max() <= 0.5 + 255 * 4 * FLOAT32


def test_a_batch_is_its_pictures_one_by_one() -> None:
    draw = np.random.default_rng(5)
    shapes = ((9, 14, "bt601"), (30, 7, "bt709"), (12, 12, "bt2020"))
    surfaces = [random_surface(draw, height, width, standard=standard) for height, width, standard in shapes]
    options: dict[str, Any] = {"height": 10, "width": 12, "mode": "longest", "interpolation": "bilinear"}
    whole = OPS.frames_from_surfaces(surfaces, **options)
    for one, surface in zip(whole, surfaces, strict=True):
        np.testing.assert_array_equal(one, OPS.frames_from_surfaces([surface], **options)[0])
    assert OPS.frames_from_surfaces([], **options).shape == (0, 10, 12, 3)
    with pytest.raises(ValueError, match="several sizes"):
        OPS.frames_from_surfaces(surfaces, **{**options, "mode": "fit"})


Y, UV = np.zeros((4, 6), np.uint8), np.zeros((2, 3, 2), np.uint8)


@pytest.mark.parametrize(
    ("planes", "bits", "standard", "display", "message"),
    [
        ((), 8, "bt709", (4, 6), "luma must be"),
        ((Y[0], UV), 8, "bt709", (4, 6), "luma must be"),
        ((Y[:0], UV[:0]), 8, "bt709", (4, 6), "luma must be"),
        ((Y, UV[:1]), 8, "bt709", (4, 6), "chroma must be"),
        ((Y, UV[..., 0]), 8, "bt709", (4, 6), "chroma must be"),
        ((Y, Y), 8, "bt709", (4, 6), "chroma must be"),
        ((Y, Y, Y[:2]), 8, "bt709", (4, 6), "chroma must be"),
        ((Y, UV.astype(np.uint16)), 8, "bt709", (4, 6), "samples are"),
        ((Y, UV), 10, "bt709", (4, 6), "samples are"),
        ((Y.astype(np.uint16), UV.astype(np.uint16)), 17, "bt709", (4, 6), "samples are"),
        ((Y.astype(np.uint16), UV.astype(np.uint16)), 7, "bt709", (4, 6), "samples are"),
        ((Y.astype(np.float32), UV.astype(np.float32)), 8, "bt709", (4, 6), "samples are"),
        ((np.zeros((4, 12), np.uint8)[:, ::2], UV), 8, "bt709", (4, 6), "rows may lie apart"),
        ((Y, np.zeros((2, 3, 4), np.uint8)[..., ::2]), 8, "bt709", (4, 6), "rows may lie apart"),
        ((Y, UV), 8, "srgb", (4, 6), "'srgb', allowed: bt601, bt709, bt2020"),
        ((Y, UV), 8, "bt709", (0, 6), "shown at"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    planes: tuple[Any, ...], bits: int, standard: str, display: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Surface(planes, bits, standard, False, display)


def test_rows_may_lie_apart() -> None:
    wide = np.zeros((9, 40), np.uint8)
    Surface((wide[:4, 1:7], wide[5:7, 2:8].reshape(2, 3, 2)), 8, "bt709", False, (4, 6))
