"""Colour, geometry, temporal shift, pooling and search against loops in float64, Pillow, swscale and the standards."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from bounds import CODED_COLOUR, FLOAT32, FLOAT32_SUM, PILLOW_LEVELS, SWSCALE_LEVELS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from keyreel_kernels import ops_for, pictures

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]

OPS = ops_for("cpu")
DRAWS = st.integers(0, 2**32 - 1)
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


@pytest.mark.parametrize("standard", sorted(LUMA))
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_even_colours_equal_the_inverse_of_the_standards_equations(standard: str, full_range: bool, bits: int) -> None:
    draw = np.random.default_rng(bits)
    codes = draw.integers(0, 2**bits, (64, 3))
    depth, left = (np.uint8, 0) if bits == 8 else (np.uint16, 16 - bits)
    held = (codes << left).astype(depth)
    y = np.broadcast_to(held[:, :1, None], (64, 4, 6))
    uv = np.broadcast_to(held[:, None, None, 1:], (64, 2, 3, 2))
    got = OPS.yuv_to_rgb(y, uv, bits=bits, standard=standard, full_range=full_range)
    zero = codes_of(np.zeros(3), bits, full_range)
    ycc = (codes - zero) / (codes_of(np.ones(3), bits, full_range) - zero)
    expected = np.clip(np.linalg.solve(forward_matrix(standard), ycc.T).T, 0, 1)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.broadcast_to(expected[:, None, None], got.shape), atol=4 * FLOAT32)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 7), (6, 4), (1, 1), (1, 6), (3, 2)])
def test_chroma_sits_left_and_between_the_rows(height: int, width: int) -> None:
    """Noise, against a loop over pixels: chroma sample (r, c) lies at row 2 r + 0.5, column 2 c."""
    draw = np.random.default_rng(height * 10 + width)
    rows, columns = -(-height // 2), -(-width // 2)
    y, uv = noise(draw, 2, height, width), noise(draw, 2, rows, columns, 2, low=96, high=160)
    got = OPS.yuv_to_rgb(y, uv, bits=8, standard="bt709", full_range=False)
    inverse = np.linalg.inv(forward_matrix("bt709"))
    for n in range(2):
        for r in range(height):
            for c in range(width):
                pair = np.zeros(2)
                total = 0.0
                for rr in range(rows):
                    for cc in range(columns):
                        # Beyond the outermost samples the outermost counts alone.
                        row, column = min(max(r, 0.5), 2 * rows - 1.5), min(c, 2 * columns - 2)
                        part = max(0, 1 - abs(row - 2 * rr - 0.5) / 2) * max(0, 1 - abs(column - 2 * cc) / 2)
                        pair, total = pair + part * uv[n, rr, cc], total + part
                assert total == pytest.approx(1)
                ycc = np.array([(y[n, r, c] - 16) / 219 if y[n, r, c] > 16 else -(16.0 - y[n, r, c]) / 219, 0, 0])
                ycc[1:] = (pair - 128) / 224
                np.testing.assert_allclose(got[n, r, c], np.clip(inverse @ ycc, 0, 1), atol=4 * FLOAT32)


def ramps(rows: F64, columns: F64) -> F64:
    """[len(rows), len(columns), 3] R'G'B' in 0..1, linear in both directions, at any places."""
    down, right = np.broadcast_arrays(rows[:, None] / 64, columns[None] / 96)
    return np.stack([0.2 + 0.5 * right, 0.7 - 0.4 * down, 0.25 + 0.25 * right + 0.3 * down], -1)


