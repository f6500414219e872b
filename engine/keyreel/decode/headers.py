"""Reads a few fields of compressed packets, where the container alone could lead to a wrong frame."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from av.packet import Packet
from av.video.reformatter import ColorTrc
from av.video.stream import VideoStream

from keyreel.decode.sampling import PlanBroken

# nal_unit_type: ITU-T H.265, table 7-1, and of the parameter sets.
_CRA, _BLA_N_LP = 21, 18
_PARAMETER_SETS = {"h264": (7, 8), "hevc": (32, 33, 34)}


def is_shown(codec: str, packet: Packet[VideoStream]) -> bool:
    """Whether a packet gives a frame, for codecs in which a packet can give none or several.

    Raises:
        PlanBroken: the packet gives several frames, or needs other packets.
    """
    match codec:
        case "vp8":
            return bytes(packet)[0] >> 4 & 1 == 1  # show_frame: RFC 6386, 9.1
        case "mpeg1video" | "mpeg2video":
            alone = bytes(packet).count(b"\0\0\1\0") == 1  # two fields, two pictures
        case "mpeg4":  # several packed pictures, or an empty placeholder for one
            alone = packet.size >= 20 and bytes(packet).count(b"\0\0\1\xb6") == 1
        case "mjpeg":  # without its tables, or one field of two
            data = bytes(packet)
            head = data[: max(data.find(b"\xff\xda"), 0)]
            field = head.partition(b"AVI1")[2][:1]
            alone = b"\xff\xdb" in head and b"\xff\xc4" in head and field in (b"", b"\0")
        case _:
            return True
    if not alone:
        raise PlanBroken
    return True


class Keys:
    """Finds the key packets at which a decoder may begin and still give the frames of a full decode."""

    def __init__(self, codec: str, extradata: bytes, pixels: str) -> None:
        self._codec, self._extradata, self._pixels = codec, extradata, pixels
        self._changed: frozenset[bytes] = frozenset()  # parameter sets that are not in the container's header
        self._old_encoder = False
        # A picture that nothing in its temporal layer needs may be needed by a higher layer.
        self.skippable = codec != "hevc" or _hevc_layers(extradata) == {0}

    def learn(self, packet: Packet[VideoStream]) -> None:
        """Remembers the build of x264: FFmpeg decodes old builds differently once it has seen the number."""
        if self._codec == "h264" and (found := re.search(rb"x264 - core (\d+)", bytes(packet))):
            self._old_encoder = int(found[1]) < (151 if "444" in self._pixels else 34)

    def is_entry(self, packet: Packet[VideoStream]) -> bool:
        """Whether a decoder may begin with this key packet."""
        data = bytes(packet)
        if self._codec in ("vp8", "vp9"):  # FFmpeg can crash if it begins with a damaged one
            return bool(data) and (not data[0] & 1 if self._codec == "vp8" else _is_vp9_key(data))
        if self._codec not in ("h264", "hevc"):
            return True
        width = length_bytes(self._codec, self._extradata)
        own = units_of(self._codec, data, width, _PARAMETER_SETS[self._codec])
        changed = {unit for unit in own if unit not in self._extradata}
        self._changed = self._changed | changed
        # A recovery point (H.264, D.2.8) that does not promise exact frames.
        inexact = self._codec == "h264" and re.search(rb"\x06\x01[\x80-\xbf]", data[:256])
        return not (self._old_encoder or inexact) and self._changed <= own

    def is_joint(self, packet: Packet[VideoStream]) -> bool:
        """Whether this entry resets a decoder that comes from another place of the stream.

        For H.264 only an IDR picture does: after others the decoder misses earlier pictures. For HEVC every IRAP
        picture does, if a CRA picture is marked as a splice (`spliced`).
        """
        if self._codec not in ("h264", "hevc"):
            return True
        kinds = {_kind(self._codec, unit) for unit in units(bytes(packet), length_bytes(self._codec, self._extradata))}
        return 5 in kinds if self._codec == "h264" else not kinds.isdisjoint(range(16, 22))


def spliced(data: bytes, extradata: bytes) -> bytes:
    """Marks the CRA picture of an HEVC packet as one after a splice, without leading pictures: BLA_N_LP.

    Both kinds have the same slice header: ITU-T H.265, 7.4.2.2 and 7.3.6.1.

    Args:
        data: the packet.
        extradata: of the container.
    """
    changed, at, width = bytearray(data), 0, length_bytes("hevc", extradata)
    for unit in units(data, width):
        at = data.index(unit, at)
        if _kind("hevc", unit) == _CRA:
            changed[at] = unit[0] & 0x81 | _BLA_N_LP << 1
        at += len(unit)
    return bytes(changed)


def _kind(codec: str, unit: bytes) -> int:
    """nal_unit_type."""
    return unit[0] & 31 if codec == "h264" else unit[0] >> 1 & 63


def _is_vp9_key(data: bytes) -> bool:
    """Whether a packet begins with a key frame: VP9 specification, 6.2."""
    read = Bits(data[:2]).read
    if read(2) != 2:
        return False
    if read(1) | read(1) << 1 == 3:
        read(1)
    return read(2) == 0  # show_existing_frame, frame_type


class FrameNumbers:
    """Watches frame_num of H.264 (7.4.3) to find missing pictures.

    FFmpeg replaces missing pictures by the ones it decoded before, so no frame may then be skipped.
    """

    def __init__(self, extradata: bytes) -> None:
        self._width = length_bytes("h264", extradata)
        self._bits: int | None = None
        self._last = 0  # frame_num of the last picture that others may refer to
        # The first sequence parameter set, behind a start code or at its place in ISO/IEC 14496-15's record.
        if sequence := re.search(rb"(?:\0\0\x01|^\x01.{7})[\x27\x47\x67]", extradata, re.DOTALL):
            self._bits = _frame_num_bits(extradata[sequence.end() :][:40])

    @property
    def known(self) -> bool:
        """Whether the stream's sequence parameter set was understood."""
        return self._bits is not None

    def follow(self, data: bytes) -> bool:
        """Reads the next packet. False if a picture before it is missing."""
        if self._bits is None:
            return True
        for unit in units(data, self._width):
            if (kind := unit[0] & 31) in (1, 5):
                bits = Bits(unit[1:24].replace(b"\0\0\3", b"\0\0"))
                bits.ue(), bits.ue(), bits.ue()
                number = bits.read(self._bits)
                gap = 0 if kind == 5 else (number - self._last) % (1 << self._bits)
                if unit[0] & 0x60:
                    self._last = number
                return gap <= 1
        return True


