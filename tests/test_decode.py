"""Colours of clips against a plain decode; times, damage, threads, memory. Frames of all clips: test_plan.py."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from numpy.typing import NDArray
from test_color import WEIGHTS, rgb_of_yuv, slow_tone_map

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import Converter, transfer_of
from keyreel.decode.runs import Packets
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import CorruptStream, UnsupportedCodec
from keyreel.types import FrameBatch

Media = Callable[[str], Path]
SMALL = ImageTransform(24, 32, "squash")

# name: frames, as `ffprobe -count_frames` gave them in the clips' manifest
COUNTS = {
    "format/av1_video.mkv": 125,
    "format/bbb_800x640_768kbps_30fps_vp9.mp4": 120,
    "format/bt601_full_range.mp4": 60,
    "format/bt601_limited_range.mp4": 60,
    "format/bt709_full_range.mp4": 30,
    "format/carphone_pristine.mp4": 120,
    "format/flower.webm": 150,
    "format/h264_10bits.mp4": 30,
    "format/h265_10bits.mp4": 30,
    "format/h265_video.mp4": 10,
    "format/hdr10-av1.mp4": 127,
    "format/nasa_13013_rotated.mp4": 17,
    "format/sample.avi": 96,
    "format/testsrc2_12bit_hdr.mp4": 60,
    "format/testsrc2_444_10bit_hevc.mp4": 25,
    "format/testsrc2_av1_10bit.mp4": 25,
    "format/testsrc2_hdr.mp4": 60,
    "format/testsrc2_odd_height_and_width_444.mp4": 25,
    "format/testsrc2_odd_height_and_width_mpeg2.mp4": 10,
    "format/testsrc2_odd_height_and_width_vp9.mp4": 25,
    "format/video_180.mov": 3,
    "format/video_90.mov": 3,
    "broken/annex-b.mp4": 6,
    "broken/corrupted.mp4": 49,
    "broken/discard_first_keyframe.mp4": 25,
}
REASONS = {
    "broken/annex-b.mp4": ("damaged", "header promises"),
    "broken/corrupted.mp4": ("damaged packets skipped: 1",),
}


QUICK = {
    "format/flower.webm",
    "format/testsrc2_av1_10bit.mp4",
    "format/testsrc2_hdr.mp4",
    "format/video_90.mov",
    "format/h265_video.mp4",
    "broken/corrupted.mp4",
    "broken/discard_first_keyframe.mp4",
}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in sorted(COUNTS)]


def block_means(plane: NDArray[Any], rows: int, columns: int) -> NDArray[np.float64]:
    """Exact means of the blocks of a rows x columns grid, whose borders may cut pixels."""

    def weights(size: int, count: int) -> NDArray[np.float64]:
        edges = np.linspace(0, size, count + 1)
        low, high = edges[:-1, None], edges[1:, None]
        at = np.arange(size)[None]
        return np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, 1) / (size / count)

    return weights(plane.shape[0], rows) @ plane.astype(np.float64) @ weights(plane.shape[1], columns).T


def blocks_of(frame: av.VideoFrame) -> NDArray[np.float64]:
    """[6, 8, 3] RGB in 0..255, from the planes by the standards' formulas; the grid lies on the coded picture."""
    bits = {"10le": 10, "12le": 12}.get(frame.format.name[-4:], 8)
    means = []
    for plane in frame.planes:
        values = np.frombuffer(plane, np.uint8 if bits == 8 else "<u2").reshape(plane.height, -1)[:, : plane.width]
        means.append(block_means(values, 6, 8))
    transfer = transfer_of(frame)
    matrix = frame.colorspace if frame.colorspace in WEIGHTS else 6 if frame.height <= 576 else 1
    rgb = rgb_of_yuv(means, matrix, full=frame.color_range == ColorRange.JPEG, bits=bits)
    if transfer == "sdr":
        return rgb
    codes = (rgb / 255 * 65535).round().astype(int)
    return np.array([[slow_tone_map(tuple(pixel), transfer) for pixel in row] for row in codes.tolist()])


def plain(path: Path, count: int) -> tuple[NDArray[np.float64], int]:
    """A plain decode of a file of `count` frames: one thread, packet by packet, no seeking, no plan, no swscale.

    Returns:
        [T, 6, 8, 3] mean colours of a grid of blocks, as coded, NaN where not made; quarter turns to upright,
        counter-clockwise.
    """
    blocks, turn = [], 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                # Large pictures, and the many of long clips, are compared now and then only.
                step = 1 + frame.width * frame.height * count // 20_000_000
                blocks.append(np.full((6, 8, 3), np.nan) if len(blocks) % step else blocks_of(frame))
                turn = round(frame.rotation / 90) % 4
    return np.stack(blocks), turn


