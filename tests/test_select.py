"""Key-frames on planted scenes, and on videos that have nothing to choose from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import SCENE_LENGTHS, embedding_of, planted, unit

from keyreel import Engine
from keyreel.config import EncodeConfig, Sampling, SelectConfig
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.encode import Encoder
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
from keyreel.select import Selection, frame_quality, knee, select_keyframes
from keyreel.types import Embedding, FrameBatch, KeyFrame, Shot
from keyreel_kernels import ops_for

OPS = ops_for("cpu")


def select(embedding: Embedding, duration_seconds: float, shots: Sequence[Shot] = (), **options: Any) -> Selection:
    return select_keyframes(embedding, SelectConfig(**options), OPS, duration_seconds=duration_seconds, shots=shots)


def choose(embedding: Embedding, **options: Any) -> tuple[KeyFrame, ...]:
    return select(embedding, len(embedding) / 2, **options).keyframes


def test_finds_planted_scenes() -> None:
    given, automatic = [], []
    for draw in range(8):
        x, scene = planted(draw)
        rows = [frame.sample for frame in choose(embedding_of(x), keyframes=8)]
        own = [frame.sample for frame in choose(embedding_of(x))]
        assert (scene[[*rows, *own]] >= 0).all(), f"draw {draw}: a flash frame was chosen"
        assert len(rows) == 8
        assert 7 <= len(own) <= 10
        given.append(len(set(scene[rows])))
        automatic.append(len(set(scene[own])))
    assert np.mean(given) >= 7.9
    assert np.mean(automatic) >= 7.5


def test_another_subject_in_the_same_place_is_another_key_frame() -> None:
    draw = np.random.default_rng(3)
    place, first, second = np.eye(3, 64)
    x = unit(place + 0.02 * draw.normal(size=(40, 64)))
    subject = unit(np.repeat([first, second], 20, axis=0) + 0.05 * draw.normal(size=(40, 64)))
    alone = embedding_of(x)
    assert [frame.sample >= 20 for frame in choose(replace(alone, subject=subject))] == [False, True]
    assert len(choose(alone)) == 1


def test_objects_that_move_over_one_picture_are_told_apart(media: Callable[[str], Path]) -> None:
    """A disc in the first half, a checked square in the second, over one frame of a clip."""
    encoder = Encoder(Bundle.find("builtin"), resolve("cpu", threads=1))
    image = encoder.bundle.image
    video = media("natural/stream-of-water.mp4")
    with FrameStream(Source(video), Sampling(mode="times", times=(1.0,)), transform=image) as stream:
        (place,) = next(iter(stream)).data
    y, x = np.mgrid[: image.height, : image.width]
    checks = np.where(((y // 3 + x // 3) % 2)[..., None], (250, 240, 60), (20, 30, 200))
    frames = np.repeat(place[None], 20, axis=0)
    for t, frame in enumerate(frames):
        dy, dx = y - (30 + 5 * (t % 10)), x - (10 + 8 * (t % 10))
        if t < 10:
            frame[dy**2 + dx**2 < 64] = (230, 40, 30)
        else:
            square = np.maximum(abs(dy), abs(dx)) < 8
            frame[square] = checks[square]
    apart = {}
    for subject in (True, False):
        batch = FrameBatch(frames, np.arange(20) / 2, np.arange(20))
        embedding = encoder.encode([batch], EncodeConfig(subject=subject)).embedding
        assert [frame.sample >= 10 for frame in choose(embedding, keyframes=2)] == [False, True]
        cosine = embedding.joint @ embedding.joint.T
        within = (cosine[:10, :10].mean() + cosine[10:, 10:].mean()) / 2
        apart[subject] = within - cosine[:10, 10:].mean()
    assert apart[True] > apart[False]
    encoder.close()


def test_key_frames_are_in_time_order_and_their_shares_sum_to_one() -> None:
    x, _ = planted(7)
    embedding = embedding_of(x)
    frames = choose(embedding)
    assert [f.cluster for f in frames] == list(range(len(frames)))
    assert all(a.pts_seconds < b.pts_seconds for a, b in itertools.pairwise(frames))
    assert sum(f.weight for f in frames) == pytest.approx(1, abs=1e-6)
    assert all(f.pts_seconds == embedding.pts_seconds[f.sample] for f in frames)
    assert all(f.frame_index == embedding.frame_index[f.sample] for f in frames)
    assert frames == choose(embedding_of(x.copy()))
    # The longest scene has 200 of 365 frames.
    assert max(f.weight for f in frames) == pytest.approx(max(SCENE_LENGTHS) / 365, abs=0.02)


@pytest.mark.parametrize("options", [{}, {"keyframes": 1}, {"keyframes": 5}, {"per_minute": 30.0}])
@pytest.mark.parametrize("count", [1, 60])
def test_a_constant_video_gives_exactly_one(count: int, options: dict[str, object]) -> None:
    x = np.tile(planted(0)[0][:1], (count, 1))
    assert len(choose(embedding_of(x), **options)) == 1


def test_a_video_of_a_second_gives_exactly_one_unless_more_are_asked_for() -> None:
    x, scene = planted(0)
    two = embedding_of(x[[int(np.flatnonzero(scene == n)[3]) for n in (0, 4)]])
    for seconds in (0.04, 1.0, 1.9):
        assert len(select(two, seconds).keyframes) == 1
    assert len(select(two, 1.0, keyframes=2).keyframes) == 2


def test_an_all_black_video_gives_exactly_one_with_a_warning() -> None:
    x, _ = planted(1)
    selection = select(embedding_of(x[:40], luma=np.zeros(40, np.float32)), 20)
    assert len(selection.keyframes) == 1
    assert any("dark, bright or blank" in warning for warning in selection.warnings)


def test_black_stretches_are_no_key_frames() -> None:
    x, scene = planted(2)
    luma = np.where(scene == 3, 0.01, 0.5).astype(np.float32)
    rows = [f.sample for f in choose(embedding_of(x, luma=luma), keyframes=7)]
    assert set(scene[rows]) == set(range(8)) - {3}


def test_frames_in_a_fade_are_no_key_frames() -> None:
    x, scene = planted(2)
    luma = np.full(len(x), 0.5, np.float32)
    cut = int(np.flatnonzero(np.diff(scene))[0]) + 1
    ramp = np.array([0.05, 0.15, 0.3, 0.42], np.float32)
    luma[:4], luma[-4:] = ramp, ramp[::-1]
    luma[cut - 4 : cut], luma[cut : cut + 4] = ramp[::-1], ramp
    similarity, _ = OPS.neighbour_similarity(x, np.array([0, len(x)]))
    level, _ = frame_quality(embedding_of(x, luma=luma), similarity, 0.2)
    faded = np.flatnonzero(luma < 0.5)
    assert (level[faded] >= 2).all()
    assert (np.delete(level, faded) != 2).all()
    frames = choose(embedding_of(x, luma=luma), keyframes=8)
    assert not set(faded) & {f.sample for f in frames}
    assert len({scene[f.sample] for f in frames}) == 8


def test_blurred_frames_give_way_to_sharp_ones_of_the_same_scene() -> None:
    x, scene = planted(4)
    rng = np.random.default_rng(0)
    blurred = rng.random(len(x)) < 0.15
    embedding = embedding_of(x, sharpness=np.where(blurred, 0.01, 1.0).astype(np.float32))
    frames = choose(embedding, keyframes=8)
    assert not blurred[[f.sample for f in frames]].any()
    assert len({scene[f.sample] for f in frames}) == 8


def test_a_scene_that_is_blurred_throughout_is_kept_with_a_warning() -> None:
    x, scene = planted(5)
    embedding = embedding_of(x, sharpness=np.where(scene == 2, 0.01, 1.0).astype(np.float32))
    selection = select(embedding, 180, keyframes=8)
    assert len({scene[f.sample] for f in selection.keyframes}) == 8
    assert any("less sharp" in warning for warning in selection.warnings)


def test_per_minute_counts_by_duration() -> None:
    x, _ = planted(6)
    assert len(choose(embedding_of(x), per_minute=8 / (365 / 2 / 60))) == 8


def test_asking_for_more_than_there_is_gives_a_warning() -> None:
    x = np.repeat(planted(0)[0][[0, 210, 260]], 20, axis=0)
    selection = select(embedding_of(x), 30, keyframes=9)
    assert 1 <= len(selection.keyframes) <= 3
    assert any("9 key-frames were asked for" in warning for warning in selection.warnings)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 50),
    gap=st.floats(0, 5),
    limit=st.floats(0.3, 1),
    number=st.one_of(st.none(), st.integers(1, 60)),
)
def test_guards_hold(seed: int, count: int, gap: float, limit: float, number: int | None) -> None:
    x, _ = planted(seed % 50)
    rows = np.sort(np.random.default_rng(seed).choice(len(x), count, replace=False))
    embedding = embedding_of(x[rows])
    frames = choose(embedding, keyframes=number, min_gap_seconds=gap, similarity_limit=limit)
    assert 1 <= len(frames) <= (number or count)
    times = [f.pts_seconds for f in frames]
    assert all(b - a >= gap for a, b in itertools.pairwise(times))
    chosen = embedding.vectors[[f.sample for f in frames]]
    alike = np.triu(chosen @ chosen.T, 1)
    assert alike.max(initial=0) <= limit + 1e-6


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="no frames"):
        choose(embedding_of(np.empty((0, 8), np.float32)))


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([0.01, 0.01, 0.01], 1),
        ([0.4, 0.4, 0.4, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05], 4),
        ([0.4, 0.39, 0.39, 0.38, 0.38, 0.37], 6),
        ([0.6, 0.3, 0.29, 0.25, 0.14, 0.1, 0.1, 0.1, 0.1, 0.1], 5),  # the knee is at 2, but frames are uncovered
        ([0.4, 0.02], 2),
        ([0.4], 1),
    ],
)
def test_knee(curve: list[float], expected: int) -> None:
    assert knee(np.array(curve), enough=0.03, covered=0.15) == expected


def test_quality_ranks_sharpness_and_marks_flashes() -> None:
    x, scene = planted(8)
    similarity, _ = OPS.neighbour_similarity(x, np.array([0, len(x)]))
    sharpness = np.linspace(0, 1, len(x), dtype=np.float32)
    level, quality = frame_quality(embedding_of(x, sharpness=sharpness), similarity, 0.2)
    assert set(np.flatnonzero(level == 3)) == set(np.flatnonzero(scene == -1))
    assert (level[:60] >= 1).all()
    clean = quality[level == 0]
    assert (np.diff(clean) > 0).all()
    assert ((quality >= 0) & (quality <= 1)).all()


@pytest.mark.full
def test_the_number_does_not_depend_on_rounding(media: Callable[[str], Path]) -> None:
    """Another decoder's pictures differ by a level here and there, which moves vectors by some 1e-5 of cosine."""
    with Engine.from_pretrained(device="cpu", threads=1) as engine:
        embedding = engine.embed_video(media("natural/bottle-detection.mp4"))
    numbers = []
    for seed in range(6):
        noise = np.random.default_rng(seed).normal(size=embedding.vectors.shape) * (2e-4 if seed else 0)
        moved = embedding.vectors + noise
        moved = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
        numbers.append(len(select(replace(embedding, vectors=moved), 40).keyframes))
    assert max(numbers) - min(numbers) <= 1, numbers


