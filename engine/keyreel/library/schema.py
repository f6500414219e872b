"""Defines the columns of a library's tables, and converts between rows and the classes of `types`.

`vectors` has a row for each vector: the scene of each sampled frame, and the subject of those where it differs. A
scene's row also has the region of the subject; a key-frame's its picture; a video's first row its sprite. A subject's
row has the vector and its keys; its other columns are null. Pictures are in the table, so that they are written
atomically, work on object storage, and `compact` frees their space. `records` has a row for each video; `id` is the
primary key. Each row has a checksum, since the file format has none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import Damaged, LibraryError, import_extra
from keyreel.library.types import F16, Extras, Preview, Record, Rows, Subjects
from keyreel.types import F32, I64

FORMAT = 3
VECTORS, RECORDS = "vectors", "records"
SHARDS = "shards"  # names the shards, see `shards`
TABLES = (VECTORS, RECORDS)  # in order of writing: `records` is the commit
FORMAT_1 = ("frames", "videos")  # their names in format 1
SCENE, SUBJECT = "scene", "subject"  # kinds of vectors
NUMBERS = ("generation", "row", "kind", "pts_seconds", "frame_index", "vector", "shot", "keyframe", "weight", "region")
EXTRAS = ("sprite", "vtt", "overview")
_MODEL = ("model", "model_sha256", "width")  # in the metadata
LATE = ("digest", "scenes")  # columns that the records of an older keyreel lack
# With a primary key, LanceDB retries one of two concurrent inserts of an id as an update. Without, both rows stay.
_KEY = {"lance-schema:unenforced-primary-key": "true"}


def arrow() -> ModuleType:
    """Imports pyarrow."""
    return import_extra("pyarrow", extra="library", purpose="a library of videos")


def schemas(model: str, model_sha256: str, width: int) -> dict[str, Any]:
    """The pyarrow schema of each table, with the model and D in its metadata."""
    pa = arrow()
    text, float64, int64 = pa.string(), pa.float64(), pa.int64()
    columns = {
        VECTORS: {
            "video": text,
            "generation": text,
            "row": pa.int32(),
            "kind": text,
            "pts_seconds": float64,
            "frame_index": int64,
            "vector": pa.list_(pa.float16(), width),
            "shot": pa.int32(),
            "keyframe": pa.bool_(),
            "weight": pa.float32(),
            "preview": pa.binary(),
            "attention": pa.list_(pa.float16()),
            "region": pa.list_(pa.float16()),
            "sprite": pa.binary(),
            "vtt": text,
            "overview": text,
            "written": int64,
            "check": int64,
        },
        RECORDS: {
            "id": text,
            "path": text,
            "size": int64,
            "mtime_ns": int64,
            "fingerprint": text,
            "generation": text,
            "frames": int64,
            "subjects": int64,
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
            "digest": int64,
            "scenes": text,
            "model": text,
            "model_sha256": text,
            "written": int64,
            "check": int64,
        },
    }
    about = {"format": str(FORMAT), "model": model, "model_sha256": model_sha256, "width": str(width)}
    metadata = {f"keyreel.{name}": value for name, value in about.items()}
    made = {name: pa.schema(list(fields.items()), metadata=metadata) for name, fields in columns.items()}
    made[RECORDS] = made[RECORDS].set(0, pa.field("id", text, nullable=False, metadata=_KEY))
    return made


def lost_columns(name: str, schema: Any) -> list[str]:
    """The columns that a table lacks, see `LATE`."""
    return [column for column in schemas("", "", 1)[name].names if column not in (*schema.names, *LATE)]


def format_of(schema: Any) -> int:
    """Reads the format from a table's metadata. Raises LibraryError if another program or a newer keyreel made it."""
    about = schema.metadata or {}
    if b"keyreel.format" not in about:
        raise LibraryError("these tables were not made by keyreel", hint="give another folder for the library")
    number = _number_of(about[b"keyreel.format"])
    if number > FORMAT:
        raise LibraryError(f"the library has format {number}, this keyreel knows {FORMAT}", hint="update keyreel")
    return number


