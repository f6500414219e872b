"""Key-frame clustering on a CUDA device: launches of kmeans.cu and kmeans_seed.cu; clustering.py is the definition.

x [N, D] is float16 or float32. x, w, labels, similarity and centroids are CuPy arrays; spans, k and offsets NumPy's.
Results are CuPy arrays, and nothing waits for the device.

Labels equal the definition's wherever its two best cosines differ by more than ROUNDING, and so does all that follows
from them, as long as no round gains within ROUNDING of clustering.STILL and no pair of centroids ends that close to the
margin. Where such a tie goes the other way, J differs by about ROUNDING per round.

A video with a NaN or an infinity has no seeds, which `cluster` refuses as the definition does. With seeds from
elsewhere, `objective` and `history` are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.clustering import Clusters, check_seeds, label_starts
from keyreel_kernels.cuda import Cuda, Defines, TooManyNeighbours

Array: TypeAlias = Any
I64: TypeAlias = NDArray[np.int64]

# Error of float32 sums of a few hundred products, and of what tensor cores truncate.
ROUNDING = 1e-5

HALF, FLOAT = range(2)
# As in kmeans_common.cuh and kmeans_frames.cuh.
THREADS = 512
_MOST_TILE = 32
_RECORD_BYTES = 1024
_MOST_LEAD = 32
_MOST_ROWS = 512
# Blocks of a team, and the frames that are worth so many: what each block reads of the others grows with their number.
_WORTH = {1: 1, 2: 64, 4: 128, 8: 256, 16: 2048}
# What all teams together may keep in device memory of products of pairs of centroids and sums, 56 bytes for each two.
_MOST_PAIR_BYTES = 1 << 30
# Shared memory that reductions over a block take.
_SUM_BYTES = 512


def _layout(cluster: int) -> Defines:
    """cluster: blocks in a thread-block cluster."""
    return (("CLUSTER", cluster), ("THREADS", THREADS))


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of a launch of kmeans.cu. A team is a thread-block cluster that works on one problem at a time."""

    cluster: int  # blocks of a team
    teams: int
    capacity: int  # frames in a block's shared memory: all of its own, or two chunks of them
    tile: int  # centroids in it
    work_bytes: int  # for those centroids, and for what replaces them: sums, products
    stage_bytes: int  # for columns of centroids beside the sums; 0 where the sums lie in device memory
    sums_bytes: int  # for the sums while the centroids stay, where frames are loaded in chunks
    picks: int  # places for the nearest centroid of a frame among some, where warps share the centroids; 0 for none
    shared: int  # bytes per block


