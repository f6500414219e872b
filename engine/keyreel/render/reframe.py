"""Plans a virtual camera: the part of each frame that a reel of another shape shows.

The window is the largest one of the wanted shape that fits into the frame, or into the part of it within black bars.
So it moves along one side only. That side has BINS bins; the place of a window is its first bin. A subject map, summed
across that side, is a density m[t, u] over the bins u. Each take, the part of a span in one shot, is planned
independently:

fixed: one place for the whole take: of those that hold the most of the map, up to GAIN, the one with the least cost.
path: if moving holds more, by more than GAIN. The places p_t, one each STEP_SECONDS, with the least cost

        sum_t STEP sum_u m[t, u] min(1, ((u - c(p_t)) / REACH)^2) + TRAVEL sum_t |v_t| + EASE sum_t |v_t - v_t-1| / STEP

    with v_t = p_t - p_t-1, |v_t| <= SPEED STEP and |v_t - v_t-1| <= ACCELERATION STEP^2, inside the frame; c is the
    window's centre. The truncated square (Blake and Zisserman 1987) ignores distant mass, such as noise; the other
    terms are the L1 camera paths of Grundmann et al. 2011. The places are control points of a uniform quadratic
    B-spline: its speed and acceleration are means of their differences, so the bounds hold at any time.
fit: the whole frame before a blurred copy of itself, if the map is flat, or a second subject is far from the first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from keyreel.config import ReframeMode, aspect_ratio
from keyreel.types import F32, F64, I64, U8, Region, Shot

BINS = 128  # along the side on which the window moves
STEP_SECONDS = 0.25  # between two places of a path
SPEED = 0.375  # most sides of the frame per second
ACCELERATION = 0.5  # most sides per second^2
REACH = 0.2  # sides; mass further from the centre counts as missed
TRAVEL, EASE = 0.6, 0.6  # cost of a move by one side, and of a change of speed by one side per second
GAIN = 0.05  # share of the map that justifies a path, or a less central place
FLAT = 0.3  # of what a window cannot hold of an even map: one that is closer to it, in total variation, has no subject
RIVAL, AWAY = 0.5, 0.25  # a place AWAY windows off with RIVAL times the window's mass is a second subject
BLACK, LIT = 16, 40  # 0..255; the lines of a bar are at most BLACK, the pictures beside it mostly above LIT
LIT_SHARE = 0.25  # of the pictures that must show where a bar ends: the others may be dark
UNEVEN = 2  # lines by which two opposite bars may differ
LEAST_PICTURES, LEAST_PART = 3, 0.25  # to find bars in; of a side that is within them
BLUR_EDGE = 48  # pixels, long side of the picture that is blurred

WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
TakeMode: TypeAlias = Literal["fixed", "path", "fit"]


@dataclass(frozen=True, slots=True)
class Take:
    """How to show a span of one shot."""

    start_seconds: float
    stop_seconds: float
    mode: TakeMode
    reason: str
    controls: tuple[float, ...] = ()  # 0..1 along the window's range: one for fixed, none for fit

    def along(self, seconds: float) -> float:
        """The place of the window at a time, 0..1 of its range."""
        if len(self.controls) == 1:
            return self.controls[0]
        place = min(max((seconds - self.start_seconds) / STEP_SECONDS, 0.0), len(self.controls) - 2.0)
        first = min(int(place), len(self.controls) - 3)
        f = place - first
        before, own, after = self.controls[first : first + 3]
        return (1 - f) ** 2 / 2 * before + (0.5 + f * (1 - f)) * own + f**2 / 2 * after

    @property
    def times(self) -> tuple[float, ...]:
        """Times to record the window at: one for fixed; for a path each STEP_SECONDS and the end."""
        if len(self.controls) <= 1:
            return (self.start_seconds,) * len(self.controls)
        count = math.ceil((self.stop_seconds - self.start_seconds) / STEP_SECONDS)
        return (*(self.start_seconds + n * STEP_SECONDS for n in range(count)), self.stop_seconds)


@dataclass(frozen=True, slots=True)
class Camera:
    """The part of each frame that a reel of another shape shows."""

    aspect: str
    window: tuple[float, float]  # width and height, as fractions of the frame's
    takes: tuple[Take, ...]  # in time order
    inside: Region = WHOLE  # the part of the frame within black bars

    def region(self, seconds: float) -> Region | None:
        """The part of the frame to show at a time; None for all within the bars, before blurred sides."""
        starts = [take.start_seconds for take in self.takes]
        take = self.takes[max(bisect_right(starts, seconds + 1e-6) - 1, 0)]
        return None if take.mode == "fit" else self.region_of(take, seconds)

    def region_of(self, take: Take, seconds: float) -> Region:
        """The part of the frame that a take (fixed or path) shows at a time."""
        along, (width, height), (x, y, wide, high) = take.along(seconds), self.window, self.inside
        return x + along * (wide - width), y + along * (high - height), width, height

    def sizes(self, height: int, width: int, most: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns ((height, width) of the reel, both even; size of the whole frames to cut it from).

        Args:
            height, width: of the video's frames, in pixels. most: of the reel's shorter side.
        """
        high, wide = height * self.window[1], width * self.window[0]
        scale = min(1.0, most / min(high, wide))
        shown = max(2, round(high * scale / 2) * 2), max(2, round(wide * scale / 2) * 2)
        return shown, (max(shown[0], round(height * scale)), max(shown[1], round(width * scale)))

    def picture(self, frame: U8, seconds: float, size: tuple[int, int]) -> U8:
        """Makes the picture [h, w, 3] uint8 to show at a time.

        Args:
            frame: [H, W, 3] uint8, the whole picture. size: (h, w), see `sizes`.
        """
        region = self.region(seconds)
        if region is not None:
            return cut_out(frame, region, size)
        x, y, wide, high = self.inside
        shown = round(high * frame.shape[0]), round(wide * frame.shape[1])
        return blurred_sides(cut_out(frame, (x, y, wide, high), shown), size)


