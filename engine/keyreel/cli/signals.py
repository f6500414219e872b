"""Makes SIGTERM end a command as Ctrl-C does: nothing half-written is left."""

from __future__ import annotations

import signal


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


def raise_at_sigterm() -> None:
    """Raises Terminated at SIGTERM, unless another handler is installed."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def exit_code_of(error: KeyboardInterrupt) -> int:
    """The exit code as in shells: 128 plus the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _terminate(*_: object) -> None:
    raise Terminated
