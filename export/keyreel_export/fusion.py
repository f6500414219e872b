"""Temporal-spatial fusion: makes a vector of the whole picture, and one of its subject, from the same tokens.

    scene   = normalise(FC_s(pooled(x, the tower's own weights w)))
    subject = normalise(FC_o(pooled(x, w · P m)))           m_i ∝ SAM(x̃)_i^p (ε + d_i)

SAM is the spatial attention, of the time-shifted frame x̃ if the shift is on; d is the change of each patch
(`keyreel_kernels.shift`, `patch_change`). Two vectors, since a single reweighted one finds the subject but loses the
scene: label recall fell by 0.6 to 8.7 points.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.errors import CheckpointMismatch, ModelError
from keyreel_export.towers import pooling_bias, weighted_mean

POWER, FLOOR = 2.0, 0.02  # p and ε without training


class Pooling(Protocol):
    """The interface of a `towers.Tower`: pools tokens [N, R+P, C] with a bias [N, P] of the patches' logits."""

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor: ...


class AveragePooling(nn.Module):
    """The mean over patches, for towers that end in one."""

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Tokens [N, P, C] and a bias of their logits [N, P] -> [N, C]."""
        return weighted_mean(tokens, bias)


def subject_map(attention: Tensor, change: Tensor, power: Tensor | float, floor: Tensor | float) -> Tensor:
    """m ∝ SAM^p (ε + d) in float32: [N, P], [N, P] -> [N, P], rows sum to 1."""
    weights = attention.float().clamp_min(1e-6) ** power * (floor + change.float())
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)


class TemporalSpatialFusion(nn.Module):
    """Tokens, attention and change -> both vectors, and the map of the subject.

    FC_s is by default the tower's own layer, FC_o by default FC_s: both vectors are in the space of the text encoder.
    """

    def __init__(
        self,
        pooling: Pooling,
        projection: nn.Module,
        subject_projection: nn.Module | None = None,
        *,
        power: float = POWER,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        self.pooling, self.power, self.floor = pooling, power, floor
        self.projection = projection
        self.subject_projection = projection if subject_projection is None else subject_projection

    def forward(self, tokens: Tensor, attention: Tensor, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, R+P, C], attention [N, P], rows sum to 1, change [N, P] in 0..2.

        Returns:
            scene [N, D] and subject [N, D], unit length, and the map [N, P], rows sum to 1; float32.
        """
        weights = subject_map(attention, change, self.power, self.floor)
        bias = pooling_bias(weights, torch.ones(()))
        tokens = tokens.to(next(self.parameters()).dtype)
        scene = self.projection(self.pooling.features(tokens, torch.zeros_like(bias)))
        subject = self.subject_projection(self.pooling.features(tokens, bias))
        return F.normalize(scene.float(), dim=-1), F.normalize(subject.float(), dim=-1), weights


def load_projection(path: Path, feature_width: int, embedding_width: int) -> tuple[nn.Linear, str]:
    """Reads a trained FC: safetensors with `weight` [D, F] and, optionally, `bias` [D]. Returns also the file's sha256.

    Raises:
        ModelError: not such a file.
        CheckpointMismatch: tensors with other shapes.
    """
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
