"""The service on a Ray cluster: Ray Serve runs its replicas, an actor for each shard, and one for the job queue.

A replica has the model, for queries, and the library's records, but no vectors. It has the routes, page, guards and
limits of `keyreel.serve`. Serve places, watches and restarts the actors. A Serve config file names `application`, see
`engine/deploy`.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig

from keyreel.cluster.indexing import connected
from keyreel.cluster.jobs import JobsActor, RemoteJobs
from keyreel.cluster.search import ClusterLibrary, ShardActor
from keyreel.config import ClusterConfig, LibraryConfig, ServeConfig
from keyreel.engine import Engine
from keyreel.errors import LibraryError, RenderError
from keyreel.library.files import name_of
from keyreel.library.library import Library
from keyreel.library.shards import open_tables
from keyreel.runtime.bundle import BUILTIN
from keyreel.serve.app import make_app
from keyreel.serve.service import Service

NAME = "keyreel"  # of the application
JOBS = "jobs"  # name of the actor with the queue
ONGOING = 128  # requests of a replica at a time; its own limits are lower
_QUERY_SHARE = 0.8  # share of a request's time for its query
# Environment variables for a cluster; `run` sets them if it starts one.
ENVIRONMENT = {
    "RAY_SERVE_DEPLOYMENT_ACTOR_HEALTH_CHECK_PERIOD_S": "1",  # Serve checks every 10 s whether an actor lives
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "keyreel.cluster.proxy.middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Serve kills a proxy that needs longer than 5 s to start
}


def application(options: Mapping[str, Any]) -> serve.Application:
    """Makes the service as an application of Ray Serve.

    Args:
        options: `library` (folder or URI), `model`, `device` of shards and jobs, `token_file`, `storage_options`, and
            the fields of `ServeConfig` (except `token`) and `ClusterConfig`. Only `library` and `folder` are required.

    Raises:
        ValueError: an unknown or a missing option.
        LibraryError: the library cannot be opened.
    """
    given = dict(options)
    uri, model, device = given.pop("library", None), given.pop("model", None), given.pop("device", "auto")
    token_file, storage = given.pop("token_file", None), given.pop("storage_options", None)
    if not uri or not given.get("folder"):
        raise ValueError(
            "the application needs library and folder; all nodes must share the folder of uploads and jobs"
        )
    uri = name_of(uri)
    own = ClusterConfig(**{name: given.pop(name) for name in asdict(ClusterConfig()) if name in given})
    for name in ("roots", "hosts"):
        given[name] = tuple(given.get(name, ()))
    if wrong := set(given) - (set(ServeConfig.__slots__) - {"token"}):
        raise ValueError(f"the application has no options {sorted(wrong)}")
    config = ServeConfig(**given)
    with Library(uri, storage_options=storage) as library:
        model = model or (library.stats().model if library.exists() else BUILTIN)
    count, engine = _shards_of(uri, storage), {"model": model, "device": device}

    def build() -> Any:
        """Makes the application; runs in each replica."""
        secret = None if token_file is None else Path(token_file).read_text("utf-8").strip()
        library = ClusterLibrary(
            uri,
            Engine.from_pretrained(model, device="cpu"),
            count,
            lambda number: serve.get_deployment_actor(f"shard-{number}"),
            wait=own.wait,
            seconds=_QUERY_SHARE * config.timeout_seconds,
            storage_options=storage,
        )
        jobs = partial(RemoteJobs, lambda: serve.get_deployment_actor(JOBS))
        return make_app(Service(library, replace(config, token=secret), jobs))

    shard = {"num_cpus": own.shard_cpus, "max_concurrency": config.threads + 2}
    actors: list[dict[Any, Any] | DeploymentActorConfig] = [
        DeploymentActorConfig(
            name=f"shard-{number}",
            actor_class=ray.remote(ShardActor),
            init_args=(uri, number, LibraryConfig(exact_rows=own.shard_rows), device, storage),
            actor_options=shard | ({"num_gpus": own.shard_gpus} if own.shard_gpus else {}),
        )
        for number in range(count)
    ]
    queue = {"num_cpus": own.job_cpus, "max_concurrency": ONGOING}
    actors.append(
        DeploymentActorConfig(
            name=JOBS,
            actor_class=ray.remote(JobsActor),
            init_args=(uri, engine, config, storage),
            actor_options=queue | ({"num_gpus": own.job_gpus} if own.job_gpus else {}),
        )
    )
    replica = serve.deployment(
        name="Replica",
        num_replicas=own.replicas,
        ray_actor_options={"num_cpus": own.replica_cpus},
        max_ongoing_requests=ONGOING,
        max_queued_requests=ONGOING,
        health_check_period_s=2.0,
        deployment_actors=actors,
    )(serve.ingress(build)())
    return replica.bind()


def _shards_of(uri: str, storage_options: Mapping[str, str] | None) -> int:
    tables = open_tables(uri, storage_options)
    tables.close()
    return len(tables.parts)


def run(
    options: Mapping[str, Any],
    *,
    address: str | None = None,
    listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves on a Ray cluster until SIGTERM or SIGINT, then removes the application from it.

    Args:
        options: see `application`.
        address: see `indexing.index`; by default it starts Ray on this machine, and ends it afterwards.
        listening: called with the address, http://HOST:PORT, when the service accepts requests.

    Raises:
        BackendError: no Ray at that address.
        LibraryError: the library cannot be opened, or an actor cannot be started.
        RenderError: the port is in use.
    """
    own = ClusterConfig(**{name: options[name] for name in asdict(ClusterConfig()) if name in options})
    wanted = ServeConfig(**{name: options[name] for name in ("host", "port") if name in options})
    port = _port(wanted)
    count = _shards_of(name_of(options["library"]), options.get("storage_options"))
    cpus = own.replicas * own.replica_cpus + count * own.shard_cpus + own.job_cpus
    gpus = count * own.shard_gpus + own.job_gpus
    if address is None:
        os.environ.update(ENVIRONMENT | os.environ)
    with connected(ray, address, cpus=math.ceil(cpus), gpus=gpus):
        try:
            _start(options, wanted.host, port, everywhere=address is not None)
            host = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
            listening(f"http://{host}:{port}")
            _await_signal()
        finally:
            shutdown: Callable[[], None] = serve.shutdown
            shutdown()


def _start(options: Mapping[str, Any], host: str, port: int, *, everywhere: bool) -> None:
    where = {"host": host, "port": port, "request_timeout_s": None}
    try:
        serve.start(proxy_location="EveryNode" if everywhere else "HeadOnly", http_options=where)
        serve.run(application(options), name=NAME, route_prefix="/")
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise LibraryError(f"the service cannot be started: {error}", hint="the logs of Ray say more") from error


def _port(config: ServeConfig) -> int:
    """The port; a free one for 0.

    Raises:
        RenderError: the port is in use.
    """
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        with socket.create_server((config.host, config.port), family=family) as listener:
            port: int = listener.getsockname()[1]
            return port
    except OSError as error:
        reason = f"{config.host}:{config.port}: cannot listen there: {error.strerror or error}"
        raise RenderError(reason, hint="--port takes another port, --host another address of this machine") from error


def _await_signal() -> None:
    """Returns at SIGTERM or SIGINT."""
    ended = threading.Event()
    previous = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not ended.is_set():
            time.sleep(0.2)
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
