"""Where videos come from: each route opens the same video, and whatever is no video is refused with a clear message."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hub_server import serving

from keyreel.config import DecodeLimits, ImageTransform, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.errors import CorruptStream, SourceError, SourceNotFound, UnsupportedCodec

Media = Callable[[str], Path]
SMALL = ImageTransform(16, 16, "squash")


def make_clip(path: Path, *, frames: int = 12, size: tuple[int, int] = (64, 48), **stream_fields: Any) -> Path:
    """A small H.264 clip whose frames differ."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        for name, value in stream_fields.items():
            setattr(stream, name, value)
        for n in range(frames):
            picture = np.full((size[1], size[0], 3), (20 * n) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def pixels(source: Source) -> np.ndarray:
    with FrameStream(source, Sampling("all"), transform=SMALL) as stream:
        return np.concatenate([batch.data for batch in stream])


class Pipe(io.RawIOBase):
    """A stream that cannot be rewound, in small reads."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(memoryview(buffer)[:1000])


# --- routes


def test_every_route_gives_the_same_frames(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    expected = pixels(Source(clip))
    assert len(expected) == 12
    zipped = tmp_path / "clip.gz"
    zipped.write_bytes(gzip.compress(data))
    with clip.open("rb") as file, gzip.open(zipped) as unpacked:
        file.seek(1000)  # a file object is read from its start, wherever it stands
        for video in (str(clip), data, bytearray(data), io.BytesIO(data), file, Pipe(data), unpacked):
            with Source(video) as source:  # type: ignore[arg-type]
                np.testing.assert_array_equal(pixels(source), expected)
                np.testing.assert_array_equal(pixels(source), expected)  # and once more from the same source


def test_standard_input(clip: Path) -> None:
    code = (
        "from keyreel.decode.source import Source\nfrom keyreel.decode.stream import FrameStream, FrameStream\n"
        "from keyreel.config import Sampling, ImageTransform\n"
        "with Source('-') as s:\n"
        "    for _ in range(2):\n"
        "        f = FrameStream(s, Sampling('all'), transform=ImageTransform(16, 16, 'squash'))\n"
        "        print(s.name, s.path, [b.data.sum().item() for b in f])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=clip.read_bytes(), capture_output=True, timeout=60, check=True
    )
    total = pixels(Source(clip)).sum().item()
    assert done.stdout.decode().splitlines() == [f"<stdin> None [{total}]"] * 2


def test_sources_are_shared_between_threads(clip: Path) -> None:
    expected = pixels(Source(clip))
    found: list[np.ndarray] = []
    with clip.open("rb") as file, Source(file) as shared, Source(Pipe(clip.read_bytes())) as spooled:  # type: ignore[arg-type]
        jobs = [
            threading.Thread(target=lambda s=s: found.append(pixels(s)))  # type: ignore[misc]
            for s in (shared, spooled) * 3
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
    assert len(found) == 6
    assert all((one == expected).all() for one in found)


def test_close_removes_the_spooled_copy(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = Source(Pipe(clip.read_bytes()))  # type: ignore[arg-type]
    source.probe()
    assert len(list(tmp_path.iterdir())) == 1
    source.close()
    source.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        source.open()


def test_wrong_types() -> None:
    for wrong in (5, None, io.StringIO("text"), ["a.mp4"]):
        with pytest.raises(TypeError, match="got"):
            Source(wrong)  # type: ignore[arg-type]


def test_odd_file_names(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is never taken for a protocol, a pattern or an option."""
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "http:x.mp4", "frame_%03d.mp4", "ünïcode 日本.mp4", "-a.mp4", "file:q?x=1#y.mp4"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert Source(name).probe().width == 64


# --- probe


def test_probe(clip: Path) -> None:
    with Source(clip) as source:
        info = source.probe()
        assert source.probe() is info
    assert (info.path, info.width, info.height, info.codec) == (str(clip), 64, 48, "h264")
    assert (info.pixel_format, info.rotation_degrees, info.has_audio, info.transfer) == ("yuv420p", 0, False, "sdr")
    assert info.duration_seconds == pytest.approx(1.2, abs=0.01)
    assert info.average_fps == pytest.approx(10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # codec, width, height, clockwise rotation, audio, transfer; width and height as shown
        ("format/video_90.mov", ("h264", 320, 568, 90, False, "sdr")),
        ("format/video_180.mov", ("h264", 568, 320, 180, False, "sdr")),
        ("format/nasa_13013_rotated.mp4", ("h264", 270, 480, 270, False, "sdr")),
        ("format/rotate-buck-bunny.mp4", ("h264", 1080, 1920, 90, True, "sdr")),
        ("format/bbb_800x640_768kbps_30fps_vp9.mp4", ("vp9", 1138, 640, 0, False, "sdr")),
        ("format/carphone_pristine.mp4", ("h264", 193, 144, 0, False, "sdr")),
        ("format/hdr10-av1.mp4", ("av1", 720, 1280, 0, True, "pq")),
        ("format/testsrc2_12bit_hdr.mp4", ("hevc", 320, 180, 0, False, "pq")),
        ("format/8k24fps_300ms.mp4", ("hevc", 7680, 4320, 0, True, "sdr")),
        ("format/testsrc2_odd_height_and_width_mpeg2.mp4", ("mpeg2video", 121, 81, 0, False, "sdr")),
        ("format/vp80-03-segmentation-1427.ivf", ("vp8", 352, 288, 0, False, "sdr")),
    ],
)
def test_probe_of_real_clips(media: Media, name: str, expected: tuple[Any, ...]) -> None:
    info = Source(media(name)).probe()
    got = (info.codec, info.width, info.height, info.rotation_degrees, info.has_audio, info.transfer)
    assert got == expected


