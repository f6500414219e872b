"""Pictures that are given, not decoded from a video."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keyreel.errors import SourceError, SourceNotFound
from keyreel.types import U8


def read_picture(path: str | os.PathLike[str]) -> U8:
    """[H, W, 3] uint8 RGB, upright.

    Raises:
        SourceError: the file is missing or is no picture.
    """
    try:
        with Image.open(path) as image:
            picture: U8 = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            return picture
    except FileNotFoundError as error:
        raise SourceNotFound(f"there is no picture {os.fspath(path)!r}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{os.fspath(path)!r} cannot be read as a picture: {error}") from error
