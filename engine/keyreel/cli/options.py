"""The options that several commands share. Their defaults are those of config.

Options with a panel appear only with --help-all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

import keyreel
from keyreel.cli.signature import Made
from keyreel.config import DecodeLimits, EncodeConfig, IndexConfig, Sampling, ShiftMode

if TYPE_CHECKING:
    from keyreel import Filter

FRAMES, VECTORS, LIMITS, FILTER = "Which frames", "Vectors", "Input", "Which videos"  # panels


def known_models(incomplete: str) -> Sequence[str]:
    """Names of models, for completion."""
    from keyreel.models.catalogue import CATALOGUE
    from keyreel.models.install import installed

    return sorted({"builtin", *installed(), *(one.name for one in CATALOGUE)})


Videos = Annotated[list[str], Argument(metavar="VIDEO", help="files, folders, or - for standard input")]
Folder = Annotated[str, Argument(metavar="DIR", help="the library: a folder or an s3:// address")]
Model = Annotated[
    str | None,
    Option(
        metavar="NAME|FOLDER",
        autocompletion=known_models,
        help="a name from `keyreel models list`, or a bundle's folder; default: the library's, else builtin",
    ),
]
Precision = Annotated[
    Literal["fp32", "fp16", "int8"], Option(help="fp16 is for GPUs, int8 for CPUs with VNNI instructions")
]
Output = Annotated[Path | None, Option("--output", "-o", metavar="DIR", help="where to write; default: the cache")]
TensorRT = Annotated[bool, Option("--tensorrt", help="build TensorRT plans for this GPU")]
Yes = Annotated[bool, Option("--yes", help="install the model first if it is missing")]
Device = Annotated[
    str,
    Option(metavar="auto|cpu|cuda:N", autocompletion=lambda: ["auto", "cpu", "cuda:0"], help="where the model runs"),
]
Json = Annotated[bool, Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="show no progress bars")]
Hidden = Annotated[
    bool, Option("--hidden", rich_help_panel=LIMITS, help="also read hidden and system files in folders")
]


def _switch(given: str | bool) -> bool:
    """Parses on or off. Typer also passes the default."""
    if isinstance(given, str) and given not in ("on", "off"):
        raise typer.BadParameter(f"must be on or off, got {given!r}")
    return given in ("on", True)


def _timestamp(date: str) -> float:
    """Parses a date to seconds since 1970; without a time zone it is local."""
    try:
        return datetime.fromisoformat(date).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise typer.BadParameter(f"{date!r} is not a date; write 2024-12-31 or 2024-12-31T18:00") from error


Frames = Annotated[
    Sampling,
    Made(
        Sampling,
        mode=Annotated[
            Literal["fps", "near", "every", "keyframes", "all"],  # config also has "times", which needs Python
            Option("--sampling", rich_help_panel=FRAMES, help="how frames are chosen; fps and near use --fps"),
        ],
        fps=Annotated[float, Option(metavar="N", help="frames to analyse per second of video")],
        tolerance_seconds=Annotated[
            float | None,
            Option(
                "--tolerance",
                metavar="SECONDS",
                rich_help_panel=FRAMES,
                help="sampling near: how far from its time a frame may be that decodes faster; default: half a step",
            ),
        ],
        every=Annotated[int, Option(metavar="N", rich_help_panel=FRAMES, help="sampling every: take each N-th frame")],
    ),
]
Encode = Annotated[
    EncodeConfig,
    Made(
        EncodeConfig,
        shift=Annotated[
            ShiftMode | None,
            Option(
                rich_help_panel=VECTORS, help="shift patches in time before the attention; default: the model's setting"
            ),
        ],
        subject=Annotated[
            Any,  # a bool; Typer would make it a flag
            Option(
                "--subject",
                parser=_switch,
                metavar="on|off",
                show_default=False,
                rich_help_panel=VECTORS,
                help="make a second vector per frame, of what stands out or moves; default: on",
            ),
        ],
        batch_size=Annotated[
            int | None,
            Option(metavar="N", rich_help_panel=VECTORS, help="frames per model run; default: what suits the device"),
        ],
    ),
]
Limits = Annotated[
    DecodeLimits,
    Made(
        DecodeLimits,
        max_duration_seconds=Annotated[
            float,
            Option(
                "--longest", metavar="SECONDS", min=0.001, rich_help_panel=LIMITS, help="refuse videos longer than this"
            ),
        ],
        allow_network=Annotated[
            bool, Option("--allow-network", rich_help_panel=LIMITS, help="allow http and https addresses")
        ],
    ),
]
Indexing = Annotated[
    IndexConfig,
    Made(
        IndexConfig,
        workers=Annotated[int, Option(metavar="N", help="index N videos at the same time")],
        sampling=Frames,
        encode=Encode,
        limits=Limits,
    ),
]


def _filter(**given: Any) -> Filter:
    return keyreel.Filter(**{name: value for name, value in given.items() if value is not None})


Where = Annotated[
    "Filter",
    Made(
        _filter,
        path=Annotated[str | None, Option(metavar="GLOB", help="only videos whose path fits, '*/holiday/*.mp4'")],
        tags=Annotated[
            list[str] | None, Option("--tag", metavar="WORD", help="only videos with this tag; repeat for more tags")
        ],
        after=Annotated[
            float | None, Option(parser=_timestamp, metavar="DATE", help="only videos recorded on or after 2024-12-31")
        ],
        before=Annotated[
            float | None, Option(parser=_timestamp, metavar="DATE", help="only videos recorded before 2024-12-31")
        ],
        min_duration_seconds=Annotated[
            float | None,
            Option("--min-duration", metavar="SECONDS", rich_help_panel=FILTER, help="only videos at least this long"),
        ],
        max_duration_seconds=Annotated[
            float | None,
            Option("--max-duration", metavar="SECONDS", rich_help_panel=FILTER, help="only videos at most this long"),
        ],
    ),
]


def source_of(context: Any, name: str | None) -> str:
    """The source of a parameter's value, by Click's names: COMMANDLINE, DEFAULT_MAP (a file), DEFAULT and others."""
    source = context.get_parameter_source(name or "")
    return "" if source is None else str(source.name)


def reject(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raises ValueError if one of the parameters was given on the command line."""
    for parameter in context.command.params:
        if parameter.name in names and source_of(context, parameter.name) == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0]} {reason}")
