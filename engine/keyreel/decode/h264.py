"""Packets of H.264 (ITU-T H.264)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from keyreel.decode.coded import Bits, Coded, Entry
from keyreel.decode.nal import (
    LASTING,
    Damaged,
    ParameterSets,
    length_coded,
    length_listed,
    messages,
    payload,
    start_coded,
)

_HEAD = 24  # bytes of a slice that hold what is read of its header
_PROBED = 6  # frames after which FFmpeg believes to know how far pictures are reordered
_MESSAGE = 256  # bytes of a message to read
_SEQUENCE, _PICTURE = 7, 8  # nal_unit_type of the parameter sets
_PASSED = (9, 10, 11, 12, 14)  # delimiters, filling, what is said for layers of the slice that follows
_B, _I = 1, 2  # slice_type
_RECOVERY_POINT = 6  # payloadType
_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profile_idc with more syntax: 7.3.2.1.1


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What slices need of a sequence parameter set."""

    number_bits: int  # of frame_num
    planes: bool  # colour planes are coded apart
    fields: bool  # pictures may be fields
    order_bits: int  # of pic_order_cnt_lsb; 0 where pictures are shown as they are coded
    stated: bool  # how far they are reordered


class H264:
    """A picture is spare where nal_ref_idc is 0 in its slices (7.4.1), but not a field in a packet of its own.

    It is an entry where it is IDR, and an open one where it is intra and a message calls it an exact recovery point.

    Args:
        extradata: AVCDecoderConfigurationRecord, or units with start codes, or nothing.
    """

    def __init__(self, extradata: bytes) -> None:
        self._width, self._sets = 0, ParameterSets()
        self._sequences: dict[int, _Sequence] = {}
        self._pictures: dict[int, int] = {}  # pic_parameter_set_id -> seq_parameter_set_id
        self._fields = False  # pictures may be fields
        self._begun = self._whole = False  # a picture came that needs none before; none is shown before the first one
        self._half: tuple[int, int] | None = None  # frame_num and parity of a field that waits for the other one
        self._number: int | None = None  # frame_num of the last frame that is referred to
        self._epoch = 0  # IDR pictures so far
        self._orders: list[int] = []  # PicOrderCnt of the last frames since IDR
        self._order = 0  # of the last one that is referred to
        self._seen = self._delay = 0  # frames so far; how many were coded before one, but shown after it
        self._full_chroma = False  # some sequence is 4:4:4
        self._x264 = 0  # the build of the encoder, where it says so
        try:
            for unit in self._configured(extradata):
                if unit and unit[0] & 31 in (_SEQUENCE, _PICTURE):
                    self._sets.given(unit[0] & 31, self._parameter_set(unit), unit)
        except (Damaged, EOFError, IndexError):
            self._sets = ParameterSets()

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            return [self._read(data)]
        except (Damaged, EOFError, IndexError, KeyError):
            self._half = self._number = None
            return [Coded(1, False, Entry.NONE, certain=False)]

    def end(self) -> list[Coded]:
        return []

    def _configured(self, extradata: bytes) -> Iterator[bytes]:
        """The parameter sets of the container: ISO/IEC 14496-15, 5.3.3.1."""
        if extradata[:1] != b"\1":
            yield from (extradata[first:stop].rstrip(b"\0") for first, stop in start_coded(extradata))
            return
        self._width = (extradata[4] & 3) + 1
        at = 5
        for mask in (31, 255):
            found, at = length_listed(extradata, at + 1, extradata[at] & mask)
            yield from found

    def _read(self, data: bytes) -> Coded:
        self._sets.begin()
        idr = referred = recovery = False
        certain = True
        heads: list[bytes] = []  # of the slices
        for first, stop in length_coded(data, self._width) if self._width else start_coded(data):
            kind = data[first] & 31
            if kind in (1, 5):
                if heads and idr != (kind == 5) and not self._fields:
                    raise Damaged
                idr |= kind == 5
                referred |= data[first] & 0x60 > 0
                heads.append(data[first : min(stop, first + _HEAD)])
            elif kind == 6:
                for number, message in messages(payload(data[first + 1 : min(stop, first + _MESSAGE)])):
                    if number == _RECOVERY_POINT:
                        bits = Bits(message)
                        # recovery_frame_cnt, exact_match_flag: D.2.8
                        recovery = bits.ue() == 0 and bits.read(1) == 1
                    elif number in LASTING:
                        self._sets.found(kind, number, message)
                self._x264 = _x264_build(data, first, stop) or self._x264
            elif kind in (_SEQUENCE, _PICTURE):
                unit = data[first:stop].rstrip(b"\0")
                self._sets.found(kind, self._parameter_set(unit), unit)
            elif kind not in _PASSED:
                certain = False  # partitions, auxiliary pictures, layers, views
        if not self._sequences:
            raise Damaged
        shown, whole = self._frames(heads)
        # FFmpeg's decoder works around faults of old builds of x264 once it has seen the encoder's message, which only
        # the first packet brings.
        faulty = 0 < self._x264 < (151 if self._full_chroma else 34)
        entry = Entry.NONE
        if self._sets.complete() and not faulty:
            if idr:
                entry = Entry.CLOSED
            elif recovery and all(_slice_type(head) == _I for head in heads):
                entry = Entry.OPEN
        # Where a stream begins with an open entry, FFmpeg leaves out some of the B pictures that follow it.
        if not self._whole:
            self._whole = idr or (self._begun and all(_slice_type(head) != _B for head in heads))
        self._begun |= entry > Entry.NONE
        certain &= (self._whole or entry > Entry.NONE) and (shown == 1 or (heads != [] and not whole))
        spare = certain and whole and not referred and not self._sets.changed
        place = self._orders[-1] if self._orders else 0
        return Coded(shown, spare, entry if certain else Entry.NONE, certain, (self._epoch << 34) + place)

    def _frames(self, heads: list[bytes]) -> tuple[int, bool]:
        """How many frames begin in the slices of a packet, and whether these are all of their fields.

        Two fields of one frame_num make a frame, in one packet or in two: 7.4.1.2.4.
        """
        begun, whole = 0, self._half is None
        for head in heads:
            if not head[1] >> 7:  # first_mb_in_slice
                continue
            bits = Bits(payload(head[1:]))
            _, _, pps = bits.ue(), bits.ue(), bits.ue()
            sequence = self._sequences[self._pictures[pps]]
            if sequence.planes:
                bits.read(2)  # colour_plane_id
            number = bits.read(sequence.number_bits)
            parity = 1 + bits.read(1) if sequence.fields and bits.read(1) else 0
            if self._half is None:
                begun += 1
                self._seen += 1
                self._half = (number, parity) if parity else None
                self._check_number(head[0], number, sequence.number_bits)
                self._check_order(head[0], bits, sequence)
            elif parity and self._half == (number, 3 - parity):
                self._half = None
            else:
                raise Damaged
        return begun, whole and self._half is None

    def _check_number(self, header: int, number: int, width: int) -> None:
        """What FFmpeg puts in the place of frames that are missing hangs on all that it decoded before: 7.4.3.

        Raises:
            Damaged: some are.
        """
        if header & 31 != 5 and self._number is not None and (number - self._number) % (1 << width) > 1:
            raise Damaged
        if header & 0x60:
            self._number = number

    def _check_order(self, header: int, bits: Bits, sequence: _Sequence) -> None:
        """Where a sequence does not say how far its pictures are reordered, FFmpeg takes that from the first ones.

        At the first picture that is reordered further than those it leaves out some.

        Raises:
            Damaged: this is one.
        """
        if header & 31 == 5:
            bits.ue()  # idr_pic_id
            self._orders.clear()
            self._order = 0
            self._epoch += 1
        if not sequence.order_bits:
            self._orders = [self._seen]
            return
        # PicOrderCnt: 8.2.1.1.
        half = 1 << sequence.order_bits - 1
        order = self._order + (bits.read(sequence.order_bits) - self._order + half) % (2 * half) - half
        depth = sum(before > order for before in self._orders)
        self._orders = [*self._orders[-15:], order]
        if header & 0x60:
            self._order = order
        if self._seen <= _PROBED:
            self._delay = max(self._delay, depth)
        elif depth > self._delay and not sequence.stated:
            raise Damaged

    def _parameter_set(self, unit: bytes) -> int:
        """Takes from a parameter set what slices need; returns its number: 7.3.2.1.1, 7.3.2.2."""
        bits = Bits(payload(unit[1:]))
        if unit[0] & 31 == _PICTURE:
            number = bits.ue()
            self._pictures[number] = bits.ue()
            return number
        profile = bits.read(8)
        bits.read(16)
        number = bits.ue()
        planes = False
        if profile in _HIGH:
            chroma = bits.ue()
            self._full_chroma |= chroma == 3
            planes = chroma == 3 and bits.read(1) == 1
            bits.ue()  # bit depths
            bits.ue()
            bits.read(1)
            if bits.read(1):
                for index in range(8 if chroma != 3 else 12):
                    _skip_scaling_list(bits, index)
        number_bits = bits.ue() + 4
        order = bits.ue()
        order_bits = bits.ue() + 4 if order == 0 else 0
        if order == 1:  # sums of offsets, which no encoder in use writes
            raise Damaged
        bits.ue()  # max_num_ref_frames
        bits.read(1)
        bits.ue()  # width and height
        bits.ue()
        fields = not bits.read(1)
        self._sequences[number] = _Sequence(
            number_bits, planes, fields, order_bits, _reordering_is_stated(bits, fields)
        )
        self._fields = any(one.fields for one in self._sequences.values())
        return number


