"""Packets of MPEG-1 and MPEG-2 video (ISO/IEC 11172-2, 13818-2), MPEG-4 part 2 (ISO/IEC 14496-2), and their kin."""

from __future__ import annotations

from collections.abc import Callable

from keyreel.decode.coded import Bits, Coded, Entry

_ODD = Coded(1, False, Entry.NONE, certain=False)
_I, _P, _B = 1, 2, 3  # picture_coding_type
_FRAME = 3  # picture_structure


class _Order:
    """Counts pictures in the order of display: B pictures are shown at once, others when the next one of them comes."""

    def __init__(self) -> None:
        self._count = 0

    def of(self, kind: int) -> int:
        self._count += 1 if kind == _B else 1 << 32
        return self._count if kind == _B else self._count | (1 << 32) - 1


class Mpeg12:
    """MPEG-1 and MPEG-2: a B picture is spare; decoding may begin with an I picture behind a sequence header."""

    def __init__(self) -> None:
        self._anchors = 0  # I and P pictures so far, at most 2
        self._order = _Order()
        self._closed = False  # of this group of pictures

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            return [self._read(data)]
        except (EOFError, IndexError):
            return [_ODD]

    def end(self) -> list[Coded]:
        return []

    def _read(self, data: bytes) -> Coded:
        kind, structure = 0, _FRAME
        sequence = lasting = False
        at = data.find(b"\0\0\1")
        while at >= 0:
            code, head = data[at + 3], data[at + 4 : at + 12]
            if 0 < code < 0xB0:  # slices
                break
            if code == 0x00:
                if kind:
                    raise EOFError
                kind = head[1] >> 3 & 7
            elif code == 0xB3:
                sequence = True
            elif code == 0xB5:
                extension = head[0] >> 4
                if extension == 8:
                    structure = head[2] & 3
                elif extension in (5, 9, 10):  # scalable layers
                    raise EOFError
                lasting |= extension not in (7, 8)
            elif code == 0xB8:
                self._closed = head[3] >> 6 & 1 == 1
            elif code == 0xB7:
                lasting = True
            at = data.find(b"\0\0\1", at + 3)
        # Fields: two pictures make a frame, in one packet or in two.
        if kind not in (_I, _P, _B) or structure != _FRAME or data.find(b"\0\0\1\0", at + 4) >= 0:
            return _ODD
        order = self._order.of(kind)
        if kind == _B:
            # FFmpeg leaves out those that lack a picture before them.
            missing = self._anchors < (1 if self._closed else 2)
            return Coded(0 if missing else 1, not (sequence or lasting), Entry.NONE, self._anchors > 0, order)
        begins = kind == _I and sequence
        self._anchors = min(2, self._anchors + (self._anchors > 0 or begins))
        if not begins:
            return Coded(1, False, Entry.NONE, self._anchors > 0, order)
        return Coded(1, False, Entry.CLOSED if self._closed else Entry.OPEN, order=order)


class Mpeg4:
    """MPEG-4 part 2: a B-VOP is spare; decoding may begin with an I-VOP.

    Args:
        extradata: headers, or nothing.
    """

    def __init__(self, extradata: bytes) -> None:
        self._extradata = extradata
        self._headers = b""  # the last that came with a packet
        self._increment_bits = 0  # of vop_time_increment
        self._interlaced = False
        self._anchors = 0
        self._order = _Order()
        try:
            self._layer(extradata)
        except EOFError:
            self._increment_bits = 0

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            return [self._read(data)]
        except EOFError:
            return [_ODD]

    def end(self) -> list[Coded]:
        return []

    def _read(self, data: bytes) -> Coded:
        at = data.find(b"\0\0\1\xb6")
        # None is damage, or holds a place for what was packed with another; several are packed.
        if at < 0 or data.find(b"\0\0\1\xb6", at + 4) >= 0:
            return _ODD
        headers = data[:at]
        group = headers.find(b"\0\0\1\xb3")
        if group >= 0:  # its time changes each time
            headers = headers[:group] + headers[group + 7 :]
        if headers:
            self._layer(headers)
            if headers not in self._extradata:
                self._headers = headers
        bits = Bits(data[at + 4 : at + 24])
        kind = bits.read(2) + 1
        while bits.read(1):  # modulo_time_base
            pass
        bits.read(1 + self._increment_bits + 1)
        if not self._increment_bits or not bits.read(1):  # vop_coded
            return _ODD
        order = self._order.of(kind)
        if kind == _B:
            # FFmpeg's direct mode of interlaced B-VOPs hangs on the times of the first one that it sees.
            spare = not self._interlaced and not headers
            return Coded(int(self._anchors == 2), spare, Entry.NONE, self._anchors > 0, order)
        begins = kind == _I and headers.endswith(self._headers)
        self._anchors = min(2, self._anchors + (self._anchors > 0 or begins))
        entry = Entry.OPEN if begins and not self._interlaced else Entry.NONE
        return Coded(1, False, entry, self._anchors > 0, order)

    def _layer(self, headers: bytes) -> None:
        """video_object_layer(): 6.2.3."""
        for code in range(0x20, 0x30):
            at = headers.find(b"\0\0\1" + bytes([code]))
            if at >= 0:
                break
        else:
            return
        bits = Bits(headers[at + 4 : at + 44])
        bits.read(1 + 8)
        version = 1
        if bits.read(1):
            version = bits.read(4)
            bits.read(3)
        if bits.read(4) == 15:  # aspect_ratio_info
            bits.read(16)
        if bits.read(1) and bits.read(2 + 1) >= 0 and bits.read(1):  # vol_control_parameters, vbv_parameters
            bits.read(79)
        shape = bits.read(2)
        bits.read(1)
        self._increment_bits = max(1, (bits.read(16) - 1).bit_length())
        bits.read(1)
        if bits.read(1):  # fixed_vop_rate
            bits.read(self._increment_bits)
        if shape or version > 5:
            raise EOFError
        bits.read(1 + 13 + 1 + 13 + 1)
        self._interlaced = bits.read(1) == 1


class Chain:
    """Codecs in which each picture refers to the one before, and an intra picture to none.

    Args:
        codec: of `CHAINS`.
    """

    def __init__(self, codec: str) -> None:
        self._codec = codec

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            begins = key and CHAINS[self._codec](data)
        except (EOFError, IndexError):
            return [_ODD]
        return [Coded(1, disposable and not key, Entry.CLOSED if begins else Entry.NONE)]

    def end(self) -> list[Coded]:
        return []


def _h263_intra(data: bytes) -> bool:
    """ITU-T H.263, 5.1."""
    bits = Bits(data[:12])
    bits.read(22 + 8 + 5)
    if bits.read(3) != 7:
        return bits.read(1) == 0
    if bits.read(3) != 1:  # UFEP: the rest is that of a picture before
        return False
    bits.read(18)
    return bits.read(3) == 0


def _flv1_intra(data: bytes) -> bool:
    bits = Bits(data[:12])
    bits.read(17 + 5 + 8)
    size = bits.read(3)
    bits.read((16, 32)[size] if size < 2 else 0)
    return bits.read(2) == 0


# Whether a picture is intra.
CHAINS: dict[str, Callable[[bytes], bool]] = {
    "h263": _h263_intra,
    "flv1": _flv1_intra,
    "msmpeg4v2": lambda data: data[0] >> 6 == 0,
    "msmpeg4v3": lambda data: data[0] >> 6 == 0,
    "wmv1": lambda data: data[0] >> 6 == 0,
    "wmv2": lambda data: data[0] >> 7 == 0,
    "ffv1": lambda data: True,
}
