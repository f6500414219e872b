"""The attention map: resampling, energy, normalisation, weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound
from keyreel_export import attention as module
from keyreel_export.attention import DEFAULT_NETWORK
from keyreel_export.pretrained import load_attention

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def network() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_attention(DEFAULT_NETWORK, None, random_weights=True)[0].requires_grad_(False)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_area_weights_equal_repeat_and_mean(source: int, target: int) -> None:
    values = np.random.default_rng(source * 41 + target).random(source)
    common = math.lcm(source, target)
    expected = np.repeat(values, common // source).reshape(target, -1).mean(1)
    weights = module.area_weights(source, target).numpy()
    np.testing.assert_allclose(weights @ values, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("size", "grid", "shrink"), [((224, 224), (7, 7), 1), ((448, 392), (32, 28), 2)])
def test_map_against_a_hook_on_the_layer(
    network: Any, size: tuple[int, int], grid: tuple[int, int], shrink: int
) -> None:
    spatial = module.SpatialAttention(network, size, grid)
    assert spatial.shrink == shrink
    assert spatial.layer == "blocks.3 (stride 16)"
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    seen: list[torch.Tensor] = []
    hook = network.blocks[3].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        found = spatial(torch.from_numpy(frames)).numpy()
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        images = (frames / 255 - mean) / std
        rows, columns = size[0] // shrink, size[1] // shrink
        images = images.reshape(2, rows, shrink, columns, shrink, 3).mean((2, 4))
        seen.clear()
        network(torch.from_numpy(images.transpose(0, 3, 1, 2)).float())
    hook.remove()
    energy = np.square(seen[0].double().numpy()).sum(1)
    high, wide = math.lcm(energy.shape[1], grid[0]), math.lcm(energy.shape[2], grid[1])
    fine = energy.repeat(high // energy.shape[1], 1).repeat(wide // energy.shape[2], 2)
    cells = fine.reshape(2, grid[0], high // grid[0], grid[1], wide // grid[1]).mean((2, 4)).reshape(2, -1)
    expected = 0.95 * cells / cells.sum(1, keepdims=True) + 0.05 / cells.shape[1]
    np.testing.assert_allclose(found * cells.shape[1], expected * cells.shape[1], rtol=1e-3)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert found.min() * cells.shape[1] >= 0.05 - 1e-6


def test_a_dead_layer_gives_the_uniform_map(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spatial = module.SpatialAttention(network, (64, 64), (4, 4))
    monkeypatch.setattr(spatial, "energy", lambda frames: torch.zeros(frames.shape[0], 4, 4))
    found = spatial(torch.zeros(3, 64, 64, 3, dtype=torch.uint8))
    np.testing.assert_allclose(found.numpy(), 1 / 16, atol=1e-7)


def test_uniform_attention() -> None:
    found = module.UniformAttention(49)(torch.zeros(3, 50, 8))
    np.testing.assert_array_equal(found.numpy(), np.full((3, 49), 1 / 49, np.float32))


def test_local_weights_and_bad_ones(network: Any, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "cnn.pt")
    save_file(state, tmp_path / "cnn.safetensors")
    for suffix in (".pt", ".safetensors"):
        loaded, source = load_attention(DEFAULT_NETWORK, tmp_path / f"cnn{suffix}", random_weights=False)
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert source["from"].startswith(f"cnn{suffix} sha256:")
    del state["conv_stem.weight"]
    save_file(state, tmp_path / "lacking.safetensors")
    torch.save({"conv_stem.weight": _Harmful(tmp_path / "harm")}, tmp_path / "pickle.pt")
    for name, error, words in (
        ("lacking.safetensors", CheckpointMismatch, r"conv_stem\.weight"),
        ("pickle.pt", CheckpointMismatch, "cannot be loaded"),
        ("absent.pt", ModelError, "not a file"),
    ):
        with pytest.raises(error, match=words):
            load_attention(DEFAULT_NETWORK, tmp_path / name, random_weights=False)
    assert not (tmp_path / "harm").exists()


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_names_and_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    with pytest.raises(ModelNotFound) as caught:
        load_attention("mobilenetv3_smal_100", None, random_weights=False)
    assert DEFAULT_NETWORK in caught.value.near

    def offline(*_args: Any, **_options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match="no route to host") as failed:
        load_attention(DEFAULT_NETWORK, None, random_weights=False)
    assert "--attention-weights" in str(failed.value.hint)
