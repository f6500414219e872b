"""Reads packets so that an error of PyAV does not end the video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
from av.container import InputContainer

# Exceptions of PyAV for damaged or unusual files: FFmpeg's errors, and errors in its own conversions.
BROKEN = (av.error.FFmpegError, ValueError, LookupError, ArithmeticError)
BARREN_PACKETS = 100_000  # in a row without a picture: skip the rest of the file
_LATER_STREAMS = 64  # new streams in a row without a packet


def demux(container: InputContainer, stream: Any) -> Iterator[Any]:
    """Yields the packets of a video or audio stream.

    Some containers (FLV, TS) announce streams while they are read. PyAV's iterator then raises IndexError, and a new
    one continues at the same place.
    """
    failures = 0
    while True:
        try:
            for packet in container.demux(stream):
                failures = 0
                yield packet
            return
        except IndexError:
            failures += 1
            if failures > _LATER_STREAMS:
                raise


def reason_of(error: Exception) -> str:
    """The reason of an error, in a few words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
