"""Finds shots: where one take ends and the next begins.

Between some samples the colours, the layout or the content differ. There, a second look decodes all frames and decides.
A cut is a step between two frames that moving blocks do not explain, much larger than the steps around it, and after
which the picture does not return, as it does after a flash. A dissolve is a run of frames that mix its two ends. A fade
is a run of black.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import distinct
from keyreel.errors import NoFrames
from keyreel.runtime.backend import Backend
from keyreel.types import F32, F64, Embedding, Shot

# A frame is black, part of a fade, if mean plus standard deviation of its luma (0..1) are lower. By the mean alone, a
# starry night would be black.
DARK = 0.06
# What calls for a second look between two samples: a colour histogram distance,
COLOURS = 0.15
# a change of content (see `scene_change`),
CONTENT = 0.2
# or a change of layout this many times as large as around it, as with slides.
LAYOUT, STANDS_OUT = 0.08, 3.0
# A step is a cut if it leaves this unexplained, see `unexplained`,
UNEXPLAINED = 0.1
# this many times as much as any step around it, with NOISE added to those,
CONTRAST, NOISE = 2.0, 0.02
# and the product of both is this or more: little that changes while all else is still, or all while much moves.
EVIDENCE = 0.6
# Frames before and after the step leave at least this share of that unexplained, else the picture returned.
STAYS = 0.5
# The frames of a dissolve differ from mixtures of its ends by at most this share of the ends' difference; by less if
# the ends, which leave this unexplained, have something in common.
MIXTURE, ENDS = 0.22, 0.45
# Mixtures of strangers are flatter: the variance of the middle frame is such a share of the ends', half of it at least
# but for noise.
FLATTER = (0.4, 0.85)
# Mixtures as exact as this, between ends that leave this unexplained, are dissolves of slides, if all is so still on
# both sides; else it may be a title that appears in the picture.
EXACT, SLIDES, STILL = 0.01, 0.18, 0.03
# Join shorter shots to a neighbour.
MIN_SHOT_SECONDS = 0.5
# The second look also covers these seconds around the two samples: to compare, and for dissolves.
MARGIN_SECONDS, DISSOLVE_SECONDS = 0.2, 0.6
# Lower bound of the distance (1 - cosine) of two random frames: in a video of one scene, a moving hand must not look
# like a new scene.
MIN_TYPICAL = 0.3
# Windows of the second look in one pass over the file; more gain nothing.
TOGETHER = 256
# Frames of the second look, and the blocks and how far they may move from one frame to the next, in pixels of it.
SMALL = ImageTransform(72, 128, mode="squash", interpolation="area")
BLOCK, REACH = 8, 8
# Steps on each side to compare a cut with, and frames on each side to which the picture may return.
AROUND, BACK = 4, (0, 2, 4)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# Half lengths of the dissolves to try.
_HALVES_SECONDS = (0.24, 0.4, 0.6)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where a shot may begin: after sample `before`, at the latest with sample `after`."""

    before: int
    after: int
    kind: Literal["suspect", "change", "fade"]  # a cut or nothing; a cut, a dissolve or nothing; a fade


def find_candidates(embedding: Embedding) -> tuple[Candidate, ...]:
    """Finds where shots may begin, from the samples alone.

    A run of black between two pictures is a fade. `place_boundaries` decides about all others.
    """
    content = scene_change(embedding)
    count = len(content)
    dark = embedding.luma_mean + embedding.luma_spread < DARK
    edges = np.flatnonzero(np.diff(np.concatenate([[False], dark, [False]]).astype(np.int8))).reshape(-1, 2)
    fades = [(int(start), int(stop)) for start, stop in edges if start > 0 and stop < count]
    # The ramps into and out of the black belong to the fade.
    ramps = {t for start, stop in edges for t in range(start - 1, stop + 2)}
    found = [Candidate(start - 1, stop, "fade") for start, stop in fades]
    layout = _stands_out(embedding.layout_change)
    for t in range(1, count):
        if t in ramps:
            continue
        if content[t] >= CONTENT or layout[t]:
            found.append(Candidate(t - 1, t, "change"))
        elif embedding.pixel_change[t] >= COLOURS:
            found.append(Candidate(t - 1, t, "suspect"))
    return tuple(sorted(found, key=lambda c: c.before))


