"""Chooses key-frames: how many, which clusters, which frame of each. There is always at least one.

1. Weights: black, blank and lone flash frames weigh next to nothing, so that they get no cluster.
2. Number K: as asked, or automatic: cluster for K = 1..Kmax in one batch, without the penalty, and take the knee of the
   curve of the worst-covered frame. Kmax is at most one per second of video.
3. Clusters: spherical k-means with a diversity penalty (keyreel_kernels.clustering).
4. Frames: from each cluster, largest first, the clean frame closest to the centroid that is neither too near in time
   nor too similar to an earlier choice. A cluster without such a frame is dropped.
5. If K is automatic: no two similar key-frames from one shot, and one more for each slide. The vectors do not tell
   slides of text apart, since they describe what is seen, not what is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel.config import SelectConfig
from keyreel.shots import shot_of
from keyreel.types import F32, F64, I64, Embedding, KeyFrame, Shot
from keyreel_kernels import Ops
from keyreel_kernels.clustering import Clusters

ITERATIONS = 30  # most rounds of clustering
# Weight of frames that should get no cluster. Not 0: a video without other frames still gets a key-frame.
FAINT = 1e-3
# A lone flash is less similar to its neighbours than the median frame, by this cosine.
FLASH_GAP = 0.25
# Luma in 0..1: black if mean plus standard deviation is below (a starry night is not), white if the mean is above,
# blank if the deviation is below.
BLACK, WHITE, BLANK = 0.1, 0.97, 0.02
# A frame next to black is part of a fade if the next one is brighter by this factor.
FADE_STEP = 1.08
# Take a smaller K that comes this close to the knee, as a fraction of both axes.
NEAR_KNEE = 0.03
# A frame is covered by its key-frame if their distance (1 - cosine) is below this fraction of the distance between two
# random frames of the video, within these bounds: frames of one take are mostly closer than the lower, frames of
# different places mostly farther apart than the upper.
COVERED_FRACTION, COVERED_BOUNDS = 0.6, (0.1, 0.2)
# Smaller gaps, as a fraction of that distance, count as equal. Local optima move them by as much, and K must not depend
# on that: a CPU and a GPU, whose pictures differ by rounding, must give the same summary.
FINE = 0.3
# Most frames to find K on: all K of all frames of ten hours would take minutes and gigabytes.
SWEPT_FRAMES = 2048
SWEPT_COLUMNS = 8192
# If K is automatic: the largest cosine of two key-frames of one shot, or of two that are this near in time.
ALIKE, BESIDE_SECONDS = 0.88, 5.0
# A shot of at least this length is a slide if the median change of its layout is no larger. It is at most 0.008 in
# rendered decks, and at least 0.026 in real clips.
SLIDE_SECONDS, SLIDE_CHANGE = 2.5, 0.015
# Words of the warning, by the worst level of a key-frame, see `frame_quality`.
LEVELS = ("", "less sharp than the rest", "dark, bright or blank", "flashes of one frame")


@dataclass(frozen=True, slots=True)
class Selection:
    """The key-frames of a video, and why they may be poor."""

    keyframes: tuple[KeyFrame, ...]  # in time order, at least one
    importance: F32  # [T] float32 in 0..1
    warnings: tuple[str, ...]


def select_keyframes(
    embedding: Embedding,
    config: SelectConfig,
    ops: Ops,
    *,
    duration_seconds: float,
    shots: Sequence[Shot] = (),
    vectors: Any = None,
) -> Selection:
    """Chooses the key-frames of one video: at least one.

    Args:
        shots: in time order; () treats the video as one shot.
        vectors: [T, 2 D] float32, `embedding.joint`, if it is already on the device of `ops`.

    Raises:
        ValueError: the embedding is empty.
    """
    x = embedding.joint
    if not len(x):
        raise ValueError("there are no frames to choose from")
    arrays = ops.arrays
    with arrays.scope():
        z = arrays.to_device(x if vectors is None else vectors)
        similarity, smooth = ops.neighbour_similarity(z, np.array([0, len(x)], np.int64))
        level, quality = frame_quality(embedding, arrays.to_host(similarity), config.quality_floor)
        w = np.where(level >= 2, FAINT, 1.0).astype(np.float32)
        found, wished = _clusters(z, smooth, arrays.to_device(w), config, ops, duration_seconds)
    pts = embedding.pts_seconds
    shot = shot_of(shots, pts) if shots else np.zeros(len(x), np.int64)
    chosen = _representatives(x, pts, found, level, config, shot)
    centroids = found.centroids[0]
    if config.automatic:
        slides = _slides(embedding, shots, shot, level, {int(shot[row]) for _, row in chosen})
        slides = slides[: max(config.max_keyframes - len(chosen), 0)]
        chosen += [(len(centroids) + n, row) for n, row in enumerate(slides)]
        centroids = np.concatenate([centroids, x[slides]])
    kept = sorted(chosen, key=lambda pair: float(pts[pair[1]]))
    # Frames of dropped clusters count with the nearest remaining key-frame.
    cosine = x @ centroids[[cluster for cluster, _ in kept]].T
    fraction = np.bincount(cosine.argmax(1), weights=w, minlength=len(kept)) / w.sum()
    keyframes = tuple(
        KeyFrame(
            pts_seconds=float(pts[row]),
            frame_index=int(embedding.frame_index[row]),
            cluster=n,
            weight=float(fraction[n]),
            score=float(x[row] @ centroids[cluster]),
            quality=float(quality[row]),
            sample=int(row),
        )
        for n, (cluster, row) in enumerate(kept)
    )
    worst = max(int(level[frame.sample]) for frame in keyframes)
    warnings = [f"some key-frames are {LEVELS[worst]}: the video has no better ones there"] if LEVELS[worst] else []
    if wished is not None and len(keyframes) < wished:
        warnings.append(f"{wished} key-frames were asked for, only {len(keyframes)} frames differ enough")
    return Selection(keyframes, _importance(x, w, found), tuple(warnings))


def frame_quality(embedding: Embedding, similarity: F32, floor: float) -> tuple[I64, F32]:
    """Grades each frame.

    Args:
        similarity: [T] float32, cosine to the neighbours in time.
        floor: this fraction of the frames, the least sharp, is not clean.

    Returns:
        level [T] int64: 0 clean, 1 among the `floor` fraction of least sharp frames, 2 black, white, blank or in a fade
        from or to black, 3 a lone flash; quality [T] float32 in 0..1: rank of the sharpness, lowered by the level.
    """
    count = len(embedding)
    rank = embedding.sharpness.argsort(kind="stable").argsort(kind="stable") / max(count - 1, 1)
    # Unless all frames are about equally sharp.
    unsharp = (rank < floor) & (embedding.sharpness < 0.5 * np.median(embedding.sharpness))
    mean = embedding.luma_mean
    spread = embedding.luma_spread
    black = mean + spread < BLACK
    unexposed = black | _fading(mean + spread, black) | (mean > WHITE) | (spread < BLANK)
    flash = similarity < np.median(similarity) - FLASH_GAP
    level = np.where(flash, 3, np.where(unexposed, 2, np.where(unsharp, 1, 0))).astype(np.int64)
    quality = (1 + rank) / 2 * np.array([1.0, 0.5, 0.1, 0.05])[level]
    return level, quality.astype(np.float32)


def _fading(light: F32, black: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[T] bool: frames of a fade: next to black, each brighter than the one nearer to it."""
    fading = np.zeros(len(light), bool)
    for step in (1, -1):
        inside = False
        for t in range(len(light))[::step]:
            ahead = t + step
            if black[t]:
                inside = True
            elif inside:
                inside = 0 <= ahead < len(light) and light[ahead] > FADE_STEP * light[t]
                fading[t] |= inside
    return fading


