"""Encoding in windows equals encoding whole; every stage is held against NumPy written out here."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.config import EncodeConfig, ImageTransform
from keyreel.decode.stream import FrameStream
from keyreel.encode import SHIFT_CUT, Encoder
from keyreel.runtime.backend import Backend, resolve
from keyreel.runtime.bundle import Bundle
from keyreel.types import Embedding, FrameBatch
from keyreel_kernels import ops_for

GRID, SIZE, WIDTH, OUT, PREFIX = (3, 4), (24, 32), 10, 6, 1
RNG = np.random.default_rng(0)
PROJECT = RNG.normal(size=(3, WIDTH)).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, OUT)).astype(np.float32)


def patch_means(frames: np.ndarray) -> np.ndarray:
    """[N, P, 3]: mean colour of each patch."""
    cells = frames.astype(np.float32).reshape(len(frames), GRID[0], 8, GRID[1], 8, 3)
    return cells.mean((2, 4)).reshape(len(frames), -1, 3) / 255


class Graph:
    """A model's graph in NumPy, with the names and shapes of a bundle's."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.inputs = self.outputs = ()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if self.name == "backbone.onnx":
            patches = np.tanh(patch_means(feeds["frames"]) @ PROJECT)
            return {"tokens": np.concatenate([patches.mean(1, keepdims=True), patches], axis=1)}
        if self.name == "attention.onnx":
            energy = (patch_means(feeds["frames"]) ** 2).sum(-1) + 0.01
            return {"attention": energy / energy.sum(1, keepdims=True)}
        patches = feeds["tokens"][:, PREFIX:]
        weights = (feeds["attention"] * patches.shape[1]) ** feeds["strength"]
        pooled = np.einsum("np,npc->nc", weights / weights.sum(1, keepdims=True), patches) @ HEAD
        return {"vectors": pooled / np.linalg.norm(pooled, axis=1, keepdims=True)}

    def close(self) -> None: ...


def encoder() -> Encoder:
    bundle = Bundle(
        folder=Path("graphs"),
        name="numpy",
        family="average",
        image=ImageTransform(*SIZE, mode="squash"),
        grid=GRID,
        prefix_tokens=PREFIX,
        token_width=WIDTH,
        embedding_width=OUT,
        context_length=4,
        clean="none",
        attention_input="frames",
        strength_default=0.0,
        shift_default="off",
        sha256="0" * 64,
        manifest={},
    )
    return Encoder(bundle, Backend("cpu", "test", ops_for("cpu"), Graph, FrameStream, 16))