def _frame_num_bits(sequence: bytes) -> int | None:
    """Number of bits of frame_num; None if hard to find: seq_parameter_set_data(), 7.3.2.1.1."""
    bits = Bits(sequence.replace(b"\0\0\3", b"\0\0"))
    profile = bits.read(8)
    bits.read(16)
    bits.ue()
    if profile in (100, 110, 122, 244, 44):
        if bits.ue() == 3 and bits.read(1):
            return None  # colour planes are coded apart
        bits.ue(), bits.ue(), bits.read(1)
        if bits.read(1):
            return None  # scaling lists
    return bits.ue() + 4


class Bits:
    """Reads bits, the most significant first; zeros after the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data + bytes(8), "big"), 8 * len(data) + 64

    def read(self, count: int) -> int:
        """Reads an unsigned number of `count` bits."""
        self._left = max(0, self._left - count)
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        """Unsigned Exp-Golomb code: ITU-T H.264, 9.1."""
        rest = self._value & (1 << self._left) - 1
        self._left = max(0, self._left - 2 * min(32, self._left - rest.bit_length()) - 1)
        return (rest >> self._left) - 1


def length_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of the length before each unit (ISO/IEC 14496-15), 0 for start codes."""
    return (extradata[4 if codec == "h264" else 21] & 3) + 1 if extradata[:1] == b"\1" else 0


def units_of(codec: str, data: bytes, width: int, kinds: Collection[int]) -> frozenset[bytes]:
    """The units of some kinds in a packet of H.264 or HEVC, see `units`, without zeros at their ends."""
    return frozenset(unit.rstrip(b"\0") for unit in units(data, width) if _kind(codec, unit) in kinds)


def units(data: bytes, width: int) -> Iterator[bytes]:
    """Yields the units of a packet of H.264 or HEVC, after start codes, or after lengths of `width` bytes."""
    if not width:
        yield from filter(None, data.split(b"\0\0\1")[1:])
        return
    at = 0
    while at + width < len(data):
        size = int.from_bytes(data[at : at + width], "big")
        if unit := data[at + width : at + width + size]:
            yield unit
        at += width + max(size, 1)


def remarks_of(stream: VideoStream, packet: Packet[VideoStream]) -> tuple[str, ...]:
    """The warnings about the pictures of a stream, from its header and first packet."""
    codec, found = stream.codec_context, []
    own: list[bytes] = []
    if codec.name == "hevc":  # nal_unit_header(): ITU-T H.265, 7.3.1.2
        own = [unit for unit in units(bytes(packet), length_bytes("hevc", bytes(codec.extradata or b""))) if unit[1:]]
    if any(unit[0] & 1 or unit[1] >> 3 for unit in own):
        found.append("spatial video (MV-HEVC): only the first of its two views is used")
    # Dolby's metadata is a unit of type 62. A base layer that does not name its transfer is for Dolby players only.
    dolby = codec.codec_tag in ("dvh1", "dvhe", "dav1") or any(unit[0] >> 1 & 63 == 62 for unit in own)
    if dolby and codec.color_trc == ColorTrc.UNSPECIFIED:
        found.append("Dolby Vision profile 5: without its metadata colours are wrong, green and violet")
    return tuple(found)


def _hevc_layers(extradata: bytes) -> set[int]:
    """sps_max_sub_layers_minus1 of each sequence parameter set: ITU-T H.265, 7.3.2.2."""
    return {extradata[at.end()] >> 1 & 7 for at in re.finditer(rb"\x42\x01(?=.)", extradata, re.S)}
