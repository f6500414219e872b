"""Shots: where the pictures and what they show change together; placed to the frame by a second look."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import distinct
from keyreel.errors import NoFrames
from keyreel.runtime.backend import Backend
from keyreel.types import F32, F64, Embedding, Shot
from keyreel_kernels import ops_for

# Mean plus standard deviation of the luma (0..1) below which a frame is part of a fade through black. The mean alone
# would take a starry night for black.
DARK = 0.06
# Colour histogram distance between two samples that is worth a second look: cuts between the test clips begin at 0.35,
# and a quickly turning camera reaches 0.7, so this alone decides nothing.
SUSPECT = 0.25
# In the second look a cut is one frame that differs from the one before by at least this,
JUMP = 0.15
# by this factor more than frames around it do (a moving camera changes all frames alike),
CONTRAST = 4.0
# and no frame before it is as like any frame after it (after a photographer's flash the picture comes back).
STAYS = 0.15
# Change at which a sample is a cut without a second look; lower finds more.
CUT = 0.35
# Shorter shots are joined to a neighbour.
MIN_SHOT_SECONDS = 0.5
# Seconds around the two samples that the second look covers as well, to see how much frames differ there.
MARGIN_SECONDS = 0.2
# Distance (1 - cosine) of two random frames, at least: in a video of one scene a moving hand must not look like
# another scene.
MIN_TYPICAL = 0.3
# Windows of the second look that share one pass; more would gain nothing.
TOGETHER = 256
# Frames of the second look: large enough for a colour histogram.
SMALL = ImageTransform(72, 128, mode="squash", interpolation="area")

# On the CPU: a few hundred numbers a frame.
histogram_distance = ops_for("cpu").histogram_distance


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where a shot may begin: after sample `before`, not later than sample `after`."""

    before: int
    after: int
    kind: Literal["suspect", "change", "fade"]  # maybe a cut, surely a cut or dissolve, a run of black


def find_candidates(embedding: Embedding) -> tuple[Candidate, ...]:
    """Where shots may begin, from the samples alone.

    A run of black between two pictures is a fade. Elsewhere the change at a sample decides, see `scene_change`: above
    `CUT` it is a boundary (cut or dissolve); where only the colours differ, the second look decides.
    """
    change = scene_change(embedding)
    count = len(change)
    dark = embedding.luma_mean + embedding.luma_spread < DARK
    edges = np.flatnonzero(np.diff(np.concatenate([[False], dark, [False]]).astype(np.int8))).reshape(-1, 2)
    fades = [(int(start), int(stop)) for start, stop in edges if start > 0 and stop < count]
    # Changes on the ramps into and out of the black belong to the fade.
    ramps = {t for start, stop in edges for t in range(start - 1, stop + 2)}
    found = [Candidate(start - 1, stop, "fade") for start, stop in fades]
    for t in range(1, count):
        if t in ramps:
            continue
        # A dissolve reaches over several samples: only the peak counts as one.
        peak = change[t] >= change[max(t - 1, 1)] and (t + 1 == count or change[t] > change[t + 1])
        if change[t] >= CUT and peak:
            found.append(Candidate(t - 1, t, "change"))
        elif embedding.pixel_change[t] >= SUSPECT:
            found.append(Candidate(t - 1, t, "suspect"))
    return tuple(sorted(found, key=lambda c: c.before))


