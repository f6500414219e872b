"""From the name of an open_clip model to a bundle on disk, verified."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.config import ImageTransform
from keyreel.errors import ModelError
from keyreel.runtime.bundle import MANIFEST, SCHEMA, Bundle, bundle_folder, write_manifest
from keyreel.types import Progress
from keyreel_export import pretrained, quantize, tokens, verify
from keyreel_export.attention import DEFAULT_NETWORK, FORMULA, SpatialAttention, UniformAttention
from keyreel_export.fusion import TemporalSpatialFusion, load_projection
from keyreel_export.onnx import export_graph
from keyreel_export.tensorrt import write_reference
from keyreel_export.towers import Tower, split_tower

UNIFORM = "uniform"
PRECISIONS = ("fp32", "fp16", "int8")
_PACKAGES = ("keyreel", "torch", "open_clip_torch", "timm", "onnx", "onnxscript", "onnxruntime", "tokenizers")


class TextEncoder(nn.Module):
    """token_ids int64 [Q, L] -> vectors float32 [Q, D], unit length: open_clip's encode_text(normalize=True)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(token_ids).float(), dim=-1)


def default_folder(name: str) -> Path:
    """Where `export_model` writes when no folder is given: the model's place in the user's cache."""
    return bundle_folder(name)


def export_model(
    name: str,
    folder: Path | None = None,
    *,
    precision: str = "fp32",
    attention: str = DEFAULT_NETWORK,
    attention_weights: Path | None = None,
    projection: Path | None = None,
    random_weights: bool = False,
    seed: int = 0,
    verify_video: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the bundle of an open_clip model: graphs, tokenizer, manifest; verified, whole or not at all.

    Args:
        name: "ARCH/tag" as `open_clip.list_pretrained()` has them, "ARCH/path/to/checkpoint", "hf-hub:org/repo".
        folder: where to; the user's cache by default. A bundle that is there is replaced.
        precision: "fp32", "fp16" for GPUs, or "int8" for CPUs, which makes the bundle "NAME@fp16" or "NAME@int8";
            inputs and outputs are the same. With "int8" the backbone's matrix products are in 8 bits, see `quantize`.
        attention: a CNN of timm's, or "uniform" for stock pooling.
        attention_weights: local weights of that CNN, instead of a download.
        projection: a trained fully connected layer for the fusion, see `load_projection`.
        random_weights: leave all weights untrained; for tests.
        seed: of the random weights and of the frames that verify.
        verify_video: a video whose frames an int8 backbone is measured on, instead of random shapes.
        progress: called with the stage's name, stages done, stages in all.

    Returns:
        The folder.

    Raises:
        ModelNotFound: no such architecture or tag; `near` has close ones.
        CheckpointMismatch: weights that do not fit.
        ModelError: weights cannot be had, a tower that is not supported, a graph that differs from torch, an int8
            backbone that differs from its float32 or would not be faster, or a folder that holds something else.
        SourceError: `verify_video` cannot be decoded.
        MissingExtra: a package of the extra `export` is not installed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if verify_video is not None and precision != "int8":
        raise ValueError(f"a video to verify with goes with precision int8, not {precision}")
    recipe = pretrained.resolve(name, random_weights=random_weights)
    if precision != "fp32":
        name = f"{name}@{precision}"  # beside the other in the cache, not in its place
    folder = default_folder(name) if folder is None else folder
    _refuse_other_folders(folder)
    # What gets 8 bits is made and verified in float32 first.
    exported = "fp32" if precision == "int8" else precision
    report = progress or (lambda stage, done, total: None)
    report("load", 0, 7)
    sources = [recipe.source]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = pretrained.load_model(recipe)
        tower = split_tower(model)
        spatial: nn.Module = UniformAttention(tower.grid[0] * tower.grid[1])
        described = {"input": "tokens", "source": UNIFORM, "layer": "none", "formula": "a = 1/P"}
        if attention != UNIFORM:
            network, source = pretrained.load_attention(attention, attention_weights, random_weights=random_weights)
            sources.append(source)
            spatial = SpatialAttention(network, tower.image_size, tower.grid)
            described = {"input": "frames", "source": f"timm {attention}", "layer": spatial.layer, "formula": FORMULA}
    layer, digest = None, ""
    if projection is not None:
        layer, digest = load_projection(projection, tower.feature_width, tower.embedding_width)
    report("tokenizer", 1, 7)
    tokenizer, clean = tokens.export_tokenizer(pretrained.load_tokenizer(recipe.architecture))
    context_length = int((tokenizer.truncation or {})["max_length"])

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".keyreel-export-") as aside:
        made = Path(aside) / "bundle"
        made.mkdir()
        tokenizer.save(str(made / "tokenizer.json"), pretty=False)
        graphs = {
            "backbone": (tower, "tokens"),
            "attention": (spatial, "attention"),
            "fusion": (TemporalSpatialFusion(tower, layer), "vectors"),
            "text": (TextEncoder(model), "vectors"),
        }
        token_ids = tokens.encode(tokenizer, clean, tokens.CORPUS)
        report("reference", 2, 7)
        cases = _reference({name: module for name, (module, _) in graphs.items()}, described["input"], token_ids, seed)
        stock = None if layer is not None else _stock_vectors(model, cases["backbone"])
        measured: dict[str, float] = {}
        for step, (graph, (module, output)) in enumerate(graphs.items()):
            report(graph, 3 + step, 7)
            measured |= _export_graph(made / f"{graph}.onnx", module, output, cases[graph], exported)
        if stock is not None:
            measured |= _identity(made, cases, stock, exported)
        if precision == "fp16":
            write_reference(made, cases)
        preprocess = model.visual.preprocess_cfg
        image = ImageTransform(
            height=tower.image_size[0],
            width=tower.image_size[1],
            mode=preprocess["resize_mode"],
            interpolation=preprocess["interpolation"],
            fill=int(preprocess["fill_color"]),
        )
        if precision == "int8":
            frames = quantize.pictures(image, verify_video, seed)
            measured = {
                name: value for name, value in measured.items() if not name.startswith(("backbone", "identity"))
            }
            measured |= quantize.quantize_backbone(made, frames, tower.grid[0] * tower.grid[1])
        manifest = {
            "name": name,
            "family": tower.family,
            "precision": precision,
            "image": dataclasses.asdict(image),
            "grid": list(tower.grid),
            "prefix_tokens": tower.prefix_tokens,
            "token_width": tower.token_width,
            "embedding_width": tower.embedding_width,
            "text": {"context_length": context_length, "clean": clean},
            "attention": described,
            # Stock CLIP until a measurement speaks for more.
            "fusion": {"strength_default": 0.0, "shift_default": "off", "projection_sha256": digest},
            "sources": sources,
            "versions": _versions(),
            "verify": measured,
        }
        write_manifest(made, manifest)
        Bundle.load(made)
        if folder.exists():
            folder.rename(Path(aside) / "replaced")
        made.rename(folder)
    report("done", 7, 7)
    return folder


