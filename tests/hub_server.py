"""A server of files as the Hugging Face Hub serves them, for tests: HEAD and GET of /REPOSITORY/resolve/REVISION/FILE,
ranges, digests, and what goes wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def digest(data: bytes) -> str:
    """sha256, in hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Hub:
    """Files by "REPOSITORY/FILE", and what the server does to requests."""

    files: Mapping[str, bytes]
    url: str = ""
    cut_after: list[int] = field(default_factory=list)  # the next bodies end after so many bytes
    status: int | None = None  # every answer has this status
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range


@contextlib.contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A server on a free port of this machine."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            wanted = self.headers.get("Range")
            hub.asked.append((self.command, self.path, wanted))
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            data = hub.files.get(f"{found[1]}/{found[3]}") if found else None
            if hub.status is not None or data is None:
                self.send_response(hub.status or 404)
                if hub.status is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{digest(data)}"')
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if body:
                cut = hub.cut_after.pop(0) if hub.cut_after else None
                self.wfile.write(data[begin:] if cut is None else data[begin : begin + cut])
                if cut is not None:
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
