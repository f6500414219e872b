"""Every operation of a CUDA device against its NumPy definition: checks, and one small case each.

Tests run them on the emulated and on the real device, sanitizers on the emulated one.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
from bounds import FLOAT32, FLOAT32_SUM, KERNEL_LEVELS
from numpy.typing import NDArray
from planted import degenerate, some_video, unit

from keyreel_kernels import Ops, clustering, cuda_kmeans, pictures, shift
from keyreel_kernels.clustering import STILL, Clusters, label_starts
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.cuda_kmeans import ROUNDING
from keyreel_kernels.ops import ops_on
from keyreel_kernels.surfaces import Surface

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
NAMES = [field.name for field in fields(Ops) if field.name not in ("device", "arrays")]
# Arguments that stay on the host.
_CONTROL = {"spans", "k", "offsets", "seeds"}
# A decision on change depends on a dot product of unit vectors, and on means of such.
SHIFT_MARGIN = 2 * FLOAT32


def on(cuda: Cuda, name: str, *args: Any, **options: Any) -> Any:
    """Runs an operation on the device with NumPy arrays in and out. Nothing may leave the device meanwhile."""
    parameters = inspect.signature(getattr(Ops("cpu"), name)).parameters
    given = [
        cuda.to_device(arg.copy()) if isinstance(arg, np.ndarray) and parameter not in _CONTROL else arg
        for arg, parameter in zip(args, parameters, strict=False)
    ]
    before = cuda.bytes_to_host
    found = getattr(ops_on(cuda), name)(*given, **options)
    assert cuda.bytes_to_host == before
    if isinstance(found, Clusters):
        return Clusters(*(cuda.to_host(getattr(found, field.name)) for field in fields(Clusters)))
    return tuple(map(cuda.to_host, found)) if isinstance(found, tuple) else cuda.to_host(found)


# --- pictures -----------------------------------------------------------------------------------------------------


def random_surface(
    draw: np.random.Generator,
    height: int,
    width: int,
    *,
    bits: int = 8,
    words: bool = False,
    full_chroma: bool = False,
    standard: str = "bt709",
    full_range: bool = False,
    display: tuple[int, int] | None = None,
    orientation: tuple[bool, bool, bool] = (False, False, False),
) -> Surface:
    """Noise on the host. words: uint16 for 8 bits too. display: else the coded size, turned."""
    kind = np.uint16 if words or bits > 8 else np.uint8
    half = -(-height // 2), -(-width // 2), 2
    shapes = [(height, width)] * 3 if full_chroma else [(height, width), half]
    low = 8 * np.dtype(kind).itemsize - bits
    planes = tuple((draw.integers(0, 1 << bits, shape) << low).astype(kind) for shape in shapes)
    shown = display or ((width, height) if orientation[0] else (height, width))
    return Surface(planes, bits, standard, full_range, shown, orientation)


def on_device(cuda: Cuda, surface: Surface, gap: int = 0) -> Surface:
    """The surface on the device, each row followed by `gap` samples of padding."""
    planes: list[Any] = []
    with cuda.scope():  # reshaping may copy
        for plane in surface.planes:
            rows = plane.reshape(len(plane), -1)
            padded = cuda.to_device(np.pad(rows, ((0, 0), (0, gap)), constant_values=255))
            part = padded[:, : rows.shape[1]] if gap else padded
            planes.append(part if plane.ndim == 2 else part.reshape(len(plane), -1, 2))
    return replace(surface, planes=tuple(planes))


def check_levels(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.dtype == expected.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max(initial=0) <= KERNEL_LEVELS


def check_surfaces(cuda: Cuda, surfaces: list[Surface], gap: int = 0, **options: Any) -> None:
    there = [on_device(cuda, surface, gap) for surface in surfaces]
    found = on(cuda, "frames_from_surfaces", there, **options)
    check_levels(found, pictures.frames_from_surfaces(surfaces, **options))


def check_transform(cuda: Cuda, frames: Any, **options: Any) -> None:
    check_levels(on(cuda, "transform", frames, **options), pictures.transform(frames, **options))


def check_signals(cuda: Cuda, frames: Any) -> None:
    """Against the definition's formulas in float64; two runs are equal bit by bit."""
    *found, histogram = on(cuda, "frame_signals", frames)
    again = on(cuda, "frame_signals", frames)
    luma = frames.astype(np.float64) @ np.array([0.2126, 0.7152, 0.0722]) / 255
    inner = luma[:, 1:-1, 1:-1]
    edges = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    sharpness = edges.var((1, 2)) if edges.size else np.zeros(len(frames))
    for mine, twice, exact in zip(found, again, (sharpness, luma.mean((1, 2)), luma.std((1, 2))), strict=False):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, exact, rtol=FLOAT32_SUM, atol=FLOAT32)
        np.testing.assert_array_equal(mine, twice)
    if len(frames):
        np.testing.assert_allclose(histogram, pictures.frame_signals(frames)[3], atol=FLOAT32)


