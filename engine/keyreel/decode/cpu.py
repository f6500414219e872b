"""Decoding on the CPU through PyAV."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import Converter
from keyreel.decode.decoding import Decoding
from keyreel.decode.lanes import NoLane
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream, Worker
from keyreel.errors import UnsupportedCodec
from keyreel.types import U8
from keyreel_kernels.arrays import usable_cores

M = TypeVar("M")

_MOST_LANES = 8  # more wait for Python, which hands over their packets and pictures one by one
_LANES_PIXELS = 4 * 3840 * 2160  # of the pictures of all lanes: each holds the pictures that others refer to
_AHEAD_BYTES = 256 << 20  # of pictures that wait for those before them


class FrameStream(Stream):
    """The wanted frames of a source, in batches; a context manager and an iterator of FrameBatch.

    Mode `fps` yields a frame that is shown at several of the wanted times once; mode `near` yields cheaper frames close
    to these times, and `pts_seconds` and `frame_index` say which; mode `times` gives one row for each
    wanted time, in the order asked for, past the end the last frame. `frame_index` counts the frames that decoding the
    whole file would give (damage in parts that need not be decoded is not seen). A batch holds frames of one size:
    where the size changes midway and no transform evens it out, the next batch has another size.

    The thread starts with the first batch, and ends with the last, with `close()`, or when this object is dropped.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        transform: size of the pictures; None for the full display resolution.
        batch_size: rows in a batch, the last may have fewer.
        threads: threads that decode, 0 for as many as suit the machine. Parts of a long file are decoded side by side,
            by one thread each; what cannot be cut is decoded by FFmpeg with that many.

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
        if threads < 0:
            raise ValueError(f"threads must be >= 0, got {threads}")
        super().__init__(Worker(source, sampling, cpu_decoding(source, transform, threads), batch_size))


def cpu_decoding(
    source: Source, transform: ImageTransform | None, threads: int = 0, lanes: int | None = None
) -> Decoding:
    """Pictures decoded by FFmpeg and converted by swscale, as NumPy arrays.

    Args:
        source: where they come from.
        transform: size of the pictures; None for the full display resolution.
        threads: of the decoder, or of all lanes together; 0 for as many as there are cores.
        lanes: decoders of one thread each that share a file; by default one for each thread.
    """
    count = lanes or threads or min(_MOST_LANES, usable_cores())
    lock, used = threading.Lock(), 0

    @contextmanager
    def open_lane(
        container: InputContainer, stream: VideoStream, note: Callable[..., None], alone: bool
    ) -> Iterator[_CpuLane]:
        nonlocal used
        with lock:
            if used and (used + 1) * stream.width * stream.height > _LANES_PIXELS:
                raise NoLane
            used += 1
        stream.thread_type = "AUTO"
        # Pictures of MPEG-4 in fields come out differently where FFmpeg's threads share them.
        shared = alone and stream.codec_context.name != "mpeg4"
        stream.codec_context.thread_count = threads if shared else 1
        converter = Converter(transform, stream.sample_aspect_ratio, source.limits.max_pixels)
        try:
            yield _CpuLane(container, stream, _CpuDecoder(stream), converter, note, source.name)
        finally:
            with lock:
                used -= 1

    pixels = transform.height * transform.width if transform else 1920 * 1080
    return Decoding(open_lane, np.stack, lanes=count, ahead=max(2, _AHEAD_BYTES // (6 * count * pixels)), whole=True)


class _CpuDecoder:
    def __init__(self, stream: VideoStream) -> None:
        self._context = stream.codec_context

    def decode(self, packet: Packet[VideoStream] | None) -> Sequence[VideoFrame]:
        return self._context.decode(packet)

    def flush(self) -> None:
        self._context.flush_buffers()


@dataclass(frozen=True, slots=True)
class _CpuLane:
    container: InputContainer
    stream: VideoStream
    decoder: _CpuDecoder
    converter: Converter
    note: Callable[..., None]
    name: str  # of the source

    def keep(self, picture: VideoFrame) -> VideoFrame:
        return picture

    def shown(self, pictures: Iterable[tuple[M, VideoFrame]]) -> Iterator[tuple[M, U8]]:
        converter = self.converter
        for mark, frame in pictures:
            try:
                picture = converter(frame)
            except (av.error.FFmpegError, ValueError) as error:
                raise UnsupportedCodec(
                    f"{self.name}: pictures of the format {frame.format.name} cannot be shown: {error}.",
                    hint="Convert it to H.264 with ffmpeg.",
                ) from error
            if converter.tone_mapped:
                self.note(f"{converter.tone_mapped.upper()} (HDR) frames tone-mapped to SDR, colours are approximate")
            yield mark, picture