@pytest.mark.parametrize("standard", sorted(LUMA))
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_a_picture_survives_its_way_to_codes_and_back(
    standard: str, full_range: bool, bits: int, height: int, width: int
) -> None:
    forward = forward_matrix(standard).T
    at = np.arange(-(-height // 2)) * 2 + 0.5, np.arange(-(-width // 2)) * 2.0
    y = codes_of(ramps(np.arange(height), np.arange(width)) @ forward, bits, full_range)[..., 0]
    uv = codes_of(ramps(*at) @ forward, bits, full_range)[..., 1:]
    left, depth = (1, np.uint8) if bits == 8 else (2 ** (16 - bits), np.uint16)
    y, uv = ((np.rint(plane) * left).astype(depth)[None] for plane in (y, uv))
    got = OPS.yuv_to_rgb(y, uv, bits=bits, standard=standard, full_range=full_range)[0]
    off = np.abs(got - ramps(np.arange(height), np.arange(width))) * 255
    # Chroma cannot be known outside of its outermost samples: the first row, the last column and row.
    assert off[1:-1, :-1].max() <= CODED_COLOUR / 2 ** (bits - 8)


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
    got = OPS.yuv_to_rgb(y[None], uv[None], bits=8, standard=standard, full_range=full_range)[0] * 255
    assert np.abs(got - picture.to_ndarray())[2:-2, 2:-2].max() <= SWSCALE_LEVELS


# --- geometry -----------------------------------------------------------------------------------------------------


def weight_of(interpolation: str, x: float) -> float:
    x = abs(x)
    if interpolation == "bilinear":
        return max(0.0, 1 - x)
    if x < 1:  # Keys 1981, equation 15, a = -1/2
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["bicubic", "bilinear"]))
def test_resize_weights_are_the_filter_as_wide_as_the_reduction(old: int, new: int, interpolation: str) -> None:
    got = pictures.resize_weights(old, new, interpolation)  # type: ignore[arg-type]
    stretch = max(old / new, 1.0)
    for n in range(new):
        centre = (n + 0.5) * old / new
        weights = [weight_of(interpolation, (m + 0.5 - centre) / stretch) for m in range(old)]
        np.testing.assert_allclose(got[n], np.array(weights) / sum(weights), atol=FLOAT32)


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
    got = OPS.resize(frames, *size, interpolation)
    assert (got.dtype, got.shape) == (np.float32, (2, *size, 3))
    for n in range(2):
        expected = Image.fromarray(frames[n]).resize(size[::-1], FILTERS[interpolation])
        assert np.abs(np.rint(got[n]) - np.asarray(expected, np.float64)).max() <= PILLOW_LEVELS


def test_resize_is_separable_and_overshoots() -> None:
    """A float64 loop over rows, columns and taps, on black and white noise: nothing is clipped on the way."""
    frame = noise(np.random.default_rng(2), 1, 7, 9, 3, high=2) * np.uint8(255)
    got = OPS.resize(frame, 10, 4, "bicubic")[0]
    expected = np.zeros((10, 4, 3))
    for r in range(10):
        for c in range(4):
            total = 0.0
            for rr in range(7):
                for cc in range(9):
                    part = weight_of("bicubic", rr + 0.5 - (r + 0.5) * 0.7)
                    part *= weight_of("bicubic", (cc + 0.5 - (c + 0.5) * 2.25) / 2.25)
                    expected[r, c] += part * frame[0, rr, cc]
                    total += part
            expected[r, c] /= total
    np.testing.assert_allclose(got, expected, atol=255 * FLOAT32)
    assert got.min() < 0
    assert got.max() > 255


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
    plain = OPS.resize(frames, 60, 60, "bicubic")
    np.testing.assert_array_equal(larger, np.rint(np.clip(plain, 0, 255)).astype(np.uint8))
    with pytest.raises(ValueError, match="'zoom', allowed: shortest, longest, squash, fit"):
        OPS.transform(frames, height=24, width=24, mode="zoom", interpolation="bicubic")


def test_a_line_of_pixels_still_becomes_a_picture() -> None:
    frames = noise(np.random.default_rng(0), 1, 1, 300, 3)
    got = OPS.transform(frames, height=16, width=16, mode="longest", interpolation="bilinear", fill=9)
    assert (got[0, [0, 6, 8, 15]] == 9).all()
    assert (got[0, 7] != 9).any()


def test_normalise_equals_a_loop() -> None:
    frames = noise(np.random.default_rng(0), 2, 3, 4, 3)
    mean, std = np.array([0.48, 0.46, 0.41], np.float32), np.array([0.27, 0.26, 0.28], np.float32)
    got = OPS.normalise(frames, mean, std)
    assert (got.dtype, got.shape) == (np.float32, (2, 3, 3, 4))
    for n, r, c, channel in np.ndindex(*frames.shape):
        expected = (float(frames[n, r, c, channel]) / 255 - float(mean[channel])) / float(std[channel])
        assert got[n, channel, r, c] == pytest.approx(expected, abs=2 * FLOAT32)


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


# --- temporal shift -----------------------------------------------------------------------------------------------


def some_linked(draw: np.random.Generator, count: int) -> Bools:
    linked = draw.random(count) < 0.8
    linked[0] = False
    return linked


