"""`keyreel index`, `keyreel library update` and `reindex`: many videos into a library, once or with --watch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.inputs import exit_for, listed, within
from keyreel.cli.library import model_of, open_library
from keyreel.cli.models import ensure
from keyreel.cli.output import clock, log, log_failures, plural, print_json, print_line, print_table, reason
from keyreel.cli.progress import Bars
from keyreel.config import IndexConfig, LibraryConfig
from keyreel.errors import Failure, KeyreelError

if TYPE_CHECKING:
    from keyreel import Library
    from keyreel.library.types import Added, Record

INDEXING = IndexConfig()  # defaults
RAY_ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+")
CHANGES = ("added", "changed", "moved", "copied", "unchanged", "removed", "missing", "failed")  # order of the last line

Name: TypeAlias = Path | str
NewTags = Annotated[list[str] | None, Option("--tag", metavar="WORD", help="a tag for these videos; repeat for more")]
Force = Annotated[bool, Option("--force", help="index unchanged videos again, too")]
Prune = Annotated[bool, Option("--prune", help="remove videos from the library whose files are deleted")]


def index(
    *,
    paths: Annotated[list[str], Argument(metavar="PATH", help="videos, folders, or - for a list on standard input")],
    library: Annotated[str, Option(metavar="DIR", help="a folder or an s3:// address; created if it is missing")],
    tag: NewTags = None,
    config: options.Indexing,
    model: options.Model = None,
    yes: options.Yes = False,
    device: options.Device = "auto",
    force: Force = INDEXING.force,
    prune: Prune = False,
    dry_run: Annotated[bool, Option("--dry-run", help="only print what would be done and why; write nothing")] = False,
    watch: Annotated[bool, Option("--watch", help="keep looking for new and changed videos until ctrl-c")] = False,
    watch_seconds: Annotated[
        float, Option(metavar="SECONDS", rich_help_panel=options.LIMITS, help="pause between two looks of --watch")
    ] = 2.0,
    shards: Annotated[
        int | None,
        Option(
            min=1,
            max=1024,
            metavar="N",
            rich_help_panel=options.LIMITS,
            help="spread a new library over N shards, which are written apart",
        ),
    ] = None,
    ray: Annotated[
        bool, Option("--ray", help="on a Ray cluster: --ray auto, --ray ray://HOST:PORT; --ray alone starts one")
    ] = False,
    hidden: options.Hidden = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Adds videos to a library that can be searched.

    Unchanged videos are skipped: run it again after an interrupt, or when there are new videos.

    Examples:
        keyreel index ~/Videos --library lib --dry-run
        keyreel index ~/Videos --library lib --workers 2 --tag holiday
    """
    config = dataclasses.replace(config, tags=tuple(tag or ()), force=force)
    if not 0 < watch_seconds <= 86_400:
        raise ValueError(f"watch_seconds must be in (0, 86400], got {watch_seconds}")
    if ray and (watch or prune):
        raise ValueError("--ray does not work with --watch or --prune")
    if ray and config.limits.allow_network:
        raise ValueError("--ray does not work with --allow-network")
    if dry_run and (ray or watch):
        raise ValueError("--dry-run does not work with --ray or --watch")
    keeping = LibraryConfig(shards=shards)
    address = next((p for p in paths if ray and RAY_ADDRESS.fullmatch(p) and not os.path.exists(p)), None)
    names = [name for name in paths if name != address]
    if "-" in names:
        place = names.index("-")
        # A file may also be called "-".
        names[place : place + 1] = [os.path.join(".", n) if n == "-" else n for n in listed(sys.stdin.buffer.read())]
    if not names:
        raise ValueError("no video to index: give files, folders, or - for a list on standard input")
    if dry_run:
        _dry_run(names, library, config, model, prune=prune, hidden=hidden, as_json=as_json)
        return
    ensure(model, yes=yes, quiet=quiet)
    if ray:
        with Bars(quiet=quiet) as bars, Report(library, bars, as_json=as_json, hidden=hidden) as report:
            _index_on_ray(report, names, model, device, address, config, keeping)
    else:
        with (
            open_library(library, model, device, keeping) as opened,
            Bars(quiet=quiet) as bars,
            Report(library, bars, as_json=as_json, each=watch, hidden=hidden) as report,
        ):

            def add(videos: Sequence[Name]) -> None:
                opened.add(videos, config, progress=bars.whole, begin=bars.start, tell=report.add)

            if watch:
                _watch(report, names, add, opened, watch_seconds, prune=prune)
            else:
                add(report.videos(names))
                if prune:
                    _prune(report, names, opened)
    exit_for(report.failed, report.succeeded)


