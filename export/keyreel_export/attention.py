"""Spatial attention: where a pre-trained CNN finds something to see.

The map is the activation energy of a middle layer, A[i] = Σ_c F[c,i]² (Zagoruyko & Komodakis, "Paying More Attention to
Attention", ICLR 2017, section 3.1, F²_sum), averaged over the patches of the tower's grid and normalised:

    a[i] = (1 - ε) · A[i] / Σ_j A[j] + ε / P          ε = 0.05

Rows sum to 1, and no patch's pooling weight falls below ε^γ of its own.

The layer is the last one at stride 16: at stride 8 energy still follows edges and texture, at stride 32 a map of 7 x 7
is coarser than most towers' grids. Frames of 384 pixels and more are first averaged down to 192 to 383 pixels, so that
the CNN stays cheap beside the tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.errors import ModelError

DEFAULT_NETWORK = "mobilenetv3_small_100"
FLOOR = 0.05
FORMULA = "a = 0.95 E/sum(E) + 0.05/P, E = area mean over the patch of the channels' summed squares"
_STRIDE = 16
_MIN_PIXELS = 192


class SpatialAttention(nn.Module):
    """Frames uint8 [N, H, W, 3] -> attention [N, P] float32, rows sum to 1.

    Args:
        network: a timm model in evaluation mode with `forward_intermediates` and `pretrained_cfg`.
        frame_size: (H, W) of the frames, in pixels.
        grid: (h, w) of the tower's patches.
    """

    offset: Tensor
    factor: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, network: Any, frame_size: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        self.network: Any = network
        self.index, self.layer = _choose_layer(network)
        self.shrink = max(1, min(frame_size) // _MIN_PIXELS)
        config = network.pretrained_cfg
        self.register_buffer("offset", 255.0 * torch.tensor(config["mean"]))
        self.register_buffer("factor", 1.0 / (255.0 * torch.tensor(config["std"])))
        with torch.no_grad():
            rows, columns = self.energy(torch.zeros(1, *frame_size, 3, dtype=torch.uint8)).shape[1:]
        self.register_buffer("rows", area_weights(int(rows), grid[0]))
        self.register_buffer("columns", area_weights(int(columns), grid[1]))

    def energy(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, H, W, 3] -> summed squares of the layer's channels [N, h', w'] float32."""
        x = ((frames.to(self.factor.dtype) - self.offset) * self.factor).permute(0, 3, 1, 2)
        if self.shrink > 1:
            x = F.avg_pool2d(x, self.shrink)
        found: list[Tensor] = self.network.forward_intermediates(
            x, indices=[self.index], stop_early=True, intermediates_only=True
        )
        # In float32 at any precision of the weights: squares leave the range of float16.
        return found[0].float().square().sum(1)

    def forward(self, frames: Tensor) -> Tensor:
        energy = self.rows.float() @ self.energy(frames) @ self.columns.float().T
        flat = energy.flatten(1)
        fraction = flat / flat.sum(1, keepdim=True).clamp_min(1e-12)
        attention = (1 - FLOOR) * fraction + FLOOR / flat.shape[1]
        # A layer that is zero everywhere gives the uniform map.
        return attention / attention.sum(1, keepdim=True)


class UniformAttention(nn.Module):
    """Tokens [N, R+P, C] -> attention [N, P] float32, all 1/P: the stock tower's pooling."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.full((tokens.shape[0], self.patches), 1.0 / self.patches)


def area_weights(source: int, target: int) -> Tensor:
    """The matrix that resamples `source` cells to `target` cells of equal length by area: [target, source]. A row
    holds the fractions of its cell that the source cells cover.
    """
    edges = torch.arange(source + 1, dtype=torch.float64) / source
    starts, stops = edges[:-1], edges[1:]
    cells = torch.arange(target + 1, dtype=torch.float64)[:, None] / target
    overlap = (torch.minimum(cells[1:], stops) - torch.maximum(cells[:-1], starts)).clamp_min(0)
    return (overlap * target).float()


def _choose_layer(network: Any) -> tuple[int, str]:
    info = getattr(network, "feature_info", None)
    if info is None or not hasattr(network, "forward_intermediates"):
        raise ModelError(f"{type(network).__name__} gives no feature maps", hint="take a convolutional network of timm")
    stages = [(stage["reduction"], index) for index, stage in enumerate(info)]
    _, index = max((reduction, index) for reduction, index in stages if reduction <= _STRIDE)
    return index, f"{info[index]['module']} (stride {info[index]['reduction']})"
