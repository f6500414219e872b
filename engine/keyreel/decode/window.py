"""Timelines of a stream that is read once, group by group, as its packets come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.decode.bitstream import Entry
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.timeline import Ledger, Timeline

# A group that is longer is not waited for: about ten seconds of video.
_MOST_PACKETS = 600
_MOST_BYTES = 64 << 20


def windows(
    container: InputContainer, stream: VideoStream, checkpoint: Callable[[], None]
) -> Iterator[tuple[Timeline, list[Packet[VideoStream]]]]:
    """(timeline, its packets) from each entry of the stream to the next one; `Timeline.last` at its end.

    Frames follow each other from window to window. The next entry and the pictures that lead it stand at the end of a
    window's packets, where its last frames may need them, and again at the start of the next one's.

    Args:
        container: at its start.
        stream: its video.
        checkpoint: called often; raises to stop.

    Raises:
        PlanBroken: not a stream that can be planned for, or a group is too long to be waited for.
    """
    ledger = Ledger(container, stream)
    held: list[Packet[VideoStream]] = []
    first = known = size = 0  # packets: of the window, of which all was looked at; bytes held
    door: int | None = None  # the next entry

    def cut() -> Iterator[tuple[Timeline, list[Packet[VideoStream]]]]:
        nonlocal first, known, door
        while known < ledger.told:
            place, known = known, known + 1
            entry = ledger.entry(place)
            if door is not None and (entry or ledger.trails(place, door)):
                low = ledger.shown_from(door, door + 1 if ledger.entry(door) == Entry.OPEN else place)
                if low is None:
                    raise PlanBroken
                led = [_copy(packet) for packet in held[door - first : place - first]]
                yield ledger.timeline(first, place, low), held[: door - first] + led
                del held[: door - first]
                first, door = door, None
            if entry and place > first:
                door = place

    try:
        for packet in container.demux(stream):
            checkpoint()
            if not packet.size:
                continue
            ledger.add(packet)
            held.append(packet)
            yield from cut()
            size = sum(p.size for p in held) if len(held) % 16 == 0 else size
            if len(held) > _MOST_PACKETS or size > _MOST_BYTES:
                raise PlanBroken
    except av.error.FFmpegError as error:
        raise PlanBroken from error
    ledger.end()
    yield from cut()
    yield ledger.timeline(first), held


def _copy(packet: Packet[VideoStream]) -> Packet[VideoStream]:
    """A packet that may be fed beside the first one: some decoders take what they are fed."""
    copy: Packet[Any] = Packet(bytes(packet))
    copy.stream, copy.time_base, copy.pts, copy.dts = packet.stream, packet.time_base, packet.pts, packet.dts
    copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
    return copy