def check_distance(cuda: Cuda, draw: np.random.Generator, count: int, other: int) -> None:
    one, two = (draw.random((n, 512)).astype(np.float32) ** 8 for n in (count, other))
    one, two = (h / h.sum(1, keepdims=True) for h in (one, two))
    expected = pictures.histogram_distance(one, two)
    found = on(cuda, "histogram_distance", one, two)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=FLOAT32_SUM)


# --- temporal shift -----------------------------------------------------------------------------------------------


def some_linked(draw: np.random.Generator, count: int) -> Bools:
    linked = draw.random(count) < 0.8
    linked[:1] = False
    return linked


def some_tokens(draw: np.random.Generator, count: int, places: int, columns: int, dtype: Any) -> Any:
    """Patches that move one by one, some of them still, in some frames all of them."""
    steps = draw.normal(size=(count, places, columns)) * (draw.random((count, places, 1)) < 0.5)
    steps *= draw.uniform(0, 2, (count, 1, 1)) * (draw.random((count, 1, 1)) < 0.8)
    return (draw.normal(size=(1, places, columns)) + np.cumsum(steps, axis=0)).astype(dtype)


def panned(draw: np.random.Generator, count: int, grid: tuple[int, int], columns: int, dtype: Any) -> Any:
    """[T, P, C]: a picture under a camera that moves by a patch at most, here and there with noise."""
    h, w = grid
    world = draw.normal(size=(h + 2 * count, w + 2 * count, columns))
    y, x = (count + np.cumsum(draw.integers(-1, 2, count)) for _ in range(2))
    frames = np.array([world[y[t] : y[t] + h, x[t] : x[t] + w] for t in range(count)]).reshape(count, h * w, columns)
    noise = draw.normal(size=frames.shape) * (draw.random((count, h * w, 1)) < 0.2)
    return ((frames + noise) * draw.uniform(0.5, 2, (count, h * w, 1))).astype(dtype)


def same_shot(linked: Bools, one: int, other: int) -> bool:
    return all(linked[min(one, other) + 1 : max(one, other) + 1])


def neighbour(t: int, reach: int, linked: Bools) -> int:
    """Frame t + reach, or t itself at the ends and across cuts."""
    wanted = t + reach
    return wanted if 0 <= wanted < len(linked) and same_shot(linked, t, wanted) else t


