"""Makes HTML pages: the storyboard of a video, and the results of a search. Each is one file that loads nothing.

The markup is in Jinja templates, which escape all values.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from keyreel.render.documents import SummaryDocument
from keyreel.render.pictures import attended_area, attention_overlay, jpeg, overlay_png, short_clock, shrink
from keyreel.types import F32, F64, U8, SearchHit, Summary

PICTURE_EDGE = 480  # pixels, long side with 32 key-frames; the pixels of all pictures together stay the same
PICTURE_QUALITY = 76
OVERLAY_EDGE = 96
CURVE_POINTS = 400
TICK_SECONDS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a page."""

    url: str  # data:
    width: int
    height: int

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Encodes an image as JPEG."""
        return cls(_data_url(jpeg(image, PICTURE_QUALITY), "jpeg"), image.width, image.height)


def picture_edge(count: int) -> int:
    """The long side in pixels of `count` pictures on a page, so that the page stays under about 3 MB."""
    return int(np.clip(PICTURE_EDGE * math.sqrt(32 / count), 96, 960))


def storyboard_page(
    summary: Summary, document: SummaryDocument, *, pictures: Sequence[Image.Image], video_link: str | None
) -> str:
    """Makes the storyboard of a video, one HTML page.

    Args:
        document: the summary's document, with files, reel and timings.
        pictures: of the key-frames, in time order.
        video_link: link to the video, relative to the page; None if the video is not a file.
    """
    video, duration, config = summary.video, summary.stop_seconds, summary.config
    name = base_name(video.path)
    reel = document.reel if document.reel is not None and document.reel.file is not None else None
    facts = [short_clock(duration), f"{video.width} × {video.height}", video.codec]
    facts += [counted(len(summary.scenes), "scene"), counted(len(summary.shots), "shot")]
    facts.append(counted(len(summary.keyframes), "key-frame"))
    if reel is not None:
        facts.append(f"reel of {short_clock(sum(span.duration_seconds for span in reel.spans))}")
    tall = " tall" if pictures[0].height > pictures[0].width else ""
    return _page(
        "storyboard.html",
        title=f"{name} · keyreel",
        script=_asset("page.js"),
        summary=summary,
        name=name,
        facts=facts,
        video_link=video_link,
        reel=reel,
        reel_spans=json.dumps([[span.start_seconds, span.stop_seconds] for span in reel.spans] if reel else []),
        poster=Picture.of(pictures[int(np.argmax([k.weight for k in summary.keyframes]))]),
        duration=duration,
        at=lambda seconds: f"{100 * min(max(seconds / duration, 0.0), 1.0):.3f}%",
        ticks=_ticks(duration),
        curve=_curve(summary.importance, summary.embedding.pts_seconds, duration),
        cards=_cards(summary, document, pictures),
        layout=tall or (" few" if len(pictures) <= 4 else ""),
        has_subject=summary.embedding.subject is not None,
        made={
            "Model": f"{summary.embedding.model} ({summary.embedding.model_sha256[:12]})",
            "Device": f"{summary.device}: {summary.device_reason}",
            "Frames sampled": str(len(summary.embedding)),
            "Video": f"{video.path}, {video.pixel_format}, turned {video.rotation_degrees}°",
            "Time": ", ".join(f"{stage} {spent:.2f} s" for stage, spent in asdict(document.timings_seconds).items()),
            **{str(key): _setting(value) for key, value in config.items()},
        },
    )


def search_page(query: str, hits: Sequence[SearchHit], previews: Sequence[U8 | None]) -> str:
    """Makes one HTML page with the results of a search, best first.

    Args:
        query: the text of the search.
        hits: the moments found.
        previews: [H, W, 3] uint8 RGB of each hit's best frame, or None.
    """
    edge = picture_edge(max(32, len(hits)))
    best = max((hit.score for hit in hits), default=1.0)
    cards = []
    for hit, preview in sorted(zip(hits, previews, strict=True), key=lambda row: -row[0].score):
        link = _moment_link(hit)
        cards.append(
            {
                "hit": hit,
                "picture": None if preview is None else Picture.of(shrink(preview, edge)),
                "region": hit.region if hit.answered_by == "subject" else None,
                "fraction": hit.score / best if best > 0 else 0.0,
                "name": base_name(hit.video),
                "link": link,
                "play": link if link is not None and link.startswith("file:") else None,
            }
        )
    return _page(
        "results.html", title=f"{query} · keyreel search", script=_asset("results.js"), query=query, cards=cards
    )


def link_to(path: Path, folder: Path) -> str:
    """A link from a page in `folder` to a file: relative if possible, percent-encoded."""
    try:
        target = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:
        return path.absolute().as_uri()
    # Without "./" the "a" of "a:b.mp4" would be a scheme.
    return "./" + quote(os.fsencode(target.replace(os.sep, "/")))


def templates() -> Any:
    """The Jinja templates of this folder, which escape all values."""
    import jinja2  # imported here: it is slow, and most uses need no page

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page(template: str, *, script: str, **content: Any) -> str:
    pages = templates()
    pages.filters.update(clock=short_clock, counted=counted)
    style = _asset("page.css")
    policy = "default-src 'none'; img-src data:; media-src 'self' file:; base-uri 'none'; form-action 'none'; "
    policy += f"style-src '{_digest(style)}'; script-src " + (f"'{_digest(script)}'" if script else "'none'")
    page: str = pages.get_template(template).render(style=style, script=script, policy=policy, **content)
    # A file name may have bytes that are not UTF-8; the page must be written nevertheless.
    return page.encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def base_name(path: str) -> str:
    """The last part of a path or address, to show."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or path


