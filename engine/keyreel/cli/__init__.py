"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Runs the command line.

    Native libraries write to the file descriptor of stdout, as PyNvVideoCodec does for damaged videos. It is turned
    into stderr; our own data goes to a copy of it.
    """
    try:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # what it leaves half-written must go, as after Ctrl-C
            signal.signal(signal.SIGTERM, _terminate)
        with contextlib.suppress(OSError, AttributeError):  # the caller closed stdout or stderr
            sys.stdout.flush()
            own = os.dup(1)
            os.dup2(2, 1)
            sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
        from keyreel.cli.app import app
        from keyreel.runtime.memory import bound_arenas

        bound_arenas()
        app()
    except KeyboardInterrupt as error:  # while modules are imported; commands handle it themselves
        sys.exit(exit_code_of(error))


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does."""


def exit_code_of(error: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _terminate(*_: object) -> None:
    raise Terminated
