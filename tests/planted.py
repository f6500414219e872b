"""Videos made of vectors with known scenes: what key-frame selection is held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keyreel.types import Embedding

SCENE_LENGTHS = (200, 15, 12, 60, 10, 8, 40, 20)  # one scene is 55 % of the video


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
        model="planted",
        model_sha256="0" * 64,
    )