def read(
    video: Any, sampling: Sampling, transform: ImageTransform | None = SMALL, **options: Any
) -> tuple[FrameBatch, tuple[str, ...]]:
    with Source(video) as source, FrameStream(source, sampling, transform=transform, **options) as stream:
        batches = list(stream)
    whole = FrameBatch(
        np.concatenate([b.data for b in batches]),
        np.concatenate([b.pts_seconds for b in batches]),
        np.concatenate([b.frame_index for b in batches]),
    )
    return whole, stream.warnings


# --- real clips


@pytest.mark.parametrize("name", NAMES)
def test_colours_of_clips(media: Media, name: str) -> None:
    expected, turn = plain(media(name), COUNTS[name])
    assert len(expected) == COUNTS[name]
    tall, wide = (8, 6) if turn % 2 else (6, 8)
    made, warnings = read(media(name), Sampling("all"), ImageTransform(tall, wide, "squash", "area"), batch_size=64)
    np.testing.assert_array_equal(made.frame_index, np.arange(COUNTS[name]))
    for reason in REASONS.get(name, ()):
        assert any(reason in warning for warning in warnings)
    hdr = "hdr" in name
    assert hdr == any("PQ (HDR)" in warning for warning in warnings)
    if name not in REASONS and not hdr:
        assert warnings == ()
    blocks = np.rot90(expected, turn, (1, 2))
    off = np.abs(made.data - blocks)[~np.isnan(blocks[:, 0, 0, 0])]
    assert len(off)
    # Small test pictures are all hard edges, which move a little: chroma is sited on the left, taps are whole pixels.
    edges = any(word in name for word in ("testsrc2", "bt601", "bt709", "10bits", "corrupted", "discard"))
    assert off.mean() <= (3.5 if edges else 1.0), (off.mean(), off.max())
    if not (edges and hdr):  # PQ is steep where saturated colours clip
        assert off.max() <= (30 if edges else 8), (off.mean(), off.max())


def test_size_of_non_square_pixels(media: Media) -> None:
    got, _ = read(media("format/carphone_pristine.mp4"), Sampling("times", times=(0.0,)), None)
    assert got.data.shape == (1, 144, 193, 3)


# --- clips made here


