"""The table of commands, and the exit code of every error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from keyreel.cli import index, library, machine, models, search, videos
from keyreel.cli.output import log
from keyreel.cli.signals import exit_code_of
from keyreel.errors import KeyreelError, MissingExtra, RenderError

USAGE = 2


class _Messages(logging.Handler):
    """Prints what the modules log."""

    def emit(self, record: logging.LogRecord) -> None:
        log(self.format(record))


_messages = _Messages(logging.WARNING)


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        logging.getLogger("keyreel").addHandler(_messages)
        with _exit_codes():
            return super().invoke(ctx)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns every expected error into one message on stderr and an exit code."""
    try:
        yield
        if sys.stdout is not None:  # None where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError as error:  # the reader of the pipe has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except (KeyreelError, MissingExtra) as error:
        log(str(error), style="red")
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        log(f"cannot be written or read: {error}", style="red")
        raise typer.Exit(RenderError.exit_code) from error
    except (ValueError, TypeError) as error:
        log(str(error), style="red")
        raise typer.Exit(USAGE) from error
    except KeyboardInterrupt as error:
        log("interrupted")
        raise typer.Exit(exit_code_of(error)) from error


def _group(help: str, **options: Any) -> typer.Typer:
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **options,
    )


app = _group("Turns video into key-frames, highlight reels and text search.", name="keyreel", cls=_Commands)
app.command()(videos.summarize)
app.command()(search.search)
app.command()(index.index)
app.command()(library.serve)
app.command()(machine.bench)
app.command()(videos.demo)
app.command()(machine.export)
app.command()(machine.doctor)
app.command()(machine.version)

models_app = _group("Installs models and looks after them.")
models_app.command("list")(models.list_models)
models_app.command()(models.install)
models_app.command()(models.remove)
models_app.command()(models.verify)
app.add_typer(models_app, name="models")

library_app = _group("Looks after a library of videos.")
library_app.command("list")(library.list_videos)
library_app.command()(library.stats)
library_app.command()(library.remove)
library_app.command()(library.export)
library_app.command()(library.verify)
library_app.command()(library.compact)
library_app.command()(library.upgrade)
library_app.command()(index.update)
library_app.command()(index.reindex)
app.add_typer(library_app, name="library")
