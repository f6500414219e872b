"""Key-frame clustering on a CUDA device: launches of kmeans.cu and kmeans_seed.cu; clustering.py is the definition.

x [N, D] is float16, float32, or bfloat16 as ml_dtypes has it or as uint16 bits; x, w, labels, similarity, centroids
are CuPy arrays, spans, k and offsets NumPy's. Results are CuPy arrays and nothing waits for the device.

Labels equal the definition's wherever its two best cosines differ by more than ROUNDING, and so does all that follows
from them, as long as no round gains within ROUNDING of clustering.STILL and no pair of centroids rests that near the
margin. Where such a tie falls the other way J differs by the order of ROUNDING, once a round.

A NaN or an infinity in a video leaves it without seeds, which `cluster` refuses with the reference's ValueError. Where
seeds come from elsewhere, J is NaN: in `objective` and `history`, which the caller brings down anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel_kernels.clustering import Clusters, label_starts
from keyreel_kernels.cuda import Cuda, Defines

Array: TypeAlias = Any
I64: TypeAlias = NDArray[np.int64]

# float32 sums of a few hundred products, and what tensor cores cut off them.
ROUNDING = 1e-5

HALF, BFLOAT, FLOAT = range(3)
CLUSTER, ASSIGN, OBJECTIVE, UPDATE, RELOCATE = range(5)
# As in kmeans_common.cuh and kmeans_frames.cuh.
THREADS = 512
_MOST_TILE = 32
_RECORD_BYTES = 1024
_MOST_LEAD = 32
_MOST_ROWS = 512
# Beyond this one problem at a time has the whole device.
_MOST_SHARED_CLUSTERS = 64
# What sums over a block take of its shared memory.
_SUM_BYTES = 512


def _layout(cluster: int) -> Defines:
    """Blocks in a thread-block cluster; 0: all blocks of the device are one team."""
    return (("CLUSTER", max(cluster, 1)), ("GRID", int(not cluster)), ("THREADS", THREADS))


_ALL = [_layout(cluster) for cluster in (1, 2, 4, 8, 0)]
VARIANTS: dict[str, list[Defines]] = {"kmeans.cu": _ALL, "kmeans_seed.cu": _ALL}


@dataclass(frozen=True, slots=True)
class Plan:
    """How one launch of kmeans.cu is laid out."""

    cluster: int  # blocks in a thread-block cluster, 0: all blocks of the device work on one problem
    blocks: int  # that work on one problem
    teams: int  # of so many blocks
    capacity: int  # frames in a block's shared memory
    tile: int  # centroids there
    work_bytes: int  # for those, and for what takes their place between the products
    slices: int  # blocks of a team that multiply pairs of centroids
    shared: int  # bytes a block


def plan(cuda: Cuda, kind: int, width: int, most: int, lengths: I64, *, long: bool) -> Plan:
    """The launch for problems of `lengths` frames, up to `most` clusters, vectors of `width`.

    Short problems stay in shared memory, in as few blocks as hold them, or in more where the device would be idle.
    `long`: no cluster holds them, so that all blocks work on one at a time and read it once a round.
    """
    padded, most = -(-width // 64) * 64, -(-most // 4) * 4
    tile = min(_MOST_TILE, -(-most // 8) * 8)
    while tile > 8 and 4 * tile * padded > 0.7 * cuda.shared_bytes:
        tile -= 8
    lead = 8 * (3 * most * most + 2 * most) if most <= _MOST_LEAD else 0
    work = -(-max(4 * tile * padded, lead, 32 * most) // 16) * 16
    fixed = _RECORD_BYTES + work + 4 * (most + 4 + tile)
    row = padded * (4 if kind == FLOAT else 2) + 20
    whole, longest = max(4, min(_MOST_ROWS, (cuda.shared_bytes - fixed) // row) // 4 * 4), int(lengths.max())
    if long:
        capacity, size, teams = whole, 0, 1
        # Few clusters' sums, or many frames, are worth a block.
        blocks = max(1, min(cuda.multiprocessors, -(-longest // 16), max(8, (1 << 16) // most)))
        slices = max(1, min(blocks, padded // 32, (1 << 21) // (most * most)))
    else:
        sizes = _sizes(cuda)
        size = next((n for n in sizes if -(-longest // n) <= whole), sizes[-1])
        while 2 * size in sizes and 2 * size * len(lengths) <= cuda.multiprocessors and longest >= 64 * size:
            size *= 2
        capacity = min(-(-longest // size // 4) * 4, whole)
        blocks = slices = size
        teams = max(1, min(len(lengths), cuda.multiprocessors // size))
    return Plan(size, blocks, teams, capacity, tile, work, slices, -(-(fixed + capacity * row) // 16) * 16)


def _sizes(cuda: Cuda) -> tuple[int, ...]:
    """How many blocks a thread-block cluster may have."""
    return (1, 2, 4, 8) if cuda.capability >= (9, 0) else (1,)


def is_long(cuda: Cuda, kind: int, width: int, k: I64, lengths: I64) -> NDArray[np.bool_]:
    """Which problems the whole device should work on, one after the other."""
    most = int(k.max())
    if most > _MOST_SHARED_CLUSTERS:
        return np.ones(len(k), bool)
    size = _sizes(cuda)[-1]
    fits = size * plan(cuda, kind, width, most, np.array([1 << 30]), long=False).capacity
    outgrown = lengths > fits
    # Where problems that do not fit are many, and none is very long, each has blocks of its own all the same.
    many = outgrown.sum() * size >= cuda.multiprocessors
    long: NDArray[np.bool_] = outgrown & ~(many & (lengths <= 64 * fits))
    return long


def kind_of(x: Array) -> int:
    """The kernels' number for the type of x.

    Raises:
        TypeError: it is none of float16, bfloat16, float32.
    """
    kinds = {"float16": HALF, "bfloat16": BFLOAT, "uint16": BFLOAT, "float32": FLOAT}
    if x.dtype.name not in kinds:
        raise TypeError(f"vectors are float16, bfloat16 (or its bits as uint16) or float32, got {x.dtype}")
    return kinds[x.dtype.name]


def _run(
    cuda: Cuda,
    task: int,
    x: Array,
    w: Array,
    spans: I64,
    k: I64,
    *,
    seeds: Array = None,
    centroids: Array = None,
    labels: Array = None,
    penalty: float = 0.0,
    margin: float = 1.0,
    rounds: int = 0,
) -> Clusters:
    """Allocates results and scratch, and launches the short problems, then the long ones."""
    lengths = spans[:, 1] - spans[:, 0]
    if not len(k) or (lengths < 1).any() or (k < 1).any():
        raise ValueError("every problem needs a frame and a cluster")
    xp, kind = cuda.cupy, kind_of(x)
    count, most, width, starts = len(k), int(k.max()), int(x.shape[1]), label_starts(spans)
    total, wide = int(starts[-1]), width % 8 == 0 and x.data.ptr % 16 == 0
    x, w = xp.ascontiguousarray(x), xp.ascontiguousarray(w.astype(np.float32, copy=False))
    long = is_long(cuda, kind, width, k, lengths)
    # The short problems first, in each part the longest first, so that what is left at the end is short.
    which = np.lexsort((-lengths * k, long))
    # One copy to the device instead of five.
    pieces = [which, spans, k, starts, seeds if isinstance(seeds, np.ndarray) else np.empty(0)]
    flat = cuda.to_device(np.concatenate([np.ravel(piece) for piece in pieces]).astype(np.int64))
    ends = np.cumsum([piece.size for piece in pieces])
    order, *control, rows = (flat[end - piece.size : end] for end, piece in zip(ends.tolist(), pieces, strict=True))
    found = Clusters(
        xp.empty((count, most, width), np.float32),
        xp.empty(total if task <= ASSIGN else 1, np.int64),
        xp.empty(total, np.float32),
        xp.empty(count, np.float64),
        xp.empty((count, rounds + 1), np.float64),
    )
    inputs = (
        rows if isinstance(seeds, np.ndarray) or seeds is None else seeds,
        found.centroids if centroids is None else xp.ascontiguousarray(centroids[:, :most]),
        order if labels is None else labels,
    )
    results = (found.centroids, found.labels, found.similarity, found.objective, found.history)
    for part in (which[~long[which]], which[long[which]]):
        if not len(part):
            continue
        layout = plan(cuda, kind, width, most, lengths[part], long=bool(long[part[0]]))
        padded, four = -(-width // 64) * 64, -(-most // 4) * 4
        lead = 3 * four * four + 2 * four if four > _MOST_LEAD else 0
        scratch = (
            xp.empty(layout.teams * (layout.blocks + 3) * four * padded, np.float32),
            xp.empty(
                layout.teams * (4 * layout.slices * four * four + lead + 4 * layout.blocks + 2 * four), np.float64
            ),
            xp.empty(layout.teams * (four * (2 + -(-four // 32)) + 4), np.int32),
            xp.empty(2 * total, np.int32),
            xp.empty(2 * total, np.float32),
            xp.zeros(4, np.uint32),
        )
        first = len(which) - len(part) if long[part[0]] else 0
        shape = (len(part), most, width, kind, int(wide))
        numbers = (*shape, layout.capacity, layout.tile, layout.work_bytes, layout.slices, task, rounds)
        args = (x, w, order[first:], *control, *inputs, *results, *scratch, np.int64(total))
        cuda.launch(
            "kmeans.cu",
            "kmeans",
            (layout.teams * layout.blocks,),
            (THREADS,),
            (*args, *(np.int32(number) for number in numbers), np.float64(penalty), np.float64(margin)),
            shared=layout.shared,
            defines=_layout(layout.cluster),
            cooperative=not layout.cluster,
        )
    return found


def cluster(
    cuda: Cuda, x: Array, w: Array, spans: I64, k: I64, seeds: Array, *, penalty: float, margin: float, iterations: int
) -> Clusters:
    """clustering.cluster in one launch (two where some problems are far longer), decided on the device from end to end.

    Args:
        seeds: [M, Kmax] int64; NumPy's are checked, CuPy's are taken as they are: a row below 0 makes J no number.

    Returns:
        Clusters of CuPy arrays.

    Raises:
        ValueError: a problem has fewer valid seeds than clusters, no frame or no cluster.
        TypeError: x is of another type.
    """
    most = int(k.max(initial=1))
    if isinstance(seeds, np.ndarray):
        for m in range(len(k)):
            if len(seeds[m]) < k[m] or (seeds[m, : k[m]] < 0).any():
                raise ValueError(f"problem {m} has {k[m]} clusters and {(seeds[m] >= 0).sum()} valid seeds")
        seeds = seeds[:, :most]
    elif seeds.shape[1] < most:
        raise ValueError(f"there are {most} clusters and {seeds.shape[1]} seeds")
    else:
        seeds = cuda.cupy.ascontiguousarray(seeds[:, :most])
    return _run(cuda, CLUSTER, x, w, spans, k, seeds=seeds, penalty=penalty, margin=margin, rounds=iterations)


def assign(cuda: Cuda, x: Array, spans: I64, k: I64, centroids: Array) -> tuple[Array, Array]:
    """clustering.assign: labels [L] int64 and cosines [L] float32."""
    w = cuda.cupy.zeros(x.shape[0], np.float32)
    found = _run(cuda, ASSIGN, x, w, spans, k, centroids=centroids)
    return found.labels, found.similarity


def objective(
    cuda: Cuda,
    x: Array,
    w: Array,
    spans: I64,
    k: I64,
    centroids: Array,
    labels: Array,
    *,
    penalty: float,
    margin: float,
) -> Array:
    """clustering.objective: J [M] float64."""
    state = {"centroids": centroids, "labels": labels}
    return _run(cuda, OBJECTIVE, x, w, spans, k, **state, penalty=penalty, margin=margin).objective


def update(
    cuda: Cuda,
    x: Array,
    w: Array,
    spans: I64,
    k: I64,
    centroids: Array,
    labels: Array,
    *,
    penalty: float,
    margin: float,
) -> Array:
    """clustering.update: the new centroids [M, Kmax, D] float32."""
    state = {"centroids": centroids, "labels": labels}
    return _run(cuda, UPDATE, x, w, spans, k, **state, penalty=penalty, margin=margin).centroids


def relocate(
    cuda: Cuda,
    x: Array,
    w: Array,
    spans: I64,
    k: I64,
    centroids: Array,
    labels: Array,
    *,
    penalty: float,
    margin: float,
) -> Array:
    """clustering.relocate: the new centroids [M, Kmax, D] float32."""
    state = {"centroids": centroids, "labels": labels}
    return _run(cuda, RELOCATE, x, w, spans, k, **state, penalty=penalty, margin=margin).centroids


# --- before and after -----------------------------------------------------------------------------------------------


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


def temporal_support(cuda: Cuda, x: Array, offsets: I64, reach: int = 3) -> tuple[Array, Array]:
    """clustering.temporal_support: support [N] float32 and smooth [N, D] float32.

    Raises:
        ValueError: a video has no frame.
    """
    xp, lengths, (count, width) = cuda.cupy, _frames_of(offsets), x.shape
    x, starts = xp.ascontiguousarray(x), cuda.to_device(np.ascontiguousarray(offsets, np.int64))
    sums = _column_sums(cuda, x, xp.ones(count, np.float32), starts, lengths)
    typical = xp.empty(len(lengths), np.float64)
    sizes = (np.int32(sums.shape[1]), np.int32(width))
    args = (sums, starts, typical, *sizes)
    cuda.launch(
        "kmeans_seed.cu", "mean_square", (len(lengths),), (THREADS,), args, shared=_SUM_BYTES, defines=_layout(1)
    )
    support, smooth = xp.empty(count, np.float32), xp.empty((count, width), np.float32)
    numbers = (len(lengths), width, kind_of(x), reach)
    args = (x, starts, typical, support, smooth, *(np.int32(number) for number in numbers))
    grid = (-(-32 * count // THREADS),)
    cuda.launch("kmeans_seed.cu", "temporal_support", grid, (THREADS,), args, defines=_layout(1))
    return support, smooth


def seed(cuda: Cuda, x: Array, w: Array, offsets: I64, count: int) -> tuple[Array, Array]:
    """clustering.seed: rows [B, count] int64 and gaps [B, count] float32.

    A video with a NaN or an infinity among its vectors or weights has no seed: all of its rows are -1.

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

    def shared(size: int) -> int:
        return fixed + -(-longest // size) * row

    sizes = _sizes(cuda)
    size = next((n for n in sizes if shared(n) <= cuda.shared_bytes), sizes[-1])
    while 2 * size in sizes and 2 * size * videos <= cuda.multiprocessors and longest >= 64 * size:
        size *= 2
    grid = (min(videos, max(1, cuda.multiprocessors // size)) * size,)
    long = shared(size) > cuda.shared_bytes and videos * size < cuda.multiprocessors
    if long:
        size = min(cuda.multiprocessors, -(-longest // 16))
        grid = (size,)
    staged = shared(size) <= cuda.shared_bytes
    rows, gaps = xp.full((videos, count), -1, np.int64), xp.zeros((videos, count), np.float32)
    scratch = xp.empty(x.shape[0], np.float64), xp.empty(4 * grid[0], np.float64)
    wide = width % 8 == 0 and x.data.ptr % 16 == 0
    numbers = (videos, count, width, kind, int(wide), sums.shape[1], int(staged))
    args = (x, w, starts, sums, *scratch, rows, gaps, xp.zeros(2, np.uint32), *(np.int32(number) for number in numbers))
    cuda.launch(
        "kmeans_seed.cu",
        "seed",
        grid,
        (THREADS,),
        args,
        shared=shared(size) if staged else fixed,
        defines=_layout(0 if long else size),
        cooperative=long,
    )
    return rows, gaps


def representatives(cuda: Cuda, spans: I64, k: I64, labels: Array, similarity: Array, clean: Array) -> Array:
    """clustering.representatives: rows [M, Kmax] int64. clean: [N] bool, CuPy."""
    xp, most, lengths = cuda.cupy, int(k.max(initial=1)), spans[:, 1] - spans[:, 0]
    places, starts = (cuda.to_device(np.ascontiguousarray(a, np.int64)) for a in (spans, label_starts(spans)))
    keys = xp.zeros((len(k), most), np.uint64)
    grid = (len(k), min(64, -(-int(lengths.max()) // THREADS)))
    args = (places, starts, labels, similarity, clean, keys, np.int32(most))
    cuda.launch("kmeans_seed.cu", "representatives", grid, (THREADS,), args, defines=_layout(1))
    last = (1 << 31) - 1
    rows = (last - (keys & np.uint64(last)).astype(np.int64)) + places[:, :1]
    return xp.where(keys > 0, rows, -1)