def _clusters(
    x: Any, smooth: Any, w: Any, config: SelectConfig, ops: Ops, duration_seconds: float
) -> tuple[Clusters, int | None]:
    """Clusters one video on the device. Returns the clusters on the CPU, and the requested number, if there is one."""
    wished = config.keyframes
    if config.per_minute is not None:
        wished = max(1, round(config.per_minute * duration_seconds / 60))
    # At most one per second, unless the caller wants more.
    max_number = wished if wished is not None else min(config.max_keyframes, max(1, int(duration_seconds)))
    to_host = ops.arrays.to_host
    seeds = to_host(ops.seed(smooth, w, np.array([0, len(x)]), min(len(x), max_number))[0])
    count = max(int((seeds[0] >= 0).sum()), 1)
    weigh = {"penalty": config.penalty, "margin": config.margin, "iterations": ITERATIONS}
    if wished is None:
        count = _number(x, smooth, w, count, config, ops, weigh)
    # Of float32, on a device too. Halves move cosines by 1e-5, and two frames that are equally near their centroid are
    # told apart by less: the number of key-frames would hang on the device (7 for 5 on a clip of ten seconds).
    found = ops.cluster(x, w, np.array([[0, len(x)]]), np.array([count]), seeds, **weigh)
    return Clusters(*(to_host(getattr(found, field.name)) for field in fields(Clusters))), wished


