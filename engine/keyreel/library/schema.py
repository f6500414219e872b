"""How a library lies in its tables: columns, and the way between them and the values of `types`.

Two tables. `frames`: a row for each sampled frame; the row of a key-frame holds its picture, and the first row of a
video its sprite. `videos`: what is known of each video; rows are only appended, and the newest row of an id counts (see
`newest`), so that writers never wait for one another. Pictures lie in the tables, not beside them: like this they are
written atomically, work on object storage, and `compact` gives their space back. Each row holds a checksum of itself,
since the file format has none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from keyreel.errors import LibraryError, import_extra
from keyreel.library.types import Block, Extras, Preview, Record, Rows
from keyreel.types import F32, I64

FORMAT = 1
TABLES = ("frames", "videos")  # in the order in which they are made and written: `videos` is the commit
NUMBERS = ("generation", "pts_seconds", "frame_index", "vector", "shot", "keyframe", "weight")
PREVIEW = ("pts_seconds", "preview", "attention")
EXTRAS = ("sprite", "vtt", "overview")


def arrow() -> ModuleType:
    """pyarrow, or the line that installs it."""
    return import_extra("pyarrow", extra="library", purpose="a library of videos")


def schemas(model: str, model_sha256: str, width: int) -> dict[str, Any]:
    """The pyarrow schema of each table; the model stands in the metadata.

    Args:
        width: D, length of a vector.
    """
    pa = arrow()
    text, float64, int64 = pa.string(), pa.float64(), pa.int64()
    columns = {
        "frames": {
            "video": text,
            "generation": text,
            "row": pa.int32(),
            "pts_seconds": float64,
            "frame_index": int64,
            "vector": pa.list_(pa.float16(), width),
            "shot": pa.int32(),
            "keyframe": pa.bool_(),
            "weight": pa.float32(),
            "preview": pa.binary(),
            "attention": pa.list_(pa.float16()),
            "sprite": pa.binary(),
            "vtt": text,
            "overview": text,
            "written": int64,
            "check": int64,
        },
        "videos": {
            "id": text,
            "path": text,
            "size": int64,
            "mtime_ns": int64,
            "fingerprint": text,
            "generation": text,
            "frames": int64,
            "status": text,
            "error": text,
            "hint": text,
            "tags": pa.list_(text),
            "date": float64,
            "duration_seconds": float64,
            "indexed_at": float64,
            "probe": text,
            "grid": pa.list_(pa.int32()),
            "shots": text,
            "model": text,
            "model_sha256": text,
            "sequence": int64,
            "written": int64,
            "check": int64,
        },
    }
    about = {"format": str(FORMAT), "model": model, "model_sha256": model_sha256, "width": str(width)}
    metadata = {f"keyreel.{name}": value for name, value in about.items()}
    return {name: pa.schema(list(fields.items()), metadata=metadata) for name, fields in columns.items()}


def model_of(schema: Any) -> tuple[str, str, int]:
    """Name, sha256 and D from a table's metadata.

    Raises:
        LibraryError: it is not a table of ours, or one of a newer keyreel.
    """
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if "keyreel.format" not in about:
        raise LibraryError("these tables were not made by keyreel", hint="give another folder for the library")
    if int(about["keyreel.format"]) > FORMAT:
        raise LibraryError(
            f"the library has format {about['keyreel.format']}, this keyreel knows {FORMAT}", hint="update"
        )
    return about["keyreel.model"], about["keyreel.model_sha256"], int(about["keyreel.width"])


def check_layout(name: str, schema: Any) -> None:
    """Whether a table can be read as one of ours.

    Raises:
        LibraryError: it is not one, or one of a newer or much older keyreel.
    """
    if missing := set(schemas(*model_of(schema))[name].names) - set(schema.names):
        what = f"{name} has no {', '.join(sorted(missing))}"
        raise LibraryError(
            f"an early keyreel made this library: {what}", hint="index the videos again, into another folder"
        )


def frames_table(schema: Any, record: Record, rows: Rows, extras: Extras | None) -> Any:
    """The rows of one video as a pyarrow table."""
    pa = arrow()
    count, width = rows.vectors.shape
    previews = {preview.pts_seconds: preview for preview in rows.previews}
    shown = [previews.get(pts) for pts in rows.pts_seconds.tolist()]
    attention = [None if one is None else one.attention.astype(np.float16) for one in shown]
    first = (extras.sprite, extras.vtt, json.dumps(dict(extras.overview))) if extras else (None,) * 3
    columns = {
        "video": [record.id] * count,
        "generation": [record.generation] * count,
        "row": np.arange(count, dtype=np.int32),
        "pts_seconds": rows.pts_seconds,
        "frame_index": rows.frame_index,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.astype(np.float16).ravel()), width),
        "shot": rows.shot.astype(np.int32),
        "keyframe": [one is not None for one in shown],
        "weight": rows.weight,
        "preview": [one and one.jpeg for one in shown],
        "attention": pa.array(attention, pa.list_(pa.float16())),
        "written": np.full(count, time.time_ns()),
    }
    columns |= {name: [value, *[None] * (count - 1)] for name, value in zip(EXTRAS, first, strict=True)}
    return _checked(schema, columns)


def _checked(schema: Any, columns: Mapping[str, Any]) -> Any:
    pa = arrow()
    table = pa.table(
        {field.name: pa.array(columns[field.name], field.type) for field in schema if field.name != "check"}
    )
    return table.append_column("check", pa.array(checks(table))).cast(schema)


def checks(table: Any) -> I64:
    """[T] int64: a checksum (BLAKE2b) of each row of a table, over all its columns but `check`, in order of name."""
    columns = [_as_bytes(table[name].combine_chunks()) for name in sorted(table.column_names) if name != "check"]
    digests = [hashlib.blake2b(b"\x1f".join(row), digest_size=8).digest() for row in zip(*columns, strict=True)]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def _as_bytes(column: Any) -> list[bytes]:
    types = arrow().types
    kind = column.type
    if types.is_fixed_size_list(kind) or (types.is_list(kind) and types.is_floating(kind.value_type)):
        flat = column.flatten().to_numpy(zero_copy_only=False).tobytes()
        lengths = (
            column.value_lengths().fill_null(0).to_numpy()
            if types.is_list(kind)
            else np.full(len(column), kind.list_size)
        )
        stops = np.cumsum(lengths, dtype=np.int64) * (kind.value_type.bit_width // 8)
        return [flat[start:stop] for start, stop in zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True)]
    values = column.to_pylist()
    return [value if isinstance(value, bytes) else repr(value).encode() for value in values]


def extras_of(row: Mapping[str, Any]) -> Extras:
    """Sprite, thumbnails and overview from the first row of a video."""
    return Extras(row["sprite"], row["vtt"], json.loads(row["overview"]))


def video_table(schema: Any, record: Record, sequence: int, written: int) -> Any:
    """One row of `videos` as a pyarrow table.

    Args:
        sequence: the version of the table that the writer saw; of a record that keeps its rows, that of the row which
            it renews, so that it loses against whoever wrote other rows meanwhile.
        written: by the writer's clock, in nanoseconds since 1970.
    """
    row = {name: getattr(record, name) for name in Record.__slots__}
    row |= {"probe": json.dumps(dict(record.probe)), "shots": json.dumps(record.shots)}
    row |= {"sequence": sequence, "written": written}
    return _checked(schema, {name: [value] for name, value in row.items()})


def record_of(row: Mapping[str, Any]) -> Record:
    """The inverse of `video_table`."""
    values = {name: row[name] for name in Record.__slots__}
    values |= {"tags": tuple(row["tags"]), "grid": tuple(row["grid"]), "probe": json.loads(row["probe"])}
    return Record(**values | {"shots": tuple((start, stop) for start, stop in json.loads(row["shots"]))})


def newest(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The row that counts for each id: of the highest sequence, then the last written.

    The sequence rises with every commit, whatever the clocks of the writing machines say; the clock decides only
    between writers that did not see each other.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        other = best.get(row["id"])
        if other is None or stamp(row) > stamp(other):
            best[row["id"]] = row
    return best


def stamp(row: Mapping[str, Any]) -> tuple[int, int]:
    """Orders the rows of one id."""
    return row["sequence"], row["written"]


def this_row(id: str, stamp: tuple[int, int]) -> str:
    """SQL for one row of `videos`."""
    return f"(id = {quoted([id])} AND sequence = {stamp[0]} AND written = {stamp[1]})"


def vectors_of(column: Any) -> F32:
    """[T, D] float32 of unit length from a column of 16-bit vectors."""
    stored = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    width = stored.type.list_size
    vectors = stored.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    norms = np.sqrt(np.vecdot(vectors, vectors))
    return np.asarray(vectors / np.where(norms > 0, norms, 1)[:, None], np.float32)


def block_of(table: Any) -> Block:
    """The rows of one generation, columns `NUMBERS`, as a Block."""
    order = np.argsort(table["pts_seconds"].to_numpy(), kind="stable")
    columns = {name: table[name].to_numpy()[order] for name in NUMBERS if name not in ("generation", "vector")}
    columns |= {"shot": columns["shot"].astype(np.int64), "vectors": vectors_of(table["vector"])[order]}
    return Block(generation=table["generation"][0].as_py(), **columns)


def preview_of(row: Mapping[str, Any]) -> Preview:
    """A key-frame's row as a Preview; the attention sums to 1 again after 16 bits."""
    attention = np.asarray(row["attention"], np.float32)
    return Preview(row["pts_seconds"], row["preview"], attention / max(attention.sum(dtype=np.float32), 1e-12))


def quoted(values: Iterable[str]) -> str:
    """A list of strings for SQL's IN."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
