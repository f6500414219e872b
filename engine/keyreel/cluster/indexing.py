"""Indexing on a Ray cluster: one Engine a worker, each writes into the library by itself.

Only names and one line a video travel. Ray restarts a worker that dies, and retries its video; a video that kills its
worker again and again fails, and the others go on. Every worker must reach the videos under the given paths, the
library under its URI, and have the model. Ray reports dead workers on the driver's standard output.
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

LOCAL = "local"  # Ray's word for a cluster that starts here and ends with the driver
RETRIES = 2  # of a video whose worker has died
_STORE_BYTES = 128 << 20  # of Ray's object store, which would take a third of the memory


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
            as the workers ask for and no dashboard, and ended afterwards. A Ray to which this process is connected
            already is used.
        ray: what each worker asks Ray for.
        tell: called in this process with the result of each video, as they end.

    Returns:
        One for each video, in the order in which they ended, without records: `Library.record` has them.

    Raises:
        MissingExtra: Ray is not installed.
        BackendError: there is no Ray at that address.
    """
    config, own = config or IndexConfig(), ray or RayConfig()
    core = import_extra("ray", extra="ray", purpose="indexing on a cluster")
    waiting = list(dict.fromkeys(name_of(path) for path in paths))[::-1]
    found: list[Added] = []
    if not waiting:
        return found
    arguments = {
        "uri": name_of(uri),  # workers have a working directory of their own
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
                error = KeyreelError(f"{video!r}: its worker died {1 + RETRIES} times", hint="index it alone and look")
                added = failed(video, error)
            found.append(added)
            if tell is not None:
                tell(added)
    return found


class Worker:
    """Lives in a process of the cluster; opens the model and the library with its first video."""

    def __init__(self, uri: str, engine: Mapping[str, Any], library: Mapping[str, Any], config: IndexConfig) -> None:
        self._uri, self._engine, self._options, self._config = uri, engine, library, config
        self._library: Library | None = None

    def add(self, video: str) -> Added:
        """Indexes one video. Whatever goes wrong is in the result."""
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
    """The result for a video that could not be indexed."""
    known = Failure.of(video, error).error
    plain = KeyreelError(str(known.args[0]), hint=known.hint)  # errors of other classes do not travel
    plain.exit_code = known.exit_code
    return Added(video, "failed", None, Failure(video, plain), 0.0)


@contextmanager
def connected(ray: Any, address: str | None, *, cpus: float, gpus: float) -> Iterator[None]:
    """Ray for the time of the block. `ray.init` turns Ray's usage reports off for a cluster that it starts."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address or LOCAL}
    if options["address"] == LOCAL:
        options |= {"num_cpus": math.ceil(cpus), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        options |= {"num_gpus": math.ceil(gpus)} if gpus else {}
    try:
        with warnings.catch_warnings():
            # LanceDB warns of every fork; the children of Ray are other programs at once.
            warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
            ray.init(configure_logging=False, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"no Ray at {options['address']!r}: {error}", hint="`ray status` says what runs") from error
    try:
        yield
    finally:
        ray.shutdown()
