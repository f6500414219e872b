"""Image towers with random weights on each runtime, and what spatial attention adds to the encoder's time.

`cosine` is the least between the tokens of a picture and those that onnxruntime gives in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Folders, Measurement, Params, Prepare, Skipped
from benchmarks.peers import runtimes

MODELS = ("ViT-B-32", "RN50", "MobileCLIP2-S0", "convnext_base_w")
ATTENTION = "keyreel attention"


def measurements(quick: bool, folders: Folders) -> list[Measurement]:
    images = 4 if quick else 16
    return [
        Measurement("encode", {"model": model, "images": images}, tuple(SYSTEMS), runs=5, seconds=2 if quick else 20)
        for model in (MODELS[:1] if quick else MODELS)
    ]


def folder_of(model: str, folders: Folders, *, precision: str = "fp32") -> Path:
    """The bundle of a model with random weights; exported if it is not there."""
    folder = folders.bundles / (model if precision == "fp32" else f"{model}@{precision}")
    if not (folder / "manifest.json").exists():
        from keyreel_export import export_model

        export_model(model, folder, precision=precision, random_weights=True)
    return folder


def pictures(params: Params, folders: Folders) -> Any:
    """[N, H, W, 3] uint8: blocks of colour with noise, of the size that the model takes."""
    from keyreel.runtime.bundle import Bundle

    image = Bundle.load(folder_of(params["model"], folders)).image
    random = np.random.default_rng(0)
    coarse = random.integers(0, 200, (params["images"], image.height // 16, image.width // 16, 3), dtype=np.uint8)
    fine = coarse.repeat(16, 1).repeat(16, 2)
    return fine + random.integers(0, 56, fine.shape, dtype=np.uint8)


def _expected(params: Params, folders: Folders) -> Path:
    return folders.content / f"tokens-{params['model']}-{params['images']}.npy"


def ready(params: Params, folders: Folders) -> None:
    tokens = runtimes.onnxruntime("", folder_of(params["model"], folders))(pictures(params, folders))
    folders.content.mkdir(parents=True, exist_ok=True)
    np.save(_expected(params, folders), tokens)


def _system(make: Callable[[str, Path], runtimes.Encode]) -> Prepare:
    def prepare(params: Params, folders: Folders) -> Callable[[], Any]:
        frames = pictures(params, folders)
        encode = make(params["model"], folder_of(params["model"], folders))
        return lambda: encode(frames)

    return prepare


def _int8(params: Params, folders: Folders) -> Callable[[], Any]:
    from keyreel.errors import ModelError

    refused = folders.bundles / f"{params['model']}@int8.refused"  # so that it is not tried each time
    try:
        if refused.exists():
            raise Skipped(refused.read_text("utf-8"))
        folder = folder_of(params["model"], folders, precision="int8")
    except ModelError as error:  # such as that it would not be faster
        refused.write_text(f"there is no such bundle: {error}", encoding="utf-8")
        raise Skipped(refused.read_text("utf-8")) from error
    frames, encode = pictures(params, folders), runtimes.keyreel(precision="int8")(params["model"], folder)
    return lambda: encode(frames)


SYSTEMS: dict[str, Prepare] = {
    "keyreel": _system(runtimes.keyreel()),
    ATTENTION: _system(runtimes.keyreel("attention.onnx")),
    "keyreel int8": _int8,
    "onnxruntime fp32": _system(runtimes.onnxruntime),
    "onnxruntime int8": _system(runtimes.onnxruntime_int8),
    "openvino f32": _system(runtimes.openvino("f32")),
    "openvino bf16": _system(runtimes.openvino("bf16")),
    "torch fp32": _system(runtimes.torch("float32")),
    "torch bf16": _system(runtimes.torch("bfloat16")),
}


def check(system: str, params: Params, folders: Folders, result: Any) -> dict[str, float]:
    if system == ATTENTION:
        return {}
    expected = np.load(_expected(params, folders)).reshape(params["images"], -1)
    tokens = result.reshape(expected.shape)
    products = (tokens * expected).sum(1)
    lengths = np.linalg.norm(tokens, axis=1) * np.linalg.norm(expected, axis=1)
    return {"cosine": float((products / lengths).min())}
