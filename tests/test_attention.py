"""The built-in attention on other towers' grids, against the built-in model's own graphs and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.models import verify
from keyreel.runtime.bundle import Bundle
from keyreel.types import F32, U8
from keyreel_export import attention as module

pytestmark = pytest.mark.full


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_area_weights_equal_repeat_and_mean(source: int, target: int) -> None:
    values = np.random.default_rng(source * 41 + target).random(source)
    common = math.lcm(source, target)
    expected = np.repeat(values, common // source).reshape(target, -1).mean(1)
    weights = module.area_weights(source, target).numpy()
    np.testing.assert_allclose(weights @ values, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)


def own_map(frames: U8) -> F32:
    """The built-in model's map of frames of its own size, by its own graphs."""
    bundle = Bundle.find("builtin")
    [(tokens,)] = verify.run_graph(bundle.file("backbone.onnx"), [{"frames": frames}], "fp32")
    [(found,)] = verify.run_graph(bundle.file("attention.onnx"), [{"tokens": tokens}], "fp32")
    return found


def test_at_its_own_size_it_is_the_built_in_map() -> None:
    frames = verify.sample_frames(112, 112, count=4, seed=0)
    found = module.BuiltinAttention((112, 112), (7, 7))(torch.from_numpy(frames)).numpy()
    np.testing.assert_allclose(found * 49, own_map(frames) * 49, atol=1e-3)


@pytest.mark.parametrize(("times", "grid"), [(2, (7, 7)), (3, (14, 14)), (2, (8, 5))])
def test_larger_frames_and_other_grids(times: int, grid: tuple[int, int]) -> None:
    small = verify.sample_frames(112, 112, count=4, seed=1)
    frames = small.repeat(times, 1).repeat(times, 2)  # averaged down, these are the small ones again
    found = module.BuiltinAttention((112 * times, 112 * times), grid)(torch.from_numpy(frames)).numpy()
    fine = own_map(small).reshape(4, 7, 7).repeat(grid[0], 1).repeat(grid[1], 2)
    expected = fine.reshape(4, grid[0], 7, grid[1], 7).mean((2, 4)).reshape(4, -1)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found / expected, 1, atol=2e-3)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_uniform_attention() -> None:
    found = module.UniformAttention(49)(torch.zeros(3, 50, 8))
    np.testing.assert_array_equal(found.numpy(), np.full((3, 49), 1 / 49, np.float32))