def adaptive_by_loops(
    patches: Any, grid: tuple[int, int], linked: Bools, steps: int, threshold: float
) -> tuple[I64, Bools]:
    """`adaptive_shift` in float64, [T, P]; and [T, P] bool: where it decides by less than SHIFT_MARGIN."""
    count, places = patches.shape[:2]
    e = patches.astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
    source, close = np.repeat(np.arange(count)[:, None], places, axis=1), np.zeros((count, places), bool)
    for t in range(count):
        change = np.zeros((steps, places))
        for s in range(1, min(steps, t) + 1):
            if same_shot(linked, t - s, t):
                change[s - 1] = 1 - (e[t] * e[t - s]).sum(-1)
        most = np.sort(change)[:, places - math.ceil(places / 4) :].mean(1)
        far = most - most.max() / 2
        step = next((s for s in range(steps) if far[s] >= 0), 0)
        own, half = change[step], places // 2
        for i in sorted(range(places), key=lambda i: -own[i])[:half]:
            if own[i] > threshold:  # chequerboard: the even squares look back, the odd ones ahead
                ahead = (i // grid[1] + i % grid[1]) % 2
                source[t, i] = neighbour(t, step + 1 if ahead else -step - 1, linked)
        if change.max() < threshold - SHIFT_MARGIN:
            continue  # nothing moves, whatever the step
        if most.any() and (np.abs(far[: step + 1]) < SHIFT_MARGIN).any():
            close[t] = True
        elif own.any():
            close[t] = np.abs(own - threshold) < SHIFT_MARGIN
            if half > 0:
                last, after = np.sort(own)[::-1][half - 1 : half + 1]
                edge = (last - after < SHIFT_MARGIN) & (np.abs(own - last) < SHIFT_MARGIN)
                close[t] |= edge & (own > threshold - SHIFT_MARGIN)
    return source, close


def check_adaptive_shift(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Bools, steps: int, threshold: float, *, exact: bool = False
) -> float:
    """Compares the decisions that have a margin; returns their share."""
    found = on(cuda, "adaptive_shift", patches, grid, linked, steps=steps, threshold=threshold)
    expected = shift.adaptive_shift(patches.astype(np.float32), grid, linked, steps=steps, threshold=threshold)
    assert found.dtype == np.int64
    clear = np.ones(found.shape, bool) if exact else ~adaptive_by_loops(patches, grid, linked, steps, threshold)[1]
    np.testing.assert_array_equal(np.where(clear, found, -1), np.where(clear, expected, -1))
    return float(clear.mean())


def change_by_loops(
    patches: Any, grid: tuple[int, int], linked: Bools, steps: int
) -> tuple[NDArray[np.float64], Bools]:
    """`patch_change` in float64, [T, P]; and [T] bool: where the best displacement leads by SHIFT_MARGIN or less.

    There the order of summation in float32 may decide for another displacement.
    """
    count, places = patches.shape[:2]
    height, width = grid
    e = patches.astype(np.float64)
    e /= np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
    change, close = np.zeros((count, places)), np.zeros(count, bool)
    for t in range(count):
        rows = []
        for u in range(max(t - steps, 0), min(t + steps, count - 1) + 1):
            if u == t or not same_shot(linked, t, u):
                continue
            found = []
            for dy, dx in [(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]:
                cosine = {}
                for i in range(places):
                    row, column = i // width + dy, i % width + dx
                    if 0 <= row < height and 0 <= column < width:
                        cosine[i] = float(e[t, i] @ e[u, row * width + column])
                if cosine:
                    bonus = 0.005 if dy == dx == 0 else 0.0
                    found.append((math.fsum(cosine.values()) / len(cosine) + bonus, cosine))
            still = found[0][1]
            scores = [score for score, _ in found]
            best = scores.index(max(scores))
            ranked = sorted(scores)
            close[t] |= len(ranked) > 1 and ranked[-1] - ranked[-2] <= SHIFT_MARGIN
            rows.append([min(max(1 - found[best][1].get(i, still[i]), 0.0), 2.0) for i in range(places)])
        if rows:
            change[t] = np.mean(rows, axis=0)
    return change, close


def check_patch_change(
    cuda: Cuda, patches: Any, grid: tuple[int, int], linked: Bools, steps: int, *, exact: bool = False
) -> float:
    """Compares the frames whose displacements have a margin; returns their share. exact: all frames have."""
    found = on(cuda, "patch_change", patches, grid, linked, steps=steps)
    expected = shift.patch_change(patches.astype(np.float32), grid, linked, steps=steps)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    clear = np.ones(len(found), bool) if exact else ~change_by_loops(patches, grid, linked, steps)[1]
    np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=SHIFT_MARGIN)
    assert ((found >= 0) & (found <= 2)).all()
    np.testing.assert_array_equal(found, on(cuda, "patch_change", patches, grid, linked, steps=steps))
    return float(clear.mean()) if len(clear) else 1.0


def check_equal(cuda: Cuda, name: str, *args: Any, **options: Any) -> None:
    """Equal to the definition bit by bit."""
    found, expected = on(cuda, name, *args, **options), getattr(Ops("cpu"), name)(*args, **options)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


# --- clustering ---------------------------------------------------------------------------------------------------


def as_kind(x: F32, kind: str) -> tuple[Any, F32]:
    """x as the device gets it, and the same values in float32."""
    return x.astype(kind), x.astype(kind).astype(np.float32)


def some_problems(draw: np.random.Generator, counts: list[int], width: int, most: int) -> tuple[Any, ...]:
    """x, w, spans, k and seeds: ragged videos, several K of each."""
    x, w, offsets = some_video(draw, counts, width)
    seeds, _ = clustering.seed(x, w, offsets, most)
    problems = [
        (b, k) for b in range(len(counts)) for k in sorted(set(draw.integers(1, (seeds[b] >= 0).sum() + 1, size=2)))
    ]
    spans = np.array([[offsets[b], offsets[b + 1]] for b, _ in problems])
    return x, w, spans, np.array([k for _, k in problems]), seeds[[b for b, _ in problems]]


def unclear_labels(z: Any, c: Any) -> Bools:
    """[T] bool: frames whose two best cosines are within ROUNDING."""
    cosine = np.sort(z @ c.T, axis=1)
    return cosine[:, -1] - cosine[:, -2] < ROUNDING if len(c) > 1 else np.zeros(len(z), bool)


def is_clear(z: Any, v: Any, c: Any, mu: float, margin: float, iterations: int) -> bool:
    """Whether the definition decides everything in a run by more than ROUNDING.

    That is: labels; whether a round gains more than STILL; which centroids are close, before and after their moves.
    Problems in which a cluster loses all frames are not clear.
    """
    last, before = np.inf, np.empty(0, np.int64)
    for _ in range(iterations + 1):
        labels, cosine = clustering.nearest(z, c)
        value = clustering.objective(v, cosine, c, mu, margin)
        gain = last - value
        # Whether a round that changes no label is taken does not matter.
        close_call = abs(gain - STILL) <= ROUNDING / 50 and not np.array_equal(labels, before)
        if close_call or unclear_labels(z, c).any() or len(set(labels.tolist())) < len(c):
            return False
        if gain <= STILL:
            break
        last, before = value, labels
        moved = clustering.move(z, v, c, labels, mu, margin).astype(np.float32).astype(np.float64)
        pairs = np.concatenate([c, moved])
        distance = np.abs(pairs @ pairs.T - margin)[~np.eye(len(pairs), dtype=bool)]
        if mu and len(c) > 1 and distance.min() <= ROUNDING:
            return False
        c = moved
    return True


def check_cluster(
    cuda: Cuda, x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, kind: str = "float32", **rules: Any
) -> tuple[Clusters, int]:
    """A run against the definition's, and against itself; returns it and how many problems were clear."""
    given, x = as_kind(x, kind)
    expected = clustering.cluster(x, w, spans, k, seeds, **rules)
    found: Clusters = on(cuda, "cluster", given, w, spans, k, seeds, **rules)
    for field in fields(Clusters):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert (np.diff(found.history, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.history[:, -1], found.objective)
    at, clear, margin = label_starts(spans), 0, rules["margin"]
    for m, (start, stop) in enumerate(spans):
        z, v, mu = x[start:stop].astype(np.float64), w[start:stop].astype(np.float64), rules["penalty"] / k[m]
        own, c = slice(at[m], at[m + 1]), found.centroids[m, : k[m]].astype(np.float64)
        # Seeds of halves have the length of halves; what moved is of unit length.
        assert np.abs(np.linalg.norm(c, axis=1) - 1).max() < (10 * ROUNDING if kind == "float32" else 1e-2)
        assert not found.centroids[m, k[m] :].any()
        # Labels, similarity and objective belong to the centroids.
        labels, _ = clustering.nearest(z, c)
        sure = ~unclear_labels(z, c)
        np.testing.assert_array_equal(found.labels[own][sure], labels[sure])
        assert ((found.labels[own] >= 0) & (found.labels[own] < k[m])).all()
        cosine = (z * c[found.labels[own]]).sum(1)
        np.testing.assert_allclose(found.similarity[own], cosine, atol=ROUNDING)
        scale = 1 + rules["penalty"] * k[m]
        assert abs(found.objective[m] - clustering.objective(v, cosine, c, mu, margin)) <= ROUNDING / 10 * scale
        # Unclear problems may end elsewhere, about as low; 7e-4 apart was seen.
        assert abs(found.objective[m] - expected.objective[m]) <= 2e-3 * scale
        if is_clear(z, v, x[seeds[m, : k[m]]].astype(np.float64), mu, margin, rules["iterations"]):
            clear += 1
            np.testing.assert_array_equal(found.labels[own], expected.labels[own])
            assert (np.abs(found.history[m] - expected.history[m]) <= ROUNDING / 10 * scale).all()
    return found, clear


def check_degenerate(cuda: Cuda, kind: str) -> None:
    """Seeds and runs of one of planted.DEGENERATE."""
    x, w, most = degenerate(kind)
    span, rules = np.array([[0, len(x)]]), {"penalty": 0.1, "margin": 0.8, "iterations": 50}
    for k in (1, 2, 5, 20):
        rows, gaps = on(cuda, "seed", x, w, span[0], k)
        expected, sizes = clustering.seed(x, w, span[0], k)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(gaps, sizes, atol=FLOAT32)
        count = np.array([(rows >= 0).sum()])
        assert count == min(k, most)
        found = on(cuda, "cluster", x, w, span, count, rows, **rules)
        wanted = clustering.cluster(x, w, span, count, rows, **rules)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        np.testing.assert_allclose(found.objective, wanted.objective, atol=ROUNDING / 10)


# Kinds of frames, and labels where the caller seeds the first of them twice.
SEEDED_TWICE = [(2, [0, 0, 0, 2, 2]), (3, [0, 0, 0, 2, 1])]


def check_seeded_twice(cluster: Callable[..., Clusters], kinds: int, labels: list[int]) -> None:
    """A cluster without a frame moves where it is needed or stays: no error, and J does not rise."""
    x = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, kinds - 1]]
    spans, k, seeds = np.array([[0, 5]]), np.array([3]), np.array([[0, 1, 3]])
    found = cluster(x, np.ones(5, np.float32), spans, k, seeds, penalty=0.1, margin=0.8, iterations=9)
    assert found.labels.tolist() == labels
    assert found.similarity.tolist() == [1] * 5
    assert (np.diff(found.history) <= 0).all()


