"""kmeans.cu, kmeans_seed.cu and cpu_kmeans.py against their definitions, as checks that tests and sanitizers run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import numpy as np
from bounds import FLOAT32
from numpy.typing import NDArray
from planted import degenerate, some_video

from keyreel_kernels import clustering, cpu_kmeans, cuda_kmeans
from keyreel_kernels.clustering import STILL, Clusters, label_starts
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.cuda_kmeans import ROUNDING

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def on(cuda: Cuda | None, name: str, *args: Any, **options: Any) -> Any:
    """Runs an operation, its data copied up, nothing copied down meanwhile, its results copied down.

    None: the CPU's own form.
    """
    if cuda is None:
        return getattr(cpu_kmeans, name)(*args, **options)
    steer = {"spans", "k", "offsets", "seeds"}
    names = getattr(clustering, name).__code__.co_varnames
    with cuda.scope():
        # Copied, so that a view's strides do not decide what is tested.
        given = [
            cuda.to_device(arg.copy()) if isinstance(arg, np.ndarray) and names[n] not in steer else arg
            for n, arg in enumerate(args)
        ]
        before = cuda.bytes_to_host
        found = getattr(cuda_kmeans, name)(cuda, *given, **options)
        assert cuda.bytes_to_host == before
        if isinstance(found, Clusters):
            return Clusters(*(cuda.to_host(getattr(found, field.name)) for field in fields(Clusters)))
        return tuple(map(cuda.to_host, found)) if isinstance(found, tuple) else cuda.to_host(found)


def as_kind(x: F32, kind: str) -> tuple[Any, F32]:
    """x as the device gets it, and what that is in float32."""
    if kind == "bfloat16":
        bits = ((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    return x.astype(kind), x.astype(kind).astype(np.float32)


def unclear_labels(x: F32, spans: I64, k: I64, centroids: F32) -> NDArray[np.bool_]:
    """[L] bool: frames whose two best cosines are within ROUNDING."""
    out = []
    for (start, stop), count, own in zip(spans, k, centroids, strict=True):
        cosine = np.sort(x[start:stop].astype(np.float64) @ own[:count].astype(np.float64).T, axis=1)
        out.append(cosine[:, -1] - cosine[:, -2] < ROUNDING if count > 1 else np.zeros(stop - start, bool))
    return np.concatenate(out)


def clear_runs(
    x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, penalty: float, margin: float, iterations: int
) -> NDArray[np.bool_]:
    """[M] bool: problems in which the definition decides everything by more than ROUNDING.

    That is: labels; whether a round gains more than STILL; which frame is worst covered, where one is asked for; which
    centroids are close, before and after their moves.
    """
    weigh: dict[str, Any] = {"penalty": penalty, "margin": margin}
    out = np.ones(len(k), bool)
    for m in range(len(k)):
        own, number = spans[[m]], k[[m]]
        centroids = x[seeds[m, : k[m]]][None]
        last, before = np.inf, np.empty(0, np.int64)
        for _ in range(iterations + 1):
            labels, _ = clustering.assign(x, own, number, centroids)
            value = clustering.objective(x, w, own, number, centroids, labels, **weigh)[0]
            gain = last - value
            out[m] &= not unclear_labels(x, own, number, centroids).any()
            # Whether a round that changes no label is taken changes none either.
            out[m] &= abs(gain - STILL) > ROUNDING / 50 or np.array_equal(labels, before)
            before = labels
            if gain <= STILL:
                break
            last = value
            moved = clustering.update(x, w, own, number, centroids, labels, **weigh)
            pairs = np.concatenate([one[0].astype(np.float64) for one in (centroids, moved)])
            distance = np.abs(pairs @ pairs.T - margin)[~np.eye(len(pairs), dtype=bool)]
            out[m] &= penalty == 0 or k[m] == 1 or distance.min() > ROUNDING
            # Relocation compares frames: the order of equal ones is tested for itself.
            out[m] &= len(set(labels.tolist())) == k[m]
            centroids = clustering.relocate(x, w, own, number, moved, labels, **weigh)
    return out


def check_cluster(
    cuda: Cuda | None, x: F32, w: F32, spans: I64, k: I64, seeds: I64, *, kind: str = "float32", **rules: Any
) -> tuple[Clusters, int]:
    """A run against the definition's, and against its own parts; returns it and how many problems were clear."""
    given, x = as_kind(x, kind)
    expected = clustering.cluster(x, w, spans, k, seeds, **rules)
    found: Clusters = on(cuda, "cluster", given, w, spans, k, seeds, **rules)
    for field in fields(Clusters):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    weigh = {name: rules[name] for name in ("penalty", "margin")}
    at = label_starts(spans)
    problem = np.repeat(np.arange(len(k)), np.diff(at))
    # What it says of itself is true.
    assert (np.diff(found.history, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.history[:, -1], found.objective)
    labels, similarity = clustering.assign(x, spans, k, found.centroids)
    unclear = unclear_labels(x, spans, k, found.centroids)
    np.testing.assert_array_equal(found.labels[~unclear], labels[~unclear])
    assert ((found.labels >= 0) & (found.labels < k[problem])).all()
    np.testing.assert_allclose(found.similarity, similarity, atol=ROUNDING)
    scale = 1 + weigh["penalty"] * k
    value = clustering.objective(x, w, spans, k, found.centroids, found.labels, **weigh)
    assert (np.abs(found.objective - value) <= ROUNDING / 10 * scale).all()
    for m, count in enumerate(k):
        # Seeds of halves are as long as they are; what moved is of unit length.
        length = np.linalg.norm(found.centroids[m, :count].astype(np.float64), axis=1)
        assert np.abs(length - 1).max() < (10 * ROUNDING if kind == "float32" else 1e-2)
        assert not found.centroids[m, count:].any()
    # And it is what the definition says.
    clear = clear_runs(x, w, spans, k, seeds, **rules)
    np.testing.assert_array_equal(found.labels[clear[problem]], expected.labels[clear[problem]])
    assert (np.abs(found.history - expected.history)[clear] <= ROUNDING / 10 * scale[clear][:, None]).all()
    # What is unclear may come to rest elsewhere, about as low; 7e-4 apart has been seen.
    assert (np.abs(found.objective - expected.objective) <= 2e-3 * scale).all()
    return found, int(clear.sum())


def check_degenerate(cuda: Cuda | None, kind: str, *, atol: float) -> None:
    """Seeds and runs of one of planted.DEGENERATE."""
    x, w, most = degenerate(kind)
    span, rules = np.array([[0, len(x)]]), {"penalty": 0.1, "margin": 0.8, "iterations": 50}
    for k in (1, 2, 5, 20):
        rows, gaps = on(cuda, "seed", x, w, span[0], k)
        expected, sizes = clustering.seed(x, w, span[0], k)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(gaps, sizes, atol=FLOAT32)
        count = int((rows >= 0).sum())
        assert count == min(k, most)
        found = on(cuda, "cluster", x, w, span, np.array([count]), rows, **rules)
        wanted = clustering.cluster(x, w, span, np.array([count]), rows, **rules)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        np.testing.assert_allclose(found.objective, wanted.objective, atol=atol)


# Kinds of frames, and labels where the caller seeds the first of them twice.
SEEDED_TWICE = [(2, [0, 0, 0, 2, 2]), (3, [0, 0, 0, 2, 1])]


def check_seeded_twice(cluster: Callable[..., Clusters], kinds: int, labels: list[int]) -> None:
    """A cluster without a frame goes where it is needed or stays: no error, no rise of J."""
    x = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, kinds - 1]]
    spans, k, seeds = np.array([[0, 5]]), np.array([3]), np.array([[0, 1, 3]])
    found = cluster(x, np.ones(5, np.float32), spans, k, seeds, penalty=0.1, margin=0.8, iterations=9)
    assert found.labels.tolist() == labels
    assert found.similarity.tolist() == [1] * 5
    assert (np.diff(found.history) <= 0).all()