def some_patches(draw: np.random.Generator, count: int, places: int) -> F32:
    """A still background with patches that change now and then."""
    patches = np.repeat(draw.normal(size=(1, places, 8)), count, axis=0)
    for t in range(1, count):
        patches[t] = patches[t - 1]
        moved = draw.random(places) < 0.4
        patches[t, moved] += draw.normal(size=(int(moved.sum()), 8)) * draw.random()
    return (patches * (1 + draw.random((count, places, 1)))).astype(np.float32)


def same_shot(linked: Bools, one: int, other: int) -> bool:
    return all(linked[t] for t in range(min(one, other) + 1, max(one, other) + 1))


def taken_from(t: int, place: int, step: int, grid: tuple[int, int], linked: Bools) -> int:
    """Chequerboard: the even squares look back, the odd ones ahead; ends and cuts keep the frame's own patch."""
    return neighbour(t, step if (place // grid[1] + place % grid[1]) % 2 else -step, linked)


def neighbour(t: int, reach: int, linked: Bools) -> int:
    wanted = t + reach
    return wanted if 0 <= wanted < len(linked) and same_shot(linked, t, wanted) else t


@settings(max_examples=40, deadline=None)
@given(
    DRAWS,
    st.integers(1, 9),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.0625, 0.125, 0.25, 0.375, 0.5]),
    st.integers(1, 3),
)
def test_fixed_shift_equals_a_loop(number: int, count: int, grid: tuple[int, int], share: float, step: int) -> None:
    linked = some_linked(np.random.default_rng(number), count)
    got = OPS.fixed_shift(count, grid, linked, share=share, step=step)
    part, places = Fraction(share), grid[0] * grid[1]
    # Every 1/share-th patch in running order, back and ahead in turn; row r is then turned right by r places.
    even = [i for i in range(places) if math.floor((i + 1) * part) > math.floor(i * part)]
    reach = {}
    for n, i in enumerate(even):
        row, column = divmod(i, grid[1])
        reach[row * grid[1] + (column + row) % grid[1]] = step if n % 2 else -step
    assert len(reach) == math.floor(places * part)
    assert (got.dtype, got.shape) == (np.int64, (count, places))
    for t in range(count):
        expected = [neighbour(t, reach[i], linked) if i in reach else t for i in range(places)]
        assert got[t].tolist() == expected


@pytest.mark.parametrize("side", [7, 8, 14, 16])
def test_fixed_shift_is_even_over_rows_columns_and_directions(side: int) -> None:
    source = OPS.fixed_shift(3, (side, side), np.array([False, True, True]), share=0.25, step=1)[1].reshape(side, side)
    moved = source != 1
    assert moved.sum() == side * side // 4
    for counts in (moved.sum(0), moved.sum(1)):
        assert counts.min() >= side // 4 - 1
        assert counts.max() <= side // 4 + 2
    assert abs(int((source == 0).sum()) - int((source == 2).sum())) <= 1


