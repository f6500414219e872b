"""The picture kernels against their NumPy definitions, and a real clip against swscale."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from bounds import FLOAT32, FLOAT32_SUM, HALF, KERNEL_LEVELS, SWSCALE_MEAN_LEVELS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases_color import cases, on_device, random_surface
from numpy.typing import NDArray

from keyreel.config import ImageTransform
from keyreel.decode.color import Converter, display_size, orientation_of
from keyreel_kernels import cuda_frames, pictures
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.surfaces import Surface

ORIENTATIONS = list(itertools.product((False, True), repeat=3))
MODES = ("shortest", "longest", "squash", "fit")
FILTERS = ("bicubic", "bilinear", "area")
MEAN, STD = np.array([0.48, 0.46, 0.41], np.float32), np.array([0.27, 0.26, 0.28], np.float32)


def levels_apart(one: NDArray[Any], other: NDArray[Any]) -> int:
    assert one.dtype == other.dtype == np.uint8
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max(initial=0))


def check(cuda: Cuda, surfaces: list[Surface], gap: int = 0, **options: Any) -> None:
    """Equal to the definition, and nothing came down on the way."""
    there = [on_device(cuda, surface, gap) for surface in surfaces]
    before = cuda.bytes_to_host
    with cuda.scope():
        got = cuda_frames.frames_from_surfaces(cuda, there, **options)
    assert cuda.bytes_to_host == before
    expected = pictures.frames_from_surfaces(surfaces, **options)
    assert levels_apart(cuda.to_host(got), expected) <= KERNEL_LEVELS


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_surfaces_equal_the_definition(cuda: Cuda, data: st.DataObject, seed: int) -> None:
    """Batches of any sizes, depths and standards, their rows apart, every way to show them."""
    draw = np.random.default_rng(seed)
    mode = data.draw(st.sampled_from(MODES))
    surfaces = []
    for _ in range(data.draw(st.integers(1, 1 if mode == "fit" else 3))):
        bits = data.draw(st.sampled_from([8, 8, 10, 12, 16]))
        surfaces.append(
            random_surface(
                draw,
                *data.draw(st.tuples(st.integers(1, 50), st.integers(1, 140))),
                bits=bits,
                words=data.draw(st.booleans()),
                full_chroma=data.draw(st.booleans()),
                standard=data.draw(st.sampled_from(["bt601", "bt709", "bt2020"])),
                full_range=data.draw(st.booleans()),
                display=data.draw(st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90))),
                orientation=data.draw(st.sampled_from(ORIENTATIONS)),
            )
        )
    check(
        cuda,
        surfaces,
        gap=data.draw(st.sampled_from([0, 2, 6, 16])),
        height=data.draw(st.integers(1, 70)),
        width=data.draw(st.integers(1, 70)),
        mode=mode,
        interpolation=data.draw(st.sampled_from(FILTERS)),
        fill=data.draw(st.sampled_from([0, 114, 255])),
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_every_orientation_and_mode(cuda: Cuda, orientation: tuple[bool, bool, bool], mode: str) -> None:
    surface = random_surface(np.random.default_rng(1), 38, 75, orientation=orientation)
    check(cuda, [surface], height=36, width=44, mode=mode, interpolation="bicubic", fill=9)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((1, 1), (5, 3)),
        ((2, 3), (2, 3)),
        ((33, 17), (24, 24)),
        ((7, 5), (61, 83)),  # four tiles, larger
        ((3000, 4), (5, 5)),  # more taps than a block holds lines
        ((4, 3000), (5, 5)),
        ((257, 259), (64, 65)),
        ((90, 160), (90, 160)),
    ],
)
@pytest.mark.parametrize("full_chroma", [False, True])
def test_sizes(cuda: Cuda, old: tuple[int, int], new: tuple[int, int], interpolation: str, full_chroma: bool) -> None:
    surface = random_surface(np.random.default_rng(2), *old, full_chroma=full_chroma)
    check(cuda, [surface], gap=3 * full_chroma, height=new[0], width=new[1], mode="squash", interpolation=interpolation)


def test_full_hd_to_the_models_size(cuda: Cuda) -> None:
    surface = random_surface(np.random.default_rng(3), 1080, 1920)
    check(cuda, [surface], gap=128, height=224, width=224, mode="shortest", interpolation="bicubic")


def test_a_batch_is_one_launch(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    surfaces = [random_surface(draw, 20 + n, 50 - n, bits=(8, 10)[n % 2], full_chroma=n % 3 == 0) for n in range(16)]
    launches: list[str] = []
    plain = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *args, **options: (launches.append(args[1]), plain(*args, **options)))
    check(cuda, surfaces, height=24, width=24, mode="shortest", interpolation="bilinear")
    assert launches == ["pictures"]
    check(cuda, [], height=24, width=23, mode="fit", interpolation="bilinear")
    assert launches == ["pictures"]
    with pytest.raises(ValueError, match="several sizes"):
        check(cuda, surfaces, height=24, width=24, mode="fit", interpolation="bilinear")
    with pytest.raises(ValueError, match="'zoom'"):
        check(cuda, surfaces, height=24, width=24, mode="zoom", interpolation="bilinear")


@pytest.mark.parametrize("orientation", [(False, False, False), (True, False, True)])
def test_normalised_halves(cuda: Cuda, orientation: tuple[bool, bool, bool]) -> None:
    draw = np.random.default_rng(5)
    surfaces = [random_surface(draw, 41, 77, orientation=orientation), random_surface(draw, 20, 33, bits=10)]
    options: dict[str, Any] = {"height": 35, "width": 39, "mode": "longest", "interpolation": "bicubic", "fill": 30}
    there = [on_device(cuda, surface) for surface in surfaces]
    with cuda.scope():
        got = cuda.to_host(cuda_frames.frames_from_surfaces(cuda, there, **options, normalised=(MEAN, STD)))
    expected = pictures.frames_from_surfaces(surfaces, **options, normalised=(MEAN, STD))
    assert got.dtype == expected.dtype == np.float16
    assert got.shape == expected.shape
    off = np.abs(got.astype(np.float64) - expected) / (HALF * np.abs(expected.astype(np.float64)) + FLOAT32)
    moved = off > 1  # a level that was rounded the other way
    assert moved.mean() < 0.001
    assert (np.abs(got.astype(np.float64) - expected)[moved] < 1.1 * KERNEL_LEVELS / 255 / STD.min()).all()


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("old", "size"), [((37, 61), (24, 24)), ((61, 37), (40, 70)), ((24, 24), (24, 24)), ((1, 9), (4, 4))]
)
def test_transform_equals_the_definition(
    cuda: Cuda, old: tuple[int, int], size: tuple[int, int], mode: str, interpolation: Any
) -> None:
    frames = np.random.default_rng(6).integers(0, 256, (3, *old, 3), np.uint8)
    options: dict[str, Any] = {"height": size[0], "width": size[1], "mode": mode, "interpolation": interpolation}
    with cuda.scope():
        got = cuda.to_host(cuda_frames.transform(cuda, cuda.to_device(frames), **options, fill=7))
    assert levels_apart(got, pictures.transform(frames, **options, fill=7)) <= KERNEL_LEVELS


def test_transform_takes_views_and_nothing(cuda: Cuda) -> None:
    frames = np.random.default_rng(7).integers(0, 256, (4, 30, 40, 3), np.uint8)
    options: dict[str, Any] = {"height": 12, "width": 16, "mode": "squash", "interpolation": "bilinear"}
    with cuda.scope():
        there = cuda.to_device(frames)
        got = cuda.to_host(cuda_frames.transform(cuda, there[::2, 3:, 1:38:2], **options))
        assert cuda_frames.transform(cuda, there[:0], **options).shape == (0, 12, 16, 3)
    assert levels_apart(got, pictures.transform(frames[::2, 3:, 1:38:2], **options)) <= KERNEL_LEVELS


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(45, 60), (7, 3), (90, 71)])
def test_resize_equals_the_definition(cuda: Cuda, size: tuple[int, int], kind: Any) -> None:
    """Not clipped: black and white noise overshoots."""
    frames = (np.random.default_rng(8).integers(0, 2, (2, 45, 67, 3)) * 255).astype(kind)
    with cuda.scope():
        got = cuda.to_host(cuda_frames.resize(cuda, cuda.to_device(frames), *size, "bicubic"))
    expected = pictures.resize(frames, *size, "bicubic")
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=255 * FLOAT32)
    assert (got.min() < 0) == (size != (7, 3))


@pytest.mark.parametrize("standard", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("bits", "words"), [(8, False), (8, True), (10, True), (12, True), (16, True)])
@pytest.mark.parametrize(("height", "width"), [(33, 67), (2, 1), (1, 2)])
def test_yuv_to_rgb_equals_the_definition(
    cuda: Cuda, standard: str, full_range: bool, bits: int, words: bool, height: int, width: int
) -> None:
    draw = np.random.default_rng(bits)
    for full_chroma in (False, True):
        two = [random_surface(draw, height, width, bits=bits, words=words, full_chroma=full_chroma) for _ in range(2)]
        y = np.stack([surface.planes[0] for surface in two])
        uv = np.stack([np.stack(s.planes[1:], -1) if full_chroma else s.planes[1] for s in two])
        options: dict[str, Any] = {"bits": bits, "standard": standard, "full_range": full_range}
        with cuda.scope():
            got = cuda.to_host(cuda_frames.yuv_to_rgb(cuda, cuda.to_device(y), cuda.to_device(uv), **options))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, pictures.yuv_to_rgb(y, uv, **options), atol=4 * FLOAT32)


@pytest.mark.parametrize("shape", [(2, 33, 17), (1, 1, 1), (0, 4, 4)])
def test_normalise_equals_the_definition(cuda: Cuda, shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(9).integers(0, 256, (*shape, 3), np.uint8)
    with cuda.scope():
        got = cuda.to_host(cuda_frames.normalise(cuda, cuda.to_device(frames), MEAN, STD))
    expected = pictures.normalise(frames, MEAN, STD)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=2 * FLOAT32)


def exact_signals(frames: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """The definition's formulas in float64."""
    luma = frames.astype(np.float64) @ np.array([0.2126, 0.7152, 0.0722]) / 255
    inner = luma[:, 1:-1, 1:-1]
    edges = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    sharpness = edges.var((1, 2)) if edges.size else np.zeros(len(frames))
    return [sharpness, luma.mean((1, 2)), luma.std((1, 2))]


