"""Decoded surfaces to pictures, the NumPy definition: colour bars of the standards, and a loop in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from bounds import CODED_COLOUR, FLOAT32
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_reference import codes_of, forward_matrix, weight_of

from keyreel_kernels import ops_for
from keyreel_kernels.surfaces import Surface, resized_size

F64 = NDArray[np.float64]
OPS = ops_for("cpu")
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


def test_a_quarter_turn_is_clockwise() -> None:
    y = np.random.default_rng(0).integers(16, 236, (6, 8), np.uint8)
    grey = np.full((6, 8), 128, np.uint8)
    pictures = [
        OPS.frames_from_surfaces(
            [Surface((y, grey, grey), 8, "bt709", False, size, orientation)],
            height=8,
            width=8,
            mode="fit",
            interpolation="bicubic",
        )[0]
        for size, orientation in (((6, 8), (False, False, False)), ((8, 6), (True, False, True)))
    ]
    np.testing.assert_array_equal(pictures[1], np.rot90(pictures[0], k=-1))


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
@given(
    seed=st.integers(0, 2**32 - 1),
    coded=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    display=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    depth=st.sampled_from([(8, np.uint8), (8, np.uint16), (10, np.uint16), (12, np.uint16), (16, np.uint16)]),
    standard=st.sampled_from(["bt601", "bt709", "bt2020"]),
    full_range=st.booleans(),
    full_chroma=st.booleans(),
    orientation=st.sampled_from(ORIENTATIONS),
    mode=st.sampled_from(["shortest", "longest", "squash", "fit"]),
    interpolation=st.sampled_from(["bicubic", "bilinear", "area"]),
)
def test_pictures_equal_a_loop(
    seed: int,
    coded: tuple[int, int],
    display: tuple[int, int],
    size: tuple[int, int],
    depth: tuple[int, Any],
    standard: str,
    full_range: bool,
    full_chroma: bool,
    orientation: tuple[bool, bool, bool],
    mode: str,
    interpolation: str,
) -> None:
    draw, (bits, kind) = np.random.default_rng(seed), depth
    half = -(-coded[0] // 2), -(-coded[1] // 2), 2
    planes = tuple(
        (draw.integers(0, 1 << bits, shape) << (8 * np.dtype(kind).itemsize - bits)).astype(kind)
        for shape in ((coded, coded, coded) if full_chroma else (coded, half))
    )
    surface = Surface(planes, bits, standard, full_range, display, orientation)
    got = OPS.frames_from_surfaces(
        [surface], height=size[0], width=size[1], mode=mode, interpolation=interpolation, fill=77
    )
    expected = slow_picture(surface, *size, mode, interpolation, 77)
    assert got.dtype == np.uint8
    assert got.shape == (1, *expected.shape)
    assert np.abs(got[0] - expected).max() <= 0.5 + 255 * 4 * FLOAT32


def test_a_batch_is_its_pictures_one_by_one() -> None:
    draw = np.random.default_rng(5)
    surfaces = [
        Surface(
            (draw.integers(0, 256, (h, w), np.uint8), draw.integers(0, 256, (-(-h // 2), -(-w // 2), 2), np.uint8)),
            *(8, standard, False, (h, w)),
        )
        for h, w, standard in ((9, 14, "bt601"), (30, 7, "bt709"), (12, 12, "bt2020"))
    ]
    options: dict[str, Any] = {"height": 10, "width": 12, "mode": "longest", "interpolation": "bilinear"}
    whole = OPS.frames_from_surfaces(surfaces, **options)
    for one, surface in zip(whole, surfaces, strict=True):
        np.testing.assert_array_equal(one, OPS.frames_from_surfaces([surface], **options)[0])
    assert OPS.frames_from_surfaces([], **options).shape == (0, 10, 12, 3)
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.25, 0.3], np.float32)
    halves = OPS.frames_from_surfaces(surfaces, **options, normalised=(mean, std))
    assert halves.dtype == np.float16
    np.testing.assert_array_equal(halves, OPS.normalise(whole, mean, std).astype(np.float16))
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
