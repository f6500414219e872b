"""Maintains a library: compaction, verification and repair, conversion of older formats."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np

from keyreel.errors import Damaged
from keyreel.library import schema
from keyreel.library.errors import Absent, Conflict, Full, ask_for_room, cut_short, lance_errors
from keyreel.library.schema import RECORDS, TABLES, VECTORS, quoted
from keyreel.library.stored import CHUNK
from keyreel.library.table import Tables
from keyreel.library.types import Finding, Record
from keyreel.runtime.bundle import Bundle
from keyreel.types import F32, I64

COMPACT_EVERY = 16  # commits
_ORPHAN_AGE_SECONDS = 3600.0  # age; another process may be about to commit younger rows
_VERSION_AGE = timedelta(minutes=2)  # age; other processes may still read younger versions
_FULL_FRAGMENT = 1 << 20  # rows; LanceDB leaves such files alone and merges all smaller ones
_BATCH = 1024  # rows that `verify` reads at a time
_UPGRADED = 16  # videos that `upgrade` reads at a time

# --- compaction -------------------------------------------------------------------------------------------------------


def compact(tables: Tables, *, alone: bool = False) -> int:
    """Merges small files, deletes orphans and old versions. Returns the freed bytes; 0 for a URI.

    Orphans are rows of videos that were removed or indexed again, or whose writer was killed before the commit. With
    `alone` it also deletes files younger than two minutes and rows younger than an hour.
    """
    before = tables.bytes()
    _delete_orphans(tables, 0.0 if alone else _ORPHAN_AGE_SECONDS)
    for name in TABLES:
        _optimize(tables, name, alone)
    after = tables.bytes()
    return max(0, before - after) if before is not None and after is not None else 0


def tidy(tables: Tables, every: int = COMPACT_EVERY) -> None:
    """Merges small files if there are many. Called after each commit; acts every `every` commits of any process.

    LanceDB rewrites a table from its last full file on: at most some 2,000 videos. Each small file adds about a
    millisecond to reading a video. So it allows 16 small files, and one more for each 64 videos to rewrite, which
    bounds the writing to four megabytes for each added video.
    """
    if tables.version() % every:
        return
    videos = tables.table(RECORDS).count_rows()
    for name in TABLES:
        stats = tables.table(name).stats()
        rows = max(int(stats["num_rows"]), 1)
        commits = videos * (rows % _FULL_FRAGMENT) / rows  # rows to rewrite
        if int(stats["fragment_stats"]["num_small_fragments"]) >= every + commits / 64:
            with contextlib.suppress(Conflict, Full):  # the video is committed; the next call tries again
                if name == VECTORS:
                    _delete_orphans(tables, _ORPHAN_AGE_SECONDS)
                _optimize(tables, name, alone=False)


def orphans(tables: Tables, age_seconds: float) -> dict[str, int]:
    """The generations that no record names, with their numbers of rows."""
    table = tables.read(VECTORS, None, ("generation", "written"))
    named = {record.generation for record in tables.records()}  # read after the rows: a record is committed last
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
    ask_for_room(tables.folder, int(table.stats()["total_bytes"]))
    before = int(table.version)
    # Keep old files first, to go back to if the new ones are cut short (see `Tables`).
    tables.retried(lambda: table.optimize(cleanup_older_than=timedelta(days=36500)))
    try:
        ids = tables.row_ids(table)
        lasts = ids[np.flatnonzero(np.diff(ids >> 32, append=-1))]
        with lance_errors(tables.uri):
            table.take_row_ids(lasts.tolist()).select(["check"]).to_arrow()
    except Damaged as error:
        tables.restore(name, before)
        raise cut_short(tables.uri) from error
    age = timedelta(0) if alone else _VERSION_AGE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # LanceDB warns about an age of 0
        tables.retried(lambda: table.optimize(cleanup_older_than=age, delete_unverified=alone))


# --- verification -----------------------------------------------------------------------------------------------------


def verify(tables: Tables, *, repair: bool = False) -> tuple[Finding, ...]:
    """Reads every row of a library, compares its checksum, and reports damage.

    With `repair`, a table goes back to the last version that can be opened, and the file of the damaged version is
    renamed to `.damaged`; if no version can be opened, it raises Damaged. It deletes rows that cannot be read. A video
    that lost rows becomes "failed", so that the next `add` indexes it again.
    """
    findings = [finding for name in TABLES for finding in _opened(tables, name, repair)]
    if findings and not repair:
        return tuple(findings)
    findings += [finding for name in TABLES for finding in _sound(tables, name, repair)]
    if findings and not repair:
        return tuple(findings)  # completeness can be judged only if all rows can be read
    findings += _complete(tables, repair)
    if lost := orphans(tables, _ORPHAN_AGE_SECONDS):
        what = f"{sum(lost.values())} rows of {len(lost)} videos that were removed, changed or never finished"
        findings.append(Finding("orphans", what, (), repair))
        if repair:
            _delete_orphans(tables, _ORPHAN_AGE_SECONDS)
    return tuple(findings)


def _opened(tables: Tables, name: str, repair: bool) -> Iterator[Finding]:
    """Whether the newest version of a table can be opened; with `repair`, goes back to an older one."""
    while True:
        if tables.folder is not None:
            tables.close()  # an open table may be served from memory
        try:
            tables.table(name)
            return
        except Damaged as error:
            folder = None if tables.folder is None else tables.folder / f"{name}.lance" / "_versions"
            # Their names count down: the newest is first.
            versions = [] if folder is None else sorted(folder.glob("*.manifest"))
            if repair and len(versions) < 2:
                raise
            if not repair:
                what = f"the newest version of {name} cannot be opened: {error.findings[0]}"
                yield Finding("manifest", what, (), False)
                return
            versions[0].rename(versions[0].with_suffix(".damaged"))
            what = f"the newest version of {name} could not be opened; it was renamed to {versions[0].stem}.damaged"
            yield Finding("manifest", what, (), True)


def _sound(tables: Tables, name: str, repair: bool) -> Iterator[Finding]:
    """Whether all rows of a table can be read and match their checksums."""
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
    """Whether each video has as many rows as its record says."""
    rows = tables.read(VECTORS, None, ("generation", "kind", "row"))
    groups = rows.group_by(["generation", "kind"]).aggregate(
        [("row", how) for how in ("count", "count_distinct", "max")]
    )
    found = {
        (group["generation"], group["kind"]): (group["row_count"], group["row_count_distinct"], group["row_max"] + 1)
        for group in groups.to_pylist()
    }

    def there(record: Record, kind: str) -> tuple[int, int, int]:
        return found.get((record.generation, kind), (0, 0, 0))

    def is_whole(record: Record) -> bool:
        subjects = there(record, schema.SUBJECT)[:2]
        return there(record, schema.SCENE) == (record.frames,) * 3 and subjects == (record.subjects or 0,) * 2

    wrong = [record for record in tables.records() if record.frames and not is_whole(record)]
    if wrong:
        paths = tuple(record.path for record in wrong)
        yield Finding("incomplete", f"{len(wrong)} video{'s' * (len(wrong) > 1)} lost rows", paths, repair)
    lost = {record.id for record in wrong}
    whole = {record.generation: record for record in tables.records() if record.digest and record.id not in lost}
    found_digests = ((whole[name], rows.digest) for name, rows in tables.rows(list(whole)))
    renewed = [replace(record, digest=digest) for record, digest in found_digests if digest != record.digest]
    if renewed:
        paths = tuple(record.path for record in renewed)
        what = f"the digest of {len(renewed)} videos is wrong, their data is right"
        yield Finding("unreadable", what, paths, repair)
    for record in renewed if repair else ():
        tables.renew(record)
    for record in wrong if repair else ():
        kept = sum(there(record, kind)[1] for kind in (schema.SCENE, schema.SUBJECT))
        tables.put(_lost(record, record.rows - kept))


def _lost(record: Record, rows: int) -> Record:
    error = f"{rows} of its {record.rows} rows were damaged"
    return replace(record, status="failed", error=error, hint="add it again", generation="", frames=0, subjects=None)


# --- older formats ----------------------------------------------------------------------------------------------------


def upgrade(
    tables: Tables, bundle: Bundle | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Converts a library of format 1 or 2, or of an earlier version of the model. Decodes nothing.

    It keeps scene vectors, pictures and records. The videos have no subjects until they are indexed again. It rewrites
    each table in one commit; after an interrupt it starts that table again. It needs free space of the library's size.

    Format 1 has the tables `frames`, without kinds of vectors, and `videos`, to which rows were only appended: for each
    id the row with the highest `sequence`, then the last `written`, is valid. It deletes both at the end.

    Args:
        bundle: the new model. If the library's model is in `bundle.same_scene`, its vectors are multiplied by the
            matrix given there, if any, and the library gets the new name and sha256.

    Returns:
        The number of videos; 0 if the library was up to date.
    """
    new = Tables(tables.uri, storage_options=tables.options, upgrading=True)
    vectors, records = schema.FORMAT_1 if tables.has_format_1() else TABLES
    source = new.open(records)
    name, sha256, width = schema.model_of(source.schema)
    matrix = None
    if bundle is not None and sha256 in bundle.same_scene:
        name, sha256, matrix = bundle.name, bundle.sha256, bundle.scene_update(sha256)
    columns = schema.schemas(name, sha256, width)
    if source.schema.metadata == columns[RECORDS].metadata:
        tables.table(RECORDS)
        return 0
    with lance_errors(tables.uri):
        rows = source.search().to_arrow()
    rows = rows.filter(schema.arrow().array(schema.checks(rows) == rows["check"].to_numpy())).to_pylist()
    newest = {row["id"]: row for row in sorted(rows, key=lambda row: (row.get("sequence", 0), row["written"]))}
    about = {"model": name, "model_sha256": sha256, "subjects": None, "digest": None}
    known = [schema.record_of(row | about) for row in newest.values()]
    if not _is_written(new, columns[VECTORS]):
        ask_for_room(new.folder, int(new.open(vectors).stats()["total_bytes"]))
        new.overwrite(VECTORS, columns[VECTORS], _converted(new, vectors, columns[VECTORS], known, matrix, progress))
    there = Counter(new.read(VECTORS, None, ("generation",))["generation"].to_pylist())
    lost = {one.id: one.frames - there[one.generation] for one in known if one.frames != there[one.generation]}
    known = [_lost(one, lost[one.id]) if one.id in lost else one for one in known]
    new.overwrite(RECORDS, columns[RECORDS], schema.record_rows(columns[RECORDS], known).to_batches())
    progress(len(known), len(known))
    new.drop_tables(*schema.FORMAT_1)
    tables.close()
    compact(tables, alone=True)
    return len(known)


