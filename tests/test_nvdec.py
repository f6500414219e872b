"""The device's decoder against the CPU's: same frames by pts, exact samples, seams, pool, fallbacks.

On a machine without a GPU the real PyNvVideoCodec runs on the stub driver of host_nvdec.py; with one, on the driver.
"""

from __future__ import annotations

import gc
import importlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cuda_streams
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from cuda_on_host import HostedCupy
from host_nvdec import HostDecoder, HostNvdec, NotHere, packed
from hub_server import serving
from numpy.typing import NDArray
from test_decode import render

from keyreel.config import DecodeLimits, ImageTransform, Sampling
from keyreel.decode import nvdec, nvdec_pool, runs
from keyreel.decode.color import display_size, orientation_of
from keyreel.decode.nvdec import open_stream
from keyreel.decode.nvdec_pool import DecoderPool, sizes
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import BackendUnavailable, NoFrames, SourceNotFound, UnsupportedCodec
from keyreel.types import FrameBatch
from keyreel_kernels import cuda_pictures, ops_for
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.ops import ops_on
from keyreel_kernels.surfaces import Surface

pytestmark = pytest.mark.full

Media = Callable[[str], Path]
SMALL = ImageTransform(24, 32, "squash")

# What NVDEC takes.
CLAIMED = (
    "format/8k24fps_300ms.mp4",
    "format/bbb_642x642_768kbps_30fps_vp9.webm",
    "format/bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4",
    "format/bbb_800x640_768kbps_30fps_vp9.mp4",
    "format/bt601_full_range.mp4",
    "format/bt601_limited_range.mp4",
    "format/bt709_full_range.mp4",
    "format/carphone_pristine.mp4",
    "format/cursed-vfr.mp4",
    "format/h265_10bits.mp4",
    "format/nasa_13013_rotated.mp4",
    "format/rotate-buck-bunny.mp4",
    "format/sample_with_increasing_timestamps_320w_240h_fragmented.mp4",
    "format/testsrc2_444_10bit_hevc.mp4",
    "format/testsrc2_vp9.webm",
    "format/video_180.mov",
    "format/video_90.mov",
    "broken/discard_first_keyframe.mp4",
    "broken/unordered.mov",
    "natural/bikes.mp4",
    "natural/stream-of-water.mp4",
)
DECLINED = {
    "format/av1_video.mkv": "av1 is not decoded on the device",
    "format/bt2020_10bit.mp4": "PQ .HDR. is tone-mapped on the CPU",
    "format/flower.webm": "vp8 is not decoded on the device",
    "format/h264_10bits.mp4": "NVDEC of this device does not decode h264 4:2:0 of 10 bits",
    "format/h265_video.mp4": "128 x 128: NVDEC decodes hevc 4:2:0 of 8 bits from 144 x 144 on",
    "format/sample.avi": "mpeg4 is not decoded on the device",
    "format/testsrc2_odd_height_and_width_444.mp4": "NVDEC of this device does not decode h264 4:4:4 of 8 bits",
    "format/testsrc2_odd_height_and_width_vp9.mp4": "321 x 241: NVDEC's 4:2:0 surfaces have even sides",
}


class Device:
    """A device, a pool of its own, and operations that show exact samples instead of colours."""

    def __init__(self, cuda: Cuda, limit: int = 16, **caps: int) -> None:
        self.cuda = cuda
        self.emulated = isinstance(cuda.cupy, HostedCupy)
        self.module: Any = host_module(**caps) if self.emulated else real_module()
        self.pool = DecoderPool(cuda, self.module, limit)
        self.ops = SimpleNamespace(frames_from_surfaces=self.samples)

    def samples(self, surfaces: list[Surface], *, height: int, width: int, **_: Any) -> Any:
        return self.cuda.to_device(np.stack([samples(s, height, width, self.cuda.to_host) for s in surfaces]))

    def open(self, source: Source, sampling: Sampling, **options: Any) -> Any:
        known: dict[str, Any] = {"transform": SMALL, "batch_size": 7, "strict": False, "workers": 1, "ops": self.ops}
        return open_stream(source, sampling, cuda=self.cuda, pool=self.pool, **known | options)

    def read(self, video: Any, sampling: Sampling, **options: Any) -> tuple[FrameBatch, tuple[str, ...]]:
        with Source(video) as source, self.open(source, sampling, **options) as stream:
            batches = list(stream)
        for batch in batches:
            assert isinstance(batch.data, self.cuda.cupy.ndarray)
        return whole(batches, self.cuda.to_host), stream.warnings


def real_module() -> Any:
    try:
        return importlib.import_module("PyNvVideoCodec")
    except Exception as error:  # RuntimeError without the driver's libraries
        if os.environ.get("KEYREEL_FAIL_WITHOUT_CUDA") == "1":
            raise
        pytest.skip(f"no PyNvVideoCodec: {type(error).__name__}")


def host_module(**caps: int) -> HostNvdec:
    try:
        return HostNvdec(**caps)
    except NotHere as error:
        pytest.skip(str(error))


@pytest.fixture
def device(cuda: Cuda) -> Device:
    return Device(cuda)


