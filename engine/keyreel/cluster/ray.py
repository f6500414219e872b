"""Indexing on a Ray cluster: one Engine a worker, each writes into the library by itself.

What a worker makes goes straight into the library; what comes back to the driver is one line a video. A worker that
dies is started again and goes on with the video it was at: what had been committed by then stays. A video that takes
its worker along time after time is given up and told as failed, and the others go on.

Every worker must reach the videos under the paths that are given, the library under its URI, and have the model. On
the driver's standard output Ray itself says when a worker has died.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from keyreel.config import IndexConfig, LibraryConfig, RayConfig
from keyreel.engine import Engine
from keyreel.errors import BackendError, Failure, KeyreelError, import_extra
from keyreel.library.files import name_of
from keyreel.library.library import Library
from keyreel.library.types import Added, Change
from keyreel.runtime.bundle import BUILTIN

LOCAL = "local"  # Ray's word for a cluster that is started here and ends with the driver
# Names and lines are all that goes through the object store; Ray takes a third of the memory unless it is told.
_STORE_BYTES = 128 << 20
# Videos that a worker takes at a time: for each lot it reads what the library holds, and says at its end what became of
# them. Each worker gets at least so many lots, so that none waits long for the last one.
_MOST_VIDEOS, _LEAST_LOTS = 32, 32
Line = dict[str, Any]  # what became of one video: strings and numbers


def index(
    paths: Iterable[str | os.PathLike[str]],
    uri: str | os.PathLike[str],
    config: IndexConfig | None = None,
    *,
    model: str | os.PathLike[str] = BUILTIN,
    device: str = "auto",
    address: str | None = None,
    library: LibraryConfig | None = None,
    storage_options: Mapping[str, str] | None = None,
    ray: RayConfig | None = None,
    tell: Callable[[Added], None] | None = None,
) -> list[Added]:
    """Adds videos to a library with the workers of a Ray cluster; the library is then as after `Library.add`.

    Args:
        paths: one for each video; relative ones are this process's.
        uri: of the library. A folder must be one that all workers share.
        config: how; its workers are processes, each with an Engine.
        address: "auto", "ray://host:10001" or "host:6379"; by default Ray is started on this machine, with as many CPUs
            as the workers ask for and no dashboard, and ended afterwards. A Ray that this process is connected to
            already is used as it is.
        ray: what each worker asks Ray for.
        tell: called in this process with what became of each video, some at a time.

    Returns:
        One for each video, in the order in which they ended, without records: `Library.record` has them.

    Raises:
        MissingExtra: Ray is not installed.
        BackendError: there is no Ray at that address.
    """
    config, own = config or IndexConfig(), ray or RayConfig()
    data = import_extra("ray.data", extra="ray", purpose="indexing on a cluster")
    videos = list(dict.fromkeys(name_of(path) for path in paths))
    if not videos:
        return []
    job = {
        "uri": name_of(uri),  # workers have a working directory of their own
        "engine": {"model": os.fspath(model), "device": device, "threads": max(1, int(own.cpus))},
        "library": {"config": library, "storage_options": storage_options},
        "config": replace(config, workers=1),
    }
    found: list[Added] = []
    with _connected(address, cpus=config.workers * own.cpus, gpus=config.workers * own.gpus):
        for line in _lines(data, videos, job, config.workers, own):
            found.append(_added(line))
            if tell is not None:
                tell(found[-1])
    return found


@contextmanager
def _connected(address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Ray for the time of the block. `ray.init` turns Ray's usage reports off for a cluster that it starts."""
    ray = import_extra("ray", extra="ray", purpose="indexing on a cluster")
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address or LOCAL}
    if options["address"] == LOCAL:
        options |= {"num_cpus": math.ceil(cpus), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        options |= {"num_gpus": math.ceil(gpus)} if gpus else {}
    try:
        ray.init(configure_logging=False, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"no Ray at {options['address']!r}: {error}", hint="`ray status` says what runs") from error
    try:
        yield
    finally:
        ray.shutdown()


def _lines(data: Any, videos: Sequence[str], job: Mapping[str, Any], workers: int, config: RayConfig) -> Iterator[Line]:
    """Runs the job."""
    ray = import_extra("ray", extra="ray", purpose="indexing on a cluster")
    ledger = ray.remote(num_cpus=0)(_Ledger).remote()
    size = min(max(len(videos) // (workers * _LEAST_LOTS), 1), _MOST_VIDEOS)
    lots = [{"videos": videos[start : start + size]} for start in range(0, len(videos), size)]
    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    with data.DataContext.current(context):
        # One lot a block, one block at a time with a worker. Ray Data starts workers that died again, and gives them
        # their blocks again, without end: the ledger sets it.
        lines = data.from_items(lots, override_num_blocks=len(lots)).flat_map(
            _Worker,
            fn_constructor_args=(job, ledger, 1 + config.retries),
            compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=config.cpus,
            num_gpus=config.gpus or None,
        )
        yield from lines.iter_rows()


class _Ledger:
    """Which videos were begun and ended in the lots under way, in a process that outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._ended: dict[str, Line] = {}

    def known(self, videos: Sequence[str]) -> tuple[dict[str, int], dict[str, Line]]:
        """How often each was begun, and the lines of those that ended."""
        ended = {video: self._ended[video] for video in videos if video in self._ended}
        return {video: self._begun[video] for video in videos}, ended

    def begin(self, video: str) -> None:
        self._begun[video] += 1

    def end(self, line: Line) -> None:
        self._ended[line["path"]] = line

    def forget(self, videos: Sequence[str]) -> None:
        for video in videos:
            self._begun.pop(video, None)
            self._ended.pop(video, None)


class _Worker:
    """Lives in a process of the cluster; opens the model and the library with its first videos."""

    def __init__(self, job: Mapping[str, Any], ledger: Any, most: int) -> None:
        self._job, self._ledger, self._most = job, ledger, most
        self._library: Library | None = None

    def __call__(self, row: Mapping[str, Any]) -> list[Line]:
        ray = import_extra("ray", extra="ray", purpose="indexing on a cluster")
        videos = [str(video) for video in row["videos"]]
        begun, lines = ray.get(self._ledger.known.remote(videos))
        for video in videos:
            if video not in lines and begun[video] >= self._most:
                error = KeyreelError(f"{video!r}: its worker died {self._most} times", hint="index it alone and look")
                lines[video] = _line(video, _failed(video, error))
        current = ""

        def begin(video: str) -> Callable[..., None]:
            nonlocal current
            current = video
            ray.get(self._ledger.begin.remote(video))
            return lambda *_: None

        def tell(added: Added) -> None:
            lines[current] = _line(current, added)
            self._ledger.end.remote(lines[current])

        waiting = [video for video in videos if video not in lines]
        try:
            self._opened().add(waiting, self._job["config"], begin=begin, tell=tell)
        except Exception as error:  # noqa: BLE001 - a model or library that will not open is said of each video
            for video in waiting:
                lines.setdefault(video, _line(video, _failed(video, error)))
        self._ledger.forget.remote(videos)
        # What `add` left out is another name of a file that it has.
        return [lines.get(video) or _line(video, Added(video, "unchanged", None, None, 0.0)) for video in videos]

    def _opened(self) -> Library:
        if self._library is None:
            engine = Engine.from_pretrained(**self._job["engine"])
            self._library = Library(self._job["uri"], engine, **self._job["library"])
        return self._library


def _failed(video: str, error: Exception) -> Added:
    return Added(video, "failed", None, Failure.of(video, error), 0.0)


def _line(video: str, added: Added) -> Line:
    error = None if added.failure is None else added.failure.error
    return {
        "path": video,
        "change": added.change,
        "seconds": added.seconds,
        "error": "" if error is None else str(error.args[0]),
        "hint": "" if error is None else error.hint or "",
        "exit_code": 0 if error is None else error.exit_code,
    }


def _added(line: Line) -> Added:
    """The line as what `Library.add` gives."""
    failure = None
    if line["error"]:
        error = KeyreelError(line["error"], hint=line["hint"] or None)
        error.exit_code = int(line["exit_code"])
        failure = Failure(line["path"], error)
    return Added(line["path"], cast(Change, line["change"]), None, failure, float(line["seconds"]))
