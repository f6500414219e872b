"""The folder of one summary: what is in it, and that it is whole or as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image
from render_clips import make_summary, onsets, write_clip

from keyreel import Summary
from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import MissingExtra, RenderError
from keyreel.render import save
from keyreel.render.documents import SummaryDocument, schema_of
from keyreel.render.files import atomic_write
from keyreel.render.save import save_summary

ALWAYS = {"summary.json", "scenes.vtt", "keyframes", "contact.jpg"}
QUICK = OutputConfig(reel=False, thumbnails=False, storyboard=False)
FORCE = replace(QUICK, overwrite=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with Source(write_clip(path, [n / 25 for n in range(300)], [2.0, 7.0], size=(90, 160))) as source:
        yield source


@pytest.fixture(scope="module")
def summary(source: Source) -> Summary:
    return make_summary(source, keyframes=3, shots=[4.0])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_are_there_and_agree(summary: Summary, source: Source, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    folder = tmp_path / "deep" / "out"
    config = OutputConfig(reel_seconds=4.0, otio=True, edl=True, keyframe_height=45)
    assert save_summary(summary, source, folder, config, progress=lambda *step: told.append(step)) == folder
    more = {"storyboard.html", "thumbs.vtt", "thumbs.jpg", "reel.mp4", "reel.otio", "reel.edl"}
    assert {path.name for path in folder.iterdir()} == ALWAYS | more
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert folder.stat().st_mode == folder.parent.stat().st_mode
    document = json.loads((folder / "summary.json").read_text())
    jsonschema.Draft202012Validator(schema_of(SummaryDocument)).validate(document)
    for row in document["keyframes"]:
        with Image.open(folder / row["file"]) as picture:
            assert picture.size == (80, 45)
    assert len(list((folder / "keyframes").iterdir())) == 3
    spans = document["reel"]["spans"]
    assert sum(s["stop_seconds"] - s["start_seconds"] for s in spans) == pytest.approx(4.0, abs=1.5)
    assert (document["reel"]["mode"], document["reel"]["file"]) == ("copy", "reel.mp4")
    assert document["reel"]["reason"] == "all its parts start and end where packets can be cut"
    assert 0 < document["timings_seconds"]["reel"] < document["timings_seconds"]["render"]
    assert document["timings_seconds"]["render"] > 0
    with Image.open(folder / "thumbs.jpg") as picture:
        assert picture.size == (1600, 180)
    assert (folder / "thumbs.vtt").read_text().count("-->") == 12
    page = (folder / "storyboard.html").read_text()
    assert f'src="./{os.path.relpath(str(source.path), folder)}"' in page
    assert 'href="keyframes/keyframe_0001' in page
    assert {stage for stage, *_ in told} == {"pictures", "reel"}


def test_query_scores_move_the_reel(summary: Summary, source: Source, tmp_path: Path) -> None:
    scores = -abs(summary.embedding.pts_seconds - 7.0).astype("float32")
    config = OutputConfig(reel_seconds=2.0, query="a flash", storyboard=False, thumbnails=False)
    save_summary(summary, source, tmp_path / "out", config, query_scores=scores)
    (span,) = json.loads((tmp_path / "out" / "summary.json").read_text())["reel"]["spans"]
    assert span["start_seconds"] < 7.0 < span["stop_seconds"]
    flashes, beeps = onsets(tmp_path / "out" / "reel.mp4")
    assert flashes == pytest.approx([7.0 - span["start_seconds"]], abs=0.002)
    assert beeps == pytest.approx(flashes, abs=0.015)


def test_a_source_without_a_file(source: Source, tmp_path: Path) -> None:
    with Source(Path(str(source.path)).read_bytes()) as held:
        config = OutputConfig(reel_seconds=2.0, otio=True, thumbnails=False)
        save_summary(make_summary(held, keyframes=2), held, tmp_path / "out", config)
    page = (tmp_path / "out" / "storyboard.html").read_text()
    assert page.count("<source ") == 1
    assert '<source data-reel src="reel.mp4">' in page
    assert "<h1>&lt;bytes&gt;</h1>" in page


def test_an_earlier_summary_and_an_empty_folder_are_replaced(summary: Summary, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_summary(summary, source, out, OutputConfig(reel=False, storyboard=False))
    assert (out / "thumbs.vtt").exists()
    save_summary(summary, source, out, QUICK)
    assert {path.name for path in out.iterdir()} == ALWAYS
    assert json.loads((out / "summary.json").read_text())["reel"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_not_touched(summary: Summary, source: Source, tmp_path: Path) -> None:
    out, letter = tmp_path / "out", tmp_path / "out" / "letter.txt"
    out.mkdir()
    letter.write_text("dear")
    with pytest.raises(RenderError, match=r"not a summary(.|\n)*Hint: .*overwrite"):
        save_summary(summary, source, out, QUICK)
    (out / "summary.json").write_text('{"schema": "other/1"}')
    with pytest.raises(RenderError, match="not a summary"):
        save_summary(summary, source, out, QUICK)
    save_summary(summary, source, out, FORCE)
    assert letter.read_text() == "dear"
    assert json.loads((out / "summary.json").read_text())["schema"] == "keyreel.summary/1"
    with pytest.raises(RenderError, match=r"also letter\.txt"):
        save_summary(summary, source, out, QUICK)
    with pytest.raises(RenderError, match="is a file"):
        save_summary(summary, source, letter, QUICK)
    assert letter.read_text() == "dear"


def test_the_video_and_the_working_folder_are_never_deleted(
    summary: Summary, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(str(source.path))
    with pytest.raises(RenderError, match=r"holds .*clip\.mp4"):
        save_summary(summary, source, path.parent, FORCE)
    assert path.exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RenderError, match="holds"):
        save_summary(summary, source, Path("."), FORCE)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), RuntimeError("bug")])
@pytest.mark.parametrize("when", ["contact_sheet", "to_json", "_swap"])
def test_an_error_leaves_what_was_there(
    summary: Summary,
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    when: str,
) -> None:
    out = tmp_path / "out"
    save_summary(summary, source, out, QUICK)
    before = contents(out)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(save, when, fail)
    expected = RenderError if isinstance(error, OSError) else type(error)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(expected):
            save_summary(summary, source, folder, QUICK)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(
    summary: Summary, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    save_summary(summary, source, out, QUICK)
    before, rename, calls = contents(out), os.rename, []

    def second_fails(a: Path, b: Path) -> None:
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(RenderError, match="cannot be written"):
        save_summary(summary, source, out, QUICK)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# A process that saves as the parent does, and kills itself before rename number N or when it deletes.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from test_render_save import FORCE, Source, make_summary, save_summary

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def count(*names, rename=os.rename, left=[int(sys.argv[3])]):
    left[0] -= 1
    kill() if left[0] == 0 else rename(*names)

os.rename, shutil.rmtree = count, kill
with Source(Path(sys.argv[1])) as source:
    save_summary(make_summary(source, keyframes=2), source, Path(sys.argv[2]), FORCE)
"""


