"""Turns groups of options into parameters of a command, and their values into a config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Annotated, Any, get_args

import typer
from typer.models import ParameterInfo


class Made:
    """Marks a parameter made of several options: `Annotated[Sampling, Made(Sampling, fps=Fps, ...)]`.

    Args:
        config: makes the value, such as a dataclass. Its defaults are those of the options, else None.
        fields: annotation of each field: an option, or again a group.
    """

    def __init__(self, config: Callable[..., Any], **fields: Any) -> None:
        self._config, self._fields = config, fields

    def parameters(self) -> Iterator[Parameter]:
        """The options, as keyword parameters of a command."""
        known = inspect.signature(self._config).parameters
        for field, annotation in self._fields.items():
            if (inner := _made(annotation)) is not None:
                yield from inner.parameters()
            else:
                name, default = _name(field, annotation), known[field].default if field in known else None
                yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def take(self, given: dict[str, Any]) -> Any:
        """Removes its options from `given`, and makes the config of them."""
        values = {}
        for field, annotation in self._fields.items():
            inner = _made(annotation)
            value = given.pop(_name(field, annotation)) if inner is None else inner.take(given)
            values[field] = tuple(value) if isinstance(value, list) else value
        return self._config(**values)


def names(*made: Any) -> list[str]:
    """The names of the parameters of these groups of options."""
    return [parameter.name for one in made for parameter in _made(one).parameters()]  # type: ignore[union-attr]


def _made(annotation: Any) -> Made | None:
    return next((one for one in getattr(annotation, "__metadata__", ()) if isinstance(one, Made)), None)


def _name(field: str, annotation: Any) -> str:
    """The name of the parameter: that of its option, else the field's."""
    info = _info(annotation)
    given = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str) and one.startswith("--")]
    return given[0].split("/")[0].lstrip("-").replace("-", "_") if given else field


def _info(annotation: Any) -> ParameterInfo:
    return next(one for one in get_args(annotation) if isinstance(one, ParameterInfo))


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        context.meta[HELP_ALL] = True
        typer.echo(context.get_help(), color=context.color)
        raise typer.Exit


HELP_ALL = "keyreel.help_all"  # key in `Context.meta`: show all options
_VERBOSE = Annotated[
    int,
    typer.Option(
        "-v", "--verbose", count=True, show_default=False, help="say what is decided and why, with times; -vv: more"
    ),
]
_HELP_ALL = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="show all options and exit")
]


def expanded(command: Callable[..., None], begin: Callable[[typer.Context, int], None]) -> Callable[..., None]:
    """Replaces the marked parameters of a command by their options, and adds the options that every command has.

    Args:
        command: has parameters marked with `Made`.
        begin: called with the context and the number of -v before the command runs.
    """
    groups: dict[str, Made] = {}
    parameters: dict[str, Parameter] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if (made := _made(parameter.annotation)) is None:
            parameters[name] = parameter.replace(kind=Parameter.KEYWORD_ONLY)
        else:
            groups[name] = made
            parameters |= {own.name: own for own in made.parameters()}
    rare = any(
        _info(one.annotation).rich_help_panel for one in parameters.values() if one.annotation is not typer.Context
    )
    own: list[tuple[str, Any, int]] = [("verbose", _VERBOSE, 0), ("help_all", _HELP_ALL, False)]
    for name, annotation, default in own if rare else own[:1]:
        parameters[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    asks = "context" in parameters
    parameters["context"] = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        begin(given["context"] if asks else given.pop("context"), given.pop("verbose"))
        given.pop("help_all", None)
        command(**given | {name: made.take(given) for name, made in groups.items()})

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run
