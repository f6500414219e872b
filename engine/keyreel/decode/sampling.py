"""Which frames are wanted, and which packets must be fed to the decoder to get them.

`Picker` is the one definition of the sampling modes: it is asked about each frame in display order. A `Timeline` is
what a demux of the file, without decoding, tells of its packets. A `Cursor` feeds the decoder what the wanted frames
need: from the last key frame before them, without pictures that nothing refers to, and not beyond the last one; and
compares what comes out with the timeline. Where a file is odd or the two differ, `PlanBroken` says that all must be
decoded.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from keyreel.config import Sampling
from keyreel.types import F64, I64

# Far below any time base's tick, far above float64's rounding of a day: a wanted time that misses a pts by rounding
# only (0.1 + 0.7 against 0.8) means that pts.
TOLERANCE_SECONDS = 1e-9

# Where one packet is one frame with a pts of its own, so that the rank of a pts is the frame's place in display order.
_CONTAINERS = ("mov", "matroska")
_CODECS = ("h264", "hevc", "vvc", "av1", "vp8", "vp9", "mjpeg", "prores", "dnxhd", "ffv1")

_NEAR_PACKETS = 8  # draining and restarting the decoder costs about as much as decoding that many
_SEEK_PACKETS = 256  # reading that many costs more than a seek
_PROOF_PACKETS = 64  # each of the first ones must give its frame, before any is left out
_PART_PACKETS = 64  # a part of fewer costs more in starting and draining than another decoder wins


class PlanBroken(Exception):
    """The file, or a frame that came out of the decoder, is not what a plan can be made for."""


class Picture(Protocol):
    """What is asked of a decoded picture, whoever decoded it; PyAV's VideoFrame is one."""

    @property
    def pts(self) -> int | None:
        """In ticks."""

    @property
    def dts(self) -> int | None:
        """In ticks, where there is no pts."""

    @property
    def duration(self) -> int:
        """In ticks, 0 where unknown."""

    @property
    def key_frame(self) -> bool | int:
        """It can be decoded by itself."""

    @property
    def is_corrupt(self) -> bool:
        """Damaged, or made from missing pictures."""


class Decoder(Protocol):
    """Packets in decode order in, pictures in display order out."""

    def decode(self, packet: Packet[VideoStream] | None, *, spare: bool = False) -> Sequence[Picture]:
        """The pictures that are ready after a packet; valid until the next call, and after None all that are left.

        Args:
            packet: None drains.
            spare: nobody wants this picture: it may be left out if no other one refers to it.

        Raises:
            FFmpegError: the packet is damaged.
        """

    def flush(self) -> None:
        """Ready for the packets of another place, after a drain."""


class Picker:
    """Says of each frame, in display order, how many rows of the result it fills.

    A frame is shown on [start, stop), from its pts to the next frame's; the first one also before that. The window is
    [start_seconds, stop_seconds).

    fps: one row if any of the times start_seconds + n / fps of the window falls on the frame. every: each n-th frame
    of the window, from its first. times: a row for each of the times that falls on the frame, whatever the window; the
    last frame takes all that are left. keyframes, all: those of the window.

    Args:
        sampling: mode and window.
        times: rising, for mode times.
    """

    def __init__(self, sampling: Sampling, times: F64) -> None:
        self._mode, self._fps, self._every = sampling.mode, sampling.fps, sampling.every
        self._start = sampling.start_seconds
        self._stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
        self._times = times.tolist()
        self._next = 0  # the first wanted time that is not yet past
        self._seen = 0  # frames of the window so far

    def rows(self, start: float, stop: float, *, key: bool, first: bool = False, last: bool = False) -> int:
        """How many rows the frame shown on [start, stop) fills."""
        if self._mode == "times":
            before = self._next
            while self._next < len(self._times) and (last or self._times[self._next] + TOLERANCE_SECONDS < stop):
                self._next += 1
            return self._next - before
        if self._mode == "fps":
            if not first:
                self._next = max(self._next, math.floor((start - self._start) * self._fps) - 1)
                while self._wanted() + TOLERANCE_SECONDS < start:
                    self._next += 1
            return int(self._wanted() + TOLERANCE_SECONDS < min(stop, self._stop))
        if not self._start <= start + TOLERANCE_SECONDS < self._stop:
            return 0
        self._seen += 1
        if self._mode == "every":
            return int((self._seen - 1) % self._every == 0)
        return int(self._mode == "all" or key)

    def done(self, start: float) -> bool:
        """True when no frame shown from `start` on can be wanted."""
        return self._next == len(self._times) if self._mode == "times" else start + TOLERANCE_SECONDS >= self._stop

    def _wanted(self) -> float:
        return self._start + self._next / self._fps