def _stands_out(change: F32) -> NDArray[np.bool_]:
    """[T] bool: whether the layout changes much more than at the samples around."""
    padded = np.pad(change, AROUND, mode="reflect" if len(change) > AROUND else "edge")
    around = np.delete(sliding_window_view(padded, 2 * AROUND + 1), AROUND, axis=1)
    found: NDArray[np.bool_] = (change >= LAYOUT) & (change >= STANDS_OUT * np.median(around, axis=1))
    return found


def scene_change(embedding: Embedding) -> F32:
    """[T] float32 in 0..1: how much picture and content change from the sample before; 0 for the first.

    It is the geometric mean of two distances. That of the colour histograms rises at every cut, but also with a panning
    camera. That of the vectors, relative to two random frames of the video, rises with new content.
    """
    z = embedding.vectors
    step = np.zeros(len(z), np.float32)
    step[1:] = 1 - (z[1:] * z[:-1]).sum(1)
    # The mean of 1 - <z_i, z_j> over all pairs is 1 - |mean z|^2.
    typical = max(1 - float((z.mean(0) ** 2).sum()), MIN_TYPICAL)
    change: F32 = np.sqrt(embedding.pixel_change * np.clip(step / typical, 0, 1)).astype(np.float32)
    return change


def place_boundaries(
    source: Source, embedding: Embedding, candidates: Sequence[Candidate], backend: Backend
) -> tuple[float, ...]:
    """Decodes all frames around the candidates, and finds the boundaries.

    Returns their times in seconds, rising, each that of a frame. A cut lies at its first new frame, a dissolve at its
    middle, a fade at its darkest frame. Candidates that are none of these are dropped. Of boundaries closer than
    `MIN_SHOT_SECONDS` the strongest stays; fades come before cuts, so that the ramps of a fade do not hide its middle.
    """
    placed: list[tuple[float, float]] = []  # (strength, time)
    between = [(float(embedding.pts_seconds[c.before]), float(embedding.pts_seconds[c.after])) for c in candidates]
    margins = [DISSOLVE_SECONDS if c.kind == "change" else MARGIN_SECONDS for c in candidates]
    windows = [
        (max(low - margin, 0.0), high + margin + 1e-3) for (low, high), margin in zip(between, margins, strict=True)
    ]
    for candidate, (low, high), (pts, luma) in zip(candidates, between, _looks(source, windows, backend), strict=True):
        inside = np.flatnonzero((pts > low) & (pts <= high + 1e-6))
        inside = inside[inside > 0]  # the first frame of a window has none to differ from
        if not len(inside):
            continue  # a damaged part may decode differently the second time
        light = luma.mean((1, 2)) + luma.std((1, 2))
        if candidate.kind == "fade" or light.min() < DARK < light.max():
            # Also black that no sample hit. Every window that contains it must give the same frame.
            placed.append((2.0 - float(light.min()), float(pts[light.argmin()])))
            continue
        pictures = _normalised(luma)
        if (cut := _cut(pictures, inside)) is not None:
            placed.append((cut[0], float(pts[cut[1]])))
        elif candidate.kind == "change" and (place := _dissolve(luma, pictures, inside, pts)) is not None:
            placed.append((0.0, float(pts[place])))
    kept: list[float] = []
    for _, time in sorted(placed, key=lambda place: (-place[0], place[1])):
        if all(abs(time - other) >= MIN_SHOT_SECONDS for other in kept):
            kept.append(time)
    return tuple(sorted(kept))


def _normalised(luma: F32) -> F32:
    """Subtracts the mean and divides by the deviation of each frame, so that exposure does not count as change."""
    mean, deviation = luma.mean((1, 2), keepdims=True), luma.std((1, 2), keepdims=True)
    return np.asarray((luma - mean) / (deviation + 0.03), np.float32)


def _cut(pictures: F32, inside: NDArray[np.int64]) -> tuple[float, int] | None:
    """(strength in 0..1, number of its first frame) of the cut among the frames `inside`, or None."""
    change = np.abs(np.diff(pictures, axis=0)).mean((1, 2))  # change[n]: from frame n to n + 1, motion included
    at = int(inside[change[inside - 1].argmax()])
    step = unexplained(pictures[at - 1], pictures[at])
    if step < UNEXPLAINED:
        return None
    most = 0.0
    for other in sorted(range(max(1, at - AROUND), min(len(pictures), at + AROUND + 1)), key=lambda n: -change[n - 1]):
        if other == at:
            continue
        most = max(most, unexplained(pictures[other - 1], pictures[other]))
        contrast = step / (most + NOISE)
        if contrast < CONTRAST or contrast * step < EVIDENCE:
            return None
    for back, ahead in itertools.product(BACK, BACK):
        before, after = at - 1 - back, at + ahead
        if before < 0 or after >= len(pictures) or back + ahead == 0:
            continue
        if unexplained(pictures[before], pictures[after]) < STAYS * step:
            return None
    return min(step, 1.0), at


