"""Encodes a highlight reel: spans of a video as one MP4 (H.264 and AAC), sound in step with the picture.

The pts are the only clock. The time in the output is the length of all earlier spans plus the time since the span's
start, for frames (1/90000 s) and samples (1/48000 s) alike: they cannot drift apart, at any frame rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from keyreel.config import ImageTransform, OutputConfig, Sampling
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream, distinct
from keyreel.errors import NoFrames, RenderError
from keyreel.render.captions import add_captions
from keyreel.render.direct import BT709, Colours, direct_colours, direct_frames
from keyreel.render.files import atomic_write
from keyreel.render.reframe import Camera
from keyreel.render.sound import RATE, SoundReader, faded, placed_sound
from keyreel.types import F32, U8, Progress, Shot, VideoInfo

HEIGHT = OutputConfig().reel_height
# The first encoder that opens is used: some GPUs have no NVENC (A100, H100), and drivers limit its sessions.
# x264: the quality (SSIM) of "veryfast" at 20 in 70 % of its time, with 1.1 to 1.6 times the bytes, see
# benchmarks.reels. NVENC has not been measured: the middle preset, and 23, which its makers compare with x264's 22.
# forced-idr: a requested I-frame is one that a player can start at.
# bf 0: pictures are stored in the order of display, so that the track needs no edit list, which some players ignore,
# and the last picture lasts until the end of the track.
ENCODERS = {
    "h264_nvenc": {"preset": "p4", "rc": "vbr", "cq": "23", "b": "0", "forced-idr": "1", "bf": "0"},
    "libx264": {"preset": "superfast", "crf": "22", "forced-idr": "1", "bf": "0"},
}
TICKS = 90000  # ticks per second of the picture's clock
SOUND_BITS = 160_000  # a second
REINSTALL = "install PyAV's own wheel: pip install --force-reinstall --only-binary av av"
BATCH_BYTES = 16 << 20


def write_reel(
    source: Source,
    spans: Sequence[Shot],
    path: Path,
    *,
    height: int = HEIGHT,
    camera: Camera | None = None,
    progress: Progress | None = None,
) -> None:
    """Encodes the spans one after the other as an MP4 with its index at the start.

    A variable frame rate stays variable. Frames are upright, with square pixels and even sides; each span begins with a
    key frame. Sound is 48 kHz stereo, with silence for gaps; no track if the source has none. It reads the video once,
    and its sound beside it.

    Args:
        spans: disjoint; spans in time order are decoded in one pass.
        path: the MP4; its folder must exist.
        height: longest short side in pixels; larger pictures are scaled down.
        camera: for a reel of another shape; None for whole frames.
        progress: called with ("reel", seconds done, seconds in all).

    Raises:
        RenderError: no H.264 or AAC encoder, no frame can be decoded, or the file cannot be written.
        SourceError: the video cannot be opened.
    """
    try:
        with atomic_write(path) as made, closing(SoundReader(source)) as sound:
            _write(source, sound, spans, made, height, camera, progress)
    except av.codec.codec.UnknownCodecError as error:
        raise RenderError(f"this build of PyAV has no {error} encoder, which the reel needs", hint=REINSTALL) from error
    except (OSError, av.FFmpegError) as error:
        raise RenderError(
            f"{path}: the reel cannot be written: {error}", hint="check that the folder exists and the disk has space"
        ) from error


def _write(
    source: Source,
    sound: SoundReader,
    spans: Sequence[Shot],
    path: Path,
    most: int,
    camera: Camera | None,
    progress: Progress | None,
) -> None:
    info = source.probe()
    if camera is None:
        height, width = whole = _even_size(info, most)
        colours = direct_colours(source)
    else:
        (height, width), whole = camera.sizes(info.height, info.width, most)
        colours = None
    total = sum(span.duration_seconds for span in spans)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        video = _video_stream(output, info, height, width, colours or BT709)
        audio: Any = output.add_stream("aac", rate=RATE, layout="stereo") if info.has_audio else None
        if audio is not None:
            audio.codec_context.bit_rate = SOUND_BITS
        for caption in add_captions(output, source, spans):
            output.mux(caption)
        lasting: dict[int, int] = {}  # pts -> how long the frame is shown; the encoder would guess the last one

        def coded(frame: av.VideoFrame | None) -> Any:
            packets = video.encode(frame)
            for packet in packets:
                packet.duration = lasting.pop(packet.pts, packet.duration)
            return packets

        begin = 0.0  # start of this span, in seconds of the output
        # "area" also at full size: if only the chroma is scaled, it takes half the time of bicubic.
        transform = ImageTransform(*whole, "squash", "area")

        def frames_of(spans: Sequence[Shot]) -> Iterator[tuple[Any, float]]:
            if colours is None:
                return _frames(source, spans, transform, info)
            return direct_frames(source, _wanted(source, spans), height, width, colours)

        pictures = itertools.chain.from_iterable(_shown(frames_of(run), run) for run in _rising(spans))
        for span, shown in itertools.groupby(pictures, key=lambda frame: frame.span):
            heard, last = round(begin * RATE), round((begin + span.duration_seconds) * RATE)
            blocks = faded(placed_sound(sound, span.start_seconds, last - heard), last - heard)
            for number, picture in enumerate(shown):
                now = begin + picture.seconds - span.start_seconds
                data = picture.data
                if camera is not None:
                    data = camera.picture(data, picture.seconds, (height, width))
                frame = _yuv(data, height, width) if colours is None else data
                frame.pts, frame.time_base = round(now * TICKS), Fraction(1, TICKS)
                lasting[frame.pts] = max(1, round((now + picture.lasts) * TICKS) - frame.pts)
                if number == 0:
                    frame.pict_type = av.video.frame.PictureType.I
                output.mux(coded(frame))
                if audio is not None:
                    heard = _write_sound(output, audio, blocks, heard, round(now * RATE))
                if progress is not None:
                    progress("reel", now, total)
            if audio is not None:
                _write_sound(output, audio, blocks, heard, last)
            begin += span.duration_seconds
        if not begin:
            raise RenderError(f"{source.name}: no frame of the reel's spans could be decoded")
        output.mux(coded(None))
        if audio is not None:
            output.mux(audio.encode(None))
    if progress is not None:
        progress("reel", total, total)


def _even_size(info: VideoInfo, most: int) -> tuple[int, int]:
    """(height, width), the shorter at most `most`, both even for 4:2:0."""
    scale = min(1.0, most / min(info.height, info.width))
    return max(2, round(info.height * scale / 2) * 2), max(2, round(info.width * scale / 2) * 2)


def _video_stream(output: Any, info: VideoInfo, height: int, width: int, colours: Colours) -> Any:
    fps = Fraction(min(max(info.average_fps or 25.0, 1.0), 240.0)).limit_denominator(1001)

    def prepared(context: Any) -> Any:
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.framerate = Fraction(1, TICKS), fps
        context.sample_aspect_ratio = Fraction(1, 1)
        context.color_primaries, context.color_trc = colours.primaries, colours.transfer
        context.colorspace = colours.matrix
        context.color_range = ColorRange.MPEG
        return context

    failed = []
    for name, options in ENCODERS.items():
        try:
            trial = prepared(av.CodecContext.create(name, "w"))
            trial.options = options
            trial.open()
        except (av.codec.codec.UnknownCodecError, av.FFmpegError) as error:
            failed.append(f"{name}: {error}")
            continue
        stream = output.add_stream(name, rate=fps, options=options)
        prepared(stream.codec_context)
        stream.time_base = stream.codec_context.time_base
        return stream
    raise RenderError(f"no H.264 encoder can be opened: {'; '.join(failed)}", hint=REINSTALL)


def _yuv(picture: U8, height: int, width: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    # Fixed width and height, in case the size changes within the source.
    return frame.reformat(
        width,
        height,
        "yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation="AREA",
    )


class _Shown(NamedTuple):
    """A frame of the reel."""

    span: Shot
    data: Any  # of `_frames` or `direct_frames`
    seconds: float  # seconds of the source at which it appears
    lasts: float  # seconds


def _shown(frames: Iterator[tuple[Any, float]], spans: Sequence[Shot]) -> Iterator[_Shown]:
    """Yields the frames of each span; the first is the one shown at its start."""
    held: tuple[Any, float] | None = None  # the last frame before `ahead`
    ahead = next(frames, None)
    for span in spans:
        # Before the first frame of a video, the first frame is shown.
        while ahead is not None and (held is None or ahead[1] <= span.start_seconds + 1 / TICKS):
            held, ahead = ahead, next(frames, None)
        if held is None:
            return
        seconds = span.start_seconds
        while ahead is not None and ahead[1] < span.stop_seconds - 1 / TICKS:
            yield _Shown(span, held[0], seconds, ahead[1] - seconds)
            seconds = ahead[1]
            held, ahead = ahead, next(frames, None)
        yield _Shown(span, held[0], seconds, span.stop_seconds - seconds)


def _frames(
    source: Source, spans: Sequence[Shot], transform: ImageTransform, info: VideoInfo
) -> Iterator[tuple[U8, float]]:
    """Yields (picture, time) of the frames of the spans and of those shown at their starts, in one pass."""
    sampling = _wanted(source, spans)
    batch_size = max(1, min(16, BATCH_BYTES // (transform.height * transform.width * 3)))
    with (
        FrameStream(source, sampling, transform=transform, batch_size=batch_size) as stream,
        suppress(NoFrames),
    ):
        for batch in distinct(stream):
            yield from zip(batch.data, batch.pts_seconds.tolist(), strict=True)


def _rising(spans: Sequence[Shot]) -> Iterator[list[Shot]]:
    """Splits spans into runs in time order, each decoded in one pass."""
    run: list[Shot] = []
    for span in spans:
        if run and span.start_seconds < run[-1].stop_seconds:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _wanted(source: Source, spans: Sequence[Shot]) -> Sampling:
    """The sampling of the spans' frames, and of those shown at their starts."""
    timeline = source.timeline()
    if timeline is None:
        return Sampling("all", stop_seconds=spans[-1].stop_seconds)
    starts = timeline.starts
    inside = [starts[(starts > span.start_seconds) & (starts < span.stop_seconds)] for span in spans]
    times = np.concatenate([[span.start_seconds for span in spans], *inside])
    return Sampling("times", times=tuple(np.sort(times).tolist()))


def _write_sound(output: Any, audio: Any, sound: Iterator[F32], heard: int, until: int) -> int:
    """Encodes blocks up to sample `until` of the output. Returns the number of the next sample."""
    while heard < until and (block := next(sound, None)) is not None:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="stereo")
        frame.rate, frame.pts, frame.time_base = RATE, heard, Fraction(1, RATE)
        output.mux(audio.encode(frame))
        heard += block.shape[1]
    return heard
