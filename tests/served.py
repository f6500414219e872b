"""A service in a process of its own, and what tests need to know of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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
    run(opened, ServeConfig(**options))
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

    def wait(self, id: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        """A job, once it is in one of the states."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            job = self.http.get(f"/api/v1/jobs/{id}").json()
            if job["state"] in states:
                return job
            time.sleep(0.05)
        raise AssertionError(f"job is {job}")

    def index(self, *paths: Path) -> list[dict[str, Any]]:
        """Submits videos and waits for them."""
        jobs = [self.http.post("/api/v1/jobs", json={"path": str(path)}) for path in paths]
        assert [job.status_code for job in jobs] == [202] * len(jobs), jobs[-1].text
        return [self.wait(job.json()["id"], "done", "failed") for job in jobs]


@contextmanager
def served(library: Path, **options: Any) -> Iterator[Served]:
    """Starts a service on a free port of this machine; killed at the end if it still runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = json.dumps([str(library), {"port": port, "drain_seconds": 5.0, **options}])
    environment = {**os.environ, "KEYREEL_CPU_RUNTIME": "onnxruntime"}
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", START, arguments], env=environment)
    headers = {"Authorization": f"Bearer {options['token']}"} if options.get("token") else {}
    address = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=address, timeout=60, headers=headers, trust_env=False) as client:
        try:
            for _ in range(600):
                assert process.poll() is None, "the service did not start"
                try:
                    if client.get("/healthz").status_code == 200:
                        break
                except httpx.ConnectError:
                    time.sleep(0.1)
            yield Served(process, client, address)
        finally:
            process.kill()
            process.wait()
