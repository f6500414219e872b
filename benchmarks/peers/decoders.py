"""Frames shown at given times, scaled to SIZE x SIZE RGB, with each decoder library as its users would write it.

Each function takes the file and rising times in seconds and gives the function that is timed, whose result is
`Decoded`. All leave the number of threads to the library or ask it for all cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
SIZE = 224


@dataclass(frozen=True, slots=True)
class Decoded:
    pictures: U8  # [T, SIZE, SIZE, 3]
    seconds: NDArray[np.float64] | None = None  # pts, where the system says
    counts: dict[str, int] = field(default_factory=dict)  # what else it says of itself


Decode = Callable[[], Decoded]


def _shown(frames: Iterator[Any], times: Sequence[float]) -> Iterator[Any]:
    """The frame shown at each time: the last whose pts is not after it. `frames` in display order, from PyAV."""
    before: Any = None
    at = 0
    for frame in frames:
        while at < len(times) and before is not None and times[at] + 1e-9 < frame.time:
            yield before
            at += 1
        if at == len(times):
            return
        before = frame
    for _ in times[at:]:
        yield before


def _swscale(frame: Any) -> Any:
    return frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()


def pyav(path: Path, times: Sequence[float], picture: Callable[[Any], Any] = _swscale) -> Decode:
    """Decodes everything with FFmpeg's threads; swscale converts and scales what is wanted."""
    import av

    def run() -> Decoded:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            return Decoded(np.stack([picture(frame) for frame in _shown(container.decode(video=0), times)]))

    return run


def pyav_pil(path: Path, times: Sequence[float]) -> Decode:
    """The same with a conversion to RGB at full size and Pillow's bicubic filter."""
    from PIL import Image

    return pyav(path, times, lambda frame: frame.to_image().resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def pyav_seek(path: Path, times: Sequence[float]) -> Decode:
    """Seeks to the key frame before each time and decodes from there."""
    import av

    def run() -> Decoded:
        pictures = []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            assert stream.time_base is not None
            for t in times:
                container.seek(int(t / stream.time_base), stream=stream)
                (frame,) = _shown(container.decode(stream), [t])
                pictures.append(frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray())
        return Decoded(np.stack(pictures))

    return run


def opencv(path: Path, times: Sequence[float]) -> Decode:
    """grab() for every frame, retrieve() and an area filter for what is wanted; places come from the frame rate."""
    import cv2

    def run() -> Decoded:
        capture = cv2.VideoCapture(str(path))
        fps = capture.get(cv2.CAP_PROP_FPS)
        places = [int(t * fps + 1e-6) for t in times]
        pictures: list[U8] = []
        number = 0
        while len(pictures) < len(places) and capture.grab():
            if number == places[len(pictures)]:
                picture = cv2.resize(capture.retrieve()[1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
                while len(pictures) < len(places) and places[len(pictures)] == number:
                    pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            number += 1
        capture.release()
        if not pictures:
            raise RuntimeError("this build of OpenCV decodes no frame of it")
        return Decoded(np.stack(pictures))

    return run


def torchcodec(path: Path, times: Sequence[float]) -> Decode:
    """Frames played at the times, scaled by its decoder."""
    from keyreel_export.torchvision_cpu import import_torchvision

    import_torchvision()  # it needs that for what it scales with
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize
    except RuntimeError as error:  # no FFmpeg that it can load
        raise ImportError(f"torchcodec does not load: {str(error)[:200]}") from error

    def run() -> Decoded:
        decoder = VideoDecoder(
            str(path), dimension_order="NHWC", num_ffmpeg_threads=0, transforms=[Resize((SIZE, SIZE))]
        )
        return Decoded(decoder.get_frames_played_at(list(times)).data.numpy())

    return run


def decord(path: Path, times: Sequence[float]) -> Decode:
    """get_batch() of the frames' places, scaled by its decoder."""
    import decord as library

    def run() -> Decoded:
        reader = library.VideoReader(str(path), width=SIZE, height=SIZE)
        fps = reader.get_avg_fps()
        places = [min(int(t * fps + 1e-6), len(reader) - 1) for t in times]
        return Decoded(reader.get_batch(places).asnumpy())

    return run


def keyreel(path: Path, times: Sequence[float], **sampling: Any) -> Decode:
    """The planned decoder; `sampling` takes the place of the times where it is given."""
    from keyreel.config import ImageTransform, Sampling
    from keyreel.decode.cpu import FrameStream
    from keyreel.decode.source import Source

    wanted = Sampling(**(sampling or {"mode": "times", "times": tuple(times)}))
    transform = ImageTransform(SIZE, SIZE, mode="squash")

    def run() -> Decoded:
        with Source(str(path)) as source, FrameStream(source, wanted, transform=transform) as stream:
            batches = list(stream)
            counts = {"packets_fed": stream.packets_fed, "packets_read": stream.packets_read}
        pictures = np.concatenate([batch.data for batch in batches])
        return Decoded(pictures, np.concatenate([batch.pts_seconds for batch in batches]), counts)

    return run
