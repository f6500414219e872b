"""Image towers with random weights on each runtime, and the whole way from a file to vectors.

Case "encode": all systems run the backbone of one bundle; torch runs the module that it was exported from. `cosine` is
the least between the tokens of a picture and those of onnxruntime in fp32.

Case "end_to_end": one vector a second of a file, beside PyAV + Pillow + open_clip one picture at a time. `cosine` is
the least between the vector of a frame and the one of the plain way for the same time.

Models are exported into --content the first time, which takes minutes; --quick takes the built-in one.
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
from benchmarks.clips import Clip, clip
from benchmarks.decode import KEYFRAMES, NEAR, reference, times_of
from keyreel.errors import ModelError
from keyreel.runtime.bundle import Bundle

BUILTIN = "builtin"
MODELS = ("ViT-B-32", "RN50", "MobileCLIP2-S0", "convnext_base_w")


def bundle(model: str, content: Path, *, precision: str = "fp32") -> Path:
    """The folder of a model; with random weights, and exported if it is not there, where it is not the built-in one."""
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


def keyreel(frames: Any, model: str, content: Path, graph: str = "backbone", precision: str = "fp32") -> peers.Run:
    from keyreel import Engine

    engine = Engine.from_pretrained(bundle(model, content, precision=precision), device="cpu")
    session = engine.backend.open_session(engine.bundle.file(f"{graph}.onnx"))
    return lambda: next(iter(session.run({"frames": frames}).values()))


def check(expected: Any, result: Any) -> dict[str, float]:
    """The least cosine between a row and the expected one, if there is one."""
    if expected is None:
        return {"frames": len(result)}
    rows = result.reshape(expected.shape)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(expected, axis=1)
    return {"frames": len(rows), "cosine": float(((rows * expected).sum(1) / lengths).min())}


def from_file(path: Path, model: str, content: Path, sampling: Row, precision: str = "fp32") -> peers.Run:
    from keyreel import Engine, Sampling

    engine = Engine.from_pretrained(bundle(model, content, precision=precision), device="cpu")
    return lambda: engine.embed_video(path, sampling=Sampling(**sampling)).vectors


def measure(options: argparse.Namespace) -> Iterator[Row]:
    count = 4 if options.quick else 16
    models = (BUILTIN,) if options.quick else MODELS
    for model in models:
        folder = bundle(model, options.content)
        image = Bundle.load(folder).image
        frames = np.random.default_rng(0).integers(0, 256, (count, image.height, image.width, 3), np.uint8)
        checked = partial(check, peers.onnxruntime(frames, folder)().reshape(count, -1))
        own = partial(keyreel, frames, model, options.content)
        systems = [
            System("keyreel", own, checked),
            System("onnxruntime fp32", partial(peers.onnxruntime, frames, folder), checked),
            System("openvino bf16", partial(peers.openvino, frames, folder), checked),
        ]
        if model != BUILTIN:
            systems += [
                System("keyreel attention", partial(own, "attention")),
                System("keyreel int8", partial(own, precision="int8"), checked),
                System("torch fp32", partial(peers.torch, frames, model, "float32"), checked),
                System("torch bf16", partial(peers.torch, frames, model, "bfloat16"), checked),
            ]
        params = {"model": model, "images": count}
        yield from compare("encode", params, systems, runs=5, seconds=20, limit_seconds=1200)
    model = models[0]
    clips = [Clip("h264", 60, 360, 4)] if options.quick else [Clip("h264", gop, 1080, 30) for gop in (250, 60)]
    for wanted in clips:
        path = clip(options.content, wanted)
        times = times_of(reference(path, options.content))
        about, exact = (path, model, options.content), {"mode": "times", "times": tuple(times)}
        expected = None if options.quick else peers.plain(path, times, model)()
        checked = partial(check, expected)
        systems = [
            System("keyreel", partial(from_file, *about, exact), checked),
            System("keyreel near", partial(from_file, *about, NEAR), partial(check, None)),
            System("keyreel keyframes", partial(from_file, *about, KEYFRAMES), partial(check, None)),
        ]
        if not options.quick:
            systems += [
                System("pyav + PIL + open_clip", partial(peers.plain, path, times, model), checked),
                System("keyreel int8", partial(from_file, *about, exact, "int8"), checked),
            ]
        params = {**wanted.params(), "model": model}
        yield from compare("end_to_end", params, systems, runs=3, seconds=40, limit_seconds=1200)


if __name__ == "__main__":
    raise SystemExit(run(parser_of(__doc__), measure))