def test_missing_duration_is_none_or_the_containers(clip: Path, tmp_path: Path, media: Media) -> None:
    assert Source(media("format/av1_video.mkv")).probe().duration_seconds == pytest.approx(5.0)
    raw = tmp_path / "raw.h264"
    with av.open(str(clip)) as source, av.open(str(raw), "w", format="h264") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert Source(raw).probe().duration_seconds is None


# --- refusals


def first_picture(source: Source) -> None:
    next(FrameStream(source, Sampling("all")))


def refusal(video: Any, error: type[SourceError], *words: str, limits: DecodeLimits | None = None) -> None:
    """Asserts that probing and decoding both raise exactly `error`, with a hint and these words."""
    for use in (Source.probe, first_picture):
        with Source(video, limits=limits or DecodeLimits()) as source, pytest.raises(SourceError) as caught:
            use(source)
        assert type(caught.value) is error
        assert caught.value.hint
        text = str(caught.value)
        assert source.name in text
        for word in words:
            assert word in text, (word, text)


def test_missing_folder_empty_text(tmp_path: Path) -> None:
    refusal(tmp_path / "no.mp4", SourceNotFound, "no such file")
    refusal(tmp_path, SourceError, "folder")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refusal(empty, CorruptStream, "empty")
    refusal(b"", CorruptStream, "empty")
    refusal(io.BytesIO(b""), CorruptStream, "empty")
    text = tmp_path / "text.mp4"
    text.write_text("This is no video.\n" * 100)
    refusal(text, CorruptStream, "not a video")
    refusal(text.read_bytes(), CorruptStream, "not a video")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refusal(fifo, SourceError, "not a regular file")
    refusal(tmp_path / "no.mp4" / "x", SourceNotFound, "no such file")


def test_truncated_before_its_index(clip: Path) -> None:
    refusal(clip.read_bytes()[:600], CorruptStream, "damaged")


def test_audio_only_and_cover_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refusal(path, UnsupportedCodec, "no video", "audio")
    refusal(path.read_bytes(), UnsupportedCodec, "no video", "audio")


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'contentType="video"><Representation id="0" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "imf": '<?xml version="1.0"?>\n<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
    "<Id>{target}</Id></CompositionPlaylist>",
}