def update(
    *,
    folder: options.Folder,
    tag: NewTags = None,
    config: options.Indexing,
    model: options.Model = None,
    device: options.Device = "auto",
    force: Force = INDEXING.force,
    prune: Prune = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Checks the videos of a library: indexes changed ones, lists missing ones.

    Examples:
        keyreel library update lib
        keyreel library update lib --prune --workers 2
    """
    config = dataclasses.replace(config, tags=tuple(tag or ()), force=force)
    with (
        open_library(folder, model, device) as library,
        Bars(quiet=quiet) as bars,
        Report(folder, bars, as_json=as_json) as report,
    ):
        found = library.update(config, prune=prune, progress=bars.whole, begin=bars.start, tell=report.add)
        for added in found:  # once more: what was missing is removed by now
            report.add(added)
    exit_for(report.failed, report.succeeded)


def reindex(
    *,
    folder: options.Folder,
    model: Annotated[
        str, Option(metavar="NAME|FOLDER", autocompletion=options.known_models, help="the new model, or builtin")
    ],
    config: options.Indexing,
    yes: options.Yes = False,
    device: options.Device = "auto",
    drop_failed: Annotated[
        bool, Option("--drop-failed", help="change the model even if some videos can no longer be read")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Changes the model of a library.

    Searches use the old model until all videos are done. Run it again to continue after an interrupt.

    Examples:
        keyreel library reindex lib --model ViT-B-32-256/datacomp_s34b_b86k
        keyreel library reindex lib --model builtin --drop-failed
    """
    from keyreel.library.reindex import reindex

    ensure(model, yes=yes, quiet=quiet)
    with (
        keyreel.Engine.from_pretrained(model, device=device) as engine,
        Bars(quiet=quiet) as bars,
        Report(folder, bars, as_json=as_json) as report,
    ):
        done = reindex(
            folder,
            engine,
            config,
            drop_failed=drop_failed,
            progress=bars.whole,
            begin=bars.start,
            tell=report.add,
        )
    if done.done:
        log(f"the library now has the model {engine.bundle.name}")
    else:
        log("the library keeps its old model: some videos failed. Repair these files, or use --drop-failed")
    exit_for(report.failed, report.succeeded)


class Report:
    """Collects the result of each video; prints them at the end of its `with` block, also after Ctrl-C."""

    def __init__(self, library: str, bars: Bars, *, as_json: bool, each: bool = False, hidden: bool = False) -> None:
        self.library, self.bars, self.as_json, self.each, self.hidden = library, bars, as_json, each, hidden
        self.found: dict[str, Added] = {}  # by path, the last one: a watched file can change again
        self._refused: list[Failure] = []
        self._began = time.monotonic()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bars.stop()
        if kind is None or (kind is KeyboardInterrupt and self.found):
            self._print()

    @property
    def failed(self) -> list[Failure]:
        return [*self._refused, *(added.failure for added in self.found.values() if added.failure is not None)]

    @property
    def succeeded(self) -> int:
        return sum(added.failure is None for added in self.found.values())

    def videos(self, names: Sequence[str]) -> list[Name]:
        """Finds the videos of the names. A folder without a video counts as failed."""
        found = list(within(names, hidden=self.hidden))
        self._refused += [Failure(name, error) for name, error in found if isinstance(error, KeyreelError)]
        return [video for _, video in found if not isinstance(video, KeyreelError)]

    def add(self, added: Added) -> None:
        """Adds the result of a video; a callback for the library."""
        from keyreel.cli.documents import change_of

        self.found[added.path] = added
        self.bars.finish()
        if self.each and not self.as_json and added.change != "unchanged":
            why = f": {reason(added.failure)}" if added.failure else ""
            print_line(f"{change_of(added)}: {added.path}{why}")

    def _print(self) -> None:
        from keyreel.cli.documents import Index, IndexedVideo, change_of
        from keyreel.render.documents import FailedVideo

        seconds, found = time.monotonic() - self._began, self.found.values()
        if self.as_json:
            videos, failed = list(map(IndexedVideo.of, found)), list(map(FailedVideo.of, self.failed))
            print_json(Index(library=self.library, videos=videos, failed=failed, seconds=seconds))
            return
        log_failures(self.failed)
        counts: Counter[str] = Counter(map(change_of, found))
        for added in found:
            if change_of(added) == "missing":
                log(f"missing: {added.path}", style="yellow")
        changes = ", ".join(f"{counts[change]} {change}" for change in CHANGES if counts[change]) or "nothing to do"
        fresh = [added.record for added in found if added.record and added.change in ("added", "changed")]
        frames, length = sum(r.frames for r in fresh), sum(r.duration_seconds or 0.0 for r in fresh)
        made = f"; {plural(frames, 'frame')} of {length:.1f} s of video" if fresh else ""
        print_line(f"{plural(len(found), 'video')}: {changes}{made} in {seconds:.1f} s -> {self.library}")


def _index_on_ray(
    report: Report,
    names: Sequence[str],
    model: str | None,
    device: str,
    address: str | None,
    config: IndexConfig,
    library: LibraryConfig,
) -> None:
    from keyreel.cluster import indexing

    videos = report.videos(names)

    def add(added: Added) -> None:
        report.add(added)
        report.bars.whole("videos", len(report.found), len(videos))

    report.bars.whole("videos", 0, len(videos))
    model = model or model_of(report.library)
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints here when a worker has died
        indexing.index(
            videos, report.library, config, model=model, device=device, address=address, library=library, tell=add
        )


def _prune(report: Report, names: Sequence[str], library: Library) -> tuple[str, ...]:
    """Removes videos whose files are missing from the folders. Returns the folders.

    It skips a folder without any video, which may be a disk that is not mounted.
    """
    from keyreel.library.types import Added

    folders, gone = _gone(names, library, hidden=report.hidden)
    for record in library.remove([record.id for record in gone]) if gone else ():
        report.add(Added(record.path, "missing", None, None, 0.0))
    return folders


def _gone(names: Sequence[str], library: Library, *, hidden: bool) -> tuple[tuple[str, ...], list[Record]]:
    """The folders with videos, and the library's videos that are missing from them."""
    from keyreel.library.files import is_gone

    full = {name for name, found in within(names, hidden=hidden, quiet=True) if isinstance(found, Path)}
    folders = tuple(os.path.join(os.path.abspath(name), "") for name in full)
    records = library.list() if folders and library.exists() else []
    return folders, [record for record in records if record.path.startswith(folders) and is_gone(record.path)]


def _dry_run(
    names: Sequence[str],
    library: str,
    config: IndexConfig,
    model: str | None,
    *,
    prune: bool,
    hidden: bool,
    as_json: bool,
) -> None:
    """Prints what `index` would do with each video, and why."""
    from keyreel.cli.documents import Plan, PlannedVideo
    from keyreel.models.install import installed
    from keyreel.render.documents import FailedVideo
    from keyreel.runtime.bundle import BUILTIN

    found = list(within(names, hidden=hidden))
    failed = [Failure(name, error) for name, error in found if isinstance(error, KeyreelError)]
    with keyreel.Library(library) as opened:
        plans = opened.plan([video for _, video in found if not isinstance(video, KeyreelError)], config)
        gone = _gone(names, opened, hidden=hidden)[1] if prune else []
        own = opened.stats().model if opened.exists() else None
    moved = {plan.was for plan in plans if plan.change == "moved"}
    failed += [plan.failure for plan in plans if plan.failure is not None]
    videos = [
        PlannedVideo(plan.path, plan.change, plan.why, plan.duration_seconds) for plan in plans if plan.failure is None
    ]
    videos += [PlannedVideo(r.path, "removed", "its file is deleted", None) for r in gone if r.path not in moved]
    model = model or own or BUILTIN
    here = model in (BUILTIN, *installed()) or os.path.isdir(model)
    if not here:
        log(f"the model {model} is not installed", style="yellow")
    if own is not None and model != own and not os.path.isdir(model):
        log(f"the library has the model {own}: `keyreel library reindex` changes it", style="yellow")
    if as_json:
        failures = list(map(FailedVideo.of, failed))
        print_json(Plan(library=library, model=model, model_installed=here, videos=videos, failed=failures))
    else:
        log_failures(failed)
        print_table(("change", "why", "video"), [(video.change, video.why, video.video) for video in videos])
        counts = Counter(video.change for video in videos) + Counter(failed=len(failed))
        changes = ", ".join(f"{counts[change]} {change}" for change in CHANGES if counts[change]) or "nothing to do"
        length = clock(sum(video.duration_seconds or 0.0 for video in videos))
        print_line(f"would be: {changes}; {length} of video to decode. Nothing was written")
    exit_for(failed, len(videos))


def _watch(
    report: Report,
    names: Sequence[str],
    add: Callable[[Sequence[Name]], None],
    library: Library,
    seconds: float,
    *,
    prune: bool,
) -> None:
    """Adds videos when their size and time of change are the same at two checks in a row, until Ctrl-C."""
    log("watching for new and changed videos; ctrl-c stops", style="dim")
    before: dict[Name, tuple[int, int]] = {}
    done: dict[Name, tuple[int, int]] = {}
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = _states(names, hidden=report.hidden)
            if settled := [path for path, state in now.items() if before.get(path) == state != done.get(path)]:
                add(settled)
                done |= {path: now[path] for path in settled}
            # Not while there are new files: one may be a missing file with a new name.
            if prune and done.keys() - now.keys() and all(done.get(path) == now[path] for path in now):
                pruned = _prune(report, names, library)
                done = {p: state for p, state in done.items() if p in now or not os.path.abspath(p).startswith(pruned)}
            before = now
            time.sleep(seconds)


def _states(names: Sequence[str], *, hidden: bool) -> dict[Name, tuple[int, int]]:
    """(size, time of the last change) of every video file."""
    states: dict[Name, tuple[int, int]] = {}
    for _, found in within(names, hidden=hidden, quiet=True):
        if not isinstance(found, KeyreelError) and os.path.isfile(found):
            with contextlib.suppress(OSError):  # missing or unreadable: the next check tries again
                state = os.stat(found)
                states[found] = (state.st_size, state.st_mtime_ns)
    return states
