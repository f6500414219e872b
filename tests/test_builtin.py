"""The built-in bundle, read with onnxruntime alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import keyreel

FOLDER = Path(keyreel.__file__).parent / "models" / "builtin"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (30, 60, 200),
    "yellow": (250, 220, 40),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}


def session(name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(FOLDER / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


class Bundle:
    def __init__(self) -> None:
        self.sessions = {name: session(name) for name in ("backbone", "attention", "fusion", "text")}
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def run(self, name: str, **feed: Any) -> np.ndarray:
        return self.sessions[name].run(None, {key: np.asarray(value) for key, value in feed.items()})[0]

    def text(self, *texts: str) -> np.ndarray:
        rows = self.tokenizer.encode_batch([text.lower() for text in texts])
        return self.run("text", token_ids=np.array([row.ids for row in rows], np.int64))

    def fuse(self, tokens: np.ndarray, attention: np.ndarray, change: np.ndarray) -> list[np.ndarray]:
        """Scene, subject, map."""
        return self.sessions["fusion"].run(None, {"tokens": tokens, "attention": attention, "change": change})

    def image(self, *frames: np.ndarray) -> np.ndarray:
        """The scene's vectors of stills."""
        tokens = self.run("backbone", frames=np.stack(frames))
        attention = self.run("attention", tokens=tokens)
        return self.fuse(tokens, attention, np.zeros_like(attention))[0]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle()


@pytest.fixture(scope="module")
def tokens(bundle: Bundle) -> np.ndarray:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return bundle.run("backbone", frames=blocks)


def test_the_card_and_the_log_stand_beside_it() -> None:
    assert (FOLDER.parent / "MODEL_CARD.md").is_file()
    for name in ("builtin-training.jsonl", "builtin-subject.jsonl", "builtin-text.jsonl"):
        log = (FOLDER.parent / name).read_text("utf-8")
        assert len(log) < 50_000
    *_, scene, both = (json.loads(line) for line in log.splitlines())
    assert scene["top1"] == MANIFEST["verify"]["val_label_top1"]
    assert both["specific_top1"] >= 0.55


def test_shapes_and_lengths_for_one_and_several(bundle: Bundle) -> None:
    places = MANIFEST["grid"][0] * MANIFEST["grid"][1]
    rng = np.random.default_rng(0)
    for count in (1, 5):
        frames = rng.integers(
            0, 256, (count, MANIFEST["image"]["height"], MANIFEST["image"]["width"], 3), dtype=np.uint8
        )
        tokens = bundle.run("backbone", frames=frames)
        assert tokens.shape == (count, MANIFEST["prefix_tokens"] + places, MANIFEST["token_width"])
        attention = bundle.run("attention", tokens=tokens)
        assert attention.shape == (count, places)
        change = rng.random((count, places), np.float32)
        scene, subject, weights = bundle.fuse(tokens, attention, change)
        assert (weights.shape, weights.dtype) == ((count, places), np.float32)
        np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-5)
        texts = bundle.text(*["a dog"] * count)
        for found in (scene, subject, texts):
            assert found.shape == (count, MANIFEST["embedding_width"])
            assert found.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def weights(name: str) -> list[np.ndarray]:
    import onnx

    graph = onnx.load(FOLDER / name).graph
    return [onnx.numpy_helper.to_array(weight).astype(np.float64) for weight in graph.initializer]


@pytest.mark.full
def test_attention_is_the_share_of_a_sigmoid(bundle: Bundle, tokens: np.ndarray) -> None:
    found = bundle.run("attention", tokens=tokens)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)
    assert found.min() > 0
    arrays = weights("attention.onnx")
    narrow = next(a for a in arrays if a.ndim == 2)  # [C, 32]
    look = next(a for a in arrays if a.ndim == 4)  # [1, 32, 3, 3]
    bias = next(a for a in arrays if a.shape == narrow.shape[1:])
    offset = next(a for a in arrays if a.shape == (1,) and a[0] != int(a[0]))
    size = np.sqrt((tokens.astype(np.float64) ** 2).mean(axis=(1, 2), keepdims=True) + 1e-6)
    hidden = np.maximum((tokens / size) @ narrow + bias, 0).reshape(-1, *MANIFEST["grid"], narrow.shape[1])
    around = np.lib.stride_tricks.sliding_window_view(np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    share = 0.05 + 1 / (1 + np.exp(-(np.einsum("nyxcij,kcij->nyxk", around, look) + offset)))
    expected = share.reshape(found.shape)
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), rtol=1e-3)


