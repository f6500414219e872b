"""Exact search over the vectors of many frames, beside one pass over memory.

`recall` is the share of the ten best rows by float64 arithmetic that a system finds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Folders, Measurement, Params, Prepare, Skipped
from benchmarks.peers import searchers

K = 10
SCAN = "keyreel in 8 bits"
FLOOR = "one pass over memory"
_PART = 50_000


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    rows, counts = (20_000, (1,)) if quick else (1_000_000, (1, 32))
    return [
        Measurement(
            "search",
            {"rows": rows, "width": 512, "queries": queries, "k": K},
            tuple(name for name in SYSTEMS if queries == 1 or name not in (FLOOR, "lancedb flat")),
            runs=7,
            seconds=2 if quick else 25,
        )
        for queries in counts
    ]


def needs_memory(mib: float) -> None:
    """Raises Skipped where less is free."""
    free = next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if free < mib:
        raise Skipped(f"it needs {mib:.0f} MiB of memory, {free:.0f} are free")


def ready(params: Params, folders: Folders) -> None:
    needs_memory(9 * params["rows"] * params["width"] * 4 / 2**20)  # what all systems hold together
    path = _path(params, folders)
    if not path.exists():
        _make(params, folders, path)
    vectors, queries = given(params, folders)
    parts = [vectors[start : start + _PART].astype(np.float64) @ queries.T for start in range(0, len(vectors), _PART)]
    np.save(_best(params, folders), np.argsort(-np.concatenate(parts), axis=0, kind="stable")[:K].T)


def _make(params: Params, folders: Folders, path: Path) -> None:
    folders.content.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    shape = (params["rows"], params["width"])
    aside = path.with_name(f".{path.name}")
    vectors = np.lib.format.open_memmap(aside, "w+", np.float32, shape)
    for start in range(0, len(vectors), _PART):
        part = random.standard_normal((min(_PART, len(vectors) - start), shape[1]), np.float32)
        vectors[start : start + _PART] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors.flush()
    aside.replace(path)


def _path(params: Params, folders: Folders) -> Path:
    return folders.content / f"vectors-{params['rows']}-{params['width']}.npy"


def _best(params: Params, folders: Folders) -> Path:
    return folders.content / f"best-{params['rows']}-{params['width']}-{params['queries']}.npy"


def given(params: Params, folders: Folders) -> tuple[Any, Any]:
    """Vectors, and queries that have a cosine of about 0.7 with one of them each."""
    vectors = np.load(_path(params, folders))
    random = np.random.default_rng(1)
    near = vectors[random.integers(0, len(vectors), params["queries"])]
    noise = random.standard_normal(near.shape, np.float32)
    queries = near + noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return vectors, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def _system(make: Callable[[Any, Any, int, Path], searchers.Search]) -> Prepare:
    return lambda params, folders: make(*given(params, folders), params["k"], folders.content)


SYSTEMS: dict[str, Prepare] = {
    FLOOR: _system(searchers.memory_pass),
    "keyreel": _system(searchers.keyreel),
    SCAN: _system(searchers.keyreel_scan),
    "numpy": _system(searchers.numpy),
    "faiss flat": _system(searchers.faiss),
    "usearch exact f32": _system(searchers.usearch("float32")),
    "usearch exact f16": _system(searchers.usearch("float16")),
    "usearch exact i8": _system(searchers.usearch("int8")),
    "lancedb flat": _system(searchers.lancedb),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    if system == FLOOR:
        return {}
    best = np.load(_best(params, folders))
    hits = [len(set(own) & set(right)) for own, right in zip(result.tolist(), best.tolist(), strict=True)]
    return {"recall": sum(hits) / best.size}