@pytest.mark.parametrize("kind", sorted(PLAYLISTS))
@pytest.mark.parametrize("target", ["/etc/passwd", "clip", "http://127.0.0.1:{port}/inner.mp4"])
@pytest.mark.parametrize("suffix", ["own", "mp4"])
def test_playlists_are_refused(kind: str, target: str, suffix: str, clip: Path, tmp_path: Path) -> None:
    """Also where they point at a video that exists; nothing they name is opened."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        where = str(clip) if target == "clip" else target.format(port=server.getsockname()[1])
        text = PLAYLISTS[kind].format(target=where)
        path = tmp_path / f"list.{kind if suffix == 'own' else suffix}"
        path.write_text(text)
        for limits in (DecodeLimits(), DecodeLimits(allow_network=True)):
            for video in (path, text.encode(), io.BytesIO(text.encode()), b"\n \n" + text.encode()):
                with Source(video, limits=limits) as source, pytest.raises(SourceError) as caught:
                    source.probe()
                assert caught.value.hint
                assert "root:" not in str(caught.value)
                if kind in ("m3u8", "ffconcat", "mpd"):
                    assert "playlist" in str(caught.value)
        with pytest.raises(TimeoutError):
            server.accept()


def referring_movie(clip: Path) -> bytes:
    """A MOV without pictures of its own, whose data reference (an alias record) names `clip` by its absolute path."""
    data = clip.read_bytes()
    name = str(clip).encode()
    path = b"\0\2" + len(name).to_bytes(2, "big") + name + b"\0" * (len(name) % 2)
    record = (
        bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + b"\0\0\0\0" + bytes(16) + path + b"\xff\xff\0\0"
    )
    entry = (12 + len(record)).to_bytes(4, "big") + b"alis" + bytes(4) + record
    at = data.index(b"dref") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    box = (16 + len(entry)).to_bytes(4, "big") + b"dref" + b"\0\0\0\0\0\0\0\1" + entry
    out = bytearray(data[:at] + box + data[at + old :])
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = out.index(parent) - 4
        size = int.from_bytes(out[place : place + 4], "big") + len(box) - old
        out[place : place + 4] = size.to_bytes(4, "big")
    start = out.index(b"mdat") + 4
    out[start : start + int.from_bytes(out[start - 8 : start - 4], "big") - 8] = bytes(
        int.from_bytes(out[start - 8 : start - 4], "big") - 8
    )
    return bytes(out)


def test_movies_that_refer_to_other_files(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "refers.mov"
    path.write_bytes(referring_movie(clip))
    with av.open(str(path), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert len(list(container.decode(video=0))) == 12  # FFmpeg follows the reference when it is told to
    with pytest.raises(CorruptStream, match="no frame"):
        pixels(Source(path))


def test_urls_need_permission(clip: Path) -> None:
    refusal("http://127.0.0.1:9/x.mp4", SourceError, "by default")
    for address in ("rtsp://127.0.0.1/x", "concat:a|b", "ftp://127.0.0.1/x.mp4", "data:video/mp4;base64,AAAA|"):
        refusal(address, SourceError, "address", limits=DecodeLimits(allow_network=True))
    refusal("http://127.0.0.1:9/x.mp4", SourceNotFound, "cannot be fetched", limits=DecodeLimits(allow_network=True))


def test_urls_when_allowed(clip: Path) -> None:
    import functools
    import http.server

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Source(
                f"http://127.0.0.1:{server.server_port}/clip.mp4", limits=DecodeLimits(allow_network=True)
            ) as s:
                np.testing.assert_array_equal(pixels(s), pixels(Source(clip)))
            missing = Source(f"http://127.0.0.1:{server.server_port}/no.mp4", limits=DecodeLimits(allow_network=True))
            with pytest.raises(SourceNotFound):
                missing.probe()
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_closes_without_a_word_loses_no_frame(media: Media) -> None:
    path = media("natural/bikes.mp4")
    with serving({"my/films/a.mp4": path.read_bytes()}) as hub:
        url = f"{hub.url}/my/films/resolve/main/a.mp4"
        with Source(url, limits=DecodeLimits(allow_network=True)) as source, source.open() as container:
            found = [packet.pts for packet in container.demux(video=0)]
    with av.open(str(path)) as container:
        assert found == [packet.pts for packet in container.demux(video=0)]


# --- limits


def test_limits(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip.read_bytes()
    refusal(clip, SourceError, "64 x 48", "3071", "max_pixels", limits=DecodeLimits(max_pixels=3071))
    Source(clip, limits=DecodeLimits(max_pixels=64 * 48)).probe()
    refusal(clip, SourceError, "max_duration_seconds", limits=DecodeLimits(max_duration_seconds=1.0))
    monkeypatch.setattr("keyreel.decode.streams.MAX_SPOOL_BYTES", len(data) - 1)
    with Source(Pipe(data)) as source:  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(SourceError, match="more than"):
                source.probe()
    monkeypatch.setattr("keyreel.decode.streams.MAX_SPOOL_BYTES", len(data))
    with Source(Pipe(data)) as source:  # type: ignore[arg-type]
        assert len(pixels(source)) == 12
    monkeypatch.setattr("keyreel.decode.stream._MAX_FRAMES", 11)
    with Source(clip) as source, pytest.raises(SourceError, match="more than 11 frames"):
        pixels(source)


def test_limits_hold_where_the_header_is_silent(media: Media, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="max_pixels"):
        Source(media("format/testsrc2_mpeg4.avi"), limits=DecodeLimits(max_pixels=1000)).probe()
    raw = tmp_path / "long.mkv"
    with av.open(str(raw), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 16, 16, "yuv420p", Fraction(1, 1000)
        for pts in (0, 1000, 9000):
            frame = av.VideoFrame(16, 16, "yuv420p")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for sampling in (Sampling("all"), Sampling("fps")):
        with pytest.raises(SourceError, match="max_duration_seconds"):
            list(FrameStream(Source(raw, limits=DecodeLimits(max_duration_seconds=5)), sampling))
