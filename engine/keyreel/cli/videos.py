"""`keyreel summarize` and `keyreel demo`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import keyreel
from keyreel.cli import options
from keyreel.cli.inputs import exit_for, folder_name, for_each, sources
from keyreel.cli.models import ensure
from keyreel.cli.output import log, print_json, print_line, print_summary, print_table, span
from keyreel.cli.progress import PICTURED, RENDERED, Bars
from keyreel.config import (
    DecodeLimits,
    EncodeConfig,
    Markers,
    OutputConfig,
    ReelMode,
    ReelOrder,
    ReframeMode,
    Sampling,
    SelectConfig,
)

if TYPE_CHECKING:
    from keyreel.decode.source import Source

SELECT, OUTPUT = SelectConfig(), OutputConfig()  # defaults


def summarize(
    videos: options.Videos,
    output: Annotated[Path, Option("--output", "-o", help="folder; each video gets one of its own in it")],
    keyframes: Annotated[str, Option(metavar="N|auto", help="how many key-frames")] = "auto",
    model: options.Model = "builtin",
    yes: options.Yes = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    sampling: options.Mode = options.SAMPLING.mode,
    fps: options.Fps = options.SAMPLING.fps,
    tolerance: options.Tolerance = options.SAMPLING.tolerance_seconds,
    every: options.Every = options.SAMPLING.every,
    per_minute: Annotated[
        float | None, Option(help="key-frames for each minute of video, instead of a number")
    ] = SELECT.per_minute,
    max_keyframes: Annotated[
        int, Option(help="most key-frames that the automatic choice may take")
    ] = SELECT.max_keyframes,
    min_gap_seconds: Annotated[float, Option(help="least time between two key-frames")] = SELECT.min_gap_seconds,
    similarity_limit: Annotated[
        float, Option(help="no two key-frames are more alike than this cosine")
    ] = SELECT.similarity_limit,
    reel: Annotated[bool, Option(help="write reel.mp4, or reel.mkv where VP8 or VP9 is copied")] = OUTPUT.reel,
    reel_seconds: Annotated[
        float | None, Option(help="longest reel; 15 % of the video, 10 to 60 s, by default")
    ] = OUTPUT.reel_seconds,
    reel_mode: Annotated[
        ReelMode,
        Option(parser=str, metavar="<str>", help="auto, copy its packets as they are, or encode its frames anew"),
    ] = OUTPUT.reel_mode,
    reel_height: Annotated[
        int, Option(help="tallest picture of an encoded reel, in pixels; its width if it is upright")
    ] = OUTPUT.reel_height,
    query: Annotated[str | None, Option(help="rank the reel's spans by how well they answer this text")] = OUTPUT.query,
    order: Annotated[
        ReelOrder,
        Option(parser=str, metavar="<str>", help="of the spans with a query: time, or score for the best first"),
    ] = OUTPUT.order,
    aspect: Annotated[
        str | None, Option(metavar="W:H", help="shape of the reel: 9:16, 1:1, 4:5, 16:9 or another; the video's own")
    ] = OUTPUT.aspect,
    reframe: Annotated[
        ReframeMode,
        Option(parser=str, metavar="<str>", help="with --aspect: follow the subject, or fit whole frames"),
    ] = OUTPUT.reframe,
    storyboard: Annotated[bool, Option(help="write storyboard.html")] = OUTPUT.storyboard,
    thumbnails: Annotated[bool, Option(help="write thumbs.vtt and thumbs.jpg")] = OUTPUT.thumbnails,
    otio: Annotated[bool, Option("--otio", help="write reel.otio")] = OUTPUT.otio,
    edl: Annotated[bool, Option("--edl", help="write reel.edl")] = OUTPUT.edl,
    markers: Annotated[
        Markers | None,
        Option(parser=str, metavar="otio|edl|fcpxml", help="write the key-frames as markers for an editing program"),
    ] = OUTPUT.markers,
    scenes_csv: Annotated[
        bool, Option("--scenes-csv", help="write the shots as scenes.csv, PySceneDetect's scene list")
    ] = OUTPUT.scenes_csv,
    chapters: Annotated[
        bool, Option("--chapters", help="write a copy of the video with its scenes as chapters, nothing encoded anew")
    ] = OUTPUT.chapters,
    embeddings: Annotated[
        bool, Option("--embeddings", help="write embeddings.npz, which Summary.load and NumPy read")
    ] = OUTPUT.embeddings,
    keyframe_height: Annotated[int, Option(help="tallest key-frame picture, in pixels")] = OUTPUT.keyframe_height,
    overwrite: Annotated[bool, Option("--overwrite", help="replace a folder that is there")] = OUTPUT.overwrite,
    shift: options.Shift = options.ENCODING.shift,
    subject: options.Subject = options.ENCODING.subject,
    batch_size: options.BatchSize = options.ENCODING.batch_size,
    allow_network: options.AllowNetwork = False,
    longest: options.Longest = options.LONGEST,
    hidden: options.Hidden = False,
) -> None:
    """Writes key-frames, storyboard, contact sheet, thumbnails and a highlight reel for each video."""
    from keyreel.cli.documents import Summaries
    from keyreel.render.documents import FailedVideo

    if keyframes != "auto" and not keyframes.isdecimal():
        raise ValueError(f"--keyframes must be a number or auto, got {keyframes!r}")
    select = SelectConfig(
        keyframes=None if keyframes == "auto" else int(keyframes),
        per_minute=per_minute,
        max_keyframes=max_keyframes,
        min_gap_seconds=min_gap_seconds,
        similarity_limit=similarity_limit,
    )
    outputs = OutputConfig(
        reel=reel,
        reel_seconds=reel_seconds,
        reel_mode=reel_mode,
        reel_height=reel_height,
        query=query,
        order=order,
        aspect=aspect,
        reframe=reframe,
        storyboard=storyboard,
        thumbnails=thumbnails,
        otio=otio,
        edl=edl,
        markers=markers,
        scenes_csv=scenes_csv,
        chapters=chapters,
        embeddings=embeddings,
        keyframe_height=keyframe_height,
        overwrite=overwrite,
    )
    frames = Sampling(mode=sampling, fps=fps, tolerance_seconds=tolerance, every=every)
    encode = EncodeConfig(shift=shift, subject=subject, batch_size=batch_size)
    documents: list[dict[str, Any]] = []
    used: set[str] = set()
    existed = output.exists()
    ensure(model, yes=yes, quiet=quiet)
    with keyreel.Engine.from_pretrained(model, device=device) as engine, Bars(quiet=quiet) as bars:

        def work(source: Source) -> None:
            folder = output / folder_name(source, used)
            began = time.perf_counter()
            progress = bars.start(source.name, RENDERED if reel else PICTURED)
            with source:
                summary = engine.summarize(source, sampling=frames, encode=encode, select=select, progress=progress)
                summary.save(folder, outputs, progress=progress)
            seconds = time.perf_counter() - began
            bars.finish()
            documents.append(json.loads((folder / "summary.json").read_text("utf-8")))
            for warning in summary.warnings:
                log(f"{source.name}: warning: {warning}", style="yellow")
            if reel and documents[-1]["reel"]["file"] is None:
                log(f"{source.name}: no reel: {documents[-1]['reel']['reason']}")
            if not as_json:
                with bars.hidden():
                    print_summary(summary, folder, seconds)

        try:
            limits = DecodeLimits(max_duration_seconds=longest, allow_network=allow_network)
            failed = for_each(sources(videos, limits, hidden=hidden), work, bars.failed)
        finally:
            if not existed and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
    if as_json:
        several = Summaries(summaries=documents, failed=list(map(FailedVideo.of, failed)))
        print_json(documents[0] if len(documents) == 1 and not failed else several)
    exit_for(failed, len(documents))


def demo(
    output: Annotated[Path, Option("--output", "-o", help="folder")] = Path("keyreel-demo"),
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Renders a clip, summarises it and searches it with the built-in model; downloads nothing."""
    from keyreel.demo import SCENES, write_demo
    from keyreel.render.files import atomic_write

    output.mkdir(parents=True, exist_ok=True)
    clip = output / "demo.mp4"
    with keyreel.Engine.from_pretrained(device=device) as engine, Bars(quiet=quiet) as bars:
        with atomic_write(clip) as made:
            write_demo(made)
        began = time.perf_counter()
        progress = bars.start(str(clip), RENDERED)
        summary = engine.summarize(clip, progress=progress)
        folder = summary.save(output / "demo", progress=progress)
        seconds = time.perf_counter() - began
        bars.finish()
        with bars.hidden():
            print_summary(summary, folder, seconds)
        best = [(scene.caption, summary.search(scene.caption, k=1)[0]) for scene in SCENES]
    rows = [(caption, span(hit.start_seconds, hit.stop_seconds), f"{hit.score:.3f}") for caption, hit in best]
    print_table(("query", "found at", "score"), rows)
    print_line(f"open {folder / 'storyboard.html'} in a browser")
