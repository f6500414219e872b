"""`keyreel search`: finds moments of videos, or of a library, by a text or a picture."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.inputs import exit_for, for_each, sources
from keyreel.cli.library import open_library
from keyreel.cli.models import ensure
from keyreel.cli.output import log, print_csv, print_hits, print_json, print_videos
from keyreel.cli.progress import Bars
from keyreel.cli.signature import names
from keyreel.config import EncodeConfig, Sampling
from keyreel.errors import Failure, KeyreelError, RenderError

if TYPE_CHECKING:
    from keyreel import Combined, Engine, Example, Filter, Library
    from keyreel.decode.source import Source
    from keyreel.library.types import VideoHit
    from keyreel.types import U8, Progress, SearchHit, Summary

# columns of --csv: fields of a hit or video; empty if missing
HIT_COLUMNS = ("video", "video_id", "start_seconds", "stop_seconds", "pts_seconds", "score", "chance", "answered_by")
VIDEO_COLUMNS = ("video", "video_id", "score")
_OF_VIDEOS = [*names(options.Frames, options.Encode, options.Limits), "hidden"]
OUR_PAGE, OUR_PAGE_WITHIN = b'<meta name="generator" content="keyreel">', 4096  # bytes
_PER_VIDEO = 2  # default moments of one video
_OF_LIBRARY = [*names(options.Where), "within", "like", "start", "stop", "whole", "per_video"]
ANSWER, LIBRARY = "Answers", "Search in a library"  # panels


@dataclass(frozen=True, slots=True)
class Found:
    """The results of a search."""

    query: Combined
    hits: Sequence[SearchHit]  # best first
    pictures: Sequence[U8 | bytes]  # of the hits: pixels or JPEG files; empty if not wanted
    unknown: Sequence[str]  # words that the model does not know
    videos: Sequence[VideoHit] | None = None  # with --videos
    left_out: Sequence[str] = ()  # skipped videos
    failed: Sequence[Failure] = ()
    searched: int = 1  # videos


def search(
    context: typer.Context,
    *,
    text: Annotated[str | None, Argument(metavar="TEXT", help="what to look for")] = None,
    videos: Annotated[list[str] | None, Argument(metavar="VIDEO", help="files, folders, or -")] = None,
    library: Annotated[str | None, Option(metavar="DIR", help="search this library instead of VIDEO...")] = None,
    image: Annotated[Path | None, Option(metavar="FILE", help="search with a picture instead of TEXT")] = None,
    like: Annotated[
        str | None, Option(metavar="VIDEO@SECONDS", help="search the library with this moment instead of TEXT")
    ] = None,
    also: Annotated[
        list[str] | None, Option("--and", metavar="TEXT", help="must show this, too; repeat for more texts")
    ] = None,
    without: Annotated[
        list[str] | None, Option("--not", metavar="TEXT", help="must not show this; repeat for more texts")
    ] = None,
    k: Annotated[int, Option("-k", min=1, metavar="N", help="number of moments, or of videos")] = 5,
    whole: Annotated[bool, Option("--videos", help="rank videos instead of moments")] = False,
    within: Annotated[
        list[str] | None,
        Option("--in", metavar="VIDEO", rich_help_panel=LIBRARY, help="only this video, a path or id; repeat for more"),
    ] = None,
    start: Annotated[
        float | None, Option(metavar="SECONDS", rich_help_panel=LIBRARY, help="only moments after this time")
    ] = None,
    stop: Annotated[
        float | None, Option(metavar="SECONDS", rich_help_panel=LIBRARY, help="only moments before this time")
    ] = None,
    per_video: Annotated[
        int | None,
        Option(min=1, metavar="N", rich_help_panel=LIBRARY, help="at most N moments per video; 2, with --in up to k"),
    ] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="write a page with pictures of the moments")] = None,
    previews: Annotated[
        Path | None, Option(metavar="DIR", rich_help_panel=ANSWER, help="write a picture of each moment into DIR")
    ] = None,
    overwrite: Annotated[
        bool,
        Option("--overwrite", rich_help_panel=ANSWER, help="let --html replace a file that keyreel did not write"),
    ] = False,
    where: options.Where,
    frames: options.Frames,
    encode: options.Encode,
    limits: options.Limits,
    hidden: options.Hidden = False,
    model: options.Model = None,
    yes: options.Yes = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    as_csv: Annotated[bool, Option("--csv", help="print the moments, or videos, as CSV on stdout")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Finds moments by a text or a picture, in videos or in a library.

    Examples:
        keyreel search "a dog" holiday.mp4 --and snow --html hits.html
        keyreel search "a red car" --library lib --videos --after 2024-06-01
    """
    from keyreel.render.pictures import read_picture

    paths, pictures = list(videos or []), html is not None or previews is not None
    conditions = {"also": also or (), "without": without or ()}
    if as_csv and as_json:
        raise ValueError("give --csv or --json, not both")
    if html is not None:  # check before the work
        _check_replaceable(html, [*(one for one in (text, image) if one), *paths], overwrite=overwrite)
    if library is not None:
        if paths:
            raise ValueError("choose videos of a library with --in and --path")
        options.reject(context, _OF_VIDEOS, "works with videos only, not with --library")
        where = dataclasses.replace(
            where,
            videos=tuple(within or ()),
            start_seconds=start,
            stop_seconds=stop,
            per_video=per_video or (None if within else _PER_VIDEO),
        )
        query = keyreel.Combined(_library_query(text, image, like), **conditions)
        bare = like is not None and not (also or without)  # it needs no model
        ensure(model, yes=yes, quiet=quiet)
        with keyreel.Library(library) if bare else open_library(library, model, device, images=False) as searched:
            found = _search_library(searched, query, k, where, videos=whole, pictures=pictures)
    else:
        options.reject(context, _OF_LIBRARY, "works with --library only")
        if image is not None and text is not None:
            paths.insert(0, text)
        if not paths or (image is None and not text):
            raise ValueError("search needs a text (or --image FILE) and at least one video, or --library DIR")
        query = keyreel.Combined((text or "") if image is None else read_picture(image), **conditions)
        ensure(model, yes=yes, quiet=quiet)
        given = sources(paths, limits, hidden=hidden)
        with keyreel.Engine.from_pretrained(model or "builtin", device=device) as engine, Bars(quiet=quiet) as bars:
            found = _search_videos(engine, bars, query, k, given, frames, encode, pictures=pictures)
    name = str(image or text or f"like {like}")
    _show(name, found, html=html, previews=previews, as_json=as_json, as_csv=as_csv)
    exit_for(found.failed, found.searched)


