"""Spreads a library over shards, so that it can grow.

Each shard has the tables of a library, and the videos whose ids hash to it. Writers of different shards do not wait for
each other.

A small table names the shards. As a table, it is written in one commit on any store, by one of several processes, and
opens with the library's credentials.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from keyreel.errors import Damaged, LibraryError
from keyreel.library import schema, upkeep
from keyreel.library.errors import Absent
from keyreel.library.schema import VECTORS, quoted
from keyreel.library.stored import CHUNK
from keyreel.library.table import Tables
from keyreel.library.types import Record

MOST = 1024
_NAME = re.compile(r"shard-\d{4}-of-\d{4}")


class Shards:
    """The tables of all shards of a library. Safe to share between threads, as are its `parts`."""

    def __init__(self, uri: str, names: Sequence[str], storage_options: Mapping[str, str] | None = None) -> None:
        self.uri, self.names = uri, tuple(names)
        self.parts = tuple(Tables(f"{uri}/{name}", storage_options=storage_options) for name in names)

    def number_of(self, id: str) -> int:
        """The number of a video's shard, by its id."""
        return zlib.crc32(id.encode()) % len(self.parts)

    def of(self, id: str) -> Tables:
        """The tables of a video's shard."""
        return self.parts[self.number_of(id)]

    def exists(self) -> bool:
        """Whether all shards are there."""
        return all(part.exists() for part in self.parts)

    def create(self, *, model: str, model_sha256: str, width: int) -> None:
        """Makes the shards, or checks that they have this model. Several processes may call it at once.

        Raises:
            LibraryError: the shards cannot be created, or another process has created others.
        """
        first = self.parts[0]
        root = Tables(self.uri, storage_options=first.options)
        if not names_at(root):
            if root.exists():
                raise _whole(self.uri)
            try:
                _name(root, self.names, new=True)
            except LibraryError:  # usually another process was quicker
                if not names_at(root):
                    raise
        if names_at(root) != self.names:
            raise LibraryError(f"another process has created {self.uri} meanwhile", hint="open it again")
        for part in self.parts:
            part.create(model=model, model_sha256=model_sha256, width=width)

    def model(self) -> tuple[str, str, int]:
        """See `Tables.model`."""
        return self.parts[0].model()

    def version(self) -> int:
        """A number that changes with each commit of any process."""
        return sum(part.version() for part in self.parts)

    def records(self, ids: Sequence[str] | None = None) -> list[Record]:
        """The videos in order of path; unknown `ids` are left out."""
        if ids is None:
            found = chain.from_iterable(part.records() for part in self.parts)
        else:
            found = chain.from_iterable(part.records(own) for part, own in self._apart(ids))
        return sorted(found, key=lambda record: (record.path, record.id))

    def drop(self, ids: Sequence[str]) -> int:
        """Removes the records of videos. Returns how many existed. `compact` deletes their rows."""
        return sum(part.drop(own) for part, own in self._apart(ids))

    def bytes(self) -> int | None:
        """Size on disk; None for a URI."""
        sizes = [part.bytes() for part in self.parts]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def close(self) -> None:
        """See `Tables.close`."""
        for part in self.parts:
            part.close()

    def _apart(self, ids: Iterable[str]) -> Iterator[tuple[Tables, list[str]]]:
        own: dict[int, list[str]] = {}
        for id in ids:
            own.setdefault(self.number_of(id), []).append(id)
        return ((self.parts[number], names) for number, names in own.items())


def open_tables(
    uri: str, storage_options: Mapping[str, str] | None = None, shards: int | None = None
) -> Tables | Shards:
    """Opens the tables of a library, with or without shards. Creates nothing.

    Args:
        shards: how many a new library gets; None: as many as it has.

    Raises:
        LibraryError: the library has another number of shards.
    """
    root = Tables(uri, storage_options=storage_options)
    names = names_at(root)
    if shards is not None and names and len(names) != shards:
        hint = f"leave --shards out, or spread it again: `keyreel library reshard {uri} --shards {shards}`"
        raise LibraryError(f"the library {uri} has {len(names)} shards, not {shards}", hint=hint)
    if shards is not None and shards > 1 and not names:
        if root.exists():
            raise _whole(uri)
        names = _names(shards)
    return Shards(uri, names, storage_options) if names else root