@pytest.mark.full
def test_fusion_is_two_weighted_means_and_a_linear_map_each(bundle: Bundle, tokens: np.ndarray) -> None:
    arrays = weights("fusion.onnx")
    width, depth = MANIFEST["embedding_width"], MANIFEST["token_width"]
    layers = [a if a.shape == (width, depth) else a.T for a in arrays if a.size == width * depth]
    offsets = [a for a in arrays if a.shape == (width,)]
    attention = bundle.run("attention", tokens=tokens).astype(np.float64)
    change = 2 * np.random.default_rng(4).random(attention.shape, np.float32) ** 3
    scene, subject, weighed = bundle.fuse(tokens, attention.astype(np.float32), change)
    power, floor = (MANIFEST["fusion"][name] for name in ("power", "floor"))
    m = attention**power * (floor + change)
    m /= m.sum(1, keepdims=True)
    np.testing.assert_allclose(weighed, m, rtol=5e-4)  # the manifest's two numbers have four digits

    def distance(found: np.ndarray, pooled: list[np.ndarray]) -> float:
        """From the nearest of the graph's linear maps: it does not say which is which."""
        all_expected = (np.array(pooled) @ layer.T + offset for layer in layers for offset in offsets)
        return min(np.abs(found - e / np.linalg.norm(e, axis=1, keepdims=True)).max() for e in all_expected)

    assert distance(scene, [t.mean(axis=0) for t in tokens]) < 2e-5
    assert distance(subject, [np.average(t, axis=0, weights=a) for t, a in zip(tokens, m, strict=True)]) < 2e-5


def test_odd_texts_give_unit_vectors(bundle: Bundle) -> None:
    texts = ["", " ", "🎬🐕🏽 👨‍👩‍👧", "日本語の字幕", "word " * 5000, "\x00\ufffd", "x" * 20_000]
    found = bundle.text(*texts)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def test_padding_does_not_change_a_text(bundle: Bundle) -> None:
    [row] = bundle.tokenizer.encode_batch(["a red circle"])
    assert len(row.ids) == MANIFEST["text"]["context_length"]
    short = np.array([row.ids[: sum(row.attention_mask)]], np.int64)
    np.testing.assert_allclose(
        bundle.run("text", token_ids=np.pad(short, ((0, 0), (0, 32 - short.shape[1])))),
        bundle.text("a red circle"),
        atol=1e-6,
    )
    assert float((bundle.text("a red circle") @ bundle.text("a blue square").T)[0, 0]) < 0.9


def scene(colour: str, shape: str, ground: str, rng: np.random.Generator) -> np.ndarray:
    """A wide frame with one shape, squashed as the engine does it."""
    image = Image.new("RGB", (640, 360), COLOURS[ground])
    x, y, r = rng.uniform(150, 490), rng.uniform(120, 240), rng.uniform(70, 110)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=COLOURS[colour])
    return np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("seed", range(3))
def test_a_red_circle_is_found_among_other_scenes(bundle: Bundle, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [("red", "circle", "blue"), ("green", "square", "white"), ("yellow", "triangle", "black")]
    kinds += [("blue", "circle", "white"), ("red", "square", "white"), ("white", "triangle", "green")]
    vectors = bundle.image(*(scene(*kind, rng) for kind in kinds))
    scores = vectors @ bundle.text(*(f"a {colour} {shape}" for colour, shape, _ in kinds)).T
    assert scores[:, 0].argmax() == 0
    assert (scores.argmax(axis=0) == np.arange(len(kinds))).mean() >= 5 / 6
