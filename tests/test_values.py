"""Summaries and hits as values: in notebooks, as tables, pickled, saved and loaded; and what refuses bad arguments."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_render_storyboard import Page

from keyreel import Engine, Sampling, Summary
from keyreel.config import DecodeLimits, OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import Cancelled, MissingExtra, RenderError, SourceError
from keyreel.render.pictures import pictures_at
from keyreel.types import Hits, SearchHit

NAME = "<b onload=x>&.mp4"  # what a page must not take for markup
BARE = {"reel": False, "storyboard": False, "thumbnails": False}


@pytest.fixture(scope="module")
def clip(media: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("clip") / NAME
    shutil.copy(media("natural/test.mp4"), copy)
    return copy


@pytest.fixture(scope="module")
def summary(engine: Engine, clip: Path) -> Summary:
    return engine.summarize(clip, keyframes=3, fps=4.0)


@pytest.fixture(scope="module")
def hits(summary: Summary) -> Hits[SearchHit]:
    return summary.search("a street", k=2)


def test_notebooks_show_pictures_and_escape_names(summary: Summary, hits: Hits[SearchHit]) -> None:
    shown = [(summary, 3), (hits, len(hits)), (Hits(hits), 0), (summary.embedding, 0)]
    for value, pictures in shown:
        page = Page(value._repr_html_())
        assert len(page.all("img")) == pictures
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        assert value is summary.embedding or NAME in "".join(page.text)
    marks = Page(summary._repr_html_()).all("rect")
    assert len(marks) == len(summary.scenes) + len(summary.keyframes)


def test_a_notebook_shows_a_summary_whose_video_is_gone(engine: Engine, clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "gone.mp4"
    shutil.copy(clip, copy)
    summary = engine.summarize(copy, keyframes=2)
    copy.unlink()
    page = Page(summary._repr_html_())
    assert page.all("img") == []
    assert "gone.mp4" in page.text


def test_tables_hold_the_values(summary: Summary, hits: Hits[SearchHit]) -> None:
    pytest.importorskip("pandas", reason="needs the extra `data`")
    frames = summary.to_pandas()
    assert frames["pts_seconds"].tolist() == [frame.pts_seconds for frame in summary.keyframes]
    assert set(frames["video"]) == {summary.video.path}
    for row in frames.itertuples():
        shot = summary.shots[row.shot]
        assert shot.start_seconds <= row.pts_seconds < shot.stop_seconds
    embedding = summary.embedding.to_arrow()
    assert embedding.schema.field("vector").type.list_size == summary.embedding.vectors.shape[1]
    vectors = embedding["vector"].combine_chunks().flatten().to_numpy().reshape(summary.embedding.vectors.shape)
    np.testing.assert_array_equal(vectors, summary.embedding.vectors)
    np.testing.assert_array_equal(np.stack(summary.embedding.to_pandas()["subject"]), summary.embedding.subject)
    found = hits.to_arrow().to_pylist()
    assert [(row["start_seconds"], row["score"]) for row in found] == [(hit.start_seconds, hit.score) for hit in hits]
    assert [tuple(row["region"]) for row in found] == [hit.region for hit in hits]
    assert len(Hits[SearchHit]().to_arrow()) == 0


def test_a_missing_package_names_its_extra(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pandas", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(MissingExtra, match=r"\[data\]"):
                summary.to_pandas()


def test_images_are_the_key_frames(summary: Summary, clip: Path) -> None:
    times = [frame.pts_seconds for frame in summary.keyframes]
    with Source(clip) as source:
        wanted = [picture for _, picture in pictures_at(source, times)]
    for found, right in zip(summary.images(), wanted, strict=True):
        np.testing.assert_array_equal(found, right)
    assert {picture.shape[0] for picture in summary.images(max_height=90)} == {90}
    with pytest.raises(ValueError, match="max_height"):
        summary.images(max_height=0)


def _same(copy: Summary, summary: Summary) -> None:
    for name in ("video", "keyframes", "shots", "scenes", "device", "device_reason", "warnings"):
        assert getattr(copy, name) == getattr(summary, name), name
    np.testing.assert_array_equal(copy.importance, summary.importance)
    for name in copy.embedding.__slots__:
        np.testing.assert_array_equal(getattr(copy.embedding, name), getattr(summary.embedding, name))


@pytest.mark.parametrize("way", ["pickle", "folder"])
def test_copies_save_render_and_are_searched(
    engine: Engine, summary: Summary, hits: Hits[SearchHit], tmp_path: Path, way: str
) -> None:
    if way == "pickle":
        copy = pickle.loads(pickle.dumps(summary))
    else:
        copy = Summary.load(summary.save(tmp_path / "saved", embeddings=True, **BARE))
    _same(copy, summary)
    assert engine.search("a street", [copy], k=2) == hits
    with pytest.raises(ValueError, match=r"engine\.search"):
        copy.search("a street")
    with pytest.raises(ValueError, match="no engine"):
        copy.save(tmp_path / "ranked", query="a street")
    copy.save(tmp_path / "again", embeddings=True, **BARE)
    _same(Summary.load(tmp_path / "again"), summary)
    assert copy.render_reel(tmp_path / "reel.mp4", seconds=1.0) == summary.render_reel(tmp_path / "b.mp4", seconds=1.0)
    assert pickle.loads(pickle.dumps(hits)) == hits


def test_a_copy_of_a_video_in_memory_cannot_read_it(engine: Engine, clip: Path, tmp_path: Path) -> None:
    summary = engine.summarize(clip.read_bytes(), keyframes=1)
    copy = pickle.loads(pickle.dumps(summary))
    _same(copy, summary)
    with pytest.raises(RenderError, match="summarize it again"):
        copy.save(tmp_path / "out")
    with pytest.raises(RenderError, match="summarize it again"):
        Summary.load(summary.save(tmp_path / "out", embeddings=True, **BARE)).images()


def test_what_cannot_be_loaded_is_refused(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"no summary\.json"):
        Summary.load(tmp_path)
    folder = summary.save(tmp_path / "plain", **BARE)
    with pytest.raises(RenderError, match=r"(?s)no embeddings\.npz.*embeddings=True"):
        Summary.load(folder)
    (folder / "embeddings.npz").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(RenderError, match="is not a summary"):
        Summary.load(folder)
    np.savez(folder / "embeddings.npz", video=np.array([{}], object))  # a pickle, which would run code
    with pytest.raises(RenderError, match="is not a summary"):
        Summary.load(folder)


def test_bad_arguments_are_named(engine: Engine, summary: Summary, clip: Path, tmp_path: Path) -> None:
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, r"sampling must be .*got 1\.0.*fps=1\.0", lambda: engine.summarize(clip, sampling=1.0)),
        (TypeError, "limits must be", lambda: engine.summarize(clip, limits=5)),
        (TypeError, "its own limits", lambda: engine.summarize(Source(clip), limits=DecodeLimits())),
        (ValueError, "not both", lambda: engine.summarize(clip, fps=1.0, sampling=Sampling())),
        (TypeError, "did you mean 'reel_seconds'", lambda: summary.save(tmp_path / "x", reel_secs=3)),
        (TypeError, "there are: reel, ", lambda: summary.save(tmp_path / "x", zzz=3)),
        (TypeError, "must be an OutputConfig", lambda: summary.save(tmp_path / "x", {"reel": False})),
        (ValueError, "unknown markers 'avid', allowed: otio", lambda: OutputConfig(markers="avid")),
        (RenderError, r"a reel is \.mp4 or \.mkv, not \.gif", lambda: summary.render_reel(tmp_path / "r.gif")),
        (
            RenderError,
            "an encoded reel is an MP4",
            lambda: summary.render_reel(tmp_path / "r.mkv", seconds=1.0, mode="encode"),
        ),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


def test_limits_and_fps_are_those_given(engine: Engine, summary: Summary, clip: Path) -> None:
    assert summary.config["sampling"]["fps"] == 4.0
    np.testing.assert_allclose(np.diff(summary.embedding.pts_seconds), 0.25, atol=1 / 30 + 1e-9)
    with pytest.raises(SourceError, match="max_duration_seconds"):
        engine.summarize(clip, limits=DecodeLimits(max_duration_seconds=1.0))


def test_cancelling_ends_the_work(engine: Engine, clip: Path) -> None:
    asked: list[int] = []

    def cancel() -> bool:
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Cancelled, match="cancelled"):
        engine.summarize(clip, sampling=Sampling("all"), cancel=cancel)
    assert len(asked) == 4
    with pytest.raises(Cancelled):
        engine.summarize(clip, cancel=lambda: True)
    assert engine.summarize(clip, keyframes=1, cancel=lambda: False).keyframes
