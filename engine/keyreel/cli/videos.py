"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from keyreel import __version__
from keyreel.cli.app import (
    ENCODING,
    NETWORK,
    SAMPLING,
    Device,
    Json,
    Model,
    OwnModel,
    Quiet,
    app,
    command,
    end,
    picked,
    refuse,
)
from keyreel.cli.bench import bench as measure
from keyreel.cli.index import INDEXING, index
from keyreel.cli.inputs import folder_name, for_each, sources
from keyreel.cli.library import IN_LIBRARY, SERVING, search_library, serve
from keyreel.cli.output import (
    errors,
    out,
    print_bench,
    print_hits,
    print_json,
    print_probes,
    print_summary,
    say,
    say_failed,
    say_weak,
    span,
)
from keyreel.cli.progress import Bars
from keyreel.config import BenchConfig, DecodeLimits, EncodeConfig, OutputConfig, Sampling, SelectConfig
from keyreel.decode.source import Source
from keyreel.demo import SCENES, write_demo
from keyreel.engine import Engine
from keyreel.errors import Failure, KeyreelError, import_extra
from keyreel.images import read_picture
from keyreel.render.documents import FailedVideo, search_document
from keyreel.render.files import atomic_write
from keyreel.render.results import hit_pictures, save_previews
from keyreel.render.storyboard import search_page
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import BUILTIN, MANIFEST, Bundle
from keyreel.runtime.doctor import probes
from keyreel.runtime.tensorrt import build_plans
from keyreel.runtime.tensorrt_build import load_tensorrt
from keyreel.types import Summary

Videos = Annotated[list[str], typer.Argument(metavar="VIDEO...", help="files, folders, or - for standard input")]


def _told(bars: Bars) -> Callable[[Failure], None]:
    def tell(failure: Failure) -> None:
        bars.finish()
        say_failed(failure)

    return tell


def _sources(names: Sequence[str], options: dict[str, Any]) -> list[Source | KeyreelError]:
    return sources(names, DecodeLimits(**picked(DecodeLimits, options)))


@command(
    *SAMPLING,
    (SelectConfig, "per_minute"),
    (SelectConfig, "max_keyframes"),
    (SelectConfig, "min_gap_seconds"),
    (SelectConfig, "similarity_limit"),
    *((OutputConfig, name) for name in ("reel", "reel_seconds", "query", "storyboard", "thumbnails", "otio", "edl")),
    (OutputConfig, "keyframe_height"),
    (OutputConfig, "overwrite"),
    *ENCODING,
    *NETWORK,
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
    select = SelectConfig(keyframes=None if keyframes == "auto" else int(keyframes), **picked(SelectConfig, options))
    outputs = OutputConfig(**picked(OutputConfig, options))
    sampling, encode = Sampling(**picked(Sampling, options)), EncodeConfig(**picked(EncodeConfig, options))
    documents: list[dict[str, Any]] = []
    used: set[str] = set()
    was_there = output.exists()
    with Engine.from_pretrained(model, device=device) as engine, Bars(errors, quiet=quiet) as bars:

        def one(source: Source) -> None:
            folder = output / folder_name(source, used)
            progress = bars.start(source.name)
            with source:
                summary = engine.summarize(source, sampling=sampling, encode=encode, select=select, progress=progress)
                summary.save(folder, outputs, progress=progress)
            bars.finish()
            documents.append(json.loads((folder / "summary.json").read_text("utf-8")))
            for warning in summary.warnings:
                say(f"{source.name}: warning: {warning}", style="yellow")
            if not as_json:
                print_summary(summary, folder)

        try:
            failed = for_each(_sources(videos, options), one, _told(bars))
        finally:
            if not was_there and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
    if as_json:
        single = len(documents) == 1 and not failed
        whole = {"schema": "keyreel.summaries/1", "summaries": documents, "failed": [FailedVideo.of(f) for f in failed]}
        print_json(documents[0] if single else whole)
    end(failed, len(documents))


@command(*SAMPLING, *ENCODING, *NETWORK, *IN_LIBRARY)
def search(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="what to look for")] = None,
    videos: Annotated[list[str] | None, typer.Argument(metavar="VIDEO...", help="files, folders, or -")] = None,
    image: Annotated[
        Path | None, typer.Option(help="look for this picture instead; then every argument is a video")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="how many moments, or videos")] = 5,
    model: OwnModel = None,
    device: Device = "auto",
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="write a page with pictures of the moments")] = None,
    previews: Annotated[Path | None, typer.Option(help="write a picture of each moment into this folder")] = None,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Finds the moments of videos, or of a whole library, that answer a text or a picture."""
    names = list(videos or [])
    if options["library"] is not None:
        if names:
            raise ValueError("videos of a library are chosen with --in and --path")
        refuse(options, (*SAMPLING, *ENCODING, *NETWORK), "goes with videos, not with --library")
        out_of: dict[str, Any] = {"html": html, "previews": previews, "as_json": as_json}
        search_library(text, image, k=k, model=model, device=device, **out_of, options=options)
        return
    refuse(options, IN_LIBRARY, "goes with --library")
    if image is not None and text is not None:
        names.insert(0, text)
    if not names or (image is None and not text):
        raise ValueError("search needs a text (or --image FILE) and at least one video, or --library DIR")
    query: Any = text if image is None else read_picture(image)
    sampling, encode = Sampling(**picked(Sampling, options)), EncodeConfig(**picked(EncodeConfig, options))
    summaries: list[Summary] = []
    videos_by_name: dict[str, Source] = {}
    with (
        Engine.from_pretrained(model or BUILTIN, device=device) as engine,
        Bars(errors, quiet=quiet) as bars,
        contextlib.ExitStack() as opened,  # pictures of the hits are taken from the videos at the end
    ):

        def one(source: Source) -> None:
            opened.enter_context(source)
            videos_by_name[source.probe().path] = source
            progress = bars.start(source.name)
            summaries.append(engine.summarize(source, keyframes=1, sampling=sampling, encode=encode, progress=progress))
            bars.finish()

        failed = for_each(_sources(names, options), one, _told(bars))
        hits = engine.search(query, summaries, k=k) if summaries else []
        shots = sum(len(summary.shots) for summary in summaries)
        weak = engine.bundle.match_threshold(shots) if image is None else None
        pictures = hit_pictures(hits, videos_by_name) if html or previews else []
    if previews is not None:
        hits = save_previews(hits, pictures, previews)
    shown = text if image is None else str(image)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(html) as made:
            made.write_text(search_page(shown or "", hits, pictures), encoding="utf-8")
        say(f"wrote {html}")
    if as_json:
        print_json(search_document(shown or "", hits, failed, weak_score=weak))
    else:
        print_hits(hits)
    say_weak(hits, weak)
    end(failed, len(summaries))


command(*INDEXING)(index)
command(*SERVING)(serve)


@command((BenchConfig, "runs"), *SAMPLING, (Sampling, "stop_seconds"), *ENCODING, *NETWORK)
def bench(
    videos: Videos,
    model: Model = "builtin",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    options: dict[str, Any],
) -> None:
    """Measures how fast your own videos are summarised on this machine, stage by stage; writes nothing."""
    sampling, encode = Sampling(**picked(Sampling, options)), EncodeConfig(**picked(EncodeConfig, options))
    config, found = BenchConfig(**picked(BenchConfig, options)), _sources(videos, options)
    good = [video for video in found if isinstance(video, Source)]
    with (
        Engine.from_pretrained(model, device=device) as engine,
        Bars(errors, quiet=quiet) as bars,
        contextlib.ExitStack() as opened,
    ):
        for source in good:
            opened.enter_context(source)
        refused = for_each(
            [video for video in found if isinstance(video, KeyreelError)], lambda source: None, say_failed
        )
        progress = bars.start("bench")
        result = measure(
            engine, good, sampling=sampling, encode=encode, config=config, progress=progress, tell=say_failed
        )
    result = dataclasses.replace(result, failed=(*refused, *result.failed))
    if as_json:
        print_json(result.document())
    elif result.videos:
        print_bench(result)
    end(result.failed, len(result.videos))


@command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("keyreel-demo"),
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Renders a clip, summarises it and searches it with the built-in model; downloads nothing."""
    output.mkdir(parents=True, exist_ok=True)
    clip = output / "demo.mp4"
    with Engine.from_pretrained(device=device) as engine, Bars(errors, quiet=quiet) as bars:
        with atomic_write(clip) as made:
            write_demo(made)
        progress = bars.start(str(clip))
        summary = engine.summarize(clip, progress=progress)
        folder = summary.save(output / "demo", progress=progress)
        bars.finish()
        print_summary(summary, folder)
        table = Table("query", "found at", "score", box=None)
        for scene in SCENES:
            hit = summary.search(scene.caption, k=1)[0]
            table.add_row(scene.caption, span(hit.start_seconds, hit.stop_seconds), f"{hit.score:.3f}")
    out().print(table)
    out().print(f"open {folder / 'storyboard.html'} in a browser", markup=False, soft_wrap=True)


