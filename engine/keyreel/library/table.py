"""Makes and writes the tables of a library in LanceDB.

It writes a video in two commits: the vectors, under a new generation, then the record that names the generation. So
both become visible together. Readers ignore vectors that no record names, and `upkeep.compact` deletes them. Records
are upserted by id; LanceDB retries an upsert when other processes commit at the same time.
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
    """The tables of a library in a folder, or at a URI such as `s3://bucket/library`. Safe to share between threads.

    Several processes may read and write. Not fork-safe: start processes with spawn. All methods raise LibraryError if
    there is no library, or this keyreel cannot read it.

    Args:
        uri: folder or URI; opened when needed.
        storage_options: credentials and settings of the object store, for LanceDB.
        upgrading: open the tables even if tables of an older format exist.
    """

    def __init__(self, uri: str, *, storage_options: Mapping[str, str] | None = None, upgrading: bool = False) -> None:
        super().__init__(uri, storage_options=storage_options, upgrading=upgrading)
        self._writing = threading.Lock()  # one commit at a time; reads go on

    @property
    def parts(self) -> tuple[Tables]:
        """These tables; a spread library has several, see `shards.Shards`."""
        return (self,)

    def number_of(self, id: str) -> int:
        """The number of a video's shard: 0."""
        return 0

    def of(self, id: str) -> Tables:
        """The tables of a video's shard: these."""
        return self

    def create(self, *, model: str, model_sha256: str, width: int) -> None:
        """Makes the tables, or checks that they have this model. Several processes may call it at once.

        Raises:
            LibraryError: the tables cannot be created.
        """
        if self.exists():
            self.table(RECORDS)  # raises if outdated
        with contextlib.suppress(Absent):
            self.open(schema.SHARDS)
            raise LibraryError(f"another process has spread the library {self.uri} over shards", hint="open it again")
        for name, columns in schema.schemas(model, model_sha256, width).items():
            failure: LibraryError | None = None
            try:
                with lance_errors(self.uri):
                    self._connection().create_table(name, schema=columns)
            except LibraryError as error:  # usually it exists already; else opening it fails too
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
        """Commits a video, in place of the one with its id.

        Args:
            record: with rows it has a new generation, `uuid.uuid4().hex`; without rows an empty one.
            previews: pictures of the key-frames.

        Returns:
            The stored record, with the digest of the rows.

        Raises:
            ValueError: rows and generation of the record do not agree.
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
        """Adds the columns that the records of an older keyreel lack."""
        whole = schema.schemas("", "", 1)[RECORDS]
        with self._writing, contextlib.suppress(Conflict):  # another process was quicker
            there = self.table(RECORDS).schema.names
            if lacking := [whole.field(name) for name in schema.LATE if name not in there]:
                self.retried(lambda: self.table(RECORDS).add_columns(lacking))

    def renew(self, record: Record) -> bool:
        """Replaces the record of a video, keeps its rows.

        Returns:
            False if another process has removed the video or written other rows; then it changes nothing.
        """
        return self.upsert([record], same_generation=True) > 0

    def add_rows(self, rows: Any) -> None:
        """Adds rows that no record names yet."""
        with self._writing:
            self._commit(VECTORS, rows.nbytes, lambda table: table.add(rows))

    def drop(self, ids: Sequence[str]) -> int:
        """Removes the records of videos. Returns how many existed. `compact` deletes their rows."""
        there = [record.id for record in self.records(ids)]
        for start in range(0, len(there), CHUNK):
            self.delete(RECORDS, f"id IN ({quoted(there[start : start + CHUNK])})")
        return len(there)

    def delete(self, name: str, where: str) -> None:
        """Deletes rows of a table."""
        self.retried(lambda: self.table(name).delete(where))

    def upsert(self, records: Sequence[Record], *, same_generation: bool = False) -> int:
        """Updates or inserts records whose rows exist. Returns how many it wrote."""
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
                if count and self._seen == before and after == before + 1:  # no other process has committed
                    for record, row in zip(records, rows.to_pylist(), strict=True):
                        self._records[record.id] = row["written"], schema.record_of(row)
                    self._seen = after
        return count

    def _commit(self, name: str, size: int, work: Callable[[Any], Any]) -> tuple[int, Any]:
        """Writes, then reads the last row back. Returns the version before, and LanceDB's result.

        LanceDB does not notice if the disk fills up at the end of a file: the file is cut short, the commit succeeds,
        and nobody can read the table.

        Raises:
            Full: the disk is full; the table has not changed.
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
            else:  # others have committed since: remove only our rows
                last = int(self.row_ids(committed)[-1]) >> 32
                self.delete(name, f"_rowid >= {last << 32} AND _rowid < {(last + 1) << 32}")
            raise cut_short(self.uri) from error
        return before, result

    def overwrite(self, name: str, columns: Any, batches: Iterable[Any]) -> None:
        """Makes a table, or rewrites it in one commit. After an error in `batches` it has not changed.

        Args:
            columns: the schema.
            batches: pyarrow record batches of that schema; another thread iterates over them.
        """
        problems: list[BaseException] = []

        def told() -> Iterator[Any]:
            try:
                yield from batches
            except BaseException as error:  # LanceDB would keep only its text
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
        """Writes a whole table in one commit; with `new`, only if there is none."""
        with lance_errors(self.uri):
            self._connection().create_table(name, data=rows, mode="create" if new else "overwrite")

    def drop_tables(self, *names: str) -> None:
        """Deletes whole tables."""
        for name in names:
            with lance_errors(self.uri):
                self._connection().drop_table(name, ignore_missing=True)
