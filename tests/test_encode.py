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
from kernel_cases import change_by_loops
from planted import unit

from keyreel.config import EncodeConfig, ImageTransform
from keyreel.decode.stream import FrameStream
from keyreel.encode import SHIFT_CUT, Encoder
from keyreel.runtime.backend import Backend, resolve
from keyreel.runtime.bundle import AttentionInput, Bundle
from keyreel.types import Embedding, FrameBatch
from keyreel_kernels import ops_for

GRID, SIZE, WIDTH, OUT, PREFIX = (3, 4), (24, 32), 10, 6, 1
RNG = np.random.default_rng(0)
PROJECT = RNG.normal(size=(3, WIDTH)).astype(np.float32)
HEAD, SUBJECT_HEAD = RNG.normal(size=(2, WIDTH, OUT)).astype(np.float32)


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
            seen = patch_means(feeds["frames"]) if "frames" in feeds else feeds["tokens"][:, PREFIX:]
            energy = (seen**2).sum(-1) + 0.01
            return {"attention": energy / energy.sum(1, keepdims=True)}
        patches = feeds["tokens"][:, PREFIX:]
        weights = feeds["attention"] ** 2 * (0.02 + feeds["change"])
        weights /= weights.sum(1, keepdims=True)
        subject = unit(np.einsum("np,npc->nc", weights, patches) @ SUBJECT_HEAD)
        return {"scene": unit(patches.mean(1) @ HEAD), "subject": subject, "map": weights}

    def close(self) -> None: ...


def encoder(attention_input: AttentionInput = "frames", ops: Any = None) -> Encoder:
    bundle = dataclasses.replace(
        Bundle.find("builtin"),
        image=ImageTransform(*SIZE, mode="squash"),
        grid=GRID,
        prefix_tokens=PREFIX,
        attention_input=attention_input,
        shift_default="fixed",
    )
    return Encoder(bundle, Backend("cpu", "test", ops or ops_for("cpu"), Graph, FrameStream, 16))


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
    names = ["vectors", "attention", "sharpness", "luma_mean", "luma_spread", "pixel_change", "layout_change", "joint"]
    for name in names if one.subject is None else [*names, "subject"]:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(one.pts_seconds, other.pts_seconds)
    np.testing.assert_array_equal(one.frame_index, other.frame_index)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    shift=st.sampled_from(["off", "fixed", "adaptive"]),
    steps=st.integers(1, 5),
    subject=st.booleans(),
    size=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 12), max_size=6),
)
def test_chunked_equals_whole(
    seed: int, count: int, shift: Any, steps: int, subject: bool, size: int, sizes: list[int]
) -> None:
    batch, model = video(seed, count), encoder()
    config = EncodeConfig(shift=shift, shift_steps=steps, subject=subject, batch_size=64)
    whole = model.encode([batch], config).embedding
    assert (whole.subject is not None) == subject
    chunked = model.encode(pieces(batch, sizes), dataclasses.replace(config, batch_size=size))
    assert_equal(chunked.embedding, whole)
    np.testing.assert_array_equal(chunked.vectors, chunked.embedding.vectors)
    np.testing.assert_array_equal(chunked.joint, chunked.embedding.joint)


