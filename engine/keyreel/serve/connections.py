"""Protects the service from idle connections: a deadline for each header, and room for new connections."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def files() -> int:
    """The most files that this process may open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if allowed == resource.RLIM_INFINITY else allowed


class Connection(H11Protocol):
    """uvicorn's connection, with a deadline for headers.

    A header must end within `header_seconds` of the connection, or of the first byte of a further request.

    Connections that wait for a header use at most a quarter of the files that this process may open; a new one then
    closes the one that has waited longest.
    """

    header_seconds = 15.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        waiting = {
            one: one._deadline.when() for one in self.connections if isinstance(one, Connection) and one._deadline
        }
        if len(waiting) > files() // 4:
            min(waiting, key=waiting.__getitem__).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._go_on()
        elif self._deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _go_on(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
