"""Packets of AV1 (AV1 Bitstream & Decoding Process Specification): temporal units, made of open bitstream units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from keyreel.decode.coded import Bits, Coded, Entry

# obu_type: 6.2.2.
_SEQUENCE, _HEADER, _METADATA, _FRAME = 1, 3, 5, 6
_PASSED = (2, 4, 7, 15)  # delimiters, tiles, repeated headers, padding
_KEY, _INTRA_ONLY, _SWITCH = 0, 2, 3  # frame_type
_SELECT = 2  # each frame chooses: SELECT_SCREEN_CONTENT_TOOLS, SELECT_INTEGER_MV
_HEAD = 80  # bytes of a unit to read


@dataclass(slots=True)
class _Sequence:
    """What frame headers need of sequence_header_obu(): 5.5.1."""

    reduced: bool = False
    points: list[tuple[int, bool]] = field(default_factory=list)  # operating_point_idc, its decoder model is there
    model: bool = False
    removal_bits: int = 0  # of buffer_removal_time
    presentation_bits: int = 0  # of frame_presentation_time, where each frame has it
    id_bits: int = 0
    screen_content: int = _SELECT
    integer_mv: int = _SELECT
    order_bits: int = 0


class Av1:
    """A packet is spare where its frames refresh no reference: all that survives a frame is saved with one (7.20)."""

    def __init__(self) -> None:
        self._sequence: _Sequence | None = None
        self._keys = [False] * 8  # which references are key frames
        self._begun = False

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        try:
            return [self._read(data)]
        except (EOFError, IndexError):
            return [Coded(1, False, Entry.NONE, certain=False)]

    def end(self) -> list[Coded]:
        return []

    def _read(self, data: bytes) -> Coded:
        certain = spare = True
        entry = Entry.NONE
        frames = shown = sequences = 0
        for kind, layers, first, stop in _units(data):
            head = data[first : min(stop, first + _HEAD)]
            if kind == _SEQUENCE:
                self._sequence = _sequence(Bits(head))
                sequences += 1
                spare = False
            elif kind in (_HEADER, _FRAME):
                if self._sequence is None:
                    raise EOFError
                idc = self._sequence.points[0][0]
                # One spatial layer, and no frame that the operating point leaves out.
                certain &= idc >> 9 == 0 and (idc == 0 or idc >> layers[0] & 1 > 0)
                is_shown, is_key, refreshes = self._frame(Bits(head), self._sequence, layers)
                if is_shown and is_key and sequences and not frames and refreshes:
                    entry = Entry.CLOSED
                    self._begun = True
                frames += 1
                shown += is_shown
                spare &= not refreshes
            elif kind == _METADATA:
                spare &= head[0] == 4  # ITU-T T.35 messages belong to one frame, others to those that follow, too
            elif kind not in _PASSED:
                certain = False
        certain &= self._begun and shown == 1
        return Coded(shown, spare and certain, entry, certain)

    def _frame(self, bits: Bits, sequence: _Sequence, layers: tuple[int, int]) -> tuple[bool, bool, bool]:
        """(shown, key frame whose header is here, refreshes a reference): uncompressed_header(), 5.9.2."""
        kind, shown, resilient = _KEY, True, True
        if not sequence.reduced:
            if bits.read(1):  # show_existing_frame
                refreshes = self._keys[bits.read(3)]
                if refreshes:
                    self._keys = [True] * 8
                return True, False, refreshes
            kind, shown = bits.read(2), bits.read(1) == 1
            if shown:
                bits.read(sequence.presentation_bits)
            else:
                bits.read(1)  # showable_frame
            resilient = kind == _SWITCH or (kind == _KEY and shown) or bits.read(1) == 1
        bits.read(1)  # disable_cdf_update
        tools = bits.read(1) if sequence.screen_content == _SELECT else sequence.screen_content
        if tools and sequence.integer_mv == _SELECT:
            bits.read(1)
        bits.read(sequence.id_bits)
        if kind != _SWITCH and not sequence.reduced:
            bits.read(1)  # frame_size_override_flag
        bits.read(sequence.order_bits)
        if kind not in (_KEY, _INTRA_ONLY) and not resilient:
            bits.read(3)  # primary_ref_frame
        if sequence.model and bits.read(1):
            for idc, modelled in sequence.points:
                if modelled and (idc == 0 or (idc >> layers[0] & 1 and idc >> layers[1] + 8 & 1)):
                    bits.read(sequence.removal_bits)
        refreshed = 255 if kind == _SWITCH or (kind == _KEY and shown) else bits.read(8)
        self._keys = [kind == _KEY if refreshed >> n & 1 else self._keys[n] for n in range(8)]
        # Where frames have numbers, a decoder may check that none is missing.
        return shown, kind == _KEY, refreshed > 0 or sequence.id_bits > 0


def _units(data: bytes) -> Iterator[tuple[int, tuple[int, int], int, int]]:
    """(obu_type, (temporal_id, spatial_id), first byte, byte after the last) of each unit: 5.3."""
    at, end = 0, len(data)
    while at < end:
        head, layers, at = data[at], (0, 0), at + 1
        if head & 4:
            layers, at = (data[at] >> 5, data[at] >> 3 & 3), at + 1
        size = end - at
        if head & 2:
            size = 0
            for n in range(8):
                size |= (data[at] & 127) << 7 * n
                at += 1
                if data[at - 1] < 128:
                    break
        if head & 128 or at + size > end:
            raise EOFError
        yield head >> 3 & 15, layers, at, at + size
        at += size


def _sequence(bits: Bits) -> _Sequence:
    found = _Sequence()
    bits.read(3 + 1)
    found.reduced = bits.read(1) == 1
    if found.reduced:
        bits.read(5)
        found.points = [(0, False)]
    else:
        equal = delays = 0
        if bits.read(1):  # timing_info()
            bits.read(32 + 32)
            equal = bits.read(1)
            if equal:
                bits.ue()
            if bits.read(1):  # decoder_model_info()
                found.model = True
                delays = bits.read(5) + 1
                bits.read(32)
                found.removal_bits = bits.read(5) + 1
                width = bits.read(5) + 1
                found.presentation_bits = 0 if equal else width
        display = bits.read(1)
        for _ in range(bits.read(5) + 1):
            idc = bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            modelled = found.model and bits.read(1) == 1
            if modelled:
                bits.read(2 * delays + 1)
            if display and bits.read(1):
                bits.read(4)
            found.points.append((idc, modelled))
    width, height = bits.read(4) + 1, bits.read(4) + 1
    bits.read(width + height)
    if not found.reduced and bits.read(1):
        found.id_bits = bits.read(4) + 2 + bits.read(3) + 1
    bits.read(3)
    if not found.reduced:
        bits.read(4)
        ordered = bits.read(1)
        if ordered:
            bits.read(2)
        found.screen_content = _SELECT if bits.read(1) else bits.read(1)
        if found.screen_content:
            found.integer_mv = _SELECT if bits.read(1) else bits.read(1)
        if ordered:
            found.order_bits = bits.read(3) + 1
    return found
