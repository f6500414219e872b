"""The commands for libraries: list, stats, remove, export, verify, compact, upgrade, reshard, serve."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.output import clock, log, plural, print_answer, print_json, print_table, printable
from keyreel.cli.signature import Made
from keyreel.config import ClusterConfig, LibraryConfig, ServeConfig
from keyreel.errors import Damaged, LibraryError, import_extra

if TYPE_CHECKING:
    from keyreel import Library

CLUSTER = ClusterConfig()  # defaults


@contextlib.contextmanager
def open_library(
    uri: str, model: str | None, device: str, config: LibraryConfig | None = None, *, images: bool = True
) -> Iterator[Library]:
    """Opens a library with an engine; by default with its own model. For `images` see `Engine.from_pretrained`."""
    model = model or model_of(uri)
    with (
        keyreel.Engine.from_pretrained(model, device=device, images=images) as engine,
        keyreel.Library(uri, engine, config=config) as library,
    ):
        yield library


def model_of(uri: str) -> str:
    """The name of a library's model; the built-in one if there is no library."""
    with keyreel.Library(uri) as library:
        return library.model if library.exists() else "builtin"


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
    size = "unknown" if found.bytes is None else f"{found.bytes / 1e6:.1f} MB"
    print_answer(
        Stats(library=folder, **dataclasses.asdict(found)),
        f"videos  {found.videos}, {found.failed} of them failed",
        f"frames  {found.frames} of {found.hours:.3g} hours of video",
        f"size    {size}",
        f"model   {found.model} ({found.model_sha256[:12]}), {found.width} numbers a frame",
        as_json=as_json,
    )


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
    print_answer(Videos.of(folder, removed), *(f"removed: {record.path}" for record in removed), as_json=as_json)


def export(
    folder: options.Folder,
    parquet: Annotated[Path, Option(metavar="DIR", help="write vectors.parquet into this folder")],
    overwrite: Annotated[bool, Option("--overwrite", help="replace an existing file")] = False,
    as_json: options.Json = False,
) -> None:
    """Writes all vectors with their videos, times and tags as Parquet.

    Vector databases and pandas read it.

    Examples:
        keyreel library export lib --parquet vectors
        keyreel library export lib --parquet vectors --overwrite --json
    """
    from keyreel.cli.documents import Export

    with keyreel.Library(folder) as library:
        count = library.export_parquet(parquet, overwrite=overwrite)
    path = str(parquet / "vectors.parquet")
    document = Export(library=folder, file=path, vectors=count)
    print_answer(document, f"{plural(count, 'vector')} -> {path}", as_json=as_json)


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
    lines = []
    for finding in findings:
        lines.append(f"{'repaired' if finding.repaired else finding.kind}: {finding.what}")
        lines += [f"  {video}" for video in finding.videos]
    document = Verify(library=folder, findings=findings)
    print_answer(document, *(lines or ["nothing is damaged"]), as_json=as_json)
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
        freed = library.compact()
    print_answer(Compact(library=folder, bytes=freed), f"{freed / 1e6:.1f} MB freed", as_json=as_json)


def upgrade(folder: options.Folder, as_json: options.Json = False) -> None:
    """Converts a library of an older keyreel and keeps its content.

    Examples:
        keyreel library upgrade lib
        keyreel library upgrade lib --json
    """
    from keyreel.cli.documents import Upgrade

    with keyreel.Library(folder) as library:
        videos = library.upgrade()
    without = "; `keyreel library update --force` adds subject vectors" if videos else ""
    document = Upgrade(library=folder, videos=videos)
    print_answer(document, f"{plural(videos, 'video')} converted{without}", as_json=as_json)


def reshard(
    folder: options.Folder,
    shards: Annotated[int, Option(min=1, max=1024, metavar="N", help="how many")],
    as_json: options.Json = False,
) -> None:
    """Spreads a library over N shards, which are written and served apart.

    Examples:
        keyreel library reshard lib --shards 4
        keyreel library reshard s3://bucket/library --shards 16 --json
    """
    from keyreel.cli.documents import Reshard

    with keyreel.Library(folder) as library:
        videos = library.reshard(shards)
    document = Reshard(library=folder, shards=shards, videos=videos)
    print_answer(document, f"{plural(videos, 'video')} spread over {plural(shards, 'shard')}", as_json=as_json)


WORK, SAFETY, CLUSTERED = "Work and limits", "Safety", "Cluster"  # panels
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
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            rich_help_panel=CLUSTERED,
            help="serve from a Ray cluster: auto, HOST:PORT, or local to start one; needs the extra `cluster`",
        ),
    ] = None,
    replicas: Annotated[
        int, Option(min=1, metavar="N", rich_help_panel=CLUSTERED, help="processes that answer requests, with --ray")
    ] = CLUSTER.replicas,
    wait: Annotated[
        bool, Option("--wait", rich_help_panel=CLUSTERED, help="with --ray, wait for shards that are lost")
    ] = CLUSTER.wait,
) -> None:
    """Serves a library over HTTP, with a search page; needs the extra `serve`.

    Examples:
        keyreel serve --library lib --root ~/Videos
        keyreel serve --library lib --host 0.0.0.0 --token-file token.txt
    """
    token = None if token_file is None else token_file.read_text("utf-8").strip()
    config = dataclasses.replace(service, token=token)
    if not (config.loopback or config.token):
        warning = f"WARNING: anyone who reaches {config.host} can search, add and remove videos; use --token-file"
        log(warning, style="bold red")

    def listening(address: str) -> None:
        log(f"serving {library} at {address}; ctrl-c stops")

    if ray is not None:
        _serve_on_ray(library, model, device, token_file, config, ray, {"replicas": replicas, "wait": wait}, listening)
        return
    from keyreel.serve import run

    with open_library(library, model, device) as opened:
        run(opened, config, listening=listening)


def _serve_on_ray(
    library: str,
    model: str | None,
    device: str,
    token_file: Path | None,
    config: ServeConfig,
    address: str,
    cluster: dict[str, Any],
    listening: Callable[[str], None],
) -> None:
    import_extra("ray.serve", extra="cluster", purpose="keyreel serve --ray")
    from keyreel.cluster.serving import run

    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if config.folder is None and "://" in library:
        raise LibraryError(f"{library} is not a folder: give the service one that all nodes share", hint="--folder DIR")
    given["folder"] = os.path.abspath(config.folder or os.path.join(library, "serve"))
    given |= {"library": library, "model": model, "device": device, **cluster}
    given["token_file"] = None if token_file is None else os.path.abspath(token_file)
    del given["token"]
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints here
        run(given, address=None if address == "local" else address, listening=listening)
