"""Fusion: both vectors and the map against their formulas, and the replaceable projections."""

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
from keyreel_export.fusion import FLOOR, POWER, TemporalSpatialFusion, load_projection
from keyreel_export.towers import Tower, split_tower

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    open_clip = tiny_models.register(tmp_path_factory.mktemp("configs"))
    return split_tower(tiny_models.build(open_clip, "keyreel-tiny-avg", text=False))


def feeds(tower: Tower) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention, change."""
    random = np.random.default_rng(5)
    patches = tower.grid[0] * tower.grid[1]
    energy = random.random((3, patches), np.float32) ** 4 + 1e-3
    tokens = random.standard_normal((3, patches, tower.token_width), np.float32)
    change = 2 * random.random((3, patches), np.float32) ** 3
    change[1] = 0  # a still picture
    return tuple(map(torch.from_numpy, (tokens, energy / energy.sum(1, keepdims=True), change)))


def weights_of(attention: torch.Tensor, change: torch.Tensor, power: float, floor: float) -> np.ndarray:
    """m of DESIGN, section 5, in float64."""
    weights = np.float64(attention.numpy()) ** power * (floor + np.float64(change.numpy()))
    return weights / weights.sum(1, keepdims=True)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("power", "floor"), [(POWER, FLOOR), (0.0, 1.0), (1.0, 0.5)])
def test_average_family_against_the_formulas(tower: Tower, power: float, floor: float) -> None:
    """scene: the mean, then the tower's own head; subject: the mean weighed by the map, then the same head."""
    tokens, attention, change = feeds(tower)
    m = weights_of(attention, change, power, floor)

    def expected(pooled: np.ndarray) -> np.ndarray:
        feature_map = torch.from_numpy(pooled.astype(np.float32))[:, :, None, None].expand(-1, -1, *tower.grid)
        with torch.no_grad():
            return unit(tower.projection(tower.body.forward_head(feature_map.contiguous(), pre_logits=True)).numpy())

    with torch.no_grad():
        found = TemporalSpatialFusion(tower, tower.projection, power=power, floor=floor)(tokens, attention, change)
    scene, subject, weights = (output.numpy() for output in found)
    whole = tokens.numpy().astype(np.float64)
    np.testing.assert_allclose(weights, m, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(scene, expected(whole.mean(1)), atol=1e-6)
    np.testing.assert_allclose(subject, expected(np.einsum("np,npc->nc", m, whole)), atol=2e-6)
    assert {output.dtype for output in (scene, subject, weights)} == {np.dtype(np.float32)}
    # Without power and with nothing that changes the map is even, and the subject is the whole picture.
    assert (np.abs(scene - subject)[1].max() < 1e-6) == (power == 0)


def test_weights_of_nothing_are_even(tower: Tower) -> None:
    """Maps of zeros give numbers."""
    tokens, attention, change = feeds(tower)
    with torch.no_grad():
        found = TemporalSpatialFusion(tower, tower.projection)(tokens, attention * 0, change * 0)
    np.testing.assert_allclose(found[2].numpy(), 1 / attention.shape[1], rtol=1e-5)
    np.testing.assert_allclose(found[0].numpy(), found[1].numpy(), atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_trained_projections(tower: Tower, tmp_path: Path, bias: bool) -> None:
    random = np.random.default_rng(6)
    shape = (tower.embedding_width, tower.feature_width)
    layers, arrays = [], []
    for name in ("scene", "subject"):
        trained = {"weight": torch.from_numpy(random.standard_normal(shape, np.float32))}
        if bias:
            trained["bias"] = torch.from_numpy(random.standard_normal(shape[:1], np.float32))
        path = tmp_path / f"{name}.safetensors"
        save_file(trained, path)
        layer, digest = load_projection(path, tower.feature_width, tower.embedding_width)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        layers.append(layer)
        arrays.append({key: value.numpy().astype(np.float64) for key, value in trained.items()})
    tokens, attention, change = feeds(tower)
    patches = attention.shape[1]
    m = torch.from_numpy(weights_of(attention, change, POWER, FLOOR)).float()
    with torch.no_grad():
        pooled = [tower.features(tokens, row).numpy() for row in (torch.zeros_like(m), (patches * m).log())]
        alone, both = (
            TemporalSpatialFusion(tower, *given)(tokens, attention, change) for given in (layers[:1], layers)
        )

    def expected(features: np.ndarray, layer: dict[str, np.ndarray]) -> np.ndarray:
        return unit(features @ layer["weight"].T + layer.get("bias", 0))

    for found in (alone, both):
        np.testing.assert_allclose(found[0].numpy(), expected(pooled[0], arrays[0]), atol=1e-5)
    np.testing.assert_allclose(alone[1].numpy(), expected(pooled[1], arrays[0]), atol=1e-5)
    np.testing.assert_allclose(both[1].numpy(), expected(pooled[1], arrays[1]), atol=1e-5)


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
