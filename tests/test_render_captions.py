"""Captions: lines keep to their picture, in both containers and from both kinds of text track."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from av.packet import Packet
from render_clips import STEADY, write_clip

from keyreel.decode.source import Source
from keyreel.render.captions import MILLISECONDS, Line, in_reel, in_turn, lines_of
from keyreel.render.modes import make_reel
from keyreel.types import Shot

LINES = [
    Line(0.5, 1.5, "Good morning."),
    Line(1.8, 4.3, "Two lines,\nthe second one with ü and 字."),
    Line(6.0, 7.0, "The end."),
]
SPANS = (Shot(1.0, 2.5), Shot(4.0, 6.5))


def captioned(path: Path, plain: Path, lines: list[Line]) -> Path:
    """A clip with the lines as SubRip (in Matroska) or 3GPP timed text (in MP4)."""
    with av.open(str(plain)) as source, av.open(str(path), "w") as output:
        copies = {s.index: output.add_stream_from_template(s, opaque=True) for s in source.streams}
        kind = "mov_text" if path.suffix == ".mp4" else "subrip"
        texts = output.add_stream(kind)
        texts.codec_context.subtitle_header = (
            b"[Script Info]\nScriptType: v4.00+\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize\n"
            b"Style: Default,Arial,16\n[Events]\nFormat: Layer, Start, End, Style, Name, Text\n"
        )
        texts.time_base = MILLISECONDS
        for line in lines:
            text = line.text.encode()
            packet = Packet(len(text).to_bytes(2, "big") + text if kind == "mov_text" else text)
            packet.pts = packet.dts = round(line.start * 1000)
            packet.duration = round((line.stop - line.start) * 1000)
            packet.time_base, packet.stream = MILLISECONDS, texts
            output.mux(packet)
        for packet in source.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "plain.mp4", STEADY, size=(32, 32))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("mode", ["encode", "copy"])
def test_lines_move_with_their_pictures(tmp_path: Path, plain: Path, suffix: str, mode: str) -> None:
    clip = captioned(tmp_path / f"clip{suffix}", plain, LINES)
    with Source(clip) as source:
        read = lines_of(source)
        assert [line.text for line in read] == [line.text for line in LINES]
        assert [t for line in read for t in line[:2]] == pytest.approx(
            [t for line in LINES for t in line[:2]], abs=0.03
        )
        spans = SPANS if mode == "encode" else (Shot(0.2, 1.9), Shot(4.0, 5.9))
        reel = make_reel(source, spans, tmp_path / "reel.mp4", shots=(), mode=mode)  # type: ignore[arg-type]
    with Source(reel.path) as made:
        found = lines_of(made)
    wanted = in_turn(in_reel(read, reel.spans))
    assert len(wanted) >= 2
    assert [line.text for line in found] == [line.text for line in wanted]
    assert [t for line in found for t in line[:2]] == pytest.approx([t for line in wanted for t in line[:2]], abs=0.03)


def test_lines_in_a_reel_by_hand() -> None:
    found = in_reel(LINES, SPANS)
    assert [line.text for line in found] == [LINES[n].text for n in (0, 1, 1, 2)]
    assert [t for line in found for t in line[:2]] == pytest.approx([0, 0.5, 0.8, 1.5, 1.5, 1.8, 3.5, 4.0])


def test_lines_that_overlap_are_one_text_meanwhile() -> None:
    lines = [Line(0, 3, "a"), Line(1, 2, "b"), Line(3, 4, "c"), Line(3, 4, "d"), Line(5, 6, "e"), Line(6, 7, "e")]
    assert in_turn(lines) == [
        *(Line(0, 1, "a"), Line(1, 2, "a\nb"), Line(2, 3, "a")),
        *(Line(3, 4, "c\nd"), Line(5, 7, "e")),
    ]
    assert in_turn([]) == []


def test_styles_are_left_out(tmp_path: Path, plain: Path) -> None:
    clip = captioned(tmp_path / "styled.mkv", plain, [Line(0.5, 1.5, "<i>so</i> <b>loud</b>")])
    with Source(clip) as source:
        assert [line.text for line in lines_of(source)] == ["so loud"]


def test_no_track_where_there_are_no_lines(tmp_path: Path, plain: Path) -> None:
    later = captioned(tmp_path / "later.mkv", plain, LINES[2:])
    for clip in (plain, later):
        with Source(clip) as source:
            reel = make_reel(source, (Shot(0.5, 2.0),), tmp_path / "reel.mp4", shots=(), mode="encode")
        with av.open(str(reel.path)) as container:
            assert not container.streams.subtitles