def video(seed: int, count: int) -> FrameBatch:
    """A patchwork whose patches change at random times, with a cut to other colours now and then."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (GRID[0], GRID[1], 3))
    frames = []
    for _ in range(count):
        moved = rng.random(GRID) < 0.3
        cells = np.where(moved[..., None], rng.integers(0, 256, cells.shape), cells)
        if rng.random() < 0.1:
            cells = rng.integers(0, 256, cells.shape)
        frames.append(np.kron(cells, np.ones((8, 8, 1))).astype(np.uint8))
    place = np.arange(count)
    return FrameBatch(np.stack(frames), place / 2, place)


def pieces(batch: FrameBatch, sizes: list[int]) -> list[FrameBatch]:
    edges = np.minimum(np.cumsum([0, *sizes]), len(batch))
    cut = [batch[int(a) : int(b)] for a, b in itertools.pairwise(edges) if b > a]
    rest = batch[int(edges[-1]) :]
    return [*cut, *([rest] if len(rest) else [])]


def assert_equal(one: Embedding, other: Embedding) -> None:
    for name in ("vectors", "attention", "sharpness", "luma_mean", "luma_spread", "pixel_change"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(one.pts_seconds, other.pts_seconds)
    np.testing.assert_array_equal(one.frame_index, other.frame_index)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    shift=st.sampled_from(["off", "fixed", "adaptive"]),
    steps=st.integers(1, 5),
    size=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 12), max_size=6),
)
def test_chunked_equals_whole(seed: int, count: int, shift: Any, steps: int, size: int, sizes: list[int]) -> None:
    batch, model = video(seed, count), encoder()
    whole = model.encode([batch], EncodeConfig(shift=shift, shift_steps=steps, attention_strength=1.0, batch_size=64))
    config = EncodeConfig(shift=shift, shift_steps=steps, attention_strength=1.0, batch_size=size)
    assert_equal(model.encode(pieces(batch, sizes), config).embedding, whole.embedding)


@pytest.mark.parametrize("shift", ["off", "fixed", "adaptive"])
def test_equals_the_chain_written_out(shift: Any) -> None:
    batch, model, ops = video(5, 30), encoder(), ops_for("cpu")
    config = EncodeConfig(shift=shift, attention_strength=2.0)
    got = model.encode([batch], config).embedding

    frames = batch.data
    tokens = Graph(Path("backbone.onnx")).run({"frames": frames})["tokens"]
    colours = [np.histogramdd(f.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0] / f[..., 0].size for f in frames]
    change = [0.0] + [1 - np.minimum(a, b).sum() for a, b in itertools.pairwise(colours)]
    np.testing.assert_allclose(got.pixel_change, change, atol=1e-6)
    linked = np.array([t > 0 and change[t] < SHIFT_CUT for t in range(len(frames))])
    if shift == "fixed":
        source = ops.fixed_shift(len(frames), GRID, linked, fraction=config.shift_share, step=1)
    elif shift == "adaptive":
        source = ops.adaptive_shift(
            tokens[:, PREFIX:], GRID, linked, steps=config.shift_steps, threshold=config.shift_threshold
        )
    else:
        source = np.tile(np.arange(len(frames))[:, None], (1, GRID[0] * GRID[1]))
    assert (shift == "off") == (source == np.arange(len(frames))[:, None]).all()
    tokens = np.stack(
        [np.concatenate([tokens[t, :1], [tokens[source[t, i], 1 + i] for i in range(12)]]) for t in range(len(frames))]
    )
    mosaic = frames.copy()
    for t in range(len(frames)):
        for i in range(12):
            row, column = divmod(i, GRID[1])
            area = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            mosaic[(t, *area)] = frames[(source[t, i], *area)]
    attention = Graph(Path("attention.onnx")).run({"frames": mosaic})["attention"]
    fused = Graph(Path("fusion.onnx")).run({"tokens": tokens, "attention": attention, "strength": np.float32(2)})
    np.testing.assert_allclose(got.attention, attention, atol=1e-6)
    np.testing.assert_allclose(got.vectors, fused["vectors"], atol=1e-6)


def test_the_built_in_model_chunked_equals_whole() -> None:
    model = Encoder(Bundle.find("builtin"), resolve("cpu", threads=1))
    rng = np.random.default_rng(1)
    still = rng.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    frames = np.concatenate([np.roll(still, 9 * n, axis=2) for n in range(12)])
    batch = FrameBatch(frames, np.arange(12) / 2, np.arange(12))
    config = EncodeConfig(shift="adaptive", attention_strength=1.0, batch_size=4)
    chunked = model.encode(pieces(batch, [5, 1, 3]), config).embedding
    whole = model.encode([batch], dataclasses.replace(config, batch_size=32)).embedding
    assert_equal(chunked, whole)
    np.testing.assert_allclose(np.linalg.norm(whole.vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(whole.attention.sum(1), 1, atol=1e-5)


def test_strength_zero_ignores_the_map_and_the_default_is_the_bundles() -> None:
    batch, model = video(3, 6), encoder()
    off = model.encode([batch], EncodeConfig(attention_strength=0.0)).embedding
    default = model.encode([batch], EncodeConfig()).embedding
    strong = model.encode([batch], EncodeConfig(attention_strength=3.0)).embedding
    assert_equal(off, default)
    tokens = Graph(Path("backbone.onnx")).run({"frames": batch.data})["tokens"][:, 1:]
    plain = tokens.mean(1) @ HEAD
    np.testing.assert_allclose(off.vectors, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    assert np.abs(strong.vectors - off.vectors).max() > 0.01


def test_frames_of_another_size_are_refused() -> None:
    batch = FrameBatch(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(24, 32\)"):
        encoder().encode([batch], EncodeConfig())
    with pytest.raises(ValueError, match="no frames"):
        encoder().encode([], EncodeConfig())