def _check_replaceable(page: Path, inputs: Sequence[str | Path], *, overwrite: bool) -> None:
    """Raises RenderError if the page must not replace a file."""
    if not page.exists():
        return
    if any(os.path.exists(one) and os.path.samefile(one, page) for one in inputs):
        raise RenderError(
            f"{page}: is an input of this search and will not be overwritten", hint="choose another file for --html"
        )
    if page.is_dir():
        raise RenderError(f"{page}: is a folder", hint="--html needs a file")
    with page.open("rb") as file:
        ours = OUR_PAGE in file.read(OUR_PAGE_WITHIN)
    if not (ours or overwrite):
        raise RenderError(
            f"{page}: exists and was not written by keyreel", hint="choose another file, or add --overwrite"
        )


def _search_videos(
    engine: Engine,
    bars: Bars,
    query: Combined,
    k: int,
    videos: Sequence[Source | KeyreelError],
    sampling: Sampling,
    encode: EncodeConfig,
    *,
    pictures: bool,
) -> Found:
    from keyreel.render.results import hit_pictures

    summaries: list[Summary] = []
    by_name: dict[str, Source] = {}
    with contextlib.ExitStack() as opened:  # the videos stay open: they give the pictures of the hits

        def work(source: Source, progress: Progress) -> None:
            opened.enter_context(source)
            by_name[source.probe().path] = source
            summary = engine.summarize(
                source, keyframes=1, sampling=sampling, encode=encode, thumbnails=False, progress=progress
            )
            summaries.append(summary)

        failed = for_each(videos, bars, work, {})
        hits = engine.search(query, summaries, k=k) if summaries else []
        images = hit_pictures(hits, by_name) if pictures else []
    return Found(query, hits, images, engine.unknown_words(query), failed=failed, searched=len(summaries))


def _search_library(library: Library, query: Combined, k: int, where: Filter, *, videos: bool, pictures: bool) -> Found:
    best = library.search_videos(query, k=k, where=where) if videos else None
    hits = library.search(query, k=k, where=where) if best is None else [m for v in best for m in v.moments]
    images = [library.preview(hit.video_id, hit.pts_seconds) for hit in hits] if pictures else []
    if not hits:
        log("no moments found")
    return Found(query, hits, images, library.unknown_words(query), videos=best, left_out=library.left_out())


def _library_query(text: str | None, image: Path | None, like: str | None) -> str | Path | Example:
    if sum(given is not None for given in (text or None, image, like)) != 1:
        raise ValueError("search in a library needs one of: a text, --image FILE, --like VIDEO@SECONDS")
    if like is None:
        return image or text or ""
    video, _, seconds = like.rpartition("@")
    try:
        return keyreel.Example(video, float(seconds))
    except ValueError as error:
        raise ValueError(f"--like needs VIDEO@SECONDS, such as holiday.mp4@12.5, got {like!r}") from error


def _show(name: str, found: Found, *, html: Path | None, previews: Path | None, as_json: bool, as_csv: bool) -> None:
    """Writes the requested files, and prints the results."""
    from keyreel.chance import matches_well, percent
    from keyreel.render.documents import FoundVideo, search_document
    from keyreel.render.files import atomic_write
    from keyreel.render.results import save_previews
    from keyreel.render.storyboard import search_page

    hits = found.hits if previews is None else save_previews(found.hits, found.pictures, previews)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as made:
            made.write_text(search_page(name, found.hits, [_pixels(p) for p in found.pictures]), "utf-8")
        log(f"wrote {html}")
    if found.unknown:
        log(f"the model does not know {', '.join(map(repr, found.unknown))}")
    if found.left_out:
        log(f"skipped, because their stored data is damaged: {', '.join(found.left_out)}")
        log("`keyreel library verify --repair`, then `keyreel library update` restore them")
    if matches_well(hit.chance for hit in hits) is False:
        best = max(hit.chance or 0.0 for hit in hits)
        why = f"the best moment has a chance of {percent(best)}" if best else "the model knows no word of the query"
        log(f"nothing matches well: {why}")
    if as_json:
        videos = None if found.videos is None else [FoundVideo(v.video, v.video_id, v.score) for v in found.videos]
        print_json(
            search_document(
                name,
                hits,
                found.failed,
                videos=videos,
                also=[str(one) for one in found.query.also],
                without=[str(one) for one in found.query.without],
                unknown_words=found.unknown,
                left_out=found.left_out,
            )
        )
    elif as_csv:
        print_csv(HIT_COLUMNS, hits) if found.videos is None else print_csv(VIDEO_COLUMNS, found.videos)
    elif found.videos is None:
        print_hits(hits)
    else:
        print_videos(found.videos)


def _pixels(picture: U8 | bytes) -> U8:
    if not isinstance(picture, bytes):
        return picture
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
