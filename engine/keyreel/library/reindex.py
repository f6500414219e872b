"""Another model for a library: new vectors beside the old ones, video by video, then in their place.

The new vectors lie in a library of their own inside the library's folder, `reindex-SHA256`, until every video is in it.
An interrupted run goes on where it was. Until the end the old vectors answer.
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
    """What a run did."""

    done: bool  # whether the library now has the new model
    videos: int  # that the new model has indexed
    left: tuple[Record, ...]  # that the old model has and the new one could not index


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

    Ids, paths and tags stay. Programs that have the library open must open it again with the new model afterwards.
    Needs free space for both sets of vectors. What others add meanwhile is indexed, too; nothing may be written in the
    last moment, while the tables are replaced.

    Args:
        uri: the library's folder or URI.
        engine: of the new model.
        config, progress, begin, tell, stop: as for `Library.add`.
        drop_failed: replace the old vectors although some videos could not be indexed, whose files are gone or damaged;
            the library then has them as failed.
        storage_options: of the object store.

    Raises:
        LibraryError: there is no library, it cannot be written, or it has an older format.
    """
    old = open_tables(uri, storage_options)
    bundle = engine.bundle
    beside = f"{old.uri}/reindex-{bundle.sha256[:12]}"
    if old.model()[1] == bundle.sha256:
        _delete(open_tables(beside, storage_options))  # left where a run was killed at its very end
        return Reindexed(True, len(old.records()), ())
    shards = len(old.parts)
    with Library(beside, engine, config=LibraryConfig(shards=shards), storage_options=storage_options) as library:
        new = open_tables(beside, storage_options, shards)
        if not new.exists():
            new.create(model=bundle.name, model_sha256=bundle.sha256, width=bundle.embedding_width)
        tried: set[str] = set()  # paths; a file that is gone stays as it is
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
    """Takes over which videos there are. Returns the paths of those that the new model has not indexed."""
    known, there = {record.id: record for record in old.records()}, {record.id for record in new.records()}
    new.drop([id for id in there if id not in known])
    empty: dict[str, Any] = {
        "fingerprint": "",
        "generation": "",
        "frames": 0,
        "subjects": None,
        "shots": (),
        "scenes": (),
    }
    about: dict[str, Any] = {
        "status": "failed",
        "error": WAITS,
        "hint": None,
        "digest": None,
        "model": model,
        "model_sha256": sha256,
    }
    lacking = [replace(record, **empty, **about) for id, record in known.items() if id not in there]
    for part in new.parts:
        part.upsert([record for record in lacking if new.of(record.id) is part])
    return {record.path for record in new.records() if record.status != "ok"}


def _replace(old: Tables | Shards, new: Tables | Shards) -> None:
    """Puts the new tables in the place of the old ones: each in one commit, the records last.

    Stopped between two, the library cannot be searched until this is done again: the new tables are still there.
    """
    for there, made in zip(old.parts, new.parts, strict=True):
        upkeep.compact(made, alone=True)  # without what no record names
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
    """Deletes a library that is no longer needed, if it is there."""
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
    """A table's rows, in the order of `columns`."""
    with lance_errors(tables.uri):
        for batch in table.search().to_batches():
            yield batch.select(columns.names)
