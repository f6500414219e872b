"""Exports vectors as a Parquet file, which vector databases, pandas, DuckDB and Spark read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from keyreel.errors import Damaged, RenderError, import_extra
from keyreel.library.errors import REPAIR
from keyreel.library.schema import SCENE, SUBJECT
from keyreel.library.shards import Shards
from keyreel.library.stored import CHUNK
from keyreel.library.table import Tables
from keyreel.library.types import Record, Rows
from keyreel.render.files import atomic_write

FILE = "vectors.parquet"


def export_parquet(tables: Tables | Shards, folder: Path, *, overwrite: bool) -> int:
    """Writes vectors.parquet, see `Library.export_parquet`.

    Raises:
        RenderError: the file exists, or cannot be written.
    """
    pa = import_extra("pyarrow", extra="library", purpose="exporting a library")
    parquet = import_extra("pyarrow.parquet", extra="library", purpose="exporting a library")
    path = folder / FILE
    if path.exists() and not overwrite:
        raise RenderError(f"{path}: already exists", hint="give another folder, or replace it: --overwrite")
    model, sha256, width = tables.model()
    schema = _schema(pa, width).with_metadata({"keyreel.model": model, "keyreel.model_sha256": sha256})
    count = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as made, parquet.ParquetWriter(made, schema, compression="zstd") as writer:
            for record, rows in chain.from_iterable(map(_videos, tables.parts)):
                for table in _tables_of(pa, schema, record, rows):
                    writer.write_table(table)
                    count += len(table)
    except OSError as error:
        raise RenderError(f"{path}: cannot be written: {error}", hint="check the disk space") from error
    return count


def _schema(pa: Any, width: int) -> Any:
    text = pa.string()
    return pa.schema(
        {
            "id": text,  # unique: VIDEO_ID/KIND/FRAME
            "video_id": text,
            "path": text,
            "tags": pa.list_(text),
            "recorded": pa.float64(),  # seconds since 1970
            "kind": text,  # scene or subject
            "pts_seconds": pa.float64(),
            "frame_index": pa.int64(),
            "shot": pa.int32(),
            "keyframe": pa.bool_(),
            "vector": pa.list_(pa.float32(), width),
        }
    )


def _videos(tables: Tables) -> Iterator[tuple[Record, Rows]]:
    records = [record for record in tables.records() if record.status == "ok" and record.frames]
    damaged = [*tables.damaged()]
    for start in range(0, len(records), CHUNK):
        named = {record.generation: record for record in records[start : start + CHUNK]}
        for generation, rows in tables.rows(list(named)):
            record = named[generation]
            if record.describes(rows):
                yield named.pop(generation), rows
        damaged += [record.path for record in named.values()]
    if damaged:
        raise Damaged("the rows of some videos are damaged or incomplete: nothing is exported", damaged, hint=REPAIR)


def _tables_of(pa: Any, schema: Any, record: Record, rows: Rows) -> Iterator[Any]:
    """One table of the scenes' vectors, and one of the subjects'."""
    every = np.arange(len(rows))
    parts = [(SCENE, every, rows.vectors)]
    if rows.subjects is not None and len(rows.subjects):
        parts.append((SUBJECT, rows.subjects.row, rows.subjects.vectors))
    for kind, frames, vectors in parts:
        flat, count = np.ascontiguousarray(vectors).ravel(), len(frames)
        yield pa.table(
            {
                "id": [f"{record.id}/{kind}/{frame}" for frame in frames.tolist()],
                "video_id": [record.id] * count,
                "path": [record.path] * count,
                "tags": [list(record.tags)] * count,
                "recorded": [record.date] * count,
                "kind": [kind] * count,
                "pts_seconds": rows.pts_seconds[frames],
                "frame_index": rows.frame_index[frames],
                "shot": rows.shot[frames].astype(np.int32),
                "keyframe": rows.keyframe[frames],
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1]),
            },
            schema=schema,
        )