def plan(cuda: Cuda, kind: int, width: int, most: int, lengths: I64) -> Plan:
    """The launch for problems of `lengths` frames, up to `most` clusters, vectors of `width`.

    A team has as few blocks as hold the longest problem in shared memory, or more if the device would be idle. Problems
    that no team holds are read again in every round, all but the two chunks that it began with.
    """
    padded, most = -(-width // 64) * 64, -(-most // 4) * 4
    tile = min(_MOST_TILE, -(-most // 8) * 8)
    while tile > 8 and 4 * tile * padded > 0.7 * cuda.shared_bytes:
        tile -= 8
    lead = 8 * _lead(most) if most <= _MOST_LEAD else 0
    work = -(-max(4 * tile * padded, lead, 16 * most) // 16) * 16
    stage = 16 * most if most <= tile else 0
    state = 24 * most if lead else 0
    fixed = _RECORD_BYTES + work + stage + state + 4 * (most + 4 + tile)
    row = padded * (4 if kind == FLOAT else 2) + 20
    whole = max(4, min(_MOST_ROWS, (cuda.shared_bytes - fixed) // row) // 4 * 4)
    size = blocks(cuda, len(lengths), int(lengths.max()), whole)
    stays = lengths.max() <= size * whole
    sums = 0
    if stage and not stays and 8 * tile * padded <= 0.7 * cuda.shared_bytes:
        sums = 4 * tile * padded
        fixed, whole = fixed + sums, (cuda.shared_bytes - fixed - sums) // row // 4 * 4
    capacity = min(-(-int(lengths.max()) // size // 4) * 4, whole)
    picks = _picks(capacity if stays else capacity // 2, tile)
    room = (cuda.shared_bytes - fixed - 12 * picks) // row // 4 * 4
    if room >= (capacity if stays else 4):
        fixed, capacity = fixed + 12 * picks, min(capacity, room)
    else:
        picks = 0
    # More columns at a time, where there is room.
    while stage and 4 * stage // most < padded // size * 16 and fixed + stage + capacity * row <= cuda.shared_bytes:
        fixed, stage = fixed + stage, 2 * stage
    teams = max(1, min(len(lengths), cuda.multiprocessors // size, _MOST_PAIR_BYTES // (size * 56 * most * most)))
    return Plan(size, teams, capacity, tile, work, stage, sums, picks, -(-(fixed + capacity * row) // 16) * 16)


def _picks(frames: int, centroids: int) -> int:
    """Places for `Plan.picks`: as `assign_rows` shares the centroids of 16 frames between warps that had none."""
    parts, warps = 1, THREADS // 32
    while 2 * parts * -(-frames // 16) <= warps and 16 * parts <= centroids:
        parts *= 2
    return parts * frames if parts > 1 else 0


def _lead(most: int) -> int:
    """Doubles that a block decides with: products, moves, bits for what is close (`Lead` in kmeans_moves.cuh)."""
    return most * (3 * most + 4 + -(-most // 32))


def bytes_a_round(plan: Plan, kind: int, width: int, k: int, frames: int, penalty: float) -> dict[str, int]:
    """What one round of one problem moves between blocks and device memory, by the kernel's arithmetic.

    A round in which no centroid is close to another: those that are make one barrier and three passes over the
    centroids more.

    Returns:
        frames: loaded again, 0 where shared memory holds all; sums: the blocks' sums, which the others read (and which
        are written first, where they lie in device memory), and S; products: of pairs of centroids and S, which every
        block reads, with the centroids they are made of; centroids: which every block reads.
    """
    padded, size, fours = -(-width // 64) * 64, plan.cluster, -(-k // 4)
    own = -(-frames // size)
    rows, chunks = 4 * k * padded, 1 if own <= plan.capacity else -(-own // (plan.capacity // 2))
    shares = plan.stage_bytes > 0 and (chunks == 1 or plan.sums_bytes > 0)
    tiles = fours * (2 * fours + 1) if penalty else 0
    pairs = 4 * k * (2 * k + 1) * (2 if penalty >= 1 else 1) if penalty else 0
    columns = (plan.stage_bytes if shares else plan.work_bytes) // (16 * fours)
    passes = max(1, -(-tiles // (THREADS // 2))) if columns < padded // size else 1
    return {
        "frames": max(0, frames - size * plan.capacity) * width * (4 if kind == FLOAT else 2),
        "sums": rows * (size if shares else 2 * size * chunks + 2),
        "products": (1 if shares else 2) * passes * rows + (pairs + 16 * k) * (size + size * size),
        "centroids": size * rows,
    }


def blocks(cuda: Cuda, number: int, longest: int, whole: int) -> int:
    """Blocks of a team for `number` problems of up to `longest` frames; a block holds `whole` frames."""
    sizes = [n for n in _WORTH if n <= cuda.most_neighbours]
    size = next((n for n in sizes if -(-longest // n) <= whole), sizes[-1])
    idle = [n for n in sizes if n * number <= cuda.multiprocessors and longest >= _WORTH[n]]
    return max([size, *idle])


def kind_of(x: Array) -> int:
    """The kernels' number for the type of x.

    Raises:
        TypeError: it is neither float16 nor float32.
    """
    if x.dtype not in (np.float16, np.float32):
        raise TypeError(f"vectors are float16 or float32, got {x.dtype}")
    return HALF if x.dtype == np.float16 else FLOAT


def cluster(
    cuda: Cuda, x: Array, w: Array, spans: I64, k: I64, seeds: Array, *, penalty: float, margin: float, iterations: int
) -> Clusters:
    """`clustering.cluster` in one launch, decided on the device from start to end.

    Args:
        seeds: [M, Kmax] int64. NumPy seeds are validated; in CuPy seeds a negative row makes J NaN.

    Returns:
        Clusters of CuPy arrays.

    Raises:
        ValueError: a problem has fewer valid seeds than clusters, no frame or no cluster.
        TypeError: x is of another type.
    """
    lengths = spans[:, 1] - spans[:, 0]
    if not len(k) or (lengths < 1).any() or (k < 1).any():
        raise ValueError("every problem needs a frame and a cluster")
    xp, kind = cuda.cupy, kind_of(x)
    count, most, width, starts = len(k), int(k.max()), int(x.shape[1]), label_starts(spans)
    if isinstance(seeds, np.ndarray):
        check_seeds(k, seeds)
    elif seeds.shape[1] < most:
        raise ValueError(f"there are {most} clusters and {seeds.shape[1]} seeds")
    total, wide = int(starts[-1]), width % 8 == 0 and x.data.ptr % 16 == 0
    x, w = xp.ascontiguousarray(x), xp.ascontiguousarray(w.astype(np.float32, copy=False))
    found = Clusters(
        xp.empty((count, most, width), np.float32),
        xp.empty(total, np.int64),
        xp.empty(total, np.float32),
        xp.empty(count, np.float64),
        xp.empty((count, iterations + 1), np.float64),
    )
    # The longest problems first, so that the last ones to finish are short.
    pieces = [np.argsort(-lengths * k, kind="stable"), spans, k, starts]
    control = cuda.to_device(np.concatenate([np.ravel(piece) for piece in pieces]).astype(np.int64))
    ends = np.cumsum([piece.size for piece in pieces]).tolist()
    rows = xp.ascontiguousarray(cuda.to_device(seeds)[:, :most])
    layout = plan(cuda, kind, width, most, lengths)
    padded, four, team = -(-width // 64) * 64, -(-most // 4) * 4, layout.cluster
    lead = _lead(four) + 3 * four if four > _MOST_LEAD else 0
    args = (
        *(x, w, *(control[end - piece.size : end] for end, piece in zip(ends, pieces, strict=True)), rows),
        *(found.centroids, found.labels, found.similarity, found.objective, found.history),
        # scratch
        xp.empty(layout.teams * ((team + 3) * four * padded + team * 8 * four * four), np.float32),
        xp.empty(layout.teams * team * (lead + 2 * four + 4), np.float64),
        xp.empty(layout.teams * (2 * four + 4), np.int32),
        xp.empty(2 * total, np.int32),
        xp.empty(2 * total, np.float32),
        xp.zeros(1, np.uint32),
        np.int64(total),
        *map(np.int32, (count, most, width, kind, wide)),
        *map(np.int32, (layout.capacity, layout.tile)),
        *map(np.int32, (layout.work_bytes, layout.stage_bytes, layout.sums_bytes, layout.picks, iterations)),
        *(np.float64(penalty), np.float64(margin)),
    )
    grid, defines = (layout.teams * team,), _layout(team)
    try:
        cuda.launch("kmeans.cu", "kmeans", grid, (THREADS,), args, shared=layout.shared, defines=defines)
    except TooManyNeighbours:
        return cluster(cuda, x, w, spans, k, seeds, penalty=penalty, margin=margin, iterations=iterations)
    return found


# --- before and after ---------------------------------------------------------------------------------------------


def _column_sums(cuda: Cuda, x: Array, w: Array, starts: Array, lengths: I64) -> Array:
    """[B, parts, D] float64: sums of w z over parts of each video."""
    parts, width = min(64, -(-int(lengths.max()) // 64)), int(x.shape[1])
    sums = cuda.cupy.empty((len(lengths), parts, width), np.float64)
    args = (x, w, starts, sums, np.int32(width), np.int32(kind_of(x)))
    cuda.launch("kmeans_seed.cu", "column_sums", (len(lengths), parts), (THREADS,), args, defines=_layout(1))
    return sums


def _frames_of(offsets: I64) -> I64:
    lengths: I64 = np.diff(offsets)
    if not len(lengths) or (lengths < 1).any():
        raise ValueError("every video needs a frame")
    return lengths


def neighbour_similarity(cuda: Cuda, x: Array, offsets: I64) -> tuple[Array, Array]:
    """`clustering.neighbour_similarity`: similarity [N] float32 and smooth [N, D] float32.

    Raises:
        ValueError: a video has no frame.
    """
    xp, lengths, (count, width) = cuda.cupy, _frames_of(offsets), x.shape
    x, starts = xp.ascontiguousarray(x), cuda.to_device(np.ascontiguousarray(offsets, np.int64))
    sums = _column_sums(cuda, x, xp.ones(count, np.float32), starts, lengths)
    typical = ((sums.sum(1) / cuda.to_device(lengths)[:, None]) ** 2).sum(1)
    similarity, smooth = xp.empty(count, np.float32), xp.empty((count, width), np.float32)
    args = (x, starts, typical, similarity, smooth, *map(np.int32, (len(lengths), width, kind_of(x))))
    grid = (-(-32 * count // THREADS),)
    cuda.launch("kmeans_seed.cu", "neighbour_similarity", grid, (THREADS,), args, defines=_layout(1))
    return similarity, smooth


def seed(cuda: Cuda, x: Array, w: Array, offsets: I64, count: int) -> tuple[Array, Array]:
    """`clustering.seed`: rows [B, count] int64 and gaps [B, count] float32.

    Raises:
        ValueError: a video has no frame.
    """
    xp, lengths, width, kind = cuda.cupy, _frames_of(offsets), int(x.shape[1]), kind_of(x)
    x, w = xp.ascontiguousarray(x), xp.ascontiguousarray(w.astype(np.float32, copy=False))
    videos, longest = len(lengths), int(lengths.max())
    starts = cuda.to_device(np.ascontiguousarray(offsets, np.int64))
    sums = _column_sums(cuda, x, w, starts, lengths)
    fixed = _SUM_BYTES + -(-width // 2) * 16 + -(-width // 4) * 16
    row = width * (4 if kind == FLOAT else 2)
    size = blocks(cuda, videos, longest, (cuda.shared_bytes - fixed) // row)
    grid = (min(videos, max(1, cuda.multiprocessors // size)) * size,)
    shared = fixed + -(-longest // size) * row
    staged = shared <= cuda.shared_bytes
    rows, gaps = xp.full((videos, count), -1, np.int64), xp.zeros((videos, count), np.float32)
    scratch = xp.empty(x.shape[0], np.float64), xp.empty(4 * grid[0], np.float64)
    wide = width % 8 == 0 and x.data.ptr % 16 == 0
    numbers = map(np.int32, (videos, count, width, kind, wide, sums.shape[1], staged))
    args, shared = (x, w, starts, sums, *scratch, rows, gaps, *numbers), shared if staged else fixed
    try:
        cuda.launch("kmeans_seed.cu", "seed", grid, (THREADS,), args, shared=shared, defines=_layout(size))
    except TooManyNeighbours:
        return seed(cuda, x, w, offsets, count)
    return rows, gaps


def representatives(cuda: Cuda, spans: I64, k: I64, labels: Array, similarity: Array, clean: Array) -> Array:
    """`clustering.representatives`: rows [M, Kmax] int64. clean: [N] bool, CuPy."""
    xp, most, lengths = cuda.cupy, int(k.max(initial=1)), spans[:, 1] - spans[:, 0]
    places, starts = (cuda.to_device(np.ascontiguousarray(a, np.int64)) for a in (spans, label_starts(spans)))
    keys = xp.zeros((len(k), most), np.uint64)
    grid = (len(k), min(64, -(-int(lengths.max()) // THREADS)))
    args = (places, starts, labels, similarity, clean, keys, np.int32(most))
    cuda.launch("kmeans_seed.cu", "representatives", grid, (THREADS,), args, defines=_layout(1))
    last = (1 << 31) - 1
    rows = (last - (keys & np.uint64(last)).astype(np.int64)) + places[:, :1]
    return xp.where(keys > 0, rows, -1)
