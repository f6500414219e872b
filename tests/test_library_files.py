"""Names, states and fingerprints of files, and the records at hand."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from keyreel.errors import SourceError
from keyreel.library import files
from keyreel.library.files import Catalog, FileState, fingerprint, name_of, path_of, real_name
from keyreel.library.types import Record


def record(id: str, path: str, content: str = "c", status: str = "ok") -> Record:
    return Record(
        id=id,
        path=path,
        size=3,
        mtime_ns=5,
        fingerprint=content,
        status=status,  # type: ignore[arg-type]
        indexed_at=0.0,
        model="m",
        model_sha256="s",
    )


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_is_the_absolute_path_or_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of("a.mp4") == name_of(Path("a.mp4")) == name_of("sub/../a.mp4") == str(tmp_path / "a.mp4")
    assert name_of("-") == str(tmp_path / "-")  # a file of that name; the command line reads standard input itself
    assert name_of("https://host/a.mp4?x=1") == "https://host/a.mp4?x=1"
    assert name_of(f"file://{tmp_path}/a%20b.mp4") == str(tmp_path / "a b.mp4")
    assert path_of("https://host/a.mp4") is None
    assert path_of(str(tmp_path / "a.mp4")) == tmp_path / "a.mp4"
    colon = tmp_path / "http:x.mp4"
    colon.touch()
    assert name_of("http:x.mp4") == str(colon)


@pytest.mark.parametrize("bad", ["", b"a.mp4", 3, None])
def test_what_is_no_name(bad: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        name_of(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [b"caf\xe9 50%.mp4", b"\xff\xfe.mkv", "日本 50%.mp4".encode(), b"new\nline.mp4"])
def test_names_that_are_no_text_can_be_stored_and_come_back(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / os.fsdecode(raw)
    path.write_bytes(b"x")
    name = name_of(path)
    name.encode("utf-8")
    assert path_of(name) == path
    assert path_of(name).read_bytes() == b"x"  # type: ignore[union-attr]
    assert name_of(name) == name  # what a record says can be given back
    assert (name == str(path)) == (raw.decode("utf-8", "ignore").encode() == raw)


def test_the_real_name_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "b.mp4").symlink_to("link/a.mp4")
    assert name_of(tmp_path / "b.mp4") == str(tmp_path / "b.mp4")
    for alias in ("b.mp4", "link/a.mp4", "real/a.mp4"):
        assert real_name(name_of(tmp_path / alias)) == str(tmp_path.resolve() / "real/a.mp4")
    assert real_name("https://host/a.mp4") == "https://host/a.mp4"
    assert real_name("/no\0thing") == "/no\0thing"


# --- states -----------------------------------------------------------------------------------------------------------


def test_what_is_no_file_has_no_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    for path in (None, tmp_path, tmp_path / "pipe", tmp_path / "no", tmp_path / "a/b", tmp_path / "gone"):
        assert FileState.of(path) is None


def test_a_state_that_cannot_be_told_is_an_error_and_not_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 300), Path("no\0thing")):
        with pytest.raises(SourceError, match="cannot be read"):
            FileState.of(path)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def _digest(size: int, content: bytes) -> str:
    return hashlib.blake2b(size.to_bytes(8, "little") + content, digest_size=16).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 77])
def test_small_files_are_read_whole(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "a"
    path.write_bytes(content)
    assert fingerprint(path) == _digest(size, content)


def test_large_files_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE_BYTES", 64)
    monkeypatch.setattr(files, "BLOCK_BYTES", 16)
    content = bytearray(np.random.default_rng(0).bytes(200))
    path = tmp_path / "a"
    path.write_bytes(content)
    plain = fingerprint(path)
    # Four blocks: 200 - 16 = 184 bytes from the first to the last, a third of that between two.
    starts = (0, 61, 123, 184)
    assert plain == _digest(200, b"".join(content[start : start + 16] for start in starts))
    seen = set()
    for place in range(200):
        content[place] ^= 1
        path.write_bytes(content)
        if fingerprint(path) != plain:
            seen.add(place)
        content[place] ^= 1
    assert seen == {start + n for start in starts for n in range(16)}
    path.write_bytes(content + b"x")
    assert fingerprint(path) != plain


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc/self/mem, a file whose first byte fails")
def test_a_disk_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fstat", lambda _: os.stat_result([0o100644, 0, 0, 0, 0, 0, 10, 0, 0, 0]))
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint(Path("/proc/self/mem"))


# --- records at hand --------------------------------------------------------------------------------------------------


def test_a_catalog_finds_by_content_and_glob() -> None:
    first, second, bad = record("1", "/b"), record("2", "/a"), record("3", "/c", status="failed")
    catalog = Catalog([first, second, bad])
    assert catalog.like("c") == [first, second]  # not what failed
    assert catalog.like("x") == []
    assert Catalog([record("1", "https://a", ""), record("2", "https://b", "")]).like("") == []
    assert catalog.fitting("/?") == catalog.fitting("*") == [second, first, bad]
    assert catalog.fitting("?") == catalog.fitting("/x*") == []
    moved = record("1", "/moved", "d")
    catalog.put(moved)
    assert catalog.at("/b") is None
    assert (catalog.like("c"), catalog.like("d")) == ([second], [moved])
