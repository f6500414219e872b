"""Batches of frames from a decoding thread.

A queue of two batches stands between the thread and the consumer, so that memory does not grow with the video.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import numpy as np

from keyreel.config import Sampling
from keyreel.decode.decoding import Decoding
from keyreel.decode.lanes import Channel, Stopped
from keyreel.decode.reader import Reader
from keyreel.decode.source import Source
from keyreel.errors import SourceError
from keyreel.types import FrameBatch

_QUEUED_BATCHES = 2


class Stream:
    """An iterator of FrameBatch and a context manager around a decoding thread.

    The thread starts with the first batch, and ends with the last, with `close()`, or when this object is dropped.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # The thread holds the worker only, so that a stream nobody refers to any more is collected and stops it.
        self._finalizer = weakref.finalize(self, self._worker.stopped.set)
        self._thread: threading.Thread | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong with the stream or done to it; complete after the iteration."""
        return self._worker.reader.warnings()

    @property
    def decode_seconds(self) -> float:
        """Seconds spent on reading, decoding and converting so far; waiting for the consumer does not count."""
        return self._worker.busy_seconds

    @property
    def packets_read(self) -> int:
        """The video's packets, as far as they were read to see what is needed, or to decode them; each once."""
        return self._worker.reader.packets_read

    @property
    def packets_fed(self) -> int:
        """Packets that were given to decoders so far, also those of an attempt that was given up."""
        return self._worker.reader.packets_fed

    @property
    def end_seconds(self) -> float | None:
        """Where the stream ended well before what its header promises; None where it kept its word."""
        return self._worker.reader.end_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FrameBatch:
        if self._worker.stopped.is_set():
            raise StopIteration
        if self._thread is None:
            thread = threading.Thread(target=self._worker.run, name="keyreel-decode", daemon=True)
            thread.start()
            self._thread = thread  # not before: another thread may close this and wait for it
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


class Worker:
    """What runs in the decoding thread.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        decoding: how pictures are made.
        batch_size: rows in a batch, the last may have fewer.
        reasons: the first of the warnings.
    """

    def __init__(
        self, source: Source, sampling: Sampling, decoding: Decoding, batch_size: int, reasons: tuple[str, ...] = ()
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.stopped = stopped = threading.Event()
        self.busy_seconds = 0.0

        # Not a method: the reader must not hold this object, or the source would wait for the garbage collector.
        def go_on() -> None:
            if stopped.is_set():
                raise Stopped

        self.reader = Reader(source, sampling, decoding, go_on, reasons)
        self._queue: Channel[FrameBatch] = Channel(_QUEUED_BATCHES, self.stopped)
        self._source, self._sampling = source, sampling
        self._stack, self._join, self._batch_size = decoding.stack, decoding.join, batch_size

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
                self.reader.note("changes of the picture's size, each starts a batch", change)
                yield batch()
            rows.append(row)
            if len(rows) == self._batch_size:
                yield batch()
        if rows:
            yield batch()

    def _rows(self) -> Iterator[tuple[Any, float, int]]:
        """(picture, seconds, index) of each row of the result, in order."""
        times = np.array(self._sampling.times)
        if self._sampling.mode != "times" or np.all(np.diff(times) >= 0):
            for row, count in self.reader.pictures(times):
                for _ in range(count):
                    yield row
            return
        # In any order: as many at a time as fit a batch, so that no more pictures than that are ever held.
        for first in range(0, len(times), self._batch_size):
            asked = times[first : first + self._batch_size]
            order = np.argsort(asked, kind="stable")
            found = [row for row, count in self.reader.pictures(asked[order]) for _ in range(count)]
            for place in np.argsort(order, kind="stable"):
                yield found[place]


def distinct(batches: Iterable[FrameBatch]) -> Iterator[FrameBatch]:
    """Without the rows that show the frame before once more, as two close times do."""
    last = -1
    for batch in batches:
        fresh = np.diff(batch.frame_index, prepend=last) != 0
        last = int(batch.frame_index[-1])
        if fresh.any():
            yield batch if fresh.all() else batch[np.flatnonzero(fresh)]
