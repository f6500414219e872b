"""A service in a process of its own, and what tests need to know of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START = """
import json, sys
from keyreel import Engine, Library
from keyreel.config import ServeConfig
from keyreel.serve import run
library, options = json.loads(sys.argv[1])
with Engine.from_pretrained(device="cpu", threads=1) as engine, Library(library, engine) as opened:
    run(opened, ServeConfig(**options), listening=lambda address: print(address, flush=True))
"""


@dataclasses.dataclass
class Served:
    """One running service."""

    process: subprocess.Popen[bytes]
    http: httpx.Client
    address: str

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(how)
        return self.process.wait(60)

    def wait(self, id: str, *states: str) -> dict[str, Any]:
        """A job, once it is in one of the states."""
        job: dict[str, Any] = {}

        def ended() -> bool:
            job.update(self.http.get(f"/api/v1/jobs/{id}").json())
            return job["state"] in states

        until(ended)
        return job

    def index(self, *paths: Path) -> list[dict[str, Any]]:
        """Submits videos and waits for them."""
        jobs = [self.http.post("/api/v1/jobs", json={"path": str(path)}) for path in paths]
        assert [job.status_code for job in jobs] == [202] * len(jobs), jobs[-1].text
        return [self.wait(job.json()["id"], "done", "failed") for job in jobs]


def until(holds: Callable[[], bool]) -> None:
    """Waits until it holds."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def served(library: Path, **options: Any) -> Iterator[Served]:
    """Starts a service on a free port of this machine; killed at the end if it still runs."""
    arguments = json.dumps([str(library), {"port": 0, "drain_seconds": 5.0, **options}])
    environment = {**os.environ, "KEYREEL_CPU_RUNTIME": "onnxruntime"}
    command = [sys.executable, "-W", "error", "-c", START, arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        assert address, "the service did not start"
        try:
            with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
                yield Served(process, client, address)
        finally:
            process.kill()
