"""Packets of VP8 (RFC 6386) and VP9 (VP9 Bitstream & Decoding Process Specification 0.6)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from keyreel.decode.coded import Bits, Coded, Entry


class _Lagging:
    """Holds each answer until the next packet says whether it takes up something of this one."""

    def __init__(self) -> None:
        self._held: Coded | None = None
        self._begun = False  # there was a key frame

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        before = self._held
        try:
            self._held, free = self._read(data)
        except EOFError:
            self._held, free = Coded(1, False, Entry.NONE, certain=False), False
        return [] if before is None else [replace(before, spare=before.spare and free)]

    def end(self) -> list[Coded]:
        return [] if self._held is None else [self._held]

    def _read(self, data: bytes) -> tuple[Coded, bool]:
        """The answer, spare as far as the packet itself says; and whether it can do without the one before."""
        raise NotImplementedError


class Vp8(_Lagging):
    """A picture is spare where it refreshes no reference and changes nothing that outlives it (9.3, 9.6, 9.7, 9.11).

    The map of segments may be taken from the frame before, whatever that one is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deltas = [0] * 8  # of the loop filter, with their signs

    def _read(self, data: bytes) -> tuple[Coded, bool]:
        if len(data) < 10:
            raise EOFError
        inter, shown = data[0] & 1, data[0] >> 4 & 1
        if not inter and data[3:6] != b"\x9d\x01\x2a":
            raise EOFError
        bits = _BoolDecoder(data[3 if inter else 10 :][:80])
        if not inter:
            bits.read(2)  # color_space, clamping_type
            self._begun, self._deltas = True, [0] * 8
        segmented = bits.read(1)
        mapped = values = 0
        if segmented:
            mapped, values = bits.read(1), bits.read(1)
            if values:
                bits.read(1)
                bits.optional(4, 7 + 1)
                bits.optional(4, 6 + 1)
            if mapped:
                bits.optional(3, 8)
        lasting = mapped or values
        free = not segmented or mapped == 1
        bits.read(1 + 6 + 3)  # the loop filter
        if bits.read(1) and bits.read(1):
            # Resilient streams say the same deltas again and again.
            new = [old if new is None else new for old, new in zip(self._deltas, bits.optional(8, 6 + 1), strict=True)]
            lasting |= new != self._deltas
            self._deltas = new
        if not inter:
            return Coded(shown, False, Entry.CLOSED if free else Entry.NONE), free
        bits.read(2 + 7)
        bits.optional(5, 4 + 1)  # of the quantizer
        golden, alternate = bits.read(1), bits.read(1)
        copied = (0 if golden else bits.read(2)) | (0 if alternate else bits.read(2))
        bits.read(2)  # sign biases, which each frame states
        refreshes = golden | alternate | copied | bits.read(1) | bits.read(1)  # refresh_entropy_probs, refresh_last
        return Coded(shown, self._begun and not (refreshes or lasting), Entry.NONE, self._begun), free


class _BoolDecoder:
    """Bits of even odds out of the arithmetic decoder: RFC 6386, 7.3."""

    __slots__ = ("_data", "_place", "_range", "_shifted", "_value")

    def __init__(self, data: bytes) -> None:
        self._data, self._place, self._range, self._shifted = data, 2, 255, 0
        self._value = int.from_bytes(data[:2], "big")

    def read(self, count: int) -> int:
        found = 0
        for _ in range(count):
            split = 1 + (self._range - 1 >> 1)
            found <<= 1
            if self._value >= split << 8:
                found |= 1
                self._value -= split << 8
                self._range -= split
            else:
                self._range = split
            while self._range < 128:
                self._range <<= 1
                self._value <<= 1
                self._shifted += 1
                if self._shifted == 8:
                    self._shifted = 0
                    if self._place >= len(self._data):
                        raise EOFError
                    self._value |= self._data[self._place]
                    self._place += 1
        return found

    def optional(self, count: int, width: int) -> list[int | None]:
        """Values behind a flag each."""
        return [self.read(width) if self.read(1) else None for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Vp9Frame:
    """What the uncompressed header of a frame says: 6.2."""

    shown: bool
    existing: bool = False  # shows a frame that was decoded before
    key: bool = False
    resilient: bool = False
    refreshes: bool = False
    size: tuple[int, int] | None = None  # (width, height), None where it is that of a frame before


class Vp9(_Lagging):
    """A packet is spare where its frames refresh no reference, and the next one takes up nothing else of it.

    A frame also leaves its motion vectors, its map of segments and its probabilities to the next frame. Key frames and
    error resilient frames begin anew (setup_past_independence, 6.1.2; UsePrevFrameMvs, 6.4.23).
    """

    def _read(self, data: bytes) -> tuple[Coded, bool]:
        frames = [vp9_frame(frame) for frame in vp9_frames(data)]
        first, shown = frames[0], sum(frame.shown for frame in frames)
        self._begun |= first.key
        # To show a frame that was decoded before costs nothing, and decoders differ in what they note of it.
        spare = not any(frame.refreshes or frame.existing for frame in frames)
        certain = self._begun and shown <= 1
        entry = Entry.CLOSED if first.key else Entry.NONE
        return Coded(shown, spare and certain, entry, certain), first.key or first.resilient


def vp9_frames(data: bytes) -> list[bytes]:
    """The frames of a packet, hidden ones too: annex B, superframes."""
    marker = data[-1] if data else 0
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - count * width :]
    if marker >> 5 != 6 or len(index) != 2 + count * width or index[0] != marker:
        return [data]
    frames, at = [], 0
    for n in range(count):
        size = int.from_bytes(index[1 + n * width : 1 + (n + 1) * width], "little")
        frames.append(data[at : at + size])
        at += size
    return frames


def vp9_frame(frame: bytes) -> Vp9Frame:
    """Raises:
    EOFError: it is damaged.
    """
    bits = Bits(frame[:24])
    if bits.read(2) != 2:  # frame_marker
        raise EOFError
    profile = bits.read(1) | bits.read(1) << 1
    if profile == 3:
        bits.read(1)
    if bits.read(1):
        return Vp9Frame(shown=True, existing=True)
    inter, shown, resilient = bits.read(1), bits.read(1) == 1, bits.read(1) == 1
    if not inter:
        _sync_code(bits)
        _color_config(bits, profile)
        return Vp9Frame(shown, key=True, resilient=resilient, refreshes=True, size=_size(bits))
    intra_only = 0 if shown else bits.read(1)
    if not resilient:
        bits.read(2)  # reset_frame_context
    size = None
    if intra_only:
        _sync_code(bits)
        if profile:
            _color_config(bits, profile)
        refreshes = bits.read(8) > 0
        size = _size(bits)
    else:
        refreshes = bits.read(8) > 0
        bits.read(3 * 4)  # references and their signs
        if not (bits.read(1) or bits.read(1) or bits.read(1)):  # found_ref
            size = _size(bits)
    return Vp9Frame(shown, resilient=resilient, refreshes=refreshes, size=size)


def _sync_code(bits: Bits) -> None:
    if bits.read(24) != 0x498342:
        raise EOFError


def _color_config(bits: Bits, profile: int) -> None:
    if profile >= 2:
        bits.read(1)  # ten_or_twelve_bit
    rgb = bits.read(3) == 7
    bits.read((0 if rgb else 1) + (profile & 1) * (1 if rgb else 3))


def _size(bits: Bits) -> tuple[int, int]:
    return bits.read(16) + 1, bits.read(16) + 1
