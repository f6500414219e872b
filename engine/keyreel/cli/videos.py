"""`keyreel summarize` and `keyreel demo`."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

import keyreel
from keyreel.cli import options
from keyreel.cli.inputs import exit_for, folder_name, for_each, sources
from keyreel.cli.models import ensure
from keyreel.cli.output import log, print_json, print_line, print_summary, print_table, span
from keyreel.cli.progress import PICTURED, RENDERED, Bars
from keyreel.cli.signature import Made
from keyreel.config import Markers, OutputConfig, ReelMode, ReelOrder, ReframeMode, SelectConfig
from keyreel.errors import RenderError

if TYPE_CHECKING:
    from keyreel.decode.source import Source
    from keyreel.types import Progress

_log = logging.getLogger(__name__)
KEYFRAMES, REEL, FILES = "Key-frames", "Reel", "Files"  # panels


def _count(given: str) -> int | None:
    if given != "auto" and not given.isdecimal():
        raise typer.BadParameter(f"must be a number or auto, got {given!r}")
    return None if given == "auto" else int(given)


Select = Annotated[
    SelectConfig,
    Made(
        SelectConfig,
        keyframes=Annotated[
            int | None, Option(parser=_count, metavar="N|auto", help="number of key-frames; default: auto")
        ],
        per_minute=Annotated[
            float | None, Option(metavar="N", help="key-frames per minute of video, instead of --keyframes")
        ],
        max_keyframes=Annotated[int, Option(metavar="N", rich_help_panel=KEYFRAMES, help="auto chooses at most N")],
        min_gap_seconds=Annotated[
            float, Option(metavar="SECONDS", rich_help_panel=KEYFRAMES, help="least time between two key-frames")
        ],
        similarity_limit=Annotated[
            float,
            Option(metavar="COSINE", rich_help_panel=KEYFRAMES, help="no two key-frames are more similar, -1 to 1"),
        ],
    ),
]
Outputs = Annotated[
    OutputConfig,
    Made(
        OutputConfig,
        reel=Annotated[bool, Option(help="write a highlight reel: reel.mp4, or reel.mkv for copied VP8 and VP9")],
        reel_seconds=Annotated[
            float | None, Option(metavar="SECONDS", help="longest reel; default: 15 % of the video, 10 to 60 s")
        ],
        query=Annotated[str | None, Option(metavar="TEXT", help="fill the reel with what matches this text")],
        aspect=Annotated[str | None, Option(metavar="W:H", help="shape of the reel: 9:16, 1:1, 4:5, 16:9 or another")],
        overwrite=Annotated[bool, Option("--overwrite", help="replace an existing output folder")],
        reel_mode=Annotated[
            ReelMode,
            Option(rich_help_panel=REEL, help="copy the video's packets, encode its frames, or auto: copy if possible"),
        ],
        reel_height=Annotated[
            int, Option(metavar="PIXELS", rich_help_panel=REEL, help="largest short side of an encoded reel")
        ],
        order=Annotated[ReelOrder, Option(rich_help_panel=REEL, help="with --query: by time, or best first")],
        reframe=Annotated[
            ReframeMode, Option(rich_help_panel=REEL, help="with --aspect: follow the subject, or fit the whole frame")
        ],
        storyboard=Annotated[bool, Option(rich_help_panel=FILES, help="write storyboard.html")],
        thumbnails=Annotated[bool, Option(rich_help_panel=FILES, help="write thumbs.vtt and thumbs.jpg")],
        otio=Annotated[bool, Option("--otio", rich_help_panel=FILES, help="write reel.otio for editing programs")],
        edl=Annotated[bool, Option("--edl", rich_help_panel=FILES, help="write reel.edl for editing programs")],
        markers=Annotated[
            Markers | None,
            Option(rich_help_panel=FILES, help="write the key-frames as markers for an editing program"),
        ],
        scenes_csv=Annotated[
            bool, Option("--scenes-csv", rich_help_panel=FILES, help="write the shots as PySceneDetect's scene list")
        ],
        chapters=Annotated[
            bool, Option("--chapters", rich_help_panel=FILES, help="write a copy of the video with scenes as chapters")
        ],
        embeddings=Annotated[
            bool, Option("--embeddings", rich_help_panel=FILES, help="write embeddings.npz for Python")
        ],
        keyframe_height=Annotated[
            int, Option(metavar="PIXELS", rich_help_panel=FILES, help="largest height of a key-frame picture")
        ],
    ),
]


def summarize(
    *,
    videos: options.Videos,
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="each video gets a folder of its own in DIR")],
    select: Select,
    outputs: Outputs,
    frames: options.Frames,
    encode: options.Encode,
    limits: options.Limits,
    hidden: options.Hidden = False,
    model: options.Model = None,
    yes: options.Yes = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Writes key-frames, a storyboard, thumbnails and a highlight reel of each video.

    Examples:
        keyreel summarize holiday.mp4 -o out
        keyreel summarize match.mp4 -o out --reel-seconds 60 --query "a goal is scored" --aspect 9:16
    """
    from keyreel.cli.documents import Summaries
    from keyreel.render.documents import FailedVideo

    documents: list[dict[str, Any]] = []
    used: set[str] = set()
    if (existed := output.exists()) and not output.is_dir():
        raise RenderError(f"{output}: is a file", hint="--output names a folder; keyreel makes it if it is missing")
    ensure(model, yes=yes, quiet=quiet)
    with keyreel.Engine.from_pretrained(model or "builtin", device=device) as engine, Bars(quiet=quiet) as bars:

        def work(source: Source, progress: Progress) -> None:
            folder = output / folder_name(source, used)
            began = time.perf_counter()
            with source:
                summary = engine.summarize(source, sampling=frames, encode=encode, select=select, progress=progress)
                summary.save(folder, outputs, progress=progress)
            seconds = time.perf_counter() - began
            documents.append(json.loads((folder / "summary.json").read_text("utf-8")))
            for warning in summary.warnings:
                log(f"{source.name}: warning: {warning}", style="yellow")
            _log.info("%s: written in %.2f s", source.name, documents[-1]["timings_seconds"]["render"])
            if (reel := documents[-1]["reel"]) is not None:
                _log.info("%s: reel %s: %s", source.name, reel["mode"], reel["reason"])
            if outputs.reel and reel["file"] is None:
                log(f"{source.name}: no reel: {reel['reason']}")
            if not as_json:
                with bars.hidden():
                    print_summary(summary, folder, seconds)

        try:
            parts = RENDERED if outputs.reel else PICTURED
            failed = for_each(sources(videos, limits, hidden=hidden), bars, work, parts)
        finally:
            if not existed and output.is_dir() and not any(output.iterdir()):
                output.rmdir()
    if as_json:
        several = Summaries(summaries=documents, failed=list(map(FailedVideo.of, failed)))
        print_json(documents[0] if len(documents) == 1 and not failed else several)
    exit_for(failed, len(documents))


def demo(
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="where to write")] = Path("keyreel-demo"),
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Renders a clip, summarizes it and searches in it; downloads nothing.

    Examples:
        keyreel demo
        keyreel demo -o /tmp/demo --device cpu
    """
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
