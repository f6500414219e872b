"""Decoding on a CUDA device: NVDEC's surfaces become RGB pictures there, and never leave it.

Demux, plan, times and checks are those of the CPU (reader.py). Surfaces lie in the decoder's own memory until its next
packet; those of wanted frames are copied, device to device, on the stream on which the decoder writes, so that one
launch can convert many: a copy costs a few microseconds, a launch for each frame more than its work.

What NVDEC does not decode, or not as the CPU does, the CPU decodes, with the reason in the warnings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import Orientation, display_size, matrix_of, orientation_of, transfer_of
from keyreel.decode.cpu import cpu_decoding
from keyreel.decode.decoding import Decoding
from keyreel.decode.lanes import NoLane, Stopped
from keyreel.decode.nvdec_pool import DecoderPool, DevicePicture, Format, NvDecoder
from keyreel.decode.source import Source
from keyreel.decode.stream import Stream, Worker
from keyreel.errors import BackendUnavailable, SourceError, UnsupportedCodec
from keyreel_kernels.surfaces import Surface, resized_size

M = TypeVar("M")

_FORMATS = {
    "yuv420p": ("420", 8),
    "yuvj420p": ("420", 8),
    "yuv420p10le": ("420", 10),
    "yuv420p12le": ("420", 12),
    "yuv444p": ("444", 8),
    "yuvj444p": ("444", 8),
    "yuv444p10le": ("444", 10),
    "yuv444p12le": ("444", 12),
}
_STANDARDS = {Colorspace.ITU601: "bt601", Colorspace.ITU709: "bt709", Colorspace.BT2020: "bt2020"}
# How far the coded picture may go beyond the shown one: to whole macroblocks, to whole coding blocks. PyNvVideoCodec
# crops at the right and at the bottom only; more than that is a crop of the author's, which may be anywhere.
_PADDING = {"h264": 16, "hevc": 64, "vp9": 1}
_USUAL_ENGINES = 4  # where the device does not say how many it has
_COPIED_BYTES = 256 << 20  # of surfaces that wait to be converted
_DRAIN_PACKETS = 8  # decoded in vain cost about as much as a drain
_AHEAD_BYTES = 1 << 30  # of pictures that wait for those before them
_HINT = "use device='auto' or 'cpu' (--device), or convert it to 8-bit H.264 with ffmpeg"

_POOLS: WeakKeyDictionary[Any, DecoderPool] = WeakKeyDictionary()
_POOLS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Claim:
    """A stream that NVDEC decodes, and how its pictures are to be shown; of its first picture."""

    format: Format
    standard: str
    full_range: bool
    display: tuple[int, int]
    orientation: Orientation
    engines: int  # of the device, for this codec

    def surface(self, rows: Any) -> Surface:
        """[rows, width] as NVDEC gives them."""
        height, width = self.format.shown
        planes: tuple[Any, ...] = (rows[:height], rows[height : 2 * height], rows[2 * height :])
        if self.format.chroma == "420":
            planes = (rows[:height], rows[height:].reshape(height // 2, width // 2, 2))
        return Surface(planes, self.format.bits, self.standard, self.full_range, self.display, self.orientation)


class _Declined(Exception):
    """Not a stream for NVDEC."""


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
    lanes: int | None = None,
    threads: int = 0,
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
        lanes: decoders that share a long file; as many as the device has by default.
        threads: of the CPU's decoder, where that one is used.

    Raises:
        UnsupportedCodec: (strict) NVDEC does not decode this stream.
        BackendUnavailable: (strict) NVDEC does not work; while iterating, it failed on the way.
        SourceError: while iterating, as FrameStream.
    """
    pool = pool or pool_of(cuda)

    def stack(pictures: list[Any]) -> Any:
        with cuda.scope():
            return cuda.cupy.stack([cuda.to_device(picture) for picture in pictures])

    on_cpu = replace(cpu_decoding(source, transform, threads), stack=stack, join=cuda.join)
    try:
        claim = _examined(source, pool)
        _check_size(claim, transform, source.limits.max_pixels)
    except (_Declined, BackendUnavailable) as error:
        if strict:
            if isinstance(error, BackendUnavailable):
                raise
            raise UnsupportedCodec(f"{source.name}: {error}", hint=_HINT) from error
        return Stream(Worker(source, sampling, on_cpu, batch_size, (f"decoded on the CPU: {error.args[0]}",)))
    except SourceError:
        return Stream(Worker(source, sampling, on_cpu, batch_size))  # says the same when it is read

    def after(failed: Exception) -> Decoding:
        if strict:
            raise BackendUnavailable(f"{source.name}: {failed}", probe="nvdec", hint=_HINT) from failed
        return on_cpu

    count = min(lanes or claim.engines, pool.limit)
    height, width = claim.display if transform is None else (transform.height, transform.width)
    on_device = Decoding(
        _lanes(claim, pool, cuda, ops, transform),
        stack,
        lanes=count,
        whole=count == 1,
        gap=_DRAIN_PACKETS,
        ahead=max(2, _AHEAD_BYTES // (2 * count * height * width * 3)),
        after=after,
        join=cuda.join,
    )
    return Stream(Worker(source, sampling, on_device, batch_size))


def _lanes(
    claim: Claim, pool: DecoderPool, cuda: Any, ops: Any, transform: ImageTransform | None
) -> Callable[..., Any]:
    """What opens the lanes of one stream: the first always gets a decoder, the others while there are some."""
    lock, used = threading.Lock(), 0

    @contextmanager
    def open_lane(
        container: InputContainer, stream: VideoStream, note: Callable[..., None], alone: bool
    ) -> Iterator[_Lane]:
        nonlocal used
        with lock:
            needed = used == 0
            used += 1
        feeder: NvDecoder | None = None
        try:
            decoder = pool.take(claim.format, needed=needed)
            if decoder is None:
                raise NoLane
            try:
                feeder = NvDecoder(pool, decoder, claim.format, stream)
                yield _Lane(container, stream, feeder, claim, cuda, ops, transform)
            except BaseException as error:
                if feeder is not None:
                    feeder.failed |= not isinstance(error, (GeneratorExit, Stopped))
                raise
            finally:
                pool.give(claim.format, decoder if feeder is not None and feeder.reusable() else None)
        finally:
            with lock:
                used -= 1

    return open_lane


@dataclass(frozen=True, slots=True)
class _Lane:
    container: InputContainer
    stream: VideoStream
    decoder: NvDecoder
    claim: Claim
    cuda: Any
    ops: Any
    transform: ImageTransform | None

    def keep(self, picture: DevicePicture) -> DevicePicture:
        if picture.copy is None:
            cuda, format = self.cuda, self.claim.format
            with cuda.scope():
                rows = cuda.cupy.empty(format.rows, "uint8" if format.bits == 8 else "uint16")
                address = picture.frame.GetPtrToPlane(0)
                runtime = cuda.cupy.cuda.runtime
                runtime.memcpyAsync(rows.data.ptr, address, rows.nbytes, runtime.memcpyDeviceToDevice, cuda.stream.ptr)
            picture.copy, picture.frame = rows, None
        return picture

    def shown(self, pictures: Iterable[tuple[M, DevicePicture]]) -> Iterator[tuple[M, Any]]:
        rows, width = self.claim.format.rows
        most = max(1, min(32, _COPIED_BYTES // (rows * width * (1 if self.claim.format.bits == 8 else 2))))
        marks: list[M] = []
        copies: list[Any] = []
        for mark, picture in pictures:
            marks.append(mark)
            copies.append(self.keep(picture).copy)
            if len(copies) == most:
                yield from zip(marks, self._converted(copies), strict=True)
                marks, copies = [], []
        if copies:
            yield from zip(marks, self._converted(copies), strict=True)

    def _converted(self, copies: list[Any]) -> list[Any]:
        wanted = self.transform
        with self.cuda.scope():
            made = self.ops.frames_from_surfaces(
                [self.claim.surface(copy) for copy in copies],
                height=wanted.height if wanted else self.claim.display[0],
                width=wanted.width if wanted else self.claim.display[1],
                mode=wanted.mode if wanted else "squash",
                interpolation=wanted.interpolation if wanted else "bicubic",
                fill=wanted.fill if wanted else 0,
            )
            return [made[n] for n in range(len(copies))]


def _examined(source: Source, pool: DecoderPool) -> Claim:
    """What NVDEC will do for a source; looked at once, since a long video is opened for many short looks.

    Raises:
        _Declined, BackendUnavailable, SourceError.
    """
    found: Claim | str | None = pool.claims.get(source)
    if found is None:
        try:
            found = _look(source, pool)
        except _Declined as declined:
            found = str(declined)
        pool.claims[source] = found
    if isinstance(found, str):
        raise _Declined(found)
    return found


def _look(source: Source, pool: DecoderPool) -> Claim:
    with source.open() as container:
        stream = source.require_video(container)
        context = stream.codec_context
        codec = context.codec.canonical_name
        if codec not in _PADDING:
            raise _Declined(f"{codec} is not decoded on the device, only {', '.join(_PADDING)}")
        frame = _first_frame(container, stream)
        if frame.format.name not in _FORMATS:
            raise _Declined(f"{codec} in {frame.format.name} is not decoded on the device")
        chroma, bits = _FORMATS[frame.format.name]
        coded, shown = (context.coded_height, context.coded_width), (frame.height, frame.width)
        if (transfer := transfer_of(frame)) != "sdr":
            raise _Declined(f"{transfer.upper()} (HDR) is tone-mapped on the CPU")
        standard = _STANDARDS.get(matrix_of(frame.colorspace, frame.height, transfer))
        if standard is None:
            raise _Declined(f"its YUV matrix (H.273 number {frame.colorspace}) is converted on the CPU")
        if frame.interlaced_frame or context.field_order > 1:
            raise _Declined("it is interlaced, which NVDEC would deinterlace")
        if chroma == "420" and (shown[0] % 2 or shown[1] % 2):
            raise _Declined(f"{shown[1]} x {shown[0]}: NVDEC's 4:2:0 surfaces have even sides")
        window = (context.height, context.width)
        if window != shown or any(not 0 <= c - w < _PADDING[codec] for c, w in zip(coded, window, strict=True)):
            raise _Declined(f"a window of {window[1]} x {window[0]} cut out of {coded[1]} x {coded[0]}")
        caps = pool.capabilities(codec, chroma, bits)
        _check_capabilities(caps, f"{codec} 4:{chroma[1]}:{chroma[2]} of {bits} bits", coded)
        orientation = orientation_of(frame)
        return Claim(
            Format(codec, chroma, bits, coded, shown, bytes(context.extradata or b"")),
            standard,
            frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj"),
            display_size(frame, stream.sample_aspect_ratio, orientation),
            orientation,
            caps.get("num_decoder_engines") or _USUAL_ENGINES,
        )


def _check_capabilities(caps: dict[str, int], what: str, coded: tuple[int, int]) -> None:
    if not caps["supported"]:
        raise _Declined(f"NVDEC of this device does not decode {what}")
    height, width = coded
    if width > caps["width_max"] or height > caps["height_max"]:
        raise _Declined(f"{width} x {height}: NVDEC decodes {what} up to {caps['width_max']} x {caps['height_max']}")
    if width < caps["width_min"] or height < caps["height_min"]:
        raise _Declined(f"{width} x {height}: NVDEC decodes {what} from {caps['width_min']} x {caps['height_min']} on")
    blocks = -(-width // 16) * -(-height // 16)
    if blocks > caps["mb_num_max"]:
        raise _Declined(f"{blocks} macroblocks: NVDEC decodes {what} up to {caps['mb_num_max']}")


def _check_size(claim: Claim, transform: ImageTransform | None, max_pixels: int) -> None:
    height, width = claim.display
    if transform is not None:
        height, width = resized_size(height, width, transform.height, transform.width, transform.mode)
    if height * width > max_pixels:
        raise _Declined(f"{width} x {height} pixels, allowed are {max_pixels}")


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame:
    """Decoded on the CPU: its colours and its rotation, which NVDEC does not tell."""
    try:
        for packet in container.demux(stream):
            for frame in packet.decode():
                return frame
    except av.error.FFmpegError as error:
        raise _Declined(f"its first picture is damaged: {error.strerror}") from error
    raise _Declined("its first picture is not found")
