"""Decodes the wanted frames of a file from its packets, and as few others as possible.

Decoding begins at the key frame before a wanted frame, and stops after the last wanted frame of a group. In between,
FFmpeg skips unwanted frames that no other frame needs. Each decoded frame is checked against the timeline; at the first
difference it raises `PlanBroken`, and the caller decodes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, Protocol, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from keyreel.config import ImageTransform
from keyreel.decode.aside import Aside
from keyreel.decode.color import Converter
from keyreel.decode.packets import BROKEN, demux, reason_of
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.source import Source
from keyreel.decode.timeline import Timeline
from keyreel.errors import UnsupportedCodec
from keyreel_kernels.cores import usable_cores

M = TypeVar("M")

_SEEK_PACKETS = 64  # reading this many takes longer than a seek: 0.3 ms, against 0.03 to 0.13 by container
_PART_PACKETS = 64  # a smaller part is not worth starting a decoder
_MAX_WORKERS = 8  # more would wait for Python, which passes packets and pictures one by one
WORKERS_PIXELS = 4 * 3840 * 2160  # bytes of all workers' pictures: each decoder holds reference pictures
_AHEAD_BYTES = 256 << 20  # bytes of pictures that wait for earlier ones


class DecoderFailed(Exception):
    """This decoder cannot decode the file; another one may."""


class FramesLost(Exception):
    """A damaged packet destroyed frames that other threads were decoding. A single thread keeps them."""


class Worker(Protocol):
    """Decodes and converts one open copy of the video; used by one thread at a time.

    Its pictures have the attributes `pts`, `dts`, `duration`, `key_frame` and `is_corrupt` of PyAV's VideoFrame.
    """

    container: InputContainer
    stream: VideoStream
    threaded: bool  # a damaged packet loses frames that other threads are decoding

    def decode(self, packet: Packet[VideoStream] | None, *, wanted: bool = True) -> Sequence[Any]:
        """Decodes a packet. Returns the pictures that are ready, in display order; after None all that are left.

        They are valid until the next call. The decoder may leave out the picture of a packet that is not `wanted`.

        Raises:
            FFmpegError: the packet is damaged.
        """

    def flush(self) -> None:
        """Prepares for packets of another place. All pictures must have been taken out."""

    def agrees(self, picture: Any, *, key: bool, fields: bool) -> bool:
        """Whether the decoder confirms what the packets say.

        Decoding may begin with this picture, if it is a `key`, and it is not a pair of fields, unless `fields`.
        """

    def keep(self, picture: Any) -> Any:
        """Returns the picture in a form that stays valid after the next packet."""

    def convert(self, pictures: Iterable[tuple[M, Any]]) -> Iterator[tuple[M, Any]]:
        """Yields upright RGB [H, W, 3] uint8 of each picture, in order; may read ahead."""


class Decoder(Protocol):
    """Decodes the packets of a video on one device."""

    workers: int  # workers that may decode parts of a file at the same time
    ahead: int  # pictures of a part that may wait for earlier parts
    gap: int  # decoding this many unneeded packets costs as much as a restart
    whole: bool  # whether one worker decodes everything as fast as several

    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> AbstractContextManager[Worker]:
        """Makes a worker on an open container. `alone`: no other works on the file, so it may use several threads."""

    def stack(self, pictures: list[Any]) -> Any:
        """Stacks pictures of one size as [T, H, W, 3]."""

    def join(self) -> None:
        """Waits for the device; called in the thread that takes a batch, see `Arrays.join`."""

    def fallback(self, error: DecoderFailed) -> Decoder:
        """Returns the decoder to continue with after an error; without one it raises the error."""


class Conversion(Protocol):
    """Converts decoded frames to pictures."""

    tone_mapped: str | None  # the HDR transfer that it maps to SDR, or None

    def __call__(self, frame: VideoFrame) -> Any: ...


class CpuDecoder:
    """FFmpeg decodes, swscale converts; pictures are NumPy arrays.

    Args:
        source: of the video.
        transform: size of the pictures; None for the full display resolution.
        threads: of all workers together, or of one that works alone; 0 for as many as there are cores.
        workers: how many share a file, with one thread each; by default one for each thread.
        aside: collects thumbnails of some of the frames.
        converter: makes a Conversion for a stream's sample aspect ratio; by default one to RGB.
    """

    gap = 0
    whole = True

    def __init__(
        self,
        source: Source,
        transform: ImageTransform | None,
        threads: int = 0,
        workers: int | None = None,
        aside: Aside | None = None,
        converter: Callable[[Fraction | None], Conversion] | None = None,
    ) -> None:
        self.workers = workers or threads or min(_MAX_WORKERS, usable_cores())
        pixels = transform.height * transform.width if transform else 1920 * 1080
        self.ahead = max(2, _AHEAD_BYTES // (6 * self.workers * pixels))
        self._source, self._threads, self._aside = source, threads, aside
        self._converter = converter or (lambda ratio: Converter(transform, ratio, source.limits.max_pixels))

    @contextmanager
    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> Iterator[CpuWorker]:
        stream.thread_type = "AUTO"
        # FFmpeg's threads decode interlaced MPEG-4 differently.
        shared = alone and stream.codec_context.name != "mpeg4"
        stream.codec_context.thread_count = self._threads if shared else 1
        threaded = shared and self._threads != 1
        converter = self._converter(stream.sample_aspect_ratio)
        small = self._aside.converter(stream.sample_aspect_ratio) if self._aside is not None else None
        yield CpuWorker(container, stream, threaded, converter, small, note, self._source.name)

    def stack(self, pictures: list[Any]) -> Any:
        return np.stack(pictures)

    def join(self) -> None:
        """Nothing to wait for."""

    def fallback(self, error: DecoderFailed) -> Decoder:
        raise error


@dataclass(slots=True)
class CpuWorker:
    """A `Worker` with FFmpeg's decoder."""

    container: InputContainer
    stream: VideoStream
    threaded: bool
    converter: Conversion
    small: Callable[[VideoFrame], None] | None  # sees each converted picture
    note: Callable[..., None]
    name: str  # of the source

    def decode(self, packet: Packet[VideoStream] | None, *, wanted: bool = True) -> Sequence[VideoFrame]:
        context = self.stream.codec_context
        context.skip_frame = "DEFAULT" if wanted else "NONREF"
        return context.decode(packet)

    def flush(self) -> None:
        self.stream.codec_context.flush_buffers()

    def agrees(self, picture: VideoFrame, *, key: bool, fields: bool) -> bool:
        if picture.interlaced_frame and not fields and self.stream.codec_context.codec.name in ("h264", "mpeg4"):
            return False
        return not key or (bool(picture.key_frame) and picture.pict_type == PictureType.I)

    def keep(self, picture: VideoFrame) -> VideoFrame:
        return picture

    def convert(self, pictures: Iterable[tuple[M, VideoFrame]]) -> Iterator[tuple[M, Any]]:
        converter = self.converter
        for mark, frame in pictures:
            try:
                picture = converter(frame)
                if self.small is not None:
                    self.small(frame)
            except (av.error.FFmpegError, ValueError, OverflowError) as error:
                raise UnsupportedCodec(
                    f"{self.name}: pictures of the format {frame.format.name} cannot be shown: {reason_of(error)}.",
                    hint="Convert it to H.264 with ffmpeg.",
                ) from error
            if converter.tone_mapped:
                self.note(f"{converter.tone_mapped.upper()} (HDR) frames tone-mapped to SDR, colours are approximate")
            yield mark, picture


