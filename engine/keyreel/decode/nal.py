"""Units of H.264 (ITU-T H.264) and HEVC (ITU-T H.265), and the parameter sets among them.

They lie behind start codes (annex B of both), or behind their length (ISO/IEC 14496-15).
"""

from __future__ import annotations

from collections.abc import Iterator

_START = b"\0\0\1"
# Messages that hold until they are taken back: how the picture is turned, which transfer function it has.
LASTING = (47, 147)


class Damaged(Exception):
    """The packet does not keep to the syntax."""


def start_coded(data: bytes) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each unit, without start codes."""
    at = data.find(_START)
    while at >= 0:
        first = at + 3
        at = data.find(_START, first)
        stop = len(data) if at < 0 else at
        if first < stop:
            yield first, stop


def length_coded(data: bytes, width: int) -> Iterator[tuple[int, int]]:
    """The same, where `width` bytes before each unit say how long it is."""
    at, end = 0, len(data)
    while at < end:
        first = at + width
        at = first + int.from_bytes(data[at:first], "big")
        if at > end or first >= at:
            raise Damaged
        yield first, at


def length_listed(data: bytes, at: int, count: int) -> tuple[list[bytes], int]:
    """`count` units from a place on, two bytes before each say how long it is; and the byte after the last."""
    found = []
    for _ in range(count):
        first = at + 2
        at = first + int.from_bytes(data[at:first], "big")
        found.append(data[first:at].rstrip(b"\0"))
    return found, at


def payload(data: bytes) -> bytes:
    """Without the bytes that keep a start code from appearing: 7.4.1 and 7.4.2."""
    return data.replace(b"\0\0\3", b"\0\0")


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(payloadType, payload) of each message (supplemental enhancement information), as far as it is there: 7.3.2.3."""
    at = 0
    while at + 2 < len(data):
        numbers = []
        for _ in range(2):
            number = 0
            while at < len(data) and data[at] == 255:
                number, at = number + 255, at + 1
            if at == len(data):
                return
            numbers.append(number + data[at])
            at += 1
        yield numbers[0], data[at : at + numbers[1]]
        at += numbers[1]


class ParameterSets:
    """Which parameter sets, and messages that last, a decoder that begins here would lack.

    One that begins anywhere knows those of the container. A set that came with a packet must come again, as it is now,
    with the packet where decoding begins.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[int, int], bytes] = {}
        self._found: dict[tuple[int, int], bytes] = {}
        self._here: set[tuple[int, int]] = set()
        self._changed = False

    def given(self, kind: int, number: int, unit: bytes) -> None:
        self._given[kind, number] = unit

    def begin(self) -> None:
        self._here.clear()
        self._changed = False

    def found(self, kind: int, number: int, unit: bytes) -> None:
        name = kind, number
        known = self._found.get(name, self._given.get(name))
        self._changed |= known != unit
        if name in self._found or known != unit:
            self._found[name] = unit
        self._here.add(name)

    @property
    def changed(self) -> bool:
        """This packet brought one that was not known, or was another."""
        return self._changed

    def complete(self) -> bool:
        return self._found.keys() <= self._here
