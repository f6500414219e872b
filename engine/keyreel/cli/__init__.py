"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import sys

from keyreel.cli.signals import exit_code_of, raise_at_sigterm


def main() -> None:
    """Runs the command line.

    Native libraries write to the file descriptor of stdout, as PyNvVideoCodec does for damaged videos. It is turned
    into stderr; our own data goes to a copy of it.
    """
    try:
        raise_at_sigterm()
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
