"""The other kernels, each as a share of what a copy within the device moves: search, decoded pictures, shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.clocks import torch_clock
from benchmarks.gpu_cases.peers import torch_on
from benchmarks.gpu_cases.runner import Case, Missing, Row

WIDTH, FOUND = 512, 10
_CHUNK_ROWS = 1 << 20


def _moved(bench: Bench, row: Row, size: int) -> Row:
    """Adds what the kernel reads and writes a second, and as a share of a copy's."""
    rate = size / row["ms_back_to_back"] / 1e6
    ceiling = bench.copy_gigabytes_per_second
    return {**row, "gb_per_s": rate, "copy_gb_per_s": ceiling, "share_of_copy": rate / ceiling}


def rows_that_fit(bench: Bench, share: float) -> int:
    most = 8 << 30 if bench.quick else 1 << 40
    return max(int(min(bench.free_bytes() * share, most)) // (2 * WIDTH), 1)


def _library(bench: Bench, count: int, queries: np.ndarray[Any, Any]) -> tuple[Any, np.ndarray[Any, Any]]:
    """[count, WIDTH] fp16 unit vectors on the device, and the rows [Q, FOUND] that answer each query, best first.

    Random vectors of this width are nearly orthogonal; the answers are planted, at falling cosines from 0.9 to 0.45.
    """
    arrays, random = bench.arrays, np.random.default_rng(1)
    xp = arrays.xp
    # One block of noise, turned by as many places as its number says: making every row anew takes longer than the case.
    block = random.standard_normal((min(count, _CHUNK_ROWS), WIDTH), np.float32)
    block /= np.linalg.norm(block, axis=1, keepdims=True)
    noise = arrays.to_device(block.astype(np.float16))
    vectors = xp.empty((count, WIDTH), np.float16)
    for number, start in enumerate(range(0, count, len(block))):
        vectors[start : start + len(block)] = xp.roll(noise, number, axis=1)[: count - start]
    answers = random.choice(count, (len(queries), FOUND), replace=False)
    cosines = 0.9 - 0.05 * np.arange(FOUND, dtype=np.float32)
    for query, rows in zip(queries, answers, strict=True):
        other = random.standard_normal((FOUND, WIDTH)).astype(np.float32)
        other -= (other @ query)[:, None] * query
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        planted = cosines[:, None] * query + np.sqrt(1 - cosines**2)[:, None] * other
        vectors[arrays.to_device(rows)] = arrays.to_device(planted.astype(np.float16))
    return vectors, answers


def top_k(bench: Bench, count: int, queries: int) -> Row:
    """Time, bandwidth, and the share of planted answers that came back in their places."""
    arrays, random = bench.arrays, np.random.default_rng(2)
    with arrays.scope():
        asked = random.standard_normal((queries, WIDTH), np.float32)
        asked /= np.linalg.norm(asked, axis=1, keepdims=True)
        vectors, answers = _library(bench, count, asked)
        given = arrays.to_device(asked)
        row = bench.measure(lambda: bench.ops.top_k(given, vectors, FOUND))
        rows = arrays.to_host(bench.ops.top_k(given, vectors, FOUND)[1])
        size = vectors.nbytes
    right = float((rows == answers).mean())
    return {**_moved(bench, row, size), "rows": count, "queries": queries, "recall": right}


def _search(queries: int, share: float) -> Any:
    return lambda bench: top_k(bench, rows_that_fit(bench, share), queries)


def torch_top_k(bench: Bench, queries: int) -> Row:
    """A product, then torch.topk, in chunks that keep the scores small."""
    torch = torch_on(bench.device)
    count = rows_that_fit(bench, 0.5)
    generator = torch.Generator("cuda").manual_seed(0)
    vectors = torch.empty(count, WIDTH, dtype=torch.float16, device="cuda")
    for part in vectors.split(_CHUNK_ROWS):
        part.normal_(std=WIDTH**-0.5, generator=generator)
    asked = vectors[:queries].clone()
    chunk = max((2 << 30) // (2 * queries), 1)

    def work() -> Any:
        best = []
        for start in range(0, count, chunk):
            scores, rows = (asked @ vectors[start : start + chunk].T).topk(FOUND, dim=1)
            best.append((scores, rows + start))
        scores, at = torch.cat([part[0] for part in best], dim=1).topk(FOUND, dim=1)
        return scores, torch.cat([part[1] for part in best], dim=1).gather(1, at)

    row = bench.measure(work, torch_clock(torch))
    return {**_moved(bench, row, vectors.nbytes), "rows": count, "queries": queries}


def surfaces(bench: Bench, height: int, width: int, count: int = 16) -> Row:
    """NV12 pictures of a decoder to the model's pictures, one launch."""
    from keyreel_kernels.surfaces import Surface

    arrays, random = bench.arrays, np.random.default_rng(3)
    with arrays.scope():
        given = []
        for _ in range(count):
            y = random.integers(16, 236, (height, width), dtype=np.uint8)
            uv = random.integers(16, 241, (-(-height // 2), -(-width // 2), 2), dtype=np.uint8)
            planes = (arrays.to_device(y), arrays.to_device(uv))
            given.append(Surface(planes, bits=8, standard="bt709", full_range=False, display=(height, width)))

        def work() -> Any:
            return bench.ops.frames_from_surfaces(
                given, height=224, width=224, mode="shortest", interpolation="bicubic"
            )

        row = bench.measure(work)
        size = sum(plane.nbytes for surface in given for plane in surface.planes) + work().nbytes
    return {**_moved(bench, row, size), "pictures": count, "pictures_per_s": 1e3 * count / row["ms_back_to_back"]}


def adaptive_shift(bench: Bench, frames: int = 128, grid: tuple[int, int] = (14, 14), width: int = 768) -> Row:
    """Selecting and moving the patches of a batch of ViT-B/16 tokens."""
    arrays, random = bench.arrays, np.random.default_rng(4)
    places = grid[0] * grid[1]
    with arrays.scope():
        steps = 0.3 * random.standard_normal((frames, places + 1, width), np.float32)
        tokens = arrays.to_device(np.cumsum(steps, axis=0) + random.standard_normal((1, places + 1, width), np.float32))
        linked = np.arange(frames) % 40 != 0

        def work() -> Any:
            source = bench.ops.adaptive_shift(tokens[:, 1:], grid, linked, steps=3, threshold=0.05)
            return bench.ops.shift_tokens(tokens, source, 1)

        row = bench.measure(work)
        # Read for the choice, read and written for the move.
        size = 3 * tokens.nbytes
    return {**_moved(bench, row, size), "frames": frames}


def barriers(bench: Bench, rounds: int = 1000) -> Row:
    """What one barrier costs: all blocks of a cooperative launch; a cluster of 8 blocks."""
    arrays = bench.arrays
    file = str(Path(__file__).with_name("barriers.cu"))
    found: Row = {}
    with arrays.scope():
        counter = arrays.xp.zeros(2, np.uint32)
        blocks = arrays.multiprocessors

        def grid() -> None:
            arrays.launch(file, "grid_rounds", (blocks,), (256,), (counter, np.int32(rounds)), cooperative=True)

        row = bench.measure(grid)
        found |= {"grid_us": 1e3 * row["ms_back_to_back"] / rounds, "grid_blocks": blocks}
        if arrays.capability >= (9, 0):
            left = arrays.xp.zeros(1, np.int32)

            def cluster() -> None:
                arrays.launch(file, "cluster_rounds", (8,), (256,), (left, np.int32(rounds)), defines=(("CLUSTER", 8),))

            row = bench.measure(cluster)
            found |= {"cluster_us": 1e3 * row["ms_back_to_back"] / rounds, "cluster_blocks": 8}
    return found


def copy(bench: Bench) -> Row:
    """Device to device, bytes read and written."""
    return {"gb_per_s": bench.copy_gigabytes_per_second}


def matrix(bench: Bench, side: int = 8192) -> Row:
    """A product of random matrices in bf16 and fp16, by torch, or in fp16 by CuPy where there is no torch."""
    operations = 2 * side**3 / 1e9
    try:
        torch = torch_on(bench.device)
    except Missing:
        with bench.arrays.scope():
            half = bench.arrays.xp.random.standard_normal((side, side), dtype=np.float32).astype(np.float16)
            row = bench.measure(lambda: half @ half)
        return {"fp16_tflops": operations / row["ms_back_to_back"], "by": "CuPy"}
    found: Row = {"by": "torch"}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
        row = bench.measure(lambda a=a, b=b: a @ b, torch_clock(torch))
        found[f"{name}_tflops"] = operations / row["ms_back_to_back"]
    return found


def cases() -> list[Case]:
    return [
        Case("copy within the device", copy, seconds=3),
        Case("search 1 query, as many fp16 rows as fit", _search(1, 0.8), seconds=8),
        Case("search 32 queries, as many fp16 rows as fit", _search(32, 0.8), seconds=8, quick=False),
        Case("search 128 queries, half of the memory", _search(128, 0.4), seconds=8, quick=False),
        Case("pictures 16 x 1080p NV12 -> 224", lambda bench: surfaces(bench, 1080, 1920), seconds=3),
        Case("pictures 16 x 2160p NV12 -> 224", lambda bench: surfaces(bench, 2160, 3840), seconds=4),
        Case("adaptive shift 128 frames, 14x14x768", adaptive_shift, seconds=3),
        Case("matrix product 8192", matrix, seconds=6),
        Case("barriers", barriers, seconds=4),
        Case("search 32 queries: torch product + topk", lambda bench: torch_top_k(bench, 32), seconds=10, quick=False),
    ]
