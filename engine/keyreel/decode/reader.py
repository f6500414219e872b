"""Reads a source and gives the pictures of its wanted frames, in display order.

It decodes only the packets that wanted frames need, if the packets show that this is safe. It checks each decoded
frame; at the first difference it starts again and decodes everything.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import Any

import numpy as np
from av.packet import Packet
from av.stream import Discard
from av.video.stream import VideoStream

from keyreel.config import Sampling
from keyreel.decode.decoder import WORKERS_PIXELS, Decoder, DecoderFailed, FramesLost, Worker
from keyreel.decode.packets import BARREN_PACKETS, BROKEN, reason_of
from keyreel.decode.parallel import in_order
from keyreel.decode.runs import Cursor, parts
from keyreel.decode.sampling import TOLERANCE_SECONDS, Picker, PlanBroken, near
from keyreel.decode.source import Source
from keyreel.decode.timeline import TIME_BASE, Clock, Timeline, leap_seconds, promised_seconds
from keyreel.errors import CorruptStream, NoFrames
from keyreel.types import F64

_log = logging.getLogger(__name__)
_READ_ATTEMPTS = 16  # failed reads in a row before it gives up
_JUMP_SECONDS = 1.0  # seconds; a pts that goes back further starts a new timeline
_UNTYPED = ("qtrle", "rpza", "smc", "cinepak", "msrle")  # FFmpeg's decoders do not say which frames are key frames
_LEAPS = "jumps in the time stamps, as in joined recordings"
_NEAR_IS_EXACT = "the file does not say which frames decode fast: mode near takes the exact frames"


@dataclass(frozen=True, slots=True)
class _Shown:
    """A decoded frame, and the time at which it appears."""

    frame: Any  # None when no longer needed
    start: float  # seconds
    index: int


class _Given:
    """What was yielded so far, so that a new attempt repeats and loses nothing: rows for mode times, else frames."""

    def __init__(self, *, by_rows: bool) -> None:
        self._by_rows, self._rows, self._skipped = by_rows, 0, 0
        self.seconds = -math.inf  # of the last frame

    def again(self) -> None:
        self._skipped = self._rows

    def left(self, start: float, rows: int) -> int:
        """How many rows of the frame that appears at `start` are still missing."""
        if not self._by_rows:
            return rows if start > self.seconds + TOLERANCE_SECONDS else 0
        known = min(rows, self._skipped)
        self._skipped -= known
        return rows - known

    def add(self, shown: _Shown, rows: int) -> None:
        self.seconds = shown.start
        self._rows += rows


class Reader:
    """Finds, decodes and converts the wanted frames of a source.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        decoder: makes the pictures.
        checkpoint: called often; raises to stop.
        reasons: the first warnings.
    """

    def __init__(
        self,
        source: Source,
        sampling: Sampling,
        decoder: Decoder,
        checkpoint: Callable[[], None],
        reasons: tuple[str, ...] = (),
    ) -> None:
        self.end_seconds: float | None = None
        self.packets_read = self.packets_fed = 0  # see Stream
        self._source, self._sampling, self._decoder, self._go_on = source, sampling, decoder, checkpoint
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._damage: Counter[str] = Counter()  # by attempt: a new attempt meets the same damage again
        self._details: dict[str, str] = {}
        self._reasons = list(reasons)
        self._ending = ""
        # A decoder that decodes all packets gains nothing from reading them first.
        self._planning = not decoder.whole or sampling.mode != "all" or sampling.start_seconds > 0
        self._shared = True  # one worker may decode in several threads
        self._keys = set[int | None]()  # pts of key packets, for codecs whose frames do not tell

    def warnings(self) -> tuple[str, ...]:
        """The warnings so far."""
        counts = self._counts | self._damage
        counted = [f"{what}: {counts[what]}{first}" for what, first in list(self._details.items())]
        return (*self._reasons, *self._source.remarks, *counted, *([self._ending] if self._ending else []))

    def note(self, what: str, detail: object = "") -> None:
        """Counts an event, and keeps the detail of its first time."""
        self._note(self._counts, what, detail)

    def _note(self, counts: Counter[str], what: str, detail: object) -> None:
        with self._lock:
            counts[what] += 1
            self._details.setdefault(what, f" (first: {detail})" if detail else "")

    def _damaged(self, what: str, detail: object = "") -> None:
        self._note(self._damage, what, detail)

    def _fed(self) -> None:
        with self._lock:
            self.packets_fed += 1

    def pictures(self, times: F64) -> Iterator[tuple[tuple[Any, float, int], int]]:
        """Yields ((picture, seconds, index), number of rows) for each wanted frame, in display order.

        Raises:
            NoFrames: no frame is wanted.
        """
        nothing = True
        with self._source.guarded():
            for shown, rows, picture in self._wanted(times):
                nothing = False
                yield (picture, shown.start, shown.index), rows
        if nothing:
            wanted = self._sampling
            stop = "the end" if wanted.stop_seconds is None else f"{wanted.stop_seconds} s"
            kind = "key frame" if wanted.mode == "keyframes" else "frame"
            raise NoFrames(f"{self._source.name}: no {kind} between {wanted.start_seconds} s and {stop}")

    def _wanted(self, times: F64) -> Iterator[tuple[_Shown, int, Any]]:
        """Yields (frame, rows, picture), by the plan; after the first difference by a full decode, without repeats."""
        given = _Given(by_rows=self._sampling.mode == "times")
        while True:
            given.again()
            self._counts |= self._damage
            self._damage.clear()
            try:
                for shown, rows, picture in self._attempt(times, given):
                    given.add(shown, rows)
                    yield shown, rows, picture
                return
            except PlanBroken as error:
                if self._planning:
                    _log.info("%s: decodes every frame: the frames differ from the packet list", self._source.name)
                    self._planning = False
                else:
                    self._hand_over(DecoderFailed(*error.args), given)
            except FramesLost:
                self._shared = False
            except DecoderFailed as error:
                self._hand_over(error, given)

    def _attempt(self, times: F64, given: _Given) -> Iterator[tuple[_Shown, int, Any]]:
        timeline = self._source.timeline(self._go_on) if self._planning else None
        if timeline is not None:
            return self._planned(timeline, times, given)
        self._planning = False
        if self._sampling.mode == "near" and _NEAR_IS_EXACT not in self._reasons:
            self._reasons.append(_NEAR_IS_EXACT)
        return self._whole(times, given)

    def _hand_over(self, failed: DecoderFailed, given: _Given) -> None:
        """Switches to the decoder that continues after this one, if there is one."""
        self._decoder = self._decoder.fallback(failed)
        since = "" if given.seconds == -math.inf else f" after {given.seconds:.3f} s"
        self._reasons.append(f"decoded on the CPU{since}: {failed}")
        self._planning = True

    @contextmanager
    def _opened(self, *, alone: bool) -> Iterator[Worker]:
        with self._source.open() as container:
            stream = self._source.require_video(container)
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
            with self._decoder.open(container, stream, self.note, alone=alone) as worker:
                yield worker

    def _planned(self, timeline: Timeline, times: F64, given: _Given) -> Iterator[tuple[_Shown, int, Any]]:
        """Picks frames from the timeline, then decodes them; with several workers if that is faster."""
        self.packets_read = len(timeline.pts)
        self._check_end(timeline.clock.seconds(timeline.end_ticks), timeline.promised_seconds)
        found = self._plan(timeline, Picker(self._sampling, times), given)
        workers = max(1, min(self._decoder.workers, WORKERS_PIXELS // timeline.pixels))
        # Not at a server: lanes would wait for its answers to the others.
        turn = nullcontext() if self._source.url else threading.Lock()
        cut = parts(timeline, list(found), workers) if workers > 1 else [list(found)]

        @contextmanager
        def open_worker() -> Iterator[Callable[[list[int]], Iterator[tuple[int, Any]]]]:
            with self._opened(alone=len(cut) == 1) as worker:
                keys, gap = self._sampling.mode == "keyframes", self._decoder.gap
                cursor = Cursor(worker, timeline, self._go_on, self._fed, turn, gap=gap, keys=keys)
                yield lambda ranks: worker.convert(cursor.frames(ranks))

        if len(cut) == 1:
            with open_worker() as work:
                for rank, picture in work(cut[0]):
                    yield *found[rank], picture
            return
        for rank, picture in in_order(cut, open_worker, workers=workers, ahead=self._decoder.ahead):
            yield *found[rank], picture

    def _plan(self, timeline: Timeline, picker: Picker, given: _Given) -> dict[int, tuple[_Shown, int]]:
        """The missing frames by number in display order, and how many rows each fills."""
        clock, ticks = timeline.clock, timeline.ticks
        end = clock.seconds(timeline.end_ticks)
        self._source.check_duration(end)
        found: dict[int, tuple[_Shown, int]] = {}

        def take(rank: int, start: float, rows: int) -> None:
            if left := given.left(start, rows):
                found[rank] = _Shown(None, start, rank), left

        keys = timeline.key[timeline.shown]
        if self._sampling.mode == "near":
            for rank in near(timeline.starts, keys, end, self._sampling):
                take(rank, clock.seconds(int(ticks[rank])), 1)
            return found
        # Only frames around the window: a short window must not cost time for all of a long video.
        low, high = 0, len(ticks)
        if self._sampling.mode != "times":
            low = max(int(np.searchsorted(ticks, clock.ticks(self._sampling.start_seconds))) - 2, 0)
            if self._sampling.stop_seconds is not None:
                high = min(int(np.searchsorted(ticks, clock.ticks(self._sampling.stop_seconds))) + 2, high)
        starts = [clock.seconds(int(t)) for t in ticks[low : high + 1]] + ([end] if high == len(ticks) else [])
        for rank, (start, stop) in enumerate(pairwise(starts), start=low):
            if rows := picker.rows(start, stop, key=bool(keys[rank]), first=rank == 0, last=rank == len(ticks) - 1):
                take(rank, start, rows)
            if picker.done(stop):
                break
        return found

    def _whole(self, times: F64, given: _Given) -> Iterator[tuple[_Shown, int, Any]]:
        """Decodes everything from the start."""
        with self._opened(alone=self._shared) as worker:
            chosen = (
                ((shown, left), shown.frame)
                for shown, rows in self._chosen(worker, times)
                if (left := given.left(shown.start, rows))
            )
            for (shown, rows), picture in worker.convert(chosen):
                yield shown, rows, picture

    def _chosen(self, worker: Worker, times: F64) -> Iterator[tuple[_Shown, int]]:
        """Decodes all frames, and yields (frame, rows) for the picked ones; decodes one frame ahead."""
        picker = Picker(self._sampling, times)
        held: _Shown | None = None
        duration = 0.0
        for shown, seconds in self._decoded(worker):
            if held is not None:
                if count := picker.rows(held.start, shown.start, key=self._is_key(held), first=held.index == 0):
                    yield held, count
                if picker.done(shown.start):
                    return
            held, duration = _Shown(worker.keep(shown.frame), shown.start, shown.index), seconds
        if held is None:
            reason = "; ".join(self.warnings()) or "it holds no pictures"
            raise CorruptStream(
                f"{self._source.name}: no frame can be decoded: {reason}.",
                hint="Check that it plays; copy or download it again.",
            )
        promised = promised_seconds(worker.container, worker.stream)
        self._check_end(held.start + duration, None if _LEAPS in self._damage else promised)
        key, end = self._is_key(held), held.start + duration
        if count := picker.rows(held.start, end, key=key, first=held.index == 0, last=True):
            yield held, count

    def _is_key(self, shown: _Shown) -> bool:
        return bool(shown.frame.key_frame) or shown.frame.pts in self._keys

    def _decoded(self, worker: Worker) -> Iterator[tuple[_Shown, float]]:
        """Yields all frames with how long they are shown in seconds, if known; times rise.

        If the clock leaps and continues from there, recordings were joined: time continues at the seam. A single frame
        with a stray time is placed after the one before.
        """
        clock: Clock | None = None
        last = shift = 0
        stream, base = worker.stream, worker.stream.time_base or TIME_BASE
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        gap = max(1, round(1 / rate / base))
        back, forth = round(_JUMP_SECONDS / base), round(leap_seconds(worker.container) / base)
        stamped = self._stamped(worker)
        ahead: tuple[Any, int | None] | None = None
        for index in count():
            if (found := ahead or next(stamped, None)) is None:
                return
            (frame, ticks), ahead = found, None
            if clock is None:
                clock = Clock.of(worker.container, stream, ticks or 0)
                last = (ticks or 0) - gap
            ticks = last + gap if ticks is None else ticks + shift
            if not last - back <= ticks <= last + gap + forth:
                frame = worker.keep(frame)
                ahead = next(stamped, None)
                if ahead is not None and ahead[1] is not None and abs(ahead[1] + shift - ticks) <= back:
                    self._damaged(_LEAPS, f"at {clock.seconds(last + gap):.3f} s")
                    shift += last + gap - ticks
                else:
                    self._damaged("frames with a wrong time, placed after the frame before", f"frame {index}")
                ticks = last + gap
            elif ticks <= last:
                self._damaged("frames whose time goes back, placed after the frame before", f"frame {index}")
                ticks = last + 1
            last, gap = ticks, ticks - last
            start = clock.seconds(ticks)
            self._source.check_duration(start)
            yield _Shown(frame, start, index), (frame.duration or gap) * clock.numerator / clock.denominator

    def _stamped(self, worker: Worker) -> Iterator[tuple[Any, int | None]]:
        """Yields all frames with their ticks in the file, in display order.

        AVI has no display times: its frames take the packets' times in order.
        """
        fed: list[int] | None = [] if worker.container.format.name == "avi" else None
        for frame in self._frames(worker, fed):
            ticks = frame.pts if frame.pts is not None else frame.dts
            if fed:
                ticks = heappop(fed)
            elif frame.pts is None:
                self._damaged("frames without a time stamp, times taken from their neighbours")
            yield frame, ticks

    def _frames(self, worker: Worker, fed: list[int] | None) -> Iterator[Any]:
        """Yields all frames; pushes the times of decoded packets to the heap `fed`."""
        barren = 0  # packets in a row without a picture
        for packet in self._packets(worker):
            if barren >= BARREN_PACKETS:
                self._damaged(f"the rest of the file is skipped: {BARREN_PACKETS} packets in a row have no picture")
                return
            barren += 1
            if fed is not None and packet is not None and packet.dts is not None:
                heappush(fed, packet.dts)
            if packet is not None and packet.is_keyframe and worker.stream.codec_context.name in _UNTYPED:
                self._keys |= {packet.pts} - {None}
            try:
                frames = worker.decode(None if packet is None else worker.prepare(packet))
            except BROKEN as error:
                if worker.threaded:
                    raise FramesLost from error
                self._damaged("damaged packets skipped", reason_of(error))
                continue
            for frame in frames:
                barren = 0
                if frame.is_corrupt:
                    self._damaged("frames that are damaged or depend on missing ones", f"at pts {frame.pts}")
                yield frame

    def _packets(self, worker: Worker) -> Iterator[Packet[VideoStream] | None]:
        """Yields all packets of the stream, then None, which drains the decoder."""
        failures = count = 0
        packets = self._source.packets(worker.container, worker.stream)
        while failures < _READ_ATTEMPTS:
            try:
                packet = next(packets, None)
            except BROKEN as error:
                failures += 1
                self._damaged("failed reads", reason_of(error))
                packets = self._source.packets(worker.container, worker.stream)
                continue
            if packet is None:
                break
            self._go_on()
            failures = 0
            if packet.size:
                count += 1
                self.packets_read = max(self.packets_read, count)
                self._fed()
                yield packet
        yield None

    def _check_end(self, end: float, promised: float | None) -> None:
        """Records the end of the video if the header states none, or a much later one."""
        if promised is None:
            self.end_seconds = end
        elif end < promised - max(1.0, 0.02 * promised):
            self.end_seconds = end
            self._ending = f"the video ends at {end:.3f} s, its header promises {promised:.3f} s"
