"""What decides the bundle's defaults: labels of validation photographs, and scores of absent labels.

`python -m benchmarks.quality` of the project measures the rest of the model card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keyreel.chance import lead_of
from keyreel.config import EncodeConfig, ImageTransform
from keyreel.runtime.bundle import Bundle, SubjectScale
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.text import Tokenizer
from keyreel.search import frame_scores
from keyreel_export.builtin.data import F32, SIZE, U8, Example, read_examples, read_images, square_view
from keyreel_kernels.shift import patch_change

LIBRARIES = (1, 2, 5, 10, 20, 50, 100, 200, 400)  # images in a library that is asked


class Towers:
    """Frames and texts to vectors, with the graphs of one bundle."""

    def __init__(self, folder: Path) -> None:
        self.bundle = bundle = Bundle.load(folder)
        self._sessions = {
            name: OnnxRuntimeSession(folder / f"{name}.onnx", threads=1)
            for name in ("backbone", "attention", "fusion", "text")
        }
        self._tokenizer = Tokenizer.of(bundle)

    def texts(self, texts: Sequence[str]) -> F32:
        """[Q, D] unit vectors."""
        return self.run("text", token_ids=self._tokenizer.encode(texts))

    def stills(self, frames: U8) -> tuple[F32, F32]:
        """frames [N, H, W, 3] in which nothing moves -> scenes and subjects, [N, D] unit vectors."""
        found: list[tuple[F32, F32]] = []
        for first in range(0, len(frames), 64):
            tokens = self.run("backbone", frames=frames[first : first + 64])
            attention = self.run("attention", tokens=tokens)
            fused = self.fused(tokens, attention, np.zeros_like(attention))
            found.append((fused["scene"], fused["subject"]))
        scene, subject = (np.concatenate(part) for part in zip(*found, strict=True))
        return scene, subject

    def fused(self, tokens: F32, attention: F32, change: F32) -> dict[str, F32]:
        """ "scene", "subject" and "map" of tokens [N, P, C]."""
        found: dict[str, F32] = self._sessions["fusion"].run(
            {"tokens": tokens, "attention": attention, "change": change}
        )
        return found

    def moving(self, frames: U8) -> tuple[F32, F32]:
        """frames [V, F, H, W, 3] of videos -> tokens [V, F, P, C], and how much each patch changes, [V, F, P]."""
        flat, linked = frames.reshape(-1, *frames.shape[2:]), np.arange(frames.shape[1]) > 0
        parts = [self.run("backbone", frames=flat[first : first + 64]) for first in range(0, len(flat), 64)]
        tokens = np.concatenate(parts).reshape(*frames.shape[:2], *parts[0].shape[1:])
        steps = EncodeConfig().shift_steps
        return tokens, np.stack([patch_change(own, self.bundle.grid, linked, steps=steps) for own in tokens])

    def run(self, name: str, **feeds: Any) -> F32:
        """The one output of a graph."""
        [found] = self._sessions[name].run(feeds).values()
        return found


@dataclass(frozen=True, slots=True)
class Shown:
    """Validation images as vectors."""

    examples: list[Example]
    scene: F32  # [N, D]
    subject: F32  # [N, D]

    def scores(self, texts: F32, scale: SubjectScale) -> F32:
        """[N, Q]: the better of both vectors' answers to texts [Q, D]."""
        return frame_scores(self.scene, self.subject, texts.T, scale).best


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
    return Shown(wanted, *towers.stills(frames))


def halves(shown: Shown) -> tuple[Shown, Shown]:
    """Every second image: one half to set the thresholds by, the other to measure them on."""
    first, second = (Shown(shown.examples[n::2], shown.scene[n::2], shown.subject[n::2]) for n in (0, 1))
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
    """Label top-1 and top-5 on validation images, by the scene alone and by the better of both vectors, with intervals
    of the second against the first.

    All names of the images' labels are ranked, as bare words. A hit is any label of the image, which broad terms make
    easy; "specific": only its first label counts.
    """
    names = sorted({label for example in shown.examples for label in example.labels})
    right = [[names.index(label) for label in example.labels] for example in shown.examples]
    texts = towers.texts(names)
    ways = {"scene": shown.scene @ texts.T, "scene and subject": shown.scores(texts, towers.bundle.subject)}
    ranks = [label_ranks(each, right) for each in ways.values()]
    table = []
    for (way, score), rank in zip(ways.items(), ranks, strict=True):
        row: dict[str, Any] = {"vectors": way, "images": len(right), "labels": len(names)}
        specific = label_ranks(score, [columns[:1] for columns in right])
        for depth in (1, 5):
            hits, plain = (rank < depth).astype(np.float32), (ranks[0] < depth).astype(np.float32)
            change = (float((hits - plain).mean()), *interval(hits - plain))
            row[f"top{depth}"] = round(float(hits.mean()), 4)
            row[f"top{depth}_interval"] = [round(v, 4) for v in interval(hits)]
            row[f"top{depth}_against_scene"] = [round(v, 4) for v in change]
            row[f"specific_top{depth}"] = round(float((specific < depth).mean()), 4)
        table.append(row)
    return table


