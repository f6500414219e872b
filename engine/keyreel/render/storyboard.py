"""HTML pages: the storyboard of one video, and the results of a search. One file each, nothing loaded from outside."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from keyreel.render.pictures import (
    attended_area,
    attention_overlay,
    jpeg,
    overlay_png,
    short_clock,
    shrink,
)
from keyreel.types import F32, F64, U8, SearchHit, Shot, Summary

PICTURE_EDGE = 480  # pixels, long side at 32 key-frames; the pixels of all pictures together stay the same
PICTURE_QUALITY = 76
OVERLAY_EDGE = 96
CURVE_POINTS = 400
TICK_SECONDS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


def picture_edge(count: int) -> int:
    """Long side in pixels of each of `count` pictures on a page, such that the page stays under about 3 MB."""
    return int(np.clip(PICTURE_EDGE * math.sqrt(32 / count), 96, 960))


def storyboard_page(
    summary: Summary,
    *,
    pictures: Sequence[Image.Image],
    files: Sequence[str],
    video_link: str | None,
    reel: tuple[str, Sequence[Shot]] | None,
    duration_seconds: float,
    timings_seconds: Mapping[str, float],
) -> str:
    """The storyboard of a video as one HTML page.

    Args:
        summary: what to show.
        pictures: of the key-frames, in time order.
        files: links to the full pictures, relative to the page.
        video_link: link to the video, relative to the page; None where it has no file.
        reel: (link, spans), None where there is none.
        duration_seconds: of the video.
        timings_seconds: of each stage, rendering included.
    """
    video = summary.video
    name = _base(video.path)
    facts = [short_clock(duration_seconds), f"{video.width} × {video.height}", video.codec]
    facts += [_count(len(summary.shots), "shot"), _count(len(summary.keyframes), "key-frame")]
    spans = reel[1] if reel is not None else ()
    if reel is not None:
        facts.append(f"reel of {short_clock(sum(span.duration_seconds for span in spans))}")
    body = [
        f"<h1>{escape(name)}</h1>",
        '<div class="facts">' + "".join(f"<span>{escape(fact)}</span>" for fact in facts) + "</div>",
        _notes(summary.warnings),
        _player(name, video_link, reel, pictures[int(np.argmax([k.weight for k in summary.keyframes]))]),
        _timeline(summary, spans, duration_seconds),
        _cards(summary, pictures, files),
        _tables(summary, timings_seconds),
    ]
    return _page(f"{name} · keyreel", "\n".join(body), script=True)


def search_page(query: str, hits: Sequence[SearchHit], previews: Sequence[U8 | None]) -> str:
    """The results of a search as one HTML page, best first.

    Args:
        query: the text that was searched.
        hits: the moments found.
        previews: [H, W, 3] uint8 RGB of each hit's best frame, or of the key-frame that a library shows it by; None
            where there is none.
    """
    edge = picture_edge(max(32, len(hits)))
    best = max((hit.score for hit in hits), default=1.0)
    cards = []
    for hit, preview in sorted(zip(hits, previews, strict=True), key=lambda row: -row[0].score):
        picture = ""
        if preview is not None:
            text = f"frame at {short_clock(getattr(hit, 'keyframe_seconds', hit.pts_seconds))}"
            picture = f'<div class="picture">{_image(shrink(preview, edge), text)}</div>'
        link = _moment_link(hit)
        opens, closes = (f'<a href="{link}">', "</a>") if link is not None else ("", "")
        moment = f"{short_clock(hit.start_seconds)} – {short_clock(hit.stop_seconds)}"
        cards.append(
            f'<li class="card">{picture}<div class="caption">'
            f'<div class="row"><b>{moment}</b><span>score {hit.score:.3f}</span></div>'
            f"{_bar(hit.score / best if best > 0 else 0.0)}"
            f'<div class="name" title="{escape(hit.video)}">{opens}{escape(_base(hit.video))}{closes}</div></div></li>'
        )
    found = f'<ol class="cards found">{"".join(cards)}</ol>' if cards else '<p class="empty">Nothing was found.</p>'
    body = f'<h1>{escape(query)}</h1>\n<div class="facts"><span>{_count(len(hits), "moment")}</span></div>\n{found}'
    return _page(f"{query} · keyreel search", body, script=False)


def link_to(path: Path, folder: Path) -> str:
    """A link from a page in `folder` to a file: relative where the drive is the same, percent-encoded."""
    try:
        target = os.path.relpath(path.absolute(), folder.absolute())
    except ValueError:
        return path.absolute().as_uri()
    # "./" keeps a name such as "a:b.mp4" from being read as a scheme.
    return "./" + quote(os.fsencode(target.replace(os.sep, "/")))


def _page(title: str, body: str, *, script: bool) -> str:
    style = _asset("page.css")
    code = _asset("page.js") if script else ""
    policy = "default-src 'none'; img-src data:; media-src 'self' file:; base-uri 'none'; form-action 'none'; "
    policy += f"style-src '{_digest(style)}'; script-src " + (f"'{_digest(code)}'" if script else "'none'")
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        + (f"<script>{code}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
    # A file name may hold bytes that are no text; they must not keep the page from being written.
    return page.encode("utf-8", "replace").decode("utf-8")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _base(path: str) -> str:
    """The last part of a path or an address, for people."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or path


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _image(image: Image.Image, text: str) -> str:
    source = _data(jpeg(image, PICTURE_QUALITY), "jpeg")
    return f'<img src="{source}" width="{image.width}" height="{image.height}" alt="{escape(text)}">'


