"""`keyreel models`: lists, installs, removes and checks models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import keyreel
from keyreel.cli import options
from keyreel.cli.machine import device_for_plans, write_plans
from keyreel.cli.output import log, plural, print_answer, print_json, print_line, print_table
from keyreel.cli.progress import Bars

_FRAMES = 32  # to measure the speed of this machine


def list_models(as_json: options.Json = False) -> None:
    """Lists the models that you can install, and those that you have.

    Examples:
        keyreel models list
        keyreel models list --json
    """
    from keyreel.cli.documents import Model, Models
    from keyreel.models.catalogue import BUILTIN_GIGAFLOPS, CATALOGUE, RECOMMENDED
    from keyreel.models.install import installed
    from keyreel.runtime.bundle import BUILTIN

    here, rate = set(installed()), _gigaflops_a_second()
    demo = Model(
        BUILTIN, True, False, 0, 256, _round(rate / BUILTIN_GIGAFLOPS), "English", "Apache-2.0", "the demo model"
    )
    known = [
        Model(
            name=one.name,
            installed=one.name in here,
            recommended=one.name == RECOMMENDED,
            download_bytes=one.size_bytes,
            width=one.width,
            frames_a_second=_round(rate / one.gigaflops),
            languages=one.languages,
            licence=one.licence,
            about=one.about,
        )
        for one in CATALOGUE
    ]
    others = [
        Model(name, True, False, 0, None, None, "unknown", "unknown", "exported, or weights of your own")
        for name in sorted(here - {one.name for one in CATALOGUE})
    ]
    models = [demo, *known, *others]
    if as_json:
        print_json(Models(models=models))
        return
    rows = [
        (
            "" if not one.download_bytes else f"{one.download_bytes / 1e6:,.0f} MB",
            "" if one.frames_a_second is None else f"~{one.frames_a_second:g}",
            "" if one.width is None else str(one.width),
            "yes" if one.installed else "",
            one.name,
            one.languages,
            one.licence,
            one.about,
        )
        for one in models
    ]
    heads = ("download", "frames/s", "numbers", "installed", "model", "languages", "licence", "good for")
    print_table(heads, rows, right=3)
    print_line("frames/s: estimated for this CPU. numbers: length of a vector; longer ones make a larger library")


def install(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="a name from `keyreel models list`; default: the recommended one")
    ] = None,
    checkpoint: Annotated[
        Path | None, Option("--from", metavar="FILE", help="read weights from this safetensors file; downloads nothing")
    ] = None,
    tokenizer: Annotated[
        Path | None, Option(metavar="FILE", help="tokenizer.json or merges.txt; default: beside the weights")
    ] = None,
    called: Annotated[str | None, Option("--name", metavar="NAME", help="the name of your own weights")] = None,
    revision: Annotated[
        str | None, Option(metavar="COMMIT", help="another commit or branch of the model's repository")
    ] = None,
    precision: options.Precision = "fp32",
    tensorrt: options.TensorRT = False,
    output: options.Output = None,
    quiet: options.Quiet = False,
) -> None:
    """Downloads a model and prepares it; needs no PyTorch.

    Examples:
        keyreel models install
        keyreel models install ViT-B-32 --from my.safetensors --name mine
    """
    from keyreel.models.catalogue import RECOMMENDED

    if tensorrt and precision == "int8":
        raise ValueError("int8 is for CPUs: --tensorrt takes fp32 or fp16")
    backend = device_for_plans() if tensorrt else None
    with Bars(quiet=quiet) as bars:
        folder = _install(
            bars,
            name or RECOMMENDED,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            called=called,
            revision=revision,
            precision=precision,
            folder=output,
        )
        if backend is not None:
            write_plans(backend, folder, bars.start(folder.name))


def remove(
    names: Annotated[list[str], Argument(metavar="NAME", help="installed or exported models")],
) -> None:
    """Deletes models; downloaded weights stay in the Hugging Face cache.

    Examples:
        keyreel models remove mine
        keyreel models remove ViT-B-32/laion2b_s34b_b79k ViT-L-14/laion2b_s32b_b82k
    """
    from keyreel.models.install import remove

    for name in names:
        log(f"deleted {remove(name)}")


def verify(
    names: Annotated[list[str] | None, Argument(metavar="NAME", help="default: all installed models")] = None,
    as_json: options.Json = False,
) -> None:
    """Checks the files of models and runs each model once.

    Examples:
        keyreel models verify
        keyreel models verify builtin --json
    """
    from keyreel.cli.documents import ModelCheck, ModelChecks
    from keyreel.models.install import check, installed

    found, lines = [], []
    for name in names or ("builtin", *installed()):
        measured = check(name)
        pictures, texts = int(measured["pictures"]), int(measured["texts"])
        found.append(ModelCheck(name, pictures, texts, measured["length_difference"]))
        encoded = f"{plural(pictures, 'picture')} and {plural(texts, 'text')} encoded"
        lines.append(f"{name}: {encoded}, all vectors have unit length")
    print_answer(ModelChecks(models=found), *lines, as_json=as_json)


def ensure(name: str | None, *, yes: bool, quiet: bool = False) -> None:
    """Installs a missing model of the catalogue if the user allows it, else raises an error with the command."""
    from keyreel.models import catalogue

    if name is None or (weights := catalogue.find(name)) is None:
        return
    from keyreel.errors import ModelError
    from keyreel.models.install import installed

    if name in installed():
        return
    if not yes:
        size = f"{weights.size_bytes / 1e6:,.0f} MB, licence: {weights.licence}"
        hint = f"`keyreel models install {name}` or the option --yes downloads it ({size})"
        raise ModelError(f"the model {name} is not installed", hint=hint)
    with Bars(quiet=quiet) as bars:
        _install(bars, name)


def _install(bars: Bars, name: str, **given: Any) -> Path:
    """Installs a model and prints that. Returns its folder."""
    from keyreel.models.catalogue import find
    from keyreel.models.install import install

    weights = find(name)
    if weights is not None and given.get("checkpoint") is None:
        log(f"{name}: {weights.size_bytes / 1e6:,.0f} MB from {weights.repository}, licence: {weights.licence}")
    began = time.perf_counter()
    folder = install(name, **given, progress=bars.start(name))
    bars.finish()
    log(f"installed {folder} in {time.perf_counter() - began:.1f} s")
    return folder


def _gigaflops_a_second() -> float:
    """The speed of this CPU with the built-in model, in GFLOPS; larger models reach about the same."""
    import numpy as np

    from keyreel.models import catalogue

    frames = np.random.default_rng(0).integers(0, 256, (_FRAMES, 112, 112, 3), np.uint8)
    with keyreel.Engine.from_pretrained(device="cpu") as engine:
        engine.embed(frames)
        began = time.perf_counter()
        engine.embed(frames)
        return _FRAMES * catalogue.BUILTIN_GIGAFLOPS / (time.perf_counter() - began)


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")
