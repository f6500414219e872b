"""Files that were wrong once: small ones of the kinds that people reported."""

from __future__ import annotations

import io
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from encoded_clips import encode

from keyreel import Engine, Sampling
from keyreel.config import DecodeLimits
from keyreel.decode.source import Source
from keyreel.errors import CorruptStream, NoFrames, SourceError, UnsupportedCodec

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def engine() -> Any:
    with Engine.from_pretrained(device="cpu") as opened:
        yield opened


def read(
    engine: Engine, video: Any, sampling: Sampling, **options: Any
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Times, pictures and warnings of all batches."""
    with engine.frames(video, sampling, **options) as stream:
        batches = list(stream)
        warnings = stream.warnings
    return (
        np.concatenate([batch.pts_seconds for batch in batches]),
        np.concatenate([batch.data for batch in batches]),
        warnings,
    )


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("audio_begins_later.flv", 150),
        ("spatial_mvhevc_5frames.mov", 5),
        ("mjpeg_exif.avi", 30),
        ("qtrle_keyframes.mov", None),
        ("edit_list_no_key_frame_shown.mp4", None),
        ("stream_list_changes.flv", None),
    ],
)
def test_reported_files_give_their_frames(
    engine: Engine, media: Callable[[str], Path], name: str, frames: int | None
) -> None:
    path = media(f"reported/{name}")
    times, _, _ = read(engine, path, Sampling(mode="all"))
    if frames is not None:
        assert len(times) == frames
    assert (np.diff(times) > 0).all()
    keys, _, _ = read(engine, path, Sampling(mode="keyframes"))
    assert set(keys) <= set(times)
    assert keys[0] == times[0]


@pytest.mark.parametrize("name", ["h264_bframes.avi", "xvid_bframes.avi"])
def test_avi_has_its_frames_on_the_grid(engine: Engine, media: Callable[[str], Path], name: str) -> None:
    path = media(f"reported/{name}")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    times, found, warnings = read(engine, path, Sampling(mode="all"))
    assert len(found) == len(pictures)
    slots = times * float(rate)
    np.testing.assert_allclose(slots, slots.round(), atol=1e-4)
    assert (np.diff(slots.round()) >= 1).all()
    assert slots[-1] <= len(times) + 2  # an empty chunk leaves its slot out
    assert warnings == ()
    for n, own in enumerate(found):  # in the decoder's order
        near = range(max(0, n - 3), min(len(pictures), n + 4))
        assert min(near, key=lambda other: np.abs(own.astype(int) - pictures[other]).mean()) == n


@pytest.mark.parametrize("name", ["short_raw.264", "no_duration.webm"])
def test_the_end_is_known_after_the_first_pass(engine: Engine, media: Callable[[str], Path], name: str) -> None:
    path = media(f"reported/{name}")
    times, _, _ = read(engine, path, Sampling(mode="all"))
    step = float(np.median(np.diff(times)))
    for sampling in (Sampling(mode="all"), Sampling(mode="keyframes"), Sampling(fps=0.5)):
        with engine.frames(path, sampling) as stream:
            list(stream)
            assert stream.end_seconds == pytest.approx(times[-1] + step, abs=1.01 * step), sampling
    summary = engine.summarize(path, keyframes=1)
    assert summary.shots[-1].stop_seconds == pytest.approx(times[-1] + step, abs=1.01 * step)


@pytest.mark.parametrize(
    ("name", "frames", "first", "last", "said"),
    [
        ("clock_starts_at_100000s.mkv", 100, 0.023, 3.983, None),  # the sound begins 23 ms before the picture
        ("video_starts_5s_after_audio.mkv", 100, 5.023, 8.983, None),
        (
            "ts_clock_restarts.ts",
            200,
            0.0,
            7.96,
            "jumps in the time stamps, as in joined recordings: 1 (first: at 4.000 s)",
        ),
        ("stray_pts.mp4", 200, 0.0, 7.96, "(first: at 4.0"),
    ],
)
def test_clocks_are_those_of_players(
    engine: Engine, media: Callable[[str], Path], name: str, frames: int, first: float, last: float, said: str | None
) -> None:
    path = media(f"reported/{name}")
    times, _, warnings = read(engine, path, Sampling(mode="all"))
    assert (len(times), times[0], times[-1]) == (frames, pytest.approx(first, abs=2e-3), pytest.approx(last, abs=2e-3))
    assert np.diff(times).max() < 0.13
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]
    some, _, _ = read(engine, path, Sampling(fps=2.0))
    assert set(some) <= set(times)
    summary = engine.summarize(path, keyframes=2)
    assert summary.shots[-1].stop_seconds == pytest.approx(last + 0.04, abs=0.05)


@pytest.mark.parametrize("leap", [-30.0, 50.0, 3 * 3600.0])
def test_joined_recordings_play_through(tmp_path: Path, engine: Engine, leap: float) -> None:
    """A clock that is set back or forth after two of four seconds; and pauses, which are no leaps."""
    base = Fraction(1, 90_000)

    def written(path: Path, ticks: list[int]) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.time_base = 64, 48, base
            stream.codec_context.max_b_frames = 0
            packets = []
            for n in range(len(ticks)):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), n, np.uint8), format="rgb24")
                frame.pts, frame.time_base = n, Fraction(1, 25)
                packets += stream.encode(frame)
            for packet, tick in zip([*packets, *stream.encode(None)], ticks, strict=True):
                packet.pts = packet.dts = tick
                packet.time_base = base
                container.mux(packet)
        return path

    first = [(100_000 + 3600 * n) for n in range(50)]
    second = [first[-1] + 3600 * (n + 1) + round(leap * 90_000) for n in range(50)]
    parts = [written(tmp_path / f"{n}.ts", ticks) for n, ticks in enumerate((first, [max(t, 0) for t in second]))]
    if leap < 0:
        parts[1] = written(tmp_path / "1.ts", [3600 * n for n in range(50)])
    joined = tmp_path / "joined.ts"
    joined.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
    times, _, warnings = read(engine, joined, Sampling(mode="all"))
    assert len(times) >= 98
    assert np.diff(times).max() < 0.2
    assert times[-1] < 5
    assert any("jumps in the time stamps" in warning for warning in warnings)
    slides = written(tmp_path / "slides.mp4", [90_000 * 40 * n for n in range(6)])
    times, _, warnings = read(engine, slides, Sampling(mode="all"))
    np.testing.assert_allclose(times, 40.0 * np.arange(6), atol=1e-3)
    assert warnings == ()


def test_damage_gives_the_same_frames_whatever_the_threads(media: Callable[[str], Path]) -> None:
    path = media("reported/damaged_near_end.mp4")
    found = []
    for threads in (1, 4, 16):
        with Engine.from_pretrained(device="cpu", threads=threads) as engine:
            found.append(read(engine, path, Sampling(mode="all")))
    for times, pictures, warnings in found:
        assert len(times) == 99
        np.testing.assert_array_equal(times, found[0][0])
        np.testing.assert_array_equal(pictures, found[0][1])
        assert warnings == found[0][2]
        assert any("damaged" in warning for warning in warnings)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_picture_is_called_a_picture(kind: str) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(file, kind)
    with Source(file.getvalue()) as source, pytest.raises(SourceError, match="picture, not a video"):
        source.probe()


# FFmpeg's errors, and those of PyAV's own conversions: bad enums and text, missing streams, numbers.
RAISED = [
    pytest.param(error, id=type(error).__name__)
    for error in (
        av.error.ArgumentError(22, "no"),
        ValueError("29 is not a valid Type"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "no"),
        IndexError("no"),
        OverflowError("no"),
    )
]


@pytest.mark.parametrize("raised", RAISED)
def test_what_pyav_raises_beside_its_errors_is_a_damaged_packet(
    engine: Engine, media: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    from keyreel.decode.decoder import CpuWorker

    plain, calls = CpuWorker.decode, iter(range(10**9))

    def decode(self: CpuWorker, packet: Any, *, wanted: bool = True) -> Any:
        if next(calls) in (20, 60):
            raise raised
        return plain(self, packet, wanted=wanted)

    monkeypatch.setattr(CpuWorker, "decode", decode)
    times, _, _ = read(engine, media("natural/test.mp4"), Sampling(mode="all"))
    assert len(times) >= 50
    monkeypatch.setattr(CpuWorker, "decode", lambda *_, **__: (_ for _ in ()).throw(raised))
    with pytest.raises(CorruptStream):
        read(engine, media("natural/test.mp4"), Sampling(mode="all"))


def test_no_frames_is_an_error_of_the_source(engine: Engine, media: Callable[[str], Path]) -> None:
    with pytest.raises(NoFrames) as caught:
        read(engine, media("natural/test.mp4"), Sampling(start_seconds=1000.0))
    assert isinstance(caught.value, SourceError)
    assert caught.value.exit_code == 3


def small(container: str, codec: str = "libx264", *, tag: str = "", behind: bytes = b"", **options: str) -> bytes:
    """40 pictures of 64 x 64; `behind` is put behind each packet."""
    file, rng = io.BytesIO(), np.random.default_rng(3)
    with av.open(file, "w", format=container, options=options) as made:
        stream: Any = made.add_stream(codec, rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        if tag:
            stream.codec_context.codec_tag = tag
        pictures = rng.integers(0, 256, (40, 64, 64, 3), np.uint8)
        frames = [av.VideoFrame.from_ndarray(picture, "rgb24") for picture in pictures]
        for packet in (packet for frame in [*frames, None] for packet in stream.encode(frame)):
            longer: Any = av.Packet(bytes(packet) + behind)
            longer.stream, longer.time_base, longer.is_keyframe = stream, packet.time_base, packet.is_keyframe
            longer.pts, longer.dts = packet.pts, packet.dts
            made.mux(longer)
    return file.getvalue()


def scrambled(data: bytes) -> bytes:
    """A transport stream with the payload of its pictures scrambled."""
    packets = [bytearray(data[at : at + 188]) for at in range(0, len(data), 188)]
    for packet in packets:
        if (packet[1] & 31) << 8 | packet[2] == 0x100:
            packet[3] |= 0x80
            packet[12:] = bytes(value ^ 0x5A for value in packet[12:])
    return b"".join(packets)


def test_an_encrypted_file_is_called_encrypted(engine: Engine) -> None:
    key = "00112233445566778899aabbccddeeff"
    protected = small("mp4", encryption_scheme="cenc-aes-ctr", encryption_key=key, encryption_kid=key)
    stream = scrambled(small("mpegts"))
    for video in (protected, stream, io.BufferedReader(io.BytesIO(stream))):
        with pytest.raises(UnsupportedCodec, match="its video is encrypted"):
            read(engine, video, Sampling(fps=1.0))


@pytest.mark.parametrize(
    ("video", "warning"),
    [
        ({"container": "mp4", "tag": "dvh1"}, "Dolby Vision profile 5"),
        ({"container": "mpegts", "behind": b"\0\0\1\x7c\x01\x19\x08\x09\x10\x20"}, "Dolby Vision profile 5"),
        ({"container": "mp4"}, None),
    ],
)
@pytest.mark.parametrize("mode", ["all", "keyframes"])
def test_dolby_vision_without_a_base_for_others_is_said(
    engine: Engine, video: dict[str, Any], warning: str | None, mode: str
) -> None:
    _, _, warnings = read(engine, small(codec="libx265", **video), Sampling(mode=mode))  # type: ignore[arg-type]
    assert [text for text in warnings if warning and warning in text] == list(warnings)
    assert len(warnings) == (warning is not None)


def test_a_second_view_is_noted(engine: Engine, media: Callable[[str], Path]) -> None:
    _, _, warnings = read(engine, media("reported/spatial_mvhevc_5frames.mov"), Sampling(mode="all"))
    assert any("its two views" in warning for warning in warnings)


def test_an_index_of_millions_is_refused_before_it_is_read(engine: Engine) -> None:
    data = bytearray(small("mp4", "mpeg4"))
    sizes, times, chunks = (data.index(name) for name in (b"stsz", b"stts", b"stsc"))
    struct.pack_into(">II", data, sizes + 8, 1, 11_000_000)  # all of one byte
    struct.pack_into(">III", data, times + 8, 1, 11_000_000, 1)
    struct.pack_into(">IIII", data, chunks + 8, 1, 1, 11_000_000, 1)
    with pytest.raises(SourceError, match="more than 10368000 pictures"):
        read(engine, bytes(data), Sampling(fps=1.0))


def test_packets_that_give_no_picture_end_the_file(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reader", "source"):
        monkeypatch.setattr(f"keyreel.decode.{module}.BARREN_PACKETS", 50)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as made:
        stream: Any = made.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
        for number, packet in enumerate([*stream.encode(frame), *[av.Packet(b"\1") for _ in range(1000)]]):
            packet.stream, packet.time_base = stream, Fraction(1, 30)
            packet.pts = packet.dts = number
            made.mux(packet)
    times, _, warnings = read(engine, file.getvalue(), Sampling(mode="all"))
    assert len(times) == 1
    assert any("50 packets in a row have no picture" in warning for warning in warnings)


def test_more_pictures_than_the_limit_are_refused() -> None:
    refused = pytest.raises(SourceError, match="more than 39 pictures")
    with Source(small("matroska"), limits=DecodeLimits(max_frames=39)) as source, refused:
        source.probe()
    with Source(small("matroska"), limits=DecodeLimits(max_frames=40)) as source:
        timeline = source.timeline()
        assert timeline is not None
        assert len(timeline.shown) == 40


def test_decoding_does_not_begin_at_a_damaged_key_frame(engine: Engine, tmp_path: Path) -> None:
    """FFmpeg crashed there, with VP9 in threads that had not decoded anything yet."""
    whole = encode(tmp_path / "whole", codec="libvpx-vp9", frames=40, gop=8)
    with av.open(str(whole)) as container:
        lost = [bytes(packet) for packet in container.demux(video=0)][8]
    data = whole.read_bytes()
    assert data.count(lost) == 1
    data = data.replace(lost, bytes(len(lost)))
    with Source(data) as source:
        timeline = source.timeline()
        assert timeline is not None
        assert np.flatnonzero(timeline.key).tolist() == [0, 8, 16, 24, 32]
        assert np.flatnonzero(timeline.entry).tolist() == [0, 16, 24, 32]
    times, pictures, _ = read(engine, data, Sampling(mode="all"))
    few, some, _ = read(engine, data, Sampling(mode="every", every=3))
    assert set(few) <= set(times)
    np.testing.assert_array_equal(some, pictures[np.searchsorted(times, few)])


def test_a_process_keeps_two_pools_of_freed_memory() -> None:
    code = """
import ctypes, sys, threading
from keyreel.runtime.memory import bound_arenas
if sys.argv[1] == "bound":
    bound_arenas()
libc, barrier = ctypes.CDLL(None), threading.Barrier(12)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def work():
    barrier.wait()
    held = [libc.malloc(1000) for _ in range(2000)]
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    counts = {}
    for which in ("bound", "free"):
        done = subprocess.run([sys.executable, "-c", code, which], capture_output=True, text=True, check=True)
        counts[which] = done.stdout.count("<heap nr=")
    assert counts["bound"] <= 2 < counts["free"]


class Faulty:
    """A container that raises at one of its calls, from the `after`th on."""

    def __init__(self, real: Any, call: str, raised: Exception, after: int) -> None:
        self._real, self._call, self._raised, self._left = real, call, raised, [after]

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name != self._call:
            return value
        self._left[0] -= 1
        if self._left[0] < 0:
            raise self._raised
        return value

    def demux(self, *streams: Any) -> Any:
        for packet in self._real.demux(*streams):
            if self._call == "packets":
                self._left[0] -= 1
                if self._left[0] < 0:
                    raise self._raised
            yield packet


@pytest.mark.parametrize("raised", RAISED[:4])
@pytest.mark.parametrize("call", ["open", "streams", "format", "duration", "seek", "packets"])
@pytest.mark.parametrize("after", [0, 3])
def test_whatever_pyav_raises_is_an_error_of_the_tree(
    engine: Engine,
    media: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    raised: Exception,
    after: int,
) -> None:
    path, opened = media("natural/test.mp4"), iter(range(100))
    plain = av.open

    def open_it(*arguments: Any, **options: Any) -> Any:
        if call == "open" and next(opened) >= after:
            raise raised
        return Faulty(plain(*arguments, **options), call, raised, after)

    monkeypatch.setattr("keyreel.decode.source.av.open", open_it)
    for sampling in (Sampling(fps=2.0), Sampling(mode="all"), Sampling(mode="times", times=(2.0, 0.5))):
        try:
            times, _, _ = read(engine, path, sampling)
        except SourceError:
            continue
        assert len(times) >= 1
    with suppress(SourceError), Source(path) as source:
        source.probe()
