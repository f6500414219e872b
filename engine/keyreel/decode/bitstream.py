"""What compressed packets say before they are decoded: who needs whom, where decoding may begin, of what size they are.

Nothing here decodes. Where the syntax leaves a doubt, the answer is the careful one: needed, no entry, not certain.
"""

from __future__ import annotations

from keyreel.decode.av1 import Av1
from keyreel.decode.coded import Bitstream, Coded, Entry
from keyreel.decode.h264 import H264
from keyreel.decode.hevc import Hevc
from keyreel.decode.mpeg import CHAINS, Chain, Mpeg4, Mpeg12
from keyreel.decode.nal import start_coded
from keyreel.decode.vpx import Vp8, Vp9, vp9_frame, vp9_frames

__all__ = ["Bitstream", "Coded", "Entry", "bitstream", "formats"]


def formats(codec: str, data: bytes) -> set[object]:
    """Whatever in the packet decides the size and the format of pictures: parameter sets, or VP9 sizes.

    A stream in which more than one thing is found changes, or may change, in its middle.

    Args:
        codec: h264 and hevc (both with start codes) and vp9; nothing is known of others.
        data: the packet.
    """
    if codec == "h264":
        return {data[first:stop].rstrip(b"\0") for first, stop in start_coded(data) if data[first] & 31 == 7}
    if codec == "hevc":
        return {data[first:stop].rstrip(b"\0") for first, stop in start_coded(data) if data[first] >> 1 & 63 == 33}
    if codec == "vp9":
        try:
            return {size for frame in vp9_frames(data) if (size := vp9_frame(frame).size) is not None}
        except EOFError:  # damage is the decoder's to find
            return set()
    return set()


# What decodes each packet by itself, and keeps nothing of it.
_INTRA = ("prores", "dnxhd", "huffyuv", "ffvhuff", "png", "utvideo", "magicyuv", "jpeg2000", "v210")


def bitstream(codec: str, extradata: bytes) -> Bitstream | None:
    """What reads the packets of a stream; None where nothing is known of its codec, so that all must be decoded.

    Args:
        codec: FFmpeg's canonical name.
        extradata: of the container; may be empty.
    """
    match codec:
        case "h264":
            return H264(extradata)
        case "hevc":
            return Hevc(extradata)
        case "av1":
            return Av1()
        case "vp8":
            return Vp8()
        case "vp9":
            return Vp9()
        case "mpeg1video" | "mpeg2video":
            return Mpeg12()
        case "mpeg4":
            return Mpeg4(extradata)
        case "mjpeg":
            return _Mjpeg()
        case _ if codec in CHAINS:
            return Chain(codec)
        case _ if codec in _INTRA:
            return _Intra()
    return None


class _Intra:
    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        return [Coded(1, key, Entry.CLOSED if key else Entry.NONE, certain=key and len(data) > 0)]

    def end(self) -> list[Coded]:
        return []


class _Mjpeg(_Intra):
    """JPEG pictures stand alone where they bring their tables; they may leave out what a picture before them had."""

    def __init__(self) -> None:
        self._huffman = False  # some picture brought its own Huffman tables

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        head = data[: max(data.find(b"\xff\xda"), 0)]  # up to the scan
        fields = head.find(b"AVI1")
        if fields >= 0 and head[fields + 4 : fields + 5] != b"\0":  # a picture may hold one of two
            return [Coded(1, False, Entry.NONE, certain=False)]
        tables = b"\xff\xc4" in head
        self._huffman |= tables
        return super().read(data, key=b"\xff\xdb" in head and (tables or not self._huffman))
