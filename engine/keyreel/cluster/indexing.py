"""Indexes on a Ray cluster: each worker has an Engine, and writes into the library itself.

Only names and one line per video travel. Ray restarts a dead worker and retries its video. A video that kills its
worker repeatedly fails; the others go on. Every worker must reach the videos under the given paths and the library
under its URI, and must have the model. Ray reports dead workers on the driver's standard output.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from keyreel.config import IndexConfig, LibraryConfig, RayConfig
from keyreel.engine import Engine
from keyreel.errors import BackendError, Failure, KeyreelError, import_extra
from keyreel.library.files import name_of
from keyreel.library.library import Library
from keyreel.library.types import Added
from keyreel.runtime.bundle import BUILTIN

LOCAL = "local"  # Ray's name for a cluster that starts here and ends with the driver
RETRIES = 2  # the error of a video whose worker died
_STORE_BYTES = 128 << 20  # bytes of Ray's object store, by default a third of the memory


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
    """Adds videos to a library with the workers of a Ray cluster. The result is that of `Library.add`.

    Args:
        paths: one for each video; relative ones are relative to this process's folder.
        uri: of the library; a folder must be shared by all workers.
        config: how to index; its workers are processes, each with an Engine.
        address: "auto", "ray://host:10001" or "host:6379". By default it starts Ray on this machine, with as many CPUs
            as the workers request and no dashboard, and ends it afterwards. If this process is already connected to
            Ray, it uses that.
        ray: what each worker requests from Ray.
        tell: called in this process with the result of each video when it ends.

    Returns:
        A result for each video, in the order of their ends, without records: `Library.record` returns those.

    Raises:
        MissingExtra: Ray is not installed.
        BackendError: no Ray at that address.
    """
    config, own = config or IndexConfig(), ray or RayConfig()
    core = import_extra("ray", extra="ray", purpose="indexing on a cluster")
    waiting = list(dict.fromkeys(name_of(path) for path in paths))[::-1]
    found: list[Added] = []
    if not waiting:
        return found
    arguments = {
        "uri": name_of(uri),  # workers have another working folder
        "engine": {"model": os.fspath(model), "device": device, "threads": max(1, int(own.cpus))},
        "library": {"config": library, "storage_options": storage_options},
        "config": replace(config, workers=1),
    }
    with connected(core, address, cpus=config.workers * own.cpus, gpus=config.workers * own.gpus):
        actor = core.remote(num_cpus=own.cpus, num_gpus=own.gpus or None, max_restarts=-1, max_task_retries=RETRIES)(
            Worker
        )
        free = [actor.remote(**arguments) for _ in range(min(config.workers, len(waiting)))]
        busy: dict[Any, tuple[Any, str]] = {}
        while waiting or busy:
            while waiting and free:
                worker, video = free.pop(), waiting.pop()
                busy[worker.add.remote(video)] = worker, video
            (done, *_), _ = core.wait(list(busy))
            worker, video = busy.pop(done)
            free.append(worker)
            try:
                added = core.get(done)
            except core.exceptions.RayError:
                error = KeyreelError(
                    f"{video!r}: its worker died {1 + RETRIES} times", hint="index it alone to see why"
                )
                added = failed(video, error)
            found.append(added)
            if tell is not None:
                tell(added)
    return found


class Worker:
    """A worker process of the cluster. It opens model and library with its first video."""

    def __init__(self, uri: str, engine: Mapping[str, Any], library: Mapping[str, Any], config: IndexConfig) -> None:
        self._uri, self._engine, self._options, self._config = uri, engine, library, config
        self._library: Library | None = None

    def add(self, video: str) -> Added:
        """Indexes one video. An error is part of the result."""
        try:
            if self._library is None:
                engine = Engine.from_pretrained(**self._engine)
                self._library = Library(self._uri, engine, **self._options)
            (added,) = self._library.add([video], self._config)
        except Exception as error:  # noqa: BLE001 - if the model or library cannot be opened, every video fails
            return failed(video, error)
        if added.failure is not None:
            return failed(video, added.failure.error)
        return replace(added, path=video, record=None)


def failed(video: str, error: Exception) -> Added:
    """The result of a failed video."""
    known = Failure.of(video, error).error
    plain = KeyreelError(str(known.args[0]), hint=known.hint)  # errors of other classes do not travel
    plain.exit_code = known.exit_code
    return Added(video, "failed", None, Failure(video, plain), 0.0)


@contextmanager
def connected(ray: Any, address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Connects to Ray during the block. For a cluster that it starts, it turns off Ray's usage reports.

    Raises:
        BackendError: no Ray at that address.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address or LOCAL}
    if options["address"] == LOCAL:
        options |= {"num_cpus": math.ceil(cpus), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        options |= {"num_gpus": math.ceil(gpus)} if gpus else {}
    try:
        with warnings.catch_warnings():
            # LanceDB warns about forks; Ray's children immediately run other programs.
            warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
            ray.init(configure_logging=False, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"no Ray at {options['address']!r}: {error}", hint="`ray status` shows what runs") from error
    try:
        yield
    finally:
        ray.shutdown()
