"""Gives the frames of a video as the encoder takes them, scaled if needed, without a conversion to RGB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import matrix_of, orientation_of, transfer_of
from keyreel.decode.decoder import CpuDecoder
from keyreel.decode.packets import BROKEN, demux
from keyreel.decode.reader import Reader
from keyreel.decode.source import Source
from keyreel.errors import NoFrames

_UPRIGHT = (False, False, False)
_UNSPECIFIED = 2  # ITU-T H.273, for primaries, transfer and matrix alike


@dataclass(frozen=True, slots=True)
class Colours:
    """The colour space of limited-range YUV frames, as code points of ITU-T H.273."""

    primaries: int
    transfer: int
    matrix: int


BT709 = Colours(1, 1, 1)


def direct_colours(source: Source) -> Colours | None:
    """The colours of a source that needs no conversion to RGB: SDR, YUV, upright; else None.

    Raises:
        SourceError: the video cannot be opened.
    """
    with source.open() as container:
        stream = source.require_video(container)
        stream.codec_context.thread_count = 1
        for packet in demux(container, stream):
            with suppress(*BROKEN):
                for frame in stream.codec_context.decode(packet):
                    return _colours_of(frame)
    return None


def _colours_of(frame: VideoFrame) -> Colours | None:
    components = frame.format.components
    if not frame.format.name.startswith("yuv") or len(components) != 3 or transfer_of(frame) != "sdr":
        return None
    if orientation_of(frame) != _UPRIGHT:
        return None
    matrix = frame.colorspace
    if matrix == _UNSPECIFIED:  # players guess by the size, which may change
        matrix = 1 if matrix_of(matrix, frame.height, "sdr") == Colorspace.ITU709 else 6
    elif int(matrix_of(matrix, frame.height, "sdr")) != int(matrix_of(matrix, 0, "sdr")):
        return None  # a matrix unknown to swscale
    return Colours(frame.color_primaries, frame.color_trc, matrix)


def direct_frames(
    source: Source, sampling: Sampling, height: int, width: int, colours: Colours
) -> Iterator[tuple[VideoFrame, float]]:
    """Yields (frame in yuv420p of limited range, seconds) for each frame of `sampling`, once."""
    transform = ImageTransform(height, width, "squash", "area")
    decoder = CpuDecoder(source, transform, converter=lambda _: _Scaler(height, width, colours))
    reader = Reader(source, sampling, decoder, lambda: None)
    with suppress(NoFrames):
        for (picture, seconds, _), _ in reader.pictures(np.array(sampling.times)):
            yield picture, seconds


class _Scaler:
    """Converts frames to one size and format; does not touch those that have it."""

    tone_mapped: str | None = None

    def __init__(self, height: int, width: int, colours: Colours) -> None:
        self._height, self._width, self._colours = height, width, colours
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        matrix, wanted = (matrix_of(m, frame.height, "sdr") for m in (frame.colorspace, self._colours.matrix))
        fits = (frame.height, frame.width, frame.format.name) == (self._height, self._width, "yuv420p")
        if not fits or full or matrix != wanted:
            frame = self._reformatter.reformat(
                frame,
                self._width,
                self._height,
                "yuv420p",
                src_colorspace=matrix,
                dst_colorspace=wanted,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.MPEG,
                # For smaller pictures "area" looks like bicubic, in two thirds of its time.
                interpolation=Interpolation.AREA,
                threads=1,
            )
        frame.pict_type = PictureType.NONE  # else the encoder would follow the source's picture types
        return frame
