"""Decoding on the CPU: the wanted frames of a source as batches of upright RGB pictures.

One thread decodes and converts; a queue of two batches stands between it and the consumer, so that memory does not grow
with the video. Only packets that lead to wanted frames are decoded, where a demux shows that this is safe; each frame
that comes out is checked against that plan, and at the first difference everything is decoded from the start.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from types import TracebackType

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import Converter
from keyreel.decode.sampling import Cursor, Picker, PlanBroken
from keyreel.decode.source import Source, duration_seconds
from keyreel.errors import CorruptStream, SourceError, UnsupportedCodec
from keyreel.types import F64, U8, FrameBatch

_QUEUED_BATCHES = 2
_POLL_SECONDS = 0.05
_READ_ATTEMPTS = 16  # reading goes on after that many failed reads in a row
_JUMP_SECONDS = 1.0  # a pts that goes back further is a new timeline, not a frame out of order
_TIME_BASE = Fraction(1, 90_000)  # where the container names none


class _Stopped(Exception):
    """The consumer has gone."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A decoded frame and the time from which it is shown."""

    frame: VideoFrame
    ticks: int
    start: float  # seconds
    index: int


class _Clock:
    """Ticks to seconds from the stream's start: its start_time, or its first frame where that is earlier or unknown."""

    def __init__(self, stream: VideoStream, first_ticks: int) -> None:
        base = stream.time_base or _TIME_BASE
        self.numerator, self.denominator = base.numerator, base.denominator
        self.zero = first_ticks if stream.start_time is None else min(stream.start_time, first_ticks)

    def seconds(self, ticks: int) -> float:
        return (ticks - self.zero) * self.numerator / self.denominator

    def ticks(self, seconds: float) -> int:
        return self.zero + math.floor(seconds * self.denominator / self.numerator)


class FrameStream:
    """The wanted frames of a source, in batches; a context manager and an iterator of FrameBatch.

    Mode `fps` yields a frame that is shown at several of the wanted times once; mode `times` gives one row for each
    wanted time, in the order asked for, past the end the last frame. `frame_index` counts the frames that decoding the
    whole file would give (damage in parts that need not be decoded is not seen). A batch holds frames of one size:
    where the size changes midway and no transform evens it out, the next batch has another size.

    The thread starts with the first batch, and ends with the last, with `close()`, or when this object is dropped.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        transform: size of the pictures; None for the full display resolution.
        batch_size: rows in a batch, the last may have fewer.
        threads: threads of the decoder, 0 to let FFmpeg choose.

    Raises:
        CorruptStream: (while iterating) no frame at all can be decoded. A stream that breaks midway yields what it has,
            and says so in `warnings`.
        SourceError: (while iterating) the source cannot be opened, or passes a limit.
        ValueError: (while iterating) no frame lies between start_seconds and stop_seconds.
    """

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        *,
        transform: ImageTransform | None = None,
        batch_size: int = 16,
        threads: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if threads < 0:
            raise ValueError(f"threads must be >= 0, got {threads}")
        self._worker = _Worker(source, sampling, transform, batch_size, threads)
        # The thread holds the worker only, so that a stream nobody refers to any more is collected and stops it.
        self._finalizer = weakref.finalize(self, self._worker.stopped.set)
        self._thread: threading.Thread | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong with the stream or done to it; complete after the iteration."""
        return self._worker.warnings()

    @property
    def decode_seconds(self) -> float:
        """Seconds spent on reading, decoding and converting so far; waiting for the consumer does not count."""
        return self._worker.busy_seconds

    @property
    def end_seconds(self) -> float | None:
        """Where the stream ended well before what its header promises; None where it kept its word."""
        return self._worker.end_seconds

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> FrameStream:
        return self

    def __next__(self) -> FrameBatch:
        if self._worker.stopped.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._worker.run, name="keyreel-decode", daemon=True)
            self._thread.start()
        item = self._worker.take()
        if isinstance(item, FrameBatch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and waits for it; idempotent."""
        self._finalizer()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


