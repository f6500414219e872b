"""Made-up videos, and a process that writes or reads a library of them until it is killed.

    python library_process.py FOLDER sync FIRST         brings the library to one target after the other
    python library_process.py FOLDER write FIRST COUNT
    python library_process.py FOLDER read ROUNDS

It says on standard output what it begins and what it has done.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator

import numpy as np

from keyreel.library import upkeep
from keyreel.library.table import Tables
from keyreel.library.types import Extras, Preview, Record, Rows, Subjects
from keyreel.types import F32

WIDTH = 16
MODEL = {"model": "made-up", "model_sha256": "ab" * 32, "width": WIDTH}
VIDEOS = 10


def unit(rng: np.random.Generator, count: int) -> F32:
    vectors = rng.normal(size=(count, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def made(number: int, state: int) -> tuple[Record, Rows, tuple[Preview, ...], Extras]:
    """Video `number` after `state` changes; always the same, but for the generation. Every third has no subjects."""
    rng = np.random.default_rng([number, state])
    count = 3 + number % 4
    vectors = unit(rng, count)
    times = np.sort(rng.random(count)) * 10
    attention = rng.random(4).astype(np.float32)
    shown = tuple(Preview(float(times[row]), rng.bytes(200), attention / attention.sum()) for row in (0, count - 1))
    apart = np.random.default_rng([number, state, 1])
    row = np.flatnonzero(apart.random(count) < 0.7)
    subjects = Subjects(row, unit(apart, len(row)), apart.random((count, 4)).astype(np.float32))
    rows = Rows(
        pts_seconds=times,
        frame_index=np.arange(count) * 12,
        vectors=vectors,
        shot=np.arange(count) // 2,
        keyframe=np.isin(np.arange(count), (0, count - 1)),
        weight=rng.random(count).astype(np.float32),
        subjects=None if number % 3 == 2 else subjects,
    )
    record = Record(
        id=f"id{number}",
        path=f"/made/up/it's {number:03}.mp4",
        size=1000 + number,
        mtime_ns=10**18 + state,
        fingerprint=f"{number}:{state}",
        generation=uuid.uuid4().hex,
        frames=count,
        subjects=rows.counts[1],
        tags=("made", "up"),
        date=9e8 + number,
        duration_seconds=10.5,
        indexed_at=2e9,
        probe={"codec": "h264", "width": 64, "average_fps": 29.97},
        grid=(2, 2),
        shots=((0.0, 1.25), (1.25, 10.5)),
        model="made-up",
        model_sha256="ab" * 32,
    )
    return record, rows, shown, Extras(rng.bytes(500), f"WEBVTT {number}", {"pts_seconds": [0.1 * number], "shot": [0]})


def target(round: int) -> dict[str, tuple[int, int]]:
    """Which videos are there after a round, and in which state: some change, some go, some come back."""
    rng = random.Random(round)
    return {f"id{n}": (n, rng.randrange(1, 4)) for n in range(VIDEOS) if rng.random() < 0.8}


def steps(tables: Tables, round: int) -> Iterator[tuple[str, str]]:
    """What is still to do: ("put", fingerprint) or ("drop", id); a compaction now and then."""
    wanted, there = target(round), fingerprints(tables)
    for id, fingerprint in there.items():
        if id not in wanted:
            yield "drop", id
        elif fingerprint != "{}:{}".format(*wanted[id]):
            yield "put", "{}:{}".format(*wanted[id])
    yield "compact", "alone" if round % 2 else "beside others"
    yield from (("put", "{}:{}".format(*wanted[id])) for id in wanted if id not in there)


def put(tables: Tables, number: int, state: int) -> None:
    tables.put(*made(number, state))
    upkeep.tidy(tables, 6)


def do(tables: Tables, verb: str, what: str) -> None:
    if verb == "put":
        put(tables, *map(int, what.split(":")))
    elif verb == "drop":
        tables.drop([what])
    else:
        upkeep.compact(tables, alone=what == "alone")


def check(tables: Tables) -> int:
    """Reads all that the records name and compares it with what was written; how many videos there were."""
    records = tables.records()
    found = dict(tables.rows([record.generation for record in records]))
    for record in (one for one in records if one.status == "ok"):
        number, state = map(int, record.fingerprint.split(":"))
        rows, expected = found[record.generation], made(number, state)[1]
        np.testing.assert_array_equal(rows.pts_seconds, expected.pts_seconds)
        np.testing.assert_allclose(rows.vectors, expected.vectors, atol=1e-3)
        assert (rows.subjects is None) == (expected.subjects is None)
        if rows.subjects is not None and expected.subjects is not None:
            np.testing.assert_array_equal(rows.subjects.row, expected.subjects.row)
            np.testing.assert_allclose(rows.subjects.vectors, expected.subjects.vectors, atol=1e-3)
            np.testing.assert_allclose(rows.subjects.region, expected.subjects.region, atol=1e-3)
    return len(records)


def _bytes(values: Rows | Subjects) -> list[object]:
    columns = (getattr(values, name) for name in values.__slots__)
    return [
        _bytes(one) if isinstance(one, Subjects) else one.tobytes() if isinstance(one, np.ndarray) else None
        for one in columns
    ]


def content(tables: Tables) -> dict[str, object]:
    """All that a library holds, but for what differs from one run to the next."""
    found: dict[str, object] = {}
    for record in tables.records():
        blocks = [_bytes(rows) for _, rows in tables.rows([record.generation])]
        shown = [(one.pts_seconds, one.jpeg, one.attention.tobytes()) for one in tables.previews(record.generation)]
        same = dataclasses.replace(record, generation="", indexed_at=0.0)
        found[record.path] = (same, blocks, shown, tables.extras(record.generation))
    return found


def fingerprints(tables: Tables) -> dict[str, str]:
    return {record.id: record.fingerprint for record in tables.records()}


def start(folder: object, *arguments: object) -> subprocess.Popen[str]:
    """Starts `main` in a process of its own."""
    command = [sys.executable, "-W", "error", __file__, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main(folder: str, action: str, *numbers: str) -> None:
    def say(*words: object) -> None:
        # In one piece, however standard output is buffered: who reads must be able to tell a line that was cut.
        sys.stdout.write(" ".join(map(str, words)) + "\n")
        sys.stdout.flush()

    first, *more = map(int, numbers)
    tables = Tables(folder)
    importlib.import_module("lancedb")  # which takes seconds: from here on there is something to be killed
    say("ready")
    if action == "sync":
        tables.create(**MODEL)
        for round in range(first, first + 1000):
            for verb, what in steps(tables, round):
                say("begin", verb, what)
                do(tables, verb, what)
                say("done", verb, what)
    elif action == "write":
        tables.create(**MODEL)
        for number in range(first, first + more[0]):
            put(tables, number, 1)
            put(tables, 999, number)  # which others write too
            put(tables, number, 2)
        tables.drop([f"id{first}"])
        say("done")
    elif action == "read":
        say("done", [check(tables) for _ in range(first)][-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
