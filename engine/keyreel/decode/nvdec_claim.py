"""What NVDEC decodes: of a stream, whether it does, and how its pictures are to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from keyreel.config import ImageTransform
from keyreel.decode.color import Orientation, display_size, matrix_of, orientation_of, transfer_of
from keyreel.decode.nvdec_pool import DecoderPool, Format
from keyreel.decode.packets import BROKEN, demux, reason_of
from keyreel.decode.source import Source
from keyreel_kernels.surfaces import Surface, resized_size

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
_TYPICAL_ENGINES = 4  # where the device does not say how many it has


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


class Declined(Exception):
    """Not a stream for NVDEC."""


def examined(source: Source, pool: DecoderPool) -> Claim:
    """What NVDEC will do for a source. Kept, since a long video is opened for many short looks.

    Raises:
        Declined, BackendUnavailable, SourceError.
    """
    found: Claim | str | None = pool.claims.get(source)
    if found is None:
        try:
            found = _look(source, pool)
        except Declined as declined:
            found = str(declined)
        pool.claims[source] = found
    if isinstance(found, str):
        raise Declined(found)
    return found


def _look(source: Source, pool: DecoderPool) -> Claim:
    with source.open() as container:
        stream = source.require_video(container)
        context = stream.codec_context
        codec = context.codec.canonical_name
        if codec not in _PADDING:
            raise Declined(f"{codec} is not decoded on the device, only {', '.join(_PADDING)}")
        frame = _first_frame(container, stream)
        if frame.format.name not in _FORMATS:
            raise Declined(f"{codec} in {frame.format.name} is not decoded on the device")
        chroma, bits = _FORMATS[frame.format.name]
        coded, shown = (context.coded_height, context.coded_width), (frame.height, frame.width)
        if (transfer := transfer_of(frame)) != "sdr":
            raise Declined(f"{transfer.upper()} (HDR) is tone-mapped on the CPU")
        standard = _STANDARDS.get(matrix_of(frame.colorspace, frame.height, transfer))
        if standard is None:
            raise Declined(f"its YUV matrix (H.273 number {frame.colorspace}) is converted on the CPU")
        if frame.interlaced_frame or context.field_order > 1:
            raise Declined("it is interlaced, which NVDEC would deinterlace")
        if chroma == "420" and (shown[0] % 2 or shown[1] % 2):
            raise Declined(f"{shown[1]} x {shown[0]}: NVDEC's 4:2:0 surfaces have even sides")
        window = (context.height, context.width)
        if window != shown or any(not 0 <= c - w < _PADDING[codec] for c, w in zip(coded, window, strict=True)):
            raise Declined(f"a window of {window[1]} x {window[0]} cut out of {coded[1]} x {coded[0]}")
        caps = pool.capabilities(codec, chroma, bits)
        _check_capabilities(caps, f"{codec} 4:{chroma[1]}:{chroma[2]} of {bits} bits", coded)
        orientation = orientation_of(frame)
        return Claim(
            Format(codec, chroma, bits, coded, shown, bytes(context.extradata or b"")),
            standard,
            frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj"),
            display_size(frame, stream.sample_aspect_ratio, orientation),
            orientation,
            caps.get("num_decoder_engines") or _TYPICAL_ENGINES,
        )


def _check_capabilities(caps: dict[str, int], what: str, coded: tuple[int, int]) -> None:
    if not caps["supported"]:
        raise Declined(f"NVDEC of this device does not decode {what}")
    height, width = coded
    if width > caps["width_max"] or height > caps["height_max"]:
        raise Declined(f"{width} x {height}: NVDEC decodes {what} up to {caps['width_max']} x {caps['height_max']}")
    if width < caps["width_min"] or height < caps["height_min"]:
        raise Declined(f"{width} x {height}: NVDEC decodes {what} from {caps['width_min']} x {caps['height_min']} on")
    blocks = -(-width // 16) * -(-height // 16)
    if blocks > caps["mb_num_max"]:
        raise Declined(f"{blocks} macroblocks: NVDEC decodes {what} up to {caps['mb_num_max']}")


def check_size(claim: Claim, transform: ImageTransform | None, max_pixels: int) -> None:
    """Raises Declined for pictures over the limit."""
    height, width = claim.display
    if transform is not None:
        height, width = resized_size(height, width, transform.height, transform.width, transform.mode)
    if height * width > max_pixels:
        raise Declined(f"{width} x {height} pixels, the limit is {max_pixels}")


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame:
    """Decoded on the CPU: its colours and its rotation, which NVDEC does not tell."""
    try:
        for packet in demux(container, stream):
            frame: VideoFrame
            for frame in packet.decode():
                return frame
    except BROKEN as error:
        raise Declined(f"its first picture is damaged: {reason_of(error)}") from error
    raise Declined("its first picture is not found")
