"""Videos made of vectors with known scenes: what key-frame selection is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyreel.types import Embedding

F32 = NDArray[np.float32]
SCENE_LENGTHS = (200, 15, 12, 60, 10, 8, 40, 20)  # one scene is 55 % of the video


def unit(values: NDArray[Any]) -> F32:
    result: F32 = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    return result


def scenes(draw: np.random.Generator, sizes: list[int], width: int, noise: float) -> F32:
    """Frames of well separated scenes (orthogonal before the noise), one scene after the other."""
    centres = np.eye(width)[: len(sizes)]
    return unit(np.repeat(centres, sizes, axis=0) + noise * draw.normal(size=(sum(sizes), width)))


def some_vectors(draw: np.random.Generator, count: int, width: int) -> F32:
    """Unit vectors of one of the kinds that video gives: unrelated, a few scenes, scenes with exact repeats."""
    kind = draw.integers(3)
    if kind == 0:
        return unit(draw.normal(size=(count, width)))
    centres = draw.normal(size=(draw.integers(1, 6), width))
    scene = np.sort(draw.integers(len(centres), size=count))
    return unit(centres[scene] + (0.3 if kind == 1 else 0.0) * draw.normal(size=(count, width)))


def some_weights(draw: np.random.Generator, count: int) -> F32:
    w = draw.choice([1e-3, 0.2, 1.0], size=count) * draw.random(count) ** draw.integers(0, 2)
    return np.where(draw.random(count) < 0.1, 0, w).astype(np.float32)


def some_video(draw: np.random.Generator, counts: list[int], width: int) -> tuple[F32, F32, NDArray[np.int64]]:
    """x, w and offsets of ragged videos."""
    x = np.concatenate([some_vectors(draw, count, width) for count in counts])
    w = np.concatenate([some_weights(draw, count) for count in counts])
    return x, w, np.concatenate([[0], np.cumsum(counts)])


DEGENERATE = ("one frame", "all equal", "two kinds", "some zero", "all tiny", "all zero", "flash")


def degenerate(kind: str) -> tuple[F32, F32, int]:
    """x, w and how many clusters can be told apart in them."""
    x, w, most = unit(np.random.default_rng(8).normal(size=(9, 5))), np.ones(9, np.float32), 9
    if kind == "one frame":
        x, w, most = x[:1], w[:1], 1
    elif kind == "all equal":
        x, most = np.repeat(x[:1], 9, axis=0), 1
    elif kind == "two kinds":
        x, most = x[[0, 1, 0, 0, 1, 1, 0, 1, 0]], 2
    elif kind == "some zero":
        w[::3], most = 0, 6
    elif kind == "all tiny":
        w *= np.float32(1e-12)
    elif kind == "all zero":
        w[:], most = 0, 1
    else:
        w[4] = 1e-3
    return x, w, most


def planted(seed: int, *, width: int = 128, flashes: int = 3) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors [365, width] of 8 scenes in a narrow cone, in random order, and the scene of each frame.

    In a scene the vector drifts and is noisy. `flashes` lone frames look like nothing else; their scene is -1.
    """
    rng = np.random.default_rng(seed)

    def direction() -> NDArray[np.float64]:
        v = rng.normal(size=width)
        return v / np.linalg.norm(v)

    cone = direction()
    frames, scenes = [], []
    for scene, length in enumerate(rng.permutation(SCENE_LENGTHS)):
        own, towards = direction(), rng.normal(size=width) / np.sqrt(width)
        for place in np.linspace(-1, 1, length):
            noise = rng.normal(size=width) / np.sqrt(width)
            frames.append(0.8 * cone + 0.6 * own + 0.35 * place * towards + 0.25 * noise)
            scenes.append(scene)
    x, scene_of = np.array(frames), np.array(scenes)
    for at in rng.choice(len(x), flashes, replace=False):
        x[at], scene_of[at] = 0.5 * cone + direction(), -1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), scene_of


def embedding_of(
    x: NDArray[np.float32],
    *,
    fps: float = 2.0,
    sharpness: NDArray[np.float32] | None = None,
    luma: NDArray[np.float32] | None = None,
) -> Embedding:
    """An Embedding of vectors alone: clean, well-lit frames, `fps` of them a second."""
    count = np.arange(len(x))
    one = np.ones(len(x), np.float32)
    return Embedding(
        vectors=x,
        pts_seconds=count / fps,
        frame_index=count * 12,
        attention=np.full((len(x), 4), 0.25, np.float32),
        grid=(2, 2),
        sharpness=one if sharpness is None else sharpness,
        luma_mean=0.5 * one if luma is None else luma,
        luma_spread=0.2 * one if luma is None else 0.4 * luma,
        pixel_change=0 * one,
        layout_change=0 * one,
        model="planted",
        model_sha256="0" * 64,
    )
