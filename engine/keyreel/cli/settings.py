"""Reads keyreel.toml: defaults for the options of all commands."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from keyreel.errors import ConfigError

NAME = "keyreel.toml"


def find() -> Path | None:
    """Finds keyreel.toml in the current folder, else in the user's config folder."""
    places = (Path(NAME), Path(typer.get_app_dir("keyreel")) / NAME)
    return next((path for path in places if path.is_file()), None)


def load(path: Path, group: Any) -> dict[str, Any]:
    """Reads the defaults of all commands, as Click's `default_map`.

    A table names a command, a table in a table a subcommand. A key names an option, without dashes.

    Args:
        path: a TOML file.
        group: the commands.

    Raises:
        ConfigError: the file cannot be read, or has an unknown command or option, or a value of a wrong kind.
    """
    try:
        text = path.read_text("utf-8")
        return _commands(path, group, tomllib.loads(text), ())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}", hint=_EXAMPLE) from error


_EXAMPLE = "a table for each command, a line for each option:\n[summarize]\nreel-seconds = 30"


def _commands(path: Path, group: Any, tables: dict[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for name, table in tables.items():
        here = (*above, name)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is not inside the table of a command", hint=_EXAMPLE)
        if (command := group.commands.get(name)) is None:
            raise _unknown(path, f"command [{'.'.join(here)}]", name, group.commands)
        inside = hasattr(command, "commands")
        found[name] = _commands(path, command, table, here) if inside else _options(path, command, table, here)
    return found


def _options(path: Path, command: Any, table: dict[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    known = {
        option.opts[0].lstrip("-"): option
        for option in command.params
        if option.param_type_name == "option" and option.name != "help_all"
    }
    known |= {name.lstrip("-"): option for option in known.values() for name in option.opts if name.startswith("--")}
    found = {}
    for key, value in table.items():
        where = f"{path}: {key} in [{'.'.join(above)}]"
        if (option := known.get(key.replace("_", "-"))) is None:
            raise _unknown(path, f"option {key} in [{'.'.join(above)}]", key, known)
        if option.is_flag != isinstance(value, bool):
            raise ConfigError(f"{where} must {'' if option.is_flag else 'not '}be true or false, got {value!r}")
        if isinstance(value, dict) or (isinstance(value, list) and not option.multiple):
            raise ConfigError(f"{where} takes one value, got {value!r}")
        values = value if isinstance(value, list) else [value]
        texts = values if option.is_flag or option.count else [str(one) for one in values]
        found[option.name] = texts if option.multiple else texts[0]
    return found


def _unknown(path: Path, what: str, name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name.replace("_", "-"), list(known), n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(sorted(known))}"
    return ConfigError(f"{path}: there is no {what}", hint=hint)
