"""Calibrates the scores of a model without fit, on 32 drawn pictures that ship with keyreel.

`calibration.jpg` has them in four rows of eight; `python -m keyreel_export.templates` draws them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from keyreel.config import ImageTransform
from keyreel.runtime.bundle import SCENE_SIMILARITY, SubjectScale
from keyreel.types import F32, U8

PICTURES = Path(__file__).with_name("calibration.jpg")
ACROSS, DOWN = 8, 4  # pictures in a row, and rows
WORDS = (
    "person", "crowd", "dog", "bird", "flower", "forest", "mountain", "sea", "sky", "night", "snow", "fire", "street",
    "house", "car", "boat", "room", "table", "book", "screen", "text", "food", "ball", "red circle",
)  # fmt: skip
STORED_STILL = 0.35  # without fit: share of the pictures, all stills, whose subject is stored
# Standard deviation of a picture's cosines with WORDS, for the built-in model.
BUILTIN_SPREAD = 0.081
# The mean cosine of two of the pictures, for the built-in model.
BUILTIN_STRANGERS = 0.23


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration of a model without fit."""

    scale: SubjectScale
    spread: float  # spread of its cosines with texts, relative to the built-in model
    # Cosine of shots of one scene: between that of unrelated pictures and 1, in proportion as for the built-in model.
    scene_similarity: float


def pictures(how: ImageTransform) -> U8:
    """The pictures as the model's input: [32, H, W, 3] uint8."""
    with Image.open(PICTURES) as file:
        sheet = file.convert("RGB")
    side = sheet.width // ACROSS
    corners = [(side * column, side * row) for row in range(DOWN) for column in range(ACROSS)]
    return np.stack([as_seen(sheet.crop((x, y, x + side, y + side)), how) for x, y in corners])


def as_seen(image: Image.Image, how: ImageTransform) -> U8:
    """Prepares a picture as the image tower's input: [H, W, 3] uint8."""
    size, resampling = (how.width, how.height), resampling_of(how)
    if how.mode == "shortest":
        image = ImageOps.fit(image, size, resampling)
    elif how.mode == "longest":
        image = ImageOps.pad(image, size, resampling, color=(how.fill, how.fill, how.fill))
    else:
        image = image.resize(size, resampling)
    return np.asarray(image)


def resampling_of(how: ImageTransform) -> Image.Resampling:
    """Pillow's filter for a transform's interpolation."""
    return Image.Resampling.BOX if how.interpolation == "area" else Image.Resampling[how.interpolation.upper()]


def calibrate(scene: F32, subject: F32, texts: F32) -> Calibration:
    """Calibrates a model by its vectors of the pictures and of WORDS.

    These are scene and subject [32, D] of the pictures, and texts [L, D], all of unit length.
    """
    cosines = scene @ texts.T
    spread = float((cosines - cosines.mean(1, keepdims=True)).std()) / BUILTIN_SPREAD
    strangers = float((scene @ scene.T)[np.triu_indices(len(scene), 1)].mean())
    part = (SCENE_SIMILARITY - BUILTIN_STRANGERS) / (1 - BUILTIN_STRANGERS)
    alike = round(float(np.clip(strangers + part * (1 - strangers), 0, 0.99)), 4)
    return Calibration(scale_without_training(scene, subject, texts), float(np.clip(spread, 0.1, 10)), alike)


def scale_without_training(scene: F32, subject: F32, texts: F32) -> SubjectScale:
    """The scale that gives scores of scene and subject the same mean, so that their maximum is fair without fit.

    Args:
        scene, subject: [N, D] of stills. texts: [L, D]. All unit length.
    """
    offset, same = float((scene @ texts.T).mean() - (subject @ texts.T).mean()), (scene * subject).sum(1)
    return SubjectScale(1.0, round(offset, 4), round(float(np.quantile(same, STORED_STILL)), 4))