def cut_out(frame: U8, region: Region, size: tuple[int, int]) -> U8:
    """Cuts the part [h, w, 3] that begins at the region's corner out of a frame [H, W, 3]."""
    top = min(max(round(region[1] * frame.shape[0]), 0), frame.shape[0] - size[0])
    left = min(max(round(region[0] * frame.shape[1]), 0), frame.shape[1] - size[1])
    return frame[top : top + size[0], left : left + size[1]]


def blurred_sides(frame: U8, size: tuple[int, int]) -> U8:
    """Puts a frame [H, W, 3] into the middle of [h, w, 3], before a blurred copy that fills the rest."""
    whole, (height, width) = Image.fromarray(frame), size
    scale = min(height / whole.height, width / whole.width)
    inner_size = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    inner = whole.resize(inner_size, Image.Resampling.BILINEAR, reducing_gap=1.5)
    edge = BLUR_EDGE / max(size)
    small = max(2, round(width * edge)), max(2, round(height * edge))
    ground = ImageOps.fit(inner, small, Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(2))
    ground = ground.resize((width, height), Image.Resampling.BICUBIC)
    ground.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    made: U8 = np.asarray(ground)
    return made


def within_bars(pictures: Sequence[U8]) -> Region:
    """Finds the part of a video's frames within black bars, as fractions; all of them if there are no bars.

    A bar is black in all pictures, ends at a straight edge, and has one as thick on the other side. So a dark scene, or
    somebody on a black stage, is not taken for one.

    Args:
        pictures: of one size [H, W, 3], from all over the video. A line more than the bar's is cut off, which may be
            half black in a picture that was scaled down.
    """
    if len(pictures) < LEAST_PICTURES:
        return WHOLE
    light = np.stack(pictures).max(axis=3)  # [N, H, W]
    top, bottom = _bars(light)
    left, right = _bars(light[:, top : light.shape[1] - bottom].swapaxes(1, 2))
    height, width = light.shape[1:]
    return left / width, top / height, 1 - (left + right) / width, 1 - (top + bottom) / height


def _bars(light: U8) -> tuple[int, int]:
    """The lines to cut off at both ends of the first side of pictures [N, side, other side]; 0, 0 without bars."""
    lines = light.shape[1]
    lit = np.flatnonzero(light.max(axis=(0, 2)) > BLACK)
    if not len(lit):
        return 0, 0
    first, last = int(lit[0]), lines - 1 - int(lit[-1])
    if min(first, last) < 1 or abs(first - last) > UNEVEN or first + last + 2 > (1 - LEAST_PART) * lines:
        return 0, 0
    beside = np.median(light[:, [first + 1, lines - last - 2]], axis=2)  # the lines at the edges may be half black
    if np.quantile(beside, 1 - LIT_SHARE, axis=0).min() <= LIT:
        return 0, 0
    return first + 1, last + 1