@dataclass(frozen=True, slots=True)
class Answers:
    """What random libraries of one size answer to a label that is present and to one that is absent, [L] each."""

    size: int  # images in each library
    present: Leads
    absent: Leads


@dataclass(frozen=True, slots=True)
class Leads:
    """Of the best image for each label."""

    score: F32
    lead: F32  # see `keyreel.chance.lead_of`


def ask_libraries(towers: Towers, shown: Shown, *, libraries: int, seed: int) -> Iterator[Answers]:
    """The answers of libraries of each size in `LIBRARIES`, as many as there are images for.

    A label is absent where no image of the library has it, so that "dog" is not absent where a poodle is.
    """
    names = sorted({example.labels[0] for example in shown.examples})
    place = {name: column for column, name in enumerate(names)}
    scale, texts = towers.bundle.subject, towers.texts(names)
    background = towers.texts(background_of(shown))
    scores = shown.scores(texts, scale)
    new = np.vecdot(shown.scene, shown.subject) < scale.novelty
    for size in (size for size in LIBRARIES if 2 * size <= len(shown.examples)):
        rng = np.random.default_rng(seed)
        found: list[list[tuple[float, float]]] = []
        for _ in range(libraries):
            chosen = rng.choice(len(shown.examples), size, replace=False)
            held = {label for i in chosen for label in shown.examples[int(i)].labels}
            strangers = [name for name in names if name not in held]
            if strangers:
                asked = shown.examples[int(rng.choice(chosen))].labels[0], strangers[int(rng.integers(len(strangers)))]
                own = []
                for column in (place[name] for name in asked):
                    best = int(chosen[scores[chosen, column].argmax()])
                    subject = shown.subject[best] if new[best] else None
                    lead = lead_of(background, texts[column], scale, shown.scene[best], subject)
                    own.append((float(scores[best, column]), lead))
                found.append(own)
        if found:
            table = np.array(found, np.float32)
            yield Answers(size, *(Leads(table[:, n, 0], table[:, n, 1]) for n in range(2)))


def background_of(shown: Shown) -> list[str]:
    """Every fourth label of the images: four times as many take four times as long and tell no more."""
    return sorted({label for example in shown.examples for label in example.labels})[::4]


def fit_chance(towers: Towers, shown: Shown, *, libraries: int = 1500) -> dict[str, Any] | None:
    """`text.chance` of the manifest: logistic regression of present against absent labels, each library size counting
    alike, by the lead and the logarithm of the size. None where there are too few images.
    """
    rows, present = list[tuple[float, float, float]](), list[bool]()
    for answers in ask_libraries(towers, shown, libraries=libraries, seed=0):
        for there, leads in ((True, answers.present.lead), (False, answers.absent.lead)):
            rows += [(float(lead), float(np.log(answers.size)), 1.0) for lead in leads]
            present += [there] * len(leads)
    if not rows:
        return None
    lead, pictures, offset = logistic(np.array(rows), np.array(present, np.float64))
    if lead <= 0:  # a handful of images say nothing
        return None
    numbers = {"lead": round(lead, 3), "pictures": round(min(pictures, 0.0), 3), "offset": round(offset, 3)}
    return {**numbers, "background": background_of(shown)}


def logistic(inputs: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> list[float]:
    """Weights [n] of a logistic regression of inputs [N, n], by Newton's method with a slight ridge."""
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -50, 50)))
        curve = inputs.T @ (inputs * (chance * (1 - chance))[:, None]) + 1e-3 * np.eye(len(weights))
        step = np.linalg.solve(curve, inputs.T @ (wanted - chance) - 1e-3 * weights)
        weights += step
        if np.abs(step).max() < 1e-8:
            break
    return [float(weight) for weight in weights]


def measure_all(
    towers: Towers, trainset: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Fits the manifest's chances; returns the label figures, and the table of both ways."""
    shown = show(towers, trainset)
    table = measure_labels(towers, shown)
    if (chance := fit_chance(towers, halves(shown)[0])) is not None:
        manifest["text"]["chance"] = chance
    kept = ("top1", "top5", "specific_top1", "specific_top5", "images", "labels")
    figures = {f"val_label_{key}": float(table[0][key]) for key in kept}
    return figures, [{"table": "labels", **row} for row in table]
