"""Pictures in a terminal: two pixels a character, the upper half block in one colour on the other."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

COLUMNS, ROWS = 28, 8  # largest thumbnail, in characters


def can_show(console: Console) -> bool:
    """True for a terminal that says that it has 24-bit colours, where nobody asked for none (NO_COLOR)."""
    truecolor = console.color_system == "truecolor" and not console.no_color
    # The console may have been told to take anything for a terminal (FORCE_COLOR); a file shows no pictures.
    return truecolor and sys.stdout.isatty() and console.encoding.startswith("utf")


def thumbnail(jpeg: bytes) -> Text:
    """The picture, at most 28 x 8 characters; a character is taken to be twice as tall as wide."""
    with Image.open(io.BytesIO(jpeg)) as image:
        scale = min(COLUMNS / image.width, 2 * ROWS / image.height)
        columns, rows = max(1, round(image.width * scale)), max(1, round(image.height * scale / 2))
        small = image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    pixels = np.asarray(small).tolist()
    text = Text(no_wrap=True)
    for row in range(rows):
        for top, bottom in zip(pixels[2 * row], pixels[2 * row + 1], strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
        text.append("\n" if row + 1 < rows else "")
    return text


def cards(pictures: Sequence[Text], texts: Sequence[str]) -> Table:
    """Each picture with its text (in markup) beside it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for picture, text in zip(pictures, texts, strict=True):
        table.add_row(picture, text)
    return table
