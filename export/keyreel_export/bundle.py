"""Exports an open_clip model, by its name, to a verified bundle on disk."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.config import ImageTransform
from keyreel.models import quantize, tokenizers, verify
from keyreel.models.folders import check_replaceable, foreign_to_bundle, replacing, write_bundle_manifest
from keyreel.runtime.bundle import BUILTIN, Bundle, SubjectScale, bundle_folder
from keyreel.types import Progress
from keyreel_export import pictures, pretrained, subject, tokens
from keyreel_export.attention import BuiltinAttention, UniformAttention
from keyreel_export.fusion import TemporalSpatialFusion, load_projection
from keyreel_export.onnx import cases, export_graph
from keyreel_export.towers import Tower, split_tower

UNIFORM = "uniform"
ATTENTIONS = (BUILTIN, UNIFORM)
BUILTIN_ATTENTION = {
    "input": "frames",
    "source": "keyreel's built-in model",
    "layer": "its last feature map, at 112 pixels",
    "formula": "its map, averaged over the patches of the grid, divided by its sum",
}
PRECISIONS = ("fp32", "fp16", "int8")
_PACKAGES = ("keyreel", "torch", "open_clip_torch", "timm", "onnx", "onnxscript", "onnxruntime", "tokenizers")


class TextEncoder(nn.Module):
    """The text tower: token_ids int64 [Q, L] -> vectors float32 [Q, D], as open_clip's encode_text(normalize=True)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.normalize(self.model.encode_text(token_ids).float(), dim=-1)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model."""

    model: Any  # open_clip's
    tower: Tower
    modules: dict[str, nn.Module]  # of each graph
    attention: dict[str, str]  # the manifest's entry
    projection_sha256: str  # "" for the tower's own projection
    source: dict[str, str]
    scale: SubjectScale = field(default_factory=SubjectScale)
    fit: subject.Fit | None = None


def export_model(
    name: str,
    folder: Path | None = None,
    *,
    precision: str = "fp32",
    attention: str = BUILTIN,
    projection: Path | None = None,
    random_weights: bool = False,
    seed: int = 0,
    verify_video: Path | None = None,
    fit: Path | None = None,
    fit_epochs: int = subject.EPOCHS,
    progress: Progress | None = None,
) -> Path:
    """Exports an open_clip model as a bundle: graphs, tokenizer, manifest. It verifies them, and writes all or nothing.

    Args:
        name: "ARCH/tag" as in `open_clip.list_pretrained()`, "ARCH/path/to/checkpoint", or "hf-hub:org/repo".
        folder: where to write; by default the user's cache. It replaces a bundle there.
        precision: "fp32", "fp16" for GPUs, or "int8" for CPUs (see `quantize`); the last two make the bundle
            "NAME@fp16" or "NAME@int8".
        attention: "builtin" for the built-in model's CNN and map, "uniform" for stock pooling.
        projection: a trained fully connected layer for the fusion, see `load_projection`.
        random_weights: use random weights, for tests.
        seed: of the random weights, and of the frames for the check.
        verify_video: a video to measure an int8 backbone on, instead of random shapes.
        fit: a folder of labelled pictures to fit the subject vectors to: a subfolder for each label, or `labels.csv`
            with the columns file,label (several labels with ";" between; a caption is a label too).
        fit_epochs: how often the fit sees each frame.
        progress: called with (name of the stage, stages done, stages in total).

    Returns:
        The folder.

    Raises:
        ModelNotFound: no such architecture or tag; `near` has similar names.
        CheckpointMismatch: the weights do not fit the architecture.
        ModelError: the weights cannot be loaded, the tower is not supported, a graph differs from torch, an int8
            backbone differs from float32 or would not be faster, the folder has other files, or the pictures are too
            few or cannot be read.
        SourceError: `verify_video` cannot be decoded.
        MissingExtra: a package of the extra `export` is not installed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if verify_video is not None and precision != "int8":
        raise ValueError(f"a video to verify with goes with precision int8, not {precision}")
    report = progress or (lambda stage, done, total: None)
    recipe = pretrained.resolve(name, random_weights=random_weights)
    if precision != "fp32":
        name = f"{name}@{precision}"  # beside the other precision in the cache
    folder = bundle_folder(name) if folder is None else folder
    check_replaceable(folder, foreign_to_bundle)
    shown = None if fit is None else pictures.split(pictures.read_pictures(fit), seed)
    report("load", 0, 7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = take_apart(pretrained.load_model(recipe), recipe.source, attention, projection)
    report("tokenizer", 1, 7)
    tokenizer, clean = tokens.export_tokenizer(pretrained.load_tokenizer(recipe.architecture))
    image = image_of(parts)

    def texts(given: Sequence[str]) -> Tensor:
        ids = torch.from_numpy(tokenizers.encode(tokenizer, clean, given))
        with torch.no_grad():
            return torch.cat([parts.modules["text"](some) for some in torch.split(ids, 64)])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = _side(parts, image)
        calibrated = subject.calibrate(side, texts)
        if shown is not None:
            report("fit", 2, 7)
            parts = _fitted(parts, subject.fit_to_pictures(side, texts, *shown, epochs=fit_epochs, seed=seed))
        else:
            parts = dataclasses.replace(parts, scale=calibrated.scale)
    with replacing(folder) as made:
        tokenizer.save(str(made / "tokenizer.json"), pretty=False)
        if parts.fit is not None:  # before the weights are halved
            subject.write_tensors(parts.fit, made)
        length = int((tokenizer.truncation or {})["max_length"])
        manifest = manifest_of(name, parts, image, length, clean)
        manifest["fusion"]["scene_similarity"] = calibrated.scene_similarity
        measured = _write_graphs(
            made, parts, tokenizers.encode(tokenizer, clean, tokens.CORPUS), precision, seed, report
        )
        if precision == "int8":
            frames = quantize.pictures(image, verify_video, seed)
            measured = {graph: value for graph, value in measured.items() if not graph.startswith(("back", "ident"))}
            measured |= quantize.quantize_backbone(made, frames, parts.attention["input"])
        if parts.fit is not None:
            measured |= parts.fit.measured
        manifest |= {"precision": precision, "versions": versions(), "verify": measured}
        write_bundle_manifest(made, manifest, folder)
        Bundle.load(made)
    report("done", 7, 7)
    return folder


def take_apart(model: Any, source: dict[str, str], attention: str = BUILTIN, projection: Path | None = None) -> Parts:
    """Splits an open_clip model; the parts share its weights. `source` is the manifest's entry on the weights."""
    tower = split_tower(model)
    spatial: nn.Module = UniformAttention(tower.grid[0] * tower.grid[1])
    described = {"input": "tokens", "source": UNIFORM, "layer": "none", "formula": "a = 1/P"}
    if attention == BUILTIN:
        spatial, described = BuiltinAttention(tower.image_size, tower.grid), dict(BUILTIN_ATTENTION)
    layer, digest = None, ""
    if projection is not None:
        layer, digest = load_projection(projection, tower.feature_width, tower.embedding_width)
    modules = {
        "backbone": tower,
        "attention": spatial,
        "fusion": TemporalSpatialFusion(tower, tower.projection if layer is None else layer),
        "text": TextEncoder(model),
    }
    return Parts(model, tower, modules, described, digest, source)


