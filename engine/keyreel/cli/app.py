"""The table of commands, and the exit code of each error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from keyreel.cli import index, library, machine, models, search, videos
from keyreel.cli.help import Command, Group
from keyreel.cli.options import source_of
from keyreel.cli.output import errors, log
from keyreel.cli.settings import find, load
from keyreel.cli.signals import exit_code_of
from keyreel.cli.signature import expanded
from keyreel.errors import KeyreelError, MissingExtra, RenderError

USAGE = 2
# Keys in `Context.meta`: the file that options are read from; whether keyreel found it, or the user named it.
SETTINGS, FOUND = "keyreel.settings", "keyreel.settings_found"


class _Messages(logging.Handler):
    """Prints log messages; below warnings with the seconds since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            log(text)
        else:
            log(f"{record.relativeCreated / 1000:7.2f} s  {text}", style="dim")


_messages = _Messages()
_log = logging.getLogger("keyreel")


def _begin(context: typer.Context, verbose: int) -> None:
    """Sets the log level by the number of -v, and names the options from a keyreel.toml."""
    _log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    if (path := context.meta.get(SETTINGS)) is None:
        return
    given = [one.opts[0] for one in context.command.params if source_of(context, one.name) == "DEFAULT_MAP"]
    text = f"options from {path}{': ' if given else ''}{', '.join(given)}"
    # The user did not name a found file, and it may be somebody else's: it is just in the current folder.
    quiet = context.params.get("quiet") or context.params.get("as_json") or not errors.is_terminal
    if given and context.meta[FOUND] and not quiet:
        log(text, style="dim")
    else:
        _log.info(text)


class _Commands(Group):
    def invoke(self, ctx: Any) -> Any:
        _log.addHandler(_messages)
        with _exit_codes():
            try:
                return super().invoke(ctx)
            except typer.BadParameter as error:
                if error.ctx and error.param and source_of(error.ctx, error.param.name) == "DEFAULT_MAP":
                    error.message += f" (from {ctx.meta[SETTINGS]})"
                raise


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns every expected error into a message on stderr and an exit code."""
    try:
        yield
        if sys.stdout is not None:  # None if the caller closed it
            sys.stdout.flush()
    except BrokenPipeError as error:  # the reader of the pipe ended early, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except (KeyreelError, MissingExtra) as error:
        log(str(error), style="red")
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        log(f"cannot read or write a file: {error}", style="red")
        raise typer.Exit(RenderError.exit_code) from error
    except (ValueError, TypeError) as error:
        log(str(error), style="red")
        raise typer.Exit(USAGE) from error
    except KeyboardInterrupt as error:
        log("interrupted")
        raise typer.Exit(exit_code_of(error)) from error


def _group(help: str, *examples: str, **options: Any) -> typer.Typer:
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        epilog="\n".join(examples),
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **{"cls": Group, **options},
    )


def _add(to: typer.Typer, work: Callable[..., None], *, name: str | None = None, panel: str | None = None) -> None:
    """Adds a command. Its docstring is its help, and ends with examples."""
    help, _, examples = cleandoc(work.__doc__ or "").partition("\n\nExamples:\n")
    options: Any = {"cls": Command, "rich_help_panel": panel, "epilog": cleandoc(examples)}
    to.command(name, help=help, **options)(expanded(work, _begin))


def _version(wanted: bool) -> None:
    if wanted:
        machine.version()
        raise typer.Exit


app = _group(
    "Turns video into key-frames, highlight reels and text search.",
    "keyreel demo",
    "keyreel summarize holiday.mp4 -o out",
    "keyreel --install-completion    # the tab key then completes commands, options and models",
    name="keyreel",
    cls=_Commands,
)


@app.callback()
def settings(
    context: typer.Context,
    version: Annotated[bool, Option("--version", is_eager=True, callback=_version, help="print the version")] = False,
    config: Annotated[
        str | None,
        Option(
            envvar="KEYREEL_CONFIG",
            metavar="FILE",
            help="defaults for options; default: keyreel.toml in this folder or in the user's config folder",
        ),
    ] = None,
) -> None:
    """Reads options from a file."""
    if (path := Path(config) if config else find()) is not None:
        context.default_map = load(path, context.command)
        context.meta[SETTINGS], context.meta[FOUND] = path, not config


_add(app, videos.summarize, panel="Summarize")
_add(app, videos.demo, panel="Summarize")
_add(app, search.search, panel="Search")
_add(app, index.index, panel="Library")
library_app = _group(
    "Lists, checks and changes a library.", "keyreel library list lib", "keyreel library update lib --prune"
)
app.add_typer(library_app, name="library", rich_help_panel="Library")
_add(app, library.serve, panel="Library")
models_app = _group("Lists, installs and checks models.", "keyreel models list", "keyreel models install")
app.add_typer(models_app, name="models", rich_help_panel="Models")
_add(app, machine.export, panel="Models")
_add(app, machine.doctor, panel="System")
_add(app, machine.bench, panel="System")
app.command(hidden=True)(machine.version)

_add(models_app, models.list_models, name="list")
_add(models_app, models.install)
_add(models_app, models.remove)
_add(models_app, models.verify)

_add(library_app, library.list_videos, name="list")
_add(library_app, library.stats)
_add(library_app, index.update)
_add(library_app, index.reindex)
_add(library_app, library.remove)
_add(library_app, library.verify)
_add(library_app, library.compact)
_add(library_app, library.upgrade)
_add(library_app, library.reshard)
_add(library_app, library.export)
