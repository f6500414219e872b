"""What packets say of themselves, against what a full decode gives.

Ground truth is FFmpeg: left out, spare packets change no other picture; begun at an entry, decoding gives the same
pictures from there on; and as many pictures come as were counted.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.frame import VideoFrame
from encoded_clips import encode, field_pictures, reordered_pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyreel.decode.bitstream import Coded, Entry, bitstream

CODECS = (
    *("h264", "hevc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "msmpeg4v2"),
    *("msmpeg4v3", "wmv1", "wmv2", "ffv1", "mjpeg", "prores", "png"),
)
SCALES = "ts_number_layers=3:ts_target_bitrate=50,100,200:ts_rate_decimator=4,2,1:ts_periodicity=4:ts_layer_id=0,2,1,2:"
LAYERED = {"error-resilient": "1", "ts-parameters": SCALES + "ts_layering_mode=3"}
TWO_LAYERS = {
    "ts-parameters": "ts_number_layers=2:ts_target_bitrate=50,100:ts_rate_decimator=2,1:ts_periodicity=2:"
    "ts_layer_id=0,1:ts_layering_mode=2"
}
HIDDEN = {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"}


def digest(frame: VideoFrame) -> bytes:
    """Of the pixels, without what pads the rows."""
    found = hashlib.md5()
    if frame.format.is_rgb:
        return hashlib.md5(frame.to_ndarray().tobytes()).digest()
    width = 2 if frame.format.components[0].bits > 8 else 1
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width * width]
        found.update(np.ascontiguousarray(rows))
    return found.digest()


def answers(codec: str, extradata: bytes, packets: Iterable[Packet[Any]]) -> list[Coded]:
    reader = bitstream(codec, extradata)
    assert reader is not None
    found = [
        coded
        for packet in packets
        for coded in reader.read(bytes(packet), key=packet.is_keyframe, disposable=packet.is_disposable)
    ]
    return found + reader.end()


@dataclass
class Clip:
    path: Path
    limit: int = 10_000

    def __post_init__(self) -> None:
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            self.codec = stream.codec_context.codec.canonical_name
            self.extradata = bytes(stream.codec_context.extradata or b"")
            self.packets = list(islice((p for p in container.demux(stream) if p.size), self.limit))

    @cached_property
    def coded(self) -> list[Coded]:
        found = answers(self.codec, self.extradata, self.packets)
        assert len(found) == len(self.packets)
        return found

    @cached_property
    def everything(self) -> dict[int, bytes]:
        """pts -> picture, all of them."""
        found = self.decode(self.packets)
        assert len(dict(found)) == len(found)
        return dict(found)

    def decode(self, packets: Sequence[Packet[Any]], *, after: Sequence[Packet[Any]] = ()) -> list[tuple[int, bytes]]:
        """(pts, picture) of what comes out of a decoder that is new, or that is flushed after some packets."""
        with av.open(str(self.path)) as container:
            context = container.streams.video[0].codec_context
            context.thread_count = 1
            if after:
                context.thread_type, context.thread_count = "AUTO", 2
                for packet in [*after, None]:
                    context.decode(packet)
                context.flush_buffers()
            return [(frame.pts, digest(frame)) for packet in [*packets, None] for frame in context.decode(packet)]

    def share(self) -> float:
        return sum(coded.spare for coded in self.coded) / len(self.coded)

    def entries(self) -> set[Entry]:
        """Kinds of entries after the first packet."""
        return {coded.entry for coded in self.coded[1:]} - {Entry.NONE}

    def check_counts(self) -> None:
        assert all(coded.certain for coded in self.coded)
        assert sum(coded.shown for coded in self.coded) == len(self.everything)

    def check_spares(self, seeds: int = 2) -> None:
        chances = [1.0] + [0.3 + 0.3 * seed for seed in range(seeds)]
        for seed, chance in enumerate(chances if self.share() else []):
            drawn = random.Random(seed)
            left_out = [coded.spare and drawn.random() < chance for coded in self.coded]
            kept = self.decode([p for p, out in zip(self.packets, left_out, strict=True) if not out])
            gone = {p.pts for p, out in zip(self.packets, left_out, strict=True) if out}
            assert dict(kept) == {pts: picture for pts, picture in self.everything.items() if pts not in gone}

    def check_entries(self, most: int = 3) -> None:
        places = [n for n, coded in enumerate(self.coded) if n and coded.entry != Entry.NONE]
        for place in sorted(set(places[:1] + places[len(places) // 2 :][: most - 2] + places[-1:])):
            start, left = self.packets[place].pts, self.packets[place:]
            expected = {pts: picture for pts, picture in self.everything.items() if pts >= start}
            new = self.decode(left)
            assert {pts: picture for pts, picture in new if pts >= start} == expected
            needed = [p for p, one in zip(left, self.coded[place:], strict=True) if not one.spare]
            kept = {pts: picture for pts, picture in self.decode(needed) if pts >= start}
            assert kept == {p.pts: expected[p.pts] for p in needed if p.pts in expected}
            flushed = self.decode(left, after=self.packets[:7])
            assert {pts: picture for pts, picture in flushed if pts >= start} == expected
            # What comes of a stream that begins there; H.264 does not say, of what leads an open entry.
            again = answers(self.codec, self.extradata, left)
            if all(coded.certain for coded in again):
                assert sum(coded.shown for coded in again) == len(new)
            else:
                assert self.codec == "h264"
                assert self.coded[place].entry == Entry.OPEN

    def check_tails(self) -> None:
        """What was fed comes out, whatever would have followed."""
        for stop in random.Random(0).sample(range(1, len(self.packets)), 2):
            fed = {p.pts for p in self.packets[:stop]}
            found = dict(self.decode(self.packets[:stop]))
            assert found == {pts: picture for pts, picture in self.everything.items() if pts in fed}

    def check(self) -> None:
        self.check_counts()
        self.check_tails()
        self.check_spares()
        self.check_entries()


def x264(**values: Any) -> dict[str, str]:
    """bf, refs and the like are FFmpeg's; what has a dash in it is x264's."""
    own = {name: value for name, value in values.items() if "_" in name}
    options = {name: str(value) for name, value in values.items() if "_" not in name}
    return {**options, "x264-params": ":".join(f"{name.replace('_', '-')}={value}" for name, value in own.items())}


def x265(params: str) -> dict[str, str]:
    return {"x265-params": params}


def svt(params: str) -> dict[str, str]:
    return {"svtav1-params": params}


CLOSED, OPEN = {Entry.CLOSED}, {Entry.OPEN}
# Name: encoder, settings, least share of spare packets, kinds of entries.
CASES: dict[str, tuple[str, dict[str, Any], float, set[Entry]]] = {
    "x264": ("libx264", {}, 0.3, CLOSED),
    "x264 in TS": ("libx264", {"container": "ts"}, 0.3, CLOSED),
    "x264 in FLV": ("libx264", {"container": "flv", "vfr": True}, 0.3, CLOSED),
    "x264 in AVI": ("libx264", {"container": "avi"}, 0.3, CLOSED),
    "x264 no B": ("libx264", {"options": x264(bf=0)}, 0.0, CLOSED),
    "x264 8 B": ("libx264", {"options": x264(bf=8, b_pyramid="none", b_adapt=0)}, 0.7, CLOSED),
    "x264 pyramid": ("libx264", {"options": x264(bf=8, b_pyramid="normal", b_adapt=0)}, 0.6, CLOSED),
    "x264 strict": ("libx264", {"options": x264(bf=3, b_pyramid="strict", b_adapt=0), "vfr": True}, 0.4, CLOSED),
    "x264 weights": ("libx264", {"options": x264(bf=4, refs=8, weightp_=2, weightb_=1)}, 0.3, CLOSED),
    "x264 refresh": ("libx264", {"options": x264(bf=2, intra_refresh=1)}, 0.3, set()),
    "x264 open": ("libx264", {"options": x264(bf=3, open_gop=1), "container": "mkv"}, 0.3, OPEN),
    "x264 open pyramid": ("libx264", {"options": x264(bf=5, refs=6, open_gop=1, b_adapt=0)}, 0.6, OPEN),
    "x264 open 4": ("libx264", {"options": x264(bf=5, open_gop=1, b_adapt=0, cabac_=0), "gop": 4}, 0.4, OPEN),
    "x264 open TS": ("libx264", {"options": x264(bf=3, open_gop=1, bluray_compat=1), "container": "ts"}, 0.3, OPEN),
    "x264 slices": ("libx264", {"options": x264(slices=4), "container": "ts"}, 0.3, CLOSED),
    "x264 MBAFF": ("libx264", {"options": x264(bf=3, open_gop=1), "interlaced": True}, 0.3, OPEN),
    "x264 fake": ("libx264", {"options": x264(fake_interlaced=1), "container": "ts"}, 0.3, CLOSED),
    "x264 intra": ("libx264", {"gop": 1, "frames": 24}, 0.0, CLOSED),
    "x264 I that is no entry": ("libx264", {"gop": 250, "options": x264(min_keyint=100), "frames": 72}, 0.3, set()),
    "x264 infinite": ("libx264", {"gop": 9999, "options": x264(scenecut_=0)}, 0.3, set()),
    "x265": ("libx265", {}, 0.5, OPEN),
    "x265 in TS": ("libx265", {"container": "ts", "vfr": True}, 0.5, OPEN),
    "x265 repeats": ("libx265", {"options": x265("repeat-headers=1"), "container": "mkv"}, 0.5, OPEN),
    "x265 closed": ("libx265", {"options": x265("open-gop=0")}, 0.5, CLOSED),
    "x265 8 B": ("libx265", {"options": x265("bframes=8:b-adapt=0:b-pyramid=0")}, 0.7, OPEN),
    "x265 two layers": ("libx265", {"options": x265("temporal-layers=2")}, 0.5, OPEN),
    "x265 three layers": ("libx265", {"options": x265("temporal-layers=3:bframes=7:b-adapt=0")}, 0.4, OPEN),
    "x265 RADL": ("libx265", {"options": x265("open-gop=0:radl=2:bframes=4:min-keyint=12:b-adapt=0")}, 0.4, CLOSED),
    "x265 fields": ("libx265", {"options": x265("interlace=tff")}, 0.5, OPEN),
    "SVT-AV1": ("libsvtav1", {}, 0.5, CLOSED),
    "SVT-AV1 in MKV": (
        "libsvtav1",
        {"options": svt("hierarchical-levels=3"), "container": "mkv", "vfr": True},
        0.5,
        CLOSED,
    ),
    "SVT-AV1 infinite": ("libsvtav1", {"gop": 9999}, 0.7, set()),
    "SVT-AV1 low delay": ("libsvtav1", {"options": svt("pred-struct=1")}, 0.4, CLOSED),
    "SVT-AV1 grain": ("libsvtav1", {"options": svt("film-grain=20"), "gop": 24}, 0.5, CLOSED),
    "libvpx": ("libvpx", {"options": HIDDEN, "gop": 30, "frames": 72}, 0.0, CLOSED),
    "libvpx layers": ("libvpx", {"options": LAYERED, "gop": 24}, 0.5, CLOSED),
    "VP9": ("libvpx-vp9", {"options": HIDDEN, "gop": 30, "frames": 72}, 0.0, CLOSED),
    "VP9 in MP4": ("libvpx-vp9", {"options": HIDDEN, "gop": 20, "container": "mp4", "vfr": True}, 0.0, CLOSED),
    "VP9 layers": ("libvpx-vp9", {"options": LAYERED, "gop": 24}, 0.5, CLOSED),
    "VP9 two layers": ("libvpx-vp9", {"options": TWO_LAYERS, "gop": 24}, 0.0, CLOSED),
    "MPEG-1": ("mpeg1video", {"options": {"bf": "2"}}, 0.6, OPEN),
    "MPEG-2": ("mpeg2video", {"options": {"bf": "4"}, "vfr": True}, 0.7, OPEN),
    "MPEG-2 closed": (
        "mpeg2video",
        {"options": {"bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}, "container": "mkv"},
        0.5,
        CLOSED,
    ),
    "MPEG-2 fields": ("mpeg2video", {"options": {"bf": "2"}, "interlaced": True, "container": "vob"}, 0.6, OPEN),
    "MPEG-4": ("mpeg4", {"options": {"bf": "2"}}, 0.6, OPEN),
    "MPEG-4 in MP4": ("mpeg4", {"options": {"bf": "4", "flags": "+qpel"}, "container": "mp4", "vfr": True}, 0.7, OPEN),
    "MPEG-4 fields": ("mpeg4", {"options": {"bf": "2"}, "interlaced": True, "container": "mkv"}, 0.0, set()),
    "H.263": ("h263", {"size": (128, 96)}, 0.0, CLOSED),
    "H.263+": ("h263p", {"options": {"umv": "1", "aic": "1"}, "container": "avi"}, 0.0, CLOSED),
    "FLV1": ("flv", {}, 0.0, CLOSED),
    "MSMPEG4 2": ("msmpeg4v2", {"container": "avi"}, 0.0, CLOSED),
    "MSMPEG4 3": ("msmpeg4", {}, 0.0, CLOSED),
    "WMV1": ("wmv1", {}, 0.0, CLOSED),
    "WMV2": ("wmv2", {"container": "wmv"}, 0.0, CLOSED),
    "FFV1": ("ffv1", {"gop": 8}, 0.0, CLOSED),
    "FFV1 version 1": ("ffv1", {"options": {"level": "1", "coder": "1"}, "gop": 8, "container": "avi"}, 0.0, CLOSED),
    "MJPEG": ("mjpeg", {"frames": 24}, 1.0, CLOSED),
    "ProRes": ("prores_ks", {"frames": 24}, 1.0, CLOSED),
    "DNxHR": ("dnxhd", {"frames": 24, "size": (256, 128)}, 1.0, CLOSED),
    "Huffyuv": ("huffyuv", {"frames": 24}, 1.0, CLOSED),
    "PNG": ("png", {"frames": 24}, 1.0, CLOSED),
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Clip]:
    folder, made = tmp_path_factory.mktemp("clips"), dict[str, Clip]()

    def find(name: str) -> Clip:
        if name not in made:
            codec, given, _, _ = CASES[name]
            made[name] = Clip(encode(folder / str(len(made)), codec=codec, **given))
        return made[name]

    return find


@pytest.mark.parametrize("name", CASES)
def test_encoders(clip: Callable[[str], Clip], name: str) -> None:
    made = clip(name)
    made.check()
    assert made.share() >= CASES[name][2]
    assert made.entries() == CASES[name][3]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("format/bbb_800x640_768kbps_30fps_avc_non_reference_3b.mp4", 0.7),
        ("format/carphone_pristine.mp4", 0.4),
        ("format/h264_10bits.mp4", 0.3),
        ("format/sample_12_5fps_720p_1s.mp4", 0.0),
        ("format/testsrc2_odd_height_and_width_444.mp4", 0.3),
        ("format/video_90.mov", 0.0),
        ("natural/bikes.mp4", 0.4),
        ("format/h265_video.mp4", 0.3),
        ("format/testsrc2_444_10bit_hevc.mp4", 0.4),
        ("format/testsrc2_12bit_hdr.mp4", 0.5),
        ("format/testsrc2_av1_10bit.mp4", 0.7),
        ("format/av1_video.mkv", 0.4),
        ("long/long_180p_av1.mp4", 0.7),
        ("format/testsrc2_odd_height_and_width_mpeg2.mp4", 0.0),
        ("format/testsrc2_odd_height_and_width_vp9.mp4", 0.0),
        ("format/vp80-03-segmentation-1427.ivf", 0.0),
        ("format/sample.avi", 0.0),
    ],
)
def test_real_clips(media: Callable[[str], Path], name: str, share: float) -> None:
    found = Clip(media(name), limit=90)
    found.check()
    assert found.share() >= share


def test_damage_is_not_certain(media: Callable[[str], Path]) -> None:
    found = Clip(media("broken/corrupted.mp4"))
    assert sum(not coded.certain for coded in found.coded) == 1


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_settings(tmp_path: Path, data: st.DataObject) -> None:
    draw = data.draw
    codec = draw(st.sampled_from(["libx264", "libx265", "libsvtav1", "mpeg2video"]))
    gop, seed, frames = draw(st.sampled_from([2, 12, 60])), draw(st.integers(0, 99)), draw(st.integers(24, 70))
    b, refs, opened = draw(st.integers(0, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 1))
    interlaced = codec != "libsvtav1" and codec != "libx265" and draw(st.booleans())
    options = {
        "libx264": x264(
            bf=b,
            refs=refs,
            slices=draw(st.integers(1, 3)),
            open_gop=opened,
            b_pyramid=draw(st.sampled_from(["none", "strict", "normal"])),
            b_adapt=draw(st.integers(0, 2)),
            direct_=draw(st.sampled_from(["spatial", "temporal"])),
            weightp_=draw(st.integers(0, 2)),
        ),
        "libx265": x265(f"bframes={b}:ref={refs}:open-gop={opened}:b-pyramid={draw(st.integers(0, 1))}"),
        "libsvtav1": svt(f"hierarchical-levels={draw(st.integers(2, 5))}:pred-struct={draw(st.integers(1, 2))}"),
        "mpeg2video": {"bf": str(b), "sc_threshold": "1000000000", "flags": "+cgop" if opened else "-cgop"},
    }[codec]
    container = draw(st.sampled_from(["mkv", "mp4"] if codec == "libsvtav1" else ["mkv", "mp4", "ts"]))
    vfr = draw(st.booleans())
    path = encode(
        tmp_path / "any",
        codec=codec,
        frames=frames,
        gop=gop,
        options=options,
        container=container,
        vfr=vfr,
        interlaced=interlaced,
        seed=seed,
    )
    Clip(path).check()


# --- made by hand


def packet(data: bytes, pts: int) -> Packet[Any]:
    made = Packet(data)
    made.pts = made.dts = pts
    return made


def decoded(codec: str, packets: Sequence[Packet[Any]]) -> dict[int, bytes]:
    context = av.CodecContext.create(codec, "r")
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count = 1
    return {frame.pts: digest(frame) for p in [*packets, None] for frame in context.decode(p)}


@pytest.mark.parametrize("joined", [True, False])
def test_pairs_of_fields(joined: bool) -> None:
    """In one packet they are a frame; in two they show one, and neither is left alone."""
    frames = [[b"".join(parts)] if joined else parts for parts in field_pictures()]
    packets = [packet(part, 10 * n + 5 * k) for n, parts in enumerate(frames) for k, part in enumerate(parts)]
    coded = answers("h264", b"", packets)
    assert all(one.certain for one in coded)
    everything = decoded("h264", packets)
    assert list(everything) == [10 * n for n in range(24)]
    assert [p.pts for p, one in zip(packets, coded, strict=True) if one.shown] == list(everything)
    spare = [p.pts for p, one in zip(packets, coded, strict=True) if one.spare]
    assert spare == [10 * n for n in range(24) if n % 8 in ((1, 4, 6, 7) if joined else (6,))]
    kept = decoded("h264", [p for p in packets if p.pts not in spare])
    assert kept == {pts: picture for pts, picture in everything.items() if pts not in spare}
    entries = [n for n, one in enumerate(coded) if one.entry == Entry.CLOSED]
    assert [packets[n].pts for n in entries] == [0, 80, 160]
    assert decoded("h264", packets[entries[1] :]) == {pts: p for pts, p in everything.items() if pts >= 80}


def test_a_field_alone_is_not_certain() -> None:
    parts = [part for frame in field_pictures() for part in frame]
    del parts[3]
    coded = answers("h264", b"", [packet(part, n) for n, part in enumerate(parts)])
    assert not all(one.certain for one in coded[:4])


def test_a_late_change_of_the_order_is_not_certain(tmp_path: Path) -> None:
    """FFmpeg loses frames there, if nothing told it before, which a plan would not."""
    mixed = [4 * n + k for n in range(20) for k in (3, 1, 0, 2)]
    early = Clip(reordered_pictures(tmp_path / "early", [0, *(1 + place for place in mixed)]))
    early.check()
    assert len(early.everything) == 81
    late = Clip(reordered_pictures(tmp_path / "late", [*range(400), *(400 + place for place in mixed)]))
    assert len(late.decode(late.packets)) < 480
    odd = [n for n, one in enumerate(late.coded) if not one.certain]
    assert odd[0] == 401


def test_an_entry_brings_its_parameter_sets(tmp_path: Path) -> None:
    """Those that came on the way must come again; two clips of other sizes, one behind the other."""
    clips = [
        Clip(encode(tmp_path / str(n), codec="libx264", size=size, container="264", options={"bf": "0"}))
        for n, size in enumerate([(96, 64), (160, 96)])
    ]
    codes = [bytes(p) for made in clips for p in made.packets]
    idr = [n for n, data in enumerate(codes) if b"\0\0\1\x65" in data]
    again = answers("h264", clips[0].extradata, [packet(data, n) for n, data in enumerate(codes)])
    assert [n for n, one in enumerate(again) if one.entry] == idr
    # Without them, from the second size's second entry on.
    bare = [data[data.index(b"\0\0\1\x65") :] if n in idr and n > 48 else data for n, data in enumerate(codes)]
    once = answers("h264", clips[0].extradata, [packet(data, n) for n, data in enumerate(bare)])
    assert [n for n, one in enumerate(once) if one.entry] == [n for n in idr if n <= 48]


def test_old_x264_has_no_entry_without_its_message(clip: Callable[[str], Clip]) -> None:
    made = clip("x264")
    first = bytes(made.packets[0])
    at = first.index(b"x264 - core ") + 12
    old = first[:at] + b"33 " + first[at + 3 :]
    coded = answers("h264", made.extradata, [packet(old, 0), *made.packets[1:]])
    assert [n for n, one in enumerate(coded) if one.entry] == [0] or not any(one.entry for one in coded)


def test_several_pictures_in_a_packet_are_not_certain(clip: Callable[[str], Clip]) -> None:
    for name in ("x264", "x264 in TS", "x265", "x265 in TS", "MPEG-2", "MPEG-4", "SVT-AV1"):
        made = clip(name)
        data = [bytes(p) for p in made.packets[:20]]
        coded = answers(made.codec, made.extradata, [packet(d, n) for n, d in enumerate([*data[:9], data[9] * 2])])
        assert all(one.certain for one in coded[:9]), name
        assert not coded[9].certain, name
        assert not coded[9].spare, name


def test_layers_are_not_certain(clip: Callable[[str], Clip]) -> None:
    made = clip("x265 in TS")
    spare = next(n for n, one in enumerate(made.coded) if one.spare)
    data = bytes(made.packets[spare])
    kind = data[data.rindex(b"\0\0\1") + 3]
    for layer, certain in ((0, True), (1, False)):  # nuh_layer_id of one more slice
        other = data + b"\0\0\1" + bytes([kind, layer << 3 | 1]) + b"\0\1"
        coded = answers("hevc", made.extradata, [made.packets[0], packet(other, 1)])[1]
        assert coded.certain == coded.spare == certain
    made = clip("x264 in TS")
    for kind in (2, 15, 19, 20):
        other = bytes(made.packets[5]) + b"\0\0\1" + bytes([kind]) + b"\x80\0"
        assert not answers("h264", made.extradata, [made.packets[0], packet(other, 1)])[1].certain


def test_lower_temporal_layers_are_not_spare(clip: Callable[[str], Clip]) -> None:
    made = clip("x265 three layers")
    spare = next(n for n, one in enumerate(made.coded) if one.spare)
    data = bytearray(bytes(made.packets[spare]))
    assert data[5] == 3  # TemporalId 2, the highest
    for layer, expected in ((2, True), (1, False)):
        data[5] = layer + 1
        assert answers("hevc", made.extradata, [made.packets[0], packet(bytes(data), 1)])[1].spare == expected


def test_recovery_points(clip: Callable[[str], Clip]) -> None:
    """Only those that say that all is exact, from this picture on."""
    made = clip("x264 open")
    place = next(n for n, one in enumerate(made.coded) if one.entry == Entry.OPEN)
    data = bytearray(bytes(made.packets[place]))
    at = data.index(b"\x06\x06\x01") + 3
    for message, expected in ((0b11000100, Entry.OPEN), (0b10000100, Entry.NONE), (0b01010010, Entry.NONE)):
        data[at] = message  # recovery_frame_cnt 0, exact; 0, not exact; 1, exact
        coded = answers("h264", made.extradata, [*made.packets[:place], packet(bytes(data), 1)])
        assert coded[place].entry == expected


@pytest.mark.parametrize("name", ["x264 in TS", "x265 in TS"])
def test_an_entry_brings_lasting_messages(clip: Callable[[str], Clip], name: str) -> None:
    """One that says how the picture is turned holds on, so that decoding begins only where it comes again."""
    made = clip(name)
    places = [n for n, one in enumerate(made.coded) if one.entry]
    message = b"\0\0\1" + (b"\x06" if made.codec == "h264" else b"\x4e\x01") + bytes([47, 3, 1, 2, 3, 128])
    for again in range(2):
        given = {places[1], places[2] * again}
        packets = [packet(bytes(p) + message * (n in given), n) for n, p in enumerate(made.packets)]
        found = [n for n, one in enumerate(answers(made.codec, made.extradata, packets)) if one.entry]
        assert found == places[: 2 + again]
    spare = next(n for n, one in enumerate(made.coded) if one.spare)
    packets = [packet(bytes(p) + message * (n == spare), n) for n, p in enumerate(made.packets)]
    assert not answers(made.codec, made.extradata, packets)[spare].spare


def test_hidden_key_frames_are_no_entry(clip: Callable[[str], Clip]) -> None:
    """They are shown by a later packet, among others (AV1's forward key frames)."""
    made = clip("SVT-AV1")
    place = [n for n, one in enumerate(made.coded) if one.entry][1]
    data = bytearray(bytes(made.packets[place]))
    at = data.index(0x32)  # a frame, with its size
    at += 2 if data[at + 1] < 128 else 3
    assert data[at] >> 4 == 0b0001  # a key frame, shown
    data[at] ^= 0b00010000
    assert answers("av1", b"", [made.packets[0], packet(bytes(data), 1)])[1].entry == Entry.NONE


class BoolEncoder:
    """RFC 6386, 7.3: bits of even odds."""

    def __init__(self) -> None:
        self.low, self.range, self.bits = 0, 255, 0

    def put(self, *fields: tuple[int, int]) -> BoolEncoder:
        """(value, bits) each."""
        for value, count in fields:
            for n in reversed(range(count)):
                split = 1 + (self.range - 1 >> 1)
                if value >> n & 1:
                    self.low += split
                    self.range -= split
                else:
                    self.range = split
                while self.range < 128:
                    self.low, self.range, self.bits = self.low << 1, self.range << 1, self.bits + 1
        return self

    def data(self) -> bytes:
        return (self.low << 400 - self.bits).to_bytes(51, "big")


@pytest.mark.parametrize(
    ("changes", "spare"),
    [
        ({}, True),
        ({"shown": 0}, True),
        ({"golden": (1, 1)}, False),
        ({"alternate": (1, 1)}, False),
        ({"golden": (0, 1), "copy_golden": (1, 2)}, False),
        ({"golden": (0, 1), "copy_alternate": (2, 2)}, False),
        ({"entropy": (1, 1)}, False),
        ({"last": (1, 1)}, False),
        ({"segments": ((1, 1), (1, 1), (0, 1), (0, 3))}, False),  # a new map
        ({"segments": ((1, 1), (0, 1), (1, 1), (0, 1), (0, 8))}, False),  # new values
        ({"segments": ((1, 1), (0, 1), (0, 1))}, True),  # as they are
        ({"deltas": ((1, 1), (1, 1), (1, 1), (5 << 1, 7), (0, 7))}, True),  # the same again
        ({"deltas": ((1, 1), (1, 1), (1, 1), (6 << 1, 7), (0, 7))}, False),
        ({"deltas": ((1, 1), (0, 1))}, True),
        ({"next_segments": ((1, 1), (0, 1), (0, 1))}, False),  # takes this one's map
        ({"next_segments": ((1, 1), (1, 1), (0, 1), (0, 3))}, True),
    ],
)
def test_what_outlives_a_vp8_picture(changes: dict[str, Any], spare: bool) -> None:
    def inter(values: dict[str, Any]) -> bytes:
        header = BoolEncoder().put(*values.get("segments", ((0, 1),)), (0, 1), (20, 6), (0, 3))
        header.put(*values.get("deltas", ((0, 1),)), (0, 2), (30, 7), (0, 5))
        golden, alternate = values.get("golden", (0, 1)), values.get("alternate", (0, 1))
        header.put(golden, alternate)
        header.put(*([] if golden[0] else [values.get("copy_golden", (0, 2))]))
        header.put(*([] if alternate[0] else [values.get("copy_alternate", (0, 2))]))
        header.put((0, 2), values.get("entropy", (0, 1)), values.get("last", (0, 1)))
        return bytes([1 | values.get("shown", 1) << 4, 0, 0]) + header.data()

    start = BoolEncoder().put((0, 2), (0, 1), (0, 1), (20, 6), (0, 3), (1, 1), (1, 1), (1, 1), (5 << 1, 7), (0, 7))
    key = b"\x10\0\0\x9d\x01\x2a\x10\0\x10\0" + start.put((0, 2), (30, 7), (0, 5), (1, 1)).data()
    following = inter({"segments": changes.get("next_segments", ((0, 1),)), "last": (1, 1)})
    first, middle, last = answers("vp8", b"", [packet(d, n) for n, d in enumerate([key, inter(changes), following])])
    assert first == Coded(1, False, Entry.CLOSED)
    assert middle == Coded(changes.get("shown", 1), spare, Entry.NONE)
    assert last == Coded(1, False, Entry.NONE)


def test_jpeg_pictures_that_do_not_stand_alone(clip: Callable[[str], Clip]) -> None:
    data = bytes(clip("MJPEG").packets[0])
    marked = [data[:2] + b"\xff\xe0\0\x10AVI1" + bytes([field]) + bytes(9) + data[2:] for field in (0, 1, 2)]
    assert [one.certain for one in answers("mjpeg", b"", [packet(d, 0) for d in marked])] == [True, False, False]
    without = data.replace(b"\xff\xdb", b"\xff\xe1")  # quantization tables
    assert not answers("mjpeg", b"", [packet(without, 0)])[0].spare
    default = data.replace(b"\xff\xc4", b"\xff\xe1")  # Huffman tables, which may be left out where nobody brings any
    coded = answers("mjpeg", b"", [packet(d, 0) for d in (default, data, default)])
    assert [one.spare for one in coded] == [True, True, False]


def test_the_container_may_call_a_picture_disposable(clip: Callable[[str], Clip]) -> None:
    """Where the codec has no word for it."""
    reader = bitstream("flv1", b"")
    assert reader is not None
    key, inter = (bytes(p) for p in clip("FLV1").packets[:2])
    assert reader.read(key, key=True, disposable=True) == [Coded(1, False, Entry.CLOSED)]
    assert reader.read(inter, key=False, disposable=True) == [Coded(1, True, Entry.NONE)]
    assert reader.read(inter, key=False) == [Coded(1, False, Entry.NONE)]


def test_unknown_codecs() -> None:
    assert bitstream("theora", b"") is None
    assert bitstream("rv40", b"") is None


# --- noise


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CODECS), st.binary(max_size=60), st.lists(st.binary(max_size=90), max_size=5))
def test_noise(codec: str, extradata: bytes, packets: list[bytes]) -> None:
    """Never raises; nothing is spare, and decoding begins nowhere, unless the container speaks of a key packet."""
    coded = answers(codec, extradata, [packet(data or b"\0", n) for n, data in enumerate(packets)])
    assert len(coded) == len(packets)
    assert not any(one.spare and one.certain for one in coded)