def _side(parts: Parts, image: ImageTransform) -> subject.ImageSide:
    fusion = parts.modules["fusion"]
    assert isinstance(fusion, TemporalSpatialFusion)
    return subject.ImageSide(parts.tower, parts.modules["attention"], parts.attention["input"], fusion, image)


def _fitted(parts: Parts, fit: subject.Fit) -> Parts:
    """The model with the fitted attention instead of the CNN, and with the fitted layer."""
    head = fit.head.requires_grad_(False)
    fusion = TemporalSpatialFusion(
        parts.tower, head.scene, head.projection, power=float(head.power), floor=float(head.log_floor.exp())
    )
    described = {
        "input": "tokens",
        "source": "1x1 and 3x3 convolutions and a sigmoid on the tower's tokens, fitted to labelled pictures, after "
        "the spatial branch of CBAM (Woo et al. 2018, arXiv:1807.06521)",
        "layer": "the tower's tokens",
        "formula": f"s_i = {head.attention.floor} + sigmoid(conv3x3(relu(W x_i / rms(x)))_i); a_i = s_i / sum_j s_j",
    }
    modules = {**parts.modules, "attention": head.attention.eval(), "fusion": fusion}
    return dataclasses.replace(parts, modules=modules, attention=described, scale=fit.scale, fit=fit)


def image_of(parts: Parts) -> ImageTransform:
    """How to prepare frames for the tower."""
    preprocess, (height, width) = parts.model.visual.preprocess_cfg, parts.tower.image_size
    return ImageTransform(
        height, width, preprocess["resize_mode"], preprocess["interpolation"], fill=int(preprocess["fill_color"])
    )


