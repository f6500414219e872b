"""Packets of HEVC (ITU-T H.265)."""

from __future__ import annotations

from collections.abc import Iterator

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

# nal_unit_type, table 7-1.
_RASL = (8, 9)
_BLA = (16, 17, 18)
_IDR = (19, 20)
_CRA = 21
_VIDEO, _SEQUENCE, _PICTURE = 32, 33, 34  # parameter sets
_ENDS = (36, 37)
_MESSAGES = 39
_PASSED = (35, 38, 40, 62)  # delimiters, filling, messages on what was before, Dolby Vision's metadata


class Hevc:
    """A picture is spare where it is a sub-layer non-reference picture of the highest temporal layer (table 7-1).

    Args:
        extradata: HEVCDecoderConfigurationRecord, or units with start codes, or nothing.
    """

    def __init__(self, extradata: bytes) -> None:
        self._width, self._sets = 0, ParameterSets()
        self._highest: dict[int, int] = {}  # seq_parameter_set_id -> highest TemporalId
        self._order_bits: dict[int, tuple[int, int]] = {}  # the same -> bits: colour plane, slice_pic_order_cnt_lsb
        self._pictures: dict[int, tuple[int, int]] = {}  # pic_parameter_set_id -> the same, extra bits of slices
        self._epoch = self._order = 0  # pictures after which the count starts again; PicOrderCnt that was kept: 8.3.1
        self._hides = False  # a picture may say that it is not to be shown
        self._begun = self._skips = False  # an IRAP picture was seen; RASL pictures that follow the last are not shown
        self._ended = True
        try:
            for unit in self._configured(extradata):
                if len(unit) > 2 and unit[0] >> 1 in (_VIDEO, _SEQUENCE, _PICTURE):
                    self._sets.given(unit[0] >> 1, self._parameter_set(unit), unit)
        except (Damaged, EOFError, IndexError, KeyError):
            self._sets = ParameterSets()

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            return [self._read(data)]
        except (Damaged, EOFError, IndexError, KeyError):
            return [Coded(1, False, Entry.NONE, certain=False)]

    def end(self) -> list[Coded]:
        return []

    def _configured(self, extradata: bytes) -> Iterator[bytes]:
        """The parameter sets of the container: ISO/IEC 14496-15, 8.3.3.1."""
        if len(extradata) < 23 or extradata[:3] in (b"\0\0\0", b"\0\0\1"):
            yield from (extradata[first:stop].rstrip(b"\0") for first, stop in start_coded(extradata))
            return
        self._width = (extradata[21] & 3) + 1
        at = 23
        for _ in range(extradata[22]):
            found, at = length_listed(extradata, at + 3, int.from_bytes(extradata[at + 1 : at + 3], "big"))
            yield from found

    def _read(self, data: bytes) -> Coded:
        self._sets.begin()
        certain = unreferred = True
        ends = False
        kinds, pictures, head = set(), 0, b""
        for first, stop in length_coded(data, self._width) if self._width else start_coded(data):
            kind = data[first] >> 1 & 63
            if data[first] & 1 or data[first + 1] & 0xF8:  # nuh_layer_id
                certain = False
            elif kind < 32:
                kinds.add(kind)
                layer, highest = (data[first + 1] & 7) - 1, max(self._highest.values(), default=-1)
                if layer > highest:
                    raise Damaged
                unreferred &= kind <= 14 and kind % 2 == 0 and layer == highest
                if data[first + 2] & 0x80:  # first_slice_segment_in_pic_flag
                    pictures += 1
                    head = data[first : min(stop, first + 24)]
                    # no_output_of_prior_pics_flag
                    certain &= not (self._begun and 16 <= kind <= 23 and data[first + 2] & 0x40)
            elif kind in (_VIDEO, _SEQUENCE, _PICTURE):
                unit = data[first:stop].rstrip(b"\0")
                self._sets.found(kind, self._parameter_set(unit), unit)
            elif kind == _MESSAGES:
                for number, message in messages(payload(data[first + 2 : min(stop, first + 256)])):
                    if number in LASTING:
                        self._sets.found(kind, number, message)
            elif kind in _ENDS:
                ends = True
            else:
                certain &= kind in _PASSED
        if len(kinds) != 1 or pictures != 1:
            certain = False
        kind = min(kinds, default=0)
        entry = Entry.NONE
        if kinds and kind >= 16:
            # What follows a picture without a way back to the pictures before it: NoRaslOutputFlag, 8.1.3.
            certain &= not (self._begun and self._ended and kind == _CRA)
            self._begun, self._skips = True, self._ended or kind != _CRA
            if certain and self._sets.complete():
                entry = Entry.OPEN if kind == _CRA else Entry.CLOSED if kind in _BLA + _IDR else Entry.NONE
        order = self._ordered(head, kind) if head else 0
        self._ended = ends or (self._ended and not kinds)
        certain &= self._begun and not self._hides
        shown = 0 if self._skips and kind in _RASL else pictures
        spare = certain and unreferred and not ends and not self._sets.changed
        return Coded(shown, spare, entry, certain, order)

    def _ordered(self, head: bytes, kind: int) -> int:
        """Rises with PicOrderCnt: 7.3.6.1, 8.3.1."""
        bits = Bits(payload(head[2:]))
        bits.read(1 + (16 <= kind <= 23))
        sequence, extra = self._pictures[bits.ue()]
        plane, width = self._order_bits[sequence]
        bits.read(extra)
        bits.ue()  # slice_type
        bits.read(plane)
        anew = kind in _BLA + _IDR or (kind == _CRA and self._ended)
        order = 0 if kind in _IDR else bits.read(width)
        if anew:
            self._epoch += 1
        else:
            half = 1 << width - 1
            order = self._order + (order - self._order + half) % (2 * half) - half
        if head[1] & 7 == 1 and (kind >= 16 or (kind % 2 == 1 and kind < 6)):
            self._order = order
        return (self._epoch << 34) + order

    def _parameter_set(self, unit: bytes) -> int:
        """Takes from a parameter set what is asked of it; returns its number: 7.3.2."""
        kind, bits = unit[0] >> 1 & 63, Bits(payload(unit[2:]))
        if kind == _VIDEO:
            return bits.read(4)
        if kind == _PICTURE:
            number, sequence = bits.ue(), bits.ue()
            bits.read(1)
            self._hides |= bits.read(1) == 1  # output_flag_present_flag
            self._pictures[number] = sequence, bits.read(3)
            return number
        bits.read(4)
        highest = bits.read(3)
        bits.read(1 + 88 + 8)  # profile_tier_level(): 7.3.3
        present = [(bits.read(1), bits.read(1)) for _ in range(highest)]
        if highest:
            bits.read(2 * (8 - highest))
        for profile, level in present:
            bits.read(88 * profile + 8 * level)
        number = bits.ue()
        self._highest[number] = highest
        plane = 2 * bits.read(1) if bits.ue() == 3 else 0
        bits.ue()  # width and height
        bits.ue()
        if bits.read(1):  # conformance_window_flag
            for _ in range(4):
                bits.ue()
        bits.ue()  # bit depths
        bits.ue()
        self._order_bits[number] = plane, bits.ue() + 4
        return number
