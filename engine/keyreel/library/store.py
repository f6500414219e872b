"""The tables of a library: what is committed, by whom, and how it is read."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keyreel.errors import Damaged, LibraryError, ModelMismatch, import_extra
from keyreel.library import schema, upkeep
from keyreel.library.types import Block, Extras, Finding, Preview, Record, Rows
from keyreel.library.upkeep import (
    ATTEMPTS,
    CHUNK,
    MAKES,
    Absent,
    Busy,
    Full,
    Superseded,
    Vanished,
    retried,
    told,
)

T = TypeVar("T")


class Store:
    """A library in LanceDB, in a folder or at a URI such as `s3://bucket/library`. Safe to share between threads.

    A video is written in steps: its rows under a new generation, then its row in `videos`, which names the generation.
    That last step is the commit: rows whose generation no video names are seen by nobody, and `compact` deletes them.
    Each step is one append, which is atomic and does not conflict with the appends of other processes. Readers see a
    whole state at any time. Not fork-safe: start processes with spawn.

    Args:
        uri: folder or URI; nothing is opened or made before it is needed.
        storage_options: of the object store, passed through to LanceDB.
        compact_every: commits, by anyone, after which small files are put together.
    """

    def __init__(self, uri: str, *, storage_options: Mapping[str, str] | None = None, compact_every: int = 256) -> None:
        self._uri = uri
        self._options = dict(storage_options) if storage_options else None
        self.compact_every = compact_every
        self._lock = threading.RLock()  # around opening and the cache of records
        self._writing = threading.Lock()  # one commit at a time, while others read
        self._database: Any = None
        self._tables: dict[str, Any] = {}
        self._records: dict[str, tuple[tuple[int, int], Record]] = {}
        self._seen: tuple[int, ...] | None = None  # the version that the cache is of

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def folder(self) -> Path | None:
        """Where the library lies on this machine; None for a URI."""
        return None if "://" in self._uri else Path(self._uri)

    def exists(self) -> bool:
        """Whether there is a library."""
        try:
            self.table("videos")
        except Absent:
            return False
        except Damaged:
            return True
        return True

    def create(self, *, model: str, model_sha256: str, width: int) -> None:
        """Makes the tables, or checks that they are of this model; several processes may do so at once.

        Args:
            width: D, length of a vector.

        Raises:
            ModelMismatch: the library holds vectors of another model.
            LibraryError: it cannot be made there.
        """
        for name, columns in schema.schemas(model, model_sha256, width).items():
            failure: LibraryError | None = None
            try:
                with told(self._uri):
                    self._connection().create_table(name, schema=columns)
            except LibraryError as error:  # as a rule since it is there already; else opening it fails too
                failure = error
            try:
                table = self.table(name)
            except Absent as error:
                raise failure or error from None
            known = schema.model_of(table.schema)
            if known[1:] != (model_sha256, width):
                raise ModelMismatch(
                    f"the library {self._uri} holds vectors of the model {known[0]!r} (D = {known[2]}, sha256 "
                    f"{known[1][:12]}), not of {model!r} (D = {width}, sha256 {model_sha256[:12]})",
                    hint="use that model, or another folder for this one",
                )

    def model(self) -> tuple[str, str, int]:
        """Name, sha256 and D of the model whose vectors these are.

        Raises:
            LibraryError: there is no library.
        """
        return schema.model_of(self.table("videos").schema)

    def table(self, name: str) -> Any:
        """The LanceDB table `frames` or `videos`; each read of it sees the newest version.

        Raises:
            LibraryError: there is no library, or one that this keyreel cannot read.
        """
        with self._lock:
            if name not in self._tables:
                # Connecting would make the folder.
                if self.folder is not None and not self.folder.is_dir():
                    raise Absent(f"there is no library at {self._uri}", hint=MAKES)
                table = self.fresh_table(name)
                schema.check_layout(name, table.schema)
                self._tables[name] = table
            return self._tables[name]

    def fresh_table(self, name: str) -> Any:
        """Another view of a table, for looking at one version."""
        with told(self._uri):
            return self._connection().open_table(name)

    def version(self) -> tuple[int, ...]:
        """Something that changes whenever anyone commits."""
        with told(self._uri):
            return (self.table("videos").version,)

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        """The videos, in order of path; `ids` that are not there are left out."""
        with self._lock:
            known = self._latest()
            wanted = list(known) if ids is None else dict.fromkeys(ids)
            chosen = [known[id] for id in wanted if id in known]
        return sorted((record for _, record in chosen), key=lambda record: (record.path, record.id))

    def extras(self, id: str) -> Extras:
        """Sprite, thumbnails and overview of a video.

        Raises:
            LibraryError: there is no such video, or it has none since it failed.
        """
        for record in self.records([id]):
            where = f"generation = {schema.quoted([record.generation])} AND row = 0 AND sprite IS NOT NULL"
            for row in self.rows("frames", where, schema.EXTRAS):
                return schema.extras_of(row)
        raise LibraryError(f"the library has nothing to show of {id!r}")

    def put(self, record: Record, rows: Rows | None, extras: Extras | None) -> None:
        """Commits one video.

        Args:
            record: what is known of it from now on. With rows, its generation is a new one, `uuid.uuid4().hex`.
            rows: its frames; None keeps the rows and extras of `record.generation`.
            extras: stored with the rows.

        Raises:
            LibraryError: it cannot be written; then nothing has changed. `Superseded` where the rows that were to be
                kept are no longer those of the video: someone else wrote or removed it.
        """
        if rows is None and extras is not None:
            raise ValueError("extras are stored with the rows that they show")
        if rows is not None and (not record.generation or record.frames != len(rows)):
            raise ValueError(f"{len(rows)} rows need a generation, got {record.generation!r} of {record.frames} frames")
        with self._writing:
            if rows is not None and len(rows):
                columns = self.table("frames").schema
                upkeep.append(self, "frames", schema.frames_table(columns, record, rows, extras))
            before = self.version()[0]
            stamp = before, time.time_ns()
            keeps = rows is None and record.generation != ""
            if keeps:
                sequence, written = self._renewed(record)
                stamp = sequence, max(stamp[1], written + 1)
            row = schema.video_table(self.table("videos").schema, record, *stamp)
            after = upkeep.append(self, "videos", row)
            if keeps and after != before + 1:
                self._check_kept(record, after - 1, stamp)
            with self._lock:
                if self._seen == (before,) and after == before + 1:  # nobody else: what is known need not be read
                    self._records[record.id] = stamp, schema.record_of(row.to_pylist()[0])
                    self._seen = (after,)
        if before // self.compact_every != after // self.compact_every:
            # The video is in. Where others are at it, or room is scarce, there will be another time.
            with contextlib.suppress(Busy, Full):
                upkeep.tidy(self)

    def _renewed(self, record: Record) -> tuple[int, int]:
        """The stamp of the row that is renewed by one of the same rows."""
        with self._lock:
            stamp, old = self._latest().get(record.id, (None, None))
        if stamp is None or old is None or old.generation != record.generation:
            raise _superseded(record)
        return stamp

    def _check_kept(self, record: Record, version: int, stamp: tuple[int, int]) -> None:
        """Takes a renewed record back where the version before it names other rows for the video, or none.

        Where it does name them, they have been named without a break, so that nobody has deleted them as orphans.
        """
        with told(self._uri):
            table = self.fresh_table("videos")
            table.checkout(version)
            query = table.search().where(f"id = {schema.quoted([record.id])}")
            rows = query.select(["id", "sequence", "written", "generation"]).to_arrow().to_pylist()
        old = schema.newest(rows).get(record.id)
        if old is None or old["generation"] != record.generation:
            own = schema.this_row(record.id, stamp)
            retried(lambda: self.table("videos").delete(own), self._uri)
            raise _superseded(record)

    def drop(self, ids: Sequence[str]) -> int:
        """Removes videos; says how many there were. Their rows are orphans then, which `compact` deletes."""
        there = [record.id for record in self.records(ids)]
        for start in range(0, len(there), CHUNK):
            where = f"id IN ({schema.quoted(there[start : start + CHUNK])})"
            retried(lambda where=where: self.table("videos").delete(where), self._uri)  # type: ignore[misc]
        return len(there)

    def vectors(self, generations: Sequence[str]) -> Iterator[Block]:
        """The rows of each of these generations, in any order; those that are not there are left out."""
        wanted = dict.fromkeys(generations)
        for attempt in range(ATTEMPTS):
            if not wanted:
                return
            try:
                with told(self._uri):
                    for run in self._runs(wanted):
                        block = schema.block_of(run)
                        del wanted[block.generation]
                        yield block
                return
            except Vanished:  # where a compaction took the files away, the next look sees the new ones
                if attempt == ATTEMPTS - 1:
                    raise

    def previews(self, generation: str) -> tuple[Preview, ...]:
        """The key-frames of one generation, in order of time."""
        rows = self.rows("frames", f"generation = {schema.quoted([generation])} AND keyframe", schema.PREVIEW)
        return tuple(schema.preview_of(row) for row in sorted(rows, key=lambda row: row["pts_seconds"]))

    def preview(self, generation: str, pts_seconds: float) -> bytes | None:
        """The picture of the key-frame at that time, to half a millisecond; None where there is none."""
        low, high = float(pts_seconds) - 5e-4, float(pts_seconds) + 5e-4
        where = f"generation = {schema.quoted([generation])} AND keyframe AND pts_seconds BETWEEN {low!r} AND {high!r}"
        rows = self.rows("frames", where, schema.PREVIEW)
        return min(rows, key=lambda row: abs(row["pts_seconds"] - pts_seconds))["preview"] if rows else None

    def compact(self, *, alone: bool = False) -> int:
        """Puts small files together and deletes what nobody needs; see `upkeep.compact`. Returns bytes given back."""
        return upkeep.compact(self, alone=alone)

    def verify(self, *, repair: bool = False) -> tuple[Finding, ...]:
        """Reads everything and says what is wrong; see `upkeep.verify`."""
        return upkeep.verify(self, repair=repair)

    def bytes(self) -> int | None:
        """Size on disk; None for a URI."""
        return None if self.folder is None else upkeep.folder_bytes(self.folder)

    def close(self) -> None:
        """Lets go of the tables; they are opened again when needed. Idempotent."""
        with self._lock:
            self._tables.clear()
            self._records.clear()
            self._database = self._seen = None

    def _connection(self) -> Any:
        with self._lock:
            if self._database is None:
                lancedb = import_extra("lancedb", extra="library", purpose="a library of videos")
                # An interval of 0: each read looks whether there is a newer version.
                self._database = lancedb.connect(
                    self._uri, storage_options=self._options, read_consistency_interval=timedelta(0)
                )
            return self._database

    def read(self, work: Callable[[], T]) -> T:
        """Does a read, again where a compaction took its files away meanwhile."""
        return retried(work, self._uri, Vanished)

    def rows(self, name: str, where: str | None, columns: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
        """Rows of a table as dictionaries."""

        def work() -> list[Mapping[str, Any]]:
            query = self.table(name).search()
            query = query.where(where) if where else query
            return (query.select(list(columns)) if columns else query).to_arrow().to_pylist()  # type: ignore[no-any-return]

        return self.read(work)

    def _latest(self) -> dict[str, tuple[tuple[int, int], Record]]:
        """The records by id, each with its stamp; only rows that are new since the last time are read."""
        version = self.version()
        if version != self._seen:
            known: dict[str, tuple[tuple[int, int], Record]] = {}
            missing: list[str] | None = None  # None: all
            if self._records:
                rows = schema.newest(self.rows("videos", None, ("id", "sequence", "written")))
                stamps = {id: schema.stamp(row) for id, row in rows.items()}
                known = {id: old for id, old in self._records.items() if old[0] == stamps.get(id)}
                missing = [id for id in rows if id not in known]
            if missing is None or missing:
                where = f"id IN ({schema.quoted(missing)})" if missing and len(missing) <= CHUNK else None
                for id, row in schema.newest(self.rows("videos", where)).items():
                    known[id] = (schema.stamp(row), schema.record_of(row))
            self._records, self._seen = known, version
        return self._records

    def _runs(self, wanted: Mapping[str, Any]) -> Iterator[Any]:
        """Tables of the rows of one generation each, in the order in which they lie."""
        query = self.table("frames").search().select(list(schema.NUMBERS))
        if len(wanted) <= CHUNK:
            query = query.where(f"generation IN ({schema.quoted(wanted)})")
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


def _superseded(record: Record) -> Superseded:
    return Superseded(f"{record.path}: was changed or removed by someone else meanwhile", hint="look at it again")