def _reference(
    modules: dict[str, nn.Module], attention_input: str, token_ids: Any, seed: int
) -> dict[str, list[verify.Case]]:
    """Feeds of each graph and what torch makes of them in float32."""
    tower = modules["backbone"]
    if not isinstance(tower, Tower):
        raise TypeError(f"the backbone must be a Tower, got {type(tower).__name__}")
    frames: list[verify.Feeds] = [
        {"frames": verify.sample_frames(*tower.image_size, count=count, seed=seed + count)}
        for count in verify.BATCH_SIZES
    ]
    backbone = verify.cases(tower, frames)
    fused: list[verify.Feeds] = []
    for case, strength in zip(backbone, (1.0, 2.5), strict=True):
        # A map with strong contrasts, which an untrained CNN would not give.
        random = np.random.default_rng(seed)
        energy = random.random((len(case.expected), tower.grid[0] * tower.grid[1]), np.float32) ** 3 + 1e-4
        attention = energy / energy.sum(axis=1, keepdims=True)
        fused.append({"tokens": case.expected, "attention": attention, "strength": np.array(strength, np.float32)})
    tokens_fed: list[verify.Feeds] = [{"tokens": case.expected} for case in backbone]
    texts: list[verify.Feeds] = [{"token_ids": token_ids[:count]} for count in (*verify.BATCH_SIZES, len(token_ids))]
    return {
        "backbone": backbone,
        "attention": verify.cases(modules["attention"], frames if attention_input == "frames" else tokens_fed),
        "fusion": verify.cases(modules["fusion"], fused),
        "text": verify.cases(modules["text"], texts),
    }


@torch.no_grad()
def _stock_vectors(model: Any, cases: list[verify.Case]) -> list[Any]:
    """open_clip's own encode_image(normalize=True), on images normalised as open_clip does."""
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]) for key in ("mean", "std"))
    images = [(torch.from_numpy(case.feeds["frames"]).float() / 255 - mean) / std for case in cases]
    return [model.encode_image(image.permute(0, 3, 1, 2), normalize=True).numpy() for image in images]


def _export_graph(
    path: Path, module: nn.Module, output: str, cases: list[verify.Case], precision: str
) -> dict[str, float]:
    # The second batch is one of several rows, see `export_graph`.
    inputs = {name: torch.from_numpy(array) for name, array in cases[1].feeds.items()}
    export_graph(module.half() if precision == "fp16" else module, inputs, [output], path)
    found = verify.run_graph(path, [case.feeds for case in cases], precision)
    return verify.check(path.stem, found, [case.expected for case in cases], verify.BOUNDS[precision])


def _identity(folder: Path, cases: dict[str, list[verify.Case]], stock: list[Any], precision: str) -> dict[str, float]:
    """The chain of graphs at strength 0 against open_clip itself."""
    frames = [case.feeds for case in cases["backbone"]]
    encoded = verify.run_graph(folder / "backbone.onnx", frames, precision)
    maps = [case.expected for case in cases["attention"]]
    feeds: list[verify.Feeds] = [
        {"tokens": found, "attention": attention, "strength": np.zeros((), np.float32)}
        for found, attention in zip(encoded, maps, strict=True)
    ]
    fused = verify.run_graph(folder / "fusion.onnx", feeds, precision)
    return verify.check("identity", fused, stock, verify.BOUNDS[precision])


def _versions() -> dict[str, str]:
    # onnxruntime is installed under one of two names; the one that is not there is left out.
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {package: installed[package] for package in _PACKAGES if package in installed}


def _refuse_other_folders(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file", hint="name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        ours = manifest["schema"] == SCHEMA and {p.name for p in folder.iterdir()} <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ModelError(f"{folder} is not empty and holds other things than a bundle", hint="name another folder")