def check_seeds(cuda: Cuda, x: F32, w: F32, offsets: I64, most: int, kind: str = "float32") -> None:
    given, x = as_kind(x, kind)
    rows, gaps = on(cuda, "seed", given, w, offsets, most)
    expected, sizes = clustering.seed(x, w, offsets, most)
    for b in range(len(offsets) - 1):
        # Frames equally far within rounding, or barely covered, may be taken in another order.
        same = int(np.append(rows[b] != expected[b], True).argmax())
        np.testing.assert_allclose(gaps[b, :same], sizes[b, :same], atol=FLOAT32)
        if same < most:
            np.testing.assert_allclose(gaps[b, same], sizes[b, same], atol=2 * clustering.COVERED)


def check_similarity(cuda: Cuda, x: F32, offsets: I64, kind: str = "float32") -> None:
    given, x = as_kind(x, kind)
    similarity, smooth = on(cuda, "neighbour_similarity", given, offsets)
    expected, mean = clustering.neighbour_similarity(x, offsets)
    np.testing.assert_allclose(similarity, expected, atol=FLOAT32)
    wrong = np.abs(smooth - mean).max(1) > FLOAT32
    for start, stop in itertools.pairwise(offsets):
        # Wrong only where rounding decides which neighbours are the most similar, and more so than the average.
        cosine = x[start:stop].astype(np.float64) @ x[start:stop].astype(np.float64).T
        for t in np.flatnonzero(wrong[start:stop]):
            near = [cosine[t, u] for u in range(stop - start) if u != t and abs(u - t) <= clustering.REACH] + [
                cosine.mean()
            ]
            assert np.diff(np.sort(near)).min() < FLOAT32