def _write_graphs(
    folder: Path, parts: Parts, token_ids: Any, precision: str, seed: int, report: Progress
) -> dict[str, float]:
    """Writes the four graphs, verifies them against torch, and returns the measurements."""
    # Export and verify an int8 backbone in float32 first.
    precision = "fp32" if precision == "int8" else precision
    report("reference", 2, 7)
    cases = _cases(parts, token_ids, seed)
    # Only with the tower's own projection the scene equals stock CLIP.
    stock = None if parts.projection_sha256 else _stock_vectors(parts.model, cases["backbone"])
    measured: dict[str, float] = {}
    for step, (graph, module) in enumerate(parts.modules.items()):
        report(graph, 3 + step, 7)
        path, own = folder / f"{graph}.onnx", cases[graph]
        # The second batch has several rows, see `export_graph`.
        inputs = {name: torch.from_numpy(array) for name, array in own[1].feeds.items()}
        export_graph(half(module) if precision == "fp16" else module, inputs, verify.OUTPUTS[graph], path)
        found = verify.run_graph(path, [case.feeds for case in own], precision)
        measured |= verify.check(graph, found, [case.expected for case in own], precision)
    if stock is not None:
        frames = [case.feeds for case in cases["backbone"]]
        chained = verify.run_chain(folder, frames, parts.attention["input"], precision)
        measured |= verify.check("identity", [(scene,) for scene, _, _ in chained], stock, precision)
    if precision == "fp16":
        verify.write_reference(folder, {graph: (own[1], verify.OUTPUTS[graph]) for graph, own in cases.items()})
    return measured


def half(module: nn.Module) -> nn.Module:
    """Converts a module to half precision, in place, except the built-in attention, which is small."""
    return module if isinstance(module, BuiltinAttention) else module.half()


def _cases(parts: Parts, token_ids: Any, seed: int) -> dict[str, list[verify.Case]]:
    """Feeds of each graph and torch's results in float32."""
    tower, modules = parts.tower, parts.modules
    frames: list[verify.Feeds] = [
        {"frames": verify.sample_frames(*tower.image_size, count=count, seed=seed + count)}
        for count in verify.BATCH_SIZES
    ]
    backbone = cases(tower, frames)
    fused: list[verify.Feeds] = []
    for case in backbone:
        # A map with strong contrasts, unlike an untrained CNN's.
        random, (found,) = np.random.default_rng(seed), case.expected
        energy = random.random((len(found), tower.grid[0] * tower.grid[1]), np.float32) ** 3 + 1e-4
        attention = energy / energy.sum(axis=1, keepdims=True)
        change = random.random(attention.shape, np.float32) ** 3
        fused.append({"tokens": found, "attention": attention, "change": change})
    fed: list[verify.Feeds] = [{"tokens": case.expected[0]} for case in backbone]
    texts: list[verify.Feeds] = [{"token_ids": token_ids[:count]} for count in (*verify.BATCH_SIZES, len(token_ids))]
    return {
        "backbone": backbone,
        "attention": cases(modules["attention"], frames if parts.attention["input"] == "frames" else fed),
        "fusion": cases(modules["fusion"], fused),
        "text": cases(modules["text"], texts),
    }


@torch.no_grad()
def _stock_vectors(model: Any, cases: list[verify.Case]) -> list[verify.Found]:
    """open_clip's own encode_image(normalize=True), on images normalised as open_clip does."""
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]) for key in ("mean", "std"))
    images = [(torch.from_numpy(case.feeds["frames"]).float() / 255 - mean) / std for case in cases]
    return [(model.encode_image(image.permute(0, 3, 1, 2), normalize=True).numpy(),) for image in images]


def manifest_of(name: str, parts: Parts, image: ImageTransform, context_length: int, clean: str) -> dict[str, Any]:
    """The manifest of a bundle, without precision, versions and measurements."""
    tower, fusion = parts.tower, parts.modules["fusion"]
    assert isinstance(fusion, TemporalSpatialFusion)
    return {
        "name": name,
        "family": tower.family,
        "image": dataclasses.asdict(image),
        "grid": list(tower.grid),
        "prefix_tokens": tower.prefix_tokens,
        "token_width": tower.token_width,
        "embedding_width": tower.embedding_width,
        "text": {"context_length": context_length, "clean": clean},
        "attention": parts.attention,
        "fusion": {
            "shift_default": "off",
            "power": round(fusion.power, 4),
            "floor": round(fusion.floor, 4),
            "projection_sha256": parts.projection_sha256,
            "subject_projection_sha256": "" if parts.fit is None else subject.digest(parts.fit.head.projection),
            "same_scene": {},
        },
        "subject": dataclasses.asdict(parts.scale),
        "sources": [parts.source],
    }


def versions() -> dict[str, str]:
    """Versions of the packages that make a bundle."""
    # onnxruntime has one of two names; skip the missing one.
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {package: installed[package] for package in _PACKAGES if package in installed}
