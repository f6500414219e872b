"""How long work on a device takes: events on the stream that it runs on; the clock on the wall elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_cases.runner import Row

_SLOW_SECONDS = 0.5  # what takes longer is timed once


@dataclass(frozen=True, slots=True)
class Clock:
    """Marks moments in the order of the device's work."""

    mark: Callable[[], Any]
    milliseconds: Callable[[Any, Any], float]  # between two marks, once the device is idle
    wait: Callable[[], None]  # until the device is idle


def wall_clock(wait: Callable[[], None] = lambda: None) -> Clock:
    """For what computes in the calling thread, or is waited for inside the work."""

    def mark() -> float:
        wait()
        return time.perf_counter()

    return Clock(mark, lambda first, last: (last - first) * 1e3, wait)


def cupy_clock(arrays: Any) -> Clock:
    """Events on the stream of a keyreel_kernels.cuda.Cuda."""
    cuda = arrays.cupy.cuda

    def mark() -> Any:
        event = cuda.Event()
        event.record(arrays.stream)
        return event

    return Clock(mark, lambda first, last: float(cuda.get_elapsed_time(first, last)), arrays.synchronize)


def torch_clock(torch: Any) -> Clock:
    """Events on torch's current stream."""

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Clock(mark, lambda first, last: float(first.elapsed_time(last)), torch.cuda.synchronize)


def measure(work: Callable[[], Any], clock: Clock, *, budget_seconds: float, most: int = 50) -> Row:
    """Times work that is repeated, after a first call that compiles and a second that warms up.

    Returns:
        ms: median of calls on an idle device, so with what launching costs; ms_least; ms_back_to_back: mean of calls
        one right after the other, what a stream of them costs; runs; first_call_seconds.
    """
    started = time.perf_counter()
    work()
    clock.wait()
    first = time.perf_counter() - started
    started = time.perf_counter()
    work()
    clock.wait()
    taken = max(time.perf_counter() - started, 1e-6)
    runs = max(3 if taken < _SLOW_SECONDS else 1, min(most, int(budget_seconds / 2 / taken)))
    single = []
    for _ in range(runs):
        clock.wait()
        before = clock.mark()
        work()
        after = clock.mark()
        clock.wait()
        single.append(clock.milliseconds(before, after))
    before = clock.mark()
    for _ in range(runs):
        work()
    after = clock.mark()
    clock.wait()
    return {
        "ms": statistics.median(single),
        "ms_least": min(single),
        "ms_back_to_back": clock.milliseconds(before, after) / runs,
        "runs": runs,
        "first_call_seconds": round(first, 3),
    }
