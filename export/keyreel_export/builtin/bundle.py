"""From trained towers to a bundle: four ONNX graphs, the tokenizer and the manifest.

Weights are stored as fp16 and cast to fp32 when a session is made; all arithmetic is fp32.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from keyreel_export.builtin.data import SIZE
from keyreel_export.builtin.saliency import SpatialAttention
from keyreel_export.builtin.student import CONTEXT_LENGTH, EMBEDDING_WIDTH, TOKEN_WIDTH, ImageTower, TextTower
from keyreel_export.onnx import export_graph
from keyreel_export.verify import run_graph

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
    """token_ids [Q, L] -> unit vectors [Q, D], without the mean of all label names (`space.Space`)."""

    def __init__(self, tower: TextTower, common: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("common", common.clone())

    def forward(self, ids: Tensor) -> Tensor:
        return functional.normalize(self.tower(ids) - self.common, dim=-1, eps=1e-6)


class Fusion(nn.Module):
    """tokens [N, P, C], attention [N, P], strength [] -> unit vectors [N, D]; strength 0 is average pooling."""

    def __init__(self, project: nn.Linear) -> None:
        super().__init__()
        self.project = project

    def forward(self, tokens: Tensor, attention: Tensor, strength: Tensor) -> Tensor:
        weights = torch.pow(attention * tokens.shape[1], strength)
        weights = weights / weights.sum(-1, keepdim=True)
        pooled = (weights[..., None] * tokens).sum(1)
        return functional.normalize(self.project(pooled), dim=-1, eps=1e-6)


def _fuse(module: nn.Module) -> None:
    """Folds each BatchNorm into the convolution before it, in place."""
    for child in module.children():
        if isinstance(child, nn.Sequential) and len(child) == 2:
            conv, norm = child[0], child[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                child[0], child[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
                continue
        _fuse(child)


def _write(module: nn.Module, inputs: Mapping[str, Tensor], output: str, path: Path) -> float:
    """Exports a module with its large weights as fp16: the largest difference between onnxruntime and torch."""
    export_graph(module, inputs, [output], path)
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
    [found] = run_graph(path, [{name: value.numpy() for name, value in inputs.items()}], "fp32")
    with torch.inference_mode():
        return float(np.abs(found - module(*inputs.values()).numpy()).max())


def write_graphs(
    folder: Path, image: ImageTower, attention: SpatialAttention, text: Texts, tokenizer: str
) -> dict[str, Any]:
    """Writes all of the bundle but its manifest, which it returns without "sources"."""
    folder.mkdir(parents=True, exist_ok=True)
    image, attention, text = copy.deepcopy((image.eval(), attention.eval(), text.eval()))
    _fuse(image)
    with torch.no_grad():
        for parameter in (*image.parameters(), *attention.parameters(), *text.parameters()):
            parameter.copy_(parameter.half().float())
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8))
    ids = torch.from_numpy(rng.integers(1, text.tower.embedding.num_embeddings, (3, CONTEXT_LENGTH)))
    ids[1, 5:] = 0
    with torch.no_grad():
        tokens = Backbone(image)(frames)
        fed = {"tokens": tokens, "attention": attention(tokens), "strength": torch.tensor(0.5)}
    jobs: dict[str, tuple[nn.Module, dict[str, Tensor], str]] = {
        "backbone": (Backbone(image), {"frames": frames}, "tokens"),
        "attention": (attention, {"tokens": tokens}, "attention"),
        "fusion": (Fusion(image.project), fed, "vectors"),
        "text": (text, {"token_ids": ids}, "vectors"),
    }
    verify = {f"{name}_max_abs_difference": _write(*job, folder / f"{name}.onnx") for name, job in jobs.items()}
    (folder / "tokenizer.json").write_text(tokenizer, "utf-8")
    weight = image.project.weight.detach().numpy().tobytes() + image.project.bias.detach().numpy().tobytes()
    return {
        "name": "builtin",
        "family": "average",
        "precision": "fp32",
        "image": {"height": SIZE, "width": SIZE, "mode": "squash", "interpolation": "bicubic", "fill": 0},
        "grid": [GRID, GRID],
        "prefix_tokens": 0,
        "token_width": TOKEN_WIDTH,
        "embedding_width": EMBEDDING_WIDTH,
        "text": {"context_length": CONTEXT_LENGTH, "clean": "lower"},
        "attention": {
            "input": "tokens",
            "source": "1x1 convolution and sigmoid on the last feature map, fitted to outlines of objects, after the "
            "spatial branch of CBAM (Woo et al. 2018, arXiv:1807.06521)",
            "layer": "last feature map, after ReLU",
            "formula": f"s_i = {SpatialAttention.floor} + sigmoid(w . x_i / rms(x) + b); a_i = s_i / sum_j s_j",
        },
        "fusion": {
            "strength_default": 0.0,
            "shift_default": "off",
            "projection_sha256": hashlib.sha256(weight).hexdigest(),
        },
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "verify": verify,
    }