def _reordering_is_stated(bits: Bits, fields: bool) -> bool:
    """bitstream_restriction_flag, with what is before it: 7.3.2.1.1, E.1.1."""
    try:
        bits.read(1 + fields)
        if bits.read(1):  # frame_cropping_flag
            for _ in range(4):
                bits.ue()
        if not bits.read(1):  # vui_parameters_present_flag
            return False
        if bits.read(1) and bits.read(8) == 255:  # aspect_ratio_idc
            bits.read(32)
        if bits.read(1):
            bits.read(1)
        if bits.read(1) and bits.read(4) >= 0 and bits.read(1):  # colour_description_present_flag
            bits.read(24)
        if bits.read(1):
            bits.ue()
            bits.ue()
        if bits.read(1):  # timing_info_present_flag
            bits.read(65)
        delays = 0
        for _ in range(2):  # hrd_parameters()
            if bits.read(1):
                delays = 1
                count = bits.ue() + 1
                bits.read(8)
                for _ in range(count):
                    bits.ue()
                    bits.ue()
                    bits.read(1)
                bits.read(20)
        bits.read(delays + 1)
        return bits.read(1) == 1
    except EOFError:
        return False


def _slice_type(head: bytes) -> int:
    """7.4.3, table 7-6."""
    bits = Bits(payload(head[1:]))
    bits.ue()
    return bits.ue() % 5


def _skip_scaling_list(bits: Bits, index: int) -> None:
    """7.3.2.1.1.1."""
    if not bits.read(1):
        return
    last = following = 8
    for _ in range(16 if index < 6 else 64):
        if following:
            code = bits.ue()
            following = (last + (code + 1 >> 1 if code & 1 else -(code >> 1))) & 255
        last = following or last


def _x264_build(data: bytes, first: int, stop: int) -> int:
    """0 where it is not said."""
    at = data.find(b"x264 - core ", first, min(stop, first + 64))
    number = data[at + 12 : at + 16].split(b" ")[0]
    return int(number) if at >= 0 and number.isdigit() else 0