def window_of(height: float, width: float, aspect: str) -> tuple[float, float]:
    """(width, height) of the largest window of a shape in a frame, as fractions of the frame's."""
    ratio = aspect_ratio(aspect) * height / width
    return min(1.0, ratio), min(1.0, 1 / ratio)


def plan_camera(
    maps: F32,
    grid: tuple[int, int],
    pts_seconds: F64,
    *,
    area: tuple[float, float, float, float],
    size: tuple[int, int],
    shots: Sequence[Shot],
    spans: Sequence[Shot],
    aspect: str,
    mode: ReframeMode = "follow",
    inside: Region = WHOLE,
) -> Camera:
    """Plans the camera of a reel.

    Args:
        maps: [T, P] float32 >= 0, see `Embedding.attention`. grid: (h, w), h * w = P.
        pts_seconds: [T] float64, rising.
        area: (left, top, right, bottom) of the maps on the frame, as fractions, see `attended_area`.
        size: (height, width) of the frames in pixels.
        shots, spans: in time order; the spans are the reel's.
        aspect: "9:16", see `OutputConfig.aspect`.
        inside: the part of the frame to show, see `within_bars`.
    """
    x, y, wide, high = inside
    window = window_of(size[0] * high, size[1] * wide, aspect)
    moves = 0 if window[0] < window[1] else 1
    within = (area[0] - x) / wide, (area[1] - y) / high, (area[2] - x) / wide, (area[3] - y) / high
    density = density_of(maps, grid, within, axis=moves)
    # Rounded down: the window's range in bins is then no smaller than in the frame, and the bounds hold there too.
    width = max(1, int(window[moves] * BINS + 1e-9))
    takes = []
    for start, stop, rows in _pieces(spans, shots, pts_seconds):
        if mode == "fit":
            takes.append(Take(start, stop, "fit", "asked for"))
            continue
        count = max(1, math.ceil((stop - start) / STEP_SECONDS - 1e-9)) + 2
        times = start + (np.arange(count) - 0.5) * STEP_SECONDS
        shown = np.clip(times, start, stop)
        chosen, reason, places = decide(_between(density[rows], pts_seconds[rows], shown), width)
        takes.append(Take(start, stop, chosen, reason, tuple((places / max(1, BINS - width)).tolist())))
    return Camera(aspect, (window[0] * wide, window[1] * high), tuple(takes), inside)


def _pieces(
    spans: Sequence[Shot], shots: Sequence[Shot], pts_seconds: F64
) -> Iterator[tuple[float, float, slice | list[int]]]:
    """Yields (start, stop, rows) for the part of each span in each shot, with the shot's sampled frames."""
    for span in spans:
        for shot in shots:
            start, stop = max(span.start_seconds, shot.start_seconds), min(span.stop_seconds, shot.stop_seconds)
            if stop - start > 1e-6:
                first, last = np.searchsorted(pts_seconds, [shot.start_seconds, shot.stop_seconds])
                nearest = int(np.abs(pts_seconds - start).argmin())
                yield start, stop, slice(int(first), int(last)) if first < last else [nearest]


def _between(rows: F64, pts_seconds: F64, times: F64) -> F64:
    """Densities at `times`, interpolated linearly between the sampled frames."""
    place = np.interp(times, pts_seconds, np.arange(len(pts_seconds)))
    low = np.minimum(place.astype(np.int64), max(len(rows) - 2, 0))
    share = (place - low)[:, None]
    found: F64 = (1 - share) * rows[low] + share * rows[np.minimum(low + 1, len(rows) - 1)]
    return found


def density_of(maps: F32, grid: tuple[int, int], area: tuple[float, float, float, float], *, axis: int) -> F64:
    """[T, BINS] float64, rows sum to 1: the share of each map in each bin of the frame's width or height.

    Args:
        maps: [T, P]. grid: (h, w). area: of the maps on the frame, as fractions; ignores parts outside the frame.
        axis: 0 for bins from left to right, 1 from top to bottom.
    """
    cells = maps.reshape(-1, *grid).sum(axis=1 + axis, dtype=np.float64)
    sums = np.concatenate([np.zeros((len(cells), 1)), cells.cumsum(axis=1)], axis=1)
    edges = np.linspace(area[axis], area[axis + 2], cells.shape[1] + 1)
    bins = np.linspace(0, 1, BINS + 1)
    found = np.diff([np.interp(bins, edges, row) for row in sums], axis=1)
    whole = found.sum(axis=1, keepdims=True)
    return np.where(whole > 1e-9, found / np.maximum(whole, 1e-9), 1 / BINS)


