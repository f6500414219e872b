"""Which frames are wanted, and what is asked of whoever decodes them.

`Picker` is the one definition of the sampling modes: it is asked about each frame in display order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.config import Sampling
from keyreel.types import F64

# Far below any time base's tick, far above float64's rounding of a day: a wanted time that misses a pts by rounding
# only (0.1 + 0.7 against 0.8) means that pts.
TOLERANCE_SECONDS = 1e-9


class PlanBroken(Exception):
    """The file, or a frame that came out of the decoder, is not what a plan can be made for."""


class NoFrames(ValueError):
    """No wanted frame lies in the window; `Stream` raises it while it is iterated."""


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

    def decode(self, packet: Packet[VideoStream] | None) -> Sequence[Picture]:
        """The pictures that are ready after a packet; valid until the next call, and after None all that are left.

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
    last frame takes all that are left. keyframes, all: those of the window. near: as fps, for want of a plan.

    Args:
        sampling: mode and window.
        times: rising, for mode times.
    """

    def __init__(self, sampling: Sampling, times: F64) -> None:
        self._mode = "fps" if sampling.mode == "near" else sampling.mode
        self._fps, self._every = sampling.fps, sampling.every
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