@pytest.fixture
def host(device: Device) -> Device:
    """The stand-in, where a test makes it fail or counts what it did."""
    if not device.emulated:
        pytest.skip("the real decoder cannot be made to fail")
    return device


def whole(batches: list[FrameBatch], to_host: Callable[[Any], Any] = lambda array: array) -> FrameBatch:
    return FrameBatch(
        np.concatenate([to_host(b.data) for b in batches]),
        np.concatenate([b.pts_seconds for b in batches]),
        np.concatenate([b.frame_index for b in batches]),
    )


def samples(surface: Surface, height: int, width: int, to_host: Callable[[Any], Any]) -> NDArray[np.uint8]:
    """[height, width, 3]: Y, U and V as coded at places all over the picture; in a corner how it is to be shown."""
    planes = [to_host(plane) for plane in surface.planes]
    chroma = [planes[1][..., 0], planes[1][..., 1]] if len(planes) == 2 else planes[1:]
    picked = []
    for plane in (planes[0], *chroma):
        rows, columns = (
            np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(plane.shape, (height, width), strict=True)
        )
        values = plane[rows][:, columns].astype(np.int64)
        # Every bit of deep samples counts.
        picked.append(values % 251 if plane.dtype.itemsize > 1 else values)
    picture = np.stack(picked, -1).astype(np.uint8)
    standard = ("bt601", "bt709", "bt2020").index(surface.standard)
    transpose, *flips = surface.orientation
    picture[0, 0] = (standard + 4 * surface.full_range, transpose + 2 * flips[0] + 4 * flips[1], surface.bits)
    picture[0, 1] = (surface.display[0] % 256, surface.display[1] % 256, surface.display[1] // 256)
    return picture


def surface_of(frame: av.VideoFrame, ratio: Fraction | None) -> Surface:
    rows, height, width = packed(frame), frame.height, frame.width
    planes: tuple[Any, ...] = (rows[:height], rows[height : 2 * height], rows[2 * height :])
    if "420" in frame.format.name:
        planes = (rows[:height], rows[height:].reshape(height // 2, width // 2, 2))
    standard = {1: "bt709", 9: "bt2020"}.get(frame.colorspace, "bt601")
    if frame.colorspace == 2:
        standard = "bt601" if height <= 576 else "bt709"
    orientation = orientation_of(frame)
    full = frame.color_range == ColorRange.JPEG
    return Surface(planes, frame.format.components[0].bits, standard, full, display_size(frame, ratio), orientation)


@cache
def expected(path: Path) -> NDArray[np.uint8]:
    """[T, 24, 32, 3] samples of all frames, decoded by FFmpeg in one thread, frame by frame."""
    pictures = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            pictures.append(samples(surface_of(frame, stream.sample_aspect_ratio), 24, 32, np.asarray))
    return np.stack(pictures)


def on_cpu(video: Any, sampling: Sampling) -> FrameBatch:
    with Source(video) as source, FrameStream(source, sampling, transform=ImageTransform(8, 8, "squash")) as stream:
        return whole(list(stream))


def check(device: Device, path: Path, sampling: Sampling, **options: Any) -> FrameBatch:
    """The same frames at the same times as on the CPU, each with exactly the samples of its pts; not by the CPU."""
    got, warnings = device.read(path, sampling, **options)
    assert [w for w in warnings if "decoded on the CPU" in w] == []
    reference = on_cpu(path, sampling)
    np.testing.assert_array_equal(got.frame_index, reference.frame_index)
    np.testing.assert_array_equal(got.pts_seconds, reference.pts_seconds)
    np.testing.assert_array_equal(got.data, expected(path)[got.frame_index])
    return got


# --- every clip, every mode


@pytest.mark.parametrize(("name", "count"), [(name, 1 + 2 * (n % 2)) for n, name in enumerate(CLAIMED)])
def test_every_clip_gives_the_same_samples(device: Device, media: Media, name: str, count: int) -> None:
    got = check(device, media(name), Sampling("all"), workers=count)
    assert len(got) == len(expected(media(name)))


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_what_is_not_decoded_on_the_device(host: Device, media: Media, name: str) -> None:
    """Under `auto` the CPU's pictures and the reason, with a demand an error."""
    sampling = Sampling("every", every=11)
    got, (reason, *_) = host.read(media(name), sampling)
    assert reason.startswith("decoded on the CPU: ")
    assert host.module.created == 0
    with Source(media(name)) as source, FrameStream(source, sampling, transform=SMALL) as stream:
        np.testing.assert_array_equal(got.data, whole(list(stream)).data)
    with pytest.raises(UnsupportedCodec, match=DECLINED[name]), Source(media(name)) as source:
        host.open(source, sampling, strict=True)


@pytest.mark.parametrize(
    "wanted",
    [
        Sampling("fps", fps=2.3),
        Sampling("fps", fps=7, start_seconds=1.3, stop_seconds=2.9),
        Sampling("every", every=13),
        Sampling("every", every=5, start_seconds=2.0),
        Sampling("times", times=(3.1, 0.4, 0.4, 99.0, 2.2, 1.7, 2.9, 0.0, 3.05)),
        Sampling("times", times=(0.2,)),
        Sampling("keyframes"),
        Sampling("all", start_seconds=1.0, stop_seconds=1.2),
    ],
    ids=lambda s: f"{s.mode}-{s.start_seconds:g}",
)
@pytest.mark.parametrize(
    "name",
    [
        "natural/bikes.mp4",
        "natural/stream-of-water.mp4",
        "format/bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4",
        "format/bbb_800x640_768kbps_30fps_vp9.mp4",
    ],
)
def test_every_mode(device: Device, media: Media, name: str, wanted: Sampling) -> None:
    check(device, media(name), wanted, workers=2)


def test_colours(device: Device, media: Media) -> None:
    """Rotated, 10 bits, 4:4:4: exactly what the definition makes of the planes, the kernels within a level."""
    cpu = ops_for("cpu")

    def convert(surfaces: list[Surface], **how: Any) -> Any:
        here = [replace(s, planes=tuple(device.cuda.to_host(p) for p in s.planes)) for s in surfaces]
        return device.cuda.to_device(cpu.frames_from_surfaces(here, **how))

    ops = SimpleNamespace(frames_from_surfaces=convert)
    for name in ("nasa_13013_rotated.mp4", "video_90.mov", "h265_10bits.mp4", "testsrc2_444_10bit_hevc.mp4"):
        path = media(f"format/{name}")
        for transform in (None, ImageTransform(40, 40, "shortest"), ImageTransform(50, 60, "fit", "area")):
            got, _ = device.read(path, Sampling("every", every=9), transform=transform, ops=ops)
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                surfaces = [surface_of(f, stream.sample_aspect_ratio) for f in container.decode(stream)][::9]
            height, width = surfaces[0].display
            how = transform or ImageTransform(height, width, "squash")
            wanted = cpu.frames_from_surfaces(
                surfaces, height=how.height, width=how.width, mode=how.mode, interpolation=how.interpolation
            )
            np.testing.assert_array_equal(got.data, wanted)
            kernels, _ = device.read(path, Sampling("every", every=9), transform=transform, ops=ops_on(device.cuda))
            assert np.abs(kernels.data.astype(int) - wanted).max() <= 1
            # The CPU's pictures are of the same shape and colours.
            with Source(path) as source, FrameStream(source, Sampling("every", every=9), transform=transform) as frames:
                other = whole(list(frames)).data
            assert other.shape == got.data.shape
            assert np.abs(other.astype(int) - got.data).mean() < 2


def test_containers(device: Device, tmp_path: Path) -> None:
    """Planned in each container; without any pts, the CPU decodes."""
    for codec, suffix in (("libx264", "ts"), ("libx265", "ts"), ("libx264", "mkv"), ("libx265", "mkv")):
        path = render(tmp_path / f"{codec}.{suffix}", range(40), base=Fraction(1, 25), codec=codec, size=(160, 144))
        check(device, path, Sampling("all"))
        check(device, path, Sampling("every", every=7, start_seconds=0.3))
        check(device, path, Sampling("times", times=(1.1, 0.2, 0.25)))
    path = render(tmp_path / "clip.avi", range(40), base=Fraction(1, 25), options={"g": "8", "bf": "0"})
    check(device, path, Sampling("every", every=3))
    path = render(tmp_path / "clip.h264", range(40), base=Fraction(1, 25), options={"g": "8", "bf": "0"})
    got, (reason, *_) = device.read(path, Sampling("every", every=3), transform=None)
    assert "decoded on the CPU: it has packets with no pts of their own" in reason
    assert got.frame_index.tolist() == list(range(0, 40, 3))


# --- what is fed


def test_only_what_is_needed_is_fed(host: Device, media: Media) -> None:
    path = media("format/bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4")
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    check(host, path, Sampling("keyframes"))
    assert host.module.fed == sum(p.is_keyframe for p in packets)


class Bits:
    def __init__(self) -> None:
        self.text = ""

    def put(self, *fields: tuple[int, int]) -> Bits:
        self.text += "".join(f"{value:0{count}b}" for value, count in fields)
        return self

    def data(self, length: int = 40) -> bytes:
        return int(self.text.ljust(8 * length, "1"), 2).to_bytes(length, "big")


def test_sizes_in_vp9_headers(media: Media) -> None:
    with av.open(str(media("format/bbb_642x642_768kbps_30fps_vp9.webm"))) as container:
        for packet in container.demux(video=0):
            if packet.size:
                assert sizes("vp9", bytes(packet)) == ({(642, 642)} if packet.is_keyframe else set())
    size, sync, refs = ((1279, 16), (719, 16)), (0x498342, 24), ((3, 8), (0, 12))
    begin = (2, 2), (0, 2), (0, 1)  # marker, profile 0, not a repeated frame
    key = Bits().put(*begin, (0, 1), (1, 1), (0, 1), sync, (1, 3), (0, 1), *size).data()
    assert sizes("vp9", key) == {(1280, 720)}
    inter = Bits().put(*begin, (1, 1), (1, 1), (0, 1), (0, 2), *refs, (0, 3), *size).data()
    assert sizes("vp9", inter) == {(1280, 720)}
    same = Bits().put(*begin, (1, 1), (1, 1), (0, 1), (0, 2), *refs, (0, 1), (1, 1), *size).data()
    assert sizes("vp9", same) == set()
    assert sizes("vp9", Bits().put((2, 2), (0, 2), (1, 1), (0, 3)).data(1)) == set()
    marker = 0b110_01_001  # two frames, sizes of two bytes
    index = bytes([marker, *len(key).to_bytes(2, "little"), *len(same).to_bytes(2, "little"), marker])
    assert sizes("vp9", key + same + index) == {(1280, 720)}
    smaller = Bits().put(*begin, (0, 1), (1, 1), (0, 1), sync, (1, 3), (0, 1), (639, 16), (359, 16)).data()
    assert sizes("vp9", smaller + key + index) == {(640, 360), (1280, 720)}
    assert sizes("vp9", b"") == set()


def test_parameter_sets() -> None:
    assert sizes("h264", b"\0\0\0\1\x67abc\0\0\1\x68d\0\0\0\1\x65e") == {b"\x67abc"}
    assert sizes("hevc", b"\0\0\1\x40ab\0\0\1\x42cd\0\0\0\1\x26e") == {b"\x42cd"}


# --- seams


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "12", "bf": "3"}),
        ("libx264", {"g": "24", "bf": "3", "x264-params": "open-gop=1:keyint=24:min-keyint=24:scenecut=0"}),
        ("libx265", {"x265-params": "open-gop=1:keyint=16:min-keyint=16:bframes=4:scenecut=0:log-level=none"}),
        ("libx264", {"g": "1000", "bf": "2", "sc_threshold": "0"}),
    ],
    ids=["closed", "open", "open-hevc", "one-group"],
)
@pytest.mark.parametrize("count", [1, 4])
def test_seams_are_exact(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, options: dict[str, str], count: int
) -> None:
    monkeypatch.setattr(runs, "_PART_PACKETS", 8)
    path = render(tmp_path / "long.mp4", range(0, 8_000, 40), codec=codec, options=options, size=(160, 144))
    for wanted in (
        Sampling("all"),
        Sampling("every", every=3, start_seconds=1.0),
        Sampling("fps", fps=3),
        Sampling("times", times=tuple(np.linspace(0, 7.9, 40))),
        Sampling("keyframes"),
    ):
        check(device, path, wanted, workers=count)
    if device.emulated:
        many = count > 1 and options.get("g") != "1000"
        assert (device.module.most_alive > 1) == many
        assert device.module.most_alive <= count + 1  # and one that failed, as long as its error is looked at


