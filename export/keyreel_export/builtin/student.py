"""The two towers of the built-in model: a plain CNN for pictures, a small transformer for text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

WIDTHS = (64, 64, 128, 256)
BLOCKS = (1, 2, 3)
TOKEN_WIDTH = 512
EMBEDDING_WIDTH = 256
CONTEXT_LENGTH = 32
PAD = 0
UNKNOWN_MARK = "Ġ"  # a token alone: a space, as byte-level tokenizers write it


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def fuse_norms(module: nn.Module) -> nn.Module:
    """Folds each BatchNorm into the convolution before it, in place. Returns the module, in evaluation mode."""
    for child in module.eval().children():
        if isinstance(child, nn.Sequential) and len(child) == 2:
            conv, norm = child[0], child[1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                child[0], child[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
                continue
        fuse_norms(child)
    return module


class Block(nn.Module):
    """Two 3x3 convolutions beside a short cut (He et al. 2016; the short cut averages, as in ResNet-D)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 3, stride)
        self.second = _conv(outputs, outputs, 3)
        short = [nn.AvgPool2d(stride), _conv(inputs, outputs, 1)] if stride > 1 or inputs != outputs else []
        self.short = nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))


class ImageTower(nn.Module):
    """Pixels [N, 3, S, S] in 0..255 -> feature map [N, TOKEN_WIDTH, S/16, S/16], not negative."""

    def __init__(self) -> None:
        super().__init__()
        # A wide first kernel at stride 4: maps of few channels and many places are what a CPU is slow at.
        layers: list[nn.Module] = [_conv(3, WIDTHS[0], 7, 4), nn.ReLU()]
        width = WIDTHS[0]
        for count, wider in zip(BLOCKS, WIDTHS[1:], strict=True):
            for place in range(count):
                layers.append(Block(width, wider, 2 if place == 0 and width != wider else 1))
                width = wider
        self.layers = nn.Sequential(*layers, _conv(width, TOKEN_WIDTH, 1), nn.ReLU())
        self.project = nn.Linear(TOKEN_WIDTH, EMBEDDING_WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.layers((pixels - 127.5) / 64.0)
        return tokens

    def vectors(self, pooled: Tensor) -> Tensor:
        """Pooled tokens [N, TOKEN_WIDTH] -> unit vectors [N, EMBEDDING_WIDTH]."""
        return functional.normalize(self.project(pooled), dim=-1, eps=1e-6)


class TextTower(nn.Module):
    """Token ids [Q, L] -> unit vectors [Q, EMBEDDING_WIDTH].

    One pre-norm transformer layer, then the mean over the tokens that are not padding. The plain embeddings are in the
    sum too: a text is at least a bag of its pieces.

    Args:
        narrow: width of the table of pieces, or 0 for the full one. Many words fit into a narrow table.
    """

    heads = 4

    def __init__(self, vocabulary: int, narrow: int = 0) -> None:
        super().__init__()
        width = EMBEDDING_WIDTH
        self.embedding = nn.Embedding(vocabulary, narrow or width)
        self.widen = nn.Linear(narrow, width) if narrow else nn.Identity()
        self.position = nn.Parameter(torch.randn(CONTEXT_LENGTH, width) * 0.02)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.norm_attend, self.norm_think, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.project = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != PAD
        x = self.widen(self.embedding(ids))
        x = x + self.position[: ids.shape[1]]
        x = x + self._attend(self.norm_attend(x), there)
        x = x + self.think(self.norm_think(x))
        weights = there.to(x.dtype)
        mean = (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1.0)
        return functional.normalize(self.project(self.norm_out(mean)), dim=-1, eps=1e-6)

    def _attend(self, x: Tensor, there: Tensor) -> Tensor:
        length, width = x.shape[1], x.shape[2]
        mixed = self.mix(x).reshape(-1, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = mixed[0], mixed[1], mixed[2]
        scores = query @ key.transpose(-1, -2) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(~there[:, None, None, :], -1e4)
        attended: Tensor = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(-1, length, width)
        return self.out(attended)  # type: ignore[no-any-return]
