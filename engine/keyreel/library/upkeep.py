"""What keeps a library in order: errors told in our words, commits tried again, compaction, verification, repair."""

from __future__ import annotations

import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from keyreel.errors import Damaged, KeyreelError, LibraryError
from keyreel.library import schema
from keyreel.library.types import Finding
from keyreel.types import I64

if TYPE_CHECKING:
    from keyreel.library.store import Store

T = TypeVar("T")
CHUNK = 128  # generations or ids asked for by name in one go; more are found by reading all
ATTEMPTS = 10  # of a commit that other writers get in the way of, and of a read whose files a compaction took away
_ORPHAN_AGE_SECONDS = 3600.0  # rows younger than this may be of a video that someone is about to commit
_VERSION_AGE = timedelta(minutes=2)  # readers and writers may still be at work on versions younger than this
_FULL_FRAGMENT = 1 << 20  # rows; LanceDB leaves files of so many alone and merges all others
_SPARE_BYTES = 1 << 20  # left free on the disk for what keeps a table: lists of its files, deletions
_BATCH = 1024  # rows read at once by verify

_FULL_DISK = ("no space left", "file too large", "quota", "os error 27", "os error 28")
_CONFLICTS = ("conflict", "concurrent", "preempted", "please retry")
_DENIED = ("permission denied", "read-only", "operation not permitted", "accessdenied", "forbidden")
MAKES = "`keyreel index` or `Library.add` makes one"
_UNREACHABLE = ("failed to connect", "retryerror", "error sending request", "not a directory")


class Absent(LibraryError):
    """There is no library."""


class Busy(LibraryError):
    """Writers got in each other's way more often than was tried again."""


class Vanished(Damaged):
    """A file is not there: lost, or taken away by a compaction after the table was looked up."""


class Superseded(LibraryError):
    """A record that was to be renewed has other rows by now, or is gone."""


