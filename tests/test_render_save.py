from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from PIL import Image
from render_clips import make_summary, onsets, write_clip

from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import MissingExtra, RenderError
from keyreel.render import save
from keyreel.render.documents import SummaryDocument, schema_of
from keyreel.render.save import save_summary

ALL = {"summary.json", "keyframes", "contact.jpg", "storyboard.html", "reel.mp4", "thumbs.vtt", "thumbs.jpg"}
QUICK = OutputConfig(reel=False, thumbnails=False, storyboard=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = write_clip(
        tmp_path_factory.mktemp("clip") / "clip.mp4", [n / 25 for n in range(300)], [2.0, 7.0], size=(90, 160)
    )
    with Source(path) as source:
        yield source


@pytest.fixture(scope="module")
def summary(source):
    return make_summary(source, keyframes=3, shots=[4.0])


def test_all_files_are_there_and_agree(summary, source, tmp_path):
    told = []
    folder = tmp_path / "deep" / "out"
    config = OutputConfig(reel_seconds=4.0, otio=True, edl=True, keyframe_height=45)
    assert save_summary(summary, source, folder, config, progress=lambda *step: told.append(step)) == folder
    assert {path.name for path in folder.iterdir()} == ALL | {"reel.otio", "reel.edl"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    document = json.loads((folder / "summary.json").read_text())
    jsonschema.Draft202012Validator(schema_of(SummaryDocument)).validate(document)
    for row in document["keyframes"]:
        with Image.open(folder / row["file"]) as picture:
            assert picture.size == (80, 45)
    assert len(list((folder / "keyframes").iterdir())) == 3
    spans = document["reel"]["spans"]
    assert sum(s["stop_seconds"] - s["start_seconds"] for s in spans) == pytest.approx(4.0)
    assert document["timings_seconds"]["render"] > 0
    with Image.open(folder / "thumbs.jpg") as picture:
        assert picture.size == (1600, 180)
    cues = (folder / "thumbs.vtt").read_text()
    assert cues.count("-->") == 12
    page = (folder / "storyboard.html").read_text()
    assert f'src="./{os.path.relpath(source.path, folder)}"' in page
    assert {stage for stage, *_ in told} == {"pictures", "reel"}
    assert 'href="keyframes/keyframe_0001' in page


def test_only_what_is_asked_for(summary, source, tmp_path):
    save_summary(summary, source, tmp_path / "out", QUICK)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "keyframes", "contact.jpg"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reel"] is None


def test_query_scores_move_the_reel(summary, source, tmp_path):
    scores = -abs(summary.embedding.pts_seconds - 7.0).astype("float32")
    config = OutputConfig(reel_seconds=2.0, query="a flash", storyboard=False, thumbnails=False)
    save_summary(summary, source, tmp_path / "out", config, query_scores=scores)
    (span,) = json.loads((tmp_path / "out" / "summary.json").read_text())["reel"]["spans"]
    assert span["start_seconds"] < 7.0 < span["stop_seconds"]
    flashes, beeps = onsets(tmp_path / "out" / "reel.mp4")
    assert flashes == pytest.approx([7.0 - span["start_seconds"]], abs=0.002)
    assert beeps == pytest.approx(flashes, abs=0.015)


def test_a_source_without_a_file(source, tmp_path):
    with Source(Path(source.path).read_bytes()) as held:
        summary = make_summary(held, keyframes=2)
        save_summary(summary, held, tmp_path / "out", OutputConfig(reel_seconds=2.0, otio=True, thumbnails=False))
    page = (tmp_path / "out" / "storyboard.html").read_text()
    assert page.count("<source ") == 1
    assert '<source data-reel src="reel.mp4">' in page
    assert "<h1>&lt;bytes&gt;</h1>" in page


def test_an_earlier_summary_and_an_empty_folder_are_replaced(summary, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_summary(summary, source, out, OutputConfig(reel=False, storyboard=False))
    assert (out / "thumbs.vtt").exists()
    save_summary(summary, source, out, QUICK)
    assert not (out / "thumbs.vtt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_not_touched(summary, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(RenderError, match=r"no summary(.|\n)*Hint: .*overwrite"):
        save_summary(summary, source, out, QUICK)
    (out / "summary.json").write_text('{"schema": "other/1"}')
    with pytest.raises(RenderError, match="no summary"):
        save_summary(summary, source, out, QUICK)
    assert (out / "letter.txt").read_text() == "dear"
    save_summary(summary, source, out, OutputConfig(reel=False, thumbnails=False, storyboard=False, overwrite=True))
    assert (out / "letter.txt").read_text() == "dear"
    assert json.loads((out / "summary.json").read_text())["schema"] == "keyreel.summary/1"
    (out / "letter.txt").write_text("dear")
    with pytest.raises(RenderError, match=r"also letter\.txt"):
        save_summary(summary, source, out, QUICK)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RenderError, match="is a file"):
        save_summary(summary, source, tmp_path / "file", QUICK)
    assert (tmp_path / "file").read_text() == "x"


def test_the_video_and_the_working_folder_are_never_deleted(summary, source, tmp_path, monkeypatch):
    force = OutputConfig(reel=False, thumbnails=False, storyboard=False, overwrite=True)
    with pytest.raises(RenderError, match=r"holds .*clip\.mp4"):
        save_summary(summary, source, source.path.parent, force)
    assert source.path.exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RenderError, match="holds"):
        save_summary(summary, source, Path("."), force)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), RuntimeError("bug")])
@pytest.mark.parametrize("when", ["contact_sheet", "to_json", "_swap"])
def test_an_error_leaves_what_was_there(summary, source, tmp_path, monkeypatch, error, when):
    out = tmp_path / "out"
    save_summary(summary, source, out, QUICK)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(save, when, fail)
    expected = RenderError if isinstance(error, OSError) else error if isinstance(error, type) else type(error)
    with pytest.raises(expected):
        save_summary(summary, source, out, QUICK)
    with pytest.raises(expected):
        save_summary(summary, source, tmp_path / "new", QUICK)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(summary, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_summary(summary, source, out, QUICK)
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append((a, b))
        if len(calls) == 2:
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(RenderError, match="cannot be written"):
        save_summary(summary, source, out, QUICK)
    assert json.loads((out / "summary.json").read_text())["schema"] == "keyreel.summary/1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_package_is_told_before_the_work(summary, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentimelineio", None)
    told = []
    config = OutputConfig(otio=True)
    with pytest.raises(MissingExtra, match=r"keyreel\[otio\]"):
        save_summary(summary, source, tmp_path / "out", config, progress=lambda *step: told.append(step))
    assert told == []
    assert list(tmp_path.iterdir()) == []


def test_folders_have_the_usual_rights(summary, source, tmp_path):
    save_summary(summary, source, tmp_path / "out", QUICK)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_ctrl_c_in_another_process(source, tmp_path):
    """A real SIGINT while the reel is written: the folder beside is gone."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from render_clips import make_summary
from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.render.save import save_summary
with Source({str(source.path)!r}) as source:
    summary = make_summary(source, keyframes=2)
    def progress(stage, done, total):
        if stage == "reel" and done > 1:
            os.kill(os.getpid(), signal.SIGINT)
    save_summary(summary, source, Path({str(tmp_path / "out")!r}), OutputConfig(), progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []
