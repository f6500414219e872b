"""What other programs read: PySceneDetect's scene list, markers for editors, chapters, Parquet of a library."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from commands import document, run

from keyreel import Engine, Library, Summary
from keyreel.cli.documents import Export
from keyreel.config import IndexConfig, OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import Damaged, RenderError
from keyreel.render.chapters import write_chapters
from keyreel.render.interchange import write_markers
from keyreel.types import Shot

BARE = ("--no-reel", "--no-storyboard", "--no-thumbnails", "-q")


@pytest.fixture(scope="module")
def clip(media: Callable[[str], Path]) -> Path:
    return media("natural/bikes.mp4")


@pytest.fixture(scope="module")
def summary(engine: Engine, clip: Path) -> Summary:
    return engine.summarize(clip)


@pytest.fixture(scope="module")
def saved(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = OutputConfig(reel=False, storyboard=False, thumbnails=False, scenes_csv=True, chapters=True)
    return summary.save(tmp_path_factory.mktemp("out") / "bikes", output)


@pytest.mark.full
def test_the_command_writes_all_of_them(clip: Path, tmp_path: Path) -> None:
    run("summarize", clip, "-o", tmp_path, *BARE, "--scenes-csv", "--chapters", "--embeddings", "--markers", "edl")
    made = {path.name for path in (tmp_path / clip.stem).iterdir()}
    assert {"scenes.csv", "chapters.mp4", "chapters.ffmetadata", "embeddings.npz", "markers.edl"} <= made
    run("summarize", clip, "-o", tmp_path, *BARE)  # our own files are replaced
    assert "scenes.csv" not in {path.name for path in (tmp_path / clip.stem).iterdir()}


def test_the_scene_list_counts_frames(saved: Path, summary: Summary) -> None:
    with (saved / "scenes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    starts = [float(row["Start Time (seconds)"]) for row in rows]
    assert starts == [round(shot.start_seconds, 3) for shot in summary.shots]
    # 25 frames a second, the first one at 0: frame n is shown at (n - 1) / 25.
    assert [int(row["Start Frame"]) for row in rows] == [round(25 * start) + 1 for start in starts]
    assert [int(row["End Frame"]) for row in rows[:-1]] == [int(row["Start Frame"]) - 1 for row in rows[1:]]
    assert int(rows[-1]["End Frame"]) == 250
    assert sum(int(row["Length (frames)"]) for row in rows) == 250
    assert rows[1]["Start Timecode"] == "00:00:01.200"


@pytest.mark.full
def test_pyscenedetect_reads_the_scene_list(saved: Path, clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("scenedetect", reason="scenedetect is not installed: a test of the full ring")
    command = [sys.executable, "-m", "scenedetect", "-i", str(clip), "-o", str(tmp_path)]
    command += ["load-scenes", "-i", str(saved / "scenes.csv"), "list-scenes", "-f", "theirs.csv", "-s"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "theirs.csv").read_text() == (saved / "scenes.csv").read_text()


def seconds_of(marks: list[ElementTree.Element]) -> list[float]:
    return [float(Fraction(mark.get("start", "").rstrip("s"))) for mark in marks]


@pytest.mark.parametrize("kind", ["otio", "edl", "fcpxml"])
def test_markers_are_read_back(summary: Summary, tmp_path: Path, kind: str) -> None:
    otio = pytest.importorskip("opentimelineio", reason="needs the extra `otio`")
    output = OutputConfig(reel=False, storyboard=False, thumbnails=False, markers=kind)
    path = summary.save(tmp_path / "out", output) / f"markers.{kind}"
    wanted = [frame.pts_seconds for frame in summary.keyframes]
    if kind == "fcpxml":
        marks = ElementTree.parse(path).findall(".//clip/marker")
        found = seconds_of(marks)
        assert [mark.get("value") for mark in marks] == [f"key-frame {n}" for n in range(1, len(wanted) + 1)]
        assert not [mark for mark in marks if mark.get("completed")]  # else they would be to-do items
    else:
        adapter = {"otio": "otio_json", "edl": "cmx_3600"}[kind]
        timeline = otio.adapters.read_from_file(str(path), adapter, **({"rate": 25} if kind == "edl" else {}))
        clip = timeline.video_tracks()[0][0]
        found = [otio.opentime.to_seconds(mark.marked_range.start_time) for mark in clip.markers]
        names = [mark.name.lower() for mark in clip.markers]
        assert names == [f"key-frame {n}" for n in range(1, len(wanted) + 1)]
        if kind == "otio":
            assert clip.media_reference.target_url == Path(summary.video.path).as_uri()
    np.testing.assert_allclose(found, wanted, atol=0.021)  # half a frame


@pytest.mark.parametrize("fps", [12.5, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 60.0, 240.0, None])
def test_markers_of_every_rate(summary: Summary, tmp_path: Path, fps: float | None) -> None:
    pytest.importorskip("otio_fcpx_xml_adapter", reason="needs the extra `otio`")
    video = dataclasses.replace(summary.video, average_fps=fps)
    path = tmp_path / "markers.fcpxml"
    write_markers(dataclasses.replace(summary, video=video), "file:///a.mp4", path)
    found = seconds_of(ElementTree.parse(path).findall(".//clip/marker"))
    np.testing.assert_allclose(found, [frame.pts_seconds for frame in summary.keyframes], atol=0.5 / 23.9)


def _packets(path: Path) -> dict[str, list[tuple[float, bytes]]]:
    found: dict[str, list[tuple[float, bytes]]] = {}
    with av.open(str(path)) as container:
        first = min(float((stream.start_time or 0) * stream.time_base) for stream in container.streams.video)
        for packet in container.demux():
            if packet.size and packet.pts is not None and packet.time_base is not None:
                seconds = round(float(packet.pts * packet.time_base) - first, 2)
                found.setdefault(packet.stream.type, []).append((seconds, bytes(packet)))
    return found


def test_chapters_are_the_scenes_and_nothing_is_encoded_anew(saved: Path, summary: Summary, clip: Path) -> None:
    with av.open(str(saved / "chapters.mp4")) as container:
        found = [(c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]) for c in container.chapters()]
    assert [title for _, _, title in found] == [{"title": f"Scene {n}"} for n in range(1, len(summary.scenes) + 1)]
    wanted = [(scene.start_seconds, scene.stop_seconds) for scene in summary.scenes]
    np.testing.assert_allclose([(float(a), float(b)) for a, b, _ in found], wanted, atol=2e-3)
    assert _packets(saved / "chapters.mp4") == _packets(clip)
    text = (saved / "chapters.ffmetadata").read_text().splitlines()
    assert text[0] == ";FFMETADATA1"
    assert text.count("[CHAPTER]") == len(wanted)
    assert [int(line[6:]) for line in text if line.startswith("START=")] == [round(1000 * a) for a, _ in wanted]


@pytest.mark.parametrize("name", ["format/bbb_642x642_768kbps_30fps_vp9.webm", "format/nasa_13013_rotated.mp4"])
def test_copies_keep_sound_shape_and_rotation(media: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    with Source(media(name)) as source:
        path = write_chapters(source, [Shot(0.0, 1.0), Shot(1.0, 2.0)], tmp_path)
        assert path.suffix == (".mkv" if name.endswith("webm") else ".mp4")
        with Source(path) as copy:
            made, own = copy.probe(), source.probe()
        for field in ("display_size", "rotation_degrees", "has_audio"):
            assert getattr(made, field) == getattr(own, field)
    ours, theirs = ({k: [data for _, data in own] for k, own in _packets(p).items()} for p in (path, media(name)))
    assert {kind: ours.get(kind) for kind in ("video", "audio")} == {k: theirs.get(k) for k in ("video", "audio")}


@pytest.mark.full
def test_parquet_holds_the_library(engine: Engine, clip: Path, media: Callable[[str], Path], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `library`")
    uri = tmp_path / "library"
    with Library(uri, engine) as library:
        library.add([clip, media("natural/test.mp4")], IndexConfig(tags=("a", "b")))
        records = {record.id: record for record in library.list()}
        rows = dict(library._tables.rows([record.generation for record in records.values()]))
    told = document(Export, "library", "export", uri, "--parquet", tmp_path / "out")
    table = parquet.read_table(told["file"])
    assert told["vectors"] == len(table) == sum(record.rows for record in records.values())
    assert table.schema.metadata[b"keyreel.model"].decode() == engine.bundle.name
    assert len(set(table["id"].to_pylist())) == len(table)
    assert set(map(tuple, table["tags"].to_pylist())) == {("a", "b")}
    for record in records.values():
        own, stored = rows[record.generation], table.filter(np.array(table["video_id"]) == record.id)
        assert set(stored["path"].to_pylist()) == {record.path}
        for kind, vectors in (
            ("scene", own.vectors),
            ("subject", None if own.subjects is None else own.subjects.vectors),
        ):
            part = stored.filter(np.array(stored["kind"]) == kind)
            if vectors is None or not len(vectors):
                assert not len(part)
                continue
            np.testing.assert_array_equal(np.stack(part.column("vector").to_pandas()), vectors)
            frames = np.arange(len(own)) if kind == "scene" or own.subjects is None else own.subjects.row
            np.testing.assert_array_equal(part["pts_seconds"].to_numpy(), own.pts_seconds[frames])
            np.testing.assert_array_equal(part["keyframe"].to_numpy(zero_copy_only=False), own.keyframe[frames])
    run("library", "export", uri, "--parquet", tmp_path / "out", code=RenderError.exit_code)
    with Library(uri) as library:
        assert library.export_parquet(tmp_path / "out", overwrite=True) == len(table)
        library._tables.table("vectors").update(where="row = 0", values={"pts_seconds": 0.125})
        before = Path(told["file"]).read_bytes()
        with pytest.raises(Damaged, match="nothing is exported"):
            library.export_parquet(tmp_path / "out", overwrite=True)
    assert Path(told["file"]).read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vectors.parquet"]
