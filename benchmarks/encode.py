"""Image towers with random weights on each runtime, and what spatial attention adds.

All systems run the backbone of one bundle; torch runs the module that it was exported from. `cosine` is the least
between the tokens of a picture and those of onnxruntime in fp32. Models are exported into --content the first time,
which takes minutes; --quick takes the built-in one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks._common import Absent, Row, System, compare, parser_of, run

BUILTIN = "builtin"
ATTENTION = "keyreel attention"


def models(*, quick: bool) -> tuple[str, ...]:
    return (BUILTIN,) if quick else ("ViT-B-32", "RN50", "MobileCLIP2-S0", "convnext_base_w")


def bundle(model: str, content: Path, *, precision: str = "fp32") -> Path:
    """The folder of a model; with random weights, and exported if it is not there, where it is not the built-in one."""
    from keyreel.errors import ModelError
    from keyreel.runtime.bundle import Bundle

    if model == BUILTIN:
        return Bundle.find(BUILTIN).folder
    folder = content / "models" / (model if precision == "fp32" else f"{model}@{precision}")
    if not (folder / "manifest.json").exists():
        from keyreel_export import export_model

        try:
            export_model(model, folder, precision=precision, random_weights=True)
        except ModelError as error:  # such as that int8 would not be faster
            raise Absent(f"there is no such bundle: {error}") from error
    return folder


def pictures(folder: Path, count: int) -> Any:
    """[N, H, W, 3] uint8: blocks of colour with noise, of the size that the model takes."""
    from keyreel.runtime.bundle import Bundle

    image, random = Bundle.load(folder).image, np.random.default_rng(0)
    coarse = random.integers(0, 200, (count, image.height // 16, image.width // 16, 3), dtype=np.uint8)
    fine = coarse.repeat(16, 1).repeat(16, 2)
    return fine + random.integers(0, 56, fine.shape, dtype=np.uint8)


def keyreel(frames: Any, model: str, content: Path, graph: str = "backbone", precision: str = "fp32") -> peers.Run:
    """The session that an Engine opens."""
    from keyreel import Engine

    engine = Engine.from_pretrained(bundle(model, content, precision=precision), device="cpu")
    session = engine.backend.open_session(engine.bundle.file(f"{graph}.onnx"))
    return lambda: next(iter(session.run({"frames": frames}).values()))


def check(expected: Any, result: Any) -> dict[str, float]:
    tokens = result.reshape(expected.shape)
    lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(expected, axis=1)
    return {"cosine": float(((tokens * expected).sum(1) / lengths).min())}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    count = 4 if options.quick else 16
    for model in models(quick=options.quick):
        folder = bundle(model, options.content)
        frames = pictures(folder, count)
        checked = partial(check, peers.onnxruntime(frames, folder)().reshape(count, -1))
        own = partial(keyreel, frames, model, options.content)
        systems = [
            System("keyreel", own, checked),
            System("onnxruntime fp32", partial(peers.onnxruntime, frames, folder), checked),
            System("openvino bf16", partial(peers.openvino, frames, folder), checked),
        ]
        if model != BUILTIN:
            systems += [
                System(ATTENTION, partial(own, "attention")),
                System("keyreel int8", partial(own, precision="int8"), checked),
                System("torch fp32", partial(peers.torch, frames, model, "float32"), checked),
                System("torch bf16", partial(peers.torch, frames, model, "bfloat16"), checked),
            ]
        params = {"model": model, "images": count}
        yield from compare("encode", params, systems, runs=5, seconds=20, limit_seconds=1200)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