def some_problems(draw: np.random.Generator, counts: list[int], width: int, most: int) -> tuple[Any, ...]:
    """x, w, spans, k and seeds: ragged videos, several K of each."""
    x, w, offsets = some_video(draw, counts, width)
    seeds, _ = clustering.seed(x, w, offsets, most)
    problems = [
        (b, k) for b in range(len(counts)) for k in sorted(set(draw.integers(1, (seeds[b] >= 0).sum() + 1, size=2)))
    ]
    spans = np.array([[offsets[b], offsets[b + 1]] for b, _ in problems])
    return x, w, spans, np.array([k for _, k in problems]), seeds[[b for b, _ in problems]]


def cases(cuda: Cuda) -> None:
    """Each kernel once: frames that fill no tile, a width that fills no 16 bytes, clusters that lose all frames.

    In blocks of two warps: under a sanitizer a thread is one of the system.
    """
    draw = np.random.default_rng(3)
    rules: dict[str, Any] = {"penalty": 0.5, "margin": 0.3, "iterations": 2}
    with patch.object(cuda_kmeans, "THREADS", 64):
        for counts, width, kind in (([37, 1], 20, "float32"), ([67], 72, "float16")):
            x, w, spans, k, seeds = some_problems(draw, counts, width, 5)
            check_cluster(cuda, x, w, spans, k, seeds, kind=kind, **rules)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            on(cuda, "temporal_support", x, offsets)
            on(cuda, "seed", x, w, offsets, 4)
        x = draw.normal(size=(21, 9)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        spans, k, weigh = np.array([[0, 21]]), np.array([67]), {"penalty": 0.5, "margin": 0.3}
        centroids = x[draw.integers(21, size=(1, 67))]
        labels, similarity = on(cuda, "assign", x, spans, k, centroids)
        w = np.ones(21, np.float32)
        for name in ("objective", "update", "relocate"):
            on(cuda, name, x, w, spans, k, centroids, labels, **weigh)
        on(cuda, "representatives", spans, k, labels, similarity, np.ones(21, bool))