def render(
    path: Path,
    ticks: Sequence[int],
    *,
    base: Fraction = Fraction(1, 1000),
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
) -> Path:
    """A clip with frames at these ticks; frame n shows n as eight grey bars, which is read back by `number`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {"g": "8", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = size[0], size[1], "yuv420p", base
        stream.codec_context.time_base = base
        for n, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(bars(n, size), "rgb24")
            frame.pts, frame.time_base = tick, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bars(n: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    bits = np.array([235 if n >> k & 1 else 16 for k in range(8)], np.uint8)
    row = np.repeat(bits, size[0] // 8)
    return np.repeat(np.broadcast_to(row[None, :, None], (1, size[0], 3)), size[1], 0)


def number(picture: NDArray[np.uint8]) -> int:
    bits = picture.mean((0, 2)).reshape(8, -1).mean(1) > 128
    return int(sum(1 << k for k in range(8) if bits[k]))


def numbers(batch: FrameBatch) -> list[int]:
    return [number(picture) for picture in batch.data]


def test_times_start_at_the_streams_start(tmp_path: Path) -> None:
    path = render(tmp_path / "late.mkv", range(5000, 7000, 40))
    for sampling in (Sampling("all"), Sampling("every", every=2)):
        got, _ = read(path, sampling, None)
        np.testing.assert_allclose(got.pts_seconds, np.arange(50)[:: sampling.every] * 0.04, atol=1e-9)
    got, _ = read(path, Sampling("times", times=(0.0, 1.0)), None)
    assert numbers(got) == [0, 25]


def test_one_frame_and_one_second(tmp_path: Path) -> None:
    path = render(tmp_path / "one.mp4", [0])
    for mode in ("fps", "every", "keyframes", "all"):
        got, _ = read(path, Sampling(mode), None)  # type: ignore[arg-type]
        assert numbers(got) == [0]
    got, _ = read(path, Sampling("times", times=(5.0, 0.0)), None)
    assert numbers(got) == [0, 0]


def test_seeking_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = render(tmp_path / "far.mp4", range(0, 60_000, 40), options={"g": "24", "bf": "3"})
    seeks: list[int] = []
    real = Packets._seek
    monkeypatch.setattr(Packets, "_seek", lambda self, place: (seeks.append(place), real(self, place))[1])
    got, _ = read(path, Sampling("times", times=(1.0, 30.0, 58.0)), None)
    assert got.frame_index.tolist() == [25, 750, 1450]
    assert [n % 256 for n in (25, 750, 1450)] == numbers(got)
    assert len(seeks) == 2
    # A container that seeks to the wrong place must not give wrong frames.
    for wrong in (0, 1450):
        monkeypatch.setattr(Packets, "_seek", lambda self, place, wrong=wrong: real(self, wrong))
        again, _ = read(path, Sampling("times", times=(1.0, 30.0, 58.0)), None)
        np.testing.assert_array_equal(again.data, got.data)
        np.testing.assert_array_equal(again.frame_index, got.frame_index)


def test_rotations_and_flips(tmp_path: Path) -> None:
    """All eight orientations, against the display matrix applied point by point."""
    corner = np.full((48, 64, 3), 128, np.uint8)
    corner[:16, :16], corner[:16, -16:], corner[-16:, :16] = (235, 0, 0), (0, 235, 0), (0, 0, 235)
    for degrees in (0, 90, 180, 270):
        for hflip, vflip in ((False, False), (True, False), (False, True)):
            path = tmp_path / f"{degrees}{hflip}{vflip}.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
                stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(corner, "rgb24")))
                container.mux(stream.encode(None))
            got, _ = read(path, Sampling("all"), None)
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
            sides = {frame.side_data[i].type.name: frame.side_data[i] for i in range(len(frame.side_data))}  # type: ignore
            matrix = np.frombuffer(bytes(sides["DISPLAYMATRIX"]), np.int32) if "DISPLAYMATRIX" in sides else None
            a, b, c, d = (1, 0, 0, 1) if matrix is None else (int(np.sign(matrix[k])) for k in (0, 1, 3, 4))
            down, across = np.mgrid[:48, :64]
            x, y = a * across + c * down, b * across + d * down
            expected = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), np.uint8)
            expected[y - y.min(), x - x.min()] = corner
            assert got.data[0].shape == expected.shape
            assert np.abs(got.data[0].astype(int) - expected).mean() < 4, (degrees, hflip, vflip)


def test_size_that_changes_midway(tmp_path: Path) -> None:
    """Two H.264 streams behind each other: with a transform one size, without one a new batch."""
    parts = [render(tmp_path / f"{n}.h264", range(0, 400, 40), size=s) for n, s in enumerate(((64, 48), (128, 96)))]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with Source(path) as source:
        stream = FrameStream(source, Sampling("all"), batch_size=8)
        shapes = [batch.data.shape for batch in stream]
        assert shapes == [(8, 48, 64, 3), (2, 48, 64, 3), (8, 96, 128, 3), (2, 96, 128, 3)]
        assert any("64 x 48 to 128 x 96" in warning for warning in stream.warnings)
    got, warnings = read(path, Sampling("all"), SMALL)
    assert got.data.shape == (20, 24, 32, 3)
    assert (np.diff(got.pts_seconds) > 0).all()
    assert not any("size" in warning for warning in warnings)


def test_missing_times(tmp_path: Path) -> None:
    """A raw stream has no pts."""
    raw = render(tmp_path / "raw.h264", range(0, 400, 40), options={"bf": "0"})
    got, _ = read(raw, Sampling("all"), None)
    assert numbers(got) == list(range(10))
    assert got.pts_seconds[0] == 0
    assert (np.diff(got.pts_seconds) > 0).all()


# --- damage


def test_damage_midway(tmp_path: Path) -> None:
    """Overwritten packets cost their own frames; the rest comes, in each mode, with the reason."""
    path = render(tmp_path / "good.mp4", range(0, 8000, 40), options={"g": "20", "bf": "2"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    for packet in packets[100:110]:
        assert packet.pos is not None
        data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    whole, warnings = read(bytes(data), Sampling("all"), None)
    assert 150 <= len(whole) < 200
    assert any("damaged packets skipped" in w for w in warnings)
    assert (np.diff(whole.pts_seconds) > 0).all()
    for sampling in (Sampling("fps", fps=5), Sampling("times", times=(0.5, 4.1, 7.5)), Sampling("every", every=10)):
        got, warnings = read(bytes(data), sampling, None)
        np.testing.assert_array_equal(got.data, whole.data[np.searchsorted(whole.pts_seconds, got.pts_seconds)])
        assert set(got.pts_seconds) <= set(whole.pts_seconds)
        assert any("damaged" in w for w in warnings)
        if sampling.mode == "times":
            assert len(got) == 3
    assert numbers(read(bytes(data), Sampling("times", times=(7.0,)), None)[0]) == [175]


def test_truncation(media: Media) -> None:
    """A fragmented file cut in the middle gives its first half."""
    data = media("format/sample_with_increasing_timestamps_320w_240h_fragmented.mp4").read_bytes()
    whole, _ = read(data[: len(data) // 2], Sampling("all"))
    assert 300 < len(whole) < 932
    data = media("natural/flower.mp4").read_bytes()
    whole, warnings = read(data[: len(data) // 2], Sampling("fps"))
    assert any("header promises" in w for w in warnings)


def test_not_one_frame(tmp_path: Path) -> None:
    path = render(tmp_path / "good.mp4", range(0, 400, 40))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in [p for p in container.demux(video=0) if p.size]:
            assert packet.pos is not None
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    for sampling in (Sampling("all"), Sampling("fps")):
        with pytest.raises(CorruptStream, match="no frame") as caught:
            read(bytes(data), sampling)
        assert caught.value.recovered_frames == 0
    with pytest.raises(CorruptStream):
        Source(bytes(data)).probe()
    # and the next file is not disturbed
    assert len(read(path, Sampling("all"))[0]) == 10


# --- threads and memory


def decoding_threads() -> int:
    return sum(thread.name == "keyreel-decode" for thread in threading.enumerate())


def test_the_queue_is_bounded(media: Media) -> None:
    """A consumer that stops leaves the decoder waiting after two batches and one in hand."""
    with Source(media("natural/car-detection.mp4")) as source:
        stream = FrameStream(source, Sampling("all"), transform=SMALL, batch_size=4)
        next(stream)
        made: list[int] = []
        channel = stream._work._queue
        real = channel.put
        channel.put = lambda item: (made.append(1), real(item))[1]  # type: ignore
        time.sleep(0.8)
        busy = stream.decode_seconds
        assert channel._queue.qsize() == 2
        assert len(made) <= 4
        time.sleep(0.3)
        assert stream.decode_seconds == busy  # waiting is not counted
        began = time.perf_counter()
        stream.close()
        stream.close()
        assert time.perf_counter() - began < 1
        assert decoding_threads() == 0
        assert list(stream) == []


def test_a_dropped_stream_ends_its_thread(media: Media) -> None:
    source = Source(media("natural/car-detection.mp4"))
    for batch in FrameStream(source, Sampling("all"), transform=SMALL, batch_size=2):
        assert len(batch) == 2
        break
    gc.collect()
    until = time.monotonic() + 5
    while decoding_threads() and time.monotonic() < until:
        time.sleep(0.02)
    assert decoding_threads() == 0


def test_close_from_another_thread_frees_the_consumer(media: Media) -> None:
    source = Source(media("natural/car-detection.mp4"))
    stream = FrameStream(source, Sampling("keyframes", start_seconds=0.1), transform=SMALL, batch_size=1000)
    threading.Timer(0.05, stream.close).start()
    began = time.perf_counter()
    list(stream)
    assert time.perf_counter() - began < 5


def test_errors_of_the_thread_reach_the_consumer(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, frame: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(Converter, "__call__", fail)
    stream = FrameStream(Source(media("natural/bikes.mp4")), Sampling("fps"))
    with pytest.raises(RuntimeError, match="on purpose"):
        next(stream)
    assert list(stream) == []
    assert decoding_threads() == 0


def test_unsupported_pictures_are_named(media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Converter, "_scale", lambda *_: (_ for _ in ()).throw(ValueError("no such conversion")))
    with pytest.raises(UnsupportedCodec, match="yuv420p"):
        read(media("natural/bikes.mp4"), Sampling("fps"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.full
def test_memory_does_not_grow_with_opens(tmp_path: Path) -> None:
    """Hundreds of streams of mixed sizes, some left early."""
    paths = [render(tmp_path / f"{w}.mp4", range(0, 800, 40), size=(w, 48)) for w in (64, 128, 192)]

    def use(count: int) -> None:
        for n in range(count):
            with Source(paths[n % 3]) as source, FrameStream(source, Sampling("fps", fps=10), batch_size=2) as stream:
                next(stream)
                if n % 2:
                    list(stream)

    use(60)
    gc.collect()
    before = resident_bytes()
    use(300)
    gc.collect()
    assert resident_bytes() - before < 24 << 20
    assert decoding_threads() == 0


@pytest.mark.full
def test_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """1,200 frames of 320 x 240 would be 276 MB as pictures; the stream holds four batches of 2 MB."""
    path = render(tmp_path / "long.mp4", range(1200), size=(320, 240), options={"preset": "ultrafast", "g": "100"})
    before = peak = resident_bytes()
    count = 0
    with Source(path) as source:
        for batch in FrameStream(source, Sampling("all"), batch_size=8):
            count += len(batch)
            peak = max(peak, resident_bytes())
    assert count == 1200
    assert peak - before < 80 << 20


def test_wrong_arguments() -> None:
    source = Source(b"x")
    with pytest.raises(ValueError, match="batch_size"):
        FrameStream(source, Sampling(), batch_size=0)
    with pytest.raises(ValueError, match="threads"):
        FrameStream(source, Sampling(), threads=-1)
