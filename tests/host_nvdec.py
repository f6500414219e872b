"""The real PyNvVideoCodec on a CPU: nvdec_stub.c stands for the driver's libraries, FFmpeg gives the pixels by pts.

The wheel's libraries are copied with the names of the driver's replaced by the stub's, so that nothing else in the
process finds a driver. Threads, failures, capabilities and counts are added around the real objects.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import av
import numpy as np
from cuda_streams import device, forget, queued

_CODECS = {4: "h264", 8: "hevc", 10: "vp9", 11: "av1"}
_DELAY = 2  # pictures that are held back though they are ready
_CHROMA = {"yuv420": 1, "yuv422": 2, "yuv444": 3}
_SOURCE, _STUB = Path(__file__).with_name("nvdec_stub.c"), "libkrnv.so.1"
_DRIVER = (b"libcuda.so.1\0", b"libnvcuvid.so.1\0", b"libnvidia-encode.so.1\0")

_ONLY = {"gpuid": 0}  # the stub's only device, whatever the emulated one's number

_Long, _Address = ctypes.c_longlong, ctypes.c_void_p


class _Format(ctypes.Structure):
    """As in nvdec_stub.c."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("rate", ctypes.c_uint * 2),
        ("progressive", ctypes.c_ubyte),
        ("bits", ctypes.c_ubyte * 2),
        ("surfaces", ctypes.c_ubyte),
        ("coded", ctypes.c_uint * 2),
        ("area", ctypes.c_int * 4),
        ("chroma", ctypes.c_int),
    )


class _Capabilities(ctypes.Structure):
    """As in nvdec_stub.c."""

    _fields_ = (
        ("codec_id", ctypes.c_int),
        ("chromaformat_id", ctypes.c_int),
        ("bitdepth", ctypes.c_uint),
        ("_reserved", ctypes.c_uint * 3),
        ("supported", ctypes.c_ubyte),
        ("num_decoder_engines", ctypes.c_ubyte),
        ("_surfaces", ctypes.c_ushort),
        *((name, ctypes.c_uint) for name in ("width_max", "height_max", "mb_num_max")),
        *((name, ctypes.c_ushort) for name in ("width_min", "height_min")),
    )


class _Parsed:
    """What FFmpeg makes of one parser's packets."""

    def __init__(self, codec: int) -> None:
        self.name = _CODECS[codec]
        self.size: tuple[int, ...] = ()
        self.restart()

    def restart(self) -> None:
        """An end of stream needs parameter sets and a key picture again."""
        self.context: Any = av.CodecContext.create(self.name, "r")
        self.context.thread_type = "NONE"
        self.held: list[tuple[int, Any, bool]] = []  # pts, frame, whether it is damaged; in the order of display
        self.last: Any = None
        self.fresh = True

    def decode(self, packet: av.Packet | None) -> None:
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError:  # what NVDEC would show in its place is the picture before
            if packet is not None and packet.pts is not None:
                bisect.insort(self.held, (packet.pts, self.last, True), key=lambda held: held[0])
            return
        self.held += [(frame.pts, frame, frame.is_corrupt) for frame in frames]
        self.last = frames[-1] if frames else self.last


