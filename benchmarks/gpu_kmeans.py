"""k-means on a CUDA device, cases of `benchmarks.gpu`: by shape, by blocks of a team, and flash-kmeans beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks._common import REHEARSED, Absent, Row, table
from benchmarks.select import cloud, objective

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

WIDTH, CLUSTERS = 512, 32
SHAPES = ((2, 40), (1, 70)) if REHEARSED else ((256, 600), (1, 600), (1, 3000), (1, 100_000))  # videos x frames
SWEPT, TEAMS = ((70,), (1, 2)) if REHEARSED else ((600, 3000), (1, 2, 4, 8, 16))  # frames of a video, blocks of a team
PENALTY, MARGIN, CLOSE_MARGIN, ROUNDS = 0.1, 0.8, 0.1, 25


_BARRIERS = """
KR_CLUSTER_KERNEL barriers(int rounds) {
    for (int n = 0; n < rounds; ++n) kr_cluster_sync();
}
"""


def barriers(bench: Bench) -> Row:
    """Microseconds of a barrier of a team of blocks, the whole device at it; a round of k-means has two or three."""
    from keyreel_kernels import cuda
    from keyreel_kernels.cuda_kmeans import THREADS

    arrays, rounds, found = bench.arrays, 20 if REHEARSED else 1000, {}
    code = (cuda.FOLDER / "device.cuh").read_text("utf-8") + _BARRIERS
    for team in TEAMS:
        if team > arrays.most_neighbours:
            break
        grid, how = (arrays.multiprocessors // team * team,), {"defines": (("CLUSTER", team),)}
        run = partial(arrays.launch, "barriers", "barriers", grid, (THREADS,), (np.int32(rounds),), **how)
        with mock.patch.object(cuda, "source_of", return_value=code), suppress(cuda.TooManyNeighbours):
            found[str(team)] = 1e3 * bench.timed(run)["ms_back_to_back"] / rounds
    return {"us_by_blocks": found, "rounds": rounds}


@cache
def problem(videos: int, frames: int, width: int = WIDTH, clusters: int = CLUSTERS) -> tuple[Any, Any]:
    """Unit vectors [B, T, D] and the frames [B, K] that are the initial centroids of all."""
    random = np.random.default_rng(0)
    x = cloud(videos * frames, width).reshape(videos, frames, width)
    return x, np.stack([np.sort(random.choice(frames, clusters, replace=False)) for _ in range(videos)])


def keyreel(
    bench: Bench, videos: int, frames: int, dtype: str, penalty: float, margin: float = MARGIN, **size: int
) -> Row:
    from keyreel_kernels import cuda_kmeans

    x, seeds = problem(videos, frames, **size)
    arrays, starts = bench.arrays, np.arange(videos, dtype=np.int64) * frames
    spans, count = np.stack([starts, starts + frames], axis=1), np.full(videos, seeds.shape[1], np.int64)
    with arrays.scope():
        given = arrays.to_device(x.reshape(videos * frames, -1).astype(dtype))
        weights = arrays.to_device(np.ones(len(given), np.float32))
        first = arrays.to_device(seeds + starts[:, None])
        options = {"penalty": penalty, "margin": margin, "iterations": ROUNDS}
        row = bench.timed(lambda: bench.ops.cluster(given, weights, spans, count, first, **options))
        before = arrays.bytes_to_host
        found = bench.ops.cluster(given, weights, spans, count, first, **options)
        row["bytes_to_host"] = arrays.bytes_to_host - before
        gains = np.diff(arrays.to_host(found.history)) != 0
        row["rounds"] = float(np.minimum(gains.sum(1) + 1, ROUNDS).mean())  # the last one gains nothing
        labels = arrays.to_host(found.labels).reshape(videos, frames)
    kind, width, most = cuda_kmeans.kind_of(given), x.shape[-1], seeds.shape[1]
    layout = cuda_kmeans.plan(arrays, kind, width, most, np.full(videos, frames))
    moved = cuda_kmeans.bytes_a_round(layout, kind, width, most, frames, penalty)
    own = frames * width * given.dtype.itemsize
    row |= {"blocks": layout.cluster, "bytes_a_round": moved, "times_the_frames": sum(moved.values()) / own}
    return {**row, "fit": float(np.mean(list(map(objective, x[:16], labels[:16]))))}


def swept(bench: Bench, frames: int, team: int) -> Row:
    """k-means by teams of another size than `cuda_kmeans.blocks` chooses."""
    from keyreel_kernels import cuda_kmeans

    def blocks(cuda: Any, *_: int) -> int:
        if team > cuda.most_neighbours:
            raise Absent("the device has no such teams")
        return team

    with mock.patch.object(cuda_kmeans, "blocks", blocks):
        return keyreel(bench, 1, frames, "float16", PENALTY)


def flash_kmeans(bench: Bench, videos: int, frames: int) -> Row:
    """flash-kmeans from the same centroids. It has no penalty, and goes on until those of no video move.

    Its own tolerance of 1e-8 is 0 in half precision: it would never stop.
    """
    import torch
    from flash_kmeans.kmeans_triton_impl import batch_kmeans_Cosine  # elsewhere it falls back in silence

    if not torch.cuda.is_available():
        raise Absent("torch has no CUDA device")
    torch.cuda.set_device(bench.device)
    x, seeds = problem(videos, frames)
    rows = x, np.take_along_axis(x, seeds[:, :, None], 1)
    given, first = (torch.from_numpy(own.astype(np.float16)).cuda() for own in rows)
    run = partial(batch_kmeans_Cosine, given, CLUSTERS, max_iters=ROUNDS, tol=1e-4, init_centroids=first)
    row = bench.timed(run, torch.cuda.synchronize)
    labels, _, rounds = run()
    fit = np.mean(list(map(objective, x[:16], labels[:16].cpu().numpy())))
    return {**row, "rounds": rounds, "fit": float(fit)}


def counted() -> str:
    """What a round of k-means on a GPU moves, by the kernel's arithmetic for one with 132 multiprocessors."""
    from keyreel_kernels.cuda_kmeans import FLOAT, HALF, bytes_a_round, plan

    device: Any = SimpleNamespace(shared_bytes=227 << 10, multiprocessors=132, most_neighbours=16)
    lines = []
    for (videos, frames), (name, kind) in product(SHAPES, (("float16", HALF), ("float32", FLOAT))):
        layout = plan(device, kind, WIDTH, CLUSTERS, np.full(videos, frames))
        own = frames * WIDTH * (4 if kind == FLOAT else 2)
        moved = [bytes_a_round(layout, kind, WIDTH, CLUSTERS, frames, penalty) for penalty in (PENALTY, 0.0)]
        parts = [f"{moved[0][part] / 1e6:.2f}" for part in ("frames", "sums", "products", "centroids")]
        ratios = [f"{sum(one.values()) / own:.2f}x" for one in moved]
        lines.append([f"{videos} x {frames:,}, {name}", str(layout.cluster), f"{own / 1e6:.2f}", *parts, *ratios])
    head = ["videos x frames", "blocks", "frames, MB", "loaded again", "sums", "products", "centroids"]
    return table([*head, "all, of the frames", "without the penalty"], lines)


