"""NVDEC's decoders of one device, kept open between files.

Making a decoder takes 50 to 70 ms, so a drained one is used again for a stream that is like the last one in everything
that shapes its surfaces. One that failed, or that still holds pictures, is never used again.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from keyreel.decode.decoder import DecoderFailed
from keyreel.decode.headers import Bits, units_of
from keyreel.errors import BackendUnavailable


@dataclass(frozen=True, slots=True)
class Format:
    """Everything that shapes a decoder and its surfaces. Streams of equal formats can share a decoder, one by one.

    This includes the parameter sets: PyNvVideoCodec does not adapt its decoder to a stream of the same coded size that
    needs more reference pictures.
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


class DevicePacket(NamedTuple):
    """A packet in NVDEC's form."""

    pts: int | None
    about: tuple[int, bool, bool]  # duration, key, not to be shown
    parts: list[Any]  # packets
    sizes: set[object]  # see `sizes`
    error: Exception | None = None  # it cannot be brought into this form


@dataclass(slots=True)
class DevicePicture:
    """A picture that NVDEC has decoded."""

    pts: int
    duration: int
    key_frame: bool
    frame: Any  # DecodedFrame, whose memory is the decoder's own; None once it was copied
    copy: Any = None  # [rows, width] on the device
    dts: int | None = None
    is_corrupt: bool = False


class DecoderPool:
    """The decoders of a device; safe to share between threads.

    Args:
        cuda: the device; surfaces are written on its stream `decoding`.
        module: PyNvVideoCodec; by default it is imported at the first use.
        limit: decoders that are open at most, unless more streams than that are read at once.
    """

    def __init__(self, cuda: Any, module: Any = None, limit: int = 16) -> None:
        # A weak reference: the pool is kept in a dictionary that must not keep the device (nvdec.pool_of).
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
        """What the device decodes of a codec. Asked once, since a query opens a context of its own.

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
                    raise BackendUnavailable(f"NVDEC does not answer: {one_line(error)}", probe="nvdec") from error
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
                    cudastream=self.cuda.decoding.ptr,
                    usedevicememory=True,
                )
        except Exception as error:
            self.give(format, None)
            raise DecoderFailed(f"NVDEC makes no decoder: {one_line(error)}") from error

    def give(self, format: Format, decoder: Any | None) -> None:
        """Takes a decoder back; None for one that must not be used again."""
        with self._lock:
            self.busy -= 1
            if decoder is not None and self.busy + len(self._idle) < self.limit:
                self._idle.append((format, decoder))

    def close(self) -> None:
        """Closes all decoders that wait."""
        with self._lock:
            self._idle.clear()


def one_line(error: Exception) -> str:
    """The message of an error of PyNvVideoCodec, without the place in its source."""
    return " ".join(str(error).split("\nat ")[0].split())


def sizes(codec: str, data: bytes, width: int = 0) -> set[object]:
    """What decides the size and the format of pictures: sequence parameter sets, or VP9's sizes.

    A stream in which more than one is found changes, or may change, midway.

    Args:
        codec: h264, hevc or vp9.
        data: the packet.
        width: of the lengths before units of h264 and hevc, 0 for start codes, which take far longer to find.
    """
    if codec == "vp9":
        return {size for frame in _vp9_frames(data) if (size := _vp9_size(frame))}
    return set(units_of(codec, data, width, (7 if codec == "h264" else 33,)))


def _vp9_frames(data: bytes) -> list[bytes]:
    """The frames of a packet, including hidden ones: VP9 specification, annex B."""
    marker = data[-1] if data else 0
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - count * width :]
    if marker >> 5 != 6 or len(index) != 2 + count * width or index[0] != marker:
        return [data]
    frames, at = [], 0
    for n in range(count):
        size = int.from_bytes(index[1 + n * width : 1 + (n + 1) * width], "little")
        frames.append(data[at : at + size])
        at += size
    return frames


def _vp9_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) where the frame states it, None where it is that of an earlier one: 6.2."""
    read = Bits(frame[:24]).read
    read(2)
    profile = read(1) | read(1) << 1
    if profile == 3:
        read(1)
    if read(1):  # shows a frame that was decoded before
        return None
    inter, shown, resilient = read(1), read(1), read(1)
    intra_only = inter and not shown and read(1)
    if inter and not resilient:
        read(2)
    if not inter or intra_only:
        if read(24) != 0x498342:
            return None  # damaged, which the decoder will find
        if not inter or profile:
            if profile >= 2:
                read(1)
            rgb = read(3) == 7
            read((0 if rgb else 1) + (profile & 1) * (1 if rgb else 3))
        read(8 if intra_only else 0)
    else:
        read(8 + 3 * 4)
        if read(1) or read(1) or read(1):  # the size of a reference
            return None
    return read(16) + 1, read(16) + 1
