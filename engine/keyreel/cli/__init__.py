"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import os
import sys

from keyreel.cli.signals import exit_code_of, raise_at_sigterm


def main() -> None:
    """Runs the command line.

    Native libraries write to the file descriptor of stdout, as PyNvVideoCodec for damaged videos. So that descriptor
    becomes stderr, and our data goes to a copy of stdout.
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
    except KeyboardInterrupt as error:  # during imports; commands handle it themselves
        sys.exit(exit_code_of(error))
