"""The reel: sound and picture together, frames at their times, upright, whole or not there."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
from render_clips import FLASHES, STEADY, VARIABLE, atoms, decode_sound, in_reel, onsets, write_clip

from keyreel.config import Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import RenderError
from keyreel.render import reel, sound
from keyreel.render.modes import make_reel
from keyreel.render.reel import write_reel
from keyreel.types import Shot

SPANS = (Shot(0.3, 2.21), Shot(3.117, 4.95), Shot(6.2, 8.0))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setitem(reel.ENCODERS["libx264"], "preset", "ultrafast")


def write(path: Path, out: Path, spans):
    with Source(path) as source:
        write_reel(source, spans, out)


def frames_of(path: Path):
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(
    ("name", "times", "options"),
    [
        ("variable.mp4", VARIABLE, {}),
        pytest.param("milliseconds.mkv", VARIABLE, {"sound": "pcm_s16le", "rate": 22050}, marks=pytest.mark.full),
        pytest.param("opus.webm.mkv", STEADY, {"sound": "libopus", "rate": 48000}, marks=pytest.mark.full),
        pytest.param("late.mkv", VARIABLE, {"sound_starts": 1.3}, marks=pytest.mark.full),
        ("gap.mkv", STEADY, {"silent": (4.0, 7.2), "sound": "pcm_s16le"}),
    ],
)
def test_sound_and_picture_stay_together(tmp_path, name, times, options):
    clip = write_clip(tmp_path / name, times, FLASHES, **options)
    write(clip, tmp_path / "reel.mp4", SPANS)
    flashes, beeps = onsets(tmp_path / "reel.mp4")
    silent = options.get("silent", (0.0, options.get("sound_starts", 0.0)))
    heard = [t for t in FLASHES if not silent[0] <= t < silent[1]]
    assert flashes == pytest.approx(in_reel(FLASHES, SPANS), abs=0.002)
    assert beeps == pytest.approx(in_reel(heard, SPANS), abs=0.015)


@pytest.mark.full
def test_sound_and_picture_stay_together_on_a_long_span_far_into_the_file(tmp_path):
    flashes = [n + 0.4 for n in range(40)]
    clip = write_clip(tmp_path / "long.mp4", [n / 10 for n in range(405)], flashes, size=(32, 32))
    span = (Shot(15.05, 39.95),)
    write(clip, tmp_path / "reel.mp4", span)
    seen, heard = onsets(tmp_path / "reel.mp4")
    assert len(seen) == 25
    assert heard == pytest.approx(seen, abs=0.015)


def test_a_video_that_starts_after_its_sound(tmp_path):
    shift = 0.52
    clip = write_clip(tmp_path / "later.mkv", [t + shift for t in STEADY], [f + shift for f in FLASHES])
    # On the file's clock, as players show it.
    spans = tuple(Shot(s.start_seconds + shift, s.stop_seconds + shift) for s in SPANS)
    write(clip, tmp_path / "reel.mp4", spans)
    flashes, beeps = onsets(tmp_path / "reel.mp4")
    assert flashes == pytest.approx(in_reel(FLASHES, SPANS), abs=0.002)
    assert beeps == pytest.approx(flashes, abs=0.015)


def test_samples_are_cut_exactly(tmp_path):
    clip = write_clip(tmp_path / "exact.mkv", STEADY, FLASHES, sound="pcm_s16le", rate=48000)
    original = decode_sound(clip)[0].reshape(-1, 2).T.astype(np.float32) / 32768
    for start in (0.0, 0.123, 2.6, 7.9):
        with Source(clip) as source:
            blocks = list(sound.placed_sound(sound.SoundReader(source), start, 40000))
        first = round(start * 48000)
        expected = np.zeros((2, 40000), np.float32)
        expected[:, : original.shape[1] - first] = original[:, first : first + 40000]
        # Matroska rounds pts to milliseconds.
        shifts = [
            np.abs(np.roll(np.concatenate(blocks, axis=1), s, axis=1) - expected)[:, 48:-48].max()
            for s in range(-48, 49)
        ]
        assert min(shifts) < 1e-4


def test_each_joint_fades_and_the_length_is_exact(tmp_path):
    blocks = [np.ones((2, n), np.float32) for n in (100, 4000, 900)]
    faded = np.concatenate(list(sound.faded(iter(blocks), 5000)), axis=1)
    assert faded.shape == (2, 5000)
    ramp = (np.arange(1440) + 0.5) / 1440
    np.testing.assert_allclose(faded[0, :1440], ramp, atol=1e-6)
    np.testing.assert_allclose(faded[1, -1440:], ramp[::-1], atol=1e-6)
    assert np.all(faded[:, 1440:-1440] == 1)


def test_frames_keep_their_times_and_spans_open_with_key_frames(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", VARIABLE, FLASHES)
    write(clip, tmp_path / "reel.mp4", SPANS)
    wanted, before, joints = [], 0.0, []
    for span in SPANS:
        shown = max(t for t in VARIABLE if t <= span.start_seconds)
        inside = [t for t in VARIABLE if span.start_seconds < t < span.stop_seconds]
        wanted += [before + max(t, span.start_seconds) - span.start_seconds for t in [shown, *inside]]
        joints.append(before)
        before += span.duration_seconds
    frames = frames_of(tmp_path / "reel.mp4")
    assert [float(f.time) for f in frames] == pytest.approx(wanted, abs=2e-4)
    keys = [float(f.time) for f in frames if f.key_frame]
    assert all(any(abs(key - joint) < 1e-3 for key in keys) for joint in joints)
    with av.open(str(tmp_path / "reel.mp4")) as container:
        for stream in container.streams:
            assert float(stream.duration * stream.time_base) == pytest.approx(before, abs=0.001)


def test_spans_whose_ends_miss_a_frame_by_rounding(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", STEADY, FLASHES, size=(32, 32))
    noise = 5e-15
    write(clip, tmp_path / "reel.mp4", (Shot(0.96 + noise, 2.0 + noise), Shot(3.0 - noise, 4.0)))
    frames = frames_of(tmp_path / "reel.mp4")
    assert [float(f.time) for f in frames] == pytest.approx([n / 25 for n in range(51)], abs=1e-4)


def test_spans_in_any_order(tmp_path):
    colours = [(8 * n, 250 - 8 * n, 90) for n in range(30)]
    clip = write_clip(tmp_path / "clip.mp4", [n / 2 for n in range(30)], size=(72, 128), sound=None, colours=colours)
    write(clip, tmp_path / "reel.mp4", (Shot(9.0, 10.0), Shot(2.0, 3.0), Shot(5.0, 6.0)))
    middle = [f.to_ndarray(format="rgb24")[36, 64] for f in frames_of(tmp_path / "reel.mp4")]
    np.testing.assert_allclose(middle, [colours[n] for n in (18, 19, 4, 5, 10, 11)], atol=6)


def test_a_picture_held_for_seconds_is_shown_from_the_spans_start(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    clip = write_clip(tmp_path / "slides.mp4", [0.0, 4.0, 8.0], size=(64, 64), sound=None, colours=colours)
    write(clip, tmp_path / "reel.mp4", (Shot(2.0, 3.0), Shot(6.5, 8.5 - 0.48)))
    frames = frames_of(tmp_path / "reel.mp4")
    assert [float(f.time) for f in frames] == pytest.approx([0.0, 1.0, 2.5], abs=1e-3)
    middle = [f.to_ndarray(format="rgb24")[32, 32] for f in frames]
    np.testing.assert_allclose(middle, colours, atol=6)


def test_mp4_of_the_right_kind(tmp_path, media):
    path = tmp_path / "reel.mp4"
    write(media("natural/flower.mp4"), path, (Shot(0.5, 1.5), Shot(3.0, 4.0)))
    names = atoms(path)
    assert names.index("moov") < names.index("mdat")
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        context = video.codec_context
        assert (context.name, context.pix_fmt, audio.codec_context.name) == ("h264", "yuv420p", "aac")
        assert (context.width, context.height, audio.rate, audio.channels) == (960, 540, 48000, 2)
        assert video.sample_aspect_ratio in (None, 1)
        # BT.601, as the source: colours are not converted where the encoder can say what they are.
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (6, 6, 6, 1)
        frames = list(container.decode(video=0))
    assert 59 <= len(frames) <= 62


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "start", "size"),
    [
        ("format/rotate-buck-bunny.mp4", 0.5, (1280, 720)),
        ("format/nasa_13013_rotated.mp4", 0.1, (480, 270)),
        ("format/testsrc2_odd_height_and_width_444.mp4", 0.2, (240, 320)),
        ("format/bt601_full_range.mp4", 0.5, (240, 320)),
        ("format/testsrc2_hdr.mp4", 0.5, (180, 320)),
        ("format/bt709_full_range.mp4", 0.5, (720, 1280)),
        ("format/h264_10bits.mp4", 0.5, (200, 200)),
        ("natural/flower.mp4", 0.5, (540, 960)),
        ("long/long_1080p_lowbitrate.mp4", 9.0, (720, 1280)),
    ],
)
def test_upright_even_and_in_the_same_colours(tmp_path, media, monkeypatch, name, start, size):
    monkeypatch.setitem(reel.ENCODERS["libx264"], "crf", "8")
    clip = media(name)
    write(clip, tmp_path / "reel.mp4", (Shot(start, start + 0.3),))
    first = frames_of(tmp_path / "reel.mp4")[0]
    assert first.rotation == 0
    picture = first.to_ndarray(format="rgb24").astype(int)
    assert picture.shape == (*size, 3)
    with Source(clip) as source, FrameStream(source, Sampling("times", times=(start,))) as stream:
        wanted = next(iter(stream)).data[0]
    if wanted.shape != picture.shape:
        wanted = av.VideoFrame.from_ndarray(wanted, "rgb24").reformat(size[1], size[0]).to_ndarray(format="rgb24")
    # Block means: chroma subsampling and coding blur edges, a turned picture or a wrong matrix changes whole areas.
    blocks = [
        p[: size[0] // 10 * 10, : size[1] // 10 * 10].reshape(size[0] // 10, 10, size[1] // 10, 10, 3).mean((1, 3))
        for p in (picture, wanted)
    ]
    assert np.abs(blocks[0] - blocks[1]).mean() < 2.5


def test_frames_of_the_right_size_reach_the_encoder_as_they_are(tmp_path, media, monkeypatch):
    monkeypatch.setitem(reel.ENCODERS["libx264"], "crf", "0")  # lossless
    clip = media("natural/internal_emulator_transformer_output.mp4")
    write(clip, tmp_path / "reel.mp4", (Shot(1.5, 2.0),))
    with av.open(str(clip)) as container:
        wanted = [f.to_ndarray() for f in container.decode(video=0) if 1.5 <= f.time < 2.0 - 1e-6]
    made = [frame.to_ndarray() for frame in frames_of(tmp_path / "reel.mp4")]
    made = made[-len(wanted) :]  # the first one was shown before the span, too
    assert all(np.array_equal(one, other) for one, other in zip(made, wanted, strict=True))


def test_a_video_without_sound_and_one_with_damaged_pictures(tmp_path, media):
    write(media("broken/corrupted.mp4"), tmp_path / "reel.mp4", (Shot(0.0, 1.0), Shot(2.0, 3.0)))
    with av.open(str(tmp_path / "reel.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert len(frames_of(tmp_path / "reel.mp4")) >= 10


def test_damaged_sound_leaves_the_rest(tmp_path, media):
    spans = (Shot(0.0, 2.0), Shot(9.0, 11.0))
    write(media("broken/video_with_failing_audio.mp4"), tmp_path / "reel.mp4", spans)
    samples, _ = decode_sound(tmp_path / "reel.mp4")
    assert samples.shape[1] / 48000 == pytest.approx(4.0, abs=0.05)
    assert np.abs(samples[:, :90000]).max() > 0.01


def test_errors_leave_nothing(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", STEADY[:50], size=(32, 32))

    def interrupt(stage, done, total):
        raise KeyboardInterrupt

    with Source(clip) as source:
        with pytest.raises(KeyboardInterrupt):
            write_reel(source, SPANS[:1], tmp_path / "reel.mp4", progress=interrupt)
        with pytest.raises(RenderError, match="cannot be written"):
            write_reel(source, SPANS[:1], tmp_path / "missing" / "reel.mp4")
        with monkeypatch.context() as patch:
            patch.setitem(reel.ENCODERS["libx264"], "preset", "no such preset")
            with pytest.raises(RenderError, match=r"libx264(.|\n)*pip install"):
                write_reel(source, SPANS[:1], tmp_path / "reel.mp4")
        monkeypatch.setattr(reel, "ENCODERS", {"h264_none": {}})
        with pytest.raises(RenderError, match=r"no H.264 encoder(.|\n)*h264_none(.|\n)*pip install"):
            write_reel(source, SPANS[:1], tmp_path / "reel.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("first", ["h264_none", "h264_nvenc"])
def test_the_first_encoder_that_opens_is_used(tmp_path, monkeypatch, first):
    monkeypatch.setattr(reel, "ENCODERS", {first: reel.ENCODERS["h264_nvenc"], "libvpx-vp9": {"deadline": "realtime"}})
    write(write_clip(tmp_path / "clip.mp4", STEADY[:50], size=(160, 256)), tmp_path / "reel.mp4", SPANS[:1])
    with av.open(str(tmp_path / "reel.mp4")) as container:
        name = container.streams.video[0].codec_context.name
    if first == "h264_nvenc" and name == "h264":
        pytest.skip("this machine has NVENC")
    assert name.startswith(("vp9", "libvpx-vp9"))


def test_progress_rises_to_the_end_and_the_file_is_opened_once_for_pictures_and_once_for_sound(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", STEADY, size=(32, 32))
    told: list[tuple[str, float, float | None]] = []
    opened: list[str] = []
    with Source(clip) as source:
        source.timeline()
        source.probe()
        real = source.open
        monkeypatch.setattr(Source, "open", lambda *a: (opened.append(threading.current_thread().name), real())[1])
        write_reel(source, SPANS, tmp_path / "reel.mp4", progress=lambda *a: told.append(a))
    total = sum(s.duration_seconds for s in SPANS)
    assert {(stage, end) for stage, _, end in told} == {("reel", total)}
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(told))
    assert told[-1][1] == total
    assert opened.count("MainThread") == 3  # the text tracks, the colours of the first frame, the sound of all spans


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_a_reel_never_replaces_its_video(tmp_path: Path, mode: Literal["copy", "encode"]) -> None:
    path = write_clip(tmp_path / "clip.mp4", STEADY)
    before = path.read_bytes()
    with Source(path) as source, pytest.raises(RenderError, match="is the input video"):
        make_reel(source, [Shot(0, 1)], path, shots=(), mode=mode)
    assert path.read_bytes() == before
