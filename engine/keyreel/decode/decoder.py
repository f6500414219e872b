"""From the packets of a file to the decoded frames that are wanted, with as little decoding as is exact.

Decoding enters at the key frame before a wanted frame and stops after the last wanted frame of a group. In between,
FFmpeg skips unwanted frames that no other frame needs. Each frame that comes out is compared with the timeline; at the
first surprise `PlanBroken` says that everything must be decoded.
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
from keyreel_kernels.arrays import usable_cores

M = TypeVar("M")

_SEEK_PACKETS = 64  # reading that many takes longer than a seek: 0.3 ms, against 0.03 to 0.13 by container
_PART_PACKETS = 64  # a part of fewer costs more in starting a decoder than it gains
_MAX_WORKERS = 8  # more would wait for Python, which hands over packets and pictures one by one
WORKERS_PIXELS = 4 * 3840 * 2160  # of the pictures of all workers: each decoder holds reference pictures
_AHEAD_BYTES = 256 << 20  # of pictures that wait for those before them


class DecoderFailed(Exception):
    """This decoder cannot go on with this file; another one may."""


class FramesLost(Exception):
    """A damaged packet took frames along that were being decoded beside it; one thread alone keeps them."""


class Worker(Protocol):
    """Decodes and converts one open copy of the video; used by one thread at a time.

    Its pictures have `pts`, `dts`, `duration`, `key_frame` and `is_corrupt`, as PyAV's VideoFrame has them.
    """

    container: InputContainer
    stream: VideoStream
    threaded: bool  # frames that are being decoded side by side are lost at a damaged packet

    def decode(self, packet: Packet[VideoStream] | None, *, wanted: bool = True) -> Sequence[Any]:
        """Pictures in display order that are ready after this packet, all that are left after None.

        They are valid until the next call. The picture of a packet that is not `wanted` need not come.

        Raises:
            FFmpegError: the packet is damaged.
        """

    def flush(self) -> None:
        """Makes ready for packets of another place, after all pictures are out."""

    def agrees(self, picture: Any, *, key: bool, fields: bool) -> bool:
        """Whether the decoder agrees with the packets: that decoding may begin with this picture, if it is a `key`, and
        that it is no pair of fields, unless `fields` are expected."""

    def keep(self, picture: Any) -> Any:
        """The picture, valid also after more packets are decoded."""

    def convert(self, pictures: Iterable[tuple[M, Any]]) -> Iterator[tuple[M, Any]]:
        """Upright RGB [H, W, 3] uint8 of each picture, in order; may take more pictures before it gives one."""


class Decoder(Protocol):
    """How the packets of a video become pictures on one device."""

    workers: int  # that may decode parts of a file side by side
    ahead: int  # pictures of one part that may wait for the parts before it
    gap: int  # packets that are decoded in vain as cheaply as a worker is drained and started again
    whole: bool  # one worker decodes everything as fast as all of them

    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> AbstractContextManager[Worker]:
        """A worker on an open container; `alone` where no other one works on the file: it may take several threads."""

    def stack(self, pictures: list[Any]) -> Any:
        """Pictures of one size as [T, H, W, 3]."""

    def join(self) -> None:
        """Called in the thread that takes a batch, see `Arrays.join`."""

    def fallback(self, error: DecoderFailed) -> Decoder:
        """The decoder that goes on after an error; raises where there is none."""


class Conversion(Protocol):
    """From a decoded frame to a picture."""

    tone_mapped: str | None  # the transfer that was mapped to SDR, if any

    def __call__(self, frame: VideoFrame) -> Any: ...


class CpuDecoder:
    """FFmpeg decodes, swscale converts; pictures are NumPy arrays.

    Args:
        source: of the video.
        transform: size of the pictures; None for the full display resolution.
        threads: of all workers together, or of one that works alone; 0 for as many as there are cores.
        workers: that share a file, with one thread each; by default one for each thread.
        aside: collects small pictures of some of the frames.
        converter: makes, for a stream's sample aspect ratio, what converts its frames; RGB pictures by default.
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
        # MPEG-4 in fields comes out differently where FFmpeg's threads share it.
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
    container: InputContainer
    stream: VideoStream
    threaded: bool
    converter: Conversion
    small: Callable[[VideoFrame], None] | None  # looks at each picture that is converted
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
    """Packets [first, stop) that are decoded in one go, and the wanted frames among them by their place in display
    order, rising."""

    first: int
    stop: int
    ranks: list[int]