def names_at(root: Tables) -> tuple[str, ...]:
    """The names of a library's shards; () if it has none.

    Raises:
        Damaged: the table of names is damaged.
    """
    try:
        table = root.open(schema.SHARDS)
        schema.format_of(table.schema)
        names = tuple(root.retried(lambda: table.search().to_arrow())["name"].to_pylist())
    except Absent:
        return ()
    if not names or not all(_NAME.fullmatch(name or "") for name in names):
        raise Damaged(f"the library {root.uri} has a damaged list of its shards", [str(names)[:200]])
    return names


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"shard-{number:04}-of-{count:04}" for number in range(count))


def _name(root: Tables, names: Sequence[str], *, new: bool) -> None:
    """Writes the names of the shards; with `new`, only if no other process has."""
    pa = schema.arrow()
    metadata = {"keyreel.format": str(schema.FORMAT)}
    rows = pa.table({"name": pa.array(names, pa.string())}).replace_schema_metadata(metadata)
    root.write_table(schema.SHARDS, rows, new=new)


def _whole(uri: str) -> LibraryError:
    hint = f"`keyreel library reshard {uri} --shards N` spreads it"
    return LibraryError(f"the library {uri} exists, and has no shards", hint=hint)


def reshard(uri: str, count: int, storage_options: Mapping[str, str] | None = None) -> int:
    """Spreads a library over `count` shards. Decodes nothing.

    It copies the stored rows, then replaces the old shards by the new ones in one commit. Until then searches use the
    old ones, and an interrupted run continues. It also copies what other processes add meanwhile, but nobody may write
    at the very end. Other programs must then open the library again. It needs free space for both.

    Returns:
        The number of videos; 0 if it already had this number of shards.

    Raises:
        ValueError: the number is not in 1..1024.
        LibraryError: there is no library, or it cannot be read or written.
    """
    if not 1 <= count <= MOST:
        raise ValueError(f"shards must be in 1..{MOST}, got {count}")
    old, root = open_tables(uri, storage_options), Tables(uri, storage_options=storage_options)
    name, sha256, width = old.model()
    new = Shards(uri, _names(count), storage_options)
    if names_at(root) == new.names:
        _delete(root, new.names, ())  # a run was killed at its very end
        return 0
    for part in new.parts:
        part.create(model=name, model_sha256=sha256, width=width)
        upkeep.compact(part, alone=True)  # without leftovers of a killed run
    while True:
        version = old.version()
        _take_over(old, new)
        if old.version() == version:
            break
    for part in new.parts:
        upkeep.compact(part, alone=True)
    _name(root, new.names, new=not names_at(root))
    videos = len(new.records())
    old.close()
    new.close()
    _delete(root, new.names, old.parts)
    return videos


def _take_over(old: Tables | Shards, new: Shards) -> None:
    """Copies what the new shards lack from the old tables."""
    wanted, there = ({record.id: record for record in tables.records()} for tables in (old, new))
    new.drop([id for id in there if id not in wanted])
    for source in old.parts:
        changed = [one for one in source.records() if there.get(one.id) != one]
        for some in (changed[start : start + CHUNK] for start in range(0, len(changed), CHUNK)):
            moved = {
                one.generation: new.number_of(one.id)
                for one in some
                if one.generation and (one.id not in there or there[one.id].generation != one.generation)
            }
            rows = source.read(VECTORS, f"generation IN ({quoted(moved)})") if moved else None
            place = [] if rows is None else [moved[name] for name in rows["generation"].to_pylist()]
            for number, part in enumerate(new.parts):
                if rows is not None and number in place:
                    columns = part.table(VECTORS).schema
                    own = rows.filter(schema.arrow().array([one == number for one in place]))
                    part.add_rows(own.select(columns.names).cast(columns))
                part.upsert([one for one in some if new.number_of(one.id) == number])


def _delete(root: Tables, names: Container[str], old: Iterable[Tables]) -> None:
    """Deletes the tables that shards have replaced; in a bucket only those of `old`."""
    for part in (root, *old):
        part.drop_tables(*schema.TABLES)
    for folder in root.folder.iterdir() if root.folder is not None else ():
        if _NAME.fullmatch(folder.name) and folder.name not in names:
            shutil.rmtree(folder)