# --- one small case each ------------------------------------------------------------------------------------------


def case(cuda: Cuda, name: str) -> None:
    """Runs the kernels of one operation at small odd shapes, in several blocks where there may be several."""
    draw = np.random.default_rng(3)
    grid, linked = (3, 5), np.array([False, True, True, True, False, True])
    if name == "transform":
        for size, mode in ((24, "shortest"), (50, "longest"), (33, "squash")):
            frames = draw.integers(0, 256, (3, 37, 45, 3), np.uint8)
            check_transform(cuda, frames, height=size, width=24, mode=mode, interpolation="bicubic", fill=7)
    elif name == "frames_from_surfaces":
        surfaces = [
            random_surface(draw, 33, 17, orientation=(True, False, True)),
            random_surface(draw, 7, 150, bits=10, full_range=True),
            random_surface(draw, 1, 1, full_chroma=True),
            random_surface(draw, 70, 3, bits=12, full_chroma=True, orientation=(False, True, False)),
        ]
        for gap in (0, 6):
            check_surfaces(cuda, surfaces, gap, height=35, width=41, mode="longest", interpolation="bicubic")
    elif name == "frame_signals":
        check_signals(cuda, draw.integers(0, 256, (2, 37, 51, 3), np.uint8))
    elif name == "histogram_distance":
        for count, other in ((9, 9), (1, 20), (20, 1), (1, 1), (0, 0), (0, 1)):
            check_distance(cuda, draw, count, other)
    elif name == "fixed_shift":
        check_equal(cuda, name, 6, grid, linked, fraction=0.3, step=1)
    elif name == "adaptive_shift":
        for dtype, columns in ((np.float32, 19), (np.float16, 264)):
            check_adaptive_shift(cuda, some_tokens(draw, 6, 15, columns, dtype), grid, linked, 3, 0.1)
    elif name == "patch_change":
        for dtype, columns in ((np.float32, 19), (np.float16, 264)):
            check_patch_change(cuda, panned(draw, 6, grid, columns, dtype), grid, linked, 2)
    elif name == "shift_tokens":
        for dtype, columns in ((np.float32, 19), (np.float16, 264)):
            check_equal(cuda, name, some_tokens(draw, 6, 15, columns, dtype), draw.integers(6, size=(6, 13)), 2)
    elif name == "shift_pixels":
        for width in (9, 12):
            frames = draw.integers(0, 256, (6, 7, width, 3), np.uint8)
            check_equal(cuda, name, frames, draw.integers(6, size=(6, 15)), grid)
    elif name == "representatives":
        spans, k = np.array([[0, 7], [3, 600], [9, 10]]), np.array([3, 5, 1])
        labels = np.concatenate(
            [draw.integers(n, size=stop - start) for n, (start, stop) in zip(k, spans, strict=True)]
        )
        similarity = draw.choice(np.array([-0.5, -0.25, -0.0, 0.0, 0.5], np.float32), size=len(labels))  # with ties
        for part in (0.5, 0.001):
            check_equal(cuda, name, spans, k, labels, similarity, draw.random(600) < part)
    else:
        # Frames that fill no tile, a width that fills no 16 bytes, clusters that lose all frames.
        for counts, width, kind in (([37, 1], 20, "float32"), ([67], 72, "float16"), ([21], 9, "float16")):
            x, w, spans, k, seeds = some_problems(draw, counts, width, 5)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            if name == "neighbour_similarity":
                check_similarity(cuda, x, offsets, kind=kind)
            elif name == "seed":
                check_seeds(cuda, x, w, offsets, 4, kind)
            else:
                check_cluster(cuda, x, w, spans, k, seeds, kind=kind, penalty=0.5, margin=0.3, iterations=2)
        if name == "cluster":  # more centroids than shared memory holds at a time
            x, spans = unit(draw.normal(size=(40, 9))), np.array([[0, 40]])
            rules: dict[str, Any] = {"penalty": 0.5, "margin": 0.3, "iterations": 2}
            check_cluster(cuda, x, np.ones(40, np.float32), spans, np.array([37]), np.arange(40)[None], **rules)
            few = cuda_kmeans.blocks(cuda, 1, 100, 50)
            for kind, width, kib in (("float16", 64, 12), ("float32", 64, 18), ("float32", 30, 18)):
                x, w = unit(draw.normal(size=(100, width))), draw.random(100).astype(np.float32)
                seeds = np.arange(12)[None]
                with patch.object(cuda, "shared_bytes", kib << 10), patch.object(cuda_kmeans, "blocks", lambda *_: few):
                    number = cuda_kmeans.kind_of(np.empty(0, kind))
                    layout = cuda_kmeans.plan(cuda, number, width, 12, np.array([100]))
                    assert few * layout.capacity < 100  # at least three chunks
                    assert layout.picks  # warps share centroids
                    check_cluster(cuda, x, w, np.array([[0, 100]]), np.array([12]), seeds, kind=kind, **rules)
