"""CUDA kernels against their NumPy definitions, parametrised over the table of operations.

The plain ring runs each kernel once; the full ring takes random shapes, every launch layout, ends, ties and nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from bounds import SWSCALE_MEAN_LEVELS
from cuda_on_host import host_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    NAMES,
    SEEDED_TWICE,
    as_kind,
    case,
    check_adaptive_shift,
    check_cluster,
    check_degenerate,
    check_equal,
    check_patch_change,
    check_seeded_twice,
    check_seeds,
    check_signals,
    check_similarity,
    check_surfaces,
    check_transform,
    on,
    on_device,
    panned,
    random_surface,
    some_linked,
    some_problems,
    some_tokens,
)
from planted import DEGENERATE, embedding_of, planted, some_video, unit

from keyreel.config import ImageTransform, SelectConfig
from keyreel.decode.color import Converter, display_size, orientation_of
from keyreel.select import select_keyframes
from keyreel_kernels import cuda_kmeans, ops_for
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.cuda_kmeans import ROUNDING
from keyreel_kernels.ops import ops_on
from keyreel_kernels.surfaces import Surface

full = pytest.mark.full
DRAWS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5))
KINDS = st.sampled_from(["float16", "float32"])
ORIENTATIONS = list(itertools.product((False, True), repeat=3))
MODES = ("shortest", "longest", "squash", "fit")
FILTERS = ("bicubic", "bilinear", "area")


@pytest.mark.parametrize("name", NAMES)
def test_each_kernel(cuda: Cuda, name: str) -> None:
    case(cuda, name)


# --- pictures -----------------------------------------------------------------------------------------------------


@full
@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_surfaces(cuda: Cuda, data: st.DataObject, seed: int) -> None:
    """Batches of any sizes, depths and standards, padded rows, every way to show them."""
    draw = np.random.default_rng(seed)
    mode = data.draw(st.sampled_from(MODES))
    surfaces = []
    for _ in range(data.draw(st.integers(1, 1 if mode == "fit" else 3))):
        surfaces.append(
            random_surface(
                draw,
                *data.draw(st.tuples(st.integers(1, 50), st.integers(1, 140))),
                bits=data.draw(st.sampled_from([8, 8, 10, 12, 16])),
                words=data.draw(st.booleans()),
                full_chroma=data.draw(st.booleans()),
                standard=data.draw(st.sampled_from(["bt601", "bt709", "bt2020"])),
                full_range=data.draw(st.booleans()),
                display=data.draw(st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90))),
                orientation=data.draw(st.sampled_from(ORIENTATIONS)),
            )
        )
    check_surfaces(
        cuda,
        surfaces,
        gap=data.draw(st.sampled_from([0, 2, 6, 16])),
        height=data.draw(st.integers(1, 70)),
        width=data.draw(st.integers(1, 70)),
        mode=mode,
        interpolation=data.draw(st.sampled_from(FILTERS)),
        fill=data.draw(st.sampled_from([0, 114, 255])),
    )


# The third: more taps than a block holds lines.
SIZES = [((1, 1), (5, 3)), ((7, 5), (61, 83)), ((3000, 4), (5, 5)), ((4, 3000), (5, 5)), ((257, 259), (64, 65))]


@full
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_sizes(cuda: Cuda, old: tuple[int, int], new: tuple[int, int], interpolation: str) -> None:
    for full_chroma in (False, True):
        surface = random_surface(np.random.default_rng(2), *old, full_chroma=full_chroma)
        options: dict[str, Any] = {"mode": "squash", "interpolation": interpolation}
        check_surfaces(cuda, [surface], 3 * full_chroma, height=new[0], width=new[1], **options)


@full
def test_full_hd_to_the_models_size(cuda: Cuda) -> None:
    surface = random_surface(np.random.default_rng(3), 1080, 1920)
    check_surfaces(cuda, [surface], 128, height=224, width=224, mode="shortest", interpolation="bicubic")


def test_a_batch_is_one_launch(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(4)
    surfaces = [random_surface(draw, 20 + n, 50 - n, bits=(8, 10)[n % 2], full_chroma=n % 3 == 0) for n in range(4)]
    launches: list[str] = []
    plain = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *args, **options: (launches.append(args[1]), plain(*args, **options)))
    options: dict[str, Any] = {"height": 24, "width": 24, "interpolation": "bilinear"}
    check_surfaces(cuda, surfaces, mode="shortest", **options)
    check_surfaces(cuda, [], mode="fit", **options)
    assert launches == ["pictures"]
    with pytest.raises(ValueError, match="several sizes"):
        check_surfaces(cuda, surfaces, mode="fit", **options)


@full
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("mode", MODES)
def test_transform(cuda: Cuda, mode: str, interpolation: str) -> None:
    for old, new in (((37, 61), (24, 24)), ((61, 37), (40, 70)), ((24, 24), (24, 24)), ((1, 9), (4, 4))):
        frames = np.random.default_rng(6).integers(0, 256, (3, *old, 3), np.uint8)
        check_transform(cuda, frames, height=new[0], width=new[1], mode=mode, interpolation=interpolation, fill=7)
        check_transform(cuda, frames[:0], height=new[0], width=new[1], mode="squash", interpolation=interpolation)


@full
@pytest.mark.parametrize(("height", "width"), [(3, 3), (2, 5), (1, 1), (224, 224)])
def test_frame_signals(cuda: Cuda, height: int, width: int) -> None:
    draw = np.random.default_rng(height)
    frames = draw.integers(0, 256, (4, height, width, 3), np.uint8)
    frames[1] = 200  # even
    frames[2] = 250 + draw.integers(0, 2, (height, width, 1))  # bright and almost even: sums of squares would cancel
    frames[3] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    check_signals(cuda, frames)
    check_signals(cuda, frames[:0])


def surface_of(cuda: Cuda, frame: VideoFrame, standard: str) -> Surface:
    """A yuv420p frame as NVDEC would give it: NV12 with padded rows."""
    rows = [np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes]
    turn = orientation_of(frame)
    planes = np.ascontiguousarray(rows[0]), np.stack(rows[1:], -1)
    return on_device(cuda, Surface(planes, 8, standard, False, display_size(frame, Fraction(1), turn), turn), gap=64)


@full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("clip", "standard"),
    [
        ("natural/bikes.mp4", "bt601"),
        ("natural/internal_emulator_transformer_output.mp4", "bt709"),
        ("format/video_90.mov", "bt709"),
    ],
)
def test_real_clips_are_near_swscale(
    cuda: Cuda, media: Callable[[str], Path], clip: str, standard: str, mode: Any
) -> None:
    with av.open(str(media(clip))) as container:
        frames = list(itertools.islice(container.decode(video=0), 3))
    expected = np.stack([Converter(ImageTransform(224, 224, mode, "bicubic", fill=40), Fraction(1))(f) for f in frames])
    surfaces = [surface_of(cuda, frame, standard) for frame in frames]
    options: dict[str, Any] = {"height": 224, "width": 224, "mode": mode, "interpolation": "bicubic", "fill": 40}
    off = np.abs(on(cuda, "frames_from_surfaces", surfaces, **options).astype(int) - expected)
    assert off.mean() <= SWSCALE_MEAN_LEVELS
    assert np.percentile(off, 99) <= 4  # edges of chroma


# --- temporal shift -----------------------------------------------------------------------------------------------


DTYPES = st.sampled_from([np.float32, np.float16])


@full
@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(1, 9), GRIDS, st.integers(1, 9), st.integers(1, 40), DTYPES)
def test_shift_and_change(
    cuda: Cuda, number: int, count: int, grid: tuple[int, int], steps: int, columns: int, dtype: Any
) -> None:
    """Grids of one row, one column, one patch; steps beyond the frames; columns that fill no 16 bytes."""
    draw = np.random.default_rng(number)
    linked, tokens = some_linked(draw, count), some_tokens(draw, count, grid[0] * grid[1], columns, dtype)
    check_adaptive_shift(cuda, tokens, grid, linked, steps, 0.1)
    check_patch_change(cuda, panned(draw, count, grid, columns, dtype), grid, linked, steps)


@full
@pytest.mark.parametrize(
    ("count", "grid", "columns", "steps", "dtype"),
    [
        (20, (3, 11), 72, 3, np.float16),
        (5, (2, 3), 1537, 4, np.float32),
        (9, (13, 17), 21, 2, np.float32),  # more patches than a block has threads
        (13, (1, 2), 768, 32, np.float16),
    ],
)
def test_most_decisions_have_a_margin(
    cuda: Cuda, count: int, grid: tuple[int, int], columns: int, steps: int, dtype: Any
) -> None:
    draw, linked = np.random.default_rng(count), np.arange(count) % 11 > 0
    tokens = some_tokens(draw, count, grid[0] * grid[1], columns, dtype)
    assert check_adaptive_shift(cuda, tokens, grid, linked, steps, 0.15) > 0.9
    assert check_patch_change(cuda, panned(draw, count, grid, columns, dtype), grid, linked, steps) > 0.9


@full
@settings(max_examples=20, deadline=None)
@given(DRAWS, st.integers(1, 8), GRIDS, st.integers(1, 4))
def test_ties_of_changes_steps_and_displacements(
    cuda: Cuda, number: int, count: int, grid: tuple[int, int], steps: int
) -> None:
    """Unit axes: each product is exactly 0 or 1, so everything ties. Patches of zeros among them."""
    draw = np.random.default_rng(number)
    axes, linked = draw.integers(3, size=(count, grid[0] * grid[1])), some_linked(draw, count)
    patches = (np.eye(3)[axes] * 2.0 ** draw.integers(-3, 4, (*axes.shape, 1))).astype(np.float32)
    patches[draw.random(axes.shape) < 0.1] = 0
    check_adaptive_shift(cuda, patches, grid, linked, steps, 0.5, exact=True)
    check_patch_change(cuda, patches, grid, linked, steps, exact=True)


@pytest.mark.parametrize(("dtype", "columns"), [(np.float32, 37), (np.float16, 40)])
@pytest.mark.parametrize(("name", "rules"), [("adaptive_shift", {"threshold": 0.1}), ("patch_change", {})])
def test_windows_with_a_halo_give_what_the_whole_gives(
    cuda: Cuda, name: str, rules: dict[str, Any], dtype: Any, columns: int
) -> None:
    """Bit by bit, with a prefix before the patches or without."""
    draw = np.random.default_rng(5)
    count, steps, size = 11, 2, 4
    tokens, linked = some_tokens(draw, count, 2 + 12, columns, dtype), np.arange(count) % 7 > 0
    whole = on(cuda, name, tokens[:, 2:], (3, 4), linked, steps=steps, **rules)
    for start in range(0, count, size):
        low, stop, high = max(start - steps, 0), min(start + size, count), min(start + size + steps, count)
        inside = linked[low:high].copy()
        inside[0] = False
        part = on(cuda, name, cuda.to_device(tokens[low:high])[:, 2:], (3, 4), inside, steps=steps, **rules)
        part += low * (name == "adaptive_shift")  # numbers of frames
        np.testing.assert_array_equal(part[start - low : stop - low], whole[start:stop])


@full
@settings(max_examples=40, deadline=None)
@given(DRAWS, st.integers(0, 20), GRIDS, st.integers(1, 7), st.integers(0, 5), st.integers(1, 40))
def test_sources_and_gathers(
    cuda: Cuda, number: int, count: int, grid: tuple[int, int], step: int, prefix: int, columns: int
) -> None:
    draw = np.random.default_rng(number)
    linked, places = some_linked(draw, count), grid[0] * grid[1]
    check_equal(cuda, "fixed_shift", count, grid, linked, fraction=float(draw.uniform(0.01, 0.5)), step=step)
    source = draw.integers(max(count, 1), size=(count, places))
    dtype = draw.choice([np.float16, np.float32])
    bits = draw.integers(256, size=(count, prefix + places, columns * np.dtype(dtype).itemsize)).astype(np.uint8)
    check_equal(cuda, "shift_tokens", bits.view(dtype), source, prefix)
    height, width = draw.integers(grid[0], 20), draw.integers(grid[1], 140)
    check_equal(cuda, "shift_pixels", draw.integers(256, size=(count, height, width, 3)).astype(np.uint8), source, grid)


# --- clustering ---------------------------------------------------------------------------------------------------

DEVICES: dict[str, dict[str, Any]] = {
    "one multiprocessor": {"sms": 1},
    "large": {"sms": 64},
    "whole": {"sms": 132},
    "small memory": {"shared_bytes": 12 << 10, "sms": 3},
    "whole, small memory": {"shared_bytes": 12 << 10, "sms": 132},
    "no clusters": {"capability": (7, 5), "sms": 3},
    "no clusters, small memory": {"capability": (7, 5), "shared_bytes": 12 << 10, "sms": 5},
}


@functools.cache
def device(name: str) -> Cuda:
    return host_cuda(**DEVICES[name])


@full
@settings(max_examples=30, deadline=None)
@given(
    DRAWS,
    st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    st.sampled_from([-1.0, 0.0, 0.5, 0.8, 1.0]),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.integers(1, 40),
    KINDS,
)
def test_cluster(
    cuda: Cuda, number: int, penalty: float, margin: float, counts: list[int], width: int, kind: str
) -> None:
    problems = some_problems(np.random.default_rng(number), counts, width, 9)
    check_cluster(cuda, *problems, kind=kind, penalty=penalty, margin=margin, iterations=8)
    # The start alone: labels and J of the seeds; and one round: a single move.
    for iterations in (0, 1):
        check_cluster(cuda, *problems, kind=kind, penalty=penalty, margin=margin, iterations=iterations)


@full
@pytest.mark.parametrize("kind", ["float16", "float32"])
@pytest.mark.parametrize(
    ("name", "counts", "blocks", "stays"),
    [
        ("one multiprocessor", [37, 90, 5], 1, True),
        ("large", [100, 70], 2, True),
        ("large", [130], 4, True),
        ("large", [300], 8, True),
        ("whole", [2050], 16, True),
        ("small memory", [450], 8, False),
        ("small memory", [900, 100], 8, False),
        ("whole, small memory", [2100], 16, False),
        ("no clusters", [61, 33, 7, 40], 1, True),
        ("no clusters, small memory", [130, 120, 90, 70], 1, False),
    ],
)
def test_every_layout(name: str, counts: list[int], blocks: int, stays: bool, kind: str) -> None:
    """Clusters of 1 to 16 blocks; frames that stay in shared memory and frames that are loaded again."""
    where, draw = device(name), np.random.default_rng(len(counts))
    number = {"float16": cuda_kmeans.HALF, "float32": cuda_kmeans.FLOAT}[kind]
    clear = total = 0
    for penalty in (0.0, 0.3):
        x, w, spans, k, seeds = some_problems(draw, counts, 24, 12)
        lengths = spans[:, 1] - spans[:, 0]
        layout = cuda_kmeans.plan(where, number, 24, int(k.max()), lengths)
        assert layout.cluster == blocks
        assert (lengths[0] <= blocks * layout.capacity) == stays
        _, sure = check_cluster(where, x, w, spans, k, seeds, kind=kind, penalty=penalty, margin=0.5, iterations=20)
        clear, total = clear + sure, total + len(k)
    assert clear >= total / 4
    check_seeds(where, *some_video(draw, counts, 24), 8, kind)


@full
def test_a_device_without_room_for_sixteen_neighbours_gets_eight() -> None:
    where, draw = host_cuda(sms=132, most_neighbours=8), np.random.default_rng(7)
    x, w, spans, k, seeds = some_problems(draw, [2050], 24, 6)
    check_cluster(where, x, w, spans[:1], k[:1], seeds[:1], penalty=0.1, margin=0.5, iterations=5)
    assert where.most_neighbours == 8
    where.most_neighbours = 16  # as a video's first kernel finds it
    check_seeds(where, x, w, spans[0], 3)
    assert where.most_neighbours == 8


@full
@pytest.mark.parametrize("most", [40, 70])
def test_few_clusters_beside_many(cuda: Cuda, most: int) -> None:
    """The problem with the most clusters decides the use of shared memory for all problems."""
    draw = np.random.default_rng(6)
    x, w = unit(draw.normal(size=(160, 24))), np.ones(160, np.float32)
    spans, k = np.array([[0, 75], [75, 160]]), np.array([32, most])
    seeds = np.full((2, most), -1)
    for m, (start, stop) in enumerate(spans):
        seeds[m, : k[m]] = start + draw.permutation(stop - start)[: k[m]]
    check_cluster(cuda, x, w, spans, k, seeds, penalty=0.5, margin=0.3, iterations=6)


@full
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_real_width(cuda: Cuda, kind: str) -> None:
    problems = some_problems(np.random.default_rng(4), [64, 33], 512, 12)
    _, clear = check_cluster(cuda, *problems, kind=kind, penalty=0.1, margin=0.8, iterations=25)
    assert clear >= 2


def test_two_runs_are_equal_bit_by_bit(cuda: Cuda) -> None:
    problems = some_problems(np.random.default_rng(6), [70, 40], 30, 8)
    rules: dict[str, Any] = {"penalty": 1.0, "margin": 0.3, "iterations": 9}
    one, two = (on(cuda, "cluster", *problems, **rules) for _ in range(2))
    for name in ("centroids", "labels", "similarity", "objective", "history"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@full
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_videos(cuda: Cuda, kind: str) -> None:
    check_degenerate(cuda, kind)


@pytest.mark.parametrize(("kinds", "labels"), SEEDED_TWICE)
def test_a_cluster_without_a_frame_moves_where_it_is_needed_or_stays(cuda: Cuda, kinds: int, labels: list[int]) -> None:
    check_seeded_twice(functools.partial(on, cuda, "cluster"), kinds, labels)


@full
@pytest.mark.parametrize("number", range(2))
def test_planted_scenes_give_the_same_keyframes(cuda: Cuda, number: int) -> None:
    x, _ = planted(number, width=48)
    one, two = (
        select_keyframes(embedding_of(x), SelectConfig(keyframes=8), ops, duration_seconds=180.0)
        for ops in (ops_for("cpu"), ops_on(cuda))
    )
    assert [frame.sample for frame in one.keyframes] == [frame.sample for frame in two.keyframes]
    assert len(one.keyframes) == 8
    np.testing.assert_allclose(one.importance, two.importance, atol=20 * ROUNDING)


@full
@settings(max_examples=25, deadline=None)
@given(DRAWS, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9), KINDS)
def test_seeds_and_similarity(cuda: Cuda, number: int, counts: list[int], width: int, most: int, kind: str) -> None:
    x, w, offsets = some_video(np.random.default_rng(number), counts, width)
    check_seeds(cuda, x, w, offsets, most, kind)
    check_similarity(cuda, x, offsets, kind)


@full
@pytest.mark.parametrize(("frames", "count", "scenes", "kind"), [(2500, 100, 60, "float32"), (5000, 16, 30, "float16")])
def test_long_videos_and_many_clusters(cuda: Cuda, frames: int, count: int, scenes: int, kind: str) -> None:
    """Sizes at which sums are long and the frames do not fit into shared memory."""
    draw = np.random.default_rng(frames)
    centre = draw.normal(size=(scenes, 64))
    x = unit(centre[draw.integers(0, scenes, frames)] + 0.6 * draw.normal(size=(frames, 64)))
    w = draw.random(frames).astype(np.float32) + np.float32(0.1)
    given, x = as_kind(x, kind)
    seeds, _ = ops_for("cpu").seed(x, w, np.array([0, frames]), count)
    np.testing.assert_array_equal(on(cuda, "seed", given, w, np.array([0, frames]), count)[0], seeds)
    problem = (w, np.array([[0, frames]]), np.array([count]), seeds)
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 30}
    want, found = ops_for("cpu").cluster(x, *problem, **rules), on(cuda, "cluster", given, *problem, **rules)
    assert len(np.unique(want.history)) > 5  # rounds
    np.testing.assert_array_equal(found.labels, want.labels)
    np.testing.assert_allclose(found.objective, want.objective, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_have_no_seeds(cuda: Cuda, bad: float) -> None:
    x, w = unit(np.random.default_rng(0).normal(size=(12, 6))), np.ones(12, np.float32)
    for weight in (1.0, 0.0):
        x[7, 2], w[7] = bad, weight
        with np.errstate(invalid="ignore"):
            expected, _ = ops_for("cpu").seed(x, w, np.array([0, 5, 12]), 3)
        rows, _ = on(cuda, "seed", x, w, np.array([0, 5, 12]), 3)
        np.testing.assert_array_equal(rows, expected)
        assert (rows[0] >= 0).all()
        assert (rows[1] == -1).all()
    given = cuda.to_device(np.array([[0, 7]]))  # seeds on the device are not checked: J is NaN
    found = on(cuda, "cluster", x, w, np.array([[0, 12]]), np.array([2]), given, penalty=0.1, margin=0.8, iterations=3)
    assert np.isnan(found.objective).all()


def test_invalid_problems_are_refused(cuda: Cuda) -> None:
    x, w = np.eye(3, 4, dtype=np.float32), np.ones(3, np.float32)
    span, one, seeds = np.array([[0, 3]]), np.array([1]), np.array([[0, 1, -1]])
    rules: dict[str, Any] = {"penalty": 0.1, "margin": 0.8, "iterations": 3}
    with pytest.raises(ValueError, match="3 clusters and 2 valid seeds"):
        on(cuda, "cluster", x, w, span, np.array([3]), seeds, **rules)
    with pytest.raises(ValueError, match="needs a frame"):
        on(cuda, "cluster", x, w, np.array([[1, 1]]), one, seeds, **rules)
    with pytest.raises(ValueError, match="needs a frame"):
        on(cuda, "seed", x, w, np.array([0, 0, 3]), 2)
    with pytest.raises(TypeError, match="float64"):
        on(cuda, "cluster", x.astype(np.float64), w, span, one, seeds, **rules)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([((7, 5), 64), ((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)]),
    st.integers(1, 200),
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.lists(st.integers(1, 1_000_000), min_size=1, max_size=20),
    st.integers(0, 2),
)
def test_launches_fit_the_device(
    card: tuple[tuple[int, int], int], sms: int, width: int, most: int, counts: list[int], kind: int
) -> None:
    where = host_cuda(capability=card[0], shared_bytes=card[1] << 10, sms=sms)
    layout = cuda_kmeans.plan(where, kind, width, most, np.array(counts))
    assert layout.shared <= where.shared_bytes
    assert 1 <= layout.teams <= max(1, min(len(counts), sms // layout.cluster))
    assert layout.capacity >= 4
    assert layout.tile % 8 == 0 < layout.tile <= 32
    assert layout.cluster == 1 or card[0] >= (9, 0)
    # 600 frames of 512 halves stay in the memory of four blocks; a single video gets eight, a long one 16 and chunks.
    large = host_cuda(sms=132)
    many, one = (cuda_kmeans.plan(large, cuda_kmeans.HALF, 512, 32, np.full(n, 600)) for n in (256, 1))
    assert (many.cluster, many.teams, many.capacity, one.cluster, one.capacity) == (4, 33, 152, 8, 76)
    long = cuda_kmeans.plan(large, cuda_kmeans.HALF, 512, 32, np.array([3000]))
    assert (long.cluster, long.capacity, long.picks) == (16, 92, 4 * 46)
    again = cuda_kmeans.bytes_a_round(long, cuda_kmeans.HALF, 512, 32, 3000, 0.1)["frames"]
    assert again == (3000 - 16 * 92) * 512 * 2
    # The sums of four blocks: three parts are read by another block, the total is written once and read by all.
    moved = cuda_kmeans.bytes_a_round(many, cuda_kmeans.HALF, 512, 32, 600, 0.1)
    assert (moved["frames"], moved["sums"], moved["centroids"]) == (0, 4 * 65536, 4 * 65536)
    assert sum(moved.values()) <= 1.3 * 600 * 512 * 2