@pytest.mark.parametrize(("height", "width"), [(37, 51), (3, 3), (2, 5), (1, 1), (224, 224)])
def test_frame_signals_equal_float64(cuda: Cuda, height: int, width: int) -> None:
    draw = np.random.default_rng(height)
    frames = draw.integers(0, 256, (4, height, width, 3), np.uint8)
    frames[1] = 200  # even
    frames[2] = 250 + draw.integers(0, 2, (height, width, 1))  # bright and almost even: sums of squares would cancel
    frames[3] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    with cuda.scope():
        there = cuda.to_device(frames)
        *got, histogram = [cuda.to_host(one) for one in cuda_frames.frame_signals(cuda, there)]
        again = [cuda.to_host(one) for one in cuda_frames.frame_signals(cuda, there)]
    for mine, twice, exact in zip(got, again, exact_signals(frames), strict=False):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, exact, rtol=FLOAT32_SUM, atol=FLOAT32)
        np.testing.assert_array_equal(mine, twice)
    np.testing.assert_allclose(histogram, pictures.frame_signals(frames)[3], atol=FLOAT32)
    np.testing.assert_allclose(histogram.sum(1), 1, rtol=FLOAT32_SUM)


def test_frame_signals_of_nothing(cuda: Cuda) -> None:
    with cuda.scope():
        shapes = [
            one.shape for one in cuda_frames.frame_signals(cuda, cuda.to_device(np.zeros((0, 4, 4, 3), np.uint8)))
        ]
    assert shapes == [(0,), (0,), (0,), (0, 512)]


