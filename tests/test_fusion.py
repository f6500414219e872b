"""Fusion: the product of weights and map, and the replaceable projection."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import tiny_models
import torch
from safetensors.torch import save_file

from keyreel.errors import CheckpointMismatch, ModelError
from keyreel_export.fusion import TemporalSpatialFusion, load_projection
from keyreel_export.towers import Tower, split_tower

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    open_clip = tiny_models.register(tmp_path_factory.mktemp("configs"))
    return split_tower(tiny_models.build(open_clip, "keyreel-tiny-avg", text=False))


def feeds(tower: Tower) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(5)
    patches = tower.grid[0] * tower.grid[1]
    energy = random.random((3, patches), np.float32) ** 4 + 1e-3
    tokens = random.standard_normal((3, patches, tower.token_width), np.float32)
    return torch.from_numpy(tokens), torch.from_numpy(energy / energy.sum(1, keepdims=True))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_average_family_against_the_product(tower: Tower, strength: float) -> None:
    """DESIGN's formula as it stands: weights times (P a)^γ, renormalised, then the tower's own head."""
    tokens, attention = feeds(tower)
    weights = np.power(attention.numpy().astype(np.float64) * attention.shape[1], strength)
    weights /= weights.sum(1, keepdims=True)
    mean = torch.from_numpy(np.einsum("np,npc->nc", weights, tokens.numpy()).astype(np.float32))
    with torch.no_grad():
        feature_map = mean[:, :, None, None].expand(-1, -1, *tower.grid).contiguous()
        expected = tower.projection(tower.body.forward_head(feature_map, pre_logits=True)).numpy()
        found = TemporalSpatialFusion(tower)(tokens, attention, torch.tensor(strength)).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_trained_projection(tower: Tower, tmp_path: Path, bias: bool) -> None:
    random = np.random.default_rng(6)
    shape = (tower.embedding_width, tower.feature_width)
    trained = {"weight": torch.from_numpy(random.standard_normal(shape, np.float32))}
    if bias:
        trained["bias"] = torch.from_numpy(random.standard_normal(shape[:1], np.float32))
    path = tmp_path / "fc.safetensors"
    save_file(trained, path)
    layer, digest = load_projection(path, tower.feature_width, tower.embedding_width)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    tokens, attention = feeds(tower)
    strength = torch.tensor(1.0)
    with torch.no_grad():
        features = tower.pooled(tokens, attention, strength).numpy()
        found = TemporalSpatialFusion(tower, layer)(tokens, attention, strength).numpy()
    expected = features @ trained["weight"].numpy().T + (trained["bias"].numpy() if bias else 0)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_projections_that_do_not_fit(tower: Tower, tmp_path: Path) -> None:
    path = tmp_path / "fc.safetensors"
    width, features = tower.embedding_width, tower.feature_width

    def load(tensors: dict[str, Any]) -> None:
        save_file(tensors, path)
        load_projection(path, features, width)

    with pytest.raises(CheckpointMismatch, match="weight"):
        load({"weight": torch.zeros(features, width)})
    with pytest.raises(CheckpointMismatch, match="bias"):
        load({"bias": torch.zeros(width)})
    with pytest.raises(CheckpointMismatch, match="scale"):
        load({"weight": torch.zeros(width, features), "scale": torch.ones(1)})
    path.write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load_projection(path, features, width)
    with pytest.raises(ModelError, match="cannot be read"):
        load_projection(tmp_path / "absent.safetensors", features, width)
