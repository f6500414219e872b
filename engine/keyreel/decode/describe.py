"""What is told of a video before it is worked on: which stream is taken, and what it and its first frame say."""

from __future__ import annotations

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keyreel.decode.color import display_size, rotation_degrees, transfer_of
from keyreel.decode.timeline import promised_seconds
from keyreel.errors import CorruptStream, SourceError
from keyreel.types import VideoInfo


def select_video(container: InputContainer) -> VideoStream | None:
    """The stream to take: FFmpeg's best one, never a cover picture."""
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    best = container.streams.best("video")
    return best if best in streams else streams[0] if streams else None


def describe(container: InputContainer, stream: VideoStream, name: str, *, max_pixels: int) -> VideoInfo:
    """What the file says of its video stream, and its first frame of its colours and its rotation.

    Args:
        container: at its start. stream: its video. name: of the source.
        max_pixels: of the picture as it is shown.

    Raises:
        CorruptStream: not one frame can be decoded.
        SourceError: the picture is larger than allowed.
    """
    duration = promised_seconds(container, stream)
    frame = _first_frame(container, stream, name, max_pixels)
    height, width = display_size(frame, stream.sample_aspect_ratio)
    if height * width > max_pixels:
        raise SourceError(
            f"{name}: shown at {width} x {height} pixels, allowed are {max_pixels} (max_pixels).",
            hint="Raise max_pixels if you trust the file.",
        )
    rate = stream.average_rate
    return VideoInfo(
        path=name,
        duration_seconds=duration,
        width=width,
        height=height,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=frame.format.name,
        rotation_degrees=rotation_degrees(frame),
        average_fps=float(rate) if rate else None,
        has_audio=len(container.streams.audio) > 0,
        transfer=transfer_of(frame),
    )


def _first_frame(container: InputContainer, stream: VideoStream, name: str, max_pixels: int) -> VideoFrame:
    reason = "it holds no pictures"
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            for frame in packet.decode():
                return frame
        except av.error.FFmpegError as error:
            reason = error.strerror or str(error)
            if isinstance(error, av.error.ArgumentError):
                reason = f"damaged, or pictures of more than {max_pixels} pixels (max_pixels)"
            if not isinstance(error, av.error.InvalidDataError | av.error.ArgumentError):
                break
    raise CorruptStream(f"{name}: not one frame can be decoded: {reason}.", hint="Check that it plays; copy it again.")
