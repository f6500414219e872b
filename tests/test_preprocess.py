"""Pictures for the model, straight from YUV to its input, against the whole RGB frame through open_clip's transform.

The reference goes another way in every step: FFmpeg decodes all frames, the matrix is applied in float64 at full size,
NumPy turns the picture, and open_clip's transform (Pillow's antialiased filters) resizes and crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from bounds import ENLARGED_PICTURE_COSINE, SAME_PICTURE_COSINE
from PIL import Image
from test_color import planes_of, rgb_of_yuv

from keyreel import Engine, Sampling
from keyreel.config import ImageTransform
from keyreel.decode.source import Source
from keyreel.decode.stream import FrameStream
from keyreel.types import F32, U8

pytestmark = pytest.mark.full

Media = Callable[[str], Path]

BT709, BT601 = 1, 6
CAMERA, PATTERN = (0.4, 4), (2.5, 60)  # how far pixels may lie apart: mean, 99.9th percentile, of 255
CLIPS = {
    "natural/bikes.mp4": (BT601, CAMERA),
    "natural/chaplin.mp4": (BT601, CAMERA),
    "natural/internal_emulator_transformer_output.mp4": (BT709, CAMERA),
    "format/flower.webm": (BT601, CAMERA),
    "format/cursed-vfr.mp4": (BT709, CAMERA),  # 3026 x 1386
    "format/rotate-buck-bunny.mp4": (BT709, CAMERA),  # 1080p, to be turned: portrait
    "format/nasa_13013_rotated.mp4": (BT709, (0.6, 12)),  # drawn lines, to be turned the other way
    "format/bt601_limited_range.mp4": (BT601, PATTERN),
    "format/bt601_full_range.mp4": (BT601, PATTERN),
    "format/bt709_full_range.mp4": (BT709, PATTERN),
    "format/testsrc2_odd_height_and_width_444.mp4": (BT601, PATTERN),
    "format/testsrc2_odd_height_and_width_vp9.mp4": (BT601, PATTERN),
    "format/testsrc2_odd_height_and_width_mpeg2.mp4": (BT601, (5.5, 125)),  # 121 x 81, enlarged
}


# Of the built-in model, of CLIP and its kin, of SigLIP, and one that none has.
TRANSFORMS = [
    ImageTransform(112, 112, "squash", "bicubic"),
    ImageTransform(224, 224, "shortest", "bicubic"),
    ImageTransform(224, 224, "squash", "bicubic"),
    ImageTransform(224, 224, "squash", "bilinear"),
]


def ninth_frame(path: Path, matrix: int) -> tuple[int, Image.Image]:
    """Place and full-size RGB picture of a frame, the ninth where there are so many, made without keyreel."""
    with av.open(str(path)) as container:
        *before, frame = (frame for frame, _ in zip(container.decode(video=0), range(9), strict=False))
    full = frame.format.name.startswith("yuvj")
    rgb = np.floor(rgb_of_yuv(planes_of(frame, 8), matrix, full=full, bits=8) + 0.5).astype(np.uint8)
    return len(before), Image.fromarray(np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90))))


@pytest.fixture(scope="module")
def open_clip() -> Any:
    from keyreel_export.torchvision_cpu import import_open_clip

    return import_open_clip()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The built-in model: trained, so that it sees what changes. Towers of random weights take aliased pictures, and
    pictures of something else, for the same to five digits."""
    with Engine.from_pretrained(device="cpu") as engine:
        yield engine


def embed(engine: Engine, *pictures: U8) -> F32:
    """By the built-in model, which looks at 112 pixels: larger ones are halved."""
    stack = np.stack(pictures)
    if stack.shape[1] == 224:
        stack = np.rint(stack.reshape(-1, 112, 2, 112, 2, 3).mean(axis=(2, 4))).astype(np.uint8)
    return engine.embed(stack)


def as_open_clip_does(open_clip: Any, picture: Image.Image, transform: ImageTransform) -> U8:
    own = open_clip.image_transform(
        (transform.height, transform.width),
        is_train=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        resize_mode=transform.mode,
        interpolation=transform.interpolation,
    )
    rounded: U8 = np.rint(own(picture).numpy().transpose(1, 2, 0) * 255).astype(np.uint8)
    return rounded


@pytest.mark.parametrize("clip", CLIPS)
def test_vectors_are_those_of_open_clips_pictures(media: Media, open_clip: Any, engine: Engine, clip: str) -> None:
    matrix, (mean, tail) = CLIPS[clip]
    place, whole = ninth_frame(media(clip), matrix)
    assert engine.bundle.image == TRANSFORMS[0]
    for transform in TRANSFORMS:
        with Source(media(clip)) as source, FrameStream(source, Sampling(mode="all"), transform=transform) as stream:
            batch = next(stream)
        mine = batch.data[list(batch.frame_index).index(place)]
        theirs = as_open_clip_does(open_clip, whole, transform)
        off = np.abs(mine.astype(int) - theirs)
        assert off.mean() <= mean
        # One level more where 27 pixels become one: that is 112 of the widest clip's 3,026.
        assert np.percentile(off, 99.9) <= tail + (whole.width > 20 * transform.width)
        enlarged = min(whole.size) < min(transform.height, transform.width)
        least = ENLARGED_PICTURE_COSINE if enlarged else SAME_PICTURE_COSINE
        ours, wanted = embed(engine, mine, theirs)
        assert ours @ wanted >= least