@dataclass(frozen=True, slots=True)
class Timeline:
    """The packets of one stream, N in decode order, M of them shown as frames."""

    pts: I64  # [N] in ticks, no two alike
    dts: I64  # [N] in ticks
    keyframe: NDArray[np.bool_]  # [N]
    shown: I64  # [M] packet of each frame, in display order
    end_ticks: int  # where the last frame is no longer shown
    droppable: bool  # the decoder can leave out pictures that nothing refers to

    @property
    def ticks(self) -> I64:
        """[M] pts of the frames in display order."""
        return self.pts[self.shown]

    def entries(self, ranks: Sequence[int]) -> I64:
        """The key packet with which decoding must begin, for each frame in display order that is asked for.

        A picture shown before the key picture that is coded before it may need the pictures before that one (an open
        group), so that it begins a key packet earlier.
        """
        keys, packets = np.flatnonzero(self.keyframe), self.shown[np.asarray(ranks, np.int64)]
        key = np.searchsorted(keys, packets, side="right") - 1
        while np.any(late := self.pts[keys[key]] > self.pts[packets]):
            key -= late
        return keys[key]


def parts(timeline: Timeline, ranks: Sequence[int], lanes: int) -> list[list[int]]:
    """Cuts rising ranks at key packets, so that each part can be decoded by itself; several for each lane.

    A part is worth the decoder's start: where the frames need too few packets, there is one part.
    """
    cuts: list[tuple[int, list[int]]] = []  # packets that a group of pictures needs, its ranks
    entry = -1
    for rank, first in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        if first > entry:
            cuts.append((0, []))
            entry = first
        needed, wanted = cuts[-1]
        cuts[-1] = max(needed, int(timeline.shown[rank]) + 1 - entry), wanted
        wanted.append(rank)
    least = max(_PART_PACKETS, sum(needed for needed, _ in cuts) // (4 * lanes))
    found: list[list[int]] = [[]]
    weight = 0
    for needed, wanted in cuts:
        if weight >= least:
            found.append([])
            weight = 0
        found[-1] += wanted
        weight += needed
    return found


def scan(container: InputContainer, stream: VideoStream, checkpoint: Callable[[], None]) -> Timeline:
    """Reads all packets, decodes none.

    Args:
        container: at its start.
        stream: its video.
        checkpoint: called often; raises to stop.

    Raises:
        PlanBroken: the rank of a packet's pts is not surely the place of its frame: other containers and codecs, edit
            lists, missing or repeated pts, pictures shown before the first key picture, damage.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in _CODECS or not container.format.name.startswith(_CONTAINERS):
        raise PlanBroken
    pts, dts, flags = array("q"), array("q"), bytearray()
    latest = (-math.inf, 0)
    try:
        for packet in container.demux(stream):
            checkpoint()
            if packet.size == 0:
                continue
            if packet.pts is None or packet.is_discard or packet.is_corrupt:
                raise PlanBroken
            latest = max(latest, (packet.pts, packet.duration or 0))
            pts.append(packet.pts)
            dts.append(packet.pts if packet.dts is None else packet.dts)
            # A VP8 frame whose show_frame bit (RFC 6386, 9.1) is 0 is only referred to.
            shown = codec != "vp8" or bool(memoryview(packet)[0] & 16)
            flags.append(packet.is_keyframe | shown << 1)
    except av.error.FFmpegError as error:
        raise PlanBroken from error
    ticks, bits = np.array(pts, np.int64), np.frombuffer(bytes(flags), np.uint8)
    order = np.argsort(ticks, kind="stable")
    order = order[(bits[order] & 2) > 0]
    odd = len(order) == 0 or not bits[0] & 1 or ticks.min() != ticks[0]
    if odd or len(np.unique(ticks)) < len(ticks):
        raise PlanBroken
    duration = latest[1] or int(np.diff(ticks[order[-2:]]).sum()) or 1
    return Timeline(
        ticks, np.array(dts, np.int64), (bits & 1) > 0, order, int(ticks.max()) + duration, _droppable(codec, stream)
    )


def _droppable(codec: str, stream: VideoStream) -> bool:
    """H.264 says of each picture whether any other refers to it (nal_ref_idc); HEVC says it for one temporal layer."""
    extra = stream.codec_context.extradata or b""
    # numTemporalLayers of the HEVCDecoderConfigurationRecord, ISO/IEC 14496-15, 8.3.3.1.
    return codec == "h264" or (codec == "hevc" and len(extra) > 21 and extra[0] == 1 and extra[21] >> 3 & 7 == 1)


class Cursor:
    """Gets frames by their place in display order, rising, with as little decoding as is safe.

    Args:
        container: at its start.
        stream: its video.
        decoder: of that stream; nobody else feeds it.
        timeline: of that stream.
        checkpoint: called often; raises to stop.
        only_keys: only key frames will be asked for, and only key packets are fed.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        decoder: Decoder,
        timeline: Timeline,
        checkpoint: Callable[[], None],
        *,
        only_keys: bool,
    ) -> None:
        self._container, self._stream, self._decoder, self._timeline = container, stream, decoder, timeline
        self._checkpoint, self._only_keys = checkpoint, only_keys
        self._packets: Iterator[Packet[VideoStream]] = container.demux(stream)
        self._place = 0  # of the packet that comes next, in decode order
        self._fed = 0

    def frames(self, ranks: Sequence[int]) -> Iterator[tuple[int, Picture]]:
        """(rank, frame) of each of the ranks.

        Raises:
            PlanBroken: a frame is missing or damaged, or comes as a surprise.
        """
        for first, stop, wanted in self._runs(ranks):
            yield from self._decode(first, stop, set(wanted))

    def _runs(self, ranks: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(first, stop, ranks): runs of packets [first, stop) from a key packet on, and what is wanted from them."""
        first = stop = -1
        wanted: list[int] = []
        for rank, entry in zip(ranks, self._timeline.entries(ranks).tolist(), strict=True):
            if wanted and not self._only_keys and entry > stop + _NEAR_PACKETS:
                yield first, stop, wanted
                wanted = []
            if not wanted:
                first = entry
            wanted.append(rank)
            stop = max(stop, int(self._timeline.shown[rank]) + 1)
        if wanted:
            yield first, stop, wanted

    def _decode(self, first: int, stop: int, wanted: set[int]) -> Iterator[tuple[int, Picture]]:
        timeline = self._timeline
        ticks = timeline.ticks
        expected = self._expected(first, stop)
        needed = {int(ticks[rank]) for rank in wanted}
        spared: set[int] = set()
        place = 0
        for packet in self._feed(first, stop):
            spare = packet is not None and not packet.is_keyframe and packet.pts not in needed
            spare = spare and timeline.droppable and self._fed > _PROOF_PACKETS
            if spare and packet is not None and packet.pts is not None:
                spared.add(packet.pts)
            try:
                frames = self._decoder.decode(packet, spare=spare)
            except av.error.FFmpegError as error:
                raise PlanBroken from error
            for frame in frames:
                if frame.pts is not None and frame.pts < timeline.pts[first]:
                    continue  # of an open group, before the run
                while place < len(expected) and ticks[expected[place]] != frame.pts:
                    if int(ticks[expected[place]]) not in spared:
                        raise PlanBroken
                    place += 1
                if place == len(expected) or frame.is_corrupt or (place == 0 and not frame.key_frame):
                    raise PlanBroken
                if expected[place] in wanted:
                    yield expected[place], frame
                place += 1
        if any(int(ticks[rank]) not in spared for rank in expected[place:]):
            raise PlanBroken
        self._decoder.flush()

    def _expected(self, first: int, stop: int) -> list[int]:
        """Ranks that the packets [first, stop) give, shown from packet `first` on; rising."""
        timeline = self._timeline
        low = int(np.searchsorted(timeline.ticks, timeline.pts[first]))
        high = int(np.searchsorted(timeline.ticks, timeline.pts[first:stop].max(), side="right"))
        packets = timeline.shown[low:high]
        fed = (packets >= first) & (packets < stop)
        if self._only_keys:
            fed &= timeline.keyframe[packets]
        return [int(rank) for rank in low + np.flatnonzero(fed)]

    def _feed(self, first: int, stop: int) -> Iterator[Packet[VideoStream] | None]:
        """The packets [first, stop), then None, which drains the decoder."""
        if not 0 <= first - self._place <= _SEEK_PACKETS:
            self._seek(first)
        while self._place < stop:
            self._checkpoint()
            packet = self._read()
            if packet.pts != self._timeline.pts[self._place]:
                raise PlanBroken
            self._place += 1
            if self._place > first and not (self._only_keys and not packet.is_keyframe):
                self._fed += 1
                yield packet
        yield None

    def _read(self) -> Packet[VideoStream]:
        try:
            return next(self._packets)
        except (av.error.FFmpegError, StopIteration) as error:
            raise PlanBroken from error

    def _seek(self, place: int) -> None:
        """Brings the container to a packet at or before `place`.

        Demuxers seek by dts, by pts or by an index of their own, so that the first packet read says where one is;
        where that is too far, an earlier key packet is tried.
        """
        timeline = self._timeline
        keys = np.flatnonzero(timeline.keyframe[: place + 1])
        for back in (1, 2, 5):
            key = keys[max(0, len(keys) - back)]
            try:
                self._container.seek(int(min(timeline.dts[key], timeline.pts[key])), stream=self._stream)
            except av.error.FFmpegError as error:
                raise PlanBroken from error
            self._packets = self._container.demux(self._stream)
            packet = self._read()
            found = np.flatnonzero(timeline.pts == (timeline.end_ticks if packet.pts is None else packet.pts))
            if len(found) and found[0] <= place:
                self._packets = chain((packet,), self._packets)
                self._place = int(found[0])
                return
        raise PlanBroken