class Full(LibraryError):
    """There is no room for what is to be written."""


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Says what LanceDB raises in our words: its errors differ in their texts only, and a panic is one of them."""
    try:
        yield
    except (KeyreelError, ImportError):
        raise
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0].split(", /")[0]
        small = text.lower()

        def has(words: Sequence[str]) -> bool:
            return any(word in small for word in words)

        if "was not found" in small:
            raise Absent(f"there is no library at {uri}", hint=MAKES) from error
        if has(_FULL_DISK):
            hint = "make room on the disk; what was committed is safe"
            raise Full(f"the library {uri} cannot be written: {text}", hint=hint) from error
        if has(_CONFLICTS):
            raise Busy(f"other processes keep changing the library {uri}: {text}", hint="try again") from error
        # A number has what the system said of the folder; what is wrong with a table has none.
        if has(_DENIED) or has(_UNREACHABLE) or getattr(error, "errno", None):
            raise LibraryError(f"the library {uri} cannot be used: {text}", hint="check place and access") from error
        kind = Vanished if "not found" in small else Damaged
        hint = "`keyreel library verify --repair` mends it"
        raise kind(f"the library {uri} cannot be read: {text}", [text], hint=hint) from error


def retried(work: Callable[[], T], uri: str, again: type[LibraryError] = Busy) -> T:
    """Does it, again where it raises `again`, waiting longer each time."""
    for attempt in range(ATTEMPTS):
        try:
            with told(uri):
                return work()
        except again:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(min(0.01 * 2**attempt, 0.5))
    raise AssertionError("unreachable")


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def append(store: Store, name: str, rows: Any) -> int:
    """Adds rows to a table and makes sure that they have landed; returns the version that holds them.

    LanceDB does not notice when the disk is full at the last piece of a file: the file is cut short, the commit
    succeeds, and no reader can use the table. So room is asked for before, and the last row is read after.

    Raises:
        Full: they cannot be written; then the table is as before.
    """
    _ask_for_room(store, rows.nbytes)
    version = int(retried(lambda: store.table(name).add(rows), store.uri).version)
    with told(store.uri):
        table = store.fresh_table(name)
        table.checkout(version)
        count = table.count_rows()
    last = rows["check"][-1]
    try:
        with told(store.uri):
            landed = table.take_offsets([count - 1]).select(["check"]).to_arrow()["check"][0] == last
            # Where someone put files together at the same time, other rows may come last.
            landed = landed or table.count_rows(f"`check` = {last}") > 0
    except Damaged:
        landed = False
    if not landed:
        # Nobody else's rows may go: only those of files that the version before did not have.
        ids, older = _row_ids(table, store.uri), store.fresh_table(name)
        with told(store.uri):
            older.checkout(version - 1)
        own = ids[~np.isin(ids >> 32, _row_ids(older, store.uri) >> 32)]
        if len(own) == len(rows):
            _delete(store, name, [f"(_rowid >= {own[0]} AND _rowid <= {own[-1]})"])
        raise _cut_short(store)
    return version


def _ask_for_room(store: Store, size: int) -> None:
    if store.folder is None:
        return
    free = shutil.disk_usage(store.folder).free
    if free < size + _SPARE_BYTES:
        need = f"{(size + _SPARE_BYTES) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise Full(f"the library {store.uri} cannot be written: {need}", hint="make room on the disk")


def _cut_short(store: Store) -> Full:
    hint = "make room on the disk, or lift the limit on the size of files"
    return Full(f"the library {store.uri} cannot be written: what was written was cut short", hint=hint)


def tidy(store: Store) -> None:
    """Puts the small files of a table together where there are enough of them.

    LanceDB rewrites a table up to its last full file. Waiting for a share of what there is keeps the total written
    within a small multiple of what is stored, however many videos are added one by one. Rows of `videos` are small, so
    that it may be rewritten more often.
    """
    videos = store.table("videos").count_rows()
    for name, share in (("frames", 8), ("videos", 64)):
        stats = store.table(name).stats()
        rows = max(int(stats["num_rows"]), 1)
        commits = videos * (rows % _FULL_FRAGMENT) / rows  # whose rows would be rewritten
        if int(stats["fragment_stats"]["num_small_fragments"]) >= store.compact_every + commits / share:
            if name == "frames":
                _delete_orphans(store, _ORPHAN_AGE_SECONDS)
            else:
                _delete_superseded(store)
            _optimize(store, name, alone=False)


def compact(store: Store, *, alone: bool = False) -> int:
    """Puts small files together, deletes orphans and old versions.

    Orphans are rows of videos that were removed or indexed anew, or were never committed since their writer was killed.

    Args:
        alone: nobody else reads or writes: what is younger than two minutes (files) or an hour (rows) goes too.

    Returns:
        Bytes given back; 0 for a URI, where this is not known.
    """
    before = store.bytes()
    _delete_superseded(store)
    _delete_orphans(store, 0.0 if alone else _ORPHAN_AGE_SECONDS)
    for name in schema.TABLES:
        _optimize(store, name, alone)
    after = store.bytes()
    return max(0, before - after) if before is not None and after is not None else 0


def _optimize(store: Store, name: str, alone: bool) -> None:
    table = store.table(name)
    _ask_for_room(store, int(table.stats()["total_bytes"]))
    before = table.version
    # First without deleting anything, so that there is a way back where the new files were cut short (see `append`).
    retried(lambda: table.optimize(cleanup_older_than=timedelta(days=36500)), store.uri)
    try:
        ids = _row_ids(store.table(name), store.uri)
        lasts = ids[np.flatnonzero(np.diff(ids >> 32, append=-1))]
        with told(store.uri):
            table.take_row_ids(lasts.tolist()).select(["check"]).to_arrow()
    except Damaged as error:
        old = store.fresh_table(name)
        old.checkout(before)
        old.restore()
        raise _cut_short(store) from error
    age = timedelta(0) if alone else _VERSION_AGE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # LanceDB warns of an age of 0: the caller said that it is alone
        retried(lambda: table.optimize(cleanup_older_than=age, delete_unverified=alone), store.uri)


def _row_ids(table: Any, uri: str) -> I64:
    """LanceDB's numbers of all rows, rising: number of the file << 32 | place in it. Needs no data files."""
    with told(uri):
        ids = table.search().select(["_rowid"]).to_arrow()["_rowid"].to_numpy()
    return np.sort(ids.astype(np.int64))


def _delete(store: Store, name: str, conditions: Sequence[str]) -> None:
    for start in range(0, len(conditions), CHUNK):
        where = " OR ".join(conditions[start : start + CHUNK])
        retried(lambda where=where: store.table(name).delete(where), store.uri)  # type: ignore[misc]


def _delete_superseded(store: Store) -> None:
    rows = store.rows("videos", None, ("id", "sequence", "written"))
    kept = schema.newest(rows)
    old = [row for row in rows if schema.stamp(row) < schema.stamp(kept[row["id"]])]
    _delete(store, "videos", [schema.this_row(row["id"], schema.stamp(row)) for row in old])


def _orphans(store: Store, age_seconds: float) -> dict[str, int]:
    """Generations that no video names, and how many rows each has."""
    table = store.read(lambda: store.table("frames").search().select(["generation", "written"]).to_arrow())
    named = {record.generation for record in store.records()}  # looked up after the rows: commits come after rows
    groups = table.group_by("generation").aggregate([("written", "max"), ("written", "count")]).to_pylist()
    latest = time.time_ns() - int(age_seconds * 1e9)
    old = (group for group in groups if group["generation"] not in named and group["written_max"] <= latest)
    return {group["generation"]: group["written_count"] for group in old}


def _delete_orphans(store: Store, age_seconds: float) -> None:
    _delete(store, "frames", [f"generation = {schema.quoted([one])}" for one in _orphans(store, age_seconds)])


