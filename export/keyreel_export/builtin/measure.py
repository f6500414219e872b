"""What a finished bundle can do, through onnxruntime and its own files: labels, attention strengths, scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from keyreel.bundle import Bundle
from keyreel.text import Tokenizer
from keyreel_export.builtin.data import F32, U8, Example, read_images, square_view
from keyreel_export.builtin.scenes import COLOURS, SHAPES, render_scene

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)


class Towers:
    """Frames and texts to vectors, with the graphs of one bundle."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        self.bundle = Bundle.load(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._sessions = {
            name: onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for name in ("backbone", "attention", "fusion", "text")
        }
        self._tokenizer = Tokenizer(
            folder / "tokenizer.json", clean=self.bundle.clean, context_length=self.bundle.context_length
        )

    def texts(self, texts: Sequence[str]) -> F32:
        """[Q, D] unit vectors."""
        return self._run("text", {"token_ids": self._tokenizer.encode(texts)})

    def frames(self, frames: U8, strengths: Sequence[float]) -> list[F32]:
        """frames [N, H, W, 3] -> [N, D] unit vectors for each attention strength."""
        found: list[list[F32]] = [[] for _ in strengths]
        for first in range(0, len(frames), 64):
            tokens = self._run("backbone", {"frames": frames[first : first + 64]})
            attention = self._run("attention", {"tokens": tokens})
            for place, strength in enumerate(strengths):
                feed = {"tokens": tokens, "attention": attention, "strength": np.asarray(strength, np.float32)}
                found[place].append(self._run("fusion", feed))
        return [np.concatenate(rows) for rows in found]

    def _run(self, name: str, feed: dict[str, Any]) -> F32:
        return np.asarray(self._sessions[name].run(None, feed)[0], np.float32)


def label_ranks(scores: F32, right: Sequence[Sequence[int]]) -> F32:
    """Place of the best right label among all labels, 0 the first; [N].

    Args:
        scores: [N, V] of images against label names.
        right: columns of the labels of each image.
    """
    best = np.array([row[list(columns)].max() for row, columns in zip(scores, right, strict=True)])
    return np.asarray((scores > best[:, None]).sum(axis=1), np.float32)


def mean_average_precision(scores: F32, right: Sequence[Sequence[int]]) -> float:
    """Images ranked for each label name: mean over the labels of the average precision."""
    relevant = np.zeros(scores.shape, bool)
    for row, columns in enumerate(right):
        relevant[row, list(columns)] = True
    ranked = np.take_along_axis(relevant, np.argsort(-scores, axis=0, kind="stable"), axis=0)
    precision = ranked.cumsum(axis=0) / np.arange(1, len(scores) + 1)[:, None]
    return float(((precision * ranked).sum(axis=0) / ranked.sum(axis=0)).mean())


def interval(differences: F32, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, 2000 draws."""
    draws = np.random.default_rng(seed).integers(0, len(differences), (2000, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def measure_labels(towers: Towers, trainset: Path, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Label top-1 and top-5 on validation images at each attention strength, with intervals against strength 0.

    All distinct names of the images' labels are ranked, as bare words. A hit is any label of the image, which broad
    terms make easy ("commonest_share": always saying the commonest label); "specific": only its first label counts.
    "label_to_image_map" ranks the images for each name; a missing label counts as wrong there.
    """
    labelled = [example for example in examples if example.labels]
    frames = np.empty((len(labelled), towers.bundle.image.height, towers.bundle.image.width, 3), np.uint8)
    for index, image in read_images(trainset, labelled):
        frames[index] = square_view(image, towers.bundle.image.height)
    counts = Counter(label for example in labelled for label in example.labels)
    names = sorted(counts)
    right = [[names.index(label) for label in example.labels] for example in labelled]
    texts = towers.texts(names)
    scores = [vectors @ texts.T for vectors in towers.frames(frames, STRENGTHS)]
    ranks = [label_ranks(each, right) for each in scores]
    table = []
    for strength, rank, score in zip(STRENGTHS, ranks, scores, strict=True):
        row: dict[str, Any] = {"strength": strength, "images": len(labelled), "labels": len(names)}
        specific = label_ranks(score, [columns[:1] for columns in right])
        for depth in (1, 5):
            hits, plain = (rank < depth).astype(np.float32), (ranks[0] < depth).astype(np.float32)
            change = (float((hits - plain).mean()), *interval(hits - plain))
            row[f"top{depth}"] = round(float(hits.mean()), 4)
            row[f"top{depth}_interval"] = [round(v, 4) for v in interval(hits)]
            row[f"top{depth}_against_0"] = [round(v, 4) for v in change]
            row[f"specific_top{depth}"] = round(float((specific < depth).mean()), 4)
        row["label_to_image_map"] = round(mean_average_precision(score, right), 4)
        row["commonest_share"] = round(max(counts.values()) / len(labelled), 4)
        table.append(row)
    return table


def best_strength(table: Sequence[dict[str, Any]]) -> float:
    """The strength with the best top-1 and top-5 together among those that lower neither; 0 where all lower one."""
    safe = [row for row in table if row["top1_against_0"][0] >= 0 and row["top5_against_0"][0] >= 0]
    return float(max(safe, key=lambda row: row["top1"] + row["top5"])["strength"])


def measure_scenes(towers: Towers, count: int = 500, seed: int = 987654) -> dict[str, float]:
    """Rendered single shapes that training did not draw: is the right text first among all of its kind?"""
    rng = np.random.default_rng(seed)
    scenes = [render_scene("shape", rng, (398, 224)).squashed(towers.bundle.image.height) for _ in range(count)]
    [vectors] = towers.frames(np.stack([scene.pixels for scene in scenes]), (towers.bundle.strength_default,))
    things = {f"{colour} {shape}": f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES}
    grounds = {f"{colour} background": f"a {colour} background" for colour in COLOURS}
    found = {"scenes": float(count)}
    for name, texts in (("coloured_shape", things), ("background", grounds)):
        tags = list(texts)
        best = (vectors @ towers.texts(list(texts.values())).T).argmax(axis=1)
        hits = [tags[int(b)] in scene.tags for b, scene in zip(best, scenes, strict=True)]
        found[f"scenes_{name}_top1"] = round(float(np.mean(hits)), 4)
    return found