class _Driver:
    """What the stub asks and tells."""

    def __init__(self, library: Any) -> None:
        self._parsers: dict[int, _Parsed] = {}
        self._surfaces = threading.local()
        self.damaged = self.sequences = 0
        self.caps: dict[str, int] = {}
        self.resized = 0
        kinds: dict[str, Any] = {
            "capabilities": ctypes.CFUNCTYPE(None, ctypes.POINTER(_Capabilities)),
            "feed": ctypes.CFUNCTYPE(
                *(ctypes.c_int, _Address, ctypes.c_int, _Address, ctypes.c_ulong, _Long, ctypes.POINTER(_Format))
            ),
            "shown": ctypes.CFUNCTYPE(
                ctypes.c_int, _Address, ctypes.c_int, ctypes.POINTER(_Long), ctypes.POINTER(ctypes.c_int)
            ),
            "pixels": ctypes.CFUNCTYPE(None, _Address, ctypes.c_uint, ctypes.c_ulong),
            "closed": ctypes.CFUNCTYPE(None, _Address),
            "copied": ctypes.CFUNCTYPE(None, _Address, ctypes.c_size_t, _Address),
            "freed": ctypes.CFUNCTYPE(None, _Address, ctypes.c_size_t),
        }
        self._hooks = [kind(getattr(self, f"_{name}")) for name, kind in kinds.items()]
        place = (_Address * len(kinds)).in_dll(library, "hooks")
        for n, hook in enumerate(self._hooks):
            place[n] = ctypes.cast(hook, _Address).value

    def _capabilities(self, asked: Any) -> None:
        codec, chroma, deep = asked[0].codec_id, asked[0].chromaformat_id, asked[0].bitdepth > 0
        name = _CODECS[codec]
        side = 4096 if name == "h264" else 8192
        least = {"h264": (48, 16), "hevc": (144, 144)}.get(name, (128, 128))
        found = {
            "supported": name != "av1" and (chroma == 1 or name == "hevc") and not (deep and name == "h264"),
            "num_decoder_engines": 7,
            "_surfaces": 0xF,
            "width_max": side,
            "height_max": side,
            "mb_num_max": side * side // 256,
            "width_min": least[0],
            "height_min": least[1],
        }
        for field, value in (found | self.caps).items():
            setattr(asked[0], field, int(value))

    def _feed(self, parser: int, codec: int, data: int, size: int, pts: int, out: Any) -> int:
        parsed = self._parsers.setdefault(parser, _Parsed(codec))
        if not data:
            parsed.decode(None)
            return 0
        packet = av.Packet(ctypes.string_at(data, size))
        packet.pts = pts
        parsed.decode(packet)
        context, format = parsed.context, out[0]
        if context.format is None:
            return 0
        depth = context.format.components[0].bits - 8
        format.coded[:] = context.coded_width, context.coded_height
        format.area[:] = 0, 0, context.width, context.height
        format.bits[:] = depth, depth
        format.chroma = _CHROMA[context.format.name.replace("yuvj", "yuv")[:6]]
        new = (context.coded_width, context.coded_height)
        begins, self.resized = new != parsed.size, self.resized + (parsed.size not in ((), new))
        parsed.size = new
        self.sequences += begins or parsed.fresh
        parsed.fresh = False
        return int(begins)

    def _shown(self, parser: int, drained: int, pts: Any, corrupt: Any) -> int:
        parsed = self._parsers[parser]
        if len(parsed.held) <= (0 if drained else _DELAY):
            if drained:
                parsed.restart()
            return 0
        pts[0], self._surfaces.frame, corrupt[0] = parsed.held.pop(0)
        self.damaged += corrupt[0]
        return 1

    def _pixels(self, surface: int, pitch: int, lines: int) -> None:
        there = np.ctypeslib.as_array((ctypes.c_ubyte * (pitch * lines * 3)).from_address(surface)).reshape(-1, pitch)
        frame = self._surfaces.frame
        if frame is None:  # nothing was decoded before the damage
            there[:] = 128
            return
        for n, plane in enumerate(planes(frame)):
            rows = plane.view(np.uint8)[:lines, :pitch]
            there[n * lines : n * lines + len(rows), : rows.shape[1]] = rows

    def _closed(self, parser: int) -> None:
        self._parsers.pop(parser, None)

    def _freed(self, address: int, size: int) -> None:
        forget(address, size)

    def _copied(self, address: int, size: int, stream: int | None) -> None:
        queued(address, size, stream or 0)


def planes(frame: av.VideoFrame) -> list[np.ndarray[Any, Any]]:
    """[rows, width] each: luma, then chroma in pairs (4:2:0) or in two planes (4:4:4); the bits at the high end."""
    bits = 8 if frame.format.components[0].bits == 8 else 16
    kind = "u1" if bits == 8 else "<u2"
    found = [
        np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width]
        << (bits - frame.format.components[0].bits)
        for plane in frame.planes
    ]
    if frame.format.name.startswith(("yuv420", "yuvj420")):
        found = [found[0], np.stack(found[1:], -1).reshape(found[1].shape[0], -1)]
    return [np.ascontiguousarray(plane) for plane in found]