def model_name(tables: Tables) -> str:
    """The name of the model; works for every format."""
    name, _, _ = schema.model_of(tables.open((schema.FORMAT_1 if tables.has_format_1() else TABLES)[-1]).schema)
    return name


def _is_written(tables: Tables, columns: Any) -> bool:
    """Whether an interrupted run has finished the vectors."""
    try:
        return bool(tables.open(VECTORS).schema.metadata == columns.metadata)
    except Absent:
        return False


def _converted(
    tables: Tables,
    name: str,
    columns: Any,
    records: list[Record],
    matrix: F32 | None,
    progress: Callable[[int, int], None],
) -> Iterator[Any]:
    """Yields the undamaged scene rows of these videos from an older table `vectors` or `frames`, as record batches."""
    for start in range(0, len(records), _UPGRADED):
        progress(start, len(records))
        some = records[start : start + _UPGRADED]
        for part in _sound_rows(tables, name, [one.generation for one in some if one.frames]):
            kept = {key: part[key].combine_chunks() for key in part.column_names if key not in ("kind", "region")}
            if matrix is not None:
                turned = schema.units(schema.stored_vectors(part)) @ matrix.T
                kept["vector"] = schema.halves(turned / np.linalg.norm(turned, axis=1, keepdims=True))
            yield from schema.checked(columns, kept | {"kind": [schema.SCENE] * len(part)}).to_batches()


def _sound_rows(tables: Tables, name: str, generations: list[str]) -> Iterator[Any]:
    """The rows that can be read and match their checksums; from damaged files, those of the other generations."""
    if not generations:
        return
    try:
        with lance_errors(tables.uri):
            rows = tables.open(name).search().where(f"generation IN ({quoted(generations)})").to_arrow()
    except Damaged:
        for one in generations if len(generations) > 1 else ():
            yield from _sound_rows(tables, name, [one])
        return
    sound = schema.checks(rows) == rows["check"].to_numpy()
    if "kind" in rows.column_names:
        sound &= rows["kind"].to_numpy() == schema.SCENE
    yield rows.filter(schema.arrow().array(sound))