def counted(number: int, noun: str) -> str:
    """Formats a number with a noun: 1 shot, 2 shots."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def picture_url(picture: U8 | bytes) -> str:
    """A picture as a data: URL. Args: [H, W, 3] uint8, or a JPEG file."""
    return _data_url(picture if isinstance(picture, bytes) else jpeg(Image.fromarray(picture), PICTURE_QUALITY), "jpeg")


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _ticks(duration: float) -> list[dict[str, Any]]:
    """At most eight round times for the scale of the timeline."""
    step = next((s for s in TICK_SECONDS if duration / s <= 7), duration / 5)
    ticks = []
    for number in range(math.floor(duration / step + 1e-6) + 1):
        seconds = number * step
        anchor = "start" if number == 0 else "end" if duration - seconds < 0.04 * duration else "middle"
        text = short_clock(seconds)
        ticks.append({"seconds": seconds, "anchor": anchor, "text": text if step < 1 else text[:-2]})
    return ticks


def _curve(importance: F32, pts_seconds: F64, duration: float) -> list[str]:
    """Points of the curve of importance, in a plane of 1000 x 100; the highest sample of each stretch."""
    step = max(1, math.ceil(len(importance) / CURVE_POINTS))
    points = []
    for first in range(0, len(importance), step):
        row = first + int(np.argmax(importance[first : first + step]))
        x, y = 1000 * float(pts_seconds[row]) / duration, 100 - 98 * min(max(float(importance[row]), 0.0), 1.0)
        points.append((min(max(x, 0.0), 1000.0), y))
    if len(points) == 1:
        points = [(0.0, points[0][1]), (1000.0, points[0][1])]
    return [f"{x:.1f} {y:.1f}" for x, y in points]


def _cards(summary: Summary, document: SummaryDocument, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    embedding, area = summary.embedding, attended_area(summary.video, summary.config["image"])
    cards = []
    for keyframe, entry, picture in zip(summary.keyframes, document.keyframes, pictures, strict=True):
        scale = OVERLAY_EDGE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        heat = overlay_png(attention_overlay(embedding.attention[keyframe.sample], embedding.grid, area, size))
        cards.append(
            {
                "keyframe": keyframe,
                "picture": Picture.of(picture),
                "heat": _data_url(heat, "png"),
                "file": quote(entry.file or ""),
            }
        )
    return cards


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(entry)}" for key, entry in value.items() if entry is not None)
    return "–" if value is None else str(value)


def _moment_link(hit: SearchHit) -> str | None:
    """A link to the moment: only to files and http(s), so that no name becomes a script."""
    moment = f"#t={hit.start_seconds:.3f},{hit.stop_seconds:.3f}"
    if hit.video.startswith(("http://", "https://")):
        return hit.video + moment
    path = Path(hit.video)
    try:
        return path.absolute().as_uri() + moment if path.is_file() else None
    except (OSError, ValueError):
        return None
