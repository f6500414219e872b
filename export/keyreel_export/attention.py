"""Spatial attention of exported models: the built-in model's CNN, with its map on the grid of another tower.

It averages the frame down to the CNN's input size, averages the map over the patches of the tower's grid, and divides
by the sum. The CNN and its weights are keyreel's own; it downloads nothing.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from keyreel.runtime.bundle import BUILTIN, Bundle
from keyreel_export.builtin.student import TOKEN_WIDTH, ImageTower, fuse_norms
from keyreel_export.fit import TokenAttention


class BuiltinAttention(nn.Module):
    """The built-in CNN: frames uint8 [N, H, W, 3] -> attention [N, P] float32, rows sum to 1.

    Args:
        frame_size: (H, W) of the frames, in pixels.
        grid: (h, w) of the tower's patches.
    """

    rows: Tensor
    columns: Tensor
    down: Tensor
    across: Tensor

    def __init__(self, frame_size: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        bundle = Bundle.find(BUILTIN)
        own = bundle.image.height, bundle.image.width
        self.grid, self.resized = bundle.grid, frame_size != own
        self.tower = fuse_norms(ImageTower()).eval()
        _load(self.tower, "tower.", bundle.file("backbone.onnx"))
        self.attention = TokenAttention(TOKEN_WIDTH, bundle.grid).eval()
        _load(self.attention, "", bundle.file("attention.onnx"))
        self.register_buffer("rows", area_weights(frame_size[0], own[0]))
        self.register_buffer("columns", area_weights(frame_size[1], own[1]))
        self.register_buffer("down", area_weights(bundle.grid[0], grid[0]))
        self.register_buffer("across", area_weights(bundle.grid[1], grid[1]))
        self.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = frames.float().permute(0, 3, 1, 2)
        if self.resized:
            pixels = self.rows @ pixels @ self.columns.T
        own = self.attention(self.tower(pixels).flatten(2).transpose(1, 2))
        found = (self.down @ own.reshape(-1, *self.grid) @ self.across.T).flatten(1)
        attention: Tensor = found / found.sum(1, keepdim=True)
        return attention


class UniformAttention(nn.Module):
    """Uniform attention: tokens [N, R+P, C] -> attention [N, P] float32, all 1/P: the stock tower's pooling."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.full((tokens.shape[0], self.patches), 1.0 / self.patches)


def area_weights(source: int, target: int) -> Tensor:
    """[target, source]: resamples `source` cells to `target` cells of equal length by area.

    A row has the fractions of its cell that the source cells cover.
    """
    edges = torch.arange(source + 1, dtype=torch.float64) / source
    starts, stops = edges[:-1], edges[1:]
    cells = torch.arange(target + 1, dtype=torch.float64)[:, None] / target
    overlap = (torch.minimum(cells[1:], stops) - torch.maximum(cells[:-1], starts)).clamp_min(0)
    return (overlap * target).float()


def _load(module: nn.Module, prefix: str, path: Path) -> None:
    """Loads the fp16 weights of a graph of the built-in model into a module."""
    stored = {
        weight.name.removesuffix(".fp16"): torch.tensor(numpy_helper.to_array(weight)).float()
        for weight in onnx.load(str(path)).graph.initializer
    }
    named, left = dict[str, Tensor](), list(stored.values())
    for name, parameter in module.named_parameters():
        if name.startswith("project."):  # of the image tower: part of the fusion
            named[name] = parameter
            continue
        found = stored.get(prefix + name)
        if found is None:  # the exporter renames and transposes the weights of matrix products
            found = next(one.T for one in left if one.shape == parameter.shape[::-1])
        named[name] = found
    module.load_state_dict(named)