def _bar(share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<svg class="share" aria-hidden="true"><rect width="{width:.1f}%" height="100%"/></svg>'


def _notes(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    return '<div class="note">Please note<ul>' + "".join(f"<li>{escape(w)}</li>" for w in warnings) + "</ul></div>"


def _player(name: str, video_link: str | None, reel: tuple[str, Sequence[Shot]] | None, poster: Image.Image) -> str:
    sources = f'<source src="{escape(video_link)}">' if video_link is not None else ""
    sources += f'<source data-reel src="{escape(reel[0])}">' if reel is not None else ""
    if not sources:
        return ""
    return (
        f'<video controls playsinline preload="metadata" width="{poster.width}" height="{poster.height}" '
        f'poster="{_data(jpeg(poster, PICTURE_QUALITY), "jpeg")}" aria-label="{escape(name)}">{sources}</video>'
        '<p class="note unplayable">This browser cannot play the video; the pictures and times below stay usable.</p>'
    )


def _timeline(summary: Summary, reel: Sequence[Shot], duration: float) -> str:
    def at(seconds: float) -> str:
        return f"{100 * min(max(seconds / duration, 0.0), 1.0):.3f}%"

    def band(span: Shot, y: int, height: int) -> str:
        # A hairline between the bands, which must not make a short one vanish.
        width = max(100 * span.duration_seconds / duration - 0.12, 0.06)
        return f'<rect x="{at(span.start_seconds)}" y="{y}" width="{width:.3f}%" height="{height}" rx="2"/>'

    shots = "".join(band(shot, 0, 16) for shot in summary.shots)
    highlights = "".join(band(span, 98, 5) for span in reel)
    marks = "".join(
        f'<line x1="{at(k.pts_seconds)}" x2="{at(k.pts_seconds)}" y1="16" y2="92"/>'
        f'<circle cx="{at(k.pts_seconds)}" cy="8" r="5.5"/>'
        for k in summary.keyframes
    )
    step = next((s for s in TICK_SECONDS if duration / s <= 7), duration / 5)
    ticks = []
    for number in range(math.floor(duration / step + 1e-6) + 1):
        x = at(number * step)
        anchor = "start" if number == 0 else "end" if duration - number * step < 0.04 * duration else "middle"
        text = short_clock(number * step)
        ticks.append(f'<text x="{x}" y="126" text-anchor="{anchor}">{text if step < 1 else text[:-2]}</text>')
    line = _curve(summary.importance, summary.embedding.pts_seconds, duration)
    spans = escape(json.dumps([[span.start_seconds, span.stop_seconds] for span in reel]))
    legend = "".join(
        f'<li class="{kind}"><svg aria-hidden="true">{shape}</svg>{text}</li>'
        for kind, shape, text in (
            ("shots", '<rect width="14" height="10" rx="2"/>', "shots"),
            ("marks", '<circle cx="7" cy="5" r="5"/>', "key-frames"),
            ("curve", '<path class="edge" d="M0 8L5 2L9 6L14 1"/>', "importance"),
            *([("reel", '<rect y="3" width="14" height="5" rx="2"/>', "in the reel")] if reel else []),
        )
    )
    return (
        f'<div class="timeline" role="slider" tabindex="0" aria-label="Position in the video" aria-valuemin="0" '
        f'aria-valuemax="{duration:.3f}" aria-valuenow="0" data-seconds="{duration:.6f}" data-reel="{spans}">'
        f'<svg aria-hidden="true"><g class="ticks"><line x1="0" x2="100%" y1="92.5" y2="92.5"/>{"".join(ticks)}</g>'
        f'<g class="shots">{shots}</g>'
        f'<svg class="curve" x="0" y="26" width="100%" height="66" viewBox="0 0 1000 100" preserveAspectRatio="none">'
        f'<path class="area" d="{line}V100H{line[1:].split(" ", 1)[0]}Z"/><path class="edge" d="{line}"/></svg>'
        f'<g class="marks">{marks}</g><g class="reel">{highlights}</g>'
        f'<svg class="playhead" x="0" overflow="visible"><line x1="0" x2="0" y1="-4" y2="108"/></svg></svg></div>\n'
        f'<div class="under"><ul class="legend">{legend}</ul><span>at <output>0:00.0</output></span></div>'
    )


def _curve(importance: F32, pts_seconds: F64, duration: float) -> str:
    """Path of the importance on a plane of 1000 x 100; of many samples the highest of each stretch stays."""
    step = max(1, math.ceil(len(importance) / CURVE_POINTS))
    points = []
    for first in range(0, len(importance), step):
        row = first + int(np.argmax(importance[first : first + step]))
        x, y = 1000 * float(pts_seconds[row]) / duration, 100 - 98 * min(max(float(importance[row]), 0.0), 1.0)
        points.append(f"{min(max(x, 0.0), 1000.0):.1f} {y:.1f}")
    if len(points) == 1:
        points = [f"0.0 {points[0].split()[1]}", f"1000.0 {points[0].split()[1]}"]
    return "M" + "L".join(points)


def _cards(summary: Summary, pictures: Sequence[Image.Image], files: Sequence[str]) -> str:
    embedding, config = summary.embedding, summary.config
    image = config.get("image")
    area = attended_area(summary.video, image if isinstance(image, Mapping) else {})
    cards = []
    for keyframe, picture, file in zip(summary.keyframes, pictures, files, strict=True):
        time = short_clock(keyframe.pts_seconds)
        scale = OVERLAY_EDGE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        heat = overlay_png(attention_overlay(embedding.attention[keyframe.sample], embedding.grid, area, size))
        cards.append(
            f'<li class="card"><button type="button" class="picture" data-seek="{keyframe.pts_seconds:.6f}" '
            f'aria-label="Play from {time}">{_image(picture, f"key-frame at {time}")}'
            f'<img class="heat" src="{_data(heat, "png")}" alt=""></button>'
            f'<div class="caption"><div class="row"><b>{time}</b>'
            f"<span>{100 * keyframe.weight:.0f} % of the video</span></div>"
            f'{_bar(keyframe.weight)}<div class="row"><a href="{escape(quote(file))}">Full picture</a></div></div></li>'
        )
    few = " few" if len(cards) <= 4 else ""
    tall = " tall" if pictures[0].height > pictures[0].width else few
    # At strength 0 the map has no part in the vectors: saying that the model looked there would be untrue.
    used = encode.get("attention_strength") if isinstance(encode := config.get("encode"), Mapping) else None
    looked = "Show the attention map (not used for these vectors)" if used == 0 else "Show where the model looked"
    return (
        '<section><div class="bar"><h2>Key-frames</h2><label class="switch"><input type="checkbox" role="switch">'
        f'{looked}</label></div><ol class="cards{tall}">{"".join(cards)}</ol></section>'
    )


def _tables(summary: Summary, timings: Mapping[str, float]) -> str:
    def jump(seconds: float) -> str:
        return f'<button type="button" data-seek="{seconds:.6f}">{short_clock(seconds)}</button>'

    shots = [
        (str(n), jump(shot.start_seconds), short_clock(shot.stop_seconds), f"{shot.duration_seconds:.1f} s")
        for n, shot in enumerate(summary.shots, 1)
    ]
    keyframes = [
        (str(n), jump(k.pts_seconds), str(k.frame_index), f"{k.weight:.3f}", f"{k.score:.3f}", f"{k.quality:.2f}")
        for n, k in enumerate(summary.keyframes, 1)
    ]
    made = {
        "Model": f"{summary.embedding.model} ({summary.embedding.model_sha256[:12]})",
        "Device": f"{summary.device}: {summary.device_reason}",
        "Frames sampled": str(len(summary.embedding)),
        "Video": f"{summary.video.path}, {summary.video.pixel_format}, turned {summary.video.rotation_degrees}°",
        "Time": ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in timings.items()),
        **{str(key): _setting(value) for key, value in summary.config.items()},
    }
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in made.items())
    return (
        "<section>"
        + _details("Shots", _table(("Shot", "Start", "Stop", "Length"), shots))
        + _details("Key-frames", _table(("Key-frame", "Time", "Frame", "Weight", "Score", "Quality"), keyframes))
        + _details("How this was made", f"<dl>{facts}</dl>")
        + "</section>"
    )


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(entry)}" for key, entry in value.items() if entry is not None)
    return "–" if value is None else str(value)


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary><div>{content}</div></details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _moment_link(hit: SearchHit) -> str | None:
    """Link to the moment; only files and http(s), so that no name becomes a script."""
    moment = f"#t={hit.start_seconds:.3f},{hit.stop_seconds:.3f}"
    if hit.video.startswith(("http://", "https://")):
        return escape(hit.video) + moment
    path = Path(hit.video)
    try:
        return escape(path.absolute().as_uri()) + moment if path.is_file() else None
    except (OSError, ValueError):
        return None
