"""The virtual camera: bounds at any time, exact paths, cuts, both fall-backs, and the pixels of the reel."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import av
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from render_clips import make_summary, write_clip

from keyreel import Engine
from keyreel.config import OutputConfig, Sampling, aspect_ratio
from keyreel.decode.source import Source
from keyreel.render import reframe
from keyreel.render.documents import SummaryDocument, schema_of
from keyreel.render.modes import reel_camera
from keyreel.render.pictures import attended_area, pictures_at
from keyreel.render.reframe import (
    ACCELERATION,
    BINS,
    EASE,
    SPEED,
    STEP_SECONDS,
    TRAVEL,
    WHOLE,
    Camera,
    plan_camera,
    within_bars,
)
from keyreel.render.save import save_summary
from keyreel.render.thumbnails import tile_transform
from keyreel.types import F32, F64, I64, U8, Shot, VideoInfo


def blobs(centres: list[float], grid: tuple[int, int] = (7, 7), floor: float = 0.01) -> F32:
    """[T, P] maps with one round blob each, at a share of the width and half of the height."""
    y, x = ((np.arange(n) + 0.5) / n for n in grid)
    maps = [np.exp(-((x - c) ** 2 + (y[:, None] - 0.5) ** 2) / 0.01) + floor for c in centres]
    return np.stack([(m / m.sum()).ravel() for m in maps]).astype(np.float32)


def camera_of(
    maps: F32,
    *,
    shots: list[Shot] | None = None,
    aspect: str = "9:16",
    size: tuple[int, int] = (1080, 1920),
    fps: float = 2.0,
) -> Camera:
    shots = shots or [Shot(0.0, len(maps) / fps)]
    pts = np.arange(len(maps)) / fps
    return plan_camera(maps, (7, 7), pts, area=WHOLE, size=size, shots=shots, spans=shots, aspect=aspect)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_stay_inside_and_move_within_the_bounds(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10_000))
    draw = np.random.default_rng(seed)
    count = data.draw(st.integers(1, 30))
    size = data.draw(st.sampled_from([(1080, 1920), (1920, 1080), (480, 640), (240, 240), (272, 640)]))
    aspect = data.draw(st.sampled_from(["9:16", "1:1", "4:5", "16:9", "1:10", "10:1", "1.9:1.07"]))
    if data.draw(st.booleans()):
        maps = draw.random((count, 49)).astype(np.float32) ** data.draw(st.sampled_from([1, 8, 40]))
    else:  # a subject that jumps from one side to the other and stays a while
        maps = blobs([0.07 + 0.86 * (n // 4 % 2) for n in range(count)])
    pts = np.cumsum(draw.uniform(0.05, 1.5, count)) - 0.05
    cuts = np.unique([0.0, *draw.uniform(0, pts[-1] + 1, 3), pts[-1] + 1])
    shots = [Shot(a, b) for a, b in itertools.pairwise(cuts.tolist())]
    edges = np.sort(draw.uniform(0, pts[-1] + 1, 4)).tolist()
    spans = [Shot(*edges[:2]), Shot(*edges[2:])]
    camera = plan_camera(maps, (7, 7), pts, area=WHOLE, size=size, shots=shots, spans=spans, aspect=aspect)

    width, height = camera.window
    assert max(width, height) == 1
    assert width * size[1] / (height * size[0]) == pytest.approx(aspect_ratio(aspect))
    for span in spans:  # the takes are the span, cut at the shots
        own = [t for t in camera.takes if span.start_seconds <= t.start_seconds < span.stop_seconds]
        ends = {cut for cut in cuts.tolist() if span.start_seconds < cut < span.stop_seconds}
        assert [t.start_seconds for t in own] == sorted({span.start_seconds, *ends})
        assert [t.stop_seconds for t in own] == sorted({span.stop_seconds, *ends})
    for take in camera.takes:
        if take.mode == "fit":
            assert camera.region(take.start_seconds) is None
            continue
        dt = 0.01
        times = np.arange(take.start_seconds, take.stop_seconds, dt)
        regions = np.array([camera.region(t) for t in times])
        assert (regions[:, :2] >= 0).all()
        assert (regions[:, :2] + regions[:, 2:] <= 1 + 1e-9).all()
        assert np.abs(np.diff(regions, axis=0)).max(initial=0) <= SPEED * dt + 1e-9
        assert np.abs(np.diff(regions, n=2, axis=0)).max(initial=0) <= ACCELERATION * dt**2 + 1e-9
        assert take.mode == "path" or (regions == regions[0]).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, BINS - 1), start=st.floats(0, 1), count=st.integers(1, 20))
def test_the_window_stands_still_while_it_holds_the_subject(seed: int, width: int, start: float, count: int) -> None:
    first = round(start * (BINS - width))
    density = np.zeros((count, BINS))
    density[:, first : first + width] = np.random.default_rng(seed).random((count, width)) ** 8
    density /= density.sum(axis=1, keepdims=True)
    mode, _, places = reframe.decide(density, width)
    assert (mode, len(places)) == ("fixed", 1)
    assert density[:, places[0] : places[0] + width].sum(axis=1).mean() >= 1 - reframe.GAIN - 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_no_path_costs_less(seed: int) -> None:
    """Against all paths that there are, at the cost that the docstring writes; infinite beyond a bound."""
    costs = np.random.default_rng(seed).random((4, 15)) ** 4 * (1, 10, 100, 1000)[seed % 4]
    paths = np.array(list(itertools.product(range(15), repeat=4)))

    def priced(paths: I64) -> F64:
        steps = np.diff(paths, axis=1)
        turns = np.diff(steps, axis=1)
        moves = TRAVEL * np.abs(steps).sum(axis=1) / BINS + EASE * np.abs(turns).sum(axis=1) / BINS / STEP_SECONDS
        fast = np.abs(steps).max(axis=1) > SPEED * STEP_SECONDS * BINS
        sharp = np.abs(turns).max(axis=1) > ACCELERATION * STEP_SECONDS**2 * BINS
        return np.where(fast | sharp, np.inf, STEP_SECONDS * costs[np.arange(4), paths].sum(axis=1) + moves)

    found = reframe.least_cost_path(costs)
    assert priced(found[None])[0] == pytest.approx(priced(paths).min())


def test_a_subject_that_jumps_is_caught_up_with_at_full_speed() -> None:
    far = np.abs(np.arange(88) - np.repeat([0, 87], 16)[:, None]) / 87
    steps = np.diff(reframe.least_cost_path(100 * far))
    assert steps.sum() == 87
    assert np.abs(steps).max() == SPEED * STEP_SECONDS * BINS
    assert np.abs(np.diff(steps)).max() == ACCELERATION * STEP_SECONDS**2 * BINS


def test_a_moving_subject_is_followed_and_a_cut_is_jumped_over() -> None:
    walk = np.linspace(0.15, 0.85, 12).tolist()
    [take] = (camera := camera_of(blobs(walk))).takes
    assert (take.mode, take.reason) == ("path", "the subject moves")
    for seconds, centre in zip(np.arange(12) / 2, walk, strict=True):
        x, _, width, _ = camera.region(seconds)
        assert x <= centre <= x + width
    cut = camera_of(blobs([0.2] * 6 + [0.8] * 6), shots=[Shot(0, 3), Shot(3, 6)])
    assert [take.mode for take in cut.takes] == ["fixed", "fixed"]
    before, after = cut.region(2.999), cut.region(3.0)
    # A cell of the map is a seventh wide; the blob's own lies there.
    assert [r[0] + r[2] / 2 for r in (before, after)] == pytest.approx([0.2, 0.8], abs=1 / 7)


@pytest.mark.parametrize(
    ("maps", "aspect", "reason"),
    [
        (np.full((6, 49), 1 / 49, np.float32), "9:16", "nothing stands out"),
        (blobs([0.07] * 6) + blobs([0.93] * 6), "9:16", "two subjects are far apart"),
        (blobs([0.07] * 6) + blobs([0.93] * 6), "1:1", "two subjects are far apart"),
        (blobs([0.07, 0.93] * 3), "9:16", "two subjects are far apart"),  # at every other look
    ],
)
def test_a_shot_without_one_subject_is_shown_whole(maps: F32, aspect: str, reason: str) -> None:
    [take] = (camera := camera_of(maps, aspect=aspect)).takes
    assert (take.mode, take.reason, take.times, camera.region(1.0)) == ("fit", reason, (), None)


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
@pytest.mark.parametrize("size", [(90, 160), (160, 90)])
def test_maps_lie_on_the_frame_as_the_model_saw_it(mode: str, size: tuple[int, int]) -> None:
    """Against a picture of the map that is painted onto the frame point by point."""
    grid, (height, width) = (5, 4), size
    maps = np.random.default_rng(1).random((2, 20)).astype(np.float32)
    info = VideoInfo("a", 1.0, width, height, "h264", "yuv420p", 0, 25.0, False, "sdr")
    area = attended_area(info, {"height": 100, "width": 100, "mode": mode})
    fine = 7680
    for axis, side in ((0, width), (1, height)):
        points = (np.arange(fine) + 0.5) / fine
        if mode == "squash":
            seen = points
        else:  # the model's square covers the short side, or holds the long one, around the middle
            seen = (points - 0.5) * side / (min(size) if mode == "shortest" else max(size)) + 0.5
        cells = maps.reshape(2, *grid).sum(axis=1 + axis)
        place = np.floor(seen * cells.shape[1]).astype(int)
        inside = (place >= 0) & (place < cells.shape[1])
        painted = np.where(inside, cells[:, place.clip(0, cells.shape[1] - 1)], 0)
        wanted = painted.reshape(2, BINS, -1).sum(axis=2)
        wanted /= wanted.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(reframe.density_of(maps, grid, area, axis=axis), wanted, atol=3e-4)


@pytest.mark.parametrize(
    ("size", "aspect", "wanted"),
    [
        ((1080, 1920), "9:16", ((1080, 608), (1080, 1920))),
        ((1080, 1920), "16:9", ((1080, 1920), (1080, 1920))),
        ((2160, 3840), "1:1", ((1080, 1080), (1080, 1920))),
        ((1920, 1080), "16:9", ((608, 1080), (1920, 1080))),
        ((480, 640), "4:5", ((480, 384), (480, 640))),
        ((241, 321), "9:16", ((240, 136), (241, 321))),
        ((3, 3), "10:1", ((2, 4), (3, 4))),
    ],
)
def test_the_reel_has_even_sides_of_the_asked_shape(
    size: tuple[int, int], aspect: str, wanted: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    assert Camera(aspect, reframe.window_of(*size, aspect), ()).sizes(*size, 1080) == wanted


def test_a_whole_frame_stands_sharp_in_the_middle_of_a_blurred_one() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (18, 32, 3), np.uint8)
    made = reframe.blurred_sides(noise.repeat(20, 0).repeat(20, 1), (576, 320)).astype(float)
    inner = made[198:378]  # 32 x 18 squares of ten pixels; away from their edges they are as they were
    assert np.abs(inner.reshape(18, 10, 32, 10, 3)[:, 3:7, :, 3:7].mean(axis=(1, 3)) - noise).max() <= 2
    for side in (made[:198], made[378:]):
        assert np.abs(np.diff(side, axis=0)).max() < 12
        assert side.mean() == pytest.approx(noise.mean(), abs=10)


def write_walk(path: Path) -> None:
    """A bright square, a third as high as the frame, that crosses a dusky ground from left to right."""
    ramp = np.linspace(20, 70, 180)[:, None] + np.linspace(0, 30, 320)
    ground = np.stack([ramp, 0.8 * ramp, ramp[::-1]], axis=-1).astype(np.uint8)
    frames = np.tile(ground, (125, 1, 1, 1))
    for number, picture in enumerate(frames):
        left = round(260 * (0.05 + 0.9 * number / 125))
        picture[60:120, left : left + 60] = 250, 220, 40
    write_clip(path, [n / 25 for n in range(125)], size=(180, 320), sound=None, colours=frames)


def pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24", src_colorspace=1) for frame in container.decode(video=0)]


def test_a_reel_shows_the_moving_square(engine: Engine, tmp_path: Path) -> None:
    """With the built-in model: the path of summary.json, the pixels of the reel, the effects of OTIO."""
    write_walk(tmp_path / "walk.mp4")
    summary = engine.summarize(tmp_path / "walk.mp4", sampling=Sampling(fps=4.0))
    summary.save(tmp_path / "out", OutputConfig(aspect="9:16", otio=True, storyboard=False, thumbnails=False))
    summary.render_reel(tmp_path / "fit.mp4", aspect="9:16", reframe="fit")
    with pytest.raises(ValueError, match=r"unknown aspect '9x16', allowed: 9:16, 1:1, 4:5, 16:9"):
        summary.render_reel(tmp_path / "no.mp4", aspect="9x16")
    document = json.loads((tmp_path / "out/summary.json").read_text())
    jsonschema.validate(document, schema_of(SummaryDocument))
    [take] = document["reel"]["reframe"]["takes"]
    assert (document["reel"]["reframe"]["aspect"], take["mode"]) == ("9:16", "path")
    times, lefts = zip(*((w["pts_seconds"], w["region"][0]) for w in take["windows"]), strict=True)
    source, reel, fit = (pictures(tmp_path / name) for name in ("walk.mp4", "out/reel.mp4", "fit.mp4"))
    assert len(reel) == len(fit) == len(source) == 125
    seen = []
    for number, (shown, whole) in enumerate(zip(reel, source, strict=True)):
        assert shown.shape == (180, 102, 3)
        left = round(np.interp(number / 25, times, lefts) * 320)
        # Between the noted windows the path is a curve: a pixel or two beside the straight line.
        near = [whole[:, x : x + 102] for x in range(max(left - 3, 0), left + 4)]
        errors = [np.abs(part - shown.astype(float)).mean() for part in near if part.shape == shown.shape]
        assert min(errors) < 5
        seen.append((shown[90, :, 0] > 180).sum() / (whole[90, :, 0] > 180).sum())
    assert np.mean(np.array(seen) >= 0.8) >= 0.9  # of the frames show four fifths of the square
    assert all((frame[90, :, 0] > 180).sum() == pytest.approx(60 * 102 / 320, abs=3) for frame in fit)
    timeline = json.loads((tmp_path / "out/reel.otio").read_text())
    [track] = timeline["tracks"]["children"]
    [effect] = track["children"][0]["effects"]
    assert effect["effect_name"] == "keyreel.reframe"
    assert effect["metadata"]["keyreel"] == document["reel"]["reframe"]


def test_each_clip_has_its_own_takes(media, tmp_path: Path) -> None:
    with Source(media("natural/test.mp4")) as source:
        summary = make_summary(source, shots=[1.0, 1.6])
        config = OutputConfig(reel=False, otio=True, storyboard=False, thumbnails=False, aspect="1:1", reel_seconds=2.0)
        save_summary(summary, source, tmp_path / "out", config)
    reel = json.loads((tmp_path / "out/summary.json").read_text())["reel"]
    clips = json.loads((tmp_path / "out/reel.otio").read_text())["tracks"]["children"][0]["children"]
    assert len(clips) == len(reel["spans"])
    takes = [clip["effects"][0]["metadata"]["keyreel"]["takes"] for clip in clips]
    assert [take for own in takes for take in own] == reel["reframe"]["takes"]
    for own, span in zip(takes, reel["spans"], strict=True):
        assert (own[0]["start_seconds"], own[-1]["stop_seconds"]) == (span["start_seconds"], span["stop_seconds"])


def padded(pictures: U8, lines: tuple[int, int, int, int]) -> U8:
    """Pictures [N, H, W, 3] with black bars of so many lines: left, top, right, bottom."""
    left, top, right, bottom = lines
    return np.pad(pictures, ((0, 0), (top, bottom), (left, right), (0, 0)))


def small_pictures(path: Path, stop: float, step: float) -> U8:
    with Source(path) as source:
        small = tile_transform(*source.probe().display_size)
        return np.stack([one for _, one in pictures_at(source, np.arange(0.0, stop, step).tolist(), small)])


@pytest.mark.parametrize("name", ["bikes", "bottle-detection", "car-detection", "flower", "stream-of-water", "test"])
def test_a_dark_scene_has_no_bars(media, name: str) -> None:
    own = small_pictures(media(f"natural/{name}.mp4"), 3.0, 0.5)
    darker = [np.clip(own.astype(int) - by, 0, 255).astype(np.uint8) for by in (40, 80, 120, 160)]
    y, x = (np.linspace(-1, 1, side)[:, None] for side in own.shape[1:3])
    stage = (own * np.clip(1.2 - np.hypot(y, x.T), 0, 1)[..., None]).astype(np.uint8)  # lit in the middle only
    for found in (own, *darker, own // 20, stage):
        assert within_bars(found) == WHOLE
    for lines in ((0, 12, 0, 0), (0, 12, 0, 20)):  # such as a black sky
        assert within_bars(padded(own, lines)) == WHOLE


@pytest.mark.parametrize("lines", [(0, 12, 0, 12), (20, 0, 20, 0), (80, 0, 81, 0), (9, 6, 10, 7), (0, 30, 0, 30)])
@pytest.mark.parametrize("name", ["bikes", "car-detection", "flower"])
def test_bars_are_found(media, name: str, lines: tuple[int, int, int, int]) -> None:
    own = small_pictures(media(f"natural/{name}.mp4"), 3.0, 0.5)
    made = padded(own, lines)
    height, width = made.shape[1:3]
    left, top, right, bottom = (n + 1 if n else 0 for n in lines)
    wanted = left / width, top / height, (width - left - right) / width, (height - top - bottom) / height
    faded = np.concatenate([made // 10, made // 10, made, made[:2] * 0])
    for found in (made, np.maximum(made, 4), faded):
        assert within_bars(found) == pytest.approx(wanted)
    assert within_bars(made[:2]) == WHOLE  # too few to tell
    titled = made.copy()
    titled[3, -4:-2, -4:-2] = 200  # something is in the bar
    assert within_bars(titled) == WHOLE


def test_real_bars_are_found(media) -> None:
    """A film of 4:3 in 640 x 360; its edges, measured in whole frames, are at 72 and 568."""
    own = small_pictures(media("natural/chaplin.mp4"), 9.0, 1.0)
    x, y, width, height = within_bars(own)
    assert (y, height) == (0, 1)
    assert 72 < x * 640 <= 72 + 2 * 4
    assert 568 - 2 * 4 <= (x + width) * 640 < 568


def test_a_camera_keeps_within_the_bars() -> None:
    """As if the video had no bars."""
    walk = blobs(np.linspace(0.15, 0.85, 12).tolist())
    inside, shots = (0.1, 0.25, 0.8, 0.5), [Shot(0, 6)]
    plain = camera_of(walk, size=(540, 1536))
    area = (0.1, 0.25, 0.9, 0.75)  # of the maps, which cover what is within the bars
    pts = np.arange(12) / 2
    barred = plan_camera(
        walk, (7, 7), pts, area=area, size=(1080, 1920), shots=shots, spans=shots, aspect="9:16", inside=inside
    )
    assert [take.mode for take in barred.takes] == [take.mode for take in plain.takes] == ["path"]
    for seconds in np.linspace(0, 5.9, 30):
        x, y, width, height = plain.region(seconds)
        wanted = 0.1 + 0.8 * x, 0.25 + 0.5 * y, 0.8 * width, 0.5 * height
        assert barred.region(seconds) == pytest.approx(wanted, abs=0.01)
    assert barred.sizes(1080, 1920, 1080) == ((540, 304), (1080, 1920))


def test_a_reel_of_a_letterboxed_clip_shows_no_bars(engine: Engine, media, tmp_path: Path) -> None:
    own = np.stack(pictures(media("natural/bikes.mp4"))[:75])
    made = padded(own, (0, 44, 0, 44))
    write_clip(tmp_path / "wide.mp4", [n / 25 for n in range(75)], size=made.shape[1:3], sound=None, colours=made)
    summary = engine.summarize(tmp_path / "wide.mp4")
    bare = dataclasses.replace(summary, thumbnails={})
    with Source(tmp_path / "wide.mp4") as source:
        config = OutputConfig(aspect="9:16")
        cameras = [reel_camera(one, source, config, summary.shots) for one in (summary, bare)]
    for camera in cameras:
        assert camera is not None
        x, y, width, height = camera.inside
        assert (x, width) == (0, 1)
        assert 44 <= y * 360 <= 44 + 2 * 4
        assert 316 - 2 * 4 <= (y + height) * 360 <= 316
    for mode in ("follow", "fit"):
        summary.render_reel(tmp_path / f"{mode}.mp4", seconds=2, aspect="9:16", reframe=mode)
        shown = np.stack(pictures(tmp_path / f"{mode}.mp4"))
        assert shown.shape[2] / shown.shape[1] == pytest.approx(9 / 16, abs=0.01)
        assert 254 <= shown.shape[1] <= 272  # lines of the picture itself
        assert shown.max(axis=(0, 2, 3)).min() > 80  # no line is black all along
