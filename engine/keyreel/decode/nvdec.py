"""Decoding on a CUDA device: NVDEC's surfaces become RGB pictures there, and never leave it.

Timeline, spans and checks are those of the CPU (reader.py). Surfaces lie in the decoder's own memory until its next
packet. Those of wanted frames are copied, device to device, on the stream on which the decoder writes, so that one
launch can convert many: a copy costs a few microseconds, a launch for each frame more than its work. That stream is not
the one on which vectors are computed: only a batch is put there, after its pictures.

Streams that NVDEC cannot decode exactly fall back to the CPU; the reason is in the warnings.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, finalize

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.aside import Aside
from keyreel.decode.complaints import COMPLAINTS
from keyreel.decode.decoder import CpuDecoder, Decoder, DecoderFailed
from keyreel.decode.headers import length_bytes
from keyreel.decode.nvdec_claim import Claim, Declined, check_size, examined
from keyreel.decode.nvdec_pool import DecoderPool, DevicePacket, DevicePicture, one_line, sizes
from keyreel.decode.packets import BROKEN
from keyreel.decode.parallel import NoWorker, Stopped
from keyreel.decode.sampling import PlanBroken
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream
from keyreel.errors import BackendUnavailable, SourceError, UnsupportedCodec
from keyreel_kernels.surfaces import Surface

M = TypeVar("M")

_COPIED_BYTES = 256 << 20  # of surfaces that wait to be converted
_KEPT_BATCHES = 2  # whose pictures stay: by then they were read, and decoding need not wait
_DRAIN_PACKETS = 8  # decoded in vain cost about as much as a drain
_AHEAD_BYTES = 1 << 30  # of pictures that wait for those before them
# How packets get start codes, and parameter sets before each key picture, where a decoder may have to begin.
_FILTERS = {"h264": "h264_mp4toannexb,dump_extra", "hevc": "hevc_mp4toannexb,dump_extra"}
_HINT = "use device='auto' or 'cpu' (--device), or convert it to 8-bit H.264 with ffmpeg"

_POOLS: WeakKeyDictionary[Any, DecoderPool] = WeakKeyDictionary()
_POOLS_LOCK = threading.Lock()


def pool_of(cuda: Any) -> DecoderPool:
    """The decoders of a device, one pool as long as the device is in use."""
    with _POOLS_LOCK:
        return _POOLS.setdefault(cuda, DecoderPool(cuda))


def open_stream(
    source: Source,
    sampling: Sampling,
    *,
    transform: ImageTransform | None = None,
    batch_size: int = 64,
    cuda: Any,
    ops: Any,
    strict: bool,
    pool: DecoderPool | None = None,
    workers: int | None = None,
    aside: Aside | None = None,
) -> Stream:
    """The wanted frames of a source as FrameStream gives them, `data` on the device.

    Args:
        source: stays open and belongs to the caller.
        sampling: which frames.
        transform: size of the pictures; None for the full display resolution.
        batch_size: rows in a batch, the last may have fewer.
        cuda: the device.
        ops: its operations.
        strict: the device was demanded: what it cannot decode is an error.
        pool: of decoders; the device's own by default.
        workers: decoders that share a long file; as many as the device has engines by default.
        aside: collects small pictures of some of the frames.

    Raises:
        UnsupportedCodec: (strict) NVDEC does not decode this stream.
        BackendUnavailable: (strict) NVDEC does not work; while iterating, it failed on the way.
        SourceError: while iterating, as FrameStream.
    """
    pool = pool or pool_of(cuda)
    on_cpu = UploadingDecoder(source, transform, cuda, aside)
    try:
        claim = examined(source, pool)
        check_size(claim, transform, source.limits.max_pixels)
    except (Declined, BackendUnavailable) as error:
        if strict:
            if isinstance(error, BackendUnavailable):
                raise
            raise UnsupportedCodec(f"{source.name}: {error}", hint=_HINT) from error
        return Stream(source, sampling, on_cpu, batch_size, (f"decoded on the CPU: {error.args[0]}",))
    except SourceError:
        return Stream(source, sampling, on_cpu, batch_size)  # raises the same when it is read
    decoder = NvDecoder(source, claim, pool, cuda, transform, ops, workers, None if strict else on_cpu, aside)
    return Stream(source, sampling, decoder, batch_size)


class UploadingDecoder(CpuDecoder):
    """Decodes on the CPU; batches lie on the device."""

    def __init__(self, source: Source, transform: ImageTransform | None, cuda: Any, aside: Aside | None = None) -> None:
        super().__init__(source, transform, aside=aside)
        self._cuda = cuda

    def stack(self, pictures: list[Any]) -> Any:
        return _stacked(self._cuda, pictures)

    def join(self) -> None:
        self._cuda.join()


def _stacked(cuda: Any, pictures: list[Any]) -> Any:
    with cuda.scope():
        return cuda.cupy.stack([cuda.to_device(picture) for picture in pictures])


class NvDecoder:
    """NVDEC decodes, a kernel converts; pictures lie on the device.

    Args:
        source: of the video.
        claim: what NVDEC will decode.
        pool: of decoders.
        cuda: the device.
        transform: size of the pictures; None for the full display resolution.
        ops: the device's operations.
        workers: that share a file; None for as many as the device has engines.
        fallback: goes on where NVDEC fails; None where that is an error.
        aside: collects small pictures of some of the frames.
    """

    gap = _DRAIN_PACKETS

    def __init__(
        self,
        source: Source,
        claim: Claim,
        pool: DecoderPool,
        cuda: Any,
        transform: ImageTransform | None,
        ops: Any,
        workers: int | None,
        fallback: Decoder | None,
        aside: Aside | None = None,
    ) -> None:
        self.claim, self.pool, self.cuda, self.ops, self.transform = claim, pool, cuda, ops, transform
        self.aside, self._name, self._fallback = aside, source.name, fallback
        self.workers = min(workers or claim.engines, pool.limit)
        self.whole = self.workers == 1
        height, width = claim.display if transform is None else (transform.height, transform.width)
        self.ahead = max(2, _AHEAD_BYTES // (2 * self.workers * height * width * 3))
        self._lock, self._open = threading.Lock(), 0
        self._stacked: deque[tuple[Any, Any]] = deque()  # pictures, and the event after which they may go
        finalize(self, _let_go, cuda, self._stacked, 0)

    @contextmanager
    def open(
        self, container: InputContainer, stream: VideoStream, note: Callable[..., None], *, alone: bool
    ) -> Iterator[NvWorker]:
        """The first worker always gets a decoder. Raises NoWorker if there is none for another one."""
        with self._lock:
            needed = self._open == 0
            self._open += 1
        worker: NvWorker | None = None
        try:
            decoder = self.pool.take(self.claim.format, needed=needed)
            if decoder is None:
                raise NoWorker
            with COMPLAINTS.listening():
                try:
                    worker = NvWorker(self, container, stream, decoder)
                    yield worker
                except BaseException as error:
                    if worker is not None:
                        worker.failed |= not isinstance(error, (GeneratorExit, Stopped))
                    raise
                finally:
                    reusable = worker is not None and worker.reusable()
                    self.pool.give(self.claim.format, decoder if reusable else None)
        finally:
            with self._lock:
                self._open -= 1

    def stack(self, pictures: list[Any]) -> Any:
        """A batch on the computing stream, which waits for the pictures; they are kept until it has read them."""
        cuda = self.cuda
        with cuda.scope():  # an event is of the device that is current, and a stream takes only its own device's
            cuda.stream.wait_event(cuda.decoding.record())
            batch = _stacked(cuda, pictures)
            self._stacked.append((pictures, cuda.stream.record()))
        _let_go(cuda, self._stacked, _KEPT_BATCHES)
        return batch

    def join(self) -> None:
        self.cuda.join()

    def fallback(self, error: DecoderFailed) -> Decoder:
        if self._fallback is None:
            raise BackendUnavailable(f"{self._name}: {error}", probe="nvdec", hint=_HINT) from error
        return self._fallback


def _let_go(cuda: Any, stacked: deque[tuple[Any, Any]], kept: int) -> None:
    """Drops the pictures of all but the last batches, whose memory decoding takes: it waits until they were read."""
    with cuda.scope():
        while len(stacked) > kept:
            cuda.decoding.wait_event(stacked[0][1])
            stacked.popleft()


class NvWorker:
    """Feeds one decoder with the packets of one stream, checks what comes out, and converts it.

    Args:
        owner: of the stream.
        container: of the video.
        stream: the video.
        decoder: of PyNvVideoCodec.

    Raises:
        DecoderFailed: the stream's packets cannot be brought into NVDEC's form.
    """

    threaded = False

    def __init__(self, owner: NvDecoder, container: InputContainer, stream: VideoStream, decoder: Any) -> None:
        self.container, self.stream = container, stream
        self._claim, self._cuda, self._ops, self._transform = owner.claim, owner.cuda, owner.ops, owner.transform
        self._aside = owner.aside
        self._module, self._decoder, self._format = owner.pool.module, decoder, owner.claim.format
        self._sizes: set[object] = set()
        self._surface = getattr(self._module.Pixel_Format, self._format.surface)
        self._waiting: dict[int, tuple[int, bool, bool]] = {}  # pts: `DevicePacket.about`
        # pts of the first packet since the last drain, and, as a heap, of those that wait and are not shown before it:
        # these come in order, and surely. The others may need pictures that were not fed.
        self._first: int | None = None
        self._due: list[int] = []
        self.failed = False
        name = _FILTERS.get(self._format.codec)
        self._width = length_bytes(self._format.codec, self._format.parameters) if name else 0
        try:
            self._filter = BitStreamFilterContext(name, stream) if name else None
        except av.error.FFmpegError as error:
            raise self._failure(f"its parameter sets are damaged: {error.strerror}") from error

    def prepare(self, packet: Packet[VideoStream]) -> DevicePacket:
        # The filter takes the packet's content, so everything is asked of it before; what it adds lies in key packets.
        pts, key, codec = packet.pts, packet.is_keyframe, self._format.codec
        about = (packet.duration or 0, key, packet.is_discard)
        adds = self._filter is not None and key
        try:
            found = set() if adds else sizes(codec, bytes(packet), self._width)
            parts = [packet] if self._filter is None else self._filter.filter(packet)
            if adds:
                found = found.union(*(sizes(codec, bytes(part)) for part in parts))
        except BROKEN as error:
            return DevicePacket(pts, about, [], set(), error)
        return DevicePacket(pts, about, parts, found)

    def decode(self, packet: DevicePacket | None, *, wanted: bool = True) -> Sequence[DevicePicture]:
        """As `Worker.decode`; nothing is skipped.

        Raises:
            DecoderFailed: NVDEC failed, or cannot decode this stream.
            PlanBroken: what came out is not what went in.
        """
        if packet is None:
            return self._drain()
        if packet.error is not None:
            raise packet.error
        pts = packet.pts
        self._sizes |= packet.sizes
        if len(self._sizes) > 1:
            raise self._failure("the size or the format of its pictures may change on the way")
        pictures: list[DevicePicture] = []
        for part in packet.parts:
            if pts is None or pts in self._waiting:
                raise self._failure("it has packets with no pts of their own")
            self._first = pts if self._first is None else self._first
            self._waiting[pts] = packet.about
            if pts >= self._first:
                heappush(self._due, pts)
            pictures += self._feed(part.buffer_ptr, part.size, pts)
        return pictures

    def flush(self) -> None:
        """Nothing to do: a drained decoder is ready for another place."""

    def agrees(self, picture: DevicePicture, *, key: bool, fields: bool) -> bool:
        return picture.key_frame or not key

    def reusable(self) -> bool:
        """Drains what is left after an early end; True where the decoder is as new."""
        try:
            if self._first is not None and not self.failed:
                self._drain()
        except (DecoderFailed, PlanBroken):
            self.failed = True
        return not self.failed

    def _drain(self) -> list[DevicePicture]:
        pictures = self._feed(0, 0, 0)
        lost = len(self._due)
        self._waiting.clear()
        self._due.clear()
        self._first = None
        if lost:
            raise self._surprise(f"{lost} pictures did not come out of NVDEC")
        return pictures

    def _feed(self, address: int, size: int, pts: int) -> list[DevicePicture]:
        packet = self._module.PacketData()
        packet.bsl_data, packet.bsl, packet.pts = address, size, pts
        try:
            frames = self._decoder.Decode(packet)
        except Exception as error:
            raise self._failure(f"NVDEC: {one_line(error)}") from error
        damaged = COMPLAINTS.count()
        pictures = []
        for place, frame in enumerate(frames):
            pts = frame.getPTS()
            found = self._waiting.pop(pts, None)
            if found is None or (self._due and self._due[0] < pts):
                raise self._surprise(f"the picture at pts {pts} came out of NVDEC out of turn")
            if self._due and self._due[0] == pts:
                heappop(self._due)
            if frame.format != self._surface or tuple(frame.shape) != self._format.rows:
                raise self._failure(f"NVDEC gives surfaces {frame.format} {tuple(frame.shape)}")
            duration, key, hidden = found
            if not hidden:
                pictures.append(DevicePicture(pts, duration, key, frame, is_corrupt=place < damaged))
        return pictures

    def _surprise(self, reason: str) -> PlanBroken:
        self.failed = True
        return PlanBroken(reason)

    def _failure(self, reason: str) -> DecoderFailed:
        self.failed = True
        return DecoderFailed(reason)

    def keep(self, picture: DevicePicture) -> DevicePicture:
        if picture.copy is None:
            cuda, format = self._cuda, self._format
            with cuda.scope(cuda.decoding):
                rows = cuda.cupy.empty(format.rows, "uint8" if format.bits == 8 else "uint16")
                address = picture.frame.GetPtrToPlane(0)
                runtime, stream = cuda.cupy.cuda.runtime, cuda.decoding.ptr
                runtime.memcpyAsync(rows.data.ptr, address, rows.nbytes, runtime.memcpyDeviceToDevice, stream)
            picture.copy, picture.frame = rows, None
        return picture

    def convert(self, pictures: Iterable[tuple[M, DevicePicture]]) -> Iterator[tuple[M, Any]]:
        rows, width = self._format.rows
        most = max(1, min(32, _COPIED_BYTES // (rows * width * (1 if self._format.bits == 8 else 2))))
        marks: list[M] = []
        kept: list[DevicePicture] = []
        for mark, picture in pictures:
            marks.append(mark)
            kept.append(self.keep(picture))
            if len(kept) == most:
                yield from zip(marks, self._converted(kept), strict=True)
                marks, kept = [], []
        if kept:
            yield from zip(marks, self._converted(kept), strict=True)

    def _converted(self, kept: list[DevicePicture]) -> list[Any]:
        with self._cuda.scope(self._cuda.decoding):
            surfaces = [self._claim.surface(picture.copy) for picture in kept]
            if self._aside is not None:
                chosen = [n for n, picture in enumerate(kept) if self._aside.wants(picture.pts)]
                made = self._made([surfaces[n] for n in chosen], self._aside.transform) if chosen else []
                for n, small in zip(chosen, made, strict=True):
                    self._aside.add(kept[n].pts, small)
            height, width = self._claim.display
            return self._made(surfaces, self._transform or ImageTransform(height, width, "squash"))

    def _made(self, surfaces: list[Surface], wanted: ImageTransform) -> list[Any]:
        made = self._ops.frames_from_surfaces(
            surfaces,
            height=wanted.height,
            width=wanted.width,
            mode=wanted.mode,
            interpolation=wanted.interpolation,
            fill=wanted.fill,
        )
        return [made[n] for n in range(len(surfaces))]