@pytest.mark.parametrize(("most", "waiting"), [({"_READ_PACKETS": 5}, 5), ({"_READ_BYTES": 0}, 1)])
def test_lanes_read_in_turn_and_decode_side_by_side(
    host: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: dict[str, int], waiting: int
) -> None:
    for name, value in (most | {"_PART_PACKETS": 8}).items():
        monkeypatch.setattr(runs, name, value)
    path = render(tmp_path / "long.mp4", range(0, 6_000, 40), options={"g": "12", "bf": "2"}, size=(160, 144))
    prepare, decode = nvdec.NvWorker.prepare, nvdec.NvWorker.decode
    reads: list[Any] = []
    fed: Counter[Any] = Counter()
    ahead: list[int] = []
    together = threading.Barrier(3)

    def slowly(worker: Any, packet: Any) -> Any:
        time.sleep(0.001)  # lets the others run
        reads.append(worker)
        ahead.append(reads.count(worker) - fed[worker])
        return prepare(worker, packet)

    def side_by_side(worker: Any, packet: Any, **how: Any) -> Any:
        if not fed[worker]:
            together.wait(20)
        fed[worker] += packet is not None
        return decode(worker, packet, **how)

    monkeypatch.setattr(nvdec.NvWorker, "prepare", slowly)
    monkeypatch.setattr(nvdec.NvWorker, "decode", side_by_side)
    check(host, path, Sampling("all"), workers=3)
    assert len(reads) == fed.total() == 150
    assert max(ahead) == waiting
    turns = 1 + sum(one is not other for one, other in pairwise(reads))
    assert turns <= 13 * -(-12 // waiting)  # 13 parts of 12 packets


def test_lanes_at_a_server_do_not_wait_for_each_other(
    host: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_PART_PACKETS", 8)
    path = render(tmp_path / "long.mp4", range(0, 6_000, 40), options={"g": "12", "bf": "2"}, size=(160, 144))
    prepare, seen, together = nvdec.NvWorker.prepare, set[Any](), threading.Barrier(3)

    def side_by_side(worker: Any, packet: Any) -> Any:
        if worker not in seen:
            seen.add(worker)
            together.wait(20)
        return prepare(worker, packet)

    monkeypatch.setattr(nvdec.NvWorker, "prepare", side_by_side)
    with serving({"my/films/a.mp4": path.read_bytes()}) as hub:
        url, limits = f"{hub.url}/my/films/resolve/main/a.mp4", DecodeLimits(allow_network=True)
        with Source(url, limits=limits) as source, host.open(source, Sampling("all"), workers=3) as stream:
            assert sum(len(batch) for batch in stream) == 150
    assert len(seen) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_a_packet_that_the_filter_refuses(
    host: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Only its picture is lost, though packets are filtered before those ahead of them are decoded."""
    monkeypatch.setattr(runs, "_PART_PACKETS", 8)
    path = render(tmp_path / "long.mp4", range(0, 4_000, 40), options={"g": "10", "bf": "0", "refs": "1"})
    make = nvdec.BitStreamFilterContext

    class Refusing:
        def __init__(self, *args: Any) -> None:
            self._real = make(*args)

        def filter(self, packet: Any) -> Any:
            if packet.pts * packet.time_base == Fraction(69, 25):
                raise av.error.InvalidDataError(1, "Invalid data found when processing input")
            return self._real.filter(packet)

    monkeypatch.setattr(nvdec, "BitStreamFilterContext", Refusing)
    got, warnings = host.read(path, Sampling("every", every=1), workers=count)
    assert got.pts_seconds.tolist() == pytest.approx([n / 25 for n in range(100) if n != 69])
    assert warnings == ("damaged packets skipped: 1 (first: Invalid data found when processing input)",)
    assert host.pool.busy == 0


# --- the pool


def test_clips_that_differ_in_their_parameter_sets_only(device: Device, tmp_path: Path) -> None:
    """1280 x 532 and 1280 x 530 are coded alike, as are two streams with other references; in many orders."""
    paths = [render(tmp_path / f"{h}.mp4", range(0, 400, 40), size=(1280, h)) for h in (532, 530)]
    options = {"g": "8", "bf": "3", "refs": "8"}
    paths.append(render(tmp_path / "references.mp4", range(0, 400, 40), size=(1280, 532), options=options))
    for path in (*paths, *paths, *reversed(paths)):
        check(device, path, Sampling("all"))
    if device.emulated:
        assert device.module.created == 3
        assert device.module.driver.resized == 0


def test_hundreds_of_opens(host: Device, tmp_path: Path) -> None:
    """Of mixed sizes, some left early: few decoders are open, all of them at rest at the end, every frame right."""
    host.pool.limit = 4
    sizes = [(64, 48), (128, 48), (64, 96), (192, 64), (256, 48), (64, 128)]
    paths = [render(tmp_path / f"{n}.mp4", range(0, 1000, 40), size=size) for n, size in enumerate(sizes)]
    for n in range(200):
        path = paths[n * n % 6]
        if n % 3:
            with Source(path) as source, host.open(source, Sampling("every", every=4), batch_size=1) as stream:
                assert host.cuda.to_host(next(stream).data).tolist() == expected(path)[:1].tolist()
        else:
            check(host, path, Sampling("times", times=(0.3 + n / 1000,)))
        assert host.pool.busy == 0
    gc.collect()
    assert host.pool.idle == len(host.module.alive) <= 4
    assert host.module.most_alive <= 5
    assert host.module.created < 200
    host.pool.close()
    gc.collect()
    assert len(host.module.alive) == 0


def test_short_looks_into_one_file_share_a_decoder(host: Device, media: Media) -> None:
    """Each begins a sequence again, which PyNvVideoCodec answers with 1 surface."""
    path = media("natural/bikes.mp4")
    with Source(path) as source:
        for start in np.linspace(0, 9, 12):
            wanted = Sampling("all", start_seconds=float(start), stop_seconds=float(start) + 0.3)
            with host.open(source, wanted, workers=7) as stream:
                got = whole(list(stream), host.cuda.to_host)
            np.testing.assert_array_equal(got.data, expected(path)[got.frame_index])
            assert len(got) in (7, 8)
    assert host.module.created == 1
    assert host.module.driver.sequences > 3


def test_streams_at_the_same_time_have_their_own_decoders(
    host: Device, media: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in fails when two threads meet in one decoder; the limit is passed for streams, not for lanes."""
    host.pool.limit = 2
    path = media("natural/bikes.mp4")
    wrong: list[str] = []
    busy: list[int] = []
    take = host.pool.take
    monkeypatch.setattr(host.pool, "take", lambda *args, **how: (take(*args, **how), busy.append(host.pool.busy))[0])

    def use() -> None:
        got, warnings = host.read(path, Sampling("every", every=2), workers=3)
        if warnings or not np.array_equal(got.data, expected(path)[got.frame_index]):
            wrong.append(str(warnings))

    expected(path)
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert host.pool.busy == 0
    assert host.pool.idle <= 2
    # One for each stream; what the first ones took beside that, they took while there were fewer than the limit.
    assert max(busy) <= 4 + host.pool.limit - 1


def test_a_stream_left_early_is_closed_and_its_decoder_drained(host: Device, media: Media) -> None:
    path = media("natural/bikes.mp4")
    for count in (1, 3):
        with Source(path) as source:
            stream = host.open(source, Sampling("all"), batch_size=2, workers=count)
            next(stream)
            stream.close()
        assert host.pool.busy == 0
        assert host.pool.idle > 0
        check(host, path, Sampling("every", every=20))


# --- streams


def _no_wait(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.cuda.stream, "wait_event", lambda _: None)


def _no_keeping(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "_let_go", lambda _, stacked, __: stacked.clear())


def _no_join(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.cuda, "join", lambda: None)


def _no_wait_to_let_go(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.cuda.decoding, "wait_event", lambda _: None)


def _another_stream(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    create = host.module.CreateDecoder
    monkeypatch.setattr(
        host.module, "CreateDecoder", lambda **how: create(**how | {"cudastream": host.cuda.stream.ptr}), raising=False
    )


def _surfaces_of_another_stream(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = host.cuda.cupy.empty

    def taken(*how: Any) -> Any:
        with host.cuda.scope(host.cuda.stream):
            return empty(*how)

    monkeypatch.setattr(host.cuda.cupy, "empty", taken)


def _planes_read_on_another_stream(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = cuda_pictures.frames_from_surfaces

    def converted(cuda: Cuda, *surfaces: Any, **how: Any) -> Any:
        with cuda.scope(cuda.stream):
            return convert(cuda, *surfaces, **how)

    monkeypatch.setattr(cuda_pictures, "frames_from_surfaces", converted)


def _planes_freed_early(host: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = cuda_pictures._describe_planes
    monkeypatch.setattr(
        cuda_pictures, "_describe_planes", lambda source, planes: describe(source, [plane.copy() for plane in planes])
    )


def faults_of_reading(host: Device, path: Path, *, strict: bool = True) -> list[str]:
    """What cuda_streams.py finds while a caller uses batches on a stream of its own."""
    ops, here = ops_on(host.cuda), host.cuda.cupy.cuda.Device(host.cuda.index)
    ends, kept = suppress(cuda_streams.Fault, BackendUnavailable), []
    with here, host.cuda.cupy.cuda.Stream() as callers, Source(path) as source, ends:
        with host.open(source, Sampling("every", every=3), ops=ops, batch_size=4, strict=strict) as stream:
            kept += [(batch.data, batch.data + batch.data) for batch in stream]
        callers.synchronize()  # not earlier: it would put all work in order
    kept.clear()
    gc.collect()
    found = [*cuda_streams.faults]
    cuda_streams.faults.clear()
    return found


@pytest.mark.parametrize(
    ("taken_out", "said"),
    [
        (None, None),
        (_no_wait_to_let_go, "is freed while"),
        (_surfaces_of_another_stream, "is freed while"),
        (_planes_read_on_another_stream, "does not wait for it"),
        (_planes_freed_early, "was freed"),
        (_no_wait, "does not wait for it"),
        (_no_keeping, "is freed while"),
        (_no_join, "does not wait for it"),
        (_another_stream, "does not wait for it"),
    ],
)
def test_each_join_is_needed(
    host: Device, media: Media, monkeypatch: pytest.MonkeyPatch, taken_out: Any, said: str | None
) -> None:
    """Without one of them, cuda_streams.py finds work of two streams that nothing orders, or on freed memory."""
    if taken_out is not None:
        taken_out(host, monkeypatch)
    found = faults_of_reading(host, media("natural/bikes.mp4"))
    assert found == [] if said is None else any(said in fault for fault in found)


@pytest.mark.parametrize("joined", [True, False])
def test_pictures_of_the_cpu_are_joined_too(
    host: Device, media: Media, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    if not joined:
        _no_join(host, monkeypatch)
    found = faults_of_reading(host, media("format/sample.avi"), strict=False)
    assert found == [] if joined else any("does not wait for it" in fault for fault in found)


# --- failures


@pytest.mark.parametrize("count", [1, 3])
def test_damage_is_a_warning_and_not_a_line_of_output(
    device: Device, media: Media, tmp_path: Path, capfd: pytest.CaptureFixture[str], count: int
) -> None:
    """PyNvVideoCodec prints it; what others print meanwhile still comes out."""
    data = bytearray(media("natural/bikes.mp4").read_bytes())
    with av.open(str(media("natural/bikes.mp4"))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for place in (40, 130):
            begin, size = packets[place].pos, packets[place].size
            data[begin + size // 3 : begin + size] = bytes([0x5A]) * (size - size // 3)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with Source(path) as source, FrameStream(source, Sampling("all"), transform=SMALL) as stream:
        reference = whole(list(stream))
    with Source(path) as source, device.open(source, Sampling("all"), workers=count) as frames:
        batches = [next(frames)]
        os.write(1, b"meanwhile\n")
        batches += list(frames)
    assert capfd.readouterr().out == "meanwhile\n"
    got = whole(batches, device.cuda.to_host)
    np.testing.assert_array_equal(got.frame_index, reference.frame_index)
    if not device.emulated:  # how much NVDEC finds damaged is its own business
        assert any(warning.startswith("frames damaged") for warning in frames.warnings)
        return
    assert [w for w in frames.warnings if "damaged" in w] == [w for w in stream.warnings if "damaged" in w] != []
    assert device.module.driver.damaged > 0


@pytest.mark.parametrize(
    ("at", "count", "mode"),
    [
        (1, 1, "all"),
        (2, 3, "all"),
        (120, 3, "all"),
        (251, 1, "all"),
        (40, 1, "times"),
        (120, 3, "times"),
        (60, 3, "every"),
    ],
)
def test_a_failure_on_the_way(
    host: Device, media: Media, monkeypatch: pytest.MonkeyPatch, at: int, count: int, mode: Any
) -> None:
    """The CPU goes on where the device stopped, nothing twice and nothing lost; the decoder is forgotten."""
    monkeypatch.setattr(runs, "_PART_PACKETS", 8)
    path = media("natural/bikes.mp4")
    wanted = Sampling(mode, every=2, times=tuple(np.linspace(0, 9.9, 60)) if mode == "times" else ())
    reference = on_cpu(path, wanted)
    host.module.fail_at = at
    got, warnings = host.read(path, wanted, workers=count)
    np.testing.assert_array_equal(got.frame_index, reference.frame_index)
    np.testing.assert_array_equal(got.pts_seconds, reference.pts_seconds)
    assert sum("Error code : 999" in warning for warning in warnings) == 1
    # The device's samples up to some place, then the CPU's colours.
    same = (got.data == expected(path)[got.frame_index]).all((1, 2, 3))
    first = int(np.argmin(same))
    assert not same[first:].any()
    shown = f" after {got.pts_seconds[first - 1]:.3f} s" if first else ""
    assert warnings[0].startswith(f"decoded on the CPU{shown}: NVDEC: HandlePicture")
    with Source(path) as source, FrameStream(source, wanted, transform=SMALL) as stream:
        np.testing.assert_array_equal(got.data[first:], whole(list(stream)).data[first:])
    gc.collect()
    assert host.pool.busy == 0
    assert not any(ref() for ref in host.module.failed)
    check(host, path, Sampling("every", every=10))
    # With a demand there is no other way.
    host.module.fail_at = host.module.calls + 2
    with pytest.raises(BackendUnavailable, match="Error code : 999") as failed:
        host.read(path, wanted, workers=count, strict=True)
    assert failed.value.probe == "nvdec"
    assert host.pool.busy == 0


def _no_decoder(host: Device, _: pytest.MonkeyPatch) -> None:
    host.module.refuse = "CUDA_ERROR_OUT_OF_MEMORY"


def _damaged_parameter_sets(_: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise av.error.InvalidDataError(1, "Invalid data found when processing input")

    monkeypatch.setattr(nvdec, "BitStreamFilterContext", refuse)


def _another_shape(_: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec_pool.Format, "rows", (100, 640))


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (_no_decoder, "NVDEC makes no decoder: CUDA_ERROR_OUT_OF_MEMORY"),
        (_damaged_parameter_sets, "its parameter sets are damaged: Invalid data found when processing input"),
        (_another_shape, "NVDEC gives surfaces"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_failure_at_the_start(
    host: Device, media: Media, monkeypatch: pytest.MonkeyPatch, fail: Any, said: str, count: int
) -> None:
    """No decoder is kept, the CPU decodes; with a demand it is an error."""
    fail(host, monkeypatch)
    path, wanted = media("natural/bikes.mp4"), Sampling("every", every=25)
    got, (reason,) = host.read(path, wanted, workers=count)
    assert reason.startswith(f"decoded on the CPU: {said}")
    assert len(got) == 10
    with pytest.raises(BackendUnavailable, match=said):
        host.read(path, wanted, workers=count, strict=True)
    assert host.pool.busy == 0
    assert host.pool.idle == 0 or count > 1  # other workers may have stopped before they failed


def test_a_size_that_changes_on_the_way(host: Device, tmp_path: Path) -> None:
    """The real decoder would scale the second size to the first without a word."""
    data = b"".join(
        render(tmp_path / f"{n}.ts", range(n * 25, n * 25 + 25), base=Fraction(1, 25), size=size).read_bytes()
        for n, size in enumerate([(64, 48), (128, 96)])
    )
    got, (reason, *_) = host.read(data, Sampling("all"), transform=ImageTransform(48, 64, "squash"))
    assert "the size or the format of its pictures may change on the way" in reason
    assert host.module.driver.resized == 0
    assert len(got) == 50


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_that_does_not_come(host: Device, media: Media, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The rest is not shown in the places of other frames."""
    real = HostDecoder.Decode
    monkeypatch.setattr(HostDecoder, "Decode", lambda self, p: [f for f in real(self, p) if f.getPTS() != 51_200])
    path = media("natural/bikes.mp4")
    got, (reason,) = host.read(path, Sampling("all"), workers=count)
    assert reason.startswith("decoded on the CPU after 3.")
    assert "came out of NVDEC out of turn" in reason
    assert got.frame_index.tolist() == list(range(250))
    # A frame that nobody asked for, but that others may need.
    check(host, path, Sampling("times", times=(1.0,)))
    assert host.pool.busy == 0


@pytest.mark.parametrize(
    ("caps", "reason"),
    [
        ({"supported": 0}, "NVDEC of this device does not decode h264 4:2:0 of 8 bits"),
        ({"width_max": 639}, "640 x 272: NVDEC decodes h264 4:2:0 of 8 bits up to 639 x 4096"),
        ({"height_max": 100}, "640 x 272: .* up to 4096 x 100"),
        ({"width_min": 641}, "640 x 272: .* from 641 x 16 on"),
        ({"mb_num_max": 679}, "680 macroblocks: .* up to 679"),
    ],
)
def test_capabilities(cuda: Cuda, media: Media, caps: dict[str, int], reason: str) -> None:
    if not isinstance(cuda.cupy, HostedCupy):
        pytest.skip("the real device has its own capabilities")
    path = media("natural/bikes.mp4")
    device = Device(cuda, **caps)
    _, (warning,) = device.read(path, Sampling("times", times=(1.0,)))
    with pytest.raises(UnsupportedCodec, match=reason) as refused, Source(path) as source:
        device.open(source, Sampling(), strict=True)
    assert warning == f"decoded on the CPU: {refused.value.args[0].removeprefix(f'{path}: ')}"
    assert "device='auto'" in str(refused.value)
    fits = Device(cuda, width_max=640, height_max=272, width_min=640, height_min=272, mb_num_max=680)
    check(fits, path, Sampling("times", times=(1.0,)))


def test_cropped_and_interlaced(host: Device, tmp_path: Path) -> None:
    """A crop that is not at the right and the bottom would be taken for one that is; fields would be deinterlaced."""
    options = {"g": "8", "x264-params": "crop-rect=32,0,0,0"}
    path = render(tmp_path / "crop.mp4", range(0, 400, 40), size=(128, 96), options=options)
    _, (reason, *_) = host.read(path, Sampling("all"))
    assert "a window of 96 x 96 cut out of 128 x 96" in reason
    options = {"g": "8", "bf": "0", "flags": "+ildct", "x264-params": "tff=1"}
    path = render(tmp_path / "fields.mp4", range(0, 400, 40), options=options)
    _, (reason, *_) = host.read(path, Sampling("all"))
    assert "it is interlaced" in reason


def test_without_the_library(cuda: Cuda, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise RuntimeError("libnvidia-encode.so.1: cannot open shared object file\n\n=== TROUBLESHOOTING STEPS ===")

    monkeypatch.setattr(nvdec_pool, "import_module", missing)
    pool = DecoderPool(cuda)
    ops = SimpleNamespace()
    with Source(media("natural/bikes.mp4")) as source:
        with open_stream(source, Sampling(), cuda=cuda, ops=ops, strict=False, pool=pool) as stream:
            assert len(next(stream)) == 20
        (reason,) = stream.warnings
        assert reason == (
            "decoded on the CPU: PyNvVideoCodec cannot be loaded: libnvidia-encode.so.1: cannot open shared object file"
        )
        with pytest.raises(BackendUnavailable, match="cannot open shared object file") as failed:
            open_stream(source, Sampling(), cuda=cuda, ops=ops, strict=True, pool=pool)
    assert failed.value.probe == "nvdec"


def test_errors_of_the_source_come_while_reading(host: Device, tmp_path: Path, media: Media) -> None:
    for strict in (False, True):
        with Source(tmp_path / "none.mp4") as source:
            stream = host.open(source, Sampling(), strict=strict)
            with pytest.raises(SourceNotFound):
                next(stream)
    with Source(media("natural/bikes.mp4")) as source:
        stream = host.open(source, Sampling("all", start_seconds=100))
        with pytest.raises(NoFrames, match="no frame between 100 s"):
            next(stream)
    limits = DecodeLimits(max_pixels=640 * 272)
    with Source(media("natural/bikes.mp4"), limits=limits) as source, pytest.raises(UnsupportedCodec, match="pixels"):
        host.open(source, Sampling(), transform=ImageTransform(800, 800), strict=True)


def test_memory_stays_flat_on_a_long_file(host: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures wait neither in lanes nor in the queue beyond what is stated."""
    path = render(tmp_path / "long.mp4", range(0, 24_000, 40), options={"g": "10", "bf": "2", "preset": "ultrafast"})
    monkeypatch.setattr(runs, "_PART_PACKETS", 10)
    monkeypatch.setattr(nvdec, "_AHEAD_BYTES", 2 * 3 * 24 * 32 * 3 * 4)  # four pictures of each of two parts a lane
    monkeypatch.setattr(nvdec, "_COPIED_BYTES", 64 * 72 * 2)
    made: list[int] = []
    convert = host.samples

    def counted(surfaces: list[Surface], **how: Any) -> Any:
        assert len(surfaces) <= 2
        made.append(len(surfaces))
        return convert(surfaces, **how)

    ops = SimpleNamespace(frames_from_surfaces=counted)
    with Source(path) as source, host.open(source, Sampling("all"), workers=3, batch_size=5, ops=ops) as stream:
        taken = 0
        for batch in stream:
            taken += len(batch)
            if taken in (5, 100, 300):
                threading.Event().wait(0.2)
            # Two batches in the queue and one in hand; six parts of four, and a chunk in the hand of each lane.
            assert sum(made) - taken <= 15 + 6 * 4 + 3 * 2 + 2
    assert taken == 600