def test_no_two_key_frames_of_one_shot_are_much_alike() -> None:
    # Two views of one place, with a cosine of 0.93, taken in turns: in one shot they are one, in two shots two.
    base, other = np.eye(2, 32)
    one, two = base, 0.93 * base + np.sqrt(1 - 0.93**2) * other
    x = unit(np.repeat([one, one, two, two], 15, axis=0) + 1e-3 * np.random.default_rng(0).normal(size=(60, 32)))
    embedding = embedding_of(x)
    together, apart = (select(embedding, 30, shots).keyframes for shots in ([Shot(0, 30)], [Shot(0, 15), Shot(15, 30)]))
    assert len(together) == 1
    assert [frame.sample >= 30 for frame in apart] == [False, True]
    assert len(select(embedding, 30, [Shot(0, 30)], keyframes=2).keyframes) == 2


def test_each_slide_gets_a_key_frame() -> None:
    # Slides of text: all vectors are nearly the same, and nothing moves.
    x = unit(np.eye(1, 32) + 1e-3 * np.random.default_rng(1).normal(size=(60, 32)))
    sharpness = np.full(60, 0.5, np.float32)
    sharpness[[4, 33, 51]] = 0.9
    still = replace(embedding_of(x, sharpness=sharpness), layout_change=np.zeros(60, np.float32))
    shots = (Shot(0, 10), Shot(10, 12), Shot(12, 22), Shot(22, 30))

    def chosen(embedding: Embedding, **options: Any) -> list[int]:
        found = select(embedding, 30, shots, **options).keyframes
        assert sum(frame.weight for frame in found) == pytest.approx(1)
        assert [frame.cluster for frame in found] == list(range(len(found)))
        return [frame.sample for frame in found]

    rows = chosen(still)
    assert len(rows) == 3  # the one of two seconds is too short
    assert {int(np.searchsorted([20, 24, 44], row, side="right")) for row in rows} == {0, 2, 3}
    assert {4, 33, 51} & set(rows)  # the sharpest of each, where no cluster had one
    assert len(chosen(still, max_keyframes=2)) == 2
    assert len(chosen(still, keyframes=1)) == 1
    moving = replace(still, layout_change=np.full(60, 0.05, np.float32))
    assert len(chosen(moving)) == 1
