"""Opens the tables of a library in LanceDB, translates errors and retries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from keyreel.errors import Damaged, LibraryError, ModelMismatch, import_extra
from keyreel.library import schema
from keyreel.library.errors import MAKE, Absent, Conflict, Outdated, lance_errors
from keyreel.library.schema import RECORDS

REPAIR = "`keyreel library verify --repair`, then `keyreel library update` restore the videos"
T = TypeVar("T")
# LanceDB's default caches would grow with each commit, up to gigabytes.
INDEX_CACHE_BYTES, METADATA_CACHE_BYTES = 256 << 20, 8 << 20
ATTEMPTS = 10  # attempts when other processes interfere


class Opened:
    """The existing tables, see `table.Tables`."""

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
        self._database: Any = None
        self._tables: dict[str, Any] = {}

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

    def close(self) -> None:
        """Closes the tables. The next use opens them again. Idempotent."""
        with self._lock:
            self._tables.clear()
            self._database = None

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