def unexplained(one: F32, other: F32) -> float:
    """Fraction of two frames that moved blocks of the one do not explain in the other; about 1 for unrelated frames.

    It looks for each block of 8 x 8 pixels within 8 pixels of its place, first at half the size. The result is the
    remaining difference, both ways, divided by the mean magnitude of both frames.

    Args:
        one, other: [72, 128] float32, luma without mean and deviation.
    """
    left = _left(one, other) + _left(other, one)
    return float(left / max(np.abs(one).sum() + np.abs(other).sum(), 1e-6))


def _left(one: F32, other: F32) -> float:
    """Sum of the differences between the blocks of `other` and the best fits for them in `one`."""
    rows, columns, half, reach = one.shape[0] // BLOCK, one.shape[1] // BLOCK, BLOCK // 2, REACH // 2
    small_one, small_other = (_sums(x, 2) / 4 for x in (one, other))
    views = sliding_window_view(np.pad(small_one, reach, mode="edge"), small_other.shape)
    steps = 2 * reach + 1
    moved, found = np.empty(views.shape[1:], np.float32), np.empty((steps, steps, rows, columns), np.float32)
    for down in range(steps):  # one row of places at a time fits into the cache
        np.abs(np.subtract(views[down], small_other, out=moved), out=moved)
        found[down] = _sums(moved, half)
    best = np.divmod(found.reshape(-1, rows, columns).argmin(0), steps)
    top, left = (np.arange(count) * BLOCK + REACH for count in (rows, columns))
    wide = sliding_window_view(np.pad(one, REACH + 1, mode="edge"), (BLOCK + 2, BLOCK + 2))
    around = wide[top[:, None] + 2 * (best[0] - reach), left + 2 * (best[1] - reach)]
    blocks = other.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
    fits = [
        np.abs(around[..., y : y + BLOCK, x : x + BLOCK] - blocks).reshape(rows, columns, -1).sum(-1)
        for y, x in itertools.product(range(3), repeat=2)
    ]
    return float(np.minimum.reduce(fits).sum())


def _sums(values: F32, size: int) -> F32:
    """[..., H / size, W / size]: sums over blocks of [..., H, W].

    By slices, since NumPy's sum is slow over few numbers.
    """
    across = reduce(np.add, (values[..., n::size] for n in range(size)))
    down: F32 = reduce(np.add, (across[..., n::size, :] for n in range(size)))
    return down


