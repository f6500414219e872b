"""Temporal-spatial fusion: tokens times attention, pooled, through a fully connected layer, to unit length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.errors import CheckpointMismatch, ModelError
from keyreel_export.towers import Tower


class TemporalSpatialFusion(nn.Module):
    """z[t] = normalise(FC(Σ_i w'[t,i] · v(x̃[t,i]))), see `keyreel_export.towers` for w'.

    FC is by default the tower's own, which keeps z in the space of its text encoder.
    """

    def __init__(self, tower: Tower, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.tower = tower
        self.projection = tower.projection if projection is None else projection

    def forward(self, tokens: Tensor, attention: Tensor, strength: Tensor) -> Tensor:
        """Tokens [N, R+P, C] under an attention map [N, P], rows sum to 1, with strength γ []: [N, D], unit length."""
        fused: Tensor = self.projection(self.tower.pooled(tokens, attention, strength))
        return F.normalize(fused.float(), dim=-1)


def load_projection(path: Path, feature_width: int, embedding_width: int) -> tuple[nn.Linear, str]:
    """Reads a trained FC, and the sha256 of its file: safetensors with `weight` [D, F] and, optional, `bias` [D]."""
    import safetensors
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"the projection {path} cannot be read: {error}", hint="it must be a safetensors file"
        ) from error
    wanted = {"weight": (embedding_width, feature_width), "bias": (embedding_width,)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "weight" not in found or any(wanted.get(name) != shape for name, shape in found.items()):
        raise CheckpointMismatch(f"the projection {path} holds {found}, wanted are {wanted}, bias optional")
    layer = nn.Linear(feature_width, embedding_width, bias="bias" in found)
    layer.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return layer.requires_grad_(False).eval(), hashlib.sha256(content).hexdigest()
