"""Options that several commands share, with their help texts. Their defaults are those of config."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

import typer
from typer import Argument, Option

from keyreel.config import DecodeLimits, EncodeConfig, Sampling, SamplingMode, ShiftMode

SAMPLING, ENCODING = Sampling(), EncodeConfig()  # defaults

Videos = Annotated[list[str], Argument(metavar="VIDEO...", help="files, folders, or - for standard input")]
Folder = Annotated[str, Argument(metavar="DIR", help="the library's folder or s3:// address")]
Model = Annotated[str, Option(help="builtin (the demo model), a name from `keyreel models list`, or a bundle's folder")]
Yes = Annotated[bool, Option("--yes", help="install the model first, if it is one of `keyreel models list`")]
OwnModel = Annotated[
    str | None, Option(help="a name from `keyreel models list`, or a bundle's folder; a library's own, else builtin")
]
Device = Annotated[str, Option(help="auto, cpu or cuda:N; an explicit device never falls back")]
Json = Annotated[bool, Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="no progress bars")]


def _switch(given: str | bool) -> bool:
    """on or off; Typer passes the default through, too."""
    if isinstance(given, str) and given not in ("on", "off"):
        raise typer.BadParameter(f"{given!r} is neither on nor off")
    return given in ("on", True)


# Config checks the modes: it knows one that only Python can give.
Mode = Annotated[
    SamplingMode,
    Option("--sampling", parser=str, metavar="<str>", help="which frames: fps, near, every, keyframes or all"),
]
Fps = Annotated[float, Option(help="frames a second of video, for modes fps and near")]
Tolerance = Annotated[
    float | None,
    Option(help="how far from its time a frame may lie that is cheap to decode, for mode near; by default half a step"),
]
Every = Annotated[int, Option(help="take each n-th frame, for mode every")]
Shift = Annotated[
    ShiftMode | None,
    Option(parser=str, metavar="<str>", help="temporal shift: off, fixed or adaptive; the model's own default"),
]
Subject = Annotated[
    Any,  # a bool; Typer would make it a flag
    Option(
        "--subject",
        parser=_switch,
        metavar="<on|off>",
        show_default=False,
        help="on by default: a second vector a frame, of what stands out or moves; off: no attention, no shift",
    ),
]
BatchSize = Annotated[int | None, Option(help="frames in one inference; by default what suits the device")]
AllowNetwork = Annotated[bool, Option("--allow-network", help="allow http and https URLs")]
Hidden = Annotated[bool, Option("--hidden", help="of folders, take hidden and system files too")]
Longest = Annotated[float, Option(min=0.001, help="refuse videos of more seconds")]
LONGEST = DecodeLimits().max_duration_seconds


def _timestamp(date: str) -> float:
    """Seconds since 1970; a date without a time zone is local."""
    try:
        return datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(f"{date!r} is no date, write 2024-12-31 or 2024-12-31T18:00") from error


PathGlob = Annotated[str | None, Option(help="glob over the whole path, '*/holiday/*.mp4'")]
Tag = Annotated[list[str] | None, Option(help="a word given at indexing; repeatable, all must fit")]
After = Annotated[
    float | None,
    Option(parser=_timestamp, metavar="<str>", help="recorded at this date or later, 2024-12-31 or 2024-12-31T18:00"),
]
Before = Annotated[float | None, Option(parser=_timestamp, metavar="<str>", help="recorded before this date")]
MinDuration = Annotated[float | None, Option(help="seconds, videos as long or longer")]
MaxDuration = Annotated[float | None, Option(help="seconds, videos as long or shorter")]


def reject(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raises ValueError if one of the parameters was given on the command line."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0]} {reason}")
