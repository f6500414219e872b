"""The scripts of engine/examples do what they say."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyreel import Engine, Library
from keyreel.decode.source import Source

pytestmark = pytest.mark.full
EXAMPLES = Path(__file__).resolve().parents[1] / "engine" / "examples"


def script(name: str, *words: object) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONWARNINGS": "error" if name != "ray_pipeline" else "default"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("Hint: ")]


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def videos(media: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two clips, and of a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("bikes", "flower"):
        shutil.copy(media(f"natural/{name}.mp4"), folder)
    (folder / "broken.mp4").write_text("no video at all")
    return folder


def test_the_scripts_run(videos: Path, tmp_path: Path) -> None:
    clips = [videos / "bikes.mp4", videos / "flower.mp4"]
    if importlib.util.find_spec("faiss"):
        lines = script("faiss_search", "a flower", *clips)
        assert len(lines) == 5
        assert lines[0].endswith("flower.mp4")

    lines = script("batch_threads", videos, tmp_path / "batch")
    assert [line.partition(":")[0] for line in lines] == ["bikes.mp4", "broken.mp4", "flower.mp4"]
    assert "failed" in lines[1]
    assert (tmp_path / "batch" / "bikes" / "summary.json").is_file()

    lines = script("vertical_reels", videos, tmp_path / "reels")
    assert len(lines) == 3
    with Source(tmp_path / "reels" / "bikes.mp4") as reel:
        height, width = reel.probe().display_size
    assert width / height == pytest.approx(9 / 16, abs=0.01)

    assert script("scene_lists", "export", clips[0], tmp_path / "scenes") == []
    scenes = tmp_path / "scenes" / "scenes.csv"
    count = len(scenes.read_text().splitlines()) - 1
    lines = script("scene_lists", "import", clips[0], scenes, "a bicycle", "a fried egg")
    assert len(lines) == count
    assert all(line.endswith("a bicycle") for line in lines)
    scenes.write_text("Timecode List:,00:00:01.200\n" + scenes.read_text())
    assert script("scene_lists", "import", clips[0], scenes, "a bicycle", "a fried egg") == lines


def test_the_search_box_answers(videos: Path, tmp_path: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient", reason="needs the extra `serve`")
    with Engine.from_pretrained(device="cpu") as engine, Library(tmp_path / "library", engine) as library:
        library.add([videos / "bikes.mp4", videos / "flower.mp4"])
        with testclient.TestClient(module("search_box").make_app(library), base_url="http://localhost") as client:
            page = client.get("/", params={"q": "a flower"})
            assert page.status_code == 200
            first = page.text.partition("<li>")[2]
            assert "flower.mp4" in first.partition("</li>")[0]
            picture = client.get(first.partition('src="')[2].partition('"')[0])
            assert picture.headers["content-type"] == "image/jpeg"
            assert client.get("/", params={"q": "<script>"}).text.count("<script>") == 0
            assert client.get("/video/api/v1/videos").json()["total"] == 2


def test_the_ray_pipeline_writes_key_frames(videos: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `data`")
    script("ray_pipeline", videos, tmp_path / "out")
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    with Engine.from_pretrained(device="cpu") as engine:
        for name in ("bikes.mp4", "flower.mp4"):
            found = sorted(row["seconds"] for row in rows if row["video"].endswith(name))
            assert found == [frame.pts_seconds for frame in engine.summarize(videos / name).keyframes]
