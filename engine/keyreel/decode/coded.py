"""What a compressed packet says of itself, and the bit reader with which its headers are read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class Entry(IntEnum):
    """Whether decoding may begin with a packet, so that everything shown from its picture on is exact."""

    NONE = 0
    CLOSED = 1  # nothing after it in decode order refers to anything before it
    OPEN = 2  # pictures coded after it but shown before it (leading pictures) may refer to what came before


@dataclass(frozen=True, slots=True)
class Coded:
    """What one packet says of itself.

    Attributes:
        shown: pictures that the decoder gives because of it: 0 (only referred to, or a frame's second field), 1, more.
        spare: nothing else needs this packet, so that it can be left out when its picture is not wanted.
        entry: whether decoding may begin here, with a decoder that is new or flushed.
        certain: False where the packet is odd (damage, unknown syntax, several pictures where one was expected).
        order: rises in the order of display; None where that is the order of the packets.
    """

    shown: int
    spare: bool
    entry: Entry
    certain: bool = True
    order: int | None = None


class Bitstream(Protocol):
    """Reads the packets of one stream, all of them, in decode order."""

    def read(self, data: bytes, *, key: bool, disposable: bool = False) -> list[Coded]:
        """Answers in decode order; may lag, since whether a packet is spare may hang on the next one.

        Args:
            data: the packet.
            key: the container calls it a key packet.
            disposable: the container says that nothing refers to it.
        """

    def end(self) -> list[Coded]:
        """The answers still owed; then one has come for each packet."""


class Bits:
    """Reads bits from the most significant one on; EOFError beyond the end."""

    __slots__ = ("_left", "_value")

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise EOFError
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        """Unsigned Exp-Golomb code: ITU-T H.264 and H.265, 9.1 and 9.2."""
        zeros = self._left - (self._value & (1 << self._left) - 1).bit_length()
        return self.read(2 * zeros + 1) - 1
