"""SIGTERM ends a command as Ctrl-C does: what is half-written goes."""

from __future__ import annotations

import signal


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


def raise_at_sigterm() -> None:
    """Unless somebody else handles the signal already."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def exit_code_of(error: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _terminate(*_: object) -> None:
    raise Terminated