def _dissolve(luma: F32, pictures: F32, inside: NDArray[np.int64], pts: F64) -> int | None:
    """The middle of a run of frames that mix its two ends, if the ends differ; None without one."""
    flat = luma.reshape(len(luma), 18, 4, 32, 4).mean((2, 4)).reshape(len(luma), -1)
    step = float(np.median(np.diff(pts)))
    found: list[tuple[float, int, int]] = []
    for half in {max(2, round(seconds / step)) for seconds in _HALVES_SECONDS}:
        for middle in inside[(inside >= half) & (inside + half < len(luma))].tolist():
            run = flat[middle - half : middle + half + 1] - flat[middle - half]
            whole = run[-1]
            size = float(whole @ whole)
            if size < 1e-5 * len(whole):
                continue
            share = run @ whole / size
            quarters = [half // 2, half, 2 * half - half // 2]
            away = ((run[quarters] - share[quarters, None] * whole) ** 2).sum(1).max() / size
            if away <= MIXTURE and 0.3 < share[half] < 0.7:
                found.append((float(away), middle, half))
    for away, middle, half in sorted(found):
        first, last, beside = middle - half, middle + half, max(1, half // 2)
        variance = luma[middle].var() / max((luma[first].var() + luma[last].var()) / 2, 1e-9)
        flatter = FLATTER[0] <= variance <= FLATTER[1]
        if not flatter and away > EXACT:
            continue  # `unexplained` costs 2 ms
        ends = unexplained(pictures[first], pictures[last])
        if flatter and ends >= ENDS and away <= MIXTURE * ends:
            return middle
        if away <= EXACT and ends >= SLIDES:
            sides = [(first - beside, first), (last, last + beside)]
            inner = [(pictures[a], pictures[b]) for a, b in sides if a >= 0 and b < len(pictures)]
            if inner and all(unexplained(*pair) <= STILL for pair in inner):
                return middle
    return None


Look: TypeAlias = tuple[F64, F32]  # times [n] and luma [n, 72, 128] in 0..1 of the frames of a window


def _looks(source: Source, windows: Sequence[tuple[float, float]], backend: Backend) -> Iterator[Look]:
    """Yields all frames of each window, in order of their starts; several windows in one pass over the file.

    So a group of pictures is decoded once for all windows in it. A source without a timeline gets one pass for all.
    """
    step = TOGETHER if source.timeline() is not None else max(len(windows), 1)
    for first in range(0, len(windows), step):
        yield from _one_pass(source, windows[first : first + step], backend)


def _one_pass(source: Source, windows: Sequence[tuple[float, float]], backend: Backend) -> Iterator[Look]:
    sampling = _inside(source, windows)
    if sampling is None:
        yield from (_joined([]) for _ in windows)
        return
    open_windows = deque((window, list[Look]()) for window in windows)
    for pts, luma in _signals(source, sampling, backend):
        for (start, stop), own in open_windows:
            if start > pts[-1]:
                break
            rows = (pts >= start) & (pts < stop)
            if rows.any():
                own.append((pts[rows], luma[rows]))
        while open_windows and open_windows[0][0][1] <= pts[-1]:
            yield _joined(open_windows.popleft()[1])
    yield from (_joined(own) for _, own in open_windows)


def _inside(source: Source, windows: Sequence[tuple[float, float]]) -> Sampling | None:
    """The sampling of the windows, None if they hold no frame; without a timeline, all from the first to the last."""
    timeline = source.timeline()
    if timeline is None:
        return Sampling(mode="all", start_seconds=windows[0][0], stop_seconds=max(stop for _, stop in windows))
    starts = timeline.starts
    inside = np.zeros(len(starts), bool)
    for low, high in windows:
        inside[slice(*np.searchsorted(starts, (low, high)))] = True
    return Sampling(mode="times", times=tuple(starts[inside].tolist())) if inside.any() else None


def _signals(source: Source, sampling: Sampling, backend: Backend) -> Iterator[Look]:
    arrays = backend.ops.arrays
    with backend.open_stream(source, sampling, transform=SMALL) as stream, suppress(NoFrames):
        # If decoding gives fewer frames than packets, a frame is repeated for those after it.
        for batch in distinct(stream):
            # Only eight bits of luma leave the device: 9 KiB a frame.
            luma = arrays.to_device(batch.data).astype(np.float32) @ arrays.to_device(LUMA)
            shown: F32 = np.divide(arrays.to_host((luma + 0.5).astype(np.uint8)), 255, dtype=np.float32)
            yield batch.pts_seconds, shown


def _joined(looks: Sequence[Look]) -> Look:
    if not looks:
        return np.empty(0), np.empty((0, SMALL.height, SMALL.width), np.float32)
    pts, luma = zip(*looks, strict=True)
    return np.concatenate(pts), np.concatenate(luma)


def shots_between(times: Sequence[float], *, start_seconds: float, stop_seconds: float) -> tuple[Shot, ...]:
    """Cuts [start, stop) at the boundaries; joins shots shorter than `MIN_SHOT_SECONDS` to the one before."""
    edges = [start_seconds]
    for time in sorted(times):
        if time - edges[-1] >= MIN_SHOT_SECONDS and stop_seconds - time >= MIN_SHOT_SECONDS:
            edges.append(time)
    edges.append(max(stop_seconds, start_seconds))
    return tuple(Shot(low, high) for low, high in itertools.pairwise(edges))


def shot_of(shots: Sequence[Shot], pts_seconds: F64) -> NDArray[np.int64]:
    """[T] int64: the number of the shot that contains each time."""
    starts = np.array([shot.start_seconds for shot in shots])
    return np.maximum(np.searchsorted(starts, pts_seconds, side="right") - 1, 0).astype(np.int64)
