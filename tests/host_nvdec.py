"""PyNvVideoCodec's interface on a CPU: decoded by FFmpeg, with the real one's habits and traps.

What is kept of the real one (2.2.4): surfaces are views of the decoder's own memory and are overwritten by the next
`Decode`; pictures come out late; an empty packet drains; parameter sets must be in the stream; a stream of another size
fed to a decoder comes out at the old size; errors are of many lines.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from enum import IntEnum
from typing import Any

import av
import numpy as np

_CODECS = {4: "h264", 8: "hevc", 10: "vp9", 11: "av1"}
_DELAY = 2  # pictures that are held back though they are ready


class PyNvVCException(Exception):
    pass


class PacketData:
    """Addresses and sizes are unsigned, times are signed, as pybind11 checks them."""

    def __init__(self) -> None:
        for name in ("bsl", "bsl_data", "pts", "dts", "decode_flag", "discardable"):
            object.__setattr__(self, name, 0)

    def __setattr__(self, name: str, value: int) -> None:
        getattr(self, name)
        if not isinstance(value, int) or (name in ("bsl", "bsl_data") and value < 0):
            raise TypeError("incompatible function arguments")
        object.__setattr__(self, name, value)


class DecodedFrame:
    def __init__(self, rows: np.ndarray[Any, Any], pts: int, format: IntEnum) -> None:
        self._rows, self.timestamp, self.format = rows, pts, format

    def getPTS(self) -> int:
        return self.timestamp

    def GetPtrToPlane(self, plane: int) -> int:
        luma = self._rows.nbytes // 3 * (1 if self.format.name.startswith("YUV") else 2)
        return int(self._rows.ctypes.data) + plane * luma

    @property
    def shape(self) -> tuple[int, ...]:
        return self._rows.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return (self._rows.shape[1], 1)

    def __dlpack__(self, stream: Any = None) -> Any:
        return self._rows.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def packed(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    """[rows, width] of a picture: luma, then chroma pairs (4:2:0) or planes (4:4:4); the bits at the high end."""
    bits = 8 if frame.format.components[0].bits == 8 else 16
    kind = "u1" if bits == 8 else "<u2"
    planes = [
        np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width]
        << (bits - frame.format.components[0].bits)
        for plane in frame.planes
    ]
    if frame.format.name.startswith(("yuv420", "yuvj420")):
        planes = [planes[0], np.stack(planes[1:], -1).reshape(planes[1].shape[0], -1)]
    return np.concatenate(planes)


class HostDecoder:
    def __init__(self, module: HostNvdec, codec: int) -> None:
        self._module, self._name = module, _CODECS[codec]
        self._context = self._fresh()
        self._memory: list[np.ndarray[Any, Any]] = []
        self._held: list[av.VideoFrame] = []
        self._size: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def _fresh(self) -> Any:
        context = av.CodecContext.create(self._name, "r")
        context.thread_type = "NONE"
        return context

    def Decode(self, packet: PacketData) -> list[DecodedFrame]:
        if not self._lock.acquire(blocking=False):
            raise AssertionError("two threads in one decoder")
        try:
            self._module.calls += 1
            if self._module.fail_at is not None and self._module.calls >= self._module.fail_at:
                self._module.fail_at = None
                self._module.failed.append(weakref.ref(self))
                raise PyNvVCException(
                    "Decode : \nError code : 999\nError Type : no picture\nat /src/NvDecoder.cpp:1462\n"
                )
            if any(ref() is self for ref in self._module.failed):
                raise AssertionError("a decoder that failed was used again")
            for memory in self._memory:
                memory.fill(self._module.calls % 251)
            return self._decode(packet)
        finally:
            self._lock.release()

    def _decode(self, packet: PacketData) -> list[DecodedFrame]:
        if packet.bsl:
            data = av.Packet(ctypes.string_at(packet.bsl_data, packet.bsl))
            data.pts = packet.pts
            self._module.fed += 1
            self._held += self._context.decode(data)
            ready = self._held[:-_DELAY]
        else:
            self._held += self._context.decode(None)
            ready = self._held
            self._context = self._fresh()  # an end of stream needs parameter sets and a key picture again
        self._held = self._held[len(ready) :]
        return [self._surface(place, frame) for place, frame in enumerate(ready)]

    def _surface(self, place: int, frame: av.VideoFrame) -> DecodedFrame:
        rows = packed(frame)
        if self._size is None:
            self._size = rows.shape
        if rows.shape != self._size:
            self._module.resized += 1
            rows = np.resize(rows, self._size)
        if place == len(self._memory):
            self._memory.append(np.empty_like(rows))
        self._memory[place][...] = rows
        name = ("NV12" if rows.itemsize == 1 else "P016") if "420" in frame.format.name else "YUV444"
        name += "_16Bit" if name == "YUV444" and rows.itemsize == 2 else ""
        return DecodedFrame(self._memory[place], frame.pts, self._module.Pixel_Format[name])


class HostNvdec:
    """The module. caps: what to answer for a codec instead of what an H100 answers."""

    PacketData = PacketData
    PyNvVCException = PyNvVCException
    cudaVideoCodec = IntEnum("cudaVideoCodec", {name.upper(): number for number, name in _CODECS.items()})
    cudaVideoChromaFormat = IntEnum("cudaVideoChromaFormat", {"Monochrome": 0, "420": 1, "422": 2, "444": 3})
    Pixel_Format = IntEnum("Pixel_Format", {"NV12": 3, "YUV444": 4, "P016": 5, "YUV444_16Bit": 6})

    def __init__(self, **caps: int) -> None:
        self._caps = caps
        self.fail_at: int | None = None  # the number of the Decode call that raises
        self.calls = self.fed = self.created = self.resized = 0
        self.failed: list[Any] = []
        self.alive: weakref.WeakSet[HostDecoder] = weakref.WeakSet()
        self.most_alive = 0
        self.refuse: str | None = None  # what CreateDecoder raises

    def GetDecoderCaps(
        self, gpuid: int = 0, codec: int = 4, chromaformat: int = 1, bitdepth: int = 8
    ) -> dict[str, int]:
        name = _CODECS[codec]
        supported = name != "av1" and (chromaformat == 1 or name == "hevc") and (bitdepth == 8 or name != "h264")
        side = 4096 if name == "h264" else 8192
        least = {"h264": (48, 16), "hevc": (144, 144)}.get(name, (128, 128))
        caps = {
            "codec_id": codec,
            "chromaformat_id": chromaformat,
            "bitdepth": bitdepth,
            "supported": int(supported),
            "num_decoder_engines": 7,
            "width_max": side,
            "height_max": side,
            "mb_num_max": side * side // 256,
            "width_min": least[0],
            "height_min": least[1],
        }
        return caps | self._caps

    def CreateDecoder(
        self,
        *,
        gpuid: int = 0,
        codec: int = 4,
        cudacontext: int = 0,
        cudastream: int = 0,
        usedevicememory: bool = False,
    ) -> HostDecoder:
        assert usedevicememory
        assert gpuid == cudacontext == 0
        if self.refuse is not None:
            raise PyNvVCException(self.refuse)
        decoder = HostDecoder(self, codec)
        self.created += 1
        self.alive.add(decoder)
        self.most_alive = max(self.most_alive, len(self.alive))
        return decoder
