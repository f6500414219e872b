"""Makes pictures: frames of a video, JPEG, contact sheet, attention overlays."""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from keyreel.config import ImageTransform, Sampling
from keyreel.decode.color import Converter
from keyreel.decode.packets import BROKEN
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.decode.timeline import start_seconds
from keyreel.errors import RenderError, SourceError, SourceNotFound
from keyreel.types import F32, U8, VideoInfo

_TIMED = ("mov,mp4", "matroska")  # containers that state and find pictures by time
CONTACT_WIDTH = 1920  # pixels, about
QUERY_EDGE = 2048  # pixels, long side of a picture to search with; models take about a tenth
_large = threading.Lock()
# Ends and three stops between: dark violet, magenta, orange, pale yellow; perceived lightness rises evenly.
HEAT = np.array([(20, 11, 52), (101, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def clock(seconds: float, separator: str = ":") -> str:
    """Formats seconds as in WebVTT: 12.3 is "00:00:12.300". The separator "-" suits file names."""
    whole = round(seconds * 1000)
    hours, rest = divmod(whole, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}{separator}{minutes:02d}{separator}{rest // 1000:02d}.{rest % 1000:03d}"


def short_clock(seconds: float) -> str:
    """Formats seconds for people: 13.48 is "0:13.5"; hours only if needed. The pages' scripts round alike."""
    tenths = math.floor(seconds * 10 + 0.5)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def keyframe_name(number: int, pts_seconds: float) -> str:
    """File name of a key-frame: (7, 83.456) is "keyframe_0007_00-01-23.456.jpg". Order by name is order by time."""
    return f"keyframe_{number:04d}_{clock(pts_seconds, '-')}.jpg"


def pictures_at(
    source: Source, times: Sequence[float], transform: ImageTransform | None = None
) -> Iterator[tuple[int, U8]]:
    """Decodes the frames shown at these times, in one pass over the file.

    Yields:
        (index in `times`, upright [H, W, 3] uint8 RGB), in order of time.

    Raises:
        RenderError: a frame cannot be decoded again.
    """
    order = sorted(range(len(times)), key=times.__getitem__)
    sampling = Sampling("times", times=tuple(max(0.0, times[place]) for place in order))
    with FrameStream(source, sampling, transform=transform, batch_size=1) as frames:
        for place in order:
            batch = next(frames, None)
            if batch is None:
                raise RenderError(
                    f"{source.name}: the frame at {times[place]:.3f} s cannot be decoded again",
                    hint="the file changed or is damaged; summarize it again",
                )
            yield place, batch.data[0]


def picture_at(source: Source, seconds: float, transform: ImageTransform | None = None) -> U8:
    """Decodes the frame shown at a time: upright [H, W, 3] uint8 RGB.

    In MP4, MOV, MKV and WebM it reads only from the key frame before it on.

    Raises:
        SourceError: the video cannot be read.
        RenderError: the frame cannot be decoded.
    """
    with suppress(*BROKEN), source.open() as container:
        stream = source.require_video(container)
        start, base = start_seconds(container, stream), stream.time_base
        if start is not None and base and container.format.name.startswith(_TIMED):
            wanted = (start + Fraction(seconds)) / base + Fraction(1, 2)
            stream.thread_type = "AUTO"
            container.seek(int(wanted), stream=stream)
            held: VideoFrame | None = None
            for frame in container.decode(stream):
                if frame.pts is None or (held is None and (frame.pts > wanted or not frame.key_frame)):
                    break  # the seek ended after the frame, or before its key frame
                if frame.pts > wanted and held is not None:
                    return Converter(transform, stream.sample_aspect_ratio, source.limits.max_pixels)(held)
                held = frame
    return next(picture for _, picture in pictures_at(source, [seconds], transform))


def at_most(height: int, width: int, max_height: int) -> ImageTransform | None:
    """The transform that scales taller pictures down to `max_height`."""
    if height <= max_height:
        return None
    return ImageTransform(max_height, max(1, round(width * max_height / height)), "squash", "area")


def shrink(picture: U8, edge: int) -> Image.Image:
    """Scales a picture so that its long side has at most `edge` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


def jpeg(image: Image.Image, quality: int) -> bytes:
    """Encodes an image as the content of a JPEG file."""
    buffer = io.BytesIO()
    # At high quality: no chroma subsampling, and the standard's code tables, since "optimize" and "progressive" take
    # five times as long for 4 % fewer bytes.
    high = quality >= 90
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4" if high else "4:2:0", optimize=not high)
    return buffer.getvalue()


def contact_sheet(pictures: Sequence[Image.Image], times_seconds: Sequence[float]) -> Image.Image:
    """Makes a grid of the pictures with their times below, about 1920 pixels wide and nearly 4:3."""
    count = len(pictures)
    aspect = pictures[0].width / pictures[0].height
    columns = min(count, max(1, round(math.sqrt(count * (4 / 3) / aspect))))
    # An almost empty row looks like a mistake: spread the pictures evenly over the rows.
    columns = math.ceil(count / math.ceil(count / columns))
    gap = 24
    width = max(16, min((CONTACT_WIDTH - gap) // columns - gap, 1280, max(p.width for p in pictures)))
    height = max(1, round(width / aspect))
    font_size = min(max(16, width // 16), 36)
    caption = round(font_size * 1.7)
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + caption + gap // 2)), "#fafaf8")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=font_size)
    for place, (picture, seconds) in enumerate(zip(pictures, times_seconds, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (width + gap), gap + row * (height + caption + gap // 2)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        middle = top + height + caption // 2
        draw.text((left, middle), short_clock(seconds), fill="#22231f", font=font, anchor="lm")
        draw.text((left + width, middle), str(place + 1), fill="#8b8c85", font=font, anchor="rm")
    return sheet


def attended_area(video: VideoInfo, image: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the model's input, as fractions of the picture; outside 0..1 if it was padded.

    Args:
        video: its display size.
        image: the bundle's {"height", "width", "mode"}.
    """
    if image["mode"] in ("squash", "fit"):
        return 0.0, 0.0, 1.0, 1.0
    height, width = image["height"], image["width"]
    scales = (height / video.height, width / video.width)
    scale = min(scales) if image["mode"] == "longest" else max(scales)
    half_x, half_y = width / scale / video.width / 2, height / scale / video.height / 2
    return 0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y


def attention_overlay(
    attention: F32, grid: tuple[int, int], area: tuple[float, float, float, float], size: tuple[int, int]
) -> Image.Image:
    """Makes a heat map to lay over a picture: colour and opacity rise with attention; transparent outside `area`.

    Args:
        attention: [P] float32 >= 0.
        grid: (h, w), h * w = P.
        area: of the grid on the picture, from `attended_area`.
        size: (width, height) of the overlay in pixels.
    """
    peak = float(attention.max(initial=0.0))
    heat = (attention / peak if peak > 0 else attention).reshape(grid).astype(np.float32)
    width, height = size
    left, top, right, bottom = (round(a * b) for a, b in zip(area, (width, height, width, height), strict=True))
    scaled = Image.fromarray(heat).resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    canvas = Image.new("F", size, -1.0)
    canvas.paste(scaled, (left, top))
    values = np.asarray(canvas)
    level = (np.clip(values, 0.0, 1.0) * 255).round().astype(np.uint8)
    steps, stops = np.linspace(0, 1, 256), np.linspace(0, 1, len(HEAT))
    table = np.stack([*(np.interp(steps, stops, HEAT[:, channel]) for channel in range(3)), 40 + 170 * steps], axis=-1)
    pixels = table.round().astype(np.uint8)[level]
    # -1 marks what the model did not see; bicubic undershoot does not reach it.
    pixels[values <= -0.999, 3] = 0
    return Image.fromarray(pixels, "RGBA")


def overlay_png(overlay: Image.Image) -> bytes:
    """Encodes an overlay as a small PNG: 64 colours suffice for a smooth cloud."""
    buffer = io.BytesIO()
    overlay.quantize(64, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def upright(image: Image.Image) -> U8:
    """Converts Pillow's picture to upright [H, W, 3] uint8 RGB; reduces larger ones to `QUERY_EDGE`.

    It unpacks one large picture at a time: 64 million pixels take 200 MB.
    """
    edge = max(image.size)
    with _large if edge > 2 * QUERY_EDGE else nullcontext():
        image.draft("RGB", (QUERY_EDGE, QUERY_EDGE))  # decodes a JPEG file at 1/8 to 8/8 of its size
        image.load()
        if image.mode not in ("RGB", "L", "RGBA"):
            image = image.convert("RGB")
        if (factor := -(-max(image.size) // QUERY_EDGE)) > 1:
            image = image.reduce(factor)
    picture: U8 = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return picture


def read_picture(path: str | os.PathLike[str]) -> U8:
    """Reads a picture file as upright [H, W, 3] uint8 RGB.

    Raises:
        SourceError: the file is missing or is not a picture.
    """
    try:
        with Image.open(path) as image:
            return upright(image)
    except FileNotFoundError as error:
        raise SourceNotFound(f"there is no picture {os.fspath(path)!r}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{os.fspath(path)!r} cannot be read as a picture: {error}") from error