def decide(density: F64, width: int) -> tuple[TakeMode, str, I64]:
    """Chooses (mode, reason, places) of one take; one place for fixed, none for fit.

    Args:
        density: [K, BINS] at the control points, rows sum to 1. width: of the window in bins.
    """
    nowhere = np.empty(0, np.int64)
    if width == BINS:
        return "fixed", "nothing is cut off", np.zeros(1, np.int64)
    if np.abs(density - 1 / BINS).sum(axis=1).mean() / 2 < FLAT * (1 - width / BINS):
        return "fit", "nothing stands out", nowhere
    held, costs = _held(density, width), _costs(density, width)
    mean = held.mean(axis=0)
    still = int(np.where(mean >= mean.max() - GAIN, costs.mean(axis=0), np.inf).argmin())
    places, holds = np.full(len(density), still), mean[still]
    if holds < 1 - GAIN:
        path = least_cost_path(costs)
        holds_moving = held[np.arange(len(path)), path].mean()
        if holds_moving > holds + GAIN:
            places, holds = path, holds_moving
    ahead = np.arange(BINS) - places[:, None]
    away = np.where((ahead < -AWAY * width) | (ahead >= (1 + AWAY) * width), density, 0)
    if _held(away, width).mean(axis=0).max() > RIVAL * holds:
        return "fit", "two subjects are far apart", nowhere
    if (places == still).all():
        return "fixed", "the subject stays inside", places[:1]
    return "path", "the subject moves", places


def _held(density: F64, width: int) -> F64:
    """[K, N]: the share of each density [K, BINS] that a window at each of the N places holds."""
    sums = np.concatenate([np.zeros((len(density), 1)), density.cumsum(axis=1)], axis=1)
    held: F64 = sums[:, width:] - sums[:, : BINS + 1 - width]
    return held


def _costs(density: F64, width: int) -> F64:
    """[K, N]: the mean, over the density, of the truncated square of the distance from the window's centre."""
    centres = np.arange(BINS + 1 - width) + (width - 1) / 2
    far = (np.arange(BINS)[:, None] - centres) / (REACH * BINS)
    costs: F64 = density @ np.minimum(1.0, far**2)
    return costs


def least_cost_path(costs: F64) -> I64:
    """Finds the places [K] of the path in the module's docstring, by dynamic programming over place and speed.

    Args:
        costs: [K, N] for each control point and place.
    """
    places = costs.shape[1]
    fastest = int(SPEED * STEP_SECONDS * BINS + 1e-9)
    sharpest = int(ACCELERATION * STEP_SECONDS**2 * BINS + 1e-9)
    speeds = np.arange(-fastest, fastest + 1)[:, None]
    changes = sorted(range(-sharpest, sharpest + 1), key=abs)
    came_from = np.arange(places) - speeds  # [V, N]
    outside = (came_from < 0) | (came_from >= places)
    came_from = came_from.clip(0, places - 1)
    rows = np.arange(len(speeds))[:, None]
    ease = EASE / (BINS * STEP_SECONDS)  # of a change of speed by one bin a step
    # best[v, n]: least cost of a path to place n at speed v. A take may begin with a moving camera.
    best = np.tile(costs[0] * STEP_SECONDS, (len(speeds), 1))
    speeds_before = []  # [V, N] of each control point but the first, as rows
    for cost in costs[1:] * STEP_SECONDS:
        padded = np.pad(best, ((sharpest, sharpest), (0, 0)), constant_values=np.inf)
        eased = np.stack([padded[sharpest + c : sharpest + c + len(speeds)] + abs(c) * ease for c in changes])
        chosen = eased.argmin(axis=0)
        before = (rows + np.array(changes)[chosen])[rows, came_from]
        best = eased.min(axis=0)[rows, came_from] + TRAVEL / BINS * np.abs(speeds) + cost
        best[outside] = np.inf
        speeds_before.append(before.astype(np.int8))
    row, place = divmod(int(best.argmin()), places)
    path = [place]
    for before in reversed(speeds_before):
        row, place = int(before[row, place]), place - int(speeds[row, 0])
        path.append(place)
    return np.array(path[::-1])
