"""Commands of a library of videos: search, list, stats, remove, verify, compact, serve."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.markup import escape
from rich.table import Table

from keyreel import Engine, Library
from keyreel.cli.app import Device, Field, Json, OwnModel, command, library_app, picked
from keyreel.cli.documents import compact_document, stats_document, verify_document, videos_document
from keyreel.cli.output import counted, out, print_hits, print_json, print_videos, say, say_weak, shown
from keyreel.cli.thumbnails import can_show, thumbnail
from keyreel.config import ServeConfig, option
from keyreel.errors import Damaged, LibraryError
from keyreel.library.types import Example, Filter
from keyreel.render.documents import FoundVideo, search_document
from keyreel.render.files import atomic_write
from keyreel.render.pictures import short_clock
from keyreel.render.results import save_previews
from keyreel.render.storyboard import search_page
from keyreel.runtime.bundle import BUILTIN
from keyreel.types import U8, SearchHit

Folder = Annotated[str, typer.Argument(metavar="DIR", help="the library's folder or s3:// address")]


@dataclasses.dataclass(frozen=True, slots=True)
class Which:
    """Options that choose videos of a library."""

    path: str | None = option(None, "glob over the whole path, '*/holiday/*.mp4'")
    tag: tuple[str, ...] = option((), "a word given at indexing; repeatable, all must fit")
    after: str | None = option(None, "recorded at this date or later, 2024-12-31 or 2024-12-31T18:00")
    before: str | None = option(None, "recorded before this date")
    min_duration: float | None = option(None, "seconds, videos as long or longer")
    max_duration: float | None = option(None, "seconds, videos as long or shorter")

    def filter(self, **more: Any) -> Filter:
        """As the library takes it.

        Raises:
            ValueError: a date that is none.
        """
        after, before = (None if text is None else _date(text) for text in (self.after, self.before))
        return Filter(
            path=self.path,
            tags=self.tag,
            after=after,
            before=before,
            min_duration_seconds=self.min_duration,
            max_duration_seconds=self.max_duration,
            **more,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Options of a search in a library."""

    library: str | None = option(None, "search this library instead of VIDEO...")
    within: tuple[str, ...] = option((), "search in this video only, by path or id; repeatable")
    like: str | None = option(None, "look for what is like this moment, VIDEO@SECONDS, instead of a text")
    start: float | None = option(None, "seconds, from here on in each video")
    stop: float | None = option(None, "seconds, up to here in each video")
    whole: bool = option(False, "rank videos, not moments")


_WHICH = tuple((Which, field.name) for field in dataclasses.fields(Which))
IN_LIBRARY: tuple[Field, ...] = (
    (Wanted, "library"),
    (Wanted, "within", "--in"),
    (Wanted, "like"),
    (Wanted, "start"),
    (Wanted, "stop"),
    (Wanted, "whole", "--videos"),
    *_WHICH,
)
SERVING: tuple[Field, ...] = (
    *((ServeConfig, name) for name in ("host", "port")),
    (ServeConfig, "roots", "--root"),
    (ServeConfig, "hosts", "--answer-to"),
    *((ServeConfig, name) for name in ("folder", "threads", "timeout_seconds", "job_threads", "max_jobs")),
    *((ServeConfig, name) for name in ("upload_bytes", "drain_seconds")),
)


