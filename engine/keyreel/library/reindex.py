"""Changes the model of a library: builds new vectors beside the old ones, then replaces these.

The new vectors are a library in the subfolder `reindex-SHA256` until it has every video. An interrupted run continues.
Until the end, searches use the old vectors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keyreel.config import IndexConfig, LibraryConfig
from keyreel.library import schema, upkeep
from keyreel.library.errors import ask_for_room, lance_errors
from keyreel.library.library import Library
from keyreel.library.schema import RECORDS, SHARDS, TABLES, VECTORS
from keyreel.library.shards import Shards, open_tables
from keyreel.library.table import Tables
from keyreel.library.types import Added, Record
from keyreel.types import Progress

if TYPE_CHECKING:
    from keyreel.engine import Engine

WAITS = "not yet indexed by the new model"


@dataclass(frozen=True, slots=True)
class Reindexed:
    """The result of a run."""

    done: bool  # whether the library now has the new model
    videos: int  # indexed with the new model
    left: tuple[Record, ...]  # failed with the new model, but not with the old one


def reindex(
    uri: str,
    engine: Engine,
    config: IndexConfig | None = None,
    *,
    drop_failed: bool = False,
    storage_options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    begin: Callable[[str], Progress] | None = None,
    tell: Callable[[Added], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Reindexed:
    """Indexes all videos of a library with another model, then replaces the old vectors.

    Ids, paths and tags stay. Other programs must then open the library again, with the new model. It needs free space
    for both sets of vectors. It also indexes what other processes add meanwhile, but nobody may write at the very end,
    while it replaces the tables.

    Args:
        uri: the library's folder or URI.
        engine: has the new model.
        config, progress, begin, tell, stop: as for `Library.add`.
        drop_failed: replace the old vectors even if some videos cannot be indexed, since their files are missing or
            damaged. The library then lists them as failed.
        storage_options: credentials and settings of the object store, for LanceDB.

    Raises:
        LibraryError: there is no library, it cannot be written, or it has an older format.
    """
    old = open_tables(uri, storage_options)
    bundle = engine.bundle
    beside = f"{old.uri}/reindex-{bundle.sha256[:12]}"
    if old.model()[1] == bundle.sha256:
        _delete(open_tables(beside, storage_options))  # a run was killed at its very end
        return Reindexed(True, len(old.records()), ())
    shards = len(old.parts)
    with Library(beside, engine, config=LibraryConfig(shards=shards), storage_options=storage_options) as library:
        new = open_tables(beside, storage_options, shards)
        if not new.exists():
            new.create(model=bundle.name, model_sha256=bundle.sha256, width=bundle.embedding_width)
        tried: set[str] = set()  # paths; missing files keep their records
        while (waiting := _waiting(old, new, bundle.name, bundle.sha256) - tried) and not (stop and stop()):
            added = library.add(sorted(waiting), config, progress=progress, begin=begin, tell=tell, stop=stop)
            tried |= {one.path for one in added}
        found = {record.id: record for record in new.records()}
    left = tuple(one for one in old.records() if one.status == "ok" and found[one.id].status != "ok")
    good = sum(record.status == "ok" for record in found.values())
    if waiting or (left and not drop_failed):
        new.close()
        return Reindexed(False, good, left)
    _replace(old, new)
    return Reindexed(True, good, left)


def _waiting(old: Tables | Shards, new: Tables | Shards, model: str, sha256: str) -> set[str]:
    """Copies the list of videos. Returns the paths that the new model has not indexed."""
    known, there = {record.id: record for record in old.records()}, {record.id for record in new.records()}
    new.drop([id for id in there if id not in known])
    lacking = [
        replace(
            record,
            fingerprint="",
            generation="",
            frames=0,
            subjects=None,
            shots=(),
            scenes=(),
            status="failed",
            error=WAITS,
            hint=None,
            digest=None,
            model=model,
            model_sha256=sha256,
        )
        for id, record in known.items()
        if id not in there
    ]
    for part in new.parts:
        part.upsert([record for record in lacking if new.of(record.id) is part])
    return {record.path for record in new.records() if record.status != "ok"}


def _replace(old: Tables | Shards, new: Tables | Shards) -> None:
    """Replaces the old tables by the new ones: each in one commit, the records last.

    If it stops between two tables, the library cannot be searched until it runs again; the new tables are kept.
    """
    for there, made in zip(old.parts, new.parts, strict=True):
        upkeep.compact(made, alone=True)  # without rows that no record names
        ask_for_room(there.folder, made.bytes() or 0)
        target = Tables(there.uri, storage_options=there.options, upgrading=True)
        for name in (VECTORS, RECORDS):
            table = made.table(name)
            columns = schema.schemas(*made.model())[name]
            target.overwrite(name, columns, _batches(made, table, columns))
        for tables in (there, target):
            tables.close()
    _delete(new)
    for there in old.parts:
        upkeep.compact(there, alone=True)  # and the old versions, with the old vectors


def _delete(tables: Tables | Shards) -> None:
    """Deletes a library that is no longer needed, if it exists."""
    for part in tables.parts:
        if part.folder is None:
            part.drop_tables(*TABLES)
        part.close()
    root = Tables(tables.uri, storage_options=tables.parts[0].options)
    if root.folder is None:
        root.drop_tables(SHARDS)
    elif root.folder.is_dir():
        shutil.rmtree(root.folder)


def _batches(tables: Tables, table: Any, columns: Any) -> Iterator[Any]:
    """Yields the rows of a table as batches with these columns, in order."""
    with lance_errors(tables.uri):
        for batch in table.search().to_batches():
            yield batch.select(columns.names)
