"""A library whose writers are killed, whose disk is full, and that several processes use at once."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from library_process import MODEL, check, content, do, fingerprints, put, start, steps, target

from keyreel.errors import LibraryError
from keyreel.library.schema import TABLES
from keyreel.library.table import Tables
from keyreel.library.upkeep import compact, upgrade, verify
from keyreel.runtime.bundle import Bundle

pytestmark = pytest.mark.full

KILLS = int(os.environ.get("KEYREEL_KILLS", "12"))


def apply(state: dict[str, str], verb: str, what: str) -> dict[str, str]:
    if verb == "put":
        return state | {f"id{what.split(':')[0]}": what}
    return {id: fingerprint for id, fingerprint in state.items() if verb != "drop" or id != what}


def test_two_writers_and_readers_at_once(tmp_path: Path) -> None:
    """All start at once, so that the writers also make the library at the same time."""
    folder, each = tmp_path / "library", 12
    writers = [start(folder, "write", first, each) for first in (0, 100)]
    own = Tables(str(folder))
    while not own.exists():
        assert any(child.poll() is None for child in writers)
        time.sleep(0.01)
    readers = [start(folder, "read", 15)]
    seen: set[str] = set()
    while any(child.poll() is None for child in writers):
        check(own)  # each video that is there is whole
        there = {record.id for record in own.records()}
        assert seen <= there
        seen = there - {"id0", "id100"}  # which are removed in the end
    for child in writers + readers:
        with child:
            assert child.stdout is not None
            assert child.stdout.read().splitlines()[-1].startswith("done")
        assert child.returncode == 0
    expected = {f"id{number}": f"{number}:2" for first in (0, 100) for number in range(first + 1, first + each)}
    shared = fingerprints(own)
    assert shared.pop("id999") in {f"999:{first + each - 1}" for first in (0, 100)}
    assert shared == expected
    assert check(own) == len(expected) + 1
    assert verify(own) == ()
    # The writers put small files together while the others were at work.
    assert max(own.table(name).stats()["fragment_stats"]["num_fragments"] for name in TABLES) < 30
    compact(own, alone=True)
    assert check(own) == len(expected) + 1


def five(folder: Path) -> dict[str, str]:
    store = Tables(str(folder))
    store.create(**MODEL)
    for number in range(5):
        put(store, number, 1)
    return fingerprints(store)


def put_until_full(folder: Path) -> None:
    store = Tables(str(folder))
    for number in range(100, 500):
        put(store, number, 1)


@pytest.mark.parametrize("limit", [1700, 4500, 5790])
def test_no_file_can_grow(tmp_path: Path, limit: int) -> None:
    """Stands for a full disk. Rows have some 5800 bytes in a file, a record 4600, a list of files 1100 and more.

    LanceDB itself commits files that were cut short like this.
    """
    before = five(tmp_path)
    with no_file_beyond(limit), pytest.raises(LibraryError, match=r"cannot be written: .*(too large|cut short)"):
        put_until_full(tmp_path)
    store = Tables(str(tmp_path))
    assert before.items() <= fingerprints(store).items()
    assert verify(store) == ()
    there = check(store)
    put(store, 50, 1)
    assert check(store) == there + 1


@pytest.mark.parametrize("limit", [9000, 12000])
def test_no_file_can_grow_while_compacting(tmp_path: Path, limit: int) -> None:
    """The rows of five videos have some 13000 bytes in one file."""
    before = five(tmp_path)
    with no_file_beyond(limit), pytest.raises(LibraryError, match=r"cannot be written: .*(too large|cut short)"):
        compact(Tables(str(tmp_path)), alone=True)
    store = Tables(str(tmp_path))
    for _ in range(2):
        assert fingerprints(store) == before
        assert verify(store) == ()
        assert check(store) == 5
        compact(store, alone=True)
    assert store.table("vectors").stats()["fragment_stats"]["num_fragments"] == 1


@pytest.mark.parametrize("limit", [1700, 9000, 12000])
def test_no_file_can_grow_while_upgrading(tmp_path: Path, limit: int) -> None:
    before, builtin = five(tmp_path), Bundle.find("builtin")
    later = dataclasses.replace(builtin, sha256="cd" * 32, same_scene={MODEL["model_sha256"]: ""})
    with no_file_beyond(limit), pytest.raises(LibraryError, match=r"cannot be written: .*(too large|cut short)"):
        upgrade(Tables(str(tmp_path)), later)
    store = Tables(str(tmp_path))
    assert (fingerprints(store), verify(store), check(store)) == (before, (), 5)
    assert upgrade(store, later) == 5
    assert (fingerprints(store), verify(store)) == (before, ())
    assert store.model()[1] == "cd" * 32


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here; test_no_file_can_grow stands for it")
    try:
        before = five(disk / "library")
        with pytest.raises(LibraryError, match=r"cannot be written: .* are needed, .* are free"):
            put_until_full(disk / "library")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))  # somebody else takes the rest
        store = Tables(str(disk / "library"))
        for act in (lambda: compact(store), lambda: put(store, 50, 1), lambda: store.drop(["id0"])):
            with pytest.raises(LibraryError, match="cannot be written"):
                act()
        assert before.items() <= fingerprints(store).items()
        there = check(store)
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        put(store, 50, 1)
        compact(store, alone=True)
        assert verify(Tables(store.uri)) == ()
        assert check(store) == there + 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_killed_at_any_point(tmp_path: Path) -> None:
    rng = random.Random(os.environ.get("KEYREEL_KILLS_SEED", "5"))
    folder, round = tmp_path / "library", 0
    state: dict[str, str] = {}
    met: Counter[str] = Counter()
    for kill in range(KILLS):
        fresh = kill % 6 == 5  # while the library is made; the others go on with what is left of the ones before
        where, after = (tmp_path / f"library{kill}", {}) if fresh else (folder, state)
        # Some lines later, within an operation of this kind.
        lines, enough, verb = [], rng.randrange(12), rng.choice(["put", "drop", "compact"])
        with start(where, "sync", round) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            while not fresh and (len(lines) <= enough or not lines[-1].startswith(f"begin {verb}")):
                lines.append(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.015 if fresh else 0.05))
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        begun = None
        for line in (one for one in lines if one.endswith("\n")):
            word, *step = line.split()[:3]
            after, begun = (after, step) if word == "begin" else (apply(after, *step), None)
        store = Tables(str(where))
        there = fingerprints(store) if store.exists() else {}
        assert there in ([after, apply(after, *begun)] if begun else [after]), (kill, begun)
        assert not store.exists() or (verify(store) == () and check(store) == len(there))
        met[begun[0] if begun else "between" if lines else "create"] += 1
        if fresh:
            store.create(**MODEL)
            put(store, 1, 3)
            assert fingerprints(store) == there | {"id1": "1:3"}
        else:
            state, round = there, round + 1
    assert sum(met.values()) == KILLS
    assert sum(met[verb] for verb in ("put", "drop", "compact")) >= KILLS // 2
    undisturbed = Tables(str(tmp_path / "undisturbed"))
    disturbed = Tables(str(folder))
    done = []
    for store in (undisturbed, disturbed):
        store.create(**MODEL)
        done.append([step for step in steps(store, round) if step[0] == "put"])
        for step in list(steps(store, round)):
            do(store, *step)
        compact(store, alone=True)
        assert not [step for step in steps(store, round) if step[0] != "compact"]
        assert store.table("vectors").count_rows() == sum(record.rows for record in store.records())
        assert store.table("records").count_rows() == len(target(round))
    assert content(disturbed) == content(undisturbed)
    # Only what was missing was written.
    kept = {fingerprint for id, fingerprint in state.items()}
    assert {what for _, what in done[1]} == {what for _, what in done[0]} - kept
    sys.stderr.write(f"killed during {dict(met)}\n")