def model_of(schema: Any) -> tuple[str, str, int]:
    """Reads name, sha256 and D of the model from a table's metadata. Raises LibraryError as `format_of`."""
    format_of(schema)
    if lost := [key for key in _MODEL if f"keyreel.{key}".encode() not in schema.metadata]:
        raise Damaged("the library's metadata of its model are damaged", [f"no {lost}"])
    name, sha256, width = (schema.metadata[f"keyreel.{key}".encode()] for key in _MODEL)
    return name.decode(errors="replace"), sha256.decode(errors="replace"), _number_of(width)


def _number_of(data: bytes) -> int:
    try:
        return int(data)
    except ValueError as error:
        raise Damaged("the library's metadata are damaged", [str(error)]) from error


def vector_rows(
    schema: Any, record: Record, rows: Rows, previews: Sequence[Preview] = (), extras: Extras | None = None
) -> Any:
    """Makes a pyarrow table of the vectors of one video, scenes first."""
    pa = arrow()
    count = len(rows)
    shown = {preview.pts_seconds: preview for preview in previews}
    pictures = [shown.get(pts) for pts in rows.pts_seconds.tolist()]
    attention = [None if one is None else one.attention.astype(np.float16) for one in pictures]
    first = (extras.sprite, extras.vtt, json.dumps(dict(extras.overview))) if extras else (None,) * 3
    columns = {
        "video": [record.id] * count,
        "generation": [record.generation] * count,
        "row": np.arange(count, dtype=np.int32),
        "kind": [SCENE] * count,
        "pts_seconds": rows.pts_seconds,
        "frame_index": rows.frame_index,
        "vector": halves(rows.vectors),
        "shot": rows.shot.astype(np.int32),
        "keyframe": rows.keyframe,
        "weight": rows.weight,
        "preview": [one and one.jpeg for one in pictures],
        "attention": pa.array(attention, pa.list_(pa.float16())),
        "region": None if rows.subjects is None else list(rows.subjects.region.astype(np.float16)),
        "written": np.full(count, time.time_ns()),
    }
    columns |= {name: [value, *[None] * (count - 1)] for name, value in zip(EXTRAS, first, strict=True)}
    scenes = checked(schema, columns)
    if not rows.subjects:
        return scenes
    own, count = rows.subjects, len(rows.subjects)
    columns = {
        "video": [record.id] * count,
        "generation": [record.generation] * count,
        "row": own.row.astype(np.int32),
        "kind": [SUBJECT] * count,
        "pts_seconds": rows.pts_seconds[own.row],
        "vector": halves(own.vectors),
        "written": np.full(count, time.time_ns()),
    }
    return pa.concat_tables([scenes, checked(schema, columns)])


def record_rows(schema: Any, records: Sequence[Record]) -> Any:
    """Makes a pyarrow table with a row of `records` for each record."""
    columns = {name: [getattr(record, name) for record in records] for name in Record.__slots__}
    columns |= {
        "probe": [json.dumps(dict(record.probe)) for record in records],
        "shots": [json.dumps(record.shots) for record in records],
        "scenes": [json.dumps(record.scenes) if record.scenes else None for record in records],
        "written": [time.time_ns()] * len(records),
    }
    return checked(schema, columns)


def record_of(row: Mapping[str, Any]) -> Record:
    """Inverts `record_rows` for one row."""
    values = {name: row.get(name) for name in Record.__slots__}
    values |= {"tags": tuple(row["tags"]), "grid": tuple(row["grid"]), "probe": json.loads(row["probe"])}
    if row["date"] == row["mtime_ns"] / 1e9:  # an older keyreel wrote the time of the last change instead of no date
        values["date"] = None
    spans = {name: json.loads(row.get(name) or "[]") for name in ("shots", "scenes")}
    return Record(**values | {name: tuple((start, stop) for start, stop in own) for name, own in spans.items()})


