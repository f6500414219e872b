"""The commands doctor, bench, export and version."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.inputs import exit_for, for_each, sources
from keyreel.cli.output import log, plural, print_answer, print_json, print_line, print_table
from keyreel.cli.progress import RENDERED, Bars
from keyreel.errors import BackendError, import_extra

if TYPE_CHECKING:
    from keyreel.cli.documents import Bench, BenchVideo
    from keyreel.runtime.backend import Backend
    from keyreel.types import Progress

RESEARCH = "Research and tests"  # panel
STAGES = ("decode", "encode", "fuse", "select", "render", "reel")
PACKAGES = ("av", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13")


def version() -> None:
    """Prints the version."""
    print(keyreel.__version__)


def doctor(as_json: options.Json = False) -> None:
    """Checks what works on this machine and says how to fix the rest.

    Examples:
        keyreel doctor
        keyreel doctor --json
    """
    from keyreel.cli.documents import Doctor
    from keyreel.runtime.doctor import probes

    found = probes()
    lines = []
    for probe in found:
        mark = "ok  " if probe.passed else ("FAIL" if probe.required else "no  ")
        lines.append(f"{mark} {probe.name}: {probe.found}")
        lines += [f"       fix: {probe.fix}"] if probe.fix else []
    print_answer(Doctor(version=keyreel.__version__, probes=found), *lines, as_json=as_json)
    if any(probe.required and not probe.passed for probe in found):
        raise typer.Exit(BackendError.exit_code)


def bench(
    *,
    videos: options.Videos,
    runs: Annotated[
        int, Option(min=1, max=1000, metavar="N", help="measured runs over all videos, after one that warms up")
    ] = 3,
    stop_seconds: Annotated[
        float | None, Option(metavar="SECONDS", help="use each video up to this time; default: all of it")
    ] = None,
    frames: options.Frames,
    encode: options.Encode,
    limits: options.Limits,
    hidden: options.Hidden = False,
    model: options.Model = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measures the speed of `summarize` on your videos, stage by stage.

    Examples:
        keyreel bench holiday.mp4
        keyreel bench ~/Videos --stop-seconds 60 --runs 5 --json
    """
    from keyreel.cli.documents import Bench, BenchVideo
    from keyreel.decode.source import Source
    from keyreel.render.documents import FailedVideo

    frames = dataclasses.replace(frames, stop_seconds=stop_seconds)
    measured: dict[str, list[BenchVideo]] = {}
    began = time.perf_counter()
    with (
        keyreel.Engine.from_pretrained(model or "builtin", device=device) as engine,
        Bars(quiet=quiet) as bars,
        contextlib.ExitStack() as opened,
    ):

        def measure(source: Source, progress: Progress) -> None:
            source.forget()
            wall, cpu = time.perf_counter(), time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                summary = engine.summarize(source, sampling=frames, encode=encode, progress=progress)
                saved = summary.save(Path(folder) / "outputs", progress=progress)
                seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
                stages = json.loads((saved / "summary.json").read_text("utf-8"))["timings_seconds"]
            run = BenchVideo(
                video=source.name,
                video_seconds=summary.stop_seconds,
                frames=len(summary.embedding),
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                times_real_time=summary.stop_seconds / seconds,
                stage_seconds={stage: stages[stage] for stage in STAGES},
            )
            measured.setdefault(source.name, []).append(run)

        engine.warmup()
        given = sources(videos, limits, hidden=hidden)
        good = [opened.enter_context(source) for source in given if isinstance(source, Source)]
        failed = for_each(given, bars, measure, RENDERED)  # warms up
        good = [source for source in good if source.name in measured]
        measured.clear()
        warmup_seconds = time.perf_counter() - began
        for number in range(runs):  # the videos take turns, so that a disturbance affects all
            bars.whole("runs", number, runs)
            failed += for_each(good, bars, measure, RENDERED)
        result = Bench(
            model=engine.bundle.name,
            model_sha256=engine.bundle.sha256,
            device=engine.backend.device,
            device_reason=engine.backend.reason,
            machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
            versions=_versions(),
            config={"sampling": dataclasses.asdict(frames), "encode": dataclasses.asdict(encode)},
            runs=runs,
            warmup_seconds=warmup_seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            videos=list(map(_medians, measured.values())),
            failed=list(map(FailedVideo.of, failed)),
        )
    if as_json:
        print_json(result)
    elif result.videos:
        _print_bench(result)
    exit_for(failed, len(result.videos))


