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
from keyreel.cli.output import clock, log, plural, print_json, print_line, print_table, printable
from keyreel.cli.signature import Made
from keyreel.config import ServeConfig
from keyreel.errors import Damaged

if TYPE_CHECKING:
    from keyreel import Library


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
    where: options.Where,
    as_json: options.Json = False,
) -> None:
    """Lists the videos of a library, and why some failed.

    Examples:
        keyreel library list lib
        keyreel library list lib --tag holiday --after 2024-06-01 --json
    """
    from keyreel.cli.documents import Videos

    with keyreel.Library(folder) as library:
        records = library.list(where)
    if as_json:
        print_json(Videos.of(folder, records))
        return
    rows = []
    for record in records:
        length = "" if record.duration_seconds is None else clock(record.duration_seconds)
        recorded = "" if record.date is None else f"{datetime.fromtimestamp(record.date):%Y-%m-%d %H:%M}"
        name = Text(printable(record.path))
        if record.status == "failed":
            error = (record.error or "").removeprefix(f"{record.path}: ")
            name.append(printable(f"\nfailed: {error}"), style="red")
        rows.append((length, str(record.frames), recorded, " ".join(record.tags), name))
    print_table(("length", "frames", "recorded", "tags", "video"), rows, right=2)


def stats(folder: options.Folder, as_json: options.Json = False) -> None:
    """Prints the size and the model of a library.

    Examples:
        keyreel library stats lib
        keyreel library stats s3://bucket/library --json
    """
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
    videos: Annotated[list[str], Argument(metavar="VIDEO", help="paths, ids, or patterns such as '*/holiday/*'")],
    as_json: options.Json = False,
) -> None:
    """Removes videos from a library; the files stay.

    Examples:
        keyreel library remove lib holiday.mp4
        keyreel library remove lib '*/old/*'
    """
    from keyreel.cli.documents import Videos

    with keyreel.Library(folder) as library:
        removed = library.remove(videos)
    if as_json:
        print_json(Videos.of(folder, removed))
    for record in removed if not as_json else ():
        print_line(f"removed: {record.path}")


def verify(
    folder: options.Folder,
    repair: Annotated[
        bool, Option("--repair", help="delete what is damaged; `keyreel library update` indexes it again")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Reads a whole library and prints what is damaged.

    Exits with 6 if damage remains.

    Examples:
        keyreel library verify lib
        keyreel library verify lib --repair
    """
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
        hint = "`keyreel library verify --repair` deletes damaged parts, then `keyreel library update` restores them"
        raise Damaged(f"{folder}: {plural(len(left), 'finding')}", left, hint=hint)


def compact(folder: options.Folder, as_json: options.Json = False) -> None:
    """Merges small files and frees the space of removed videos.

    Examples:
        keyreel library compact lib
        keyreel library compact lib --json
    """
    from keyreel.cli.documents import Compact

    with keyreel.Library(folder) as library:
        given_back = library.compact()
    if as_json:
        print_json(Compact(library=folder, bytes=given_back))
    else:
        print_line(f"{given_back / 1e6:.1f} MB freed")


def upgrade(folder: options.Folder, as_json: options.Json = False) -> None:
    """Converts a library of an older keyreel and keeps its content.

    Examples:
        keyreel library upgrade lib
        keyreel library upgrade lib --json
    """
    from keyreel.cli.documents import Upgrade

    with keyreel.Library(folder) as library:
        videos = library.upgrade()
    if as_json:
        print_json(Upgrade(library=folder, videos=videos))
    else:
        without = "; `keyreel library update --force` adds subject vectors" if videos else ""
        print_line(f"{plural(videos, 'video')} converted{without}")


WORK, SAFETY = "Work and limits", "Safety"  # panels
Service = Annotated[
    ServeConfig,
    Made(
        ServeConfig,
        host=Annotated[str, Option(metavar="ADDRESS", help="address to listen on; the default is this machine only")],
        port=Annotated[int, Option(metavar="N", help="port to listen on; 0 takes a free one")],
        roots=Annotated[
            list[str] | None,
            Option("--root", metavar="DIR", help="videos in DIR may be indexed and played; repeat for more"),
        ],
        hosts=Annotated[
            list[str] | None,
            Option("--answer-to", metavar="NAME", rich_help_panel=SAFETY, help="accepted Host header, * for all"),
        ],
        folder=Annotated[
            str | None,
            Option(metavar="DIR", rich_help_panel=WORK, help="for uploads and jobs; default: serve/ in the library"),
        ],
        threads=Annotated[int, Option(metavar="N", rich_help_panel=WORK, help="requests at the same time")],
        timeout_seconds=Annotated[
            float, Option(metavar="SECONDS", rich_help_panel=WORK, help="longest work on one request (504)")
        ],
        job_threads=Annotated[int, Option(metavar="N", rich_help_panel=WORK, help="videos indexed at the same time")],
        max_jobs=Annotated[int, Option(metavar="N", rich_help_panel=WORK, help="jobs that may wait; others get 429")],
        upload_bytes=Annotated[int, Option(metavar="BYTES", rich_help_panel=WORK, help="largest upload")],
        upload_quota=Annotated[
            int | None, Option(min=1, metavar="BYTES", rich_help_panel=WORK, help="largest sum of all uploads (507)")
        ],
        drain_seconds=Annotated[
            float,
            Option(metavar="SECONDS", rich_help_panel=WORK, help="after SIGTERM, time to finish requests and jobs"),
        ],
    ),
]


def serve(
    *,
    library: Annotated[str, Option(metavar="DIR", help="the library: a folder or an s3:// address")],
    token_file: Annotated[
        Path | None, Option(metavar="FILE", help="file with the token that clients must send; needed with --host")
    ] = None,
    service: Service,
    model: options.Model = None,
    device: options.Device = "auto",
) -> None:
    """Serves a library over HTTP, with a search page; needs the extra `serve`.

    Examples:
        keyreel serve --library lib --root ~/Videos
        keyreel serve --library lib --host 0.0.0.0 --token-file token.txt
    """
    from keyreel.serve import run

    token = None if token_file is None else token_file.read_text("utf-8").strip()
    config = dataclasses.replace(service, token=token)
    if not (config.loopback or config.token):
        warning = f"WARNING: anyone who reaches {config.host} can search, add and remove videos; use --token-file"
        log(warning, style="bold red")
    with open_library(library, model, device) as opened:
        run(opened, config, listening=lambda address: log(f"serving {library} at {address}; ctrl-c stops"))
