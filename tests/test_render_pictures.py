"""Key-frame pictures, contact sheet, attention overlays and thumbnails."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from encoded_clips import encode
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from render_clips import write_clip

from keyreel.decode.source import Source
from keyreel.render.pictures import (
    QUERY_EDGE,
    at_most,
    attended_area,
    attention_overlay,
    clock,
    contact_sheet,
    keyframe_name,
    overlay_png,
    picture_at,
    pictures_at,
    short_clock,
    upright,
)
from keyreel.render.thumbnails import sprite, tile, tile_times
from keyreel.types import VideoInfo


def video(width: int, height: int) -> VideoInfo:
    return VideoInfo("a.mp4", 10.0, width, height, "h264", "yuv420p", 0, 25.0, False, "sdr")


def test_clocks_by_hand():
    assert clock(0) == "00:00:00.000"
    assert clock(83.456) == "00:01:23.456"
    assert clock(3599.9996) == "01:00:00.000"
    assert short_clock(0) == "0:00.0"
    assert short_clock(83.48) == "1:23.5"
    assert short_clock(7261.05) == "2:01:01.1"
    assert short_clock(0.3) == "0:00.3"
    assert keyframe_name(7, 83.456) == "keyframe_0007_00-01-23.456.jpg"


def test_pictures_and_tiles_are_the_frames_of_their_times(tmp_path):
    colours = [(8 * n, 250 - 8 * n, 90) for n in range(30)]
    clip = write_clip(tmp_path / "clip.mp4", [n / 2 for n in range(30)], size=(72, 128), sound=None, colours=colours)
    times = [3.5, 0.0, 14.5, 3.5, *(float(n) for n in range(15))]
    with Source(clip) as source:
        full = dict(pictures_at(source, times))
        small = dict(pictures_at(source, times, at_most(source.probe().height, source.probe().width, 36)))
    assert list(full) == sorted(range(len(times)), key=times.__getitem__)
    for place, seconds in enumerate(times):
        for pictures, shape in ((full, (72, 128, 3)), (small, (36, 64, 3))):
            assert pictures[place].shape == shape
            np.testing.assert_allclose(pictures[place].mean((0, 1)), colours[round(2 * seconds)], atol=6)
    sheet, boxes = sprite([tile(full[place], video(128, 72)) for place in range(4, len(times))])
    pixels = np.asarray(sheet)
    assert pixels.shape == (180, 1600, 3)
    for second, (x, y, width, height) in enumerate(boxes):
        assert (width, height) == (160, 90)
        np.testing.assert_allclose(pixels[y : y + height, x : x + width].mean((0, 1)), colours[2 * second], atol=6)


def test_rotated_pictures_are_upright(media):
    with Source(media("format/rotate-buck-bunny.mp4")) as source:
        ((_, picture),) = pictures_at(source, [0.5], at_most(source.probe().height, source.probe().width, 1080))
        assert tile(picture, source.probe()).shape == (160, 90, 3)
    assert picture.shape[:2] == (1080, 608)


@pytest.mark.parametrize("size", [(480, 270), (270, 480), (480, 200)])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_contact_sheet_holds_every_picture_with_a_caption(count, size):
    colours = [(20 + 7 * n, 250 - 7 * n, (53 * n) % 256) for n in range(count)]
    sheet = np.asarray(contact_sheet([Image.new("RGB", size, c) for c in colours], [1.5 * n for n in range(count)]))
    assert sheet.shape[1] <= 1944
    # Each colour fills one rectangle of the picture's shape, in reading order, with dark writing under it.
    packed = sheet.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    places = []
    for red, green, blue in colours:
        rows, columns = np.nonzero(packed == red * 65536 + green * 256 + blue)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) >= 0.98 * height * width
        assert width / height == pytest.approx(size[0] / size[1], rel=0.02)
        assert width >= min(size[0], 100)
        caption = sheet[rows.max() + 1 : rows.max() + 40, columns.min() : columns.max()]
        assert (caption.max(-1) < 100).sum() > 40
        places.append((rows.min(), columns.min()))
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("size", "image", "area"),
    [
        ((200, 100), {"height": 50, "width": 50, "mode": "shortest"}, (0.25, 0, 0.75, 1)),
        ((100, 200), {"height": 50, "width": 50, "mode": "shortest"}, (0, 0.25, 1, 0.75)),
        ((200, 100), {"height": 50, "width": 50, "mode": "longest"}, (0, -0.5, 1, 1.5)),
        ((200, 100), {"height": 50, "width": 50, "mode": "squash"}, (0, 0, 1, 1)),
    ],
)
def test_where_the_model_looked(size, image, area):
    assert attended_area(video(*size), image) == pytest.approx(area)


def test_overlay_lies_where_the_attention_is():
    attention = np.full(16, 0.01, np.float32)
    attention[6] = 0.85  # row 1, column 2 of 4 x 4
    overlay = np.asarray(attention_overlay(attention, (4, 4), (0.25, 0.0, 0.75, 1.0), (80, 40)), int)
    assert (overlay[:, :20, 3] == 0).all()
    assert (overlay[:, 60:, 3] == 0).all()
    assert (overlay[:, 20:60, 3] >= 30).all()
    row, column = np.unravel_index(overlay[..., 3].argmax(), (40, 80))
    assert (row // 10, column // 10) == (1, 4)
    assert overlay[row, column, :3].sum() > 550
    assert overlay[35, 25, :3].sum() < 150
    assert len(overlay_png(attention_overlay(attention, (4, 4), (0, 0, 1, 1), (96, 54)))) < 8000
    flat = np.asarray(attention_overlay(np.zeros(4, np.float32), (2, 2), (0, -0.5, 1, 1.5), (40, 20)))
    assert (flat[..., 3] == 40).all()


@given(st.floats(0.01, 1e5))
def test_tiles_are_regular_few_and_cover_the_video(duration):
    step, times = tile_times(duration)
    assert 1 <= len(times) <= 200
    assert times[0] == 0
    assert len(times) == 1 or times[-1] < duration
    assert times[-1] + step >= duration - 1e-6
    assert step >= 1


@pytest.mark.parametrize(
    ("codec", "options", "container"),
    [
        ("libx264", {"bf": "3"}, "mp4"),
        ("libx264", {"bf": "3", "x264-params": "open-gop=1"}, "mkv"),
        ("libx265", {"x265-params": "open-gop=1:bframes=3"}, "mp4"),
        ("libvpx-vp9", {}, "webm"),
        ("mpeg2video", {"bf": "2"}, "ts"),
        ("mpeg4", {"bf": "2"}, "avi"),
    ],
)
def test_one_picture_is_that_of_the_plan(tmp_path: Path, codec: str, options: dict[str, str], container: str) -> None:
    path = encode(tmp_path / "clip", codec=codec, options=options, container=container, frames=60)
    times = [0.0, 0.3, 0.48, 0.5, 0.96, 1.37, 2.36, 9.0]
    with Source(path) as source:
        expected = dict(pictures_at(source, times))
        for place, seconds in enumerate(times):
            np.testing.assert_array_equal(picture_at(source, seconds), expected[place])


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB")]
)
@pytest.mark.parametrize("turned", [1, 6])
def test_a_large_picture_is_reduced_and_upright(kind: str, mode: str, turned: int) -> None:
    y, x = np.mgrid[0:1500, 0:2500]
    values = np.stack([x / 10, y / 6, (x + y) / 16], axis=-1).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray((x * 26).astype(np.uint16))
    elif mode != "RGB":
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    with Image.open(stream) as opened:
        found = upright(opened)
    with Image.open(stream) as opened:
        whole = ImageOps.exif_transpose(opened.convert("RGB"))
    assert max(found.shape) <= QUERY_EDGE
    assert found.shape[0] / found.shape[1] == pytest.approx(whole.height / whole.width, abs=2e-3)
    expected = np.asarray(whole.resize(found.shape[1::-1], Image.Resampling.BOX), np.float32)
    assert np.abs(found.astype(np.float32) - expected).mean() < 3


def test_a_picture_that_is_not_large_stays_as_it_is() -> None:
    values = np.random.default_rng(0).integers(0, 255, (1080, 1920, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    with Image.open(stream) as opened:
        np.testing.assert_array_equal(upright(opened), values)
