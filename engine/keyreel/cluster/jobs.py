"""The job queue of a cluster: one actor has it and works on it; every replica of the service calls the actor.

So, as on one machine, a job is accepted when its row is on disk. Replicas and actor must share the folder of queue and
uploads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from keyreel.cluster.carried import carried, opened
from keyreel.config import ServeConfig
from keyreel.engine import Engine
from keyreel.library.library import Library
from keyreel.serve.jobs import Jobs
from keyreel.serve.models import Job
from keyreel.serve.security import ApiError
from keyreel.serve.service import Service

_SECONDS = 20.0  # to wait for an answer of the queue
_PART_SECONDS = 120.0  # an upload without writes for this long is a leftover of a dead replica


class _SharedJobs(Jobs):
    part_seconds = _PART_SECONDS


class JobsActor:
    """The actor with the queue on disk, and the threads that index."""

    def __init__(
        self, uri: str, engine: Mapping[str, Any], config: ServeConfig, storage_options: Mapping[str, str] | None = None
    ) -> None:
        library = Library(uri, Engine.from_pretrained(**engine), storage_options=storage_options)
        self._service = Service(library, config, _SharedJobs)
        self._service.jobs.start()

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the queue; returns its answer for `carried.opened`."""
        return carried(lambda: getattr(self._service.jobs, method)(*arguments, **options))


class RemoteJobs(Jobs):
    """The queue for a replica. The replica writes uploads, and hands them over when complete."""

    def __init__(self, actor_of: Callable[[], Any], folder: Path, *rest: Any) -> None:
        self._actor_of = actor_of
        super().__init__(folder, *rest)

    def start(self) -> None:
        """Creates the folder for uploads; the actor does the rest."""
        self.uploads.mkdir(parents=True, exist_ok=True)

    def check_room(self) -> None:
        self._ask("check_room")

    def submit(self, path: Path, *, id: str | None = None, part: Path | None = None) -> Job:
        found: Job = self._ask("submit", path, id=id, part=part)
        return found

    def get(self, id: str) -> Job:
        found: Job = self._ask("get", id)
        return found

    def latest(self) -> list[Job]:
        found: list[Job] = self._ask("latest")
        return found

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = self._ask("counts")
        return found

    def cancel(self, id: str) -> Job:
        found: Job = self._ask("cancel", id)
        return found

    def drain(self, seconds: float) -> None:
        """Does nothing: the queue outlives the replica."""

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            answer = ray.get(self._actor_of().ask.remote(method, *arguments, **options), timeout=_SECONDS)
        except (RayActorError, GetTimeoutError, ValueError) as error:
            headers = {"Retry-After": "5"}
            raise ApiError(503, "jobs", "the queue of jobs is being started again", headers=headers) from error
        return opened(answer)