def _date(text: str) -> float:
    """Seconds since 1970; a date without a zone is this machine's."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{text!r} is no date, write 2024-12-31 or 2024-12-31T18:00") from error


@contextlib.contextmanager
def opened(uri: str, model: str | None, device: str) -> Iterator[Library]:
    """A library with an engine for its own model."""
    with Engine.from_pretrained(model or model_of(uri), device=device) as engine, Library(uri, engine) as library:
        yield library


def model_of(uri: str) -> str:
    """The model of a library; the built-in one where there is no library yet."""
    with Library(uri) as library:
        try:
            return library.stats().model
        except Damaged:
            raise
        except LibraryError:
            return BUILTIN


def search_library(
    text: str | None,
    image: Path | None,
    *,
    k: int,
    model: str | None,
    device: str,
    as_json: bool,
    html: Path | None,
    previews: Path | None,
    options: dict[str, Any],
) -> None:
    """`keyreel search --library`."""
    wanted = Wanted(**picked(Wanted, options))
    which = Which(**picked(Which, options))
    where = which.filter(videos=wanted.within, start_seconds=wanted.start, stop_seconds=wanted.stop)
    query, name = _query(text, image, wanted.like)
    library = wanted.library or ""
    # What is like a moment of the library needs no model.
    with Library(library) if isinstance(query, Example) else opened(library, model, device) as there:
        weak = there.weak_score(where) if isinstance(query, str) else None
        videos = there.search_videos(query, k=k, where=where) if wanted.whole else None
        hits = there.search(query, k=k, where=where) if videos is None else [m for v in videos for m in v.moments]
        small = not as_json and can_show(out())
        wanted_pictures = html or previews or small
        pictures = [there.preview(hit.video_id, hit.keyframe_seconds) for hit in hits] if wanted_pictures else []
    found: Sequence[SearchHit] = hits if previews is None else save_previews(hits, pictures, previews)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as made:
            made.write_text(search_page(name, hits, [_decoded(picture) for picture in pictures]), encoding="utf-8")
        say(f"wrote {html}")
    if not hits:
        say("nothing was found")
    say_weak(hits, weak)
    if as_json:
        entries = None if videos is None else [FoundVideo(v.video, v.video_id, v.score) for v in videos]
        print_json(search_document(name, found, videos=entries, weak_score=weak))
    elif videos is None:
        print_hits(hits, [thumbnail(picture) for picture in pictures] if small else ())
    else:
        firsts = itertools.accumulate((len(video.moments) for video in videos[:-1]), initial=0)
        print_videos(videos, [thumbnail(pictures[first]) for first in firsts] if small else ())


def _query(text: str | None, image: Path | None, like: str | None) -> tuple[Any, str]:
    """What the library looks for, and what that is called."""
    if sum(given is not None for given in (text or None, image, like)) != 1:
        raise ValueError("search in a library needs one of: a text, --image FILE, --like VIDEO@SECONDS")
    if like is None:
        return (text, str(text)) if image is None else (image, str(image))
    video, _, seconds = like.rpartition("@")
    try:
        return Example(video, float(seconds)), f"like {like}"
    except ValueError as error:
        raise ValueError(f"--like takes VIDEO@SECONDS, holiday.mp4@12.5, got {like!r}") from error


def _decoded(jpeg: bytes) -> U8:
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


@command(*_WHICH, group=library_app, name="list")
def list_videos(folder: Folder, as_json: Json = False, *, options: dict[str, Any]) -> None:
    """Lists the videos of a library, those that failed with the reason."""
    with Library(folder) as library:
        records = library.list(Which(**picked(Which, options)).filter())
    if as_json:
        print_json(videos_document(folder, records))
        return
    table = Table("length", "frames", "recorded", "tags", box=None)
    table.add_column("video", overflow="fold")
    for column in table.columns[:2]:
        column.justify = "right"
    for record in records:
        length = "" if record.duration_seconds is None else short_clock(record.duration_seconds)
        recorded = "" if record.date is None else f"{datetime.fromtimestamp(record.date):%Y-%m-%d %H:%M}"
        name = escape(shown(record.path))
        if record.status == "failed":
            name += f"\n[red]failed: {escape(shown((record.error or '').removeprefix(f'{record.path}: ')))}"
        table.add_row(length, str(record.frames), recorded, escape(shown(" ".join(record.tags))), name)
    if records:
        out().print(table)


@command(group=library_app)
def stats(folder: Folder, as_json: Json = False) -> None:
    """Tells how large a library is, and of which model."""
    with Library(folder) as library:
        found = library.stats()
    if as_json:
        print_json(stats_document(folder, found))
        return
    size = "unknown" if found.bytes is None else f"{found.bytes / 1e6:.1f} MB"
    lines = {
        "videos": f"{found.videos}, {found.failed} of them failed",
        "frames": f"{found.frames} of {found.hours:.3g} hours of video",
        "size": size,
        "model": f"{found.model} ({found.model_sha256[:12]}), {found.width} numbers a frame",
    }
    for key, value in lines.items():
        out().print(f"{key:7} {shown(value)}", markup=False, soft_wrap=True)


@command(group=library_app)
def remove(
    folder: Folder,
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="paths, ids or globs, '*/holiday/*'")],
    as_json: Json = False,
) -> None:
    """Takes videos out of a library; the files themselves stay."""
    with Library(folder) as library:
        removed = library.remove(videos)
    if as_json:
        print_json(videos_document(folder, removed))
    for record in removed if not as_json else ():
        out().print(f"removed: {shown(record.path)}", markup=False, soft_wrap=True)


@command(group=library_app)
def verify(
    folder: Folder,
    repair: Annotated[
        bool, typer.Option("--repair", help="keep what is sound, index the rest again with update")
    ] = False,
    as_json: Json = False,
) -> None:
    """Reads a library from end to end, and tells what is damaged; exits with 6 where something is and stays."""
    with Library(folder) as library:
        findings = library.verify(repair=repair)
    if as_json:
        print_json(verify_document(folder, findings))
    else:
        for finding in findings:
            state = "repaired" if finding.repaired else finding.kind
            out().print(f"{state}: {shown(finding.what)}", markup=False, soft_wrap=True)
            for video in finding.videos:
                out().print(f"  {shown(video)}", markup=False, soft_wrap=True)
        if not findings:
            out().print("nothing is damaged")
    if left := [finding.what for finding in findings if not finding.repaired]:
        raise Damaged(
            f"{folder}: {counted(len(left), 'finding')}", left, hint="run it with --repair, then keyreel library update"
        )


@command(group=library_app)
def compact(folder: Folder, as_json: Json = False) -> None:
    """Puts small files together and gives the space of what was removed back."""
    with Library(folder) as library:
        given_back = library.compact()
    if as_json:
        print_json(compact_document(folder, given_back))
    else:
        out().print(f"{given_back / 1e6:.1f} MB given back")


def serve(
    library: Annotated[str, typer.Option(metavar="DIR", help="the library's folder or s3:// address")],
    token_file: Annotated[Path | None, typer.Option(help="file with the token that callers must send")] = None,
    model: OwnModel = None,
    device: Device = "auto",
    *,
    options: dict[str, Any],
) -> None:
    """Serves a library over HTTP, with a page to search it; needs the extra `serve`."""
    from keyreel.serve import run

    token = None if token_file is None else token_file.read_text("utf-8").strip()
    config = ServeConfig(token=token, **picked(ServeConfig, options))
    if not (config.loopback or config.token):
        warning = f"WARNING: without --token-file anyone who reaches {config.host} can search, add and remove videos"
        say(warning, style="bold red")
    with opened(library, model, device) as there:
        run(there, config, listening=lambda address: say(f"{address} serves {library}; ctrl-c ends"))
