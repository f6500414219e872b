"""`keyreel index` and `keyreel library update`: many videos into a library, once or for as long as a folder grows."""

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
from typing import Annotated, Any

import typer

from keyreel import Library
from keyreel.cli.app import (
    ENCODING,
    NETWORK,
    SAMPLING,
    Device,
    Field,
    Json,
    OwnModel,
    Quiet,
    command,
    end,
    library_app,
    picked,
)
from keyreel.cli.documents import change_of, index_document
from keyreel.cli.inputs import listed, within
from keyreel.cli.library import Folder, model_of, opened
from keyreel.cli.output import counted, errors, out, print_failures, print_json, reason, say, shown
from keyreel.cli.progress import Bars
from keyreel.config import DecodeLimits, EncodeConfig, IndexConfig, Sampling, option
from keyreel.errors import Failure, KeyreelError
from keyreel.library.types import Added

_HOW: tuple[Field, ...] = (*SAMPLING, *ENCODING, *NETWORK)


@dataclasses.dataclass(frozen=True, slots=True)
class Rounds:
    """What happens besides adding videos."""

    prune: bool = option(False, "remove from the library what is gone from the folders")
    watch: bool = option(False, "go on looking for new and changed videos, until ctrl-c")
    watch_seconds: float = option(2.0, "between two looks of --watch; a file that stays the same is done")

    def __post_init__(self) -> None:
        if not 0 < self.watch_seconds <= 86_400:
            raise ValueError(f"watch_seconds must be in (0, 86400], got {self.watch_seconds}")


_WORK: tuple[Field, ...] = ((IndexConfig, "workers"), (IndexConfig, "force"))
INDEXING: tuple[Field, ...] = (*_HOW, *_WORK, *((Rounds, field.name) for field in dataclasses.fields(Rounds)))
ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+")  # of a Ray cluster
DONE = ("added", "changed", "moved", "copied", "unchanged", "removed", "missing", "failed")  # order of the last line

Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="a word for these videos; repeatable")]


class Run:
    """What became of the videos so far, and how it is told."""

    def __init__(self, library: str, bars: Bars, *, as_json: bool, each: bool) -> None:
        self.library, self.bars, self.as_json, self.each = library, bars, as_json, each
        self._last: dict[str, Added] = {}  # of each video: a file that is watched may come several times
        self.refused: list[Failure] = []
        self._began = time.monotonic()

    @property
    def found(self) -> list[Added]:
        return list(self._last.values())

    @property
    def failed(self) -> list[Failure]:
        return [*self.refused, *(added.failure for added in self.found if added.failure is not None)]

    @property
    def succeeded(self) -> int:
        return sum(added.failure is None for added in self.found)

    def tell(self, added: Added) -> None:
        """One more video is done."""
        self._last[added.path] = added
        self.bars.finish()
        if self.each and not self.as_json and added.change != "unchanged":
            line = f"{change_of(added)}: {added.path}" + (f": {reason(added.failure)}" if added.failure else "")
            out().print(shown(line), markup=False, soft_wrap=True)

    def finish(self) -> None:
        """The table of what failed, and one line for all."""
        seconds = time.monotonic() - self._began
        if self.as_json:
            print_json(index_document(self.library, self.found, self.failed, seconds))
            return
        print_failures(self.failed)
        for gone in (added.path for added in self.found if change_of(added) == "missing"):
            say(f"missing: {gone}", style="yellow")
        counts = Counter(map(change_of, self.found))
        told = ", ".join(f"{counts[change]} {change}" for change in DONE if counts[change]) or "nothing to do"
        fresh = [a.record for a in self.found if a.record and a.change in ("added", "changed")]
        frames, length = sum(r.frames for r in fresh), sum(r.duration_seconds or 0.0 for r in fresh)
        made = f"; {counted(frames, 'frame')} of {length:.1f} s of video" if fresh else ""
        out().print(
            f"{counted(len(self.found), 'video')}: {told}{made} in {seconds:.1f} s -> {shown(self.library)}",
            markup=False,
            soft_wrap=True,
        )


