"""What decides the bundle's defaults: labels of validation photographs at each strength, and scores of absent labels.

`python -m benchmarks.quality` of the project measures the rest of the model card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keyreel.config import ImageTransform
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.text import Tokenizer
from keyreel_export.builtin.data import F32, SIZE, U8, Example, read_examples, read_images, square_view

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
MISSED = 0.1  # of the present labels, by the threshold below which nothing matches
LIBRARIES = (1, 2, 5, 10, 20, 50, 100, 200, 400)  # images in a library that is asked


class Towers:
    """Frames and texts to vectors, with the graphs of one bundle."""

    def __init__(self, folder: Path) -> None:
        self.bundle = bundle = Bundle.load(folder)
        self._sessions = {
            name: OnnxRuntimeSession(folder / f"{name}.onnx", threads=1)
            for name in ("backbone", "attention", "fusion", "text")
        }
        self._tokenizer = Tokenizer(folder / "tokenizer.json", clean=bundle.clean, context_length=bundle.context_length)

    def texts(self, texts: Sequence[str]) -> F32:
        """[Q, D] unit vectors."""
        return self.run("text", token_ids=self._tokenizer.encode(texts))

    def frames(self, frames: U8, strengths: Sequence[float]) -> list[F32]:
        """frames [N, H, W, 3] -> [N, D] unit vectors for each attention strength."""
        found: list[list[F32]] = [[] for _ in strengths]
        for first in range(0, len(frames), 64):
            tokens = self.run("backbone", frames=frames[first : first + 64])
            attention = self.run("attention", tokens=tokens)
            for rows, strength in zip(found, strengths, strict=True):
                rows.append(self.run("fusion", tokens=tokens, attention=attention, strength=np.float32(strength)))
        return [np.concatenate(rows) for rows in found]

    def run(self, name: str, **feeds: Any) -> F32:
        """The one output of a graph."""
        [found] = self._sessions[name].run(feeds).values()
        return found


@dataclass(frozen=True, slots=True)
class Shown:
    """Validation images as vectors for each attention strength."""

    examples: list[Example]
    vectors: list[F32]  # [N, D] for each of STRENGTHS


def show(towers: Towers, trainset: Path, *, captioned: bool = False) -> Shown:
    """Runs the image tower over the validation images that have labels, or over those that have captions."""
    bundle, expected = towers.bundle, ImageTransform(SIZE, SIZE, "squash", "bicubic")
    if (bundle.image, bundle.attention_input) != (expected, "tokens"):
        kind = f"that squash frames to {SIZE} pixels, bicubic, and whose attention takes tokens"
        raise ValueError(f"{bundle.folder}: photographs are only shown to models {kind}")
    wanted = [e for e in read_examples(trainset, "val") if (e.captions if captioned else e.labels)]
    frames = np.empty((len(wanted), SIZE, SIZE, 3), np.uint8)
    for index, image in read_images(trainset, wanted):
        frames[index] = square_view(image)
    return Shown(wanted, towers.frames(frames, STRENGTHS) if wanted else [])


def halves(shown: Shown) -> tuple[Shown, Shown]:
    """Every second image: one half to set the thresholds by, the other to measure them on."""
    first, second = (
        Shown(shown.examples[start::2], [vectors[start::2] for vectors in shown.vectors]) for start in (0, 1)
    )
    return first, second


def label_ranks(scores: F32, right: Sequence[Sequence[int]]) -> F32:
    """[N]: how many labels of scores [N, V] are higher than the best of the `right` columns of each image."""
    best = np.array([row[list(columns)].max() for row, columns in zip(scores, right, strict=True)])
    return np.asarray((scores > best[:, None]).sum(axis=1), np.float32)


def interval(differences: F32, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, 2000 draws."""
    draws = np.random.default_rng(seed).integers(0, len(differences), (2000, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def measure_labels(towers: Towers, shown: Shown) -> list[dict[str, Any]]:
    """Label top-1 and top-5 on validation images at each attention strength, with intervals against strength 0.

    All names of the images' labels are ranked, as bare words. A hit is any label of the image, which broad terms make
    easy; "specific": only its first label counts.
    """
    names = sorted({label for example in shown.examples for label in example.labels})
    right = [[names.index(label) for label in example.labels] for example in shown.examples]
    scores = [vectors @ towers.texts(names).T for vectors in shown.vectors]
    ranks = [label_ranks(each, right) for each in scores]
    table = []
    for strength, rank, score in zip(STRENGTHS, ranks, scores, strict=True):
        row: dict[str, Any] = {"strength": strength, "images": len(right), "labels": len(names)}
        specific = label_ranks(score, [columns[:1] for columns in right])
        for depth in (1, 5):
            hits, plain = (rank < depth).astype(np.float32), (ranks[0] < depth).astype(np.float32)
            change = (float((hits - plain).mean()), *interval(hits - plain))
            row[f"top{depth}"] = round(float(hits.mean()), 4)
            row[f"top{depth}_interval"] = [round(v, 4) for v in interval(hits)]
            row[f"top{depth}_against_0"] = [round(v, 4) for v in change]
            row[f"specific_top{depth}"] = round(float((specific < depth).mean()), 4)
        table.append(row)
    return table


def best_strength(table: Sequence[dict[str, Any]]) -> float:
    """The strength with the best top-1 and top-5 together among those that raise one for certain (the whole interval is
    above 0) and lower neither; else 0, which costs nothing.
    """
    better = []
    for row in table:
        changes = row["top1_against_0"], row["top5_against_0"]
        if max(low for _, low, _ in changes) > 0 and min(mean for mean, _, _ in changes) >= 0:
            better.append(row)
    return float(max(better, key=lambda row: row["top1"] + row["top5"])["strength"]) if better else 0.0


def ask_libraries(
    towers: Towers, shown: Shown, strength: float, *, libraries: int, seed: int
) -> Iterator[tuple[int, F32, F32]]:
    """Best scores of random libraries of each size, each asked for a label that is present and for one that is absent:
    (size, [L], [L]).

    A label is absent where no image of the library has it, so that "dog" is not absent where a poodle is.
    """
    vectors = shown.vectors[STRENGTHS.index(strength)]
    names = sorted({example.labels[0] for example in shown.examples})
    texts = dict(zip(names, towers.texts(names), strict=True))
    for size in (size for size in LIBRARIES if 2 * size <= len(shown.examples)):
        rng = np.random.default_rng(seed)
        found: list[tuple[float, float]] = []
        for _ in range(libraries):
            chosen = rng.choice(len(shown.examples), size, replace=False)
            held = {label for i in chosen for label in shown.examples[int(i)].labels}
            strangers = [name for name in names if name not in held]
            if strangers:
                present = texts[shown.examples[int(rng.choice(chosen))].labels[0]]
                absent = texts[strangers[int(rng.integers(len(strangers)))]]
                found.append((float((vectors[chosen] @ present).max()), float((vectors[chosen] @ absent).max())))
        if found:
            scores = np.asarray(found, np.float32)
            yield size, scores[:, 0], scores[:, 1]


def match_thresholds(towers: Towers, shown: Shown, strength: float, *, libraries: int = 1500) -> list[list[float]]:
    """[[images, score], ...], both rising: the score that all but MISSED of the present labels reach among so many
    images. Empty where there are too few images.
    """
    found: list[list[float]] = []
    for size, present, _ in ask_libraries(towers, shown, strength, libraries=libraries, seed=0):
        score = round(float(np.quantile(present, MISSED)), 4)
        found.append([size, max(score, found[-1][1]) if found else score])
    return found


def measure_all(
    towers: Towers, trainset: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sets the manifest's attention strength and thresholds; returns the label figures, and a table of strengths."""
    shown = show(towers, trainset)
    table = measure_labels(towers, shown)
    strength = best_strength(table)
    manifest["fusion"]["strength_default"] = strength
    thresholds = match_thresholds(towers, halves(shown)[0], strength)
    if thresholds:
        manifest["text"]["weak_scores"] = thresholds
    chosen = next(row for row in table if row["strength"] == strength)
    kept = ("top1", "top5", "specific_top1", "specific_top5", "images", "labels")
    figures = {f"val_label_{key}": float(chosen[key]) for key in kept}
    return figures, [{"table": "attention strength", **row} for row in table]