class _Worker:
    """What runs in the decoding thread."""

    def __init__(
        self, source: Source, sampling: Sampling, transform: ImageTransform | None, batch_size: int, threads: int
    ) -> None:
        self.stopped = threading.Event()
        self.busy_seconds = 0.0
        self._queue: queue.Queue[FrameBatch | BaseException | None] = queue.Queue(_QUEUED_BATCHES)
        self._source, self._sampling, self._transform = source, sampling, transform
        self._batch_size, self._threads = batch_size, threads
        self._counts: Counter[str] = Counter()
        self._details: dict[str, str] = {}
        self._ending = ""
        self.end_seconds: float | None = None
        self._planning = sampling.mode != "all" or sampling.start_seconds > 0

    def warnings(self) -> tuple[str, ...]:
        counted = [f"{what}: {self._counts[what]}{first}" for what, first in list(self._details.items())]
        return (*counted, *([self._ending] if self._ending else []))

    def _note(self, what: str, detail: object = "") -> None:
        """Counts what happened, and keeps the detail of the first time."""
        self._counts[what] += 1
        self._details.setdefault(what, f" (first: {detail})" if detail else "")

    def run(self) -> None:
        last: BaseException | None = None
        began = time.perf_counter()
        try:
            for batch in self._batches():
                self.busy_seconds += time.perf_counter() - began
                self._put(batch)
                began = time.perf_counter()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001  raised again in the consumer's thread
            last = error
        self.busy_seconds += time.perf_counter() - began
        with suppress(_Stopped):
            self._put(last)

    def _put(self, item: FrameBatch | BaseException | None) -> None:
        while True:
            self._go_on()
            with suppress(queue.Full):
                return self._queue.put(item, timeout=_POLL_SECONDS)

    def take(self) -> FrameBatch | BaseException | None:
        while not self.stopped.is_set():
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
        return None

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def _batches(self) -> Iterator[FrameBatch]:
        rows: list[tuple[U8, float, int]] = []

        def batch() -> FrameBatch:
            pictures, seconds, places = zip(*rows, strict=True)
            rows.clear()
            return FrameBatch(np.stack(pictures), np.array(seconds, np.float64), np.array(places, np.int64))

        limit = self._source.limits.max_frames
        for taken, row in enumerate(self._rows()):
            if taken >= limit:
                raise SourceError(
                    f"{self._source.name}: more than {limit} frames are wanted (max_frames).",
                    hint="Sample fewer frames, or raise max_frames.",
                )
            if rows and row[0].shape != rows[0][0].shape:
                (was_high, was_wide, _), (high, wide, _) = rows[0][0].shape, row[0].shape
                change = f"{was_wide} x {was_high} to {wide} x {high} at {row[1]:.3f} s"
                self._note("changes of the picture's size, each starts a batch", change)
                yield batch()
            rows.append(row)
            if len(rows) == self._batch_size:
                yield batch()
        if rows:
            yield batch()

    def _rows(self) -> Iterator[tuple[U8, float, int]]:
        """(picture, seconds, index) of each row of the result, in order."""
        times = np.array(self._sampling.times)
        if self._sampling.mode != "times" or np.all(np.diff(times) >= 0):
            for row, count in self._pictures(times):
                for _ in range(count):
                    yield row
            return
        # In any order: as many at a time as fit a batch, so that no more pictures than that are ever held.
        for first in range(0, len(times), self._batch_size):
            asked = times[first : first + self._batch_size]
            order = np.argsort(asked, kind="stable")
            found = [row for row, count in self._pictures(asked[order]) for _ in range(count)]
            for place in np.argsort(order, kind="stable"):
                yield found[place]

    def _pictures(self, times: F64) -> Iterator[tuple[tuple[U8, float, int], int]]:
        """((picture, seconds, index), rows it fills) of each wanted frame, in display order."""
        converter: Converter | None = None
        for shown, count, stream in self._wanted(times):
            converter = converter or self._converter(stream)
            try:
                picture = converter(shown.frame)
            except (av.error.FFmpegError, ValueError) as error:
                raise UnsupportedCodec(
                    f"{self._source.name}: pictures of the format {shown.frame.format.name} cannot be shown: {error}.",
                    hint="Convert it to H.264 with ffmpeg.",
                ) from error
            if converter.tone_mapped:
                self._note(f"{converter.tone_mapped.upper()} (HDR) frames tone-mapped to SDR, colours are approximate")
            yield (picture, shown.start, shown.index), count
        if converter is None:
            wanted = self._sampling
            stop = "the end" if wanted.stop_seconds is None else f"{wanted.stop_seconds} s"
            kind = "key frame" if wanted.mode == "keyframes" else "frame"
            raise ValueError(f"{self._source.name}: no {kind} between {wanted.start_seconds} s and {stop}")

    def _converter(self, stream: VideoStream) -> Converter:
        return Converter(self._transform, stream.sample_aspect_ratio, self._source.limits.max_pixels)

    def _wanted(self, times: F64) -> Iterator[tuple[_Shown, int, VideoStream]]:
        """(frame, rows, stream), by plan; after the first surprise by decoding everything, without repeating any."""
        given, last = 0, -math.inf
        if self._planning:
            try:
                with self._opened() as (container, stream):
                    for shown, count in self._planned(container, stream, times):
                        given, last = given + count, shown.ticks
                        yield shown, count, stream
                return
            except PlanBroken:
                self._planning = False
                self._counts.clear()
                self._details.clear()
        with self._opened() as (container, stream):
            for shown, count in self._picked(container, stream, times):
                if self._sampling.mode == "times":
                    count, given = max(0, count - given), max(0, given - count)
                elif shown.ticks <= last:
                    continue
                if count:
                    yield shown, count, stream

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with self._source.open() as container:
            stream = self._source.require_video(container)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self._threads
            yield container, stream

    def _planned(self, container: InputContainer, stream: VideoStream, times: F64) -> Iterator[tuple[_Shown, int]]:
        """Picks from the timeline, then decodes what was picked."""
        timeline = self._source.timeline(self._go_on)
        if timeline is None:
            raise PlanBroken
        clock = _Clock(stream, int(timeline.ticks[0]))
        end = clock.seconds(timeline.end_ticks)
        self._source.check_duration(end)
        self._check_end(container, stream, end)
        ticks = timeline.ticks
        # Only the frames around the window: a short look into a long video must not walk through all of it.
        low, high = 0, len(ticks)
        if self._sampling.mode != "times":
            low = max(int(np.searchsorted(ticks, clock.ticks(self._sampling.start_seconds))) - 2, 0)
            if self._sampling.stop_seconds is not None:
                high = min(int(np.searchsorted(ticks, clock.ticks(self._sampling.stop_seconds))) + 2, high)
        starts = [clock.seconds(int(t)) for t in ticks[low : high + 1]] + ([end] if high == len(ticks) else [])
        picker = Picker(self._sampling, times)
        counts: dict[int, int] = {}
        for rank, (start, stop) in enumerate(pairwise(starts), start=low):
            key, last = bool(timeline.keyframe[timeline.shown[rank]]), rank == len(ticks) - 1
            if count := picker.rows(start, stop, key=key, first=rank == 0, last=last):
                counts[rank] = count
            if picker.done(stop):
                break
        cursor = Cursor(container, stream, timeline, self._go_on, only_keys=self._sampling.mode == "keyframes")
        for rank, frame in cursor.frames(list(counts)):
            yield _Shown(frame, int(ticks[rank]), starts[rank - low], rank), counts[rank]

    def _picked(self, container: InputContainer, stream: VideoStream, times: F64) -> Iterator[tuple[_Shown, int]]:
        """Decodes everything from the start, one frame ahead of the one that is picked."""
        picker = Picker(self._sampling, times)
        held: _Shown | None = None
        duration = 0.0
        for shown, seconds in self._decoded(container, stream):
            if held is not None:
                key = bool(held.frame.key_frame)
                if count := picker.rows(held.start, shown.start, key=key, first=held.index == 0):
                    yield held, count
                if picker.done(shown.start):
                    return
            held, duration = shown, seconds
        if held is None:
            reason = "; ".join(self.warnings()) or "it holds no pictures"
            raise CorruptStream(
                f"{self._source.name}: not one frame can be decoded: {reason}.",
                hint="Check that it plays; copy or download it again.",
            )
        self._check_end(container, stream, held.start + duration)
        key = bool(held.frame.key_frame)
        if count := picker.rows(held.start, held.start + duration, key=key, first=held.index == 0, last=True):
            yield held, count

    def _decoded(self, container: InputContainer, stream: VideoStream) -> Iterator[tuple[_Shown, float]]:
        """(frame, seconds for which it is shown, as far as that is known) of all frames, times rising."""
        clock: _Clock | None = None
        last = shift = 0
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        gap = max(1, round(1 / rate / (stream.time_base or _TIME_BASE)))
        for index, frame in enumerate(self._frames(container, stream)):
            ticks = frame.pts if frame.pts is not None else frame.dts
            if frame.pts is None:
                self._note("frames without pts, times derived from their neighbours")
            if clock is None:
                clock = _Clock(stream, ticks or 0)
                last = (ticks or 0) - gap
            ticks = last + gap if ticks is None else ticks + shift
            if ticks <= last:
                self._note("frames whose time goes back, moved behind the frame before", f"frame {index}")
                if (last - ticks) * clock.numerator > _JUMP_SECONDS * clock.denominator:
                    shift += last + gap - ticks
                    ticks = last + gap
                else:
                    ticks = last + 1
            last, gap = ticks, ticks - last
            start = clock.seconds(ticks)
            self._source.check_duration(start)
            yield _Shown(frame, ticks, start, index), (frame.duration or gap) * clock.numerator / clock.denominator

    def _frames(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        for packet in self._packets(container, stream):
            try:
                frames = stream.codec_context.decode(packet)
            except av.error.FFmpegError as error:
                self._note("damaged packets skipped", error.strerror)
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._note("frames damaged, or referring to missing ones", f"at pts {frame.pts}")
                yield frame

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream] | None]:
        """All packets of the stream, then None, which drains the decoder."""
        failures = 0
        while failures < _READ_ATTEMPTS:
            try:
                for packet in container.demux(stream):
                    self._go_on()
                    failures = 0
                    if packet.size:
                        yield packet
                break
            except av.error.FFmpegError as error:
                failures += 1
                self._note("failed reads", error.strerror)
        yield None

    def _check_end(self, container: InputContainer, stream: VideoStream, end: float) -> None:
        """Notes a video that stops well before what its header promises, or before its sound does."""
        promised = duration_seconds(container, stream) or 0.0
        if end < promised - max(1.0, 0.02 * promised):
            self.end_seconds = end
            self._ending = f"the video ends at {end:.3f} s, its header promises {promised:.3f} s"
