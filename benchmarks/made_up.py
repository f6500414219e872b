"""Libraries of made-up videos: vectors in shots of equal length, no pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from keyreel.library import upkeep
from keyreel.library.shards import open_tables
from keyreel.library.types import Record, Rows
from keyreel.types import F32


def record_of(number: int, rows: int, *, shot: int, fps: float) -> Record:
    """Of /made-up/NUMBER.mp4, with so many rows in all and in a shot."""
    times = [shot / fps * place for place in range(rows // shot + 1)]
    return Record(
        id=f"{number:08}",
        path=f"/made-up/{number:08}.mp4",
        size=1,
        mtime_ns=1,
        fingerprint=str(number),
        generation=str(number),
        frames=rows,
        duration_seconds=times[-1],
        indexed_at=0.0,
        shots=tuple(itertools.pairwise(times)),
        model="made-up",
        model_sha256="0" * 64,
    )


def rows_in(vectors: F32, *, shot: int, fps: float) -> Rows:
    """Of unit vectors [N, D]; the first of each shot is a key-frame."""
    row = np.arange(len(vectors))
    return Rows(row / fps, row, vectors, row // shot, row % shot == 0, np.ones(len(vectors), np.float32))


def fill(uri: str, videos: Iterable[F32], *, width: int, shot: int, fps: float, shards: int = 1) -> None:
    """A new library of videos with these vectors [N, width] each."""
    tables = open_tables(uri, shards=shards)
    tables.create(model="made-up", model_sha256="0" * 64, width=width)
    for number, vectors in enumerate(videos):
        record = record_of(number, len(vectors), shot=shot, fps=fps)
        part = tables.of(record.id)
        part.put(record, rows_in(vectors, shot=shot, fps=fps))
        upkeep.tidy(part)
