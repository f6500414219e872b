"""The layout of --help: commands and options in groups; rare options only with --help-all."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from keyreel.cli.signature import HELP_ALL

_SHOWN = ("Arguments", "Options")  # the groups that --help shows


class _Examples:
    """A help text that ends with the lines of its epilog."""

    epilog: str | None

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the examples, without wrapping."""
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"  {line}\n")


class Command(_Examples, TyperCommand):
    """A command that shows its options in groups, by `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes all groups, or the common ones and a hint at the others."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in _SHOWN}
        parameters: list[Any] = self.get_params(ctx)
        for parameter in parameters:
            if (record := parameter.get_help_record(ctx)) is not None:
                if parameter.param_type_name == "argument":
                    name = re.sub(r"[{}[\]]", "", " ".join(parameter.get_usage_pieces(ctx)))
                    groups["Arguments"].append((name, parameter.help or ""))
                else:
                    groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        shown = groups if ctx.meta.get(HELP_ALL) else _SHOWN
        for name in shown:
            if groups[name]:
                with formatter.section(name):
                    formatter.write_dl(groups[name], col_max=34)
        if left := [name for name in groups if name not in shown]:
            number = sum(len(groups[name]) for name in left)
            formatter.write_paragraph()
            formatter.write_text(f"--help-all shows {number} more options: {', '.join(left).lower()}.")


class Group(_Examples, TyperGroup):
    """A group that shows its commands in groups, by `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the groups of commands, then the options."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            if not command.hidden:
                groups.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(
                    (name, command.get_short_help_str(formatter.width))
                )
        wide = max(len(name) for rows in groups.values() for name, _ in rows)
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(wide), text) for name, text in rows])
        with formatter.section("Options"):
            formatter.write_dl([one for p in self.get_params(ctx) if (one := p.get_help_record(ctx)) is not None])