def verify(store: Store, *, repair: bool = False) -> tuple[Finding, ...]:
    """Reads every row of a library, compares its checksum, and says what is wrong.

    Rows of videos that were never committed are told once they are an hour old: their writer may be at work.

    Args:
        repair: mends what can be mended, while nobody else writes. A table whose newest version cannot be opened goes
            back to the last one that can; the file is set aside with the ending `.damaged`. Rows that cannot be read
            are dropped. A video that lost rows becomes "failed", so that the next `add` indexes it again.

    Raises:
        Damaged: a table has no version that can be opened, so that nothing can be repaired.
        LibraryError: there is no library.
    """
    findings = [finding for name in schema.TABLES for finding in _opened(store, name, repair)]
    if findings and not repair:
        return tuple(findings)
    findings += [finding for name in schema.TABLES for finding in _sound(store, name, repair)]
    if findings and not repair:
        return tuple(findings)  # what hangs together can be told once all can be read
    findings += _complete(store, repair)
    if orphans := _orphans(store, _ORPHAN_AGE_SECONDS):
        what = f"{sum(orphans.values())} rows of {len(orphans)} videos that were removed, changed or never finished"
        findings.append(Finding("orphans", what, (), repair))
        if repair:
            _delete_orphans(store, _ORPHAN_AGE_SECONDS)
    return tuple(findings)


def _opened(store: Store, name: str, repair: bool) -> Iterator[Finding]:
    """Whether the newest version of a table can be opened; where not and it may, the one before it."""
    while True:
        if store.folder is not None:
            store.close()  # what was opened before may still stand in memory
        try:
            store.table(name)
            return
        except Damaged as error:
            folder = None if store.folder is None else store.folder / f"{name}.lance" / "_versions"
            # Their names count down, so that the newest is the first.
            versions = [] if folder is None else sorted(folder.glob("*.manifest"))
            if not repair or len(versions) < 2:
                if repair:
                    raise
                yield Finding(
                    "manifest", f"the newest version of {name} cannot be opened: {error.findings[0]}", (), False
                )
                return
            versions[0].rename(versions[0].with_suffix(".damaged"))
            what = f"the newest version of {name} could not be opened; it is set aside as {versions[0].stem}.damaged"
            yield Finding("manifest", what, (), True)


def _sound(store: Store, name: str, repair: bool) -> Iterator[Finding]:
    """Whether all rows of a table can be read and are what was written."""
    bad, reasons = _unsound_rows(store, name)
    if not len(bad):
        return
    yield Finding("unreadable", f"{len(bad)} rows of {name}: {'; '.join(reasons)}", (), repair)
    if repair:
        runs = np.split(bad, np.flatnonzero(np.diff(bad) != 1) + 1)
        _delete(store, name, [f"(_rowid >= {run[0]} AND _rowid <= {run[-1]})" for run in runs])


def _unsound_rows(store: Store, name: str) -> tuple[I64, list[str]]:
    """LanceDB's numbers of the rows that cannot be read or whose checksum is wrong, and the reasons."""
    table = store.table(name)
    ids = _row_ids(table, store.uri)
    bad, reasons = [], Counter[str]()

    def look(part: I64) -> None:
        try:
            with told(store.uri):
                rows = table.take_row_ids(part.tolist()).to_arrow()
        except Damaged as error:
            if len(part) == 1:
                bad.append(part)
                reasons[error.findings[0]] += 1
                return
            for half in np.array_split(part, 2):
                look(half)
            return
        wrong = schema.checks(rows) != rows["check"].to_numpy()
        if wrong.any():
            bad.append(part[wrong])
            reasons["the checksum is wrong"] += int(wrong.sum())

    for fragment in np.split(ids, np.flatnonzero(np.diff(ids >> 32)) + 1):
        for start in range(0, len(fragment), _BATCH):
            look(fragment[start : start + _BATCH])
    return np.concatenate(bad) if bad else np.zeros(0, np.int64), [reason for reason, _ in reasons.most_common(3)]


def _complete(store: Store, repair: bool) -> Iterator[Finding]:
    """Whether each video has the rows that its record counts."""
    rows = store.read(lambda: store.table("frames").search().select(["generation", "row"]).to_arrow())
    groups = rows.group_by("generation").aggregate([("row", "count"), ("row", "count_distinct"), ("row", "max")])
    there = {g["generation"]: (g["row_count"], g["row_count_distinct"], g["row_max"] + 1) for g in groups.to_pylist()}
    wrong = [one for one in store.records() if one.frames and there.get(one.generation) != (one.frames,) * 3]
    if wrong:
        paths = tuple(record.path for record in wrong)
        yield Finding("incomplete", f"{len(wrong)} videos lost rows", paths, repair)
    for record in wrong if repair else ():
        lost = record.frames - there.get(record.generation, (0, 0, 0))[1]
        error = f"{lost} of its {record.frames} rows were damaged"
        failed = replace(record, status="failed", error=error, hint="add it again", generation="", frames=0)
        store.put(failed, None, None)
