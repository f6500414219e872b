"""The library as its users see it, over the real store: what `add` does with files, and that a search finds them."""

from __future__ import annotations

import dataclasses
import http.server
import io
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import pytest
from encoded_clips import encode
from library_process import content
from PIL import Image, ImageDraw
from test_library_search import one

import keyreel
from keyreel import Engine, Library, Sampling, Summary
from keyreel.config import DecodeLimits, IndexConfig, LibraryConfig, OutputConfig
from keyreel.decode.source import Source
from keyreel.demo import HEIGHT, SCENES, WIDTH
from keyreel.errors import KeyreelError, LibraryError, ModelMismatch, SourceNotFound
from keyreel.library import files, schema
from keyreel.library.types import Added, Filter, LibraryHit, Record
from keyreel.render.pictures import at_most, pictures_at
from keyreel.runtime.bundle import Bundle, SubjectScale
from keyreel.search import region
from keyreel.types import Combined, Example

pytest.importorskip("lancedb", reason="needs the extra `library`")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(device="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four clips of different content, two seconds each."""
    folder = tmp_path_factory.mktemp("clips")
    return [encode(folder / f"{n}", codec="libx264", container="mp4", seed=n, frames=50) for n in range(4)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes of `keyreel demo` in five frames a second: what they show has names."""
    path = tmp_path_factory.mktemp("demo") / "demo.mp4"
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=5, options={"preset": "veryfast"})
        video.width, video.height, video.pix_fmt = WIDTH // 2, HEIGHT // 2, "yuv420p"
        for scene in SCENES:
            count = round(5 * scene.seconds)
            for n in range(count):
                image = Image.new("RGB", (WIDTH, HEIGHT), scene.background)
                scene.paint(ImageDraw.Draw(image), n / (count - 1))
                output.mux(video.encode(av.VideoFrame.from_image(image.reduce(2))))
        output.mux(video.encode(None))
    return path


@pytest.fixture(scope="module")
def summary(engine: Engine, demo: Path) -> Summary:
    return engine.summarize(demo)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, engine: Engine, demo: Path, clips: list[Path]) -> Iterator[Library]:
    """A library of the demo and the clips, for tests that only look; nothing is folded in its answers."""
    config = LibraryConfig(fold_similarity=1.0, preview_height=90)
    with Library(tmp_path_factory.mktemp("full") / "library", engine, config=config) as library:
        (added,) = library.add([demo], IndexConfig(tags=("demo", "x", "demo")))
        assert added == Added(str(demo), "added", library.record(demo), None, added.seconds)
        library.add(clips, IndexConfig(tags=("noise",)))
        yield library


@pytest.fixture
def folder(tmp_path: Path, clips: list[Path]) -> Path:
    """A folder of one's own with the clips a, b, c."""
    made = tmp_path / "videos"
    made.mkdir()
    for name, clip in zip("abc", clips, strict=False):
        shutil.copy(clip, made / f"{name}.mp4")
    return made


@pytest.fixture
def library(tmp_path: Path, engine: Engine) -> Iterator[Library]:
    with Library(tmp_path / "library", engine, config=LibraryConfig(fold_similarity=1.0)) as library:
        yield library


def novel_frames(engine: Engine, summary: Summary) -> Any:
    """[T] bool: whose subject is stored."""
    scenes, subjects = (one.astype(np.float64) for one in (summary.embedding.vectors, summary.embedding.subject))
    return (scenes * subjects).sum(1) < engine.bundle.subject.novelty


def changes(added: list[Added]) -> dict[str, str]:
    return {Path(entry.path).name: entry.change for entry in added}


def rows(library: Library, record: Record) -> Any:
    return dict(library._tables.rows([record.generation]))[record.generation]


def nothing_is_opened() -> Any:
    """A block in which no video may be opened."""
    return patch.object(Source, "open", side_effect=AssertionError("a file was opened"))


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_rows_are_those_of_summarize(full: Library, engine: Engine, demo: Path, summary: Summary) -> None:
    record = full.record(demo)
    assert record == full.record(record.id)
    assert record.path == str(demo)
    assert (record.status, record.error, record.tags, record.frames) == ("ok", None, ("demo", "x"), 48)
    assert (record.size, record.mtime_ns) == (demo.stat().st_size, demo.stat().st_mtime_ns)
    assert record.fingerprint == files.fingerprint(demo)
    assert record.date is None  # the demo has none in its metadata
    assert record.duration_seconds == summary.shots[-1].stop_seconds == pytest.approx(24.0)
    assert (record.model, record.model_sha256) == (engine.bundle.name, engine.bundle.sha256)
    assert record.rows == record.frames + record.subjects
    assert record.probe == dataclasses.asdict(summary.video)
    assert record.grid == summary.embedding.grid
    assert record.shots == tuple((s.start_seconds, s.stop_seconds) for s in summary.shots)

    block, embedding = rows(full, record), summary.embedding
    np.testing.assert_array_equal(block.pts_seconds, embedding.pts_seconds)
    np.testing.assert_array_equal(block.frame_index, embedding.frame_index)
    # Half precision: 2^-11 of each number; then made unit length again.
    np.testing.assert_allclose(block.vectors, embedding.vectors, rtol=2**-10, atol=2**-24)
    np.testing.assert_allclose(np.linalg.norm(block.vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(block.weight, summary.importance)
    novel = novel_frames(engine, summary)
    assert block.subjects.row.tolist() == np.flatnonzero(novel).tolist()
    np.testing.assert_allclose(block.subjects.vectors, embedding.subject[novel], rtol=2**-10, atol=2**-24)
    boxes = [region(weights, embedding.grid) for weights in embedding.attention]
    np.testing.assert_allclose(block.subjects.region, boxes, atol=2**-11)
    assert record.subjects == novel.sum()
    in_shot = [
        [n for n, s in enumerate(summary.shots) if s.start_seconds <= t < s.stop_seconds]
        for t in embedding.pts_seconds.tolist()
    ]
    assert [[n] for n in block.shot.tolist()] == in_shot
    marked = embedding.pts_seconds[block.keyframe].tolist()
    assert marked == [keyframe.pts_seconds for keyframe in summary.keyframes]


def test_pictures_are_those_of_the_key_frames(tmp_path: Path, full: Library, demo: Path, summary: Summary) -> None:
    summary.save(tmp_path / "out", OutputConfig(reel=False, storyboard=False, jpeg_quality=95))
    times = [keyframe.pts_seconds for keyframe in summary.keyframes]
    pictures = [
        picture
        for _, picture in pictures_at(Source(demo), times, at_most(summary.video.height, summary.video.width, 90))
    ]
    previews = full.previews(demo)
    assert len(previews) == len(pictures) > 3
    for preview, picture, keyframe in zip(previews, pictures, summary.keyframes, strict=True):
        assert preview.pts_seconds == keyframe.pts_seconds
        found = np.asarray(Image.open(io.BytesIO(preview.jpeg)), np.float64)
        assert found.shape == picture.shape == (90, 160, 3)
        assert np.abs(found - picture).mean() < 3
        np.testing.assert_allclose(preview.attention, summary.embedding.attention[keyframe.sample], rtol=2e-3)
        assert full.preview(demo, keyframe.pts_seconds) == preview.jpeg
    middle = (previews[1].pts_seconds + 2 * previews[2].pts_seconds) / 3
    for seconds, nearest in ((middle, 2), (-9.0, 0), (1e9, -1)):
        assert full.preview(demo, seconds, decode=False) == previews[nearest].jpeg
        small = at_most(summary.video.height, summary.video.width, 90)
        ((_, picture),) = pictures_at(Source(demo), [min(seconds, 1e6)], small)
        found = np.asarray(Image.open(io.BytesIO(full.preview(demo, seconds))), np.float64)
        assert np.abs(found - picture).mean() < 3

    extras = full.extras(demo)
    sheet = np.asarray(Image.open(io.BytesIO(extras.sprite)), np.float64)
    saved = np.asarray(Image.open(tmp_path / "out/thumbs.jpg"), np.float64)
    assert sheet.shape == saved.shape == (270, 1600, 3)
    assert np.abs(sheet - saved).mean() < 3
    assert extras.vtt == (tmp_path / "out/thumbs.vtt").read_text().replace("thumbs.jpg", "sprite.jpg")
    told = [{**row, "shot": None} for row in extras.overview["keyframes"]]
    assert told == [
        {**{n: v for n, v in dataclasses.asdict(k).items() if n != "sample"}, "shot": None} for k in summary.keyframes
    ]
    for row in extras.overview["keyframes"]:
        span = summary.shots[row["shot"]]
        assert span.start_seconds <= row["pts_seconds"] < span.stop_seconds
    sprite = extras.overview["sprite"]
    assert sprite == {"step_seconds": 1.0, "columns": 10, "tile": [160, 90]}
    assert extras.overview["attended_area"] == [0.0, 0.0, 1.0, 1.0]
    assert extras.overview["config"]["sampling"]["fps"] == 2.0


def test_options_are_those_of_summarize(library: Library, engine: Engine, demo: Path) -> None:
    sampling = Sampling(fps=1.0, start_seconds=4.0, stop_seconds=12.0)
    select, encode = keyreel.SelectConfig(keyframes=2), keyreel.EncodeConfig(shift="off")
    (added,) = library.add([demo], IndexConfig(sampling, encode, select))
    summary = engine.summarize(demo, sampling=sampling, select=select, encode=encode)
    assert added.record is not None
    block = rows(library, added.record)
    np.testing.assert_allclose(block.vectors, summary.embedding.vectors, rtol=2**-10, atol=2**-24)
    assert added.record.duration_seconds == pytest.approx(24.0)  # of the video, not of what was looked at
    assert len(library.previews(demo)) == 2


@pytest.mark.full
def test_a_date_that_an_older_keyreel_took_from_the_disk_is_none(full: Library) -> None:
    record, columns = full.list()[0], schema.schemas("m", "s", 4)[schema.RECORDS]
    for date, wanted in ((record.mtime_ns / 1e9, None), (1e9, 1e9), (None, None)):
        (row,) = schema.record_rows(columns, [dataclasses.replace(record, date=date)]).to_pylist()
        assert schema.record_of(row).date == wanted


def test_the_date_is_that_of_the_recording(tmp_path: Path, library: Library, clips: list[Path]) -> None:
    said = ["2019-06-07T08:09:10.000000Z", "1970-01-01T00:00:00.000000Z", "2090-01-01T00:00:00.000000Z"]
    for number, time in enumerate(said):
        path = tmp_path / f"{number}.mkv"
        with av.open(str(clips[0])) as source, av.open(str(path), "w") as target:
            target.metadata["creation_time"] = time
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        os.utime(path, (1e9, 1e9))
        (added,) = library.add([path], IndexConfig(force=True))
        assert added.record is not None
        assert added.record.date == (1559894950.0 if number == 0 else None)


# --- what changed -----------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_opened_again(folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = sorted(folder.iterdir())
    assert list(changes(library.add(videos)).values()) == ["added"] * 3
    before, version = content(library._tables), library._tables.version()
    for kind in (Source, Path):
        monkeypatch.setattr(kind, "open", lambda *_: pytest.fail("a file was opened"))
    again = library.add(videos)
    assert list(changes(again).values()) == ["unchanged"] * 3
    assert [entry.record for entry in again] == library.list()
    assert content(library._tables) == before
    assert library._tables.version() == version
    assert list(changes(library.update()).values()) == ["unchanged"] * 3


def test_a_touched_file_is_looked_at_and_not_decoded(folder: Path, library: Library) -> None:
    (before,) = (entry.record for entry in library.add([folder / "a.mp4"]))
    os.utime(folder / "a.mp4", ns=(10**18, 10**18))
    with nothing_is_opened():
        (added,) = library.add([folder / "a.mp4"])
    assert before is not None
    assert added.change == "unchanged"
    assert added.record == library.record(before.id) == dataclasses.replace(before, mtime_ns=10**18)


def test_moved_files_keep_their_id_and_rows(folder: Path, library: Library, clips: list[Path]) -> None:
    library.add([folder / "a.mp4"], IndexConfig(tags=("x",)))
    before, path = library.record(folder / "a.mp4"), str(folder / "z.mp4")
    (folder / "a.mp4").rename(path)
    with nothing_is_opened():
        (added,) = library.add([path], IndexConfig(tags=("y",)))
    moved = dataclasses.replace(before, path=path, tags=("x", "y"), probe={**before.probe, "path": path})
    assert (added.change, added.failure, library.list()) == ("moved", None, [moved])
    shutil.copy(clips[3], folder / "a.mp4")  # a new file where it was has an id of its own
    assert library.add([folder / "a.mp4"])[0].change == "added"
    new, other = library.list()
    assert (new.path, new.id != moved.id, other) == (str(folder / "a.mp4"), True, moved)


def test_what_another_process_added_meanwhile_is_not_done_again(folder: Path, library: Library) -> None:
    other = Library(library.uri, library.engine)

    def begin(name: str) -> Any:
        if name.endswith("a.mp4"):
            other.add([folder / "b.mp4"])
        return lambda *_: None

    first, second = library.add([folder / "a.mp4", folder / "b.mp4"], begin=begin)
    assert (first.change, second.change) == ("added", "unchanged")
    assert [first.record, second.record] == library.list() == other.list()


def test_copies_get_rows_of_their_own_without_decoding(folder: Path, library: Library) -> None:
    library.add([folder / "a.mp4"], IndexConfig(tags=("x",)))
    shutil.copy(folder / "a.mp4", folder / "z.mp4")
    with nothing_is_opened():
        (added,) = library.add([folder / "z.mp4"], IndexConfig(tags=("y",)))
    first, second = library.list()
    assert (added.change, added.failure, added.record) == ("copied", None, second)
    assert first.id != second.id
    assert first.generation != second.generation
    assert (first.tags, second.tags) == (("x",), ("y",))
    one, other = rows(library, first), rows(library, second)
    np.testing.assert_allclose(other.vectors, one.vectors, atol=2**-11)
    for name in ("pts_seconds", "frame_index", "shot", "keyframe", "weight"):
        np.testing.assert_array_equal(getattr(other, name), getattr(one, name))
    assert library.extras(second.id) == library.extras(first.id)
    assert [p.jpeg for p in library.previews(second.id)] == [p.jpeg for p in library.previews(first.id)]
    library.remove([first.id])
    library.compact(alone=True)
    assert len(rows(library, second)) == second.frames
    assert library.verify() == ()


def test_copies_in_one_call_are_decoded_once(folder: Path, library: Library, engine: Engine) -> None:
    for name in "xyz":
        shutil.copy(folder / "a.mp4", folder / f"{name}.mp4")
    with patch.object(Engine, "summarize", side_effect=engine.summarize) as summarize:
        found = changes(library.add([folder / f"{name}.mp4" for name in "axyzb"], IndexConfig(workers=4)))
    assert sorted(found.values()) == ["added", "added", "copied", "copied", "copied"]
    assert found["b.mp4"] == "added"
    assert summarize.call_count == 2


def test_changed_files_keep_their_id_and_get_new_rows(
    folder: Path, library: Library, clips: list[Path], engine: Engine
) -> None:
    library.add([folder / "a.mp4"], IndexConfig(tags=("x",)))
    before = library.record(folder / "a.mp4")
    shutil.copy(clips[3], folder / "a.mp4")
    (added,) = library.add([folder / "a.mp4"])
    after = library.record(folder / "a.mp4")
    assert (added.change, added.record) == ("changed", after)
    assert (after.id, after.tags) == (before.id, ("x",))
    assert after.fingerprint == files.fingerprint(clips[3])
    expected = engine.summarize(clips[3]).embedding.vectors
    np.testing.assert_allclose(rows(library, after).vectors, expected, rtol=2**-10, atol=2**-24)
    library.compact(alone=True)
    assert list(library._tables.rows([before.generation])) == []


def test_swapped_names_are_told_by_content(folder: Path, library: Library) -> None:
    library.add([folder / "a.mp4", folder / "b.mp4"])
    first, second = (rows(library, record).vectors for record in library.list())
    (folder / "a.mp4").rename(folder / "t")
    (folder / "b.mp4").rename(folder / "a.mp4")
    (folder / "t").rename(folder / "b.mp4")
    assert set(changes(library.update()).values()) == {"changed"}
    now_first, now_second = (rows(library, record).vectors for record in library.list())
    np.testing.assert_allclose(now_first, second, atol=2**-11)
    np.testing.assert_allclose(now_second, first, atol=2**-11)
    assert np.abs(first - second).max() > 0.01


def test_force_indexes_again_and_tags_add_up(folder: Path, library: Library) -> None:
    library.add([folder / "a.mp4"], IndexConfig(tags=("x",)))
    before = library.record(folder / "a.mp4")
    (added,) = library.add([folder / "a.mp4"], IndexConfig(tags=("y",)))
    assert (added.change, library.record(before.id).tags) == ("unchanged", ("x", "y"))
    assert library.record(before.id).generation == before.generation
    (added,) = library.add([folder / "a.mp4"], IndexConfig(force=True))
    assert added.change == "changed"
    assert added.record is not None
    assert added.record.id == before.id
    assert added.record.generation != before.generation
    assert added.record.tags == ("x", "y")


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_file_under_several_names_is_one_video(
    folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link.mp4").symlink_to("a.mp4")
    (folder.parent / "elsewhere").symlink_to(folder)
    os.link(folder / "a.mp4", folder / "hard.mp4")
    names = ["a.mp4", Path("a.mp4"), "./a.mp4", folder / "a.mp4", "link.mp4", folder.parent / "elsewhere/a.mp4"]
    assert [(entry.path, entry.change) for entry in library.add(names)] == [(str(folder / "a.mp4"), "added")]
    for name in (*names, "hard.mp4"):
        (added,) = library.add([name])
        assert (added.change, added.record) == ("unchanged", library.record("a.mp4"))
    assert library.record("link.mp4") == library.record(folder.parent / "elsewhere/a.mp4") == library.list()[0]
    assert len(library.list()) == 1


def test_names_that_are_no_text(folder: Path, library: Library) -> None:
    path = folder / os.fsdecode(b"caf\xe9.mp4")
    (folder / "a.mp4").rename(path)
    broken = folder / os.fsdecode(b"\xff.mp4")
    broken.write_bytes(b"no video at all")
    good, bad = library.add([path, broken])
    assert (good.change, bad.change) == ("added", "failed")
    assert good.path == library.record(path).path == f"file://{folder}/caf%E9.mp4"
    assert library.record(good.path) == good.record
    assert library.record(path).probe["path"] == good.path
    assert "\\udcff.mp4" in (library.record(broken).error or "")
    again = library.update()
    assert changes(again) == {"caf%E9.mp4": "unchanged", "%FF.mp4": "failed"}
    assert [record.path for record in library.remove([path])] == [good.path]


def test_addresses_are_opened_only_when_that_is_allowed(folder: Path, library: Library) -> None:
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.mp4"
            (refused,) = library.add([url])
            assert refused.change == "failed"
            assert "by default" in str(refused.failure and refused.failure.error)
            assert not asked
            assert not library.exists()
            (added,) = library.add([url], IndexConfig(limits=DecodeLimits(allow_network=True)))
            assert (added.path, added.change, added.failure) == (url, "added", None)
            (local,) = library.add([folder / "a.mp4"])
            assert local.change == "added"  # nothing says that they hold the same
            one, other = (rows(library, record) for record in library.list())
            np.testing.assert_allclose(one.vectors, other.vectors, atol=2**-11)
            count = len(asked)
            assert [entry.change for entry in library.update()] == ["unchanged", "unchanged"]
            assert len(asked) == count
        finally:
            server.shutdown()
            thread.join()


# --- what fails -------------------------------------------------------------------------------------------------------


def test_failures_are_kept_told_and_tried_again(folder: Path, library: Library, clips: list[Path]) -> None:
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    names = ["text.mp4", "a.mp4", "empty.mp4", "folder.mp4", "pipe.mp4", "gone.mp4", "b.mp4"]
    told: list[Added] = []
    found = library.add([folder / name for name in names], tell=told.append)
    assert found == told
    assert changes(found) == {name: "added" if name in ("a.mp4", "b.mp4") else "failed" for name in names}
    for entry in found:
        assert (entry.failure is None) == (entry.change == "added")
        assert entry.failure is None or (entry.failure.video, entry.failure.error.exit_code) == (entry.path, 3)
    assert isinstance(found[5].failure and found[5].failure.error, SourceNotFound)
    # Only files are kept in mind: what is no file cannot be mended in its place.
    assert {Path(r.path).name: r.status for r in library.list()} == {
        "a.mp4": "ok",
        "b.mp4": "ok",
        "empty.mp4": "failed",
        "text.mp4": "failed",
    }
    bad = library.record(folder / "empty.mp4")
    assert (bad.error, bad.hint) == (f"{bad.path}: empty file, 0 bytes.", "Copy or download it again.")
    assert (bad.generation, bad.frames, bad.duration_seconds) == ("", 0, None)
    with pytest.raises(LibraryError, match="empty file"):
        library.preview(bad.id, 0.0)

    version = library._tables.version()
    assert changes(library.add([folder / "text.mp4"])) == {"text.mp4": "failed"}
    assert library._tables.version() == version  # nothing new to say
    shutil.copy(clips[3], folder / "empty.mp4")
    assert changes(library.update()) == {**dict.fromkeys(["a.mp4", "b.mp4"], "unchanged"), "empty.mp4": "added"} | {
        "text.mp4": "failed"
    }
    mended = library.record(folder / "empty.mp4")
    assert (mended.id, mended.status, mended.error, mended.hint) == (bad.id, "ok", None, None)


def test_a_video_that_breaks_loses_its_rows(folder: Path, library: Library) -> None:
    library.add([folder / "a.mp4"], IndexConfig(tags=("x",)))
    before = library.record(folder / "a.mp4")
    (folder / "a.mp4").write_bytes(b"broken now")
    (added,) = library.add([folder / "a.mp4"])
    after = library.record(folder / "a.mp4")
    assert (added.change, added.record) == ("failed", after)
    assert (after.id, after.status, after.frames, after.tags) == (before.id, "failed", 0, ("x",))
    assert library.stats().failed == 1


@pytest.mark.full
def test_rows_stay_where_only_the_second_look_fails(folder: Path, library: Library) -> None:
    library.add([folder / "a.mp4"])
    before = content(library._tables)
    with patch.object(Engine, "summarize", side_effect=MemoryError("no room")):
        (added,) = library.add([folder / "a.mp4"], IndexConfig(force=True))
    assert added.change == "failed"
    assert "no room" in str(added.failure and added.failure.error)
    assert content(library._tables) == before


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "still_whole"),
    [
        pytest.param(lambda path, _: path.write_bytes(path.read_bytes() + b"more"), True, id="grows"),
        pytest.param(lambda path, _: os.truncate(path, 2000), False, id="is cut"),
        pytest.param(lambda path, other: other.replace(path), True, id="is replaced"),
        pytest.param(lambda path, _: path.unlink(), False, id="vanishes"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_found_out(
    folder: Path, library: Library, change: Callable[[Path, Path], Any], still_whole: bool
) -> None:
    path, changed = folder / "a.mp4", []

    def progress(*_: Any) -> None:
        if not changed:
            changed.append(change(path, folder / "b.mp4"))

    (added,) = library.add([path], begin=lambda _: progress)
    assert changed
    assert added.change == "failed"
    assert "changed while it was read" in str(added.failure and added.failure.error)
    assert "--watch" in str(added.failure and added.failure.error.hint)
    if still_whole:
        assert library.add([path])[0].change == "added"
        assert library.record(path).fingerprint == files.fingerprint(path)


# --- update and remove ------------------------------------------------------------------------------------------------


def test_update_tells_what_is_missing_and_prunes_it(folder: Path, library: Library, clips: list[Path]) -> None:
    library.add(sorted(folder.iterdir()))
    gone = library.record(folder / "b.mp4")
    (folder / "b.mp4").unlink()
    shutil.copy(clips[3], folder / "c.mp4")
    found = library.update(IndexConfig(tags=("t",)))
    assert changes(found) == {"a.mp4": "unchanged", "b.mp4": "missing", "c.mp4": "changed"}
    assert found[1].record == gone
    assert [record.tags for record in library.list()] == [("t",), (), ("t",)]
    told: list[Added] = []
    found = library.update(prune=True, tell=told.append)
    assert changes(found) == {"a.mp4": "unchanged", "b.mp4": "missing", "c.mp4": "unchanged"}
    assert found[1].record is None
    assert [Path(record.path).name for record in library.list()] == ["a.mp4", "c.mp4"]


def test_a_file_that_cannot_be_looked_up_is_not_pruned(folder: Path, library: Library) -> None:
    path = folder / "a.mp4"
    library.add([path])
    before = content(library._tables)
    path.unlink()
    path.symlink_to(path)  # a loop: looking it up fails, as on a broken disk
    (added,) = library.update(prune=True)
    assert (added.change, added.record) == ("failed", library.record(path))
    assert content(library._tables) == before


def test_remove_by_id_path_and_glob(folder: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "c.mp4").rename(folder / "c[1].mp4")
    library.add(sorted(folder.iterdir()))
    first, second, third = library.list()
    with pytest.raises(LibraryError, match=r"nothing\.mp4"):
        library.remove([first.id, "nothing.mp4"])
    with pytest.raises(LibraryError, match="no video of the library matches"):
        library.remove([""])
    assert library.list() == [first, second, third]
    assert library.remove(["c[1].mp4"]) == [third]
    assert library.remove([first.id, first.path]) == [first]
    assert library.remove("*/videos/*.mp4") == [second]
    assert library.list() == []
    assert (folder / "a.mp4").exists()
    library.add(["a.mp4", "b.mp4"])
    assert [record.path for record in library.remove(["[ab].mp4"])] == [str(folder / "a.mp4"), str(folder / "b.mp4")]
    with pytest.raises(LibraryError, match="no video of the library matches"):
        library.record(first.id)


# --- search -----------------------------------------------------------------------------------------------------------


def test_finds_what_search_finds_in_a_summary(full: Library, engine: Engine, demo: Path, summary: Summary) -> None:
    where = Filter(videos=[str(demo)])
    for scene in SCENES:
        expected = engine.search(scene.caption, [summary], k=4)
        found = full.search(scene.caption, k=4, where=where)
        assert [hit.video for hit in found] == [str(demo)] * 4
        for name in ("start_seconds", "stop_seconds", "answered_by"):
            assert [getattr(hit, name) for hit in found] == [getattr(hit, name) for hit in expected]
        for hit, other in zip(found, expected, strict=True):
            # In a still scene frames score alike, and vectors in 16 bits may name another one.
            assert hit.start_seconds <= other.pts_seconds < hit.stop_seconds
            if hit.pts_seconds == other.pts_seconds:
                assert hit.region == pytest.approx(other.region, abs=2**-11)
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=2e-3)
        assert {hit.video_id for hit in found} == {full.record(demo).id}
        assert {hit.keyframe_seconds for hit in found} <= {one.pts_seconds for one in full.previews(demo)}


def test_every_kind_of_query(
    full: Library, engine: Engine, demo: Path, summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo.parent)
    ((_, picture),) = pictures_at(Source(demo), [summary.keyframes[2].pts_seconds])
    Image.fromarray(picture).save(tmp_path / "picture.png")
    at, text = summary.keyframes[2].pts_seconds, SCENES[0].caption
    example = Example("demo.mp4", at + 0.01)
    queries: list[Any] = [text, tmp_path / "picture.png", picture, engine.encode_text(text)[0] * 7, example, "a sunset"]
    alone = [full.search(query, k=3) for query in queries]
    assert full.search_many(queries, k=3) == alone
    by_text, by_file, by_picture, by_vector, by_example, _ = alone
    # A text alone is answered on the model's scale.
    (vector,) = engine.encode_text(text)
    assert without_chances(by_text) == full._search().hits([one(vector, engine.bundle.subject)], 3)[0]
    assert [dataclasses.replace(hit, score=0.0, video_score=0.0) for hit in by_vector] == [
        dataclasses.replace(hit, score=0.0, video_score=0.0) for hit in full._search().hits([one(vector)], 3)[0]
    ]
    assert by_file == by_picture
    assert by_picture[0].start_seconds <= at < by_picture[0].stop_seconds
    assert by_picture[0].video == str(demo)
    assert not any(hit.video == str(demo) and hit.start_seconds <= at < hit.stop_seconds for hit in by_example)
    assert full.search_many([]) == []

    (first, *_) = full.search_videos(text, k=2, moments=2)
    assert first.video == str(demo)
    assert first.video_id == full.record(demo).id
    own = full.search(text, k=2, where=Filter(videos=["demo.mp4"]))
    assert without_chances([*first.moments]) == without_chances(own)


def test_conditions_add_up(full: Library, engine: Engine, demo: Path) -> None:
    """A frame's score is the weighed sum of what each text and example gives it alone."""
    first, second, third = (scene.caption for scene in SCENES[:3])
    like, unlike = Example(str(demo), 1.0), Example(str(demo), 7.0)
    asked = Combined(first, also=[second, like], without=[third, unlike])
    record = full.record(demo)
    own = rows(full, record)
    expected = np.zeros(len(own))
    for query, weight in {first: 0.5, second: 0.5, third: -0.25, like: 0.25, unlike: -0.1}.items():
        plain = isinstance(query, Example)
        vector = full._search().vector(query) if isinstance(query, Example) else engine.encode_text(query)[0]
        scale = SubjectScale() if plain else engine.bundle.subject
        best = own.vectors.astype(np.float64) @ vector
        assert own.subjects is not None
        row = own.subjects.row
        best[row] = np.maximum(best[row], scale.slope * (own.subjects.vectors @ vector) + scale.offset)
        expected += weight * best
    [hit] = full.search(asked, k=1, where=Filter(videos=[record.id]))
    assert hit.score == pytest.approx(expected.max(), abs=1e-5)
    assert hit.pts_seconds == own.pts_seconds[expected.argmax()]
    assert full.search_many([first, asked], k=4) == [full.search(first, k=4), full.search(asked, k=4)]
    [video] = [video for video in full.search_videos(asked, k=9, moments=1) if video.video_id == record.id]
    assert video.moments[0].score == hit.score
    with pytest.raises(TypeError, match="must be a list"):
        Combined("a", also="b")


def test_filters(full: Library, demo: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clips[0].parent)
    every = {str(path) for path in (demo, *clips)}
    for where, expected in (
        (None, every),
        (Filter(tags=["noise"]), every - {str(demo)}),
        (Filter(videos=[clips[1].name]), {str(clips[1])}),
        (Filter(videos=[full.record(demo).id]), {str(demo)}),
        (Filter(path="*/demo.mp4"), {str(demo)}),
        (Filter(max_duration_seconds=5.0), every - {str(demo)}),
        (Filter(tags=["demo", "noise"]), set()),
    ):
        assert {hit.video for hit in full.search("a red circle", k=200, where=where)} == expected
        assert {record.path for record in full.list(where)} == expected
    with pytest.raises(LibraryError, match="no video of the library"):
        full.search("a", where=Filter(videos=["other.mp4"]))


def test_what_is_added_changed_and_removed_is_found_or_not(
    library: Library, engine: Engine, clips: list[Path], folder: Path
) -> None:
    def found() -> set[str]:
        return {Path(hit.video).name for hit in library.search("a", k=100)}

    library.add([folder / "a.mp4"])
    assert found() == {"a.mp4"}
    library.add([folder / "b.mp4"])
    assert found() == {"a.mp4", "b.mp4"}
    (folder / "b.mp4").rename(folder / "z.mp4")
    library.add([folder / "z.mp4"])
    assert found() == {"a.mp4", "z.mp4"}
    library.remove([folder / "a.mp4"])
    assert found() == {"z.mp4"}
    shutil.copy(clips[3], folder / "z.mp4")
    library.update()
    query = engine.summarize(clips[3]).embedding.vectors[0]
    assert library.search(query, k=1)[0].score == pytest.approx(1, abs=1e-3)
    with Library(library.uri) as other:  # another reader
        assert [hit.video for hit in other.search(query, k=1)] == [str(folder / "z.mp4")]


# --- models and engines -----------------------------------------------------------------------------------------------


def test_another_model_is_refused(library: Library, engine: Engine, clips: list[Path]) -> None:
    other = Engine(dataclasses.replace(engine.bundle, name="other", sha256="0" * 64), engine.backend)
    early = Library(library.uri, other)  # nothing is there yet
    library.add(clips[:1])
    before = content(library._tables)
    with pytest.raises(ModelMismatch, match=r"'builtin'.*'other'"):
        Library(library.uri, other)
    for work in (lambda: early.add(clips), early.update, lambda: early.search("a")):
        with pytest.raises(ModelMismatch):
            work()
    assert content(library._tables) == before


def scaled(engine: Engine, **about: Any) -> Engine:
    """The same engine with another scale of subjects."""
    return Engine(dataclasses.replace(engine.bundle, **about), engine.backend)


def test_subjects_are_stored_where_they_are_new(tmp_path: Path, engine: Engine, media: Callable[[str], Path]) -> None:
    clip, sampling, shares = media("natural/bikes.mp4"), Sampling(stop_seconds=6.0), []
    summary = engine.summarize(clip, sampling=sampling)
    for novelty in (-1.0, 0.8, 2.0):
        own = scaled(engine, subject=SubjectScale(1.0, 0.0, novelty))
        with Library(tmp_path / f"{novelty}", own) as library:
            library.add([clip], IndexConfig(sampling))
            (record,) = library.list()
            assert rows(library, record).subjects.row.tolist() == np.flatnonzero(novel_frames(own, summary)).tolist()
        shares.append(record.subjects / record.frames)
    assert shares[0] == 0 <= shares[1] <= shares[2] == 1


def test_the_scale_of_a_text_is_the_models(tmp_path: Path, engine: Engine, clips: list[Path]) -> None:
    with Library(tmp_path / "library", scaled(engine, subject=SubjectScale(novelty=2.0))) as library:
        library.add(clips)
        with_scale = Library(library.uri, scaled(engine, subject=SubjectScale(1.0, 5.0)))  # subjects win
        (query,) = engine.encode_text("a red circle")
        best = {one.path: float((rows(library, one).subjects.vectors @ query).max()) for one in library.list()}
        hits = with_scale.search("a red circle", k=1)
        (video,) = with_scale.search_videos("a red circle", k=1)
        assert (hits[0].video, hits[0].answered_by) == (max(best, key=best.__getitem__), "subject")
        assert hits[0].score == pytest.approx(5 + max(best.values()), abs=1e-5)
        [own] = with_scale.search("a red circle", k=1, where=Filter(videos=[video.video]))
        assert video.score == pytest.approx(own.video_score)
        picture = np.asarray(Image.open(io.BytesIO(library.previews(clips[0])[0].jpeg)))
        for asked in (picture, query, Example(str(clips[0]), 1.0)):
            assert with_scale.search(asked, k=5) == library.search(asked, k=5)
            assert all(hit.score <= 1 + 1e-6 for hit in library.search(asked, k=5))


def test_videos_with_and_without_subjects(library: Library, clips: list[Path]) -> None:
    library.add(clips[:2], IndexConfig(encode=keyreel.EncodeConfig(subject=False)))
    plain, texts = library.list(), ["a red circle", "a sunset"]
    assert [record.subjects for record in plain] == [None, None]
    assert all(rows(library, record).subjects is None for record in plain)
    before = library.search_many(texts, k=9)
    assert {(hit.answered_by, hit.region) for hits in before for hit in hits} == {("scene", None)}
    library.add(clips[2:])
    assert [record.subjects is None for record in library.list()] == [True, True, False, False]
    for hits in library.search_many(texts, k=99):
        assert {hit.video for hit in hits} == {*map(str, clips)}
        assert all((hit.region is None) == (hit.video in map(str, clips[:2])) for hit in hits)
    assert changes(library.add(clips[:2])) == dict.fromkeys((clip.name for clip in clips[:2]), "unchanged")
    library.add(clips[:2], IndexConfig(force=True))
    assert all(record.subjects is not None for record in library.list())
    with Library(library.uri + "-new", library.engine, config=library.config) as fresh:
        fresh.add(clips)
        assert content(library._tables) == content(fresh._tables)
        assert library.search_many(texts, k=9) == fresh.search_many(texts, k=9)


def test_an_earlier_model_is_gone_on_with(library: Library, engine: Engine, clips: list[Path]) -> None:
    library.add(clips[:2])
    later = scaled(engine, sha256="0" * 64, same_scene={engine.bundle.sha256: ""})
    with Library(library.uri, later) as renewed:
        for work in (lambda: renewed.add(clips), renewed.update, lambda: renewed.search("a")):
            with pytest.raises(LibraryError, match="earlier model") as caught:
                work()
            assert f"keyreel library upgrade {library.uri}" in str(caught.value.hint)
        assert renewed.upgrade() == 2
        assert renewed.upgrade() == 0
        assert {hit.region for hit in renewed.search("a")} == {None}
        assert [record.subjects for record in renewed.list()] == [None, None]
        assert {entry.change for entry in renewed.add(clips)} == {"unchanged", "added"}
        renewed.add(clips, IndexConfig(force=True))
        assert all(record.subjects is not None and record.model_sha256 == "0" * 64 for record in renewed.list())
    with pytest.raises(ModelMismatch):
        Library(library.uri, engine)


def test_a_newer_text_tower_needs_no_upgrade(library: Library, engine: Engine, clips: list[Path]) -> None:
    library.add(clips[:2])
    before = content(library._tables)
    later = scaled(engine, sha256="0" * 64, same_vectors=frozenset({engine.bundle.sha256}))
    with Library(library.uri, later) as renewed:
        assert renewed.upgrade() == 0
        assert content(renewed._tables) == before
        assert renewed.search("a dog", k=5) == library.search("a dog", k=5)
        assert {entry.change for entry in renewed.add(clips)} == {"unchanged", "added"}
    summary = engine.summarize(clips[0], keyframes=1)
    assert later.search("a dog", [summary], k=1) == engine.search("a dog", [summary], k=1)
    with pytest.raises(ModelMismatch):
        Library(library.uri, scaled(engine, sha256="0" * 64))


def test_a_matrix_takes_the_scenes_to_a_later_model(
    library: Library, engine: Engine, clips: list[Path], tmp_path: Path
) -> None:
    library.add(clips[:2])
    before = {record.id: rows(library, record).vectors.astype(np.float64) for record in library.list()}
    matrix = np.random.default_rng(3).normal(size=(engine.bundle.embedding_width,) * 2)
    np.save(tmp_path / "turn.npy", matrix.astype(np.float16))
    later = scaled(engine, sha256="0" * 64, same_scene={engine.bundle.sha256: str(tmp_path / "turn.npy")})
    with Library(library.uri, later) as renewed:
        assert renewed.upgrade() == 2
        for record in renewed.list():
            wanted = before[record.id] @ matrix.astype(np.float16).astype(np.float64).T
            wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
            np.testing.assert_allclose(rows(renewed, record).vectors, wanted, atol=2e-3)


def test_an_upgrade_without_an_engine_finds_the_model(
    library: Library, engine: Engine, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add(clips[:1])
    later = dataclasses.replace(engine.bundle, sha256="0" * 64, same_scene={engine.bundle.sha256: ""})
    monkeypatch.setattr(Bundle, "find", lambda name: {"builtin": later}[name])
    with Library(library.uri) as plain:
        assert plain.upgrade() == 1
        assert plain.stats().model_sha256 == "0" * 64


def test_without_an_engine(library: Library, clips: list[Path], folder: Path) -> None:
    library.add(clips)
    with Library(library.uri) as plain:
        assert plain.list() == library.list()
        assert plain.stats() == library.stats()
        assert plain.previews(clips[0])
        assert plain.verify() == ()
        assert len(plain.search(Example(str(clips[0]), 1.0), k=3)) == 3
        for work in (lambda: plain.search("a"), lambda: plain.add(clips), plain.update):
            with pytest.raises(ValueError, match="needs an engine"):
                work()
        assert len(plain.remove([clips[0]])) == 1
    assert len(library.list()) == 3


def test_looking_makes_nothing(tmp_path: Path, engine: Engine) -> None:
    library = Library(tmp_path / "library", engine)
    looks: list[Callable[[], Any]] = [library.list, library.stats, library.update, lambda: library.search("a")]
    looks += [library.verify, library.compact, library.upgrade, lambda: library.remove(["a"])]
    looks += [lambda: library.record("a"), lambda: library.reshard(2)]
    for look in looks:
        with pytest.raises(LibraryError, match="no library"):
            look()
    assert library.add([]) == []
    assert library.add([tmp_path / "gone.mp4"])[0].change == "failed"
    assert not (tmp_path / "library").exists()
    library.close()
    library.close()


def test_stats_and_compact(library: Library, clips: list[Path], engine: Engine) -> None:
    def size() -> int:
        return sum(path.stat().st_size for path in Path(library.uri).rglob("*") if path.is_file())

    library.add([*clips, clips[0].parent])
    stats, records = library.stats(), library.list()
    assert (stats.videos, stats.failed, stats.frames) == (4, 0, sum(record.frames for record in records))
    assert stats.hours == pytest.approx(4 * 2.0 / 3600)
    assert (stats.model, stats.model_sha256, stats.width) == (library.model, engine.bundle.sha256, 256)
    assert library.model == engine.bundle.name
    assert stats.bytes == size()
    before = content(library._tables)
    library.remove([clips[0]])
    full = size()
    assert library.compact(alone=True) == full - size() > 0
    assert content(library._tables) == {path: entry for path, entry in before.items() if path != str(clips[0])}
    assert library.verify() == ()


@pytest.mark.full
def test_compact_builds_the_index_of_a_large_library(tmp_path: Path, full: Library, engine: Engine) -> None:
    shutil.copytree(full.uri, tmp_path / "copy")
    small = LibraryConfig(exact_rows=10, fold_similarity=1.0)
    with Library(tmp_path / "copy", engine, config=small) as library:
        before = library.search_many(["a sunset", "a red circle"], k=3)
        library.compact()
        assert ["vector"] in [list(index.columns) for index in library._tables.table("vectors").list_indices()]
        after = library.search_many(["a sunset", "a red circle"], k=3)
    for hits, others, text in zip(before, after, ["a sunset", "a red circle"], strict=True):
        exact = full.search(text, k=3)
        for found in (hits, others):
            assert [(hit.video, hit.pts_seconds) for hit in found] == [(hit.video, hit.pts_seconds) for hit in exact]


def test_wrong_arguments(library: Library, clips: list[Path]) -> None:
    with pytest.raises(ValueError, match="workers"):
        library.add(clips, IndexConfig(workers=0))
    with pytest.raises(ValueError, match="tags are several texts"):
        IndexConfig(tags="holiday")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty name"):
        Library("")
    with pytest.raises(ValueError, match="path or a URL"):
        library.add([""])
    assert [entry.path for entry in library.add(str(clips[0]))] == [str(clips[0])]  # one, not its letters


# --- threads, progress, stopping --------------------------------------------------------------------------------------


@pytest.mark.full
def test_three_workers_give_what_one_gives(tmp_path: Path, engine: Engine, clips: list[Path]) -> None:
    contents = []
    for workers in (1, 3):
        library = Library(tmp_path / f"{workers}", engine)
        assert [entry.path for entry in library.add(clips, IndexConfig(workers=workers))] == [*map(str, clips)]
        contents.append(content(library._tables))
    assert contents[0] == contents[1]


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_progress_of_each_and_of_all(library: Library, clips: list[Path], workers: int) -> None:
    whole: list[tuple[str, float, float | None]] = []
    own: dict[str, list[tuple[str, float, float | None]]] = {}
    ended: list[str] = []
    busy = threading.Lock()

    def alone(work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*values: Any) -> Any:
            assert busy.acquire(blocking=False), "two callbacks at a time"
            try:
                return work(*values)
            finally:
                busy.release()

        return called

    def begin(name: str) -> Any:
        stages = own.setdefault(name, [])
        return alone(lambda *step: stages.append(step))

    library.add(
        clips,
        IndexConfig(workers=workers),
        progress=alone(lambda *step: whole.append(step)),
        begin=alone(begin),
        tell=alone(lambda entry: ended.append(entry.path)),
    )
    assert list(own) == [*map(str, clips)]
    assert sorted(ended) == sorted(own)
    assert {(stage, total) for stage, _, total in whole} == {("videos", 4.0)}
    done = [step[1] for step in whole]
    assert done == sorted(done)
    assert done[-1] == 4.0
    assert len({value for value in done if value % 1}) > 5  # in part, too
    assert list(dict.fromkeys(stage for stage, *_ in own[str(clips[0])])) == ["encode", "pictures"]
    for stage in ("encode", "pictures"):
        steps = [(value, total) for name, value, total in own[str(clips[0])] if name == stage]
        assert steps == sorted(steps)
        assert all(total is not None and value <= total for value, total in steps)


@pytest.mark.full
def test_stop_leaves_what_was_committed(library: Library, clips: list[Path]) -> None:
    """Wherever it strikes: no video is half there, none is called a failure, and a second run finishes the rest."""
    undisturbed = Library(library.uri + "-whole", library.engine)
    undisturbed.add(clips[:2])
    whole, seen, calls = content(undisturbed._tables), set(), 0
    while len(seen) < 3:
        asked = iter(range(calls))
        found = library.add(clips[:2], stop=lambda asked=asked: next(asked, None) is None)
        assert [entry.change for entry in found] == ["added"] * len(found)
        there = content(library._tables) if library.exists() else {}
        assert there == {entry.path: whole[entry.path] for entry in found}
        seen.add(len(found))
        again = library.add(clips[:2])
        assert [entry.change for entry in again] == ["unchanged"] * len(found) + ["added"] * (2 - len(found))
        assert content(library._tables) == whole
        library.remove(["*"])
        calls += 1 + calls // 2
    assert calls > 15  # asked often


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_leaves_what_was_committed(library: Library, clips: list[Path], workers: int) -> None:
    told, noticed = [], threading.Event()

    def interrupt(*_: object) -> None:
        noticed.set()
        raise KeyboardInterrupt

    def tell(entry: Added) -> None:
        told.append(entry)
        if len(told) == 1:
            signal.raise_signal(signal.SIGINT) if workers == 1 else os.kill(os.getpid(), signal.SIGINT)
            noticed.wait(60)  # on a busy machine the other worker would go on before the main thread runs

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            library.add(clips, IndexConfig(workers=workers), tell=tell)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("keyreel-index")]
    assert {record.path for record in library.list()} == {entry.path for entry in told}
    assert 1 <= len(told) < 4
    assert {entry.change for entry in told} == {"added"}
    assert library.verify() == ()
    found = library.add(clips, IndexConfig(workers=workers))
    assert sum(entry.change == "unchanged" for entry in found) == len(told)
    assert sum(entry.change == "added" for entry in found) == 4 - len(told)


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("which", ["progress", "begin", "stage", "tell", "stop"])
def test_an_error_in_a_callback_is_the_callers(library: Library, clips: list[Path], workers: int, which: str) -> None:
    calls = iter(range(4))

    def wrong(*_: Any) -> Any:
        if which == "stop" and next(calls, None) is not None:
            return False  # goes wrong in the middle of a video
        raise ZeroDivisionError("mine")

    how: dict[str, Any] = {"begin": lambda _: wrong} if which == "stage" else {which: wrong}
    with pytest.raises(ZeroDivisionError, match="mine"):
        library.add(clips, IndexConfig(workers=workers), **how)
    assert not library.exists() or {record.status for record in library.list()} == {"ok"}
    if which in ("begin", "stage", "stop"):
        assert not library.exists()


@pytest.mark.full
def test_a_library_that_cannot_be_written_ends_the_run(library: Library, clips: list[Path]) -> None:
    library.add(clips[:1])
    before = content(library._tables)
    for workers in (1, 2):
        with (
            patch.object(library._tables, "put", side_effect=LibraryError("the disk is full")),
            pytest.raises(LibraryError, match="disk is full"),
        ):
            library.add(clips, IndexConfig(workers=workers))
    assert content(library._tables) == before


@pytest.mark.full
def test_two_libraries_over_one_folder_agree(tmp_path: Path, engine: Engine, clips: list[Path]) -> None:
    first, second = Library(tmp_path / "library", engine), Library(tmp_path / "library", engine)
    clips = clips[:2]
    threads = [threading.Thread(target=one.add, args=(clips,)) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.list() == second.list()
    assert [record.path for record in first.list()] == sorted(map(str, clips))
    assert second.verify() == ()
    # What the other writer did since is not undone by what this one remembers.
    second.add(clips, IndexConfig(force=True))
    os.utime(clips[0])
    first.add(clips, IndexConfig(tags=("late",)))
    assert [len(rows(first, record)) for record in first.list()] == [record.frames for record in first.list()]


@pytest.mark.full
def test_a_copy_whose_original_goes_away_is_indexed(library: Library, folder: Path, engine: Engine) -> None:
    """Another process takes the original out just when its rows are read."""
    first, copy = folder / "a.mp4", folder / "copy.mp4"
    library.add([first])
    shutil.copy(first, copy)
    previews = library._tables.previews

    def late(generation: str) -> Any:
        with Library(library.uri, engine) as other:
            other.remove([first])
            other.compact(alone=True)
        return previews(generation)

    with patch.object(library._tables, "previews", late):
        assert changes(library.add([copy])) == {"copy.mp4": "added"}
    with Library(folder / "alone", engine, config=library.config) as alone:
        alone.add([copy])
        assert content(library._tables) == content(alone._tables)


@pytest.mark.parametrize("count", [20, pytest.param(220, marks=pytest.mark.full)])
def test_no_flipped_bit_goes_unnoticed(
    engine: Engine, clips: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    """Whatever differs afterwards is an error of the tree, or is left out and said."""
    with Library(tmp_path / "whole", engine) as whole:
        whole.add(clips[:3])
        names = [record.id for record in whole.list()]
    draw = random.Random(count)

    def pictures(library: Library, name: str) -> list[tuple[bytes, bytes]]:
        return [(one.jpeg, one.attention.tobytes()) for one in library.previews(name)]

    def seen(library: Library) -> tuple[dict[str, Any], bool]:
        looks: dict[str, Callable[[], Any]] = {
            "hits": lambda: library.search("a", k=50),
            "records": library.list,
            **{f"previews of {n}": lambda n=n: pictures(library, n) for n in names},
            **{f"extras of {n}": lambda n=n: library.extras(n) for n in names},
        }
        found, said = {}, False
        for name, look in looks.items():
            try:
                found[name] = look()
            except KeyreelError:
                said = True
        return found, said or bool(library.left_out())

    with Library(tmp_path / "whole", engine) as whole:
        expected, said = seen(whole)
    assert not said
    files = sorted(path for path in (tmp_path / "whole").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    changed = 0
    for number in range(count):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "whole", copy)
        path = copy / draw.choices(files, sizes)[0].relative_to(tmp_path / "whole")
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        caplog.clear()
        with suppress(KeyreelError), Library(copy, engine) as damaged:
            found, said = seen(damaged)
            if found != expected:
                changed += 1
                assert said or caplog.records, path
                assert damaged.verify()
        shutil.rmtree(copy)
    assert changed > count / 8 or count < 100  # few may all miss


def without_chances(hits: list[LibraryHit]) -> list[LibraryHit]:
    return [dataclasses.replace(hit, chance=None) for hit in hits]


def test_a_damaged_video_is_left_out_and_said(library: Library, engine: Engine, clips: list[Path]) -> None:
    library.add(clips[:3])
    lost = library.list()[1]
    everything = library.search("a", k=50)
    library._tables.table("vectors").update(
        where=f"generation = '{lost.generation}' AND row = 0 AND kind = 'scene'", values={"pts_seconds": 0.125}
    )
    with Library(library.uri, engine) as opened:
        # With fewer pictures all chances are a little higher.
        others = without_chances([hit for hit in everything if hit.video != lost.path])
        assert without_chances(opened.search("a", k=50)) == others
        assert opened.left_out() == [lost.path]
        assert [one.videos for one in opened.verify(repair=True) if one.kind == "incomplete"] == [(lost.path,)]
        assert without_chances(opened.search("a", k=50)) == others
        assert opened.left_out() == []
        assert [added.change for added in opened.add(clips[:3])].count("unchanged") == 2
        assert opened.search("a", k=50) == everything


def test_a_copy_of_a_damaged_video_is_decoded(library: Library, folder: Path) -> None:
    library.add([folder / "a.mp4"])
    (original,) = library.list()
    before = rows(library, original)
    row = np.flatnonzero(~before.keyframe)[-1]  # pictures of key-frames have checksums that are read
    library._tables.table("vectors").update(
        where=f"generation = '{original.generation}' AND row = {row} AND kind = 'scene'", values={"pts_seconds": 0.125}
    )
    copy = shutil.copy(folder / "a.mp4", folder / "z.mp4")
    with Library(library.uri, library.engine) as opened:
        assert changes(opened.add([copy])) == {"z.mp4": "added"}
        np.testing.assert_array_equal(rows(opened, opened.record(copy)).pts_seconds, before.pts_seconds)


def test_a_library_without_digests_and_scenes_gets_them(library: Library, engine: Engine, clips: list[Path]) -> None:
    library.add(clips[:2])
    for record in library.list():
        library._tables.renew(dataclasses.replace(record, scenes=()))
    library._tables.table("records").drop_columns(["digest", "scenes"])
    with Library(library.uri, engine) as older:
        assert older.verify() == ()
        assert [record.digest for record in older.list()] == [None, None]
        assert len({hit.video for hit in older.search("a", k=50)}) == 2
        older.add(clips[:3])
        assert sorted(record.digest is None for record in older.list()) == [False, True, True]
        assert sorted(bool(record.scenes) for record in older.list()) == [False, False, True]
        assert older.verify() == ()


def test_a_wrong_digest_is_found_and_mended(library: Library, engine: Engine, clips: list[Path]) -> None:
    library.add(clips[:2])
    right = {record.id: record.digest for record in library.list()}
    library._tables.table("records").update(where=f"id = '{min(right)}'", values={"digest": 7})
    with Library(library.uri, engine) as damaged:
        assert len({hit.video for hit in damaged.search("a", k=50)}) == 1
        (finding,) = damaged.verify(repair=True)
        assert (finding.kind, len(finding.videos)) == ("unreadable", 1)
        assert {record.id: record.digest for record in damaged.list()} == right
        assert len({hit.video for hit in damaged.search("a", k=50)}) == 2
