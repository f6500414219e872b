"""The application: commands whose options are fields of config, and what every error exits with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import typer

from keyreel.cli.inputs import exit_code
from keyreel.cli.output import say
from keyreel.config import DecodeLimits, EncodeConfig, Sampling
from keyreel.errors import Failure, KeyreelError, MissingExtra, RenderError

USAGE, INTERRUPTED = 2, 130

app = typer.Typer(
    name="keyreel",
    help="Turns video into key-frames, highlight reels and text search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
library_app = typer.Typer(
    help="Looks after a library of videos.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
app.add_typer(library_app, name="library")

Model = Annotated[str, typer.Option(help="builtin, a bundle's folder, or the name of an exported model")]
OwnModel = Annotated[
    str | None, typer.Option(help="builtin, a bundle's folder, or a name; a library's own model, else builtin")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N; an explicit device never falls back")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]

Field: TypeAlias = tuple[type, str] | tuple[type, str, str]

SAMPLING: tuple[Field, ...] = (
    (Sampling, "mode", "--sampling"),
    (Sampling, "fps"),
    (Sampling, "tolerance_seconds", "--tolerance"),
    (Sampling, "every"),
)
ENCODING: tuple[Field, ...] = tuple((EncodeConfig, name) for name in ("shift", "attention_strength", "batch_size"))
NETWORK: tuple[Field, ...] = ((DecodeLimits, "allow_network"),)


def command(
    *fields: Field, group: typer.Typer = app, name: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a command, called as its function by default; every error of keyreel ends in its exit code and one
    message.

    The named fields of config dataclasses become options with their defaults and help texts, called as the field or as
    a third entry says; the command receives them in its last parameter, `options`, by field name.
    """

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(work, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "options"]
        parameters += [_parameter(*field) for field in fields]

        def run(**values: Any) -> None:
            options = {name: values.pop(name) for _, name, *_ in fields}
            with _exit_codes():
                work(**values, **({"options": options} if fields else {}))

        run.__name__, run.__doc__ = work.__name__, work.__doc__
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        group.command(name)(run)
        return work

    return decorate


def _parameter(owner: type, name: str, flag: str | None = None) -> inspect.Parameter:
    """The option of one config field."""
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    kind = typing.get_type_hints(owner)[name]
    if typing.get_origin(kind) is types.UnionType or typing.get_origin(kind) is typing.Union:
        literal = any(typing.get_origin(part) is typing.Literal for part in typing.get_args(kind))
        kind = str | None if literal else kind
    elif typing.get_origin(kind) is typing.Literal:
        kind = str
    elif typing.get_origin(kind) is tuple:
        kind = list[str]
    flag = _flag(name, flag)
    names = [f"{flag}/--no-{name.replace('_', '-')}"] if kind is bool and field.default else [flag]
    option = typer.Option(*names, help=field.metadata["help"])
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _flag(name: str, flag: str | None = None) -> str:
    return flag or "--" + name.replace("_", "-")


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:  # as it is where the caller has closed it
            sys.stdout.flush()
    except BrokenPipeError as error:
        # The reader of the pipe has left, as `head` does; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except (KeyreelError, MissingExtra) as error:
        say(str(error), style="red")
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        say(f"cannot be written or read: {error}", style="red")
        raise typer.Exit(RenderError.exit_code) from error
    except (ValueError, TypeError) as error:
        say(str(error), style="red")
        raise typer.Exit(USAGE) from error
    except KeyboardInterrupt as error:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from error


def picked(owner: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of a config, by name."""
    names = {field.name for field in dataclasses.fields(owner)}
    given = {name: value for name, value in options.items() if name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def refuse(options: dict[str, Any], fields: Sequence[Field], why: str) -> None:
    """Refuses options that have no part in what is asked for.

    Raises:
        ValueError: one of them was given.
    """
    for owner, name, *flag in fields:
        default = next(field.default for field in dataclasses.fields(owner) if field.name == name)
        if options[name] != (list(default) if isinstance(default, tuple) else default):
            raise ValueError(f"{_flag(name, *flag)} {why}")


def end(failed: Sequence[Failure], succeeded: int) -> None:
    """Ends the command with the code of its failures, if there are any."""
    if code := exit_code(failed, succeeded):
        raise typer.Exit(code)
