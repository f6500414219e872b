"""Decides which frames to take.

`Picker` defines the sampling modes, frame by frame in display order. Mode `near` chooses from a timeline instead.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from keyreel.config import Sampling
from keyreel.types import F64

# Seconds, far below a tick of any time base, and far above float64's rounding in a day: a wanted time that misses a pts
# by rounding (0.1 + 0.7 and 0.8) means that pts.
TOLERANCE_SECONDS = 1e-9


class PlanBroken(Exception):
    """The packets do not tell the frames, or the decoder gave another frame than expected."""


class Picker:
    """Decides for each frame, in display order, how many rows of the result it fills.

    A frame is shown on [start, stop), from its pts to that of the next frame; the first one also before. The window is
    [start_seconds, stop_seconds).

    fps: a row if a time start_seconds + n / fps in the window falls on the frame. every: each n-th frame of the window,
    from its first. times: a row for each time that falls on the frame, in the window or not; the last frame also gets
    all later times. all: each frame of the window. keyframes: its key frames; the video's first frame always counts as
    one. near: as fps.

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
        self._next = 0  # number of the next wanted time
        self._seen = 0  # frames of the window so far

    def rows(self, start: float, stop: float, *, key: bool, first: bool = False, last: bool = False) -> int:
        """Returns how many rows the frame shown on [start, stop) fills."""
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
        return int(self._mode == "all" or key or first)

    def done(self, start: float) -> bool:
        """Whether no frame that appears at `start` or later can be wanted."""
        return self._next == len(self._times) if self._mode == "times" else start + TOLERANCE_SECONDS >= self._stop

    def _wanted(self) -> float:
        return self._start + self._next / self._fps


def near(starts: F64, keys: NDArray[np.bool_], end: float, sampling: Sampling) -> list[int]:
    """Chooses the frames of mode `near`: close to the times start_seconds + n / fps and cheap to decode.

    For each time it takes the nearest key frame of the window within the tolerance, else the frame shown at that time.
    No frame twice.

    Args:
        starts: [M] the second at which each frame appears, rising.
        keys: [M] bool, whether it is a key frame.
        end: end of the last frame, in seconds.
        sampling: mode near.
    """
    tolerance = 0.5 / sampling.fps if sampling.tolerance_seconds is None else sampling.tolerance_seconds
    stop = math.inf if sampling.stop_seconds is None else sampling.stop_seconds
    places = np.flatnonzero(keys)
    key_starts = starts[places]
    found: list[int] = []
    n = 0
    while (t := sampling.start_seconds + n / sampling.fps) + TOLERANCE_SECONDS < min(stop, end):
        n += 1
        last = found[-1] if found else -1
        low = max(t - tolerance, sampling.start_seconds) - TOLERANCE_SECONDS
        high = min(t + tolerance + TOLERANCE_SECONDS, stop - TOLERANCE_SECONDS)
        first, after = np.searchsorted(key_starts, low), np.searchsorted(key_starts, high, side="right")
        close = [int(place) for place in places[first:after] if place > last]
        shown = max(0, int(np.searchsorted(starts, t + TOLERANCE_SECONDS, side="right")) - 1)
        if close:
            found.append(min(close, key=lambda place: abs(float(starts[place]) - t)))
        elif shown > last:
            found.append(shown)
    return found