def _number(
    x: Any, smooth: Any, w: Any, max_number: int, config: SelectConfig, ops: Ops, weigh: Mapping[str, float]
) -> int:
    """The automatic K in 1..max_number: clusters for every K in one batch, and compares their worst-covered frames.

    Of a long video it uses frames at even steps.
    """
    xp, to_host = ops.arrays.xp, ops.arrays.to_host
    even = np.unique(np.linspace(0, len(x) - 1, min(len(x), SWEPT_FRAMES)).round().astype(np.int64))
    if len(even) < len(x):
        x, smooth, w = (array[ops.arrays.to_device(even)] for array in (x, smooth, w))
    seeds = to_host(ops.seed(smooth, w, np.array([0, len(x)]), max_number)[0])
    k = np.arange(1, max(int((seeds[0] >= 0).sum()), 1) + 1)
    spans = np.repeat(np.array([[0, len(x)]]), len(k), axis=0)
    # One round, without repulsion: the seeds lie far apart already. More of either takes most of the time and finds no
    # more scenes (planted ones, joined clips); more rounds without repulsion make the number depend on rounding.
    sweep = {**weigh, "penalty": 0.0, "iterations": 1}
    found = ops.cluster(x, w, spans, k, np.repeat(seeds, len(k), axis=0), **sweep)
    # Several K in one product, within bounded memory.
    together = max(1, SWEPT_COLUMNS // seeds.shape[1])
    chosen = to_host(ops.representatives(spans, k, found.labels, found.similarity, xp.ones(len(x), bool)))
    # Smoothed frames: one noisy frame must not demand its own key-frame.
    # Another cluster of the same K replaces an empty one, which changes no maximum.
    rows = ops.arrays.to_device(np.where(chosen < 0, chosen.max(1, keepdims=True), chosen))
    worst = []
    for own in (rows[n : n + together] for n in range(0, len(rows), together)):
        cosine = (smooth @ x[own.ravel()].T).reshape(len(smooth), *own.shape).max(2)
        worst.append((w[:, None] * (1 - cosine)).max(0))
    gap = to_host(xp.concatenate(worst)).astype(np.float64)
    # "Covered" is relative to how similar the frames of this video are: the mean of 1 - <z_i, z_j> over all pairs is
    # 1 - |mean z|^2.
    typical = 1 - float(to_host((x.mean(0) ** 2).sum()))
    covered = float(np.clip(COVERED_FRACTION * typical, *COVERED_BOUNDS))
    return knee(gap, enough=1 - config.similarity_limit, covered=covered)


def knee(gap: F64, *, enough: float, covered: float) -> int:
    """Finds the number of clusters beyond which the worst-covered frame hardly improves.

    It is the point of the falling curve farthest below the chord from K = 1 to Kmax, both axes scaled to 0..1 (Satopaa
    et al. 2011, "Finding a Kneedle in a Haystack"), but not before every frame is `covered`. The mean of J would not
    do: a short scene weighs little in it, while an uncovered scene of any length shows in the worst gap.

    Args:
        gap: [Kmax] float64: 1 - cosine of the worst-covered frame to its key-frame, for K = 1..Kmax.
        enough: with this gap no further cluster is needed.
        covered: up to this gap a key-frame covers a frame.

    Returns:
        K in 1..Kmax.
    """
    curve = np.minimum.accumulate(gap)
    max_k, min_k = (
        int(found[0]) + 1 if len(found := np.flatnonzero(curve <= g)) else len(curve) for g in (enough, covered)
    )
    if max_k <= 2:
        return max_k
    if curve[-1] > 0.5 * curve[0]:
        return len(curve)  # Kmax clusters do not even halve the gap: there is no knee
    curve = np.maximum(curve, FINE * covered)
    x = np.linspace(0, 1, len(curve))
    y = (curve - curve[-1]) / (curve[0] - curve[-1])
    below = 1 - x - y
    # The first K that comes close to the knee: the smaller of two equally good summaries.
    best = int((below >= below.max() - NEAR_KNEE).argmax()) + 1
    return min(max(best, min_k), max_k)


def _representatives(
    x: F32, pts: F64, found: Clusters, level: I64, config: SelectConfig, shot: I64
) -> list[tuple[int, int]]:
    """(cluster, row) of each key-frame, from the largest cluster to the smallest."""
    labels, similarity = found.labels, found.similarity
    limit = config.similarity_limit
    beside = min(ALIKE, limit) if config.automatic else limit
    taken: list[tuple[int, int]] = []
    fallback: list[tuple[tuple[int, float], int, int]] = []
    sizes = np.bincount(labels, weights=np.where(level >= 2, FAINT, 1.0))
    for cluster in np.argsort(-sizes, kind="stable"):
        rows = np.flatnonzero(labels == cluster)
        if not len(rows):
            continue
        best_level = level[rows].min()
        # Rounded: of two frames equally near the centroid take the earlier one, on every device.
        rows = rows[np.lexsort((-similarity[rows].round(4), level[rows]))]
        fallback.append(((int(best_level), -float(similarity[rows[0]])), int(cluster), int(rows[0])))
        if best_level >= 2:
            continue  # black frames and lone flashes are not scenes
        # Only the half nearest to the centroid: a frame at the rim resembles the neighbouring cluster.
        clean = rows[level[rows] == best_level]
        for row in clean[: -(-len(clean) // 2)]:
            others = np.array([other for _, other in taken], np.int64)
            gaps = np.abs(pts[row] - pts[others])
            limits = np.where((shot[others] == shot[row]) | (gaps < BESIDE_SECONDS), beside, limit)
            if (gaps >= config.min_gap_seconds).all() and (x[others] @ x[row] <= limits).all():
                taken.append((int(cluster), int(row)))
                break
    if not taken:
        _, cluster, row = min(fallback)
        taken.append((cluster, row))
    return taken


def _slides(embedding: Embedding, shots: Sequence[Shot], shot: I64, level: I64, taken: set[int]) -> list[int]:
    """The sharpest clean frame of each slide without a key-frame, longest slides first."""
    found: list[tuple[float, int]] = []
    for number, own in enumerate(shots):
        rows = np.flatnonzero(shot == number)
        if number in taken or own.duration_seconds < SLIDE_SECONDS or len(rows) < 3:
            continue
        clean = rows[level[rows] < 2]
        if len(clean) and np.median(embedding.layout_change[rows[1:]]) <= SLIDE_CHANGE:
            found.append((-own.duration_seconds, int(clean[embedding.sharpness[clean].argmax()])))
    return [row for _, row in sorted(found)]


def _importance(x: F32, w: F32, found: Clusters) -> F32:
    """[T] float32 in 0..1: how well a frame represents its cluster, times its distance from the video's mean."""
    mean = (w[:, None] * x).sum(0)
    mean /= max(float(np.linalg.norm(mean)), 1e-12)
    raw = np.maximum(found.similarity, 0) * (1 - x @ mean) * w
    low, high = raw.min(), raw.max()
    if high - low < 1e-6:
        return np.ones(len(x), np.float32)
    scaled: NDArray[np.float32] = ((raw - low) / (high - low)).astype(np.float32)
    return scaled
