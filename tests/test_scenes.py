"""Scenes: neighbouring shots that show the same, and parts of long takes that do not."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keyreel.render.thumbnails import chapters
from keyreel.runtime.bundle import SCENE_SIMILARITY
from keyreel.scenes import LEAST_SECONDS, find_scenes
from keyreel.types import F32, Shot


def shown(*things: tuple[int, int], noise: float = 0.3, seed: int = 0) -> F32:
    """[T, 16]: (which thing, for how many samples) in a row, with noise."""
    draw = np.random.default_rng(seed)
    rows = np.concatenate([np.tile(np.eye(16)[thing], (count, 1)) for thing, count in things])
    rows += draw.normal(0, noise / 4, rows.shape)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def spans(*edges: float) -> tuple[Shot, ...]:
    return tuple(itertools.starmap(Shot, itertools.pairwise(edges)))


def test_neighbours_that_show_the_same_are_one_scene() -> None:
    vectors = shown((0, 6), (0, 4), (1, 8), (0, 6))
    scenes = find_scenes(vectors, np.arange(24) / 2, spans(0, 3, 5, 9, 12.1))
    assert scenes == spans(0, 5, 9, 12.1)


def test_a_long_take_is_divided_where_it_changes_for_good() -> None:
    vectors = shown((0, 40), (1, 60), (2, 30))
    assert find_scenes(vectors, np.arange(130) / 2, (Shot(0, 65),)) == spans(0, 20, 50, 65)
    # A glance at something else is none.
    glance = shown((0, 40), (1, 4), (0, 40))
    assert find_scenes(glance, np.arange(84) / 2, (Shot(0, 42),)) == (Shot(0, 42),)


def test_a_shot_that_no_sample_shows_belongs_to_the_one_before() -> None:
    vectors = shown((0, 3), (1, 4))
    scenes = find_scenes(vectors, np.array([0, 1, 2, 3.5, 4, 5, 6.0]), spans(0, 2.5, 3.2, 7))
    assert scenes == spans(0, 3.2, 7)


@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    noise=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_scenes_cover_the_shots_and_neighbours_differ(seed: int, counts: list[int], noise: float) -> None:
    draw = np.random.default_rng(seed)
    vectors = shown(*((int(draw.integers(4)), count) for count in counts), noise=noise, seed=seed)
    pts, stop = np.arange(len(vectors)) / 2, len(vectors) / 2
    cuts = sorted(set(draw.integers(1, len(vectors), 3).tolist())) if len(vectors) > 1 else []
    scenes = find_scenes(vectors, pts, spans(0, *(cut / 2 for cut in cuts), stop))
    assert scenes[0].start_seconds == 0
    assert scenes[-1].stop_seconds == stop
    assert all(one.stop_seconds == other.start_seconds for one, other in itertools.pairwise(scenes))
    means = []
    for scene in scenes:
        own = vectors[(pts >= scene.start_seconds) & (pts < scene.stop_seconds)].astype(np.float64).sum(0)
        means.append(own / np.linalg.norm(own))
    assert all(one @ other <= SCENE_SIMILARITY + 1e-6 for one, other in itertools.pairwise(means))
    inner = {scene.start_seconds for scene in scenes[1:]} - {cut / 2 for cut in cuts}
    for edge in inner:  # what is no cut lies far from the cuts
        assert min(abs(edge - other) for other in (0, *(cut / 2 for cut in cuts), stop)) >= LEAST_SECONDS


def test_chapters() -> None:
    text = chapters(spans(0, 61.5, 3725.25))
    assert text == ("WEBVTT\n\n00:00:00.000 --> 00:01:01.500\nScene 1\n\n00:01:01.500 --> 01:02:05.250\nScene 2\n")


def test_a_model_has_its_own_similarity() -> None:
    vectors, pts = shown((0, 20), (1, 20)), np.arange(40) / 2
    vectors = np.asarray(vectors + 0.5 * np.eye(16)[15], np.float32)  # as CLIP's, which share a direction
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert len(find_scenes(vectors, pts, (Shot(0, 20),), 0.05)) == 1
    assert find_scenes(vectors, pts, (Shot(0, 20),), 0.9) == spans(0, 10, 20)
