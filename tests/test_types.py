"""Values check themselves; configs refuse what makes no sense."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from planted import embedding_of, unit

from keyreel.config import EncodeConfig, ImageTransform, OutputConfig, Sampling, SelectConfig
from keyreel.types import FrameBatch


def batch(count: int) -> FrameBatch:
    return FrameBatch(np.zeros((count, 4, 6, 3), np.uint8), np.arange(count) / 2, np.arange(count))


def test_a_slice_of_a_batch_is_a_batch() -> None:
    part = batch(5)[1:3]
    assert isinstance(part, FrameBatch)
    assert len(part) == 2
    np.testing.assert_array_equal(part.pts_seconds, [0.5, 1.0])
    np.testing.assert_array_equal(batch(5)[[4, 0]].frame_index, [4, 0])
    assert "0.500..1.000 s" in repr(part)
    assert "empty" in repr(batch(0))


def test_shapes_that_do_not_agree_are_printed() -> None:
    with pytest.raises(ValueError, match=r"data \(2, 4, 6, 3\), pts_seconds \(3,\)"):
        FrameBatch(np.zeros((2, 4, 6, 3), np.uint8), np.zeros(3), np.arange(2))
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        FrameBatch(np.zeros((2, 4, 6), np.uint8), np.zeros(2), np.arange(2))
    embedding = embedding_of(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"vectors \(3, 4\), pts_seconds \(2,\)"):
        dataclasses.replace(embedding, pts_seconds=np.zeros(2))
    with pytest.raises(ValueError, match="does not fit the grid"):
        dataclasses.replace(embedding, grid=(3, 3))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Sampling, {"fps": 0}),
        (Sampling, {"fps": float("nan")}),
        (Sampling, {"mode": "some"}),
        (Sampling, {"every": 0}),
        (Sampling, {"mode": "times"}),
        (Sampling, {"mode": "times", "times": (-1.0,)}),
        (Sampling, {"mode": "times", "times": (1.0,), "start_seconds": 2.0}),
        (SelectConfig, {"per_minute": float("inf")}),
        (OutputConfig, {"reel_seconds": -1.0}),
        (Sampling, {"start_seconds": 3, "stop_seconds": 3}),
        (ImageTransform, {"height": 0, "width": 4}),
        (ImageTransform, {"height": 4, "width": 4, "mode": "stretch"}),
        (ImageTransform, {"height": 4, "width": 4, "interpolation": "lanczos"}),
        (EncodeConfig, {"shift": "sometimes"}),
        (EncodeConfig, {"shift_steps": 0}),
        (EncodeConfig, {"shift_share": 0.6}),
        (EncodeConfig, {"batch_size": 0}),
        (SelectConfig, {"keyframes": 0}),
        (SelectConfig, {"keyframes": 3, "per_minute": 2}),
        (SelectConfig, {"per_minute": 0}),
        (SelectConfig, {"margin": 2}),
        (SelectConfig, {"quality_floor": 1}),
        (OutputConfig, {"reel_seconds": 0}),
        (OutputConfig, {"jpeg_quality": 0}),
        (OutputConfig, {"aspect": "9x16"}),
        (OutputConfig, {"aspect": "11:1"}),
        (OutputConfig, {"aspect": "0:1"}),
        (OutputConfig, {"aspect": "9:16", "reframe": "zoom"}),
        (OutputConfig, {"reframe": "fit"}),
    ],
)
def test_senseless_values_are_refused(kind: type, values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        kind(**values)


def test_the_cosine_of_joint_vectors_is_that_of_both_weighed() -> None:
    draw = np.random.default_rng(2)
    scene, subject = unit(draw.normal(size=(2, 6, 8)))
    plain = embedding_of(scene)
    both = dataclasses.replace(plain, subject=subject)
    assert both.scene is both.vectors
    assert plain.joint is plain.vectors
    assert (both.joint.shape, both.joint.dtype) == ((6, 16), np.float32)
    means = [[0.75 * scene[i] @ scene[j] + 0.25 * subject[i] @ subject[j] for j in range(6)] for i in range(6)]
    np.testing.assert_allclose(both.joint @ both.joint.T, means, atol=1e-6)
    with pytest.raises(ValueError, match=r"subject \(5, 8\)"):
        dataclasses.replace(plain, subject=subject[:5])
