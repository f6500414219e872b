"""The tables of a library in LanceDB: how they are made and written.

A video is written in two commits: its vectors under a new generation, then its record, which names the generation. So
both become visible together. Nobody sees vectors that no record names, and `upkeep.compact` deletes them. The record is
upserted by id; LanceDB retries an upsert by itself when other processes commit at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from keyreel.errors import Damaged, LibraryError
from keyreel.library import schema
from keyreel.library.errors import Absent, Conflict, ask_for_room, cut_short, lance_errors
from keyreel.library.schema import RECORDS, VECTORS, quoted
from keyreel.library.stored import CHUNK, Stored
from keyreel.library.types import Extras, Preview, Record, Rows


class Tables(Stored):
    """A library's tables in a folder or at a URI such as `s3://bucket/library`. Safe to share between threads.

    Several processes may read and write. Not fork-safe: start processes with spawn. All methods raise LibraryError
    where there is no library, or this keyreel cannot read it.

    Args:
        uri: folder or URI; nothing is opened or made before it is needed.
        storage_options: of the object store, passed through to LanceDB.
        upgrading: opens the tables although those of an older format are there, too.
    """

    def __init__(self, uri: str, *, storage_options: Mapping[str, str] | None = None, upgrading: bool = False) -> None:
        super().__init__(uri, storage_options=storage_options, upgrading=upgrading)
        self._writing = threading.Lock()  # one commit at a time, while others read

    @property
    def parts(self) -> tuple[Tables]:
        """The only one: see `shards.Shards`."""
        return (self,)

    def number_of(self, id: str) -> int:
        """The shard to which a video falls, by its id."""
        return 0

    def of(self, id: str) -> Tables:
        """The tables that hold a video."""
        return self

    def create(self, *, model: str, model_sha256: str, width: int) -> None:
        """Makes the tables, or checks that they are of this model; several processes may do so at once."""
        if self.exists():
            self.table(RECORDS)  # raises where it is outdated
        with contextlib.suppress(Absent):
            self.open(schema.SHARDS)
            raise LibraryError(f"another process has spread the library {self.uri} over shards", hint="open it again")
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

    def write_table(self, name: str, rows: Any, *, new: bool) -> None:
        """Writes a whole table in one commit; with `new`, only where there is none."""
        with lance_errors(self.uri):
            self._connection().create_table(name, data=rows, mode="create" if new else "overwrite")

    def drop_tables(self, *names: str) -> None:
        """Deletes whole tables."""
        for name in names:
            with lance_errors(self.uri):
                self._connection().drop_table(name, ignore_missing=True)
