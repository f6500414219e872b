"""From a decoded 1080p picture to the model's input: keyreel's converter, Pillow as open_clip uses it, OpenCV.

Each system converts the same decoded pictures. `difference` is the mean distance to Pillow's result in levels of 255,
`cosine` the least between the vectors that the built-in model gives for the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.content import Clip, clip
from benchmarks.measure import Folders, Measurement, Params, Prepare

SIZE = 224


def clips(*, quick: bool) -> list[Clip]:
    return [Clip("h264", 60, 360, 4)] if quick else [Clip("h264", 60, 1080, 30), Clip("h264", 60, 2160, 8)]


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    return [
        Measurement("preprocess", {"height": one.height, "seconds": one.seconds, "images": 8}, tuple(SYSTEMS), runs=7)
        for one in clips(quick=quick)
    ]


def decoded(params: Params, folders: Folders) -> list[Any]:
    """The first frame of each half second, as PyAV's frames."""
    import av

    path = clip(folders.content, Clip("h264", 60, params["height"], params["seconds"]))
    wanted = 15 * np.arange(params["images"])
    with av.open(str(path)) as container:
        # The decoder's own buffers would be taken back: each picture is copied.
        return [
            frame.reformat(format="yuv420p")
            for number, frame in zip(range(wanted[-1] + 1), container.decode(video=0), strict=False)
            if number in wanted
        ]


def ready(params: Params, folders: Folders) -> None:
    decoded(params, folders)


def _each(make: Callable[[], Callable[[Any], Any]]) -> Prepare:
    def prepare(params: Params, folders: Folders) -> Callable[[], Any]:
        one, pictures = make(), decoded(params, folders)
        return lambda: np.stack([one(picture) for picture in pictures])

    return prepare


def _keyreel() -> Callable[[Any], Any]:
    from keyreel.config import ImageTransform
    from keyreel.decode.color import Converter

    return Converter(ImageTransform(SIZE, SIZE), None)


def _pil() -> Callable[[Any], Any]:
    """open_clip's transform: RGB at full size, shortest side to SIZE with bicubic, centre crop."""
    from av.video.reformatter import Colorspace
    from PIL import Image

    def convert(frame: Any) -> Any:
        # The clips do not name their matrix. PyAV takes BT.601 then, which is that of small pictures.
        matrix = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
        image = frame.to_image(src_colorspace=matrix)
        scale = SIZE / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - SIZE) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))

    return convert


def _opencv() -> Callable[[Any], Any]:
    """RGB at full size by OpenCV, an area filter, centre crop."""
    import cv2

    def convert(frame: Any) -> Any:
        picture = cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2RGB_I420)
        scale = SIZE / min(picture.shape[:2])
        width, height = (int(side * scale) for side in picture.shape[1::-1])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
        return picture[top : top + SIZE, left : left + SIZE]

    return convert


SYSTEMS: dict[str, Prepare] = {"keyreel": _each(_keyreel), "RGB + PIL bicubic": _each(_pil), "opencv": _each(_opencv)}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    from keyreel import Engine

    expected = SYSTEMS["RGB + PIL bicubic"](params, folders)()
    with Engine.from_pretrained(device="cpu") as engine:
        cosine = (engine.embed(result) * engine.embed(expected)).sum(1)
    difference = np.abs(result.astype(np.float64) - expected).mean()
    return {"difference": float(difference), "cosine": float(cosine.min())}
