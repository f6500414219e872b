"""Looking after a library: compaction, verification and repair, conversion of older formats."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import numpy as np

from keyreel.errors import Damaged
from keyreel.library import schema
from keyreel.library.schema import RECORDS, TABLES, VECTORS, quoted
from keyreel.library.table import CHUNK, Conflict, Full, Tables, lance_errors
from keyreel.library.types import Finding, Record
from keyreel.types import I64

COMPACT_EVERY = 256  # commits
_ORPHAN_AGE_SECONDS = 3600.0  # younger rows may belong to a video that another process is about to commit
_VERSION_AGE = timedelta(minutes=2)  # other processes may still read younger versions
_FULL_FRAGMENT = 1 << 20  # rows; LanceDB leaves such files alone and merges all smaller ones
_BATCH = 1024  # rows that `verify` reads at once
_UPGRADED = 16  # videos that `upgrade` copies at once

# --- compaction -------------------------------------------------------------------------------------------------------


def compact(tables: Tables, *, alone: bool = False) -> int:
    """Merges small files, deletes orphans and old versions; returns the bytes given back, 0 for a URI.

    Orphans are rows of videos that were removed or indexed again, or whose writer was killed before the commit. With
    `alone`, what is younger than two minutes (files) or an hour (rows) is deleted, too.
    """
    before = tables.bytes()
    _delete_orphans(tables, 0.0 if alone else _ORPHAN_AGE_SECONDS)
    for name in TABLES:
        _optimize(tables, name, alone)
    after = tables.bytes()
    return max(0, before - after) if before is not None and after is not None else 0


def tidy(tables: Tables, every: int = COMPACT_EVERY) -> None:
    """Call it after each commit: every so many commits, by any process, it merges small files if there are enough.

    LanceDB rewrites a table up to its last full file. Waiting for a fraction of the commits keeps the total written
    within a small multiple of what is stored. Records are small, so they may be rewritten more often.
    """
    if tables.version() % every:
        return
    videos = tables.table(RECORDS).count_rows()
    for name, fraction in ((VECTORS, 8), (RECORDS, 64)):
        stats = tables.table(name).stats()
        rows = max(int(stats["num_rows"]), 1)
        commits = videos * (rows % _FULL_FRAGMENT) / rows  # whose rows would be rewritten
        if int(stats["fragment_stats"]["num_small_fragments"]) >= every + commits / fraction:
            with contextlib.suppress(Conflict, Full):  # the video is committed; there will be another time
                if name == VECTORS:
                    _delete_orphans(tables, _ORPHAN_AGE_SECONDS)
                _optimize(tables, name, alone=False)


def orphans(tables: Tables, age_seconds: float) -> dict[str, int]:
    """Generations that no record names, and how many rows each has."""
    table = tables.read(VECTORS, None, ("generation", "written"))
    named = {record.generation for record in tables.records()}  # read after the rows: records are committed last
    groups = table.group_by("generation").aggregate([("written", "max"), ("written", "count")]).to_pylist()
    latest = time.time_ns() - int(age_seconds * 1e9)
    old = (group for group in groups if group["generation"] not in named and group["written_max"] <= latest)
    return {group["generation"]: group["written_count"] for group in old}


def _delete_orphans(tables: Tables, age_seconds: float) -> None:
    names = list(orphans(tables, age_seconds))
    for start in range(0, len(names), CHUNK):
        tables.delete(VECTORS, f"generation IN ({quoted(names[start : start + CHUNK])})")


def _optimize(tables: Tables, name: str, alone: bool) -> None:
    table = tables.table(name)
    tables.ask_for_room(int(table.stats()["total_bytes"]))
    before = int(table.version)
    # First without deleting old files, to have a way back if the new ones are cut short (see `Tables`).
    tables.retried(lambda: table.optimize(cleanup_older_than=timedelta(days=36500)))
    try:
        ids = tables.row_ids(table)
        lasts = ids[np.flatnonzero(np.diff(ids >> 32, append=-1))]
        with lance_errors(tables.uri):
            table.take_row_ids(lasts.tolist()).select(["check"]).to_arrow()
    except Damaged as error:
        tables.restore(name, before)
        raise tables.cut_short() from error
    age = timedelta(0) if alone else _VERSION_AGE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # LanceDB warns of an age of 0: the caller is alone
        tables.retried(lambda: table.optimize(cleanup_older_than=age, delete_unverified=alone))


# --- verification -----------------------------------------------------------------------------------------------------


def verify(tables: Tables, *, repair: bool = False) -> tuple[Finding, ...]:
    """Reads every row of a library, compares its checksum, and reports what is wrong.

    With `repair`, a table whose newest version cannot be opened goes back to the last one that can; the file is renamed
    to `.damaged`. Damaged is raised if there is none. Rows that cannot be read are dropped. A video that lost rows
    becomes "failed", so that the next `add` indexes it again.
    """
    findings = [finding for name in TABLES for finding in _opened(tables, name, repair)]
    if findings and not repair:
        return tuple(findings)
    findings += [finding for name in TABLES for finding in _sound(tables, name, repair)]
    if findings and not repair:
        return tuple(findings)  # whether it is complete can only be told once all can be read
    findings += _complete(tables, repair)
    if lost := orphans(tables, _ORPHAN_AGE_SECONDS):
        what = f"{sum(lost.values())} rows of {len(lost)} videos that were removed, changed or never finished"
        findings.append(Finding("orphans", what, (), repair))
        if repair:
            _delete_orphans(tables, _ORPHAN_AGE_SECONDS)
    return tuple(findings)


def _opened(tables: Tables, name: str, repair: bool) -> Iterator[Finding]:
    """Whether the newest version of a table can be opened; if not, goes back to the one before it."""
    while True:
        if tables.folder is not None:
            tables.close()  # a table that is open already may live in memory
        try:
            tables.table(name)
            return
        except Damaged as error:
            folder = None if tables.folder is None else tables.folder / f"{name}.lance" / "_versions"
            # Their names count down: the newest comes first.
            versions = [] if folder is None else sorted(folder.glob("*.manifest"))
            if repair and len(versions) < 2:
                raise
            if not repair:
                what = f"the newest version of {name} cannot be opened: {error.findings[0]}"
                yield Finding("manifest", what, (), False)
                return
            versions[0].rename(versions[0].with_suffix(".damaged"))
            what = f"the newest version of {name} could not be opened; it is set aside as {versions[0].stem}.damaged"
            yield Finding("manifest", what, (), True)


def _sound(tables: Tables, name: str, repair: bool) -> Iterator[Finding]:
    """Whether all rows of a table can be read and have the right checksum."""
    table = tables.table(name)
    ids = tables.row_ids(table)
    bad, reasons = [], Counter[str]()

    def look(part: I64) -> None:
        try:
            with lance_errors(tables.uri):
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
    if not bad:
        return
    rows = np.concatenate(bad)
    why = "; ".join(reason for reason, _ in reasons.most_common(3))
    yield Finding("unreadable", f"{len(rows)} rows of {name}: {why}", (), repair)
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if repair else ():
        tables.delete(name, f"_rowid >= {run[0]} AND _rowid <= {run[-1]}")


def _complete(tables: Tables, repair: bool) -> Iterator[Finding]:
    """Whether each video has the rows that its record counts."""
    rows = tables.read(VECTORS, f"kind = '{schema.SCENE}'", ("generation", "row"))
    groups = rows.group_by("generation").aggregate([("row", "count"), ("row", "count_distinct"), ("row", "max")])
    there = {g["generation"]: (g["row_count"], g["row_count_distinct"], g["row_max"] + 1) for g in groups.to_pylist()}
    wrong = [one for one in tables.records() if one.frames and there.get(one.generation) != (one.frames,) * 3]
    if wrong:
        paths = tuple(record.path for record in wrong)
        yield Finding("incomplete", f"{len(wrong)} videos lost rows", paths, repair)
    for record in wrong if repair else ():
        tables.put(_lost(record, record.frames - there.get(record.generation, (0, 0, 0))[1]))


def _lost(record: Record, rows: int) -> Record:
    error = f"{rows} of its {record.frames} rows were damaged"
    return replace(record, status="failed", error=error, hint="add it again", generation="", frames=0)


# --- older formats ----------------------------------------------------------------------------------------------------


def upgrade(tables: Tables, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Converts a library of format 1 and keeps all that it holds; goes on where it was interrupted.

    Format 1 has the tables `frames`, without kinds of vectors, and `videos`, to which rows were only appended: the one
    of the highest `sequence`, then the last `written`, counts for its id. Both are deleted at the end. It needs free
    space of the library's size.
    """
    if not tables.is_outdated():
        tables.table(RECORDS)
        return 0
    new = Tables(tables.uri, storage_options=tables.options, upgrading=True)
    name, sha256, width = schema.model_of(tables.open("videos").schema)
    new.create(model=name, model_sha256=sha256, width=width)
    _delete_orphans(new, 0.0)  # of a run that was interrupted
    rows = new.open("videos").search().to_arrow().to_pylist()
    newest = {row["id"]: row for row in sorted(rows, key=lambda row: (row["sequence"], row["written"]))}
    done = {record.id for record in new.records()}
    records = [schema.record_of(row) for id, row in newest.items() if id not in done]
    for start in range(0, len(records), _UPGRADED):
        progress(len(done) + start, len(newest))
        new.upsert(list(_converted(new, records[start : start + _UPGRADED])))
    progress(len(newest), len(newest))
    new.drop_tables("frames", "videos")
    tables.close()
    compact(tables, alone=True)
    return len(newest)


def _converted(tables: Tables, records: list[Record]) -> Iterator[Record]:
    """Copies the rows of some videos of format 1, and gives their records."""
    pa, columns = schema.arrow(), tables.table(VECTORS).schema
    try:
        with lance_errors(tables.uri):
            names = quoted(record.generation for record in records)
            old = tables.open("frames").search().where(f"generation IN ({names})").to_arrow()
    except Damaged:
        if len(records) > 1:
            for record in records:
                yield from _converted(tables, [record])
            return
        old = tables.open("frames").schema.empty_table()
    sound = schema.checks(old) == old["check"].to_numpy()
    generations = old["generation"].to_numpy(zero_copy_only=False)
    for record in records:
        own = old.filter(pa.array(sound & (generations == record.generation)))
        if len(own) != record.frames:
            record = _lost(record, record.frames - len(own))
        elif len(own):
            own = own.append_column("kind", pa.array([schema.SCENE] * len(own)))
            tables.add_rows(schema.checked(columns, {name: own[name].combine_chunks() for name in own.column_names}))
        yield record
