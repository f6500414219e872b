"""Delivers batches of frames from a decoding thread.

A queue of two batches between thread and consumer bounds the memory.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Self

import numpy as np

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.aside import Aside
from keyreel.decode.decoder import CpuDecoder, Decoder
from keyreel.decode.parallel import Channel, Stopped
from keyreel.decode.reader import Reader
from keyreel.decode.source import Source
from keyreel.errors import SourceError
from keyreel.types import FrameBatch

_QUEUED_BATCHES = 2
_MAX_FRAMES = 1_000_000  # most frames from one video


class Stream:
    """The wanted frames of a source in batches: an iterator of FrameBatch, and a context manager.

    A thread decodes. It starts when the first batch is requested, and ends with the last one, at `close()`, or when
    this object is garbage.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        decoder: makes the pictures.
        batch_size: rows in a batch; the last may have fewer.
        reasons: the first warnings.
    """

    def __init__(
        self, source: Source, sampling: Sampling, decoder: Decoder, batch_size: int, reasons: tuple[str, ...] = ()
    ) -> None:
        self._work = _Production(source, sampling, decoder, batch_size, reasons)
        # The thread does not refer to the stream, so a forgotten stream is collected, which stops the thread.
        self._finalizer = weakref.finalize(self, self._work.stopped.set)
        self._thread: threading.Thread | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the video so far; complete after the iteration."""
        return self._work.reader.warnings()

    @property
    def decode_seconds(self) -> float:
        """Seconds of reading, decoding and converting so far, without waiting for the consumer."""
        return self._work.busy_seconds

    @property
    def packets_read(self) -> int:
        """Number of packets read so far, each counted once."""
        return self._work.reader.packets_read

    @property
    def packets_fed(self) -> int:
        """Number of packets given to decoders so far, also in abandoned attempts.

        Of these, FFmpeg skips unwanted frames that no other frame needs.
        """
        return self._work.reader.packets_fed

    @property
    def end_seconds(self) -> float | None:
        """Seconds at which the stream ended, if well before the end by its header; else None."""
        return self._work.reader.end_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FrameBatch:
        if self._work.stopped.is_set():
            raise StopIteration
        if self._thread is None:
            thread = threading.Thread(target=self._work.run, name="keyreel-decode", daemon=True)
            thread.start()
            self._thread = thread  # not earlier: another thread may close this and wait for it
        item = self._work.take()
        if isinstance(item, FrameBatch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and waits for it. Idempotent."""
        self._finalizer()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


class FrameStream(Stream):
    """The wanted frames of a source, decoded on the CPU.

    Mode `fps` gives a frame once, even if it is shown at several of the times. Mode `near` gives key frames near these
    times where possible; `pts_seconds` and `frame_index` tell which. Mode `times` gives a row for each time, in the
    given order; after the end the last frame. `frame_index` counts the frames of a full decode (it does not notice
    damage in parts that it does not decode). All frames of a batch have one size: if the size changes and there is no
    transform, a new batch begins.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        transform: size of the pictures; None for the full display resolution.
        batch_size: rows in a batch; the last may have fewer.
        threads: threads that decode; 0 for as many as the machine has cores. Parts of a long file are decoded side by
            side, with one thread each. A file that cannot be cut is decoded by FFmpeg with this many.
        aside: collects small pictures of some of the frames.

    Raises:
        CorruptStream: (while iterating) no frame can be decoded. A stream that breaks midway gives its frames so far,
            and `warnings` has the reason.
        SourceError: (while iterating) the source cannot be opened, or is over a limit.
        NoFrames: (while iterating) no frame lies between start_seconds and stop_seconds.
    """

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        *,
        transform: ImageTransform | None = None,
        batch_size: int = 16,
        threads: int = 0,
        aside: Aside | None = None,
    ) -> None:
        if threads < 0:
            raise ValueError(f"threads must be >= 0, got {threads}")
        super().__init__(source, sampling, CpuDecoder(source, transform, threads, aside=aside), batch_size)


class _Production:
    """The work of the decoding thread; see `Stream`."""

    def __init__(
        self, source: Source, sampling: Sampling, decoder: Decoder, batch_size: int, reasons: tuple[str, ...]
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.stopped = stopped = threading.Event()
        self.busy_seconds = 0.0

        # Not a method: a reference to this object would keep the source open until garbage collection.
        def go_on() -> None:
            if stopped.is_set():
                raise Stopped

        self.reader = Reader(source, sampling, decoder, go_on, reasons)
        self._queue: Channel[FrameBatch] = Channel(_QUEUED_BATCHES, self.stopped)
        self._source, self._sampling = source, sampling
        self._stack, self._join, self._batch_size = decoder.stack, decoder.join, batch_size

    def run(self) -> None:
        last: BaseException | None = None
        began = time.perf_counter()
        try:
            for batch in self._batches():
                self.busy_seconds += time.perf_counter() - began
                self._queue.put(batch)
                began = time.perf_counter()
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001  raised again in the consumer's thread
            last = error
        self.busy_seconds += time.perf_counter() - began
        with suppress(Stopped):
            self._queue.put(last)

    def take(self) -> FrameBatch | BaseException | None:
        item = self._queue.take()
        self._join()
        return item

    def _batches(self) -> Iterator[FrameBatch]:
        rows: list[tuple[Any, float, int]] = []

        def batch() -> FrameBatch:
            pictures, seconds, places = zip(*rows, strict=True)
            rows.clear()
            return FrameBatch(self._stack(list(pictures)), np.array(seconds, np.float64), np.array(places, np.int64))

        for taken, row in enumerate(self._rows()):
            if taken >= _MAX_FRAMES:
                raise SourceError(
                    f"{self._source.name}: more than {_MAX_FRAMES} frames were asked for.", hint="Sample fewer frames."
                )
            if rows and row[0].shape != rows[0][0].shape:
                (was_high, was_wide, _), (high, wide, _) = rows[0][0].shape, row[0].shape
                change = f"{was_wide} x {was_high} to {wide} x {high} at {row[1]:.3f} s"
                self.reader.note("changes of the picture size; each starts a new batch", change)
                yield batch()
            rows.append(row)
            if len(rows) == self._batch_size:
                yield batch()
        if rows:
            yield batch()

    def _rows(self) -> Iterator[tuple[Any, float, int]]:
        """Yields (picture, seconds, index) for each row of the result, in order."""
        times = np.array(self._sampling.times)
        if self._sampling.mode != "times" or np.all(np.diff(times) >= 0):
            for row, count in self.reader.pictures(times):
                for _ in range(count):
                    yield row
            return
        # Times in any order: one batch at a time, so that memory holds no more pictures than that.
        for first in range(0, len(times), self._batch_size):
            asked = times[first : first + self._batch_size]
            order = np.argsort(asked, kind="stable")
            found = [row for row, count in self.reader.pictures(asked[order]) for _ in range(count)]
            for place in np.argsort(order, kind="stable"):
                yield found[place]


def distinct(batches: Iterable[FrameBatch]) -> Iterator[FrameBatch]:
    """Drops rows that repeat the previous frame, as two close times do."""
    last = -1
    for batch in batches:
        fresh = np.diff(batch.frame_index, prepend=last) != 0
        last = int(batch.frame_index[-1])
        if fresh.any():
            yield batch if fresh.all() else batch[np.flatnonzero(fresh)]