def rows_of(table: Any) -> Rows:
    """Converts the rows of one generation (columns `NUMBERS`) to Rows in order of time, with their digest.

    The digest hashes the sum of each column's words: every flipped bit changes it, the order of the rows does not. It
    takes under 3 % of the reading time; BLAKE2b of all bytes would take 30 %.
    """
    kind = table["kind"].to_numpy()
    scenes, others = (table.filter(arrow().array(kind == name)) for name in (SCENE, SUBJECT))
    plain = ("pts_seconds", "frame_index", "shot", "keyframe", "weight")
    columns = {name: scenes[name].to_numpy() for name in plain}
    stored = stored_vectors(scenes)
    words = [*columns.values(), stored]
    order = np.argsort(columns["pts_seconds"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    subjects, regions = None, scenes["region"].combine_chunks()
    if len(regions) and not regions.null_count:
        row, own = others["row"].to_numpy(), stored_vectors(others)
        rising = np.argsort(row)
        region = regions.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
        words += [row, own, region]
        subjects = Subjects(row[rising].astype(np.int64), units(own)[rising], region[order].astype(np.float32))
    columns |= {"shot": columns["shot"].astype(np.int64), "vectors": units(stored)[order]}
    return Rows(**columns, subjects=subjects, digest=_digest(words))


def _digest(columns: Sequence[NDArray[Any]]) -> int:
    hashed = hashlib.blake2b(digest_size=8)
    for values in columns:
        row = values[:1].nbytes
        word = next(word for word in (np.uint64, np.uint32, np.uint16, np.uint8) if not row % word().nbytes)
        words = np.ascontiguousarray(values).view(np.uint8).reshape(-1).view(word)
        hashed.update(words.sum(dtype=np.uint64).tobytes())
    return int.from_bytes(hashed.digest(), "little", signed=True)


def stored_vectors(table: Any) -> F16:
    """[n, D] float16: the stored column `vector`."""
    column = table["vector"].combine_chunks()
    stored: F16 = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return stored


def units(stored: F16) -> F32:
    """[n, D] float32: stored vectors, brought back to unit length."""
    vectors: F32 = stored.astype(np.float32)
    norms = np.sqrt(np.vecdot(vectors, vectors))[:, None]
    np.divide(vectors, norms, out=vectors, where=norms > 0)
    return vectors


def halves(vectors: F32) -> Any:
    """Converts [n, D] float32 to a pyarrow array of float16 lists."""
    pa = arrow()
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])


def preview_of(row: Mapping[str, Any]) -> Preview:
    """Converts a key-frame's row to a Preview; the attention sums to 1 again."""
    attention = np.asarray(row["attention"], np.float32)
    return Preview(row["pts_seconds"], row["preview"], attention / max(attention.sum(dtype=np.float32), 1e-12))


def checked(schema: Any, columns: Mapping[str, Any]) -> Any:
    """Makes a pyarrow table of these columns, and adds the checksum of each row. A missing column or None is null."""
    pa = arrow()
    count = len(next(iter(columns.values())))
    names = [field for field in schema if field.name != "check"]

    def filled(field: Any) -> Any:
        values = columns.get(field.name)
        return pa.nulls(count, field.type) if values is None else pa.array(values, field.type)

    table = pa.table({field.name: filled(field) for field in names})
    return table.append_column("check", pa.array(checks(table))).select(schema.names).cast(schema)


def checks(table: Any) -> I64:
    """[T] int64: the checksum (BLAKE2b) of each row.

    It covers the columns in order of name, without `check` and the columns of `LATE` that the row was written without.
    """
    names = sorted(name for name in table.column_names if name not in ("check", "digest")) if len(table) else []
    columns: list[list[bytes | None]] = [[*_as_bytes(table[name].combine_chunks())] for name in names]
    if "scenes" in names:
        there, place = table["scenes"].is_valid().to_pylist(), names.index("scenes")
        columns[place] = [value if valid else None for value, valid in zip(columns[place], there, strict=True)]
    rows = (b"\x1f".join(value for value in row if value is not None) for row in zip(*columns, strict=True))
    digests = [hashlib.blake2b(row, digest_size=8).digest() for row in rows]
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


def quoted(values: Iterable[str]) -> str:
    """Formats strings as a list for SQL's IN."""
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)