@dataclass(slots=True)
class Run:
    """Packets [first, stop) to decode in one go, and the wanted frames among them: numbers in display order, rising."""

    first: int
    stop: int
    ranks: list[int]


def runs(timeline: Timeline, ranks: Sequence[int], *, gap: int = 0) -> list[Run]:
    """Finds the packets that these frames need.

    Args:
        timeline: of the stream.
        ranks: rising.
        gap: decode up to this many unneeded packets rather than start anew.
    """
    found: list[Run] = []
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        if not found or entry > found[-1].stop + gap:
            found.append(Run(entry, entry, []))
        # The second field of a frame may be a separate packet, which must not be lost.
        stop = min(int(timeline.shown[rank]) + 1 + timeline.fields, len(timeline.pts))
        found[-1].stop = max(found[-1].stop, stop)
        found[-1].ranks.append(rank)
    return found


def parts(timeline: Timeline, ranks: Sequence[int], workers: int) -> list[list[int]]:
    """Cuts rising ranks at entries, so that parts can be decoded independently; several for each worker.

    A part must be worth the start of a decoder: with too few packets there is one part.
    """
    if not ranks:
        return [[]]
    groups: dict[int, list[int]] = {}  # frames of each entry
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        groups.setdefault(entry, []).append(rank)
    needed = [max(int(timeline.shown[rank]) for rank in own) + 1 - entry for entry, own in groups.items()]
    minimum = max(_PART_PACKETS, sum(needed) // (4 * workers))
    found: list[list[int]] = [[]]
    weight = 0
    for packets, own in zip(needed, groups.values(), strict=True):
        if weight >= minimum:
            found.append([])
            weight = 0
        found[-1] += own
        weight += packets
    return found


class Packets:
    """Reads the packets of a file by their number in decoding order, rising.

    Args:
        container: at its start; nobody else may read it.
        stream: its video.
        timeline: of that stream.
        checkpoint: called often; raises to stop.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, timeline: Timeline, checkpoint: Callable[[], None]
    ) -> None:
        self._container, self._stream, self._timeline, self._checkpoint = container, stream, timeline, checkpoint
        self._packets: Iterator[Packet[VideoStream]] = demux(container, stream)
        self._place = 0  # number of the next packet

    def __call__(self, place: int) -> Packet[VideoStream]:
        """Returns the packet with this number.

        Raises:
            PlanBroken: the packet is not found.
        """
        if not 0 <= place - self._place <= _SEEK_PACKETS:
            self._seek(place)
        while True:
            self._checkpoint()
            packet = self._read()
            if not self._is_at(packet, self._place):
                raise PlanBroken
            self._place += 1
            if self._place > place:
                return packet

    def _is_at(self, packet: Packet[VideoStream], place: int) -> bool:
        timeline = self._timeline
        return place < len(timeline.pts) and (packet.pts, packet.size) == (timeline.pts[place], timeline.size[place])

    def _find(self, packet: Packet[VideoStream]) -> int:
        """The number of a packet; beyond the end if it is unclear."""
        found = np.flatnonzero((self._timeline.pts == packet.pts) & (self._timeline.size == packet.size))
        return int(found[0]) if len(found) == 1 else len(self._timeline.pts)

    def _read(self) -> Packet[VideoStream]:
        try:
            for packet in self._packets:
                if packet.size:
                    return packet
        except BROKEN as error:
            raise PlanBroken from error
        raise PlanBroken

    def _seek(self, place: int) -> None:
        """Moves the container to a packet at or before `place`.

        Demuxers seek by dts, pts, bytes or an index, so only the first packet tells where the container is. If that is
        too far, it tries earlier entries, at last the start.
        """
        timeline = self._timeline
        entries = np.flatnonzero(timeline.entry[: place + 1])
        for back in (1, 2, 5, len(entries)):
            entry = entries[max(0, len(entries) - back)]
            try:
                self._container.seek(int(min(timeline.dts[entry], timeline.pts[entry])), stream=self._stream)
            except BROKEN:
                continue
            self._packets = demux(self._container, self._stream)
            packet = self._read()
            if (found := self._find(packet)) <= place:
                self._packets = chain((packet,), self._packets)
                self._place = found
                return
        raise PlanBroken


class Cursor:
    """Decodes frames by their number in display order, rising.

    Args:
        worker: decodes; nobody else may use it.
        timeline: of its stream.
        checkpoint: called often; raises to stop.
        fed: called before each packet goes to the decoder.
        gap: see `runs`.
        keys: the ranks are key frames, which the decoder must confirm.
    """

    def __init__(
        self,
        worker: Worker,
        timeline: Timeline,
        checkpoint: Callable[[], None],
        fed: Callable[[], None],
        *,
        gap: int = 0,
        keys: bool = False,
    ) -> None:
        self._packets = Packets(worker.container, worker.stream, timeline, checkpoint)
        self._worker, self._timeline, self._fed, self._gap, self._keys = worker, timeline, fed, gap, keys
        self._rank = np.full(len(timeline.pts), -1)  # rank of each packet's frame, -1 without one
        self._rank[timeline.shown] = np.arange(len(timeline.shown))

    def frames(self, ranks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yields (rank, frame) for each of the ranks; each call goes further ahead in the file.

        Raises:
            PlanBroken: a frame is missing, damaged, or another than expected.
        """
        for run in runs(self._timeline, ranks, gap=self._gap):
            yield from self._decode(run)

    def _decode(self, run: Run) -> Iterator[tuple[int, Any]]:
        timeline, wanted = self._timeline, set(run.ranks)
        start = int(timeline.pts[run.first]) if run.first else None
        ranks = np.sort(self._rank[run.first : run.stop])
        ranks = ranks[ranks >= 0]
        # Leading pictures of the entry may need frames that were not decoded: they can fail, be wrong, or be missing.
        expected = [
            (rank, pts)
            for rank, pts in zip(ranks.tolist(), timeline.ticks[ranks].tolist(), strict=True)
            if start is None or pts >= start
        ]

        def optional(rank: int, pts: int) -> bool:
            return timeline.skippable and rank not in wanted and pts != start

        place = 0
        for packet, needed in self._feed(run, wanted):
            try:
                frames = self._worker.decode(packet, wanted=needed)
            except BROKEN as error:
                if packet is not None and start is not None and packet.pts is not None and packet.pts < start:
                    continue
                raise PlanBroken from error
            for frame in frames:
                if start is not None and frame.pts is not None and frame.pts < start:
                    continue
                while place < len(expected) and expected[place][1] != frame.pts and optional(*expected[place]):
                    place += 1
                if place == len(expected) or expected[place][1] != frame.pts or frame.is_corrupt:
                    raise PlanBroken
                rank = expected[place][0]
                place += 1
                key = frame.pts == start or (self._keys and rank in wanted)
                if not self._worker.agrees(frame, key=key, fields=timeline.fields):
                    raise PlanBroken
                if rank in wanted:
                    yield rank, frame
        if not all(optional(*left) for left in expected[place:]):
            raise PlanBroken
        self._worker.flush()

    def _feed(self, run: Run, wanted: set[int]) -> Iterator[tuple[Packet[VideoStream] | None, bool]]:
        """Yields the packets of a run and whether their frames are needed, then None, which drains the decoder."""
        for place in range(run.first, run.stop):
            packet = self._packets(place)
            self._fed()
            yield packet, not self._timeline.skippable or int(self._rank[place]) in wanted
        yield None, True
