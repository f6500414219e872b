"""NVDEC's decoders of one device, kept open between files, and how one is fed.

A decoder costs 50 to 70 ms to make, so that one which was drained is used again, for a stream that is like the last one
in everything that shapes its surfaces. One that failed, or that still holds pictures, is never used again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import av
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.decode.bitstream import formats
from keyreel.decode.decoding import DecoderFailed
from keyreel.decode.sampling import PlanBroken
from keyreel.errors import BackendUnavailable

# How packets get start codes, and parameter sets before each key picture, where a decoder may have to begin.
_FILTERS = {"h264": "h264_mp4toannexb,dump_extra", "hevc": "hevc_mp4toannexb,dump_extra"}


@dataclass(frozen=True, slots=True)
class Format:
    """All that shapes a decoder and its surfaces. Two streams with equal ones can use one decoder after the other.

    The parameter sets belong to it: PyNvVideoCodec does not make its decoder anew for a stream of the same coded size
    that needs more reference pictures.
    """

    codec: str  # FFmpeg's name
    chroma: str  # "420" or "444"
    bits: int
    coded: tuple[int, int]  # (height, width) as decoded
    shown: tuple[int, int]  # (height, width) after the crop
    parameters: bytes  # the stream's extradata

    @property
    def surface(self) -> str:
        """PyNvVideoCodec's name of the surface's format."""
        if self.chroma == "420":
            return "NV12" if self.bits == 8 else "P016"
        return "YUV444" if self.bits == 8 else "YUV444_16Bit"

    @property
    def rows(self) -> tuple[int, int]:
        """Shape of a surface: luma, and below it chroma of the same width."""
        height, width = self.shown
        return height * 3 // 2 if self.chroma == "420" else height * 3, width


class DecoderPool:
    """The decoders of a device; safe to share between threads.

    Args:
        cuda: the device; its stream is the one on which surfaces are written.
        module: PyNvVideoCodec; by default it is imported at the first use.
        limit: decoders that are open at most, unless more streams than that are read at once.
    """

    def __init__(self, cuda: Any, module: Any = None, limit: int = 16) -> None:
        # Not held: a pool lies where it lives as long as the device (nvdec.pool_of).
        self.cuda: Any = weakref.proxy(cuda)
        self.limit = limit
        self.busy = 0
        self._module = module
        self._idle: list[tuple[Format, Any]] = []  # the one used last at the end
        self._caps: dict[tuple[str, str, int], dict[str, int]] = {}
        self.claims: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # what is known of sources
        self._lock = threading.Lock()

    @property
    def module(self) -> Any:
        """PyNvVideoCodec.

        Raises:
            BackendUnavailable: it cannot be loaded.
        """
        if self._module is None:
            try:
                self._module = import_module("PyNvVideoCodec")
            except Exception as error:  # without the driver's libraries it raises RuntimeError
                raise BackendUnavailable(
                    f"PyNvVideoCodec cannot be loaded: {str(error).strip().splitlines()[0]}",
                    probe="nvdec",
                    hint="pip install PyNvVideoCodec; in a container, allow the driver capability 'video'",
                ) from error
        return self._module

    def capabilities(self, codec: str, chroma: str, bits: int) -> dict[str, int]:
        """What the device decodes of a codec, asked once: a query opens a context of its own.

        Raises:
            BackendUnavailable: the question fails.
        """
        with self._lock:
            if (codec, chroma, bits) not in self._caps:
                module = self.module
                try:
                    self._caps[codec, chroma, bits] = module.GetDecoderCaps(
                        gpuid=self.cuda.index,
                        codec=getattr(module.cudaVideoCodec, codec.upper()),
                        chromaformat=getattr(module.cudaVideoChromaFormat, chroma),
                        bitdepth=bits,
                    )
                except Exception as error:
                    raise BackendUnavailable(f"NVDEC does not answer: {_line(error)}", probe="nvdec") from error
            return self._caps[codec, chroma, bits]

    @property
    def idle(self) -> int:
        """Decoders that wait to be used again."""
        return len(self._idle)

    def take(self, format: Format, *, needed: bool) -> Any | None:
        """A decoder, made if there is none; None where the limit is reached and it is not `needed`.

        Raises:
            DecoderFailed: none can be made.
        """
        gone = None
        with self._lock:
            for place in reversed(range(len(self._idle))):
                if self._idle[place][0] == format:
                    self.busy += 1
                    return self._idle.pop(place)[1]
            if self.busy + len(self._idle) >= self.limit:
                if self._idle:
                    gone = self._idle.pop(0)
                elif not needed:
                    return None
            self.busy += 1
        del gone  # closes it, before another is made
        try:
            module = self.module
            with self.cuda.scope():
                return module.CreateDecoder(
                    gpuid=self.cuda.index,
                    codec=getattr(module.cudaVideoCodec, format.codec.upper()),
                    cudacontext=0,  # the primary one, which is CuPy's
                    cudastream=self.cuda.stream.ptr,
                    usedevicememory=True,
                )
        except Exception as error:
            self.give(format, None)
            raise DecoderFailed(f"NVDEC makes no decoder: {_line(error)}") from error

    def give(self, format: Format, decoder: Any | None) -> None:
        """Takes a decoder back; None for one that is to be forgotten."""
        with self._lock:
            self.busy -= 1
            if decoder is not None and self.busy + len(self._idle) < self.limit:
                self._idle.append((format, decoder))

    def close(self) -> None:
        """Forgets all that wait."""
        with self._lock:
            self._idle.clear()


def _line(error: Exception) -> str:
    """What an error of PyNvVideoCodec says, in one line, without the place in its source."""
    return " ".join(str(error).split("\nat ")[0].split())


@dataclass(slots=True)
class DevicePicture:
    """A picture that NVDEC has decoded."""

    pts: int
    duration: int
    key_frame: bool
    frame: Any  # DecodedFrame, whose memory is the decoder's own, until it was copied
    copy: Any = None  # [rows, width] on the device
    dts: int | None = None
    is_corrupt: bool = False  # NVDEC does not tell


class NvDecoder:
    """Feeds one decoder with the packets of one stream, and checks what comes out.

    Args:
        pool: where the decoder comes from.
        decoder: of the pool.
        format: which the stream has.
        stream: the video.

    Raises:
        DecoderFailed: the stream's packets cannot be brought into NVDEC's form.
    """

    def __init__(self, pool: DecoderPool, decoder: Any, format: Format, stream: VideoStream) -> None:
        self._module, self._decoder, self._format = pool.module, decoder, format
        name = _FILTERS.get(format.codec)
        self._known: set[object] = set()
        self._waiting: dict[int, tuple[int, bool, bool]] = {}  # pts: duration, key, not to be shown
        self._first: int | None = None  # pts of the first packet since the last drain
        self.failed = False
        try:
            self._filter = BitStreamFilterContext(name, stream) if name else None
        except av.error.FFmpegError as error:
            raise self._failure(f"its parameter sets are damaged: {error.strerror}") from error

    def decode(self, packet: Packet[VideoStream] | None) -> Sequence[DevicePicture]:
        """As `Decoder.decode`.

        Raises:
            DecoderFailed: NVDEC failed, or cannot decode this stream.
            PlanBroken: what came out is not what went in.
        """
        if packet is None:
            return self._drain()
        # The filter takes the packet's content, so that all is asked of it before.
        pts, about = packet.pts, (packet.duration or 0, packet.is_keyframe, packet.is_discard)
        pictures: list[DevicePicture] = []
        for part in [packet] if self._filter is None else self._filter.filter(packet):
            data = bytes(part)
            self._known |= formats(self._format.codec, data)
            if len(self._known) > 1:
                raise self._failure("the size or the format of its pictures may change on the way")
            if pts is None or pts in self._waiting:
                raise self._failure("it has packets with no pts of their own")
            self._first = pts if self._first is None else self._first
            self._waiting[pts] = about
            pictures += self._feed(part.buffer_ptr, len(data), pts)
        return pictures

    def flush(self) -> None:
        """Nothing to do: a drain leaves the decoder ready for another place."""

    def reusable(self) -> bool:
        """Drains what an early end has left; True where the decoder is as new."""
        try:
            if self._first is not None and not self.failed:
                self._drain()
        except (DecoderFailed, PlanBroken):
            self.failed = True
        return not self.failed

    def _drain(self) -> list[DevicePicture]:
        pictures = self._feed(0, 0, 0)
        lost = [pts for pts in self._waiting if self._begun(pts)]
        self._waiting.clear()
        self._first = None
        if lost:
            raise self._surprise(f"{len(lost)} pictures did not come out of NVDEC")
        return pictures

    def _feed(self, address: int, size: int, pts: int) -> list[DevicePicture]:
        packet = self._module.PacketData()
        packet.bsl_data, packet.bsl, packet.pts = address, size, pts
        try:
            frames = self._decoder.Decode(packet)
        except Exception as error:
            raise self._failure(f"NVDEC: {_line(error)}") from error
        surface = getattr(self._module.Pixel_Format, self._format.surface)
        pictures = []
        for frame in frames:
            found = self._waiting.pop(frame.getPTS(), None)
            if found is None or any(self._begun(pts) and pts < frame.getPTS() for pts in self._waiting):
                raise self._surprise(f"the picture at pts {frame.getPTS()} came out of NVDEC out of turn")
            if frame.format != surface or tuple(frame.shape) != self._format.rows:
                raise self._failure(f"NVDEC gives surfaces {frame.format} {tuple(frame.shape)}")
            duration, key, hidden = found
            if not hidden:
                pictures.append(DevicePicture(frame.getPTS(), duration, key, frame))
        return pictures

    def _begun(self, pts: int) -> bool:
        """False for a picture shown before the first key picture: it may need ones that were not fed, and not come."""
        return self._first is not None and pts >= self._first

    def _surprise(self, reason: str) -> PlanBroken:
        self.failed = True
        return PlanBroken(reason)

    def _failure(self, reason: str) -> DecoderFailed:
        self.failed = True
        return DecoderFailed(reason)