@command()
def export(
    model: Annotated[
        str, typer.Argument(help="ARCH/PRETRAINED or ARCH/CHECKPOINT as open_clip spells it, hf-hub:ORG/REPO")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder; the cache by default")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 for GPUs, or int8 for CPUs")] = "fp32",
    verify_video: Annotated[Path | None, typer.Option(help="measures an int8 model on frames of this video")] = None,
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
    if (triton is not None or tensorrt) and precision == "int8":
        raise ValueError("int8 is for CPUs: --triton and --tensorrt take fp32 or fp16")
    if tensorrt:  # looked at first: an export takes minutes
        load_tensorrt()
        device = resolve("cuda")
    import_extra("torch", extra="export", purpose="exporting a model")
    from keyreel_export.bundle import export_model
    from keyreel_export.triton import export_triton

    if (triton is not None or tensorrt) and (model == BUILTIN or (Path(model) / MANIFEST).is_file()):
        if output or attention_weights or projection or random_weights or seed or precision != "fp32" or verify_video:
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
            verify_video=verify_video,
            progress=lambda stage, done, total: say(f"{stage} ..."),
        )
    if triton is not None:
        export_triton(Bundle.load(folder), triton)
        say(f"wrote {triton}")
    if tensorrt:
        with Bars(errors) as bars:
            arrays, size, progress = device.ops.arrays, device.batch_size, bars.start(model)
            build_plans(Bundle.load(folder), arrays, batch_size=size, progress=progress)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    if as_json:
        print_json({"folder": str(folder), "manifest": manifest})
    else:
        print(folder)


@command()
def doctor(as_json: Json = False) -> None:
    """Checks what keyreel needs on this machine, and says how to mend what is missing."""
    found = probes()
    if as_json:
        print_json(
            {"schema": "keyreel.doctor/1", "version": __version__, "probes": [dataclasses.asdict(p) for p in found]}
        )
    else:
        print_probes(found)
    if any(probe.required and not probe.passed for probe in found):
        raise typer.Exit(5)


@command()
def version() -> None:
    """Prints the version."""
    print(__version__)


def main() -> None:
    """Runs the command line.

    Native libraries print where they like: PyNvVideoCodec tells of damage on the file descriptor of stdout. That one
    goes to stderr, so that stdout holds our data and nothing else.
    """
    with contextlib.suppress(OSError, AttributeError):  # the caller has closed one of them
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
    app()
