"""Decodes packets: what every decoder does, and FFmpeg on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream

from keyreel.config import ImageTransform
from keyreel.decode.aside import Aside
from keyreel.decode.color import Converter
from keyreel.decode.packets import reason_of
from keyreel.decode.source import Source
from keyreel.errors import UnsupportedCodec
from keyreel_kernels.cores import usable_cores

M = TypeVar("M")

_MAX_WORKERS = 8  # more would wait for Python, which passes packets and pictures one by one
WORKERS_PIXELS = 4 * 3840 * 2160  # bytes of all workers' pictures: each decoder holds reference pictures
_AHEAD_BYTES = 256 << 20  # bytes of pictures that wait for earlier ones


class DecoderFailed(Exception):
    """This decoder cannot decode the file; another one may."""


class FramesLost(Exception):
    """A damaged packet destroyed frames that other threads were decoding. A single thread keeps them."""


class Worker(Protocol):
    """Decodes and converts one open copy of the video; used by one thread at a time.

    Its pictures have the attributes `pts`, `dts`, `duration`, `key_frame` and `is_corrupt` of PyAV's VideoFrame.
    """

    container: InputContainer
    stream: VideoStream
    threaded: bool  # a damaged packet loses frames that other threads are decoding

    def prepare(self, packet: Packet[VideoStream]) -> Any:
        """Brings a packet, the next of the file, into the form that `decode` takes; may be ahead of it."""

    def decode(self, packet: Any, *, wanted: bool = True) -> Sequence[Any]:
        """Decodes a prepared packet. Returns the pictures that are ready, in display order; after None all others.

        They are valid until the next call. The decoder may leave out the picture of a packet that is not `wanted`.

        Raises:
            FFmpegError: the packet is damaged.
        """

    def flush(self) -> None:
        """Prepares for packets of another place. All pictures must have been taken out."""

    def agrees(self, picture: Any, *, key: bool, fields: bool) -> bool:
        """Whether the decoder confirms what the packets say.

        Decoding may begin with this picture, if it is a `key`, and it is not a pair of fields, unless `fields`.
        """

    def keep(self, picture: Any) -> Any:
        """Returns the picture in a form that stays valid after the next packet."""

    def convert(self, pictures: Iterable[tuple[M, Any]]) -> Iterator[tuple[M, Any]]:
        """Yields upright RGB [H, W, 3] uint8 of each picture, in order; may read ahead."""


class Decoder(Protocol):
    """Decodes the packets of a video on one device."""

    workers: int  # workers that may decode parts of a file at the same time
    ahead: int  # pictures of a part that may wait for earlier parts
    gap: int  # decoding this many unneeded packets costs as much as a restart
    whole: bool  # whether one worker decodes everything as fast as several

    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> AbstractContextManager[Worker]:
        """Makes a worker on an open container. `alone`: no other works on the file, so it may use several threads."""

    def stack(self, pictures: list[Any]) -> Any:
        """Stacks pictures of one size as [T, H, W, 3]."""

    def join(self) -> None:
        """Waits for the device; called in the thread that takes a batch, see `Arrays.join`."""

    def fallback(self, error: DecoderFailed) -> Decoder:
        """Returns the decoder to continue with after an error; without one it raises the error."""


class Conversion(Protocol):
    """Converts decoded frames to pictures."""

    tone_mapped: str | None  # the HDR transfer that it maps to SDR, or None

    def __call__(self, frame: VideoFrame) -> Any: ...


class CpuDecoder:
    """FFmpeg decodes, swscale converts; pictures are NumPy arrays.

    Args:
        source: of the video.
        transform: size of the pictures; None for the full display resolution.
        threads: of all workers together, one each, or of one that works alone; 0 for as many as there are cores.
        aside: collects thumbnails of some of the frames.
        converter: makes a Conversion for a stream's sample aspect ratio; by default one to RGB.
    """

    gap = 0
    whole = True

    def __init__(
        self,
        source: Source,
        transform: ImageTransform | None,
        threads: int = 0,
        aside: Aside | None = None,
        converter: Callable[[Fraction | None], Conversion] | None = None,
    ) -> None:
        self.workers = threads or min(_MAX_WORKERS, usable_cores())
        pixels = transform.height * transform.width if transform else 1920 * 1080
        self.ahead = max(2, _AHEAD_BYTES // (6 * self.workers * pixels))
        self._source, self._threads, self._aside = source, threads, aside
        self._converter = converter or (lambda ratio: Converter(transform, ratio, source.limits.max_pixels))

    @contextmanager
    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> Iterator[CpuWorker]:
        stream.thread_type = "AUTO"
        # FFmpeg's threads decode interlaced MPEG-4 differently.
        shared = alone and stream.codec_context.name != "mpeg4"
        stream.codec_context.thread_count = self._threads if shared else 1
        threaded = shared and self._threads != 1
        converter = self._converter(stream.sample_aspect_ratio)
        small = self._aside.converter(stream.sample_aspect_ratio) if self._aside is not None else None
        yield CpuWorker(container, stream, threaded, converter, small, note, self._source.name)

    def stack(self, pictures: list[Any]) -> Any:
        return np.stack(pictures)

    def join(self) -> None:
        """Nothing to wait for."""

    def fallback(self, error: DecoderFailed) -> Decoder:
        raise error


@dataclass(slots=True)
class CpuWorker:
    """A `Worker` with FFmpeg's decoder."""

    container: InputContainer
    stream: VideoStream
    threaded: bool
    converter: Conversion
    small: Callable[[VideoFrame], None] | None  # sees each converted picture
    note: Callable[..., None]
    name: str  # of the source

    def prepare(self, packet: Packet[VideoStream]) -> Packet[VideoStream]:
        return packet

    def decode(self, packet: Packet[VideoStream] | None, *, wanted: bool = True) -> Sequence[VideoFrame]:
        context = self.stream.codec_context
        context.skip_frame = "DEFAULT" if wanted else "NONREF"
        return context.decode(packet)

    def flush(self) -> None:
        self.stream.codec_context.flush_buffers()

    def agrees(self, picture: VideoFrame, *, key: bool, fields: bool) -> bool:
        if picture.interlaced_frame and not fields and self.stream.codec_context.codec.name in ("h264", "mpeg4"):
            return False
        return not key or (bool(picture.key_frame) and picture.pict_type == PictureType.I)

    def keep(self, picture: VideoFrame) -> VideoFrame:
        return picture

    def convert(self, pictures: Iterable[tuple[M, VideoFrame]]) -> Iterator[tuple[M, Any]]:
        converter = self.converter
        for mark, frame in pictures:
            try:
                picture = converter(frame)
                if self.small is not None:
                    self.small(frame)
            except (av.error.FFmpegError, ValueError, OverflowError) as error:
                raise UnsupportedCodec(
                    f"{self.name}: pictures of the format {frame.format.name} cannot be shown: {reason_of(error)}.",
                    hint="Convert it to H.264 with ffmpeg.",
                ) from error
            if converter.tone_mapped:
                self.note(f"{converter.tone_mapped.upper()} (HDR) frames tone-mapped to SDR, colours are approximate")
            yield mark, picture
