"""Commands of a library: list, stats, remove, verify, compact, upgrade, serve."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.output import log, plural, print_json, print_line, print_table, printable
from keyreel.config import ServeConfig
from keyreel.errors import Damaged

if TYPE_CHECKING:
    from keyreel import Library

SERVING = ServeConfig()  # defaults


@contextlib.contextmanager
def open_library(uri: str, model: str | None, device: str) -> Iterator[Library]:
    """A library with an engine; for its own model by default."""
    model = model or model_of(uri)
    with keyreel.Engine.from_pretrained(model, device=device) as engine, keyreel.Library(uri, engine) as library:
        yield library


def model_of(uri: str) -> str:
    """The model of a library; the built-in one if there is no library yet."""
    with keyreel.Library(uri) as library:
        return library.stats().model if library.exists() else "builtin"


def list_videos(
    folder: options.Folder,
    as_json: options.Json = False,
    path: options.PathGlob = None,
    tag: options.Tag = None,
    after: options.After = None,
    before: options.Before = None,
    min_duration: options.MinDuration = None,
    max_duration: options.MaxDuration = None,
) -> None:
    """Lists the videos of a library, those that failed with the reason."""
    from keyreel.cli.documents import Videos
    from keyreel.render.pictures import short_clock

    with keyreel.Library(folder) as library:
        where = keyreel.Filter(
            path=path,
            tags=tuple(tag or ()),
            after=after,
            before=before,
            min_duration_seconds=min_duration,
            max_duration_seconds=max_duration,
        )
        records = library.list(where)
    if as_json:
        print_json(Videos.of(folder, records))
        return
    rows = []
    for record in records:
        length = "" if record.duration_seconds is None else short_clock(record.duration_seconds)
        recorded = "" if record.date is None else f"{datetime.fromtimestamp(record.date):%Y-%m-%d %H:%M}"
        name = Text(printable(record.path))
        if record.status == "failed":
            error = (record.error or "").removeprefix(f"{record.path}: ")
            name.append(printable(f"\nfailed: {error}"), style="red")
        rows.append((length, str(record.frames), recorded, " ".join(record.tags), name))
    print_table(("length", "frames", "recorded", "tags", "video"), rows, right=2)


def stats(folder: options.Folder, as_json: options.Json = False) -> None:
    """Tells how large a library is, and of which model."""
    from keyreel.cli.documents import Stats

    with keyreel.Library(folder) as library:
        found = library.stats()
    if as_json:
        print_json(Stats(library=folder, **dataclasses.asdict(found)))
        return
    size = "unknown" if found.bytes is None else f"{found.bytes / 1e6:.1f} MB"
    print_line(f"videos  {found.videos}, {found.failed} of them failed")
    print_line(f"frames  {found.frames} of {found.hours:.3g} hours of video")
    print_line(f"size    {size}")
    print_line(f"model   {found.model} ({found.model_sha256[:12]}), {found.width} numbers a frame")


def remove(
    folder: options.Folder,
    videos: Annotated[list[str], Argument(metavar="VIDEO...", help="paths, ids or globs, '*/holiday/*'")],
    as_json: options.Json = False,
) -> None:
    """Takes videos out of a library; the files themselves stay."""
    from keyreel.cli.documents import Videos

    with keyreel.Library(folder) as library:
        removed = library.remove(videos)
    if as_json:
        print_json(Videos.of(folder, removed))
    for record in removed if not as_json else ():
        print_line(f"removed: {record.path}")


def export(
    folder: options.Folder,
    parquet: Annotated[Path, Option(metavar="DIR", help="write vectors.parquet into this folder")],
    overwrite: Annotated[bool, Option("--overwrite", help="replace a file that is there")] = False,
    as_json: options.Json = False,
) -> None:
    """Writes all vectors with their videos, times and tags as Parquet, for a vector database or pandas."""
    from keyreel.cli.documents import Export

    with keyreel.Library(folder) as library:
        count = library.export_parquet(parquet, overwrite=overwrite)
    path = parquet / "vectors.parquet"
    if as_json:
        print_json(Export(library=folder, file=str(path), vectors=count))
    else:
        print_line(f"{plural(count, 'vector')} -> {path}")


def verify(
    folder: options.Folder,
    repair: Annotated[bool, Option("--repair", help="keep what is sound, index the rest again with update")] = False,
    as_json: options.Json = False,
) -> None:
    """Reads a library from end to end, and tells what is damaged; exits with 6 where something is and stays."""
    from keyreel.cli.documents import Verify

    with keyreel.Library(folder) as library:
        findings = library.verify(repair=repair)
    if as_json:
        print_json(Verify(library=folder, findings=findings))
    else:
        for finding in findings:
            print_line(f"{'repaired' if finding.repaired else finding.kind}: {finding.what}")
            for video in finding.videos:
                print_line(f"  {video}")
        if not findings:
            print_line("nothing is damaged")
    if left := [finding.what for finding in findings if not finding.repaired]:
        hint = "run it with --repair, then keyreel library update"
        raise Damaged(f"{folder}: {plural(len(left), 'finding')}", left, hint=hint)


def compact(folder: options.Folder, as_json: options.Json = False) -> None:
    """Puts small files together and gives the space of what was removed back."""
    from keyreel.cli.documents import Compact

    with keyreel.Library(folder) as library:
        given_back = library.compact()
    if as_json:
        print_json(Compact(library=folder, bytes=given_back))
    else:
        print_line(f"{given_back / 1e6:.1f} MB given back")


def upgrade(folder: options.Folder, as_json: options.Json = False) -> None:
    """Converts a library that an older keyreel made, and keeps all that it holds."""
    from keyreel.cli.documents import Upgrade

    with keyreel.Library(folder) as library:
        videos = library.upgrade()
    if as_json:
        print_json(Upgrade(library=folder, videos=videos))
    else:
        without = "; they have no subjects until keyreel index --force" if videos else ""
        print_line(f"{plural(videos, 'video')} converted{without}")


def serve(
    library: Annotated[str, Option(metavar="DIR", help="the library's folder or s3:// address")],
    token_file: Annotated[Path | None, Option(help="file with the token that callers must send")] = None,
    model: options.OwnModel = None,
    device: options.Device = "auto",
    host: Annotated[str, Option(help="address to listen on; this machine alone by default")] = SERVING.host,
    port: Annotated[int, Option(help="port to listen on; 0 takes a free one")] = SERVING.port,
    root: Annotated[list[str] | None, Option(help="folder whose videos may be indexed and played; repeatable")] = None,
    answer_to: Annotated[
        list[str] | None,
        Option(help="names in the Host header that are answered; on loopback its own by default"),
    ] = None,
    folder: Annotated[
        str | None, Option(help="folder of uploads and of the list of jobs; serve/ in the library by default")
    ] = SERVING.folder,
    threads: Annotated[int, Option(help="requests that are worked on at a time")] = SERVING.threads,
    timeout_seconds: Annotated[float, Option(help="longest work on one request (504)")] = SERVING.timeout_seconds,
    job_threads: Annotated[int, Option(help="videos indexed at a time")] = SERVING.job_threads,
    max_jobs: Annotated[int, Option(help="jobs that may wait; more are told to come back (429)")] = SERVING.max_jobs,
    upload_bytes: Annotated[int, Option(help="largest upload, in bytes")] = SERVING.upload_bytes,
    upload_quota: Annotated[
        int | None, Option(min=1, help="bytes that all uploads together may take (507)")
    ] = SERVING.upload_quota,
    drain_seconds: Annotated[
        float, Option(help="how long requests, and then the jobs at work, may go on after SIGTERM")
    ] = SERVING.drain_seconds,
) -> None:
    """Serves a library over HTTP, with a page to search it; needs the extra `serve`."""
    from keyreel.serve import run

    config = ServeConfig(
        token=None if token_file is None else token_file.read_text("utf-8").strip(),
        host=host,
        port=port,
        roots=tuple(root or ()),
        hosts=tuple(answer_to or ()),
        folder=folder,
        threads=threads,
        timeout_seconds=timeout_seconds,
        job_threads=job_threads,
        max_jobs=max_jobs,
        upload_bytes=upload_bytes,
        upload_quota=upload_quota,
        drain_seconds=drain_seconds,
    )
    if not (config.loopback or config.token):
        warning = f"WARNING: without --token-file anyone who reaches {host} can search, add and remove videos"
        log(warning, style="bold red")
    with open_library(library, model, device) as opened:
        run(opened, config, listening=lambda address: log(f"{address} serves {library}; ctrl-c ends"))