def packed(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    """[rows, width] of a picture, one plane below the other."""
    return np.concatenate(planes(frame))


class NotHere(Exception):
    """There is nothing to test here."""


@functools.cache
def load() -> tuple[Any, Any, _Driver]:
    """The package, the stub and its driver.

    Raises:
        NotHere: PyNvVideoCodec is not installed, or a driver is, with which the real one is tested.
        ImportError: the package asks the driver for something that nvdec_stub.c lacks.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        spec = importlib.util.find_spec("PyNvVideoCodec")
    else:
        raise NotHere("a CUDA driver is there")
    if spec is None or not spec.submodule_search_locations:
        raise NotHere("PyNvVideoCodec is not installed")
    folder = Path(tempfile.mkdtemp(prefix="keyreel-nvdec-"))
    stub = folder / _STUB
    command = [os.environ.get("CC", "gcc"), "-std=c17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-fexceptions", f"-Wl,-soname,{_STUB}", "-o", stub, _SOURCE], check=True)
    library = ctypes.CDLL(str(stub))
    driver = _Driver(library)
    package = folder / "PyNvVideoCodec"
    installed = Path(next(iter(spec.submodule_search_locations)))
    for origin in (installed, installed.parent / "pynvvideocodec."):
        shutil.copytree(origin, folder / origin.name)
    for path in folder.rglob("*.so*"):
        if path != stub and any(name in (data := path.read_bytes()) for name in _DRIVER):
            for name in _DRIVER:
                data = data.replace(name, _STUB.encode().ljust(len(name), b"\0"))
            path.write_bytes(data)
    spec = importlib.util.spec_from_file_location(
        "PyNvVideoCodec", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["PyNvVideoCodec"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["PyNvVideoCodec"]
        shutil.rmtree(folder)
    return module, library, driver


class HostDecoder:
    """A decoder that notices two threads, fails when it is told to, and is not used after that."""

    def __init__(self, module: HostNvdec, decoder: Any) -> None:
        self._module, self._decoder = module, decoder
        self._lock = threading.Lock()
        self._failed = False

    def Decode(self, packet: Any) -> list[Any]:
        if not self._lock.acquire(blocking=False):
            raise AssertionError("two threads in one decoder")
        module = self._module
        try:
            if self._failed:
                raise AssertionError("a decoder that failed was used again")
            module.calls += 1
            module.fed += packet.bsl > 0
            if module.fail_at is not None and module.calls >= module.fail_at:
                module.fail_at, self._failed = None, True
                module.failed.append(weakref.ref(self))
                module.library.stub_fail(1)
            found: list[Any] = self._decoder.Decode(packet)
            return found
        finally:
            module.library.stub_fail(0)
            self._lock.release()


class HostNvdec:
    """The module. caps: what to answer for a codec instead of what an H100 answers."""

    def __init__(self, **caps: int) -> None:
        self._real, self.library, self.driver = load()
        self.driver.caps, self.driver.resized, self.driver.damaged, self.driver.sequences = caps, 0, 0, 0
        self.fail_at: int | None = None  # the number of the Decode call that raises
        self.calls = self.fed = self.created = 0
        self.failed: list[Any] = []
        self.alive: weakref.WeakSet[HostDecoder] = weakref.WeakSet()
        self.most_alive = 0
        self.refuse: str | None = None  # what CreateDecoder raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def GetDecoderCaps(self, **how: Any) -> Any:
        return self._real.GetDecoderCaps(**how | _ONLY)

    def CreateDecoder(self, **how: Any) -> HostDecoder:
        assert how["usedevicememory"]
        if self.refuse is not None:
            raise self._real.PyNvVCException(self.refuse)
        assert how["gpuid"] == device(), "made while another device is current"
        decoder = HostDecoder(self, self._real.CreateDecoder(**how | _ONLY))
        self.created += 1
        self.alive.add(decoder)
        self.most_alive = max(self.most_alive, len(self.alive))
        return decoder