def scene_change(embedding: Embedding) -> F32:
    """[T] float32 in 0..1, 0 for the first sample: how much pictures and content change.

    The geometric mean of two distances: of the colour histograms, which sees every cut but also a turning camera; and
    of the vectors, relative to the distance between two random frames of the video, which sees new content.
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
    """The time of each boundary, to the frame, in rising order; decodes all frames between the samples.

    A cut begins with the frame that jumps; a dissolve is placed where the change is greatest, a fade where it is
    darkest. Candidates of kind "suspect" without a jump are dropped; of those closer than `MIN_SHOT_SECONDS` the
    strongest stays, fades before cuts, so that the ramps of a fade do not hide its middle.
    """
    placed: list[tuple[float, float]] = []  # (strength, time)
    between = [(float(embedding.pts_seconds[c.before]), float(embedding.pts_seconds[c.after])) for c in candidates]
    windows = [(max(low - MARGIN_SECONDS, 0.0), high + MARGIN_SECONDS + 1e-3) for low, high in between]
    for candidate, (low, high), look in zip(candidates, between, _looks(source, windows, backend), strict=True):
        pts, histogram, light = look
        inside = np.flatnonzero((pts > low) & (pts <= high + 1e-6))
        inside = inside[inside > 0]  # each needs a frame to differ from
        if not len(inside):
            continue  # a damaged part need not decode the same way twice
        change = histogram_distance(histogram[1:], histogram[:-1])  # change[n]: from frame n to n + 1
        jump = int(inside[change[inside - 1].argmax()])
        if candidate.kind == "fade" or light.min() < DARK < light.max():
            # Also black that the samples missed; every window that contains it must name the same frame.
            placed.append((2.0 - float(light.min()), float(pts[light.argmin()])))
        elif candidate.kind == "change" or _is_cut(histogram, change, jump):
            placed.append((float(change[jump - 1]), float(pts[jump])))
    kept: list[float] = []
    for _, time in sorted(placed, key=lambda place: (-place[0], place[1])):
        if all(abs(time - other) >= MIN_SHOT_SECONDS for other in kept):
            kept.append(time)
    return tuple(sorted(kept))


def _is_cut(histogram: F32, change: F32, jump: int) -> bool:
    """Whether frame `jump` begins a new shot."""
    peak = change[jump - 1]
    typical = float(np.median(np.delete(change, jump - 1))) if len(change) > 1 else 0.0
    if peak < JUMP or peak < CONTRAST * typical:
        return False
    return all(histogram_distance(histogram[jump:], earlier[None]).min() >= STAYS for earlier in histogram[:jump])


Look: TypeAlias = tuple[F64, F32, F32]  # times, colour histograms and luma (mean + deviation) of a window's frames


def _looks(source: Source, windows: Sequence[tuple[float, float]], backend: Backend) -> Iterator[Look]:
    """All frames of each window, in order of their starts; many windows in one pass over the file.

    A group of pictures is then decoded once for all windows in it. A source without a timeline gets one pass for all.
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
    for pts, histogram, light in _signals(source, sampling, backend):
        for (start, stop), own in open_windows:
            if start > pts[-1]:
                break
            rows = (pts >= start) & (pts < stop)
            if rows.any():
                own.append((pts[rows], histogram[rows], light[rows]))
        while open_windows and open_windows[0][0][1] <= pts[-1]:
            yield _joined(open_windows.popleft()[1])
    yield from (_joined(own) for _, own in open_windows)


def _inside(source: Source, windows: Sequence[tuple[float, float]]) -> Sampling | None:
    """The frames of the windows, None where there are none; without a timeline all frames from first to last window."""
    timeline = source.timeline()
    if timeline is None:
        return Sampling(mode="all", start_seconds=windows[0][0], stop_seconds=max(stop for _, stop in windows))
    starts = timeline.starts
    inside = np.zeros(len(starts), bool)
    for low, high in windows:
        inside[slice(*np.searchsorted(starts, (low, high)))] = True
    return Sampling(mode="times", times=tuple(starts[inside].tolist())) if inside.any() else None


def _signals(source: Source, sampling: Sampling, backend: Backend) -> Iterator[Look]:
    ops, arrays = backend.ops, backend.ops.arrays
    with backend.open_stream(source, sampling, transform=SMALL) as stream, suppress(NoFrames):
        # Where decoding gives fewer frames than there are packets, one is repeated for those after it.
        for batch in distinct(stream):
            _, mean, spread, histogram = ops.frame_signals(arrays.to_device(batch.data))
            yield batch.pts_seconds, arrays.to_host(histogram), arrays.to_host(mean + spread)


def _joined(looks: Sequence[Look]) -> Look:
    if not looks:
        return np.empty(0), np.empty((0, 1), np.float32), np.empty(0, np.float32)
    pts, histogram, light = zip(*looks, strict=True)
    return np.concatenate(pts), np.concatenate(histogram), np.concatenate(light)


def shots_between(times: Sequence[float], *, start_seconds: float, stop_seconds: float) -> tuple[Shot, ...]:
    """Spans between the boundaries, covering [start, stop); short ones are joined to the one before."""
    edges = [start_seconds]
    for time in sorted(times):
        if time - edges[-1] >= MIN_SHOT_SECONDS and stop_seconds - time >= MIN_SHOT_SECONDS:
            edges.append(time)
    edges.append(max(stop_seconds, start_seconds))
    return tuple(Shot(low, high) for low, high in itertools.pairwise(edges))


def shot_of(shots: Sequence[Shot], pts_seconds: F64) -> NDArray[np.int64]:
    """[T] int64: the number of the shot that each time lies in."""
    starts = np.array([shot.start_seconds for shot in shots])
    return np.maximum(np.searchsorted(starts, pts_seconds, side="right") - 1, 0).astype(np.int64)