def adaptive_by_loops(
    patches: F32, grid: tuple[int, int], linked: Bools, steps: int, threshold: float
) -> list[list[int]]:
    count, places = patches.shape[:2]
    e = patches.astype(np.float64)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    out = []
    for t in range(count):
        change = [
            [1 - float(e[t, i] @ e[t - s, i]) if t >= s and same_shot(linked, t - s, t) else 0.0 for i in range(places)]
            for s in range(1, steps + 1)
        ]
        quarter = math.ceil(places / 4)
        most = [sum(sorted(row)[-quarter:]) / quarter for row in change]
        step = next((s for s in range(1, steps + 1) if most[s - 1] >= max(most) / 2), 1)
        own = change[step - 1]
        ranked = sorted(range(places), key=lambda i: -own[i])[: places // 2]
        chosen = {i for i in ranked if own[i] > threshold}
        out.append([taken_from(t, i, step, grid, linked) if i in chosen else t for i in range(places)])
    return out


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.integers(1, 10), st.tuples(st.integers(1, 4), st.integers(1, 5)), st.integers(1, 4))
def test_adaptive_shift_equals_a_loop(number: int, count: int, grid: tuple[int, int], steps: int) -> None:
    draw = np.random.default_rng(number)
    linked, patches = some_linked(draw, count), some_patches(draw, count, grid[0] * grid[1])
    got = OPS.adaptive_shift(patches, grid, linked, steps=steps, threshold=0.1)
    assert got.tolist() == adaptive_by_loops(patches, grid, linked, steps, 0.1)


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.integers(1, 14), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 5), st.booleans())
def test_shift_keeps_to_the_shot_and_to_half_of_the_patches(
    number: int, count: int, grid: tuple[int, int], reach: int, fixed: bool
) -> None:
    draw = np.random.default_rng(number)
    linked, places = some_linked(draw, count), grid[0] * grid[1]
    if fixed:
        source = OPS.fixed_shift(count, grid, linked, share=float(draw.uniform(0.01, 0.5)), step=reach)
    else:
        source = OPS.adaptive_shift(draw.normal(size=(count, places, 4)), grid, linked, steps=reach, threshold=0.0)
    own = np.arange(count)[:, None]
    assert ((source != own).sum(1) <= places // 2).all()
    assert (np.abs(source - own) <= reach).all()
    for t in range(count):
        assert all(same_shot(linked, t, int(u)) for u in source[t])
    if count == 1:
        assert not source.any()


def test_adaptive_shift_does_happen_and_not_in_a_still_picture() -> None:
    draw = np.random.default_rng(0)
    linked = np.array([False, True, True, True])
    moving = OPS.adaptive_shift(
        draw.normal(size=(4, 16, 8)).astype(np.float32), (4, 4), linked, steps=3, threshold=0.15
    )
    assert (moving[1:-1] != np.arange(4)[1:-1, None]).sum() >= 8
    still = np.repeat(draw.normal(size=(1, 16, 8)).astype(np.float32), 4, axis=0)
    own = OPS.adaptive_shift(still, (4, 4), linked, steps=3, threshold=1e-5)
    np.testing.assert_array_equal(own, np.broadcast_to(np.arange(4)[:, None], (4, 16)))


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.integers(1, 24), st.integers(1, 4), st.integers(1, 7))
def test_windows_with_a_halo_decide_as_the_whole(number: int, count: int, steps: int, size: int) -> None:
    draw = np.random.default_rng(number)
    linked, patches = some_linked(draw, count), some_patches(draw, count, 12)
    whole = OPS.adaptive_shift(patches, (3, 4), linked, steps=steps, threshold=0.1)
    fixed = OPS.fixed_shift(count, (3, 4), linked, share=0.25, step=steps)
    for start in range(0, count, size):
        stop = min(start + size, count)
        low, high = max(start - steps, 0), min(stop + steps, count)
        inside = linked[low:high].copy()
        inside[0] = False  # as encode does: the frame before the window cannot be taken from
        part = OPS.adaptive_shift(patches[low:high], (3, 4), inside, steps=steps, threshold=0.1) + low
        np.testing.assert_array_equal(part[start - low : stop - low], whole[start:stop])
        part = OPS.fixed_shift(high - low, (3, 4), inside, share=0.25, step=steps) + low
        np.testing.assert_array_equal(part[start - low : stop - low], fixed[start:stop])


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_shift_tokens_equals_a_loop(prefix: int) -> None:
    draw = np.random.default_rng(prefix)
    tokens = draw.normal(size=(4, prefix + 6, 3)).astype(np.float32)
    before, source = tokens.copy(), draw.integers(4, size=(4, 6))
    got = OPS.shift_tokens(tokens, source, prefix)
    np.testing.assert_array_equal(tokens, before)
    np.testing.assert_array_equal(got[:, :prefix], tokens[:, :prefix])
    for t in range(4):
        for i in range(6):
            np.testing.assert_array_equal(got[t, prefix + i], tokens[source[t, i], prefix + i])


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 7), (12, 2)])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (10, 11), (7, 9)])
def test_shift_pixels_equals_a_loop(grid: tuple[int, int], height: int, width: int) -> None:
    draw = np.random.default_rng(height)
    frames, source = noise(draw, 3, height, width, 3), draw.integers(3, size=(3, grid[0] * grid[1]))
    expected = np.zeros_like(frames)
    for t in range(3):
        for r in range(grid[0]):
            for c in range(grid[1]):
                rows = slice(r * height // grid[0], (r + 1) * height // grid[0])
                columns = slice(c * width // grid[1], (c + 1) * width // grid[1])
                expected[t, rows, columns] = frames[source[t, r * grid[1] + c], rows, columns]
    np.testing.assert_array_equal(OPS.shift_pixels(frames, source, grid), expected)


# --- pooling and search -------------------------------------------------------------------------------------------


def shares(draw: np.random.Generator, *shape: int) -> F32:
    values = draw.random(shape) ** 3
    return (values / values.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_weighted_pool_equals_a_loop(strength: float) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 10, 5)).astype(np.float32)
    weights, attention = shares(draw, 3, 10), shares(draw, 3, 10)
    got = OPS.weighted_pool(values, weights, attention, strength)
    assert got.dtype == np.float32
    for n in range(3):
        biased = [float(weights[n, i]) * (10 * float(attention[n, i])) ** strength for i in range(10)]
        pooled = sum(b / sum(biased) * values[n, i].astype(np.float64) for i, b in enumerate(biased))
        np.testing.assert_allclose(got[n], pooled / np.linalg.norm(pooled), atol=2 * FLOAT32)


@settings(max_examples=25, deadline=None)
@given(DRAWS, st.integers(1, 20))
def test_pooling_without_strength_or_with_an_even_map_is_the_plain_pooling(number: int, places: int) -> None:
    draw = np.random.default_rng(number)
    values = draw.normal(size=(2, places, 6)).astype(np.float32)
    weights, attention = shares(draw, 2, places), shares(draw, 2, places)
    plain = (weights[..., None].astype(np.float64) * values).sum(1)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    even = np.full((2, places), 1 / places, np.float32)
    for pooled in (OPS.weighted_pool(values, weights, attention, 0.0), OPS.weighted_pool(values, weights, even, 2.0)):
        assert (pooled * plain).sum(1) == pytest.approx(1, abs=FLOAT32)


@pytest.mark.parametrize("strength", [0.0, 1.0, 8.0])
def test_a_map_of_zeros_under_all_of_the_weight(strength: float) -> None:
    values = np.eye(4, dtype=np.float32)[None]
    weights, attention = np.array([[0.5, 0.5, 0, 0]], np.float32), np.array([[0, 0, 0.5, 0.5]], np.float32)
    got = OPS.weighted_pool(values, weights, attention, strength)
    np.testing.assert_allclose(got, [[math.sqrt(0.5), math.sqrt(0.5), 0, 0]], atol=FLOAT32)


@settings(max_examples=60, deadline=None)
@given(DRAWS, st.integers(1, 4), st.integers(0, 30), st.integers(0, 40))
def test_top_k_equals_a_sort_with_ties_to_the_lowest_row(number: int, queries: int, count: int, k: int) -> None:
    draw = np.random.default_rng(number)
    # Small whole numbers: products are exact, and full of ties.
    q = draw.integers(-2, 3, (queries, 3)).astype(np.float32)
    x = draw.integers(-2, 3, (count, 3)).astype(np.float32)
    scores, rows = OPS.top_k(q, x, k)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    assert scores.shape == rows.shape == (queries, min(k, count))
    for n in range(queries):
        exact = [sum(float(a) * float(b) for a, b in zip(q[n], row, strict=True)) for row in x]
        order = sorted(range(count), key=lambda row: (-exact[row], row))[:k]
        assert rows[n].tolist() == order
        assert scores[n].tolist() == [exact[row] for row in order]


def test_top_k_of_real_vectors() -> None:
    draw = np.random.default_rng(1)
    q, x = draw.normal(size=(3, 64)).astype(np.float32), draw.normal(size=(500, 64)).astype(np.float32)
    scores, rows = OPS.top_k(q, x, 20)
    exact = q.astype(np.float64) @ x.astype(np.float64).T
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :20])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :20], rtol=FLOAT32_SUM)


def test_arguments_are_left_alone() -> None:
    """No operation writes into what it is given; strict warnings would show a cast or a division gone wrong."""
    draw = np.random.default_rng(0)
    frames, tokens = noise(draw, 3, 12, 12, 3), draw.normal(size=(3, 9, 4)).astype(np.float32)
    frames.flags.writeable = tokens.flags.writeable = False
    linked = np.array([False, True, True])
    linked.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = OPS.adaptive_shift(tokens, (3, 3), linked, steps=2, threshold=0.1)
        source.flags.writeable = False
        OPS.shift_tokens(tokens, source, 0)
        OPS.shift_pixels(frames, source, (3, 3))
        OPS.frame_signals(frames)
        OPS.transform(frames, height=8, width=9, mode="shortest", interpolation="bicubic")
        even = np.full((3, 9), 1 / 9, np.float32)
        even.flags.writeable = False
        OPS.weighted_pool(tokens, even, even, 1.0)
        OPS.top_k(tokens[0], tokens[1], 4)


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
