"""Packets of a stream, read so that what PyAV stumbles over does not stop the video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import av
from av.container import InputContainer

# What PyAV raises for damaged or unusual files: FFmpeg's errors, and those of its own conversions of what FFmpeg says.
BROKEN = (av.error.FFmpegError, ValueError, LookupError, ArithmeticError)
BARREN_PACKETS = 100_000  # in a row that give no picture: the rest of the file is not tried
_LATER_STREAMS = 64  # that may appear in a row without a packet between them


def demux(container: InputContainer, stream: Any) -> Iterator[Any]:
    """The packets of a video or audio stream, to the end.

    Some containers (FLV, TS) name further streams only while they are read; PyAV's iterator then ends in IndexError,
    and a new one goes on where it was.
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
    """What went wrong, in a few words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
