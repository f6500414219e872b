"""The tables of a library in LanceDB: how they are opened, read and written.

A video is written in two commits: its vectors under a new generation, then its record, which names the generation. So
both become visible together. Nobody sees vectors that no record names, and `upkeep.compact` deletes them. The record is
upserted by id; LanceDB retries an upsert by itself when other processes commit at the same time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keyreel.errors import Damaged, LibraryError, ModelMismatch, import_extra
from keyreel.library import schema
from keyreel.library.errors import MAKE, Absent, Conflict, Outdated, Vanished, ask_for_room, cut_short, lance_errors
from keyreel.library.schema import RECORDS, VECTORS, quoted
from keyreel.library.types import Extras, Preview, Record, Rows
from keyreel.types import I64

REPAIR = "`keyreel library verify --repair`, then `keyreel library update` restore the videos"
_log = logging.getLogger("keyreel.library")

T = TypeVar("T")
# LanceDB's own caches would grow with each commit, up to gigabytes.
INDEX_CACHE_BYTES, METADATA_CACHE_BYTES = 256 << 20, 8 << 20
CHUNK = 128  # generations or ids named in one condition; for more, everything is read
_ATTEMPTS = 10


class Tables:
    """A library's tables in a folder or at a URI such as `s3://bucket/library`. Safe to share between threads.

    Several processes may read and write. Not fork-safe: start processes with spawn. All methods raise LibraryError
    where there is no library, or this keyreel cannot read it.

    Args:
        uri: folder or URI; nothing is opened or made before it is needed.
        storage_options: of the object store, passed through to LanceDB.
        upgrading: opens the tables although those of an older format are there, too.
    """

    def __init__(
        self,
        uri: str,
        *,
        storage_options: Mapping[str, str] | None = None,
        upgrading: bool = False,
    ) -> None:
        self.uri = uri
        self.options = dict(storage_options) if storage_options else None
        self._upgrading = upgrading
        self._lock = threading.RLock()  # around opening and the cache of records
        self._writing = threading.Lock()  # one commit at a time, while others read
        self._database: Any = None
        self._tables: dict[str, Any] = {}
        self._records: dict[str, tuple[int, Record]] = {}  # when each was written, and what
        self._seen: int | None = None  # the version that the cache holds
        self._damaged: tuple[str, ...] = ()  # paths of records that it leaves out

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

    def create(self, *, model: str, model_sha256: str, width: int) -> None:
        """Makes the tables, or checks that they are of this model; several processes may do so at once."""
        if self.exists():
            self.table(RECORDS)  # raises where it is outdated
        for name, columns in schema.schemas(model, model_sha256, width).items():
            failure: LibraryError | None = None
            try:
                with lance_errors(self.uri):
                    self._connection().create_table(name, schema=columns)
            except LibraryError as error:  # usually because it exists already; otherwise opening it fails, too
                failure = error
            try:
                self.table(name)
            except Absent as error:
                raise failure or error from None
            self.check_model(model, model_sha256, width, name)

    def check_model(
        self,
        model: str,
        model_sha256: str,
        width: int,
        name: str = RECORDS,
        same_scene: Container[str] = (),
        same_vectors: Container[str] = (),
    ) -> None:
        """Raises ModelMismatch if another model made the vectors, Outdated if it is one of `same_scene`; one of
        `same_vectors` made the very same.
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
        """A LanceDB table; each read of it sees the newest version."""
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
        """A view of its own of a table, at the newest or a given version."""
        if self.folder is not None and not self.folder.is_dir():  # connecting would make the folder
            raise Absent(f"there is no library at {self.uri}", hint=MAKE)
        with lance_errors(self.uri):
            table = self._connection().open_table(name)
            if version is not None:
                table.checkout(version)
            _ = table.schema  # LanceDB panics here where the manifest is damaged
            return table

    def close(self) -> None:
        """Closes the tables; they are opened again when needed. Idempotent."""
        with self._lock:
            self._tables.clear()
            self._records.clear()
            self._database = self._seen = None

    def _connection(self) -> Any:
        with self._lock:
            if self._database is None:
                lancedb = import_extra("lancedb", extra="library", purpose="a library of videos")
                # With an interval of 0 each read looks for a newer version.
                self._database = lancedb.connect(
                    self.uri,
                    storage_options=self.options,
                    read_consistency_interval=timedelta(0),
                    session=lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES),
                )
            return self._database

    def drop_tables(self, *names: str) -> None:
        """Deletes whole tables."""
        for name in names:
            with lance_errors(self.uri):
                self._connection().drop_table(name, ignore_missing=True)

    # --- reading --------------------------------------------------------------------------------------------------

    def version(self) -> int:
        """A number that changes with each commit of any process."""
        with lance_errors(self.uri):
            return int(self.table(RECORDS).version)

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        """The videos in order of path; unknown `ids` are left out."""
        with self._lock:
            self._refresh()
            wanted = list(self._records) if ids is None else dict.fromkeys(ids)
            chosen = [self._records[id][1] for id in wanted if id in self._records]
        return sorted(chosen, key=lambda record: (record.path, record.id))

    def damaged(self) -> tuple[str, ...]:
        """The paths, if they can be trusted, of videos whose record is damaged; `records` leaves them out."""
        with self._lock:
            self._refresh()
            return self._damaged

    def rows(self, generations: Sequence[str]) -> Iterator[tuple[str, Rows]]:
        """Each of these generations that is there and can be read, in any order."""
        wanted = dict.fromkeys(generations)
        for attempt in range(_ATTEMPTS):
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
            except Vanished:  # a compaction may have deleted the files; the next look sees the new ones
                if attempt == _ATTEMPTS - 1:
                    raise
            except Damaged:  # what lies in other places can be read
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
        """The picture of the key-frame at that time, to half a millisecond; None without one."""
        low, high = float(pts_seconds) - 5e-4, float(pts_seconds) + 5e-4
        where = f"generation = {quoted([generation])} AND keyframe AND pts_seconds BETWEEN {low!r} AND {high!r}"
        rows, _ = self.sound(VECTORS, where)
        return min(rows, key=lambda row: abs(row["pts_seconds"] - pts_seconds))["preview"] if rows else None

    def extras(self, generation: str) -> Extras | None:
        """Sprite, thumbnails and overview of one generation; None without any, or where they are damaged."""
        rows, _ = self.sound(VECTORS, f"generation = {quoted([generation])} AND row = 0 AND sprite IS NOT NULL")
        return Extras(rows[0]["sprite"], rows[0]["vtt"], json.loads(rows[0]["overview"])) if rows else None

    def sound(self, name: str, where: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Whole rows of a table: those with the right checksum, and the damaged ones."""
        table = self.read(name, where, None)
        right, array = schema.checks(table) == table["check"].to_numpy(), schema.arrow().array
        if not right.all():
            _log.warning("%s: %d rows of %s are damaged and skipped; %s", self.uri, (~right).sum(), name, REPAIR)
        return table.filter(array(right)).to_pylist(), table.filter(array(~right)).to_pylist()

    def read(self, name: str, where: str | None, columns: Sequence[str] | None = None) -> Any:
        """Rows of a table as a pyarrow table; read again if a compaction deletes their files meanwhile."""

        def work() -> Any:
            query = self.table(name).search()
            query = query.where(where) if where else query
            return (query.select(list(columns)) if columns else query).to_arrow()

        return self.retried(work, Vanished)

    def row_ids(self, table: Any) -> I64:
        """LanceDB's numbers of all rows, rising: number of the file << 32 | row in it. Reads no data files."""
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
        """Brings the cache of records up to date; reads only the rows that changed."""
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
        """One pyarrow table for each generation, in the order in which they are stored."""
        query = self.table(VECTORS).search().select(list(schema.NUMBERS))
        if len(wanted) <= CHUNK:
            query = query.where(f"generation IN ({quoted(wanted)})")
        pending: list[Any] = []  # batches of the generation that is being read
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

    # --- writing --------------------------------------------------------------------------------------------------

    def put(
        self,
        record: Record,
        rows: Rows | None = None,
        previews: Sequence[Preview] = (),
        extras: Extras | None = None,
    ) -> Record:
        """Commits one video in place of the one with its id.

        Args:
            record: with rows, its generation is a new one, `uuid.uuid4().hex`; without, it is empty.
            previews: of the key-frames among the rows.

        Returns:
            The record as it is stored, with the rows' digest.
        """
        counts, known = (0, None) if rows is None else rows.counts, (record.frames, record.subjects)
        if known != counts or bool(record.generation) != (rows is not None):
            what = f"{counts} frames and subjects do not fit generation {record.generation!r} of {known}"
            raise ValueError(what)
        digest = None
        if rows is not None:
            written = schema.vector_rows(self.table(VECTORS).schema, record, rows, previews, extras)
            digest = schema.rows_of(written.select(schema.NUMBERS)).digest
            self.add_rows(written)
            self._add_late_columns()
        record = replace(record, digest=digest)
        self.upsert([record])
        return record

    def _add_late_columns(self) -> None:
        """Gives the records of a library that an older keyreel made the columns that it lacks."""
        whole = schema.schemas("", "", 1)[RECORDS]
        with self._writing, contextlib.suppress(Conflict):  # another process was quicker
            there = self.table(RECORDS).schema.names
            if lacking := [whole.field(name) for name in schema.LATE if name not in there]:
                self.retried(lambda: self.table(RECORDS).add_columns(lacking))

    def renew(self, record: Record) -> bool:
        """Replaces the record of a video and keeps its rows.

        Returns:
            False if another process has removed the video or written other rows for it; then nothing has changed.
        """
        return self.upsert([record], same_generation=True) > 0

    def add_rows(self, rows: Any) -> None:
        """Adds rows that no record names yet."""
        with self._writing:
            self._commit(VECTORS, rows.nbytes, lambda table: table.add(rows))

    def drop(self, ids: Sequence[str]) -> int:
        """Removes videos and returns how many there were; `compact` deletes their rows."""
        there = [record.id for record in self.records(ids)]
        for start in range(0, len(there), CHUNK):
            self.delete(RECORDS, f"id IN ({quoted(there[start : start + CHUNK])})")
        return len(there)

    def delete(self, name: str, where: str) -> None:
        """Deletes rows of a table."""
        self.retried(lambda: self.table(name).delete(where))

    def upsert(self, records: Sequence[Record], *, same_generation: bool = False) -> int:
        """Updates or inserts the records of videos whose rows are there; returns how many were written."""
        if not records:
            return 0
        rows = schema.record_rows(self.table(RECORDS).schema, records)

        def work(table: Any) -> Any:
            merge = table.merge_insert("id")
            if same_generation:
                return merge.when_matched_update_all(where="target.generation = source.generation").execute(rows)
            return merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

        with self._writing:
            before, result = self._commit(RECORDS, rows.nbytes, work)
            count, after = int(result.num_inserted_rows + result.num_updated_rows), int(result.version)
            with self._lock:
                if count and self._seen == before and after == before + 1:  # no other commit: no need to read it
                    for record, row in zip(records, rows.to_pylist(), strict=True):
                        self._records[record.id] = row["written"], schema.record_of(row)
                    self._seen = after
        return count

    def _commit(self, name: str, size: int, work: Callable[[Any], Any]) -> tuple[int, Any]:
        """Writes, then reads the last row back; gives the version before, and LanceDB's result.

        LanceDB does not notice when the disk is full at the last piece of a file: the file is cut short, the commit
        succeeds, and no reader can use the table.

        Raises:
            Full: there is no room; then the table is as before.
        """
        ask_for_room(self.folder, size)
        table = self.table(name)
        with lance_errors(self.uri):
            before = int(table.version)
        result = self.retried(lambda: work(table))
        version = int(result.version)
        if version == before:  # nothing was written
            return before, result
        committed = table if table.version == version else self.open(name, version)
        try:
            with lance_errors(self.uri):
                committed.take_offsets([committed.count_rows() - 1]).select(["check"]).to_arrow()
        except Damaged as error:
            if self.table(name).version == version:
                self.restore(name, version - 1)
            else:  # others have committed since: remove the rows of our file only
                last = int(self.row_ids(committed)[-1]) >> 32
                self.delete(name, f"_rowid >= {last << 32} AND _rowid < {(last + 1) << 32}")
            raise cut_short(self.uri) from error
        return before, result

    def overwrite(self, name: str, columns: Any, batches: Iterable[Any]) -> None:
        """Makes a table, or writes all of it anew in one commit; an error in `batches` leaves it as it was.

        Args:
            columns: its schema.
            batches: pyarrow record batches of that schema; they are asked for in another thread.
        """
        problems: list[BaseException] = []

        def told() -> Iterator[Any]:
            try:
                yield from batches
            except BaseException as error:  # LanceDB would keep no more of it than its text
                problems.append(error)
                raise

        with self._lock:
            self._tables.pop(name, None)
        try:
            before = self.open(name).version
        except Absent:
            before = None
        reader = schema.arrow().RecordBatchReader.from_batches(columns, told())
        mode = "create" if before is None else "overwrite"
        try:
            with lance_errors(self.uri):
                table = self._connection().create_table(name, data=reader, schema=columns, mode=mode)
        except LibraryError as error:
            raise (problems[0] if problems else error) from None
        try:
            with lance_errors(self.uri):
                if count := table.count_rows():
                    table.take_offsets([count - 1]).select(["check"]).to_arrow()
        except Damaged as error:  # see `_commit`
            if before is None:
                self.drop_tables(name)
            else:
                self.restore(name, before)
            raise cut_short(self.uri) from error

    def restore(self, name: str, version: int) -> None:
        """Makes an older version the newest one."""
        with lance_errors(self.uri):
            self.open(name, version).restore()

    def retried(self, work: Callable[[], T], again: type[LibraryError] = Conflict) -> T:
        """Does the work, again if it raises `again`, waiting longer each time."""
        for attempt in range(_ATTEMPTS):
            try:
                with lance_errors(self.uri):
                    return work()
            except again:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(min(0.01 * 2**attempt, 0.5))
        raise AssertionError("unreachable")
