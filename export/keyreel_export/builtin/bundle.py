"""From trained towers to a bundle: four ONNX graphs, the tokenizer and the manifest.

Weights are stored as fp16 and cast to fp32 when a session is made; all arithmetic is fp32.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from torch import Tensor, nn

from keyreel.models.verify import OUTPUTS, run_graph
from keyreel.runtime.bundle import SubjectScale
from keyreel_export.builtin.data import SIZE
from keyreel_export.builtin.student import (
    CONTEXT_LENGTH,
    EMBEDDING_WIDTH,
    TOKEN_WIDTH,
    UNKNOWN_MARK,
    ImageTower,
    TextTower,
    fuse_norms,
)
from keyreel_export.fit import TokenAttention
from keyreel_export.fusion import AveragePooling, TemporalSpatialFusion
from keyreel_export.onnx import cases, export_graph
from keyreel_export.subject import digest

GRID = SIZE // 16


class Backbone(nn.Module):
    """frames uint8 [N, SIZE, SIZE, 3] -> tokens [N, P, C]."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, frames: Tensor) -> Tensor:
        # Cast before permute: TensorRT cannot build a graph that permutes uint8.
        return self.tower(frames.float().permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Texts(nn.Module):
    """token_ids [Q, L] -> unit vectors [Q, D]."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(ids)  # type: ignore[no-any-return]


def _write(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> float:
    """Exports a module with its large weights as fp16: the largest difference between onnxruntime and torch."""
    export_graph(module, inputs, outputs, path)
    model = onnx.load(str(path))
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        if weight.data_type == TensorProto.FLOAT and values.size > 64:
            stored = numpy_helper.from_array(values.astype(np.float16), f"{weight.name}.fp16")
            model.graph.initializer.remove(weight)
            model.graph.initializer.append(stored)
            model.graph.node.insert(0, helper.make_node("Cast", [stored.name], [weight.name], to=TensorProto.FLOAT))
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    [case] = cases(module, [{name: value.numpy() for name, value in inputs.items()}])
    [found] = run_graph(path, [case.feeds], "fp32")
    return max(float(np.abs(own - wanted).max()) for own, wanted in zip(found, case.expected, strict=True))


@dataclass(frozen=True, slots=True)
class Fitted:
    """The image side of a bundle after its tokens."""

    scene: nn.Linear
    attention: TokenAttention
    subject: nn.Linear
    power: float
    floor: float
    scale: SubjectScale
    log: list[dict[str, Any]]


def write_fusion(folder: Path, fitted: Fitted) -> dict[str, Any]:
    """Writes attention.onnx and fusion.onnx; returns their entries of the manifest."""
    attention, scene, subject = copy.deepcopy((fitted.attention.eval(), fitted.scene, fitted.subject))
    for module in (attention, scene, subject):
        _round(module)
    random = torch.Generator().manual_seed(0)
    tokens = torch.rand(3, GRID * GRID, TOKEN_WIDTH, generator=random)
    change = torch.rand(3, GRID * GRID, generator=random)
    with torch.no_grad():
        weights = attention(tokens)
    fusion = TemporalSpatialFusion(AveragePooling(), scene, subject, power=fitted.power, floor=fitted.floor)
    fed = {"tokens": tokens, "attention": weights, "change": change}
    verify = {
        "attention_max_abs_difference": _write(
            attention, {"tokens": tokens}, OUTPUTS["attention"], folder / "attention.onnx"
        ),
        "fusion_max_abs_difference": _write(fusion, fed, OUTPUTS["fusion"], folder / "fusion.onnx"),
    }
    return {
        "attention": {
            "input": "tokens",
            "source": "1x1 and 3x3 convolutions and a sigmoid on the last feature map, fitted to outlines of objects "
            "and to finding objects by name, after the spatial branch of CBAM (Woo et al. 2018, arXiv:1807.06521)",
            "layer": "last feature map, after ReLU",
            "formula": f"s_i = {attention.floor} + sigmoid(conv3x3(relu(W x_i / rms(x)))_i); a_i = s_i / sum_j s_j",
        },
        "fusion": {
            "shift_default": "off",
            "power": round(fitted.power, 4),
            "floor": round(fitted.floor, 4),
            "projection_sha256": digest(scene),
            "subject_projection_sha256": digest(subject),
            "same_scene": {},
        },
        "subject": dataclasses.asdict(fitted.scale),
        "verify": verify,
    }


def write_text(folder: Path, text: Texts, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes text.onnx and tokenizer.json; returns their entries of the manifest."""
    text = copy.deepcopy(text.eval())
    _round(text)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(1, text.tower.embedding.num_embeddings, (3, CONTEXT_LENGTH)))
    ids[1, 5:] = 0
    difference = _write(text, {"token_ids": ids}, OUTPUTS["text"], folder / "text.onnx")
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, "utf-8")
    return {
        "text": {"context_length": CONTEXT_LENGTH, "clean": "lower", "unknown_mark": UNKNOWN_MARK},
        "verify": {"text_max_abs_difference": difference},
    }


def _round(module: nn.Module) -> None:
    """To the precision of the files."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())


def write_graphs(folder: Path, image: ImageTower, text: Texts, tokenizer: Tokenizer, fitted: Fitted) -> dict[str, Any]:
    """Writes all of the bundle but its manifest, which it returns without "sources"."""
    folder.mkdir(parents=True, exist_ok=True)
    image = copy.deepcopy(image)
    fuse_norms(image)
    _round(image)
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8))
    backbone = _write(Backbone(image), {"frames": frames}, OUTPUTS["backbone"], folder / "backbone.onnx")
    said, written = write_text(folder, text, tokenizer), write_fusion(folder, fitted)
    return {
        **written,
        "name": "builtin",
        "family": "average",
        "precision": "fp32",
        "image": {"height": SIZE, "width": SIZE, "mode": "squash", "interpolation": "bicubic", "fill": 0},
        "grid": [GRID, GRID],
        "prefix_tokens": 0,
        "token_width": TOKEN_WIDTH,
        "embedding_width": EMBEDDING_WIDTH,
        "text": said["text"],
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "verify": {"backbone_max_abs_difference": backbone, **said["verify"], **written["verify"]},
    }
