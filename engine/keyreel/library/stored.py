"""Opens and reads a library's tables: records, from a cache that follows every commit, rows and pictures."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keyreel.errors import Damaged, LibraryError, ModelMismatch, import_extra
from keyreel.library import schema
from keyreel.library.errors import MAKE, REPAIR, Absent, Conflict, Outdated, Vanished, lance_errors
from keyreel.library.schema import RECORDS, VECTORS, quoted
from keyreel.library.types import Extras, Preview, Record, Rows
from keyreel.types import I64

T = TypeVar("T")
_log = logging.getLogger("keyreel.library")
CHUNK = 128  # most generations or ids in one condition; for more it reads everything
# LanceDB's default caches would grow with each commit, up to gigabytes.
INDEX_CACHE_BYTES, METADATA_CACHE_BYTES = 256 << 20, 8 << 20
ATTEMPTS = 10  # attempts when other processes interfere


class Stored:
    """The existing tables and their content, see `table.Tables`."""

    def __init__(self, uri: str, *, storage_options: Mapping[str, str] | None = None, upgrading: bool = False) -> None:
        self.uri = uri
        self.options = dict(storage_options) if storage_options else None
        self._upgrading = upgrading
        self._lock = threading.RLock()  # around opening and the cache of records
        self._database: Any = None
        self._tables: dict[str, Any] = {}
        self._records: dict[str, tuple[int, Record]] = {}  # when each was written, and what
        self._seen: int | None = None  # version of the cache
        self._damaged: tuple[str, ...] = ()  # paths of damaged records

    def close(self) -> None:
        """Closes the tables. The next use opens them again. Idempotent."""
        with self._lock:
            self._tables.clear()
            self._database = None
            self._records.clear()
            self._seen = None

    # --- opening --------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """The library's folder on this machine; None for a URI."""
        return None if "://" in self.uri else Path(self.uri)

    def exists(self) -> bool:
        """Whether there is a library."""
        try:
            self.table(RECORDS)
        except Absent:
            return False
        except (Damaged, Outdated):
            pass
        return True

    def check_model(
        self,
        model: str,
        model_sha256: str,
        width: int,
        name: str = RECORDS,
        same_scene: Container[str] = (),
        same_vectors: Container[str] = (),
    ) -> None:
        """Checks which model made the vectors; those of `same_vectors` are equal.

        Raises:
            Outdated: a model of `same_scene` made them, so that `upgrade` converts them.
            ModelMismatch: another model made them.
        """
        known, sha256, known_width = schema.model_of(self.table(name).schema)
        if sha256 in same_scene:
            raise Outdated(
                f"the library {self.uri} holds vectors of an earlier model {known!r} (sha256 {sha256[:12]}), which "
                f"{model!r} (sha256 {model_sha256[:12]}) can still use",
                hint=f"`keyreel library upgrade {self.uri}` converts it without decoding a video",
            )
        if sha256 not in same_vectors and (sha256, known_width) != (model_sha256, width):
            raise ModelMismatch(
                f"the library {self.uri} holds vectors of the model {known!r} (D = {known_width}, sha256 "
                f"{sha256[:12]}), not of {model!r} (D = {width}, sha256 {model_sha256[:12]})",
                hint=f"use that model, or change the library's: `keyreel library reindex {self.uri} --model {model}`",
            )

    def model(self) -> tuple[str, str, int]:
        """Name, sha256 and D of the model that made the vectors."""
        return schema.model_of(self.table(RECORDS).schema)

    def table(self, name: str) -> Any:
        """A LanceDB table; each read of it sees the newest version.

        Raises:
            LibraryError: there is no library, it has another format, or it is damaged.
        """
        with self._lock:
            if name not in self._tables:
                if not self._upgrading and self.has_format_1():
                    raise self._outdated()
                table = self.open(name)
                if schema.format_of(table.schema) < schema.FORMAT and not self._upgrading:
                    raise self._outdated()
                if not self._upgrading and (lost := schema.lost_columns(name, table.schema)):
                    raise Damaged(f"{name} of the library {self.uri} lacks columns", [f"no {lost}"], hint=REPAIR)
                self._tables[name] = table
            return self._tables[name]

    def _outdated(self) -> Outdated:
        hint = f"`keyreel library upgrade {self.uri}` converts it and keeps everything"
        return Outdated(f"the library {self.uri} has an older format", hint=hint)

    def has_format_1(self) -> bool:
        """Whether tables of format 1 are there."""
        try:
            return bool(schema.format_of(self.open(schema.FORMAT_1[-1]).schema))
        except (Absent, Damaged):
            return False

    def open(self, name: str, version: int | None = None) -> Any:
        """Opens a table again, at the newest or a given version.

        Raises:
            LibraryError: there is no such table.
        """
        if self.folder is not None and not self.folder.is_dir():  # connecting would create the folder
            raise Absent(f"there is no library at {self.uri}", hint=MAKE)
        with lance_errors(self.uri):
            table = self._connection().open_table(name)
            if version is not None:
                table.checkout(version)
            _ = table.schema  # LanceDB panics here where the manifest is damaged
            return table

    def _connection(self) -> Any:
        with self._lock:
            if self._database is None:
                lancedb = import_extra("lancedb", extra="library", purpose="a library of videos")
                # 0: each read looks for a newer version.
                self._database = lancedb.connect(
                    self.uri,
                    storage_options=self.options,
                    read_consistency_interval=timedelta(0),
                    session=lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES),
                )
            return self._database

    def retried(self, work: Callable[[], T], again: type[LibraryError] = Conflict) -> T:
        """Calls `work`, and again if it raises `again`, with growing pauses."""
        for attempt in range(ATTEMPTS):
            try:
                with lance_errors(self.uri):
                    return work()
            except again:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(min(0.01 * 2**attempt, 0.5))
        raise AssertionError("unreachable")

    # --- reading --------------------------------------------------------------------------------------------------

    def version(self) -> int:
        """A number that changes with each commit of any process."""
        with lance_errors(self.uri):
            return int(self.table(RECORDS).version)

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        """The records in order of path; ignores unknown `ids`."""
        with self._lock:
            self._refresh()
            wanted = list(self._records) if ids is None else dict.fromkeys(ids)
            chosen = [self._records[id][1] for id in wanted if id in self._records]
        return sorted(chosen, key=lambda record: (record.path, record.id))

    def damaged(self) -> tuple[str, ...]:
        """The paths of damaged records, as far as they can be read; `records` leaves these out."""
        with self._lock:
            self._refresh()
            return self._damaged

    def rows(self, generations: Sequence[str]) -> Iterator[tuple[str, Rows]]:
        """Yields the generations that exist and can be read, in any order."""
        wanted = dict.fromkeys(generations)
        for attempt in range(ATTEMPTS):
            if not wanted:
                return
            try:
                with lance_errors(self.uri):
                    for table in self._runs(wanted):
                        generation = table["generation"][0].as_py()
                        rows = schema.rows_of(table)
                        del wanted[generation]
                        yield generation, rows
                return
            except Vanished:  # a compaction may have deleted the files; the next read finds the new ones
                if attempt == ATTEMPTS - 1:
                    raise
            except Damaged:  # the other generations can be read
                names = list(wanted)
                step = CHUNK if len(names) > CHUNK else 1
                for start in range(0, len(names), step) if len(names) > 1 else ():
                    yield from self.rows(names[start : start + step])
                return

    def previews(self, generation: str) -> tuple[Preview, ...]:
        """The key-frames of one generation, in order of time, without damaged ones."""
        rows, _ = self.sound(VECTORS, f"generation = {quoted([generation])} AND preview IS NOT NULL")
        return tuple(schema.preview_of(row) for row in sorted(rows, key=lambda row: row["pts_seconds"]))

    def preview(self, generation: str, pts_seconds: float) -> bytes | None:
        """The picture of the key-frame at that time, within half a millisecond; None if there is none."""
        low, high = float(pts_seconds) - 5e-4, float(pts_seconds) + 5e-4
        where = f"generation = {quoted([generation])} AND keyframe AND pts_seconds BETWEEN {low!r} AND {high!r}"
        rows, _ = self.sound(VECTORS, where)
        return min(rows, key=lambda row: abs(row["pts_seconds"] - pts_seconds))["preview"] if rows else None

    def extras(self, generation: str) -> Extras | None:
        """Sprite, WebVTT and overview of one generation; None if missing or damaged."""
        rows, _ = self.sound(VECTORS, f"generation = {quoted([generation])} AND row = 0 AND sprite IS NOT NULL")
        return Extras(rows[0]["sprite"], rows[0]["vtt"], json.loads(rows[0]["overview"])) if rows else None

    def sound(self, name: str, where: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Reads whole rows of a table. Returns those with the right checksum, and the damaged ones."""
        table = self.read(name, where, None)
        right, array = schema.checks(table) == table["check"].to_numpy(), schema.arrow().array
        if not right.all():
            _log.warning("%s: %d rows of %s are damaged and skipped; %s", self.uri, (~right).sum(), name, REPAIR)
        return table.filter(array(right)).to_pylist(), table.filter(array(~right)).to_pylist()

    def read(self, name: str, where: str | None, columns: Sequence[str] | None = None) -> Any:
        """Reads rows as a pyarrow table; again if a compaction deletes the files meanwhile."""

        def work() -> Any:
            query = self.table(name).search()
            query = query.where(where) if where else query
            return (query.select(list(columns)) if columns else query).to_arrow()

        return self.retried(work, Vanished)

    def row_ids(self, table: Any) -> I64:
        """LanceDB's ids of all rows, rising: (number of the file << 32) + row in it. Reads no data files."""
        with lance_errors(self.uri):
            ids = table.search().select(["_rowid"]).to_arrow()["_rowid"].to_numpy()
        return np.sort(ids.astype(np.int64))

    def bytes(self) -> int | None:
        """Size on disk; None for a URI."""
        total = 0
        for path in self.folder.rglob("*") if self.folder is not None else ():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += path.stat().st_size if path.is_file() else 0
        return None if self.folder is None else total

    def _refresh(self) -> None:
        """Updates the cache of records; reads only changed rows."""
        version = self.version()
        if version == self._seen:
            return
        written = {row["id"]: row["written"] for row in self.read(RECORDS, None, ("id", "written")).to_pylist()}
        known = {id: old for id, old in self._records.items() if old[0] == written.get(id)}
        missing = [id for id in written if id not in known]
        if missing:
            where = f"id IN ({quoted(missing)})" if len(missing) <= CHUNK else None
            rows, damaged = self.sound(RECORDS, where)
            known |= {row["id"]: (row["written"], schema.record_of(row)) for row in rows}
            self._damaged = tuple(sorted({str(row["path"]) for row in damaged}))
        else:
            self._damaged = ()
        self._records, self._seen = known, version

    def _runs(self, wanted: Mapping[str, Any]) -> Iterator[Any]:
        """Yields a pyarrow table for each generation, in stored order."""
        query = self.table(VECTORS).search().select(list(schema.NUMBERS))
        if len(wanted) <= CHUNK:
            query = query.where(f"generation IN ({quoted(wanted)})")
        pending: list[Any] = []  # batches of the current generation
        for batch in query.to_batches():
            names = batch["generation"].to_numpy(zero_copy_only=False)
            edges = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
            for start, stop in pairwise(edges) if len(names) else ():
                if pending and pending[0]["generation"][0].as_py() != names[start]:
                    yield schema.arrow().Table.from_batches(pending)
                    pending = []
                if names[start] in wanted:
                    pending.append(batch.slice(start, stop - start))
        if pending:
            yield schema.arrow().Table.from_batches(pending)