def index(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="videos, folders, or - for a list on standard input")
    ],
    library: Annotated[str, typer.Option(metavar="DIR", help="folder or s3:// address; made where there is none")],
    tag: Tags = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="on a Ray cluster: --ray auto, --ray ray://HOST:PORT; --ray alone starts one")
    ] = False,
    model: OwnModel = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Brings videos into a library that can be searched; goes on where it was left."""
    config, rounds = _config(options, tag), Rounds(**picked(Rounds, options))
    if ray and (rounds.watch or rounds.prune):
        raise ValueError("--ray goes with neither --watch nor --prune")
    if ray and config.limits.allow_network:
        raise ValueError("--ray opens no URLs")
    address = next((p for p in paths if ray and ADDRESS.fullmatch(p) and not os.path.exists(p)), None)
    names = [name for name in paths if name != address]
    if "-" in names:
        place = names.index("-")
        names[place : place + 1] = [os.path.join(".", n) if n == "-" else n for n in listed(sys.stdin.buffer.read())]
    if not names:
        raise ValueError("there is no video to index: give files, folders, or - for a list on standard input")
    if ray:
        with Bars(errors, quiet=quiet) as bars:
            run = Run(library, bars, as_json=as_json, each=False)
            videos = _videos(names, run)
            _interruptible(run, lambda: _on_ray(videos, run, model, device, address, config))
    else:
        with opened(library, model, device) as there, Bars(errors, quiet=quiet) as bars:
            run = Run(library, bars, as_json=as_json, each=rounds.watch)

            def add(videos: Sequence[Path | str]) -> None:
                there.add(videos, config, progress=bars.whole, begin=bars.start, tell=run.tell)

            def once() -> None:
                add(_videos(names, run))
                if rounds.prune:
                    _prune(there, names, run)

            _interruptible(run, once if not rounds.watch else lambda: _watch(names, add, there, run, rounds))
    end(run.failed, run.succeeded)


@command(*_HOW, *_WORK, (Rounds, "prune"), group=library_app)
def update(
    folder: Folder,
    tag: Tags = None,
    model: OwnModel = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Looks at every video of a library again: indexes those that changed, tells those that are gone."""
    config = _config(options, tag)
    with opened(folder, model, device) as there, Bars(errors, quiet=quiet) as bars:
        run = Run(folder, bars, as_json=as_json, each=False)
        told: dict[str, Any] = {"progress": bars.whole, "begin": bars.start, "tell": run.tell}

        def once() -> None:
            for added in there.update(config, prune=options["prune"], **told):
                run.tell(added)  # once more: what was missing is removed by now

        _interruptible(run, once)
    end(run.failed, run.succeeded)


def _config(options: dict[str, Any], tag: Sequence[str] | None) -> IndexConfig:
    return IndexConfig(
        sampling=Sampling(**picked(Sampling, options)),
        encode=EncodeConfig(**picked(EncodeConfig, options)),
        limits=DecodeLimits(**picked(DecodeLimits, options)),
        tags=tuple(tag or ()),
        **picked(IndexConfig, options),
    )


def _videos(names: Sequence[str], run: Run) -> list[Path | str]:
    """What the names stand for; folders without any video are told."""
    videos: list[Path | str] = []
    for name, found in within(names):
        if isinstance(found, KeyreelError):
            run.refused.append(Failure(name, found))
        else:
            videos.append(found)
    return videos


def _interruptible(run: Run, work: Callable[[], object]) -> None:
    """Also what was done until ctrl-c is told; it stays, and the next run goes on from there."""
    try:
        work()
    except KeyboardInterrupt:
        run.bars.stop()
        if run.found:
            run.finish()
        raise
    run.bars.stop()
    run.finish()


def _on_ray(
    videos: Sequence[Path | str], run: Run, model: str | None, device: str, address: str | None, config: IndexConfig
) -> None:
    from keyreel.cluster import ray

    def tell(added: Added) -> None:
        run.tell(added)
        run.bars.whole("videos", len(run.found), len(videos))

    run.bars.whole("videos", 0, len(videos))
    model = model or model_of(run.library)
    # Ray says on standard output when a worker has died.
    with contextlib.redirect_stdout(sys.stderr):
        ray.index(videos, run.library, config, model=model, device=device, address=address, tell=tell)


def _prune(there: Library, names: Sequence[str], run: Run) -> tuple[str, ...]:
    """Removes what is gone from the folders, and names these. One without any video may be a disk that is not there:
    nothing is removed."""
    full = {name for name, found in within(names) if isinstance(found, Path)}
    folders = tuple(os.path.join(os.path.abspath(name), "") for name in full)
    if not folders:
        return ()
    gone = [r.id for r in there.list() if r.path.startswith(folders) and _is_gone(r.path)]
    for record in there.remove(gone) if gone else ():
        run.tell(Added(record.path, "missing", None, None, 0.0))
    return folders


def _is_gone(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # a folder that cannot be read says nothing of what is in it
        return False
    return False


def _watch(
    names: Sequence[str],
    add: Callable[[Sequence[Path | str]], None],
    there: Library,
    run: Run,
    rounds: Rounds,
) -> None:
    """Adds videos as they settle: size and time of change are equal in two looks. Ctrl-c ends it."""
    say("watching; ctrl-c ends", style="dim")
    before: dict[Path | str, tuple[int, int]] = {}
    done: dict[Path | str, tuple[int, int]] = {}
    try:
        while True:
            now = _states(names)
            if settled := [path for path, state in now.items() if before.get(path) == state != done.get(path)]:
                add(settled)
                done |= {path: now[path] for path in settled}
            # Not while something is new: it may be what was moved away.
            if rounds.prune and done.keys() - now.keys() and all(done.get(path) == now[path] for path in now):
                pruned = _prune(there, names, run)
                done = {p: state for p, state in done.items() if p in now or not os.path.abspath(p).startswith(pruned)}
            before = now
            time.sleep(rounds.watch_seconds)
    except KeyboardInterrupt:
        return


def _states(names: Sequence[str]) -> dict[Path | str, tuple[int, int]]:
    """(size, time of the last change) of every video that is there."""
    states = {}
    for _, found in within(names):
        if not isinstance(found, KeyreelError) and os.path.isfile(found):
            try:
                state = os.stat(found)
            except OSError:  # gone, or never to be read: looked at again the next time
                continue
            states[found] = (state.st_size, state.st_mtime_ns)
    return states