def kmeans_cases() -> dict[str, Callable[[Bench], Row]]:
    # With the last margin most centroids are close to others, and they move one after the other.
    kinds = (
        ("float16", 0.0, MARGIN),
        ("float16", PENALTY, MARGIN),
        ("float32", PENALTY, MARGIN),
        ("float16", PENALTY, CLOSE_MARGIN),
    )
    return {
        "barrier": barriers,
        **{
            f"k-means {videos} x {frames}: keyreel {dtype}, penalty {penalty}, margin {margin}": partial(
                keyreel, videos=videos, frames=frames, dtype=dtype, penalty=penalty, margin=margin
            )
            for dtype, penalty, margin in kinds
            for videos, frames in SHAPES
        },
        f"k-means 1 x {SHAPES[1][1]} as for key-frames: keyreel float32, twice the width": partial(
            keyreel, videos=SHAPES[1][0], frames=SHAPES[1][1], dtype="float32", penalty=PENALTY, width=2 * WIDTH
        ),
        **{
            f"k-means {videos} x {frames}: flash-kmeans float16": partial(flash_kmeans, videos=videos, frames=frames)
            for videos, frames in SHAPES
        },
        **{
            f"sweep 1 x {frames}: {team} blocks": partial(swept, frames=frames, team=team)
            for frames, team in product(SWEPT, TEAMS)
        },
    }