@pytest.mark.parametrize("rename", [1, 2, 3, 4, 5])
def test_a_kill_while_a_folder_is_replaced_loses_nothing(
    summary: Summary, source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, rename: int
) -> None:
    """The renames: the folder away, the new one in its place, the user's file into it, the old one to be deleted."""
    out = tmp_path / "out"
    save_summary(summary, source, out, QUICK)
    (out / "letter.txt").write_text("dear")
    before = contents(out)
    words = [sys.executable, "-c", KILLED, str(source.path), str(out), str(rename)]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() == (rename != 2)
    with pytest.raises(RenderError, match=r"also letter\.txt"):  # refused, but what was there is back
        save_summary(summary, source, out, QUICK)
    assert ("the earlier content is back" in caplog.text) == (rename == 2)
    if rename <= 2:
        assert contents(out) == before
    else:  # the killed run had put its own two key-frames in place
        assert (out / "letter.txt").read_text() == "dear"
        assert len(list((out / "keyframes").iterdir())) == 2
    save_summary(summary, source, out, FORCE)
    assert {path.name for path in out.iterdir()} == {*ALWAYS, "letter.txt"}
    assert len(list((out / "keyframes").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".part"] == ["out"]


def test_what_came_after_a_kill_is_kept_too(summary: Summary, source: Source, tmp_path: Path) -> None:
    """The folder that a killed run has moved away, and one that the user has made meanwhile."""
    out, other = tmp_path / "out", tmp_path / "other"
    save_summary(summary, source, out, QUICK)
    (out / "letter.txt").write_text("dear")
    old = tmp_path / f".keyreel-0-{save._mark(out)}.old"
    out.rename(old)
    save_summary(summary, source, other, QUICK)
    before = contents(old)
    out.mkdir()
    (out / "letter.txt").write_text("another")
    for _ in range(2):
        with pytest.raises(RenderError, match=rf"is in {old} and cannot go back(.|\n)*Hint: move away"):
            save_summary(summary, source, out, FORCE)
        assert contents(old) == before
        assert (out / "letter.txt").read_text() == "another"
        (out / "summary.json").write_bytes((other / "summary.json").read_bytes())
    (out / "letter.txt").rename(tmp_path / "mine.txt")
    save_summary(summary, source, out, FORCE)
    assert (out / "letter.txt").read_text() == "dear"
    assert not old.exists()


def test_a_missing_package_is_found_before_the_work(
    summary: Summary, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentimelineio", None)
    told: list[tuple[Any, ...]] = []
    config = OutputConfig(otio=True)
    with pytest.raises(MissingExtra, match=r"pip install .*\[otio\]"):
        save_summary(summary, source, tmp_path / "out", config, progress=lambda *step: told.append(step))
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_a_day_ago_is_deleted(tmp_path: Path) -> None:
    old, young, mine = (tmp_path / name for name in (".keyreel-0.part", ".keyreel-1.part", "mine.part"))
    file = tmp_path / ".keyreel-2.part.mp4"
    for folder in (old, young, mine):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"x")
    file.write_bytes(b"x")
    for path in (old, mine, file):
        os.utime(path, (0, 0))
    with atomic_write(tmp_path / "b.txt") as made:
        made.write_text("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keyreel-1.part", "b.txt", "mine.part"]