def _medians(runs: Sequence[BenchVideo]) -> BenchVideo:
    return dataclasses.replace(
        runs[0],
        seconds=statistics.median(run.seconds for run in runs),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
        times_real_time=statistics.median(run.times_real_time for run in runs),
        stage_seconds={stage: statistics.median(run.stage_seconds[stage] for run in runs) for stage in STAGES},
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "keyreel": keyreel.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _print_bench(result: Bench) -> None:
    heads = *(f"{stage}, s" for stage in STAGES), "all, s", "CPU-s", "x time", "frames", "video"
    rows = []
    for video in result.videos:
        times = *(video.stage_seconds[stage] for stage in STAGES), video.seconds, video.cpu_seconds
        numbers = *(f"{seconds:.3f}" for seconds in times), f"{video.times_real_time:.1f}", str(video.frames)
        rows.append((*numbers, video.video))
    print_table(heads, rows, right=len(heads) - 1)
    print_line(f"{result.model} on {result.device} ({result.device_reason}); {result.machine}")
    print_line(", ".join(f"{name} {number}" for name, number in result.versions.items()))
    memory = f"peak memory {result.peak_memory_bytes / 1e6:.0f} MB"
    warmup = f"a warm-up of {result.warmup_seconds:.1f} s"
    print_line(f"medians of {plural(result.runs, 'run')} after {warmup}; {memory}")
    print_line("decode runs at the same time as encode and fuse; render includes the reel")


def export(
    model: Annotated[
        str, Argument(metavar="MODEL", help="ARCH/PRETRAINED or ARCH/FILE of open_clip, or hf-hub:ORG/REPO")
    ],
    output: options.Output = None,
    precision: options.Precision = "fp32",
    verify_video: Annotated[
        Path | None, Option(metavar="FILE", help="measure an int8 model on frames of this video")
    ] = None,
    fit: Annotated[
        Path | None,
        Option(metavar="DIR", help="fit the subject vectors to your pictures: a subfolder per label, or labels.csv"),
    ] = None,
    triton: Annotated[
        Path | None, Option(metavar="DIR", help="write a Triton model repository; MODEL may be a bundle or builtin")
    ] = None,
    tensorrt: options.TensorRT = False,
    attention: Annotated[
        Literal["builtin", "uniform"], Option(rich_help_panel=RESEARCH, help="spatial attention; uniform means none")
    ] = "builtin",
    projection: Annotated[
        Path | None, Option(metavar="FILE", rich_help_panel=RESEARCH, help="a trained projection in safetensors")
    ] = None,
    random_weights: Annotated[
        bool, Option("--random-weights", rich_help_panel=RESEARCH, help="random weights, for tests")
    ] = False,
    seed: Annotated[int, Option(metavar="N", rich_help_panel=RESEARCH, help="seed of the random weights")] = 0,
    as_json: options.Json = False,
) -> None:
    """Makes a bundle of an open_clip model; needs the extra `export`.

    Examples:
        keyreel export ViT-B-32/laion2b_s34b_b79k
        keyreel export ViT-B-32/laion2b_s34b_b79k --precision fp16 -o bundle
    """
    from keyreel.cli.documents import ExportedModel
    from keyreel.runtime.bundle import BUILTIN, MANIFEST, Bundle

    if (triton is not None or tensorrt) and precision == "int8":
        raise ValueError("int8 is for CPUs: --triton and --tensorrt take fp32 or fp16")
    backend = device_for_plans() if tensorrt else None  # checked first: an export takes minutes
    import_extra("torch", extra="export", purpose="exporting a model")
    from keyreel_export.bundle import export_model
    from keyreel_export.triton import export_triton

    if (triton is not None or tensorrt) and (model == BUILTIN or (Path(model) / MANIFEST).is_file()):
        other = output or projection or fit or verify_video
        if other or random_weights or seed or precision != "fp32":
            raise ValueError(f"{model} is a bundle already: use only --triton and --tensorrt with it")
        folder = Bundle.find(model).folder
    else:
        folder = export_model(
            model,
            output,
            precision=precision,
            attention=attention,
            projection=projection,
            random_weights=random_weights,
            seed=seed,
            verify_video=verify_video,
            fit=fit,
            progress=lambda stage, done, total: log(f"{stage} ..."),
        )
    if triton is not None:
        export_triton(Bundle.load(folder), triton)
        log(f"wrote {triton}")
    if backend is not None:
        with Bars() as bars:
            write_plans(backend, folder, bars.start(model))
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    if fit is not None:
        _log_fit(manifest["verify"])
    if as_json:
        print_json(ExportedModel(folder=str(folder), manifest=manifest))
    else:
        print(folder)


def device_for_plans() -> Backend:
    """Opens the GPU to build TensorRT plans for. Raises if GPU or TensorRT do not work."""
    from keyreel.runtime.backend import resolve
    from keyreel.runtime.tensorrt_build import load_tensorrt

    load_tensorrt()
    return resolve("cuda")


def write_plans(backend: Backend, folder: Path, progress: Progress) -> None:
    """Builds the TensorRT plans of a bundle for this GPU."""
    from keyreel.runtime.bundle import Bundle
    from keyreel.runtime.tensorrt import build_plans

    arrays: Any = backend.ops.arrays
    build_plans(Bundle.load(folder), arrays, batch_size=backend.batch_size, progress=progress)


def _log_fit(measured: Mapping[str, float]) -> None:
    fitted, held = (int(measured[name]) for name in ("fitted_pictures", "held_out_pictures"))
    log(f"fitted to {plural(fitted, 'picture')}; mean average precision on clips of {held} other pictures:")
    for kind, what in (("objects", "what moves"), ("places", "the place")):
        scene, free, own = (measured[f"held_out_{kind}_{way}"] for way in ("scene", "training_free", "fitted"))
        log(f"  {what}: {scene:.3f} without subject vectors, {free:.3f} with unfitted ones, {own:.3f} with fitted ones")