def runs(timeline: Timeline, ranks: Sequence[int], *, gap: int = 0) -> list[Run]:
    """The packets that these frames need.

    Args:
        timeline: of the stream.
        ranks: rising.
        gap: packets that are fed although nobody needs them, rather than starting anew.
    """
    found: list[Run] = []
    for rank, entry in zip(ranks, timeline.entries(ranks).tolist(), strict=True):
        if not found or entry > found[-1].stop + gap:
            found.append(Run(entry, entry, []))
        # The second field of a frame may be a packet of its own, which must not be left out unnoticed.
        stop = min(int(timeline.shown[rank]) + 1 + timeline.fields, len(timeline.pts))
        found[-1].stop = max(found[-1].stop, stop)
        found[-1].ranks.append(rank)
    return found


def parts(timeline: Timeline, ranks: Sequence[int], workers: int) -> list[list[int]]:
    """Cuts rising ranks at entries, so that each part can be decoded by itself; several for each worker.

    A part must be worth the decoder's start: where the frames need too few packets, there is one part.
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
    """The packets of a file by their place in decode order, rising.

    Args:
        container: at its start; nobody else reads it.
        stream: its video.
        timeline: of that stream.
        checkpoint: called often; raises to stop.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, timeline: Timeline, checkpoint: Callable[[], None]
    ) -> None:
        self._container, self._stream, self._timeline, self._checkpoint = container, stream, timeline, checkpoint
        self._packets: Iterator[Packet[VideoStream]] = demux(container, stream)
        self._place = 0  # of the packet that comes next

    def __call__(self, place: int) -> Packet[VideoStream]:
        """The packet at a place.

        Raises:
            PlanBroken: it is not found.
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
        """The place of a packet, beyond the end where it is not clear."""
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
        """Brings the container to a packet at or before `place`.

        Demuxers seek by dts, by pts, by bytes or by an index of their own, so the first packet that is read tells
        where the container is; where that is too far, an earlier entry is tried, and at last the start.
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
    """Gets frames by their place in display order, rising.

    Args:
        worker: decodes; nobody else feeds it.
        timeline: of its stream.
        checkpoint: called often; raises to stop.
        fed: called before each packet that is fed.
        gap: see `runs`.
        keys: key frames are asked for, and the decoder must agree that they are.
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
        self._rank = np.full(len(timeline.pts), -1)  # of each packet's frame, -1 where there is none
        self._rank[timeline.shown] = np.arange(len(timeline.shown))

    def frames(self, ranks: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """(rank, frame) of each of the ranks; call by call further ahead in the file.

        Raises:
            PlanBroken: a frame is missing or damaged, or is not the expected one.
        """
        for run in runs(self._timeline, ranks, gap=self._gap):
            yield from self._decode(run)

    def _decode(self, run: Run) -> Iterator[tuple[int, Any]]:
        timeline, wanted = self._timeline, set(run.ranks)
        start = int(timeline.pts[run.first]) if run.first else None
        ranks = np.sort(self._rank[run.first : run.stop])
        ranks = ranks[ranks >= 0]
        # Pictures that lead the entry may need what was not fed: they may fail, come out wrong, or not at all.
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
        """The packets of a run and whether their frames are needed, then None, which drains the decoder."""
        for place in range(run.first, run.stop):
            packet = self._packets(place)
            self._fed()
            yield packet, not self._timeline.skippable or int(self._rank[place]) in wanted
        yield None, True