@pytest.mark.parametrize("attention_input", ["frames", "tokens"])
@pytest.mark.parametrize("shift", ["off", "fixed", "adaptive"])
def test_equals_the_chain_written_out(shift: Any, attention_input: AttentionInput) -> None:
    batch, model, ops = video(5, 30), encoder(attention_input), ops_for("cpu")
    config = EncodeConfig(shift=shift)
    got = model.encode([batch], config).embedding

    frames = batch.data
    tokens = Graph(Path("backbone.onnx")).run({"frames": frames})["tokens"]
    colours = [np.histogramdd(f.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)[0] / f[..., 0].size for f in frames]
    cuts = [0.0] + [1 - np.minimum(a, b).sum() for a, b in itertools.pairwise(colours)]
    np.testing.assert_allclose(got.pixel_change, cuts, atol=1e-6)
    linked = np.array([t > 0 and cuts[t] < SHIFT_CUT for t in range(len(frames))])
    assert 20 < linked.sum() < 29
    if shift == "fixed":
        source = ops.fixed_shift(len(frames), GRID, linked, fraction=config.shift_share, step=1)
    elif shift == "adaptive":
        source = ops.adaptive_shift(
            tokens[:, PREFIX:], GRID, linked, steps=config.shift_steps, threshold=config.shift_threshold
        )
    else:
        source = np.tile(np.arange(len(frames))[:, None], (1, GRID[0] * GRID[1]))
    assert (shift == "off") == (source == np.arange(len(frames))[:, None]).all()
    shifted = np.stack(
        [np.concatenate([tokens[t, :1], [tokens[source[t, i], 1 + i] for i in range(12)]]) for t in range(len(frames))]
    )
    mosaic = frames.copy()
    for t in range(len(frames)):
        for i in range(12):
            row, column = divmod(i, GRID[1])
            area = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            mosaic[(t, *area)] = frames[(source[t, i], *area)]
    seen = {"frames": mosaic} if attention_input == "frames" else {"tokens": shifted}
    attention = Graph(Path("attention.onnx")).run(seen)["attention"]
    change, close = change_by_loops(tokens[:, PREFIX:], GRID, linked, config.shift_steps)
    assert not close.any()
    # Both vectors are of the tokens as they are; only the attention looks at the shifted frame.
    weights = attention**2 * (0.02 + change)
    weights /= weights.sum(1, keepdims=True)
    patches = tokens[:, PREFIX:]
    np.testing.assert_allclose(got.attention, weights, atol=2e-6)
    np.testing.assert_allclose(got.scene, unit(patches.mean(1) @ HEAD), atol=1e-6)
    assert got.subject is not None
    subject = unit(np.stack([weights[t] @ patches[t] @ SUBJECT_HEAD for t in range(len(frames))]))
    np.testing.assert_allclose(got.subject, subject, atol=5e-6)
    assert (np.abs(change) > 0.1).any()


def test_the_built_in_model_chunked_equals_whole() -> None:
    model = Encoder(Bundle.find("builtin"), resolve("cpu", threads=1))
    rng = np.random.default_rng(1)
    still = rng.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    frames = np.concatenate([np.roll(still, 9 * n, axis=2) for n in range(12)])
    batch = FrameBatch(frames, np.arange(12) / 2, np.arange(12))
    config = EncodeConfig(shift="adaptive", batch_size=4)
    chunked = model.encode(pieces(batch, [5, 1, 3]), config).embedding
    whole = model.encode([batch], dataclasses.replace(config, batch_size=32)).embedding
    assert_equal(chunked, whole)
    assert whole.subject is not None
    for vectors in (whole.scene, whole.subject, whole.joint):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(whole.attention.sum(1), 1, atol=1e-5)


class WithoutSubject:
    """The kernels, without those that only a subject needs."""

    def __getattr__(self, name: str) -> Any:
        assert name not in ("patch_change", "fixed_shift", "adaptive_shift", "shift_tokens", "shift_pixels")
        return getattr(ops_for("cpu"), name)


@pytest.mark.parametrize("shift", ["fixed", "adaptive"])
def test_without_a_subject_there_is_no_shift_and_no_change(shift: Any) -> None:
    batch = video(3, 12)
    config = EncodeConfig(shift=shift, subject=False)
    off, on = encoder(ops=WithoutSubject()).encode([batch], config), encoder().encode([batch], EncodeConfig())
    assert off.embedding.subject is None
    assert off.joint is off.vectors
    assert off.embedding.joint is off.embedding.vectors
    np.testing.assert_array_equal(off.embedding.scene, on.embedding.scene)
    attention = Graph(Path("attention.onnx")).run({"frames": batch.data})["attention"] ** 2
    np.testing.assert_allclose(off.embedding.attention, attention / attention.sum(1, keepdims=True), atol=1e-6)
    with pytest.raises(AssertionError):
        encoder(ops=WithoutSubject()).encode([batch], EncodeConfig())


def test_the_default_shift_is_the_bundles() -> None:
    batch, model = video(3, 12), encoder()
    default = model.encode([batch], EncodeConfig()).embedding
    assert_equal(default, model.encode([batch], EncodeConfig(shift="fixed")).embedding)
    off = model.encode([batch], EncodeConfig(shift="off")).embedding
    np.testing.assert_array_equal(default.scene, off.scene)
    assert np.abs(default.attention - off.attention).max() > 0.01
