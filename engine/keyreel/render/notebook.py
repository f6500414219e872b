"""HTML of summaries and search results for notebooks, without scripts and style sheets. It loads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from keyreel.errors import KeyreelError
from keyreel.render.pictures import short_clock
from keyreel.render.storyboard import base_name, counted, picture_url, templates
from keyreel.types import U8, HitT, Summary

MOST_PICTURES = 24


def summary_html(summary: Summary, pictures: Sequence[U8]) -> str:
    """Makes a timeline of scenes and key-frames, and the key-frames.

    Args:
        pictures: of the key-frames; empty if the video cannot be read.
    """
    begin = summary.shots[0].start_seconds
    length = max(summary.stop_seconds - begin, 1e-3)
    rows = np.unique(np.linspace(0, len(summary.keyframes) - 1, MOST_PICTURES).round().astype(int)).tolist()
    urls = [picture_url(pictures[row]) if pictures else None for row in rows]
    return _fragment(
        name=base_name(summary.video.path),
        facts=[
            short_clock(summary.stop_seconds),
            f"{summary.video.width} × {summary.video.height}",
            counted(len(summary.scenes), "scene"),
            counted(len(summary.shots), "shot"),
            counted(len(summary.keyframes), "key-frame"),
        ],
        scenes=[
            (1000 * (scene.start_seconds - begin) / length, 1000 * scene.duration_seconds / length)
            for scene in summary.scenes
        ],
        marks=[1000 * (frame.pts_seconds - begin) / length for frame in summary.keyframes],
        cards=[
            {"picture": url, "lines": [short_clock(summary.keyframes[row].pts_seconds)]}
            for row, url in zip(rows, urls, strict=True)
        ],
        left_out=len(summary.keyframes) - len(rows),
    )


def hits_html(hits: Sequence[HitT], picture_of: Callable[[HitT], U8 | bytes | None]) -> str:
    """Shows the best frame of each moment with its span, score and video.

    Args:
        picture_of: pixels or a JPEG file of a hit; if its video cannot be read, the hit has no picture.
    """
    cards = []
    for hit in hits[:MOST_PICTURES]:
        picture = None
        with suppress(KeyreelError, ValueError):
            picture = picture_of(hit)
        span = f"{short_clock(hit.start_seconds)} – {short_clock(hit.stop_seconds)}"
        said = f"score {hit.score:.3f}" + ("" if hit.chance is None else f", {hit.chance:.0%}")
        cards.append(
            {
                "picture": None if picture is None else picture_url(picture),
                "lines": [span, said, base_name(hit.video)],
            }
        )
    facts = [counted(len(hits), "moment")]
    return _fragment(name="Search", facts=facts, cards=cards, left_out=len(hits) - len(cards), scenes=[], marks=[])


def _fragment(**content: Any) -> str:
    html: str = templates().get_template("notebook.html").render(**content)
    return html