DAMAGED = ("x264", "x264 in TS", "x264 MBAFF", "x265", "x265 in TS", "SVT-AV1", "libvpx layers", "VP9 layers")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from((*DAMAGED, "MPEG-2", "MPEG-4", "H.263", "FLV1", "WMV2", "MJPEG")),
    st.integers(0, 23),
    st.integers(0, 400),
    st.binary(max_size=4),
    st.booleans(),
)
def test_damaged_packets(clip: Callable[[str], Clip], name: str, which: int, at: int, noise: bytes, cut: bool) -> None:
    """Never raises, and says of the packets before the damage what it said without it."""
    made = clip(name)
    data = bytes(made.packets[which])
    at %= len(data)
    damaged = data[:at] if cut else data[:at] + noise + data[at + len(noise) :]
    packets = [*made.packets[:which], packet(damaged or b"\0", 0), *made.packets[which + 1 : 24]]
    coded = answers(made.codec, made.extradata, packets)
    assert len(coded) == 24
    assert coded[: max(which - 1, 0)] == made.coded[: max(which - 1, 0)]
    lengths = name in ("x264", "x264 MBAFF", "x265", "SVT-AV1")
    if cut and lengths:  # where lengths are written, each cut shows
        assert not coded[which].certain


def test_making_clips_leaves_the_thread_as_it_was(tmp_path: Path) -> None:
    """Run by root, SVT-AV1 makes it a real-time one."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    encode(tmp_path / "clip", codec="libsvtav1", frames=4)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