@pytest.mark.parametrize(("count", "other"), [(9, 9), (1, 20), (20, 1), (1, 1), (0, 0), (0, 1)])
def test_histogram_distance_equals_the_definition(cuda: Cuda, count: int, other: int) -> None:
    draw = np.random.default_rng(count)
    one, two = (draw.random((n, 512)).astype(np.float32) ** 8 for n in (count, other))
    one, two = (h / h.sum(1, keepdims=True) for h in (one, two))
    with cuda.scope():
        got = cuda.to_host(cuda_frames.histogram_distance(cuda, cuda.to_device(one), cuda.to_device(two)))
    expected = pictures.histogram_distance(one, two)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=FLOAT32_SUM)


def test_the_cases_for_the_sanitizers_run(cuda: Cuda) -> None:
    cases(cuda)


def surface_of(cuda: Cuda, frame: VideoFrame, standard: str) -> Surface:
    """A yuv420p frame as a decoder on the device would give it: NV12, rows apart."""
    planes = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
        planes.append(rows[:, : plane.width])
    turn = orientation_of(frame)
    host = Surface(
        (np.ascontiguousarray(planes[0]), np.stack(planes[1:], -1)),
        bits=8,
        standard=standard,
        full_range=False,
        display=display_size(frame, Fraction(1), turn),
        orientation=turn,
    )
    return on_device(cuda, host, gap=64)


@pytest.mark.parametrize(
    ("clip", "standard"),
    [
        ("natural/bikes.mp4", "bt601"),
        ("natural/internal_emulator_transformer_output.mp4", "bt709"),
        ("format/video_90.mov", "bt709"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_real_clips_are_near_swscale(
    cuda: Cuda, media: Callable[[str], Path], clip: str, standard: str, mode: Any
) -> None:
    with av.open(str(media(clip))) as container:
        frames = list(itertools.islice(container.decode(video=0), 3))
    wanted = ImageTransform(224, 224, mode, "bicubic", fill=40)
    expected = np.stack([Converter(wanted, Fraction(1))(frame) for frame in frames])
    surfaces = [surface_of(cuda, frame, standard) for frame in frames]
    with cuda.scope():
        found = cuda_frames.frames_from_surfaces(
            cuda, surfaces, height=224, width=224, mode=mode, interpolation="bicubic", fill=40
        )
    off = np.abs(cuda.to_host(found).astype(int) - expected)
    assert off.mean() <= SWSCALE_MEAN_LEVELS
    assert np.percentile(off, 99) <= 4  # edges of chroma
