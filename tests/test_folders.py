"""Folders as people have them: what is taken for a video, and what is passed over."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from keyreel.folders import videos_in

MP4 = b"\0\0\0\x18ftypmp42" + bytes(600)
TS = (b"\x47" + bytes(187)) * 4
M2TS = (bytes(4) + b"\x47" + bytes(187)) * 4


def write(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def found(folder: Path, *, hidden: bool = False) -> tuple[list[str], Counter[str]]:
    videos, passed = videos_in(folder, hidden=hidden)
    return [path.relative_to(folder).as_posix() for path in videos], passed


def test_a_folder_as_it_comes_from_a_nas(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{
            "a.MP4": MP4,
            "trip/b.mkv": b"x",
            "trip/._b.mkv": b"x",
            "trip/@eaDir/b.mkv/thumb.mp4": b"x",
            "#recycle/old.mp4": b"x",
            "$RECYCLE.BIN/old.mp4": b"x",
            ".Trash-1000/files/old.mp4": b"x",
            "lost+found/x.mp4": b"x",
            "System Volume Information/x.mp4": b"x",
            ".hidden.mp4": b"x",
            "c.mp4.part": b"x",
            "d.mkv.crdownload": b"x",
            "notes.txt": b"x",
            "summary/summary.json": b"{}",
            "summary/reel.mp4": b"x",
            "reel.mp4": b"x",
        },
    )
    names, passed = found(tmp_path)
    assert names == ["a.MP4", "reel.mp4", "trip/b.mkv"]
    assert passed == {
        "hidden, system or ignored folders": 6,
        "hidden files": 2,
        "unfinished downloads": 2,
        "files that are not videos": 2,
        "reels written by keyreel": 1,
    }
    shown, passed = found(tmp_path, hidden=True)
    assert {".hidden.mp4", "trip/._b.mkv", "#recycle/old.mp4", "trip/@eaDir/b.mkv/thumb.mp4"} < set(shown)
    assert len(shown) == 11
    assert "c.mp4.part" not in shown


@pytest.mark.parametrize(
    ("name", "content", "video"),
    [
        ("a.ts", TS, True),
        ("a.ts", TS[:188], False),
        ("a.ts", b"import { A } from 'a';\nexport class B {}\n" * 20, False),
        ("a.ts", b'<?xml version="1.0"?><!DOCTYPE TS>' + bytes(500), False),
        ("a.m2t", TS, True),
        ("a.ts", M2TS, True),
        ("a.mod", b"\0\0\1\xba" + bytes(500), True),
        ("a.mod", b"a song of a tracker".ljust(1084, b"\0"), False),
        ("a.tod", TS, True),
        ("a.dv", b"\x1f\x07\0" + bytes(500), True),
        ("a.qt", b"\0\0\0\x08wide" + bytes(500), True),
        ("a.qt", b"\0\0\1\0idsc" + bytes(500), False),
        ("a.360", MP4, True),
        ("a.gif", b"GIF89a" + bytes(20), True),
        ("a.insv", b"\x89PNG" + bytes(20), False),
        ("a.rmvb", b".RMF", True),
        ("a.h264", b"\0\0\0\1", True),
        ("a.MTS", b"anything", True),
        ("a.ts", b"", True),  # empty: the error is told where it is opened
    ],
)
def test_content_decides_where_the_suffix_leaves_doubt(tmp_path: Path, name: str, content: bytes, video: bool) -> None:
    write(tmp_path, **{name: content})
    assert bool(found(tmp_path)[0]) == video


def test_ignored_files_are_those_that_git_ignores(tmp_path: Path) -> None:
    files = ["a.mp4", "b.mp4", "raw/c.mp4", "raw/keep.mp4", "raw/deep/d.mp4"]
    files += ["x/e.mp4", "x/f.mov", "x/y/g.mp4", "#h.mp4"]
    write(tmp_path, **dict.fromkeys(files, MP4))
    rules = {"": "# a comment\nb.mp4\nraw/*\n!raw/keep.mp4\n*.mov\n\\#h.mp4\n", "x": "/y/\n!f.mov\n"}
    for folder, text in rules.items():
        for name in (".keyreelignore", ".gitignore"):
            (tmp_path / folder / name).write_text(text)
    names, passed = found(tmp_path)
    assert names == ["a.mp4", "raw/keep.mp4", "x/e.mp4", "x/f.mov"]
    assert passed["files listed in .keyreelignore"] == 3
    if shutil.which("git") is None:
        pytest.skip("git is missing: the rules are not compared with it")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    said = subprocess.run(
        ["git", "check-ignore", "--stdin"], input="\n".join(files), text=True, capture_output=True, cwd=tmp_path
    )
    assert sorted(set(files) - set(said.stdout.split("\n"))) == sorted(names)


def test_folders_that_cannot_be_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, **{"a.mp4": MP4, "locked/b.mp4": MP4})
    plain = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    names, passed = found(tmp_path)
    assert names == ["a.mp4"]
    assert passed == {"unreadable folders": 1}


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, **{"in/a.mp4": MP4})
    (tmp_path / "in" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert found(tmp_path)[0] == ["in/a.mp4"]
