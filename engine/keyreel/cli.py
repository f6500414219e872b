"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keyreel import __version__
from keyreel.backend import resolve
from keyreel.bundle import BUILTIN, MANIFEST, Bundle
from keyreel.config import DecodeLimits, EncodeConfig, OutputConfig, Sampling, SelectConfig
from keyreel.decode.source import Source
from keyreel.demo import SCENES, write_demo
from keyreel.engine import Engine, read_picture
from keyreel.errors import KeyreelError, MissingExtra, RenderError, SourceNotFound, import_extra
from keyreel.probes import probes
from keyreel.progress import Bars
from keyreel.render.aside import aside
from keyreel.render.results import hit_pictures, save_previews
from keyreel.render.sidecars import search_document
from keyreel.render.storyboard import search_page
from keyreel.session_tensorrt import build_plans
from keyreel.tensorrt_build import library
from keyreel.types import SearchHit, Summary

VIDEO_SUFFIXES = frozenset(
    f".{end}"
    for end in (
        *("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mts", "mpg", "mpeg"),
        *("flv", "wmv", "ogv", "3gp", "mxf", "ivf", "vob", "y4m"),
    )
)
USAGE, SOME_FAILED, INTERRUPTED = 2, 8, 130

app = typer.Typer(
    name="keyreel",
    help="Turns video into key-frames, highlight reels and text search.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
errors = Console(stderr=True, highlight=False)

Videos = Annotated[list[str], typer.Argument(metavar="VIDEO...", help="files, folders, or - for standard input")]
Model = Annotated[str, typer.Option(help="builtin, a bundle's folder, or the name of an exported model")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N; an explicit device never falls back")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]


def _command(*fields: tuple[type, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a command; every error of keyreel ends in its exit code and one message.

    The named fields of config dataclasses become options with their defaults and help texts; the command receives
    them in its last parameter, `options`, by field name.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.name != "options"]
        parameters += [_parameter(owner, name) for owner, name in fields]

        def run(**values: Any) -> None:
            options = {name: values.pop(name) for _, name in fields}
            with _exit_codes():
                command(**values, **({"options": options} if fields else {}))

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command()(run)
        return command

    return decorate


def _parameter(owner: type, name: str) -> inspect.Parameter:
    """The option of one config field."""
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    kind = typing.get_type_hints(owner)[name]
    if typing.get_origin(kind) is types.UnionType or typing.get_origin(kind) is typing.Union:
        literal = any(typing.get_origin(part) is typing.Literal for part in typing.get_args(kind))
        kind = str | None if literal else kind
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{name.replace('_', '-')}"] if kind is bool and field.default else [flag]
    option = typer.Option(*names, help=field.metadata["help"])
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[kind, option]
    )


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
        errors.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        errors.print(f"cannot be written or read: {error}", markup=False, style="red", soft_wrap=True)
        raise typer.Exit(RenderError.exit_code) from error
    except (ValueError, TypeError) as error:
        errors.print(str(error), markup=False, style="red", soft_wrap=True)
        raise typer.Exit(USAGE) from error
    except KeyboardInterrupt as error:
        errors.print("interrupted")
        raise typer.Exit(INTERRUPTED) from error


def _pick(owner: type, options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(owner)}
    return {name: value for name, value in options.items() if name in names}


ENCODING = (
    *((EncodeConfig, name) for name in ("shift", "attention_strength", "batch_size")),
    (DecodeLimits, "allow_network"),
)


@_command(
    (Sampling, "fps"),
    (SelectConfig, "per_minute"),
    (SelectConfig, "max_keyframes"),
    (SelectConfig, "min_gap_seconds"),
    (SelectConfig, "similarity_limit"),
    *((OutputConfig, name) for name in ("reel", "reel_seconds", "query", "storyboard", "thumbnails", "otio", "edl")),
    (OutputConfig, "keyframe_height"),
    (OutputConfig, "overwrite"),
    *ENCODING,
)
def summarize(
    videos: Videos,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder; each video gets one of its own in it")],
    keyframes: Annotated[str, typer.Option(metavar="N|auto", help="how many key-frames")] = "auto",
    model: Model = "builtin",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Writes key-frames, storyboard, contact sheet, thumbnails and a highlight reel for each video."""
    if keyframes != "auto" and not keyframes.isdecimal():
        raise ValueError(f"--keyframes must be a number or auto, got {keyframes!r}")
    select = SelectConfig(keyframes=None if keyframes == "auto" else int(keyframes), **_pick(SelectConfig, options))
    outputs = OutputConfig(**_pick(OutputConfig, options))
    sampling, encode = Sampling(**_pick(Sampling, options)), EncodeConfig(**_pick(EncodeConfig, options))
    documents: list[dict[str, Any]] = []
    used: set[str] = set()
    was_there = output.exists()
    with Engine.from_pretrained(model, device=device) as engine, Bars(errors, quiet=quiet) as bars:

        def one(source: Source) -> None:
            folder = output / _folder_name(source, used)
            progress = bars.start(source.name)
            with source:
                summary = engine.summarize(source, sampling=sampling, encode=encode, select=select, progress=progress)
                summary.save(folder, progress=progress, **dataclasses.asdict(outputs))
            bars.finish()
            documents.append(json.loads((folder / "summary.json").read_text("utf-8")))
            for warning in summary.warnings:
                errors.print(f"{source.name}: warning: {warning}", markup=False, style="yellow", soft_wrap=True)
            if not as_json:
                _print_summary(summary, folder)

        try:
            failed = _for_each(_sources(videos, options), one, bars)
        finally:
            if not was_there and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
    if as_json:
        single = len(documents) == 1 and not failed
        whole = {"schema": "keyreel.summaries/1", "summaries": documents, "failed": [f.document() for f in failed]}
        _print_json(documents[0] if single else whole)
    _end(failed, len(documents))


@_command((Sampling, "fps"), *ENCODING)
def search(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="what to look for")] = None,
    videos: Annotated[list[str] | None, typer.Argument(metavar="VIDEO...", help="files, folders, or -")] = None,
    image: Annotated[
        Path | None, typer.Option(help="look for this picture instead; then every argument is a video")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many moments")] = 5,
    model: Model = "builtin",
    device: Device = "auto",
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="write a page with pictures of the moments")] = None,
    previews: Annotated[Path | None, typer.Option(help="write a picture of each moment into this folder")] = None,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Finds the moments of videos that answer a text or a picture."""
    names = list(videos or [])
    if image is not None and text is not None:
        names.insert(0, text)
    if not names or (image is None and not text):
        raise ValueError("search needs a text (or --image FILE) and at least one video")
    query: Any = text if image is None else read_picture(image)
    sampling, encode = Sampling(**_pick(Sampling, options)), EncodeConfig(**_pick(EncodeConfig, options))
    summaries: list[Summary] = []
    with (
        Engine.from_pretrained(model, device=device) as engine,
        Bars(errors, quiet=quiet) as bars,
        contextlib.ExitStack() as opened,  # pictures of the hits are taken from the videos at the end
    ):

        def one(source: Source) -> None:
            opened.enter_context(source)
            progress = bars.start(source.name)
            summaries.append(engine.summarize(source, keyframes=1, sampling=sampling, encode=encode, progress=progress))
            bars.finish()

        failed = _for_each(_sources(names, options), one, bars)
        hits = engine.search(query, summaries, k=k) if summaries else []
        pictures = hit_pictures(hits, {s.video.path: s.source for s in summaries}) if html or previews else []
    if previews is not None:
        hits = save_previews(hits, pictures, previews)
    shown = text if image is None else str(image)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        with aside(html) as made:
            made.write_text(search_page(shown or "", hits, pictures), encoding="utf-8")
        errors.print(f"wrote {html}", markup=False)
    if as_json:
        _print_json(search_document(shown or "", hits))
    else:
        _print_hits(hits)
    _end(failed, len(summaries))


@_command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("keyreel-demo"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Renders a clip, summarises it and searches it with the built-in model; downloads nothing."""
    output.mkdir(parents=True, exist_ok=True)
    clip = output / "demo.mp4"
    with Engine.from_pretrained(device=device) as engine, Bars(errors, quiet=quiet) as bars:
        with aside(clip) as made:
            write_demo(made)
        progress = bars.start(str(clip))
        summary = engine.summarize(clip, progress=progress)
        folder = summary.save(output / "demo", progress=progress)
        bars.finish()
        _print_summary(summary, folder)
        table = Table("query", "found at", "score", box=None)
        for scene in SCENES:
            hit = summary.search(scene.caption, k=1)[0]
            table.add_row(scene.caption, _span(hit.start_seconds, hit.stop_seconds), f"{hit.score:.3f}")
    out = Console(highlight=False)
    out.print(table)
    out.print(f"open {folder / 'storyboard.html'} in a browser", markup=False, soft_wrap=True)


@_command()
def export(
    model: Annotated[
        str, typer.Argument(help="ARCH/PRETRAINED or ARCH/CHECKPOINT as open_clip spells it, hf-hub:ORG/REPO")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder; the cache by default")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or fp16 for GPUs")] = "fp32",
    attention: Annotated[
        str, typer.Option(help="timm network of the spatial attention, or uniform")
    ] = "mobilenetv3_small_100",
    attention_weights: Annotated[Path | None, typer.Option(help="its weights, a local file")] = None,
    projection: Annotated[Path | None, typer.Option(help="trained projection, safetensors")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="for tests: weights that know nothing")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="a Triton model repository; MODEL may then be builtin or a bundle's folder"),
    ] = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="build TensorRT plans for this GPU; MODEL may be builtin or a folder too")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turns an open_clip model into a bundle that keyreel runs; needs the extra `export`."""
    device: Any = None
    if tensorrt:  # looked at first: an export takes minutes
        library()
        device = resolve("cuda")
    import_extra("torch", extra="export", purpose="exporting a model")
    from keyreel_export.bundle import export_model
    from keyreel_export.triton import export_triton

    if (triton is not None or tensorrt) and (model == BUILTIN or (Path(model) / MANIFEST).is_file()):
        if output or attention_weights or projection or random_weights or seed or precision != "fp32":
            raise ValueError(f"{model} is a bundle already: only --triton and --tensorrt go with it")
        folder = Bundle.find(model).folder
    else:
        folder = export_model(
            model,
            output,
            precision=precision,
            attention=attention,
            attention_weights=attention_weights,
            projection=projection,
            random_weights=random_weights,
            seed=seed,
            progress=lambda stage, done, total: errors.print(f"{stage} ...", markup=False),
        )
    if triton is not None:
        export_triton(Bundle.load(folder), triton)
        errors.print(f"wrote {triton}", markup=False, soft_wrap=True)
    if tensorrt:
        with Bars(errors) as bars:
            arrays, size, progress = device.ops.arrays, device.batch_size, bars.start(model)
            build_plans(Bundle.load(folder), arrays, batch_size=size, progress=progress)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if as_json:
        _print_json({"folder": str(folder), "manifest": manifest})
    else:
        print(folder)


@_command()
def doctor(as_json: Json = False) -> None:
    """Checks what keyreel needs on this machine, and says how to mend what is missing."""
    found = probes()
    if as_json:
        _print_json(
            {"schema": "keyreel.doctor/1", "version": __version__, "probes": [dataclasses.asdict(p) for p in found]}
        )
    else:
        out = Console(highlight=False)
        for probe in found:
            mark = "ok  " if probe.passed else ("FAIL" if probe.required else "no  ")
            out.print(f"{mark} {probe.name}: {probe.found}", markup=False, soft_wrap=True)
            if probe.fix:
                out.print(f"       fix: {probe.fix}", markup=False, soft_wrap=True)
    if any(probe.required and not probe.passed for probe in found):
        raise typer.Exit(5)


@_command()
def version() -> None:
    """Prints the version."""
    print(__version__)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _sources(names: Sequence[str], options: dict[str, Any]) -> list[str | Source | KeyreelError]:
    """One entry a video; folders stand for the videos in them."""
    limits = DecodeLimits(**_pick(DecodeLimits, options))
    found: list[str | Source | KeyreelError] = []
    for name in names:
        if not name:
            raise ValueError("an empty name is no video")
        path = Path(name)
        if name == "-" or not path.is_dir():
            found.append(Source(name, limits=limits))
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        inside = [p for p in inside if not (p.name == "reel.mp4" and (p.parent / "summary.json").is_file())]
        hint = f"files that end in one of: {' '.join(sorted(VIDEO_SUFFIXES))}"
        found += [Source(p, limits=limits) for p in inside] or [
            SourceNotFound(f"there is no video in the folder {name!r}", hint=hint)
        ]
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    video: str
    error: KeyreelError

    def document(self) -> dict[str, Any]:
        return {"video": self.video, "error": str(self.error), "exit_code": self.error.exit_code}


def _for_each(sources: Sequence[Any], work: Callable[[Source], None], bars: Bars) -> list[_Failure]:
    """Goes on past videos that fail; says at once which and why."""
    failed = []
    for source in sources:
        try:
            if isinstance(source, KeyreelError):
                raise source
            work(source)
        except MissingExtra:
            raise  # it would be missing for every video
        except Exception as error:  # noqa: BLE001 - one video must not take the others with it, whatever is wrong with it
            bars.finish()
            name = source.name if isinstance(source, Source) else ""
            known = error if isinstance(error, KeyreelError) else KeyreelError(f"{type(error).__name__}: {error}")
            failed.append(_Failure(name, known))
            prefix = f"{name}: " if name not in str(known) else ""
            errors.print(f"{prefix}{known}", markup=False, style="red", soft_wrap=True)
    return failed


def _end(failed: Sequence[_Failure], succeeded: int) -> None:
    if not failed:
        return
    codes = {failure.error.exit_code for failure in failed}
    raise typer.Exit(codes.pop() if not succeeded and len(codes) == 1 else SOME_FAILED)


def _folder_name(source: Source, used: set[str]) -> str:
    """The video's stem; two videos of one stem get folders of their own."""
    stem = source.path.stem if source.path is not None else source.name.strip("<>").replace("/", "-")
    # The stem of "...mp4" is "..", which is another folder altogether.
    stem = stem if stem.strip(".") else "video"
    name, number = stem, 2
    while name in used:
        name, number = f"{stem}-{number}", number + 1
    used.add(name)
    return name


# --- outputs ----------------------------------------------------------------------------------------------------------


def _print_json(document: Any) -> None:
    # ASCII: a file name need not be valid in the encoding of stdout.
    print(json.dumps(document, indent=2))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _span(start: float, stop: float) -> str:
    return f"{start:.2f} - {stop:.2f} s"


def _print_summary(summary: Summary, folder: Path) -> None:
    out = Console(highlight=False)
    video, total = summary.video, summary.timings_seconds["total"]
    out.print(
        f"{video.path}: {_count(len(summary.keyframes), 'key-frame')} and {_count(len(summary.shots), 'shot')} from "
        f"{_count(len(summary.embedding), 'frame')} in {total:.1f} s on {summary.device} -> {folder}",
        markup=False,
        soft_wrap=True,
    )
    for frame in summary.keyframes:
        out.print(f"  {frame.pts_seconds:9.3f} s  {frame.weight:6.1%}", markup=False)


def _print_hits(hits: Sequence[SearchHit]) -> None:
    table = Table("score", "moment", "best at", "video", box=None)
    for hit in hits:
        table.add_row(
            f"{hit.score:.3f}",
            _span(hit.start_seconds, hit.stop_seconds),
            f"{hit.pts_seconds:.2f} s",
            escape(hit.video),
        )
    if hits:
        # A pipe has no width: nothing is cut there.
        Console(highlight=False, width=None if sys.stdout.isatty() else 400).print(table)


def main() -> None:
    """Runs the command line.

    Native libraries print where they like: PyNvVideoCodec tells of damage on the file descriptor of stdout. That one
    goes to stderr, so that stdout holds our data and nothing else.
    """
    with contextlib.suppress(OSError, AttributeError):  # the caller has closed one of them
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    app()
