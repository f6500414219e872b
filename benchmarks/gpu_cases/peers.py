"""Other people's k-means, each as fast as its interface allows: fp16 where it takes it, captured where it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.clocks import torch_clock, wall_clock
from benchmarks.gpu_cases.runner import Missing, Row, import_or_missing

if TYPE_CHECKING:
    from benchmarks.gpu_cases.clustering import Problem

ROUNDS = 25
Labels = np.ndarray[Any, Any]


def lloyd(torch: Any, x: Any, first: Any, rounds: int = ROUNDS) -> Any:
    """Lloyd's algorithm with two batched products a round. x [B, T, D], first [B, K, D] -> labels [B, T].

    Clusters without a frame keep their centroid. Nothing in it waits for the device, so that it can be captured.
    """
    centroids, numbers = first, torch.arange(first.shape[1], device=x.device)
    labels = None
    for _ in range(rounds):
        squares = centroids.float().square().sum(-1)
        labels = (squares[:, None] - 2 * torch.bmm(x, centroids.transpose(1, 2)).float()).argmin(-1)
        inside = (labels[..., None] == numbers).to(x.dtype)
        counts = inside.sum(1, dtype=torch.float32)[..., None]
        means = torch.bmm(inside.transpose(1, 2), x).float() / counts.clamp(min=1)
        centroids = torch.where(counts > 0, means, centroids.float()).to(x.dtype)
    return labels


def torch_on(device: int) -> Any:
    """torch, with the device as its current one.

    Raises:
        Missing: it is not installed, or has no CUDA.
    """
    torch = import_or_missing("torch")
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device")
    torch.cuda.set_device(device)
    return torch


def torch_graph(bench: Bench, given: Problem) -> tuple[Row, Labels]:
    torch = torch_on(bench.device)
    x, first = (torch.from_numpy(array).half().cuda() for array in (given.x, given.first))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lloyd(torch, x, first, rounds=2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = lloyd(torch, x, first)
    row = bench.measure(graph.replay, torch_clock(torch))
    return {**row, "dtype": "float16", "rounds_most": ROUNDS}, labels.cpu().numpy()


def flash_kmeans(bench: Bench, given: Problem) -> tuple[Row, Labels]:
    torch = torch_on(bench.device)
    flash = import_or_missing("flash_kmeans", package="flash-kmeans")
    x, first = (torch.from_numpy(array).half().cuda() for array in (given.x, given.first))

    def work() -> Any:
        # The tolerance is on the centroids' move: it stops once nothing moves any more.
        return flash.batch_kmeans_Euclid(
            x, first.shape[1], max_iters=ROUNDS, tol=1e-8, init_centroids=first.clone(), verbose=False
        )

    row = bench.measure(work, torch_clock(torch))
    labels, _, rounds = work()
    return {**row, "dtype": "float16", "rounds_most": int(rounds)}, labels.cpu().numpy()


def fastkmeans(bench: Bench, given: Problem) -> tuple[Row, Labels]:
    torch = torch_on(bench.device)
    package = import_or_missing("fastkmeans")
    x = given.x[0]
    model = package.FastKMeans(
        x.shape[1], given.seeds.shape[1], niter=ROUNDS, tol=1e-8, max_points_per_centroid=None, device=bench.device
    )
    row = bench.measure(lambda: model.train(x), wall_clock(torch.cuda.synchronize))
    note = "its own random start, data copied from the host: its interface takes neither centroids nor device arrays"
    return {**row, "dtype": "float16", "note": note}, model.predict(x)[None]


def jax(bench: Bench, given: Problem) -> tuple[Row, Labels]:
    jax = import_or_missing("jax")
    jnp = jax.numpy
    if jax.default_backend() not in ("gpu", "cuda"):
        raise Missing(f"jax computes on {jax.default_backend()} here")
    clusters = given.seeds.shape[1]

    def one(x: Any, first: Any) -> Any:
        def go_on(state: Any) -> Any:
            return (state[0] < ROUNDS) & state[3]

        def round_(state: Any) -> Any:
            count, centroids, before, _ = state
            product = jnp.matmul(x, centroids.T.astype(x.dtype), preferred_element_type=jnp.float32)
            labels = jnp.argmin((centroids**2).sum(-1) - 2 * product, axis=-1)
            inside = jax.nn.one_hot(labels, clusters, dtype=x.dtype)
            sums = jnp.matmul(inside.T, x, preferred_element_type=jnp.float32)
            counts = inside.sum(0, dtype=jnp.float32)[:, None]
            moved = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centroids)
            return count + 1, moved, labels, (labels != before).any()

        start = (0, first, jnp.full(len(x), -1), True)
        count, _, labels, _ = jax.lax.while_loop(go_on, round_, start)
        return labels, count

    run = jax.jit(jax.vmap(one))
    x, first = jnp.asarray(given.x, jnp.float16), jnp.asarray(given.first, jnp.float32)
    row = bench.measure(lambda: jax.block_until_ready(run(x, first)), wall_clock())
    labels, rounds = run(x, first)
    return {**row, "dtype": "float16", "rounds_most": int(rounds.max())}, np.asarray(labels)


def scikit_learn(bench: Bench, given: Problem) -> tuple[Row, Labels]:
    cluster = import_or_missing("sklearn.cluster", package="scikit-learn")
    x, first = given.x[0], given.first[0]
    model = cluster.KMeans(len(first), init=first, n_init=1, max_iter=ROUNDS, tol=0, algorithm="lloyd")
    row = bench.measure(lambda: model.fit(x), wall_clock())
    return {**row, "dtype": "float32", "device": "CPU", "rounds_most": int(model.n_iter_)}, model.labels_[None]


@dataclass(frozen=True, slots=True)
class Takes:
    """What a peer is able to, and what it needs."""

    seconds: float
    batches: bool = True
    quick: bool = True


PEERS = (
    ("torch + CUDA graph", torch_graph, Takes(8)),
    ("flash-kmeans", flash_kmeans, Takes(15)),
    ("JAX", jax, Takes(15, quick=False)),
    ("fastkmeans", fastkmeans, Takes(10, batches=False, quick=False)),
    ("scikit-learn", scikit_learn, Takes(12, batches=False)),
)
