"""What libraries beyond this machine take: the cost of a search, fitted to `scale`'s rows, and arithmetic.

A search in memory costs what its numbers and its shards cost. The model has two frames a second, 1.5 vectors a frame
(scenes, and subjects of half of them) of 512 numbers; and machines of 64 cores and 512 GiB, 32 GiB of them for other
things. A module of its own, so that `plot` needs no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FPS, VECTORS_A_FRAME, MODEL_WIDTH = 2.0, 1.5, 512
CORES, GIB = 64, 480
HOURS = (10_000, 1_000_000, 100_000_000)
IN_MEMORY = "memory, 32 bits"  # the measurements that it is fitted to


def fitted(sizes: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """Core-seconds a number and a shard, by least squares.

    Args:
        sizes: numbers in memory, shards and CPU-seconds of a query, of each measurement.
    """
    known = np.array([(numbers, shards) for numbers, shards, _ in sizes], float)
    (number, shard), *_ = np.linalg.lstsq(known, np.array([cpu for _, _, cpu in sizes]), rcond=None)
    return float(number), float(shard)


def modelled(hours: int, number: float, shard: float, read: float) -> dict[str, float]:
    """What a library of so many hours takes; arithmetic.

    Args:
        number, shard: see `fitted`.
        read: rows that one core reads a second.
    """
    rows = hours * 3600 * FPS * VECTORS_A_FRAME
    gib = rows * (4 * MODEL_WIDTH + 22) / 2**30
    machines = math.ceil(gib / GIB)
    core = number * rows * MODEL_WIDTH + shard * machines
    return {
        "memory_gib": gib,
        "stored_gib": rows * 2 * MODEL_WIDTH * 1.1 / 2**30,  # and a tenth for pictures and records
        "machines": machines,
        "query_seconds": core / (machines * CORES),
        "core_hours_a_million_queries": 1e6 * core / 3600,
        "reload_seconds": rows / machines / (read * CORES),
    }
