"""What a finished bundle can do, through onnxruntime and its own files: labels, captions, absent things, maps, scenes.

`python -m benchmarks.quality` of the project measures video search on top of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from keyreel.config import ImageTransform
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.text import Tokenizer
from keyreel_export.builtin.data import F32, SIZE, U8, Example, read_examples, read_images, square_view
from keyreel_export.builtin.saliency import area_under_curve, centre_prior, find_objects, marked
from keyreel_export.builtin.scenes import COLOURS, SHAPES, render_scene

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
MISSED = 0.1  # of the labels that are there, by the score under which nothing is said to match well
LIBRARIES = (1, 2, 5, 10, 20, 50, 100, 200, 400)  # images in those that are asked for what they lack


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

    def tokens(self, frames: U8) -> F32:
        """frames [N, H, W, 3] -> [N, P, C], all at once."""
        return self._run("backbone", {"frames": frames})

    def attention(self, frames: U8) -> F32:
        """frames [N, H, W, 3] -> [N, P]."""
        parts = [frames[first : first + 64] for first in range(0, len(frames), 64)]
        return np.concatenate([self._run("attention", {"tokens": self.tokens(part)}) for part in parts])

    def frames(self, frames: U8, strengths: Sequence[float]) -> list[F32]:
        """frames [N, H, W, 3] -> [N, D] unit vectors for each attention strength."""
        found: list[list[F32]] = [[] for _ in strengths]
        for first in range(0, len(frames), 64):
            tokens = self.tokens(frames[first : first + 64])
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


@dataclass(frozen=True, slots=True)
class Shown:
    """Validation images as vectors for each attention strength."""

    examples: list[Example]
    vectors: list[F32]  # [N, D] for each of STRENGTHS


def show(towers: Towers, trainset: Path, *, captioned: bool = False) -> Shown:
    """Runs the image tower over the validation images that have labels, or over those that have captions.

    Raises:
        ValueError: the bundle looks at frames of another kind.
    """
    bundle, expected = towers.bundle, ImageTransform(SIZE, SIZE, "squash", "bicubic")
    if (bundle.image, bundle.attention_input) != (expected, "tokens"):
        kind = f"that squash frames to {SIZE} pixels, bicubic, and whose attention looks at tokens"
        raise ValueError(f"{bundle.folder}: photographs are only shown to models {kind}")
    wanted = [e for e in read_examples(trainset, "val") if (e.captions if captioned else e.labels)]
    frames = np.empty((len(wanted), SIZE, SIZE, 3), np.uint8)
    for index, image in read_images(trainset, wanted):
        frames[index] = square_view(image)
    return Shown(wanted, towers.frames(frames, STRENGTHS) if wanted else [])


def measure_labels(towers: Towers, shown: Shown) -> list[dict[str, Any]]:
    """Label top-1 and top-5 on validation images at each attention strength, with intervals against strength 0.

    All distinct names of the images' labels are ranked, as bare words. A hit is any label of the image, which broad
    terms make easy ("commonest_share": always saying the commonest label); "specific": only its first label counts;
    "prompted": the same with "a photo of a {label}".
    "label_to_image_map" ranks the images for each name; a missing label counts as wrong there.
    """
    labelled = shown.examples
    counts = Counter(label for example in labelled for label in example.labels)
    names = sorted(counts)
    right = [[names.index(label) for label in example.labels] for example in labelled]
    texts, prompted = towers.texts(names), towers.texts([f"a photo of a {name}" for name in names])
    scores = [vectors @ texts.T for vectors in shown.vectors]
    ranks = [label_ranks(each, right) for each in scores]
    table = []
    for strength, rank, score, vectors in zip(STRENGTHS, ranks, scores, shown.vectors, strict=True):
        row: dict[str, Any] = {"strength": strength, "images": len(labelled), "labels": len(names)}
        first = [columns[:1] for columns in right]
        specific, asked = label_ranks(score, first), label_ranks(vectors @ prompted.T, first)
        for depth in (1, 5):
            hits, plain = (rank < depth).astype(np.float32), (ranks[0] < depth).astype(np.float32)
            change = (float((hits - plain).mean()), *interval(hits - plain))
            row[f"top{depth}"] = round(float(hits.mean()), 4)
            row[f"top{depth}_interval"] = [round(v, 4) for v in interval(hits)]
            row[f"top{depth}_against_0"] = [round(v, 4) for v in change]
            row[f"specific_top{depth}"] = round(float((specific < depth).mean()), 4)
            row[f"prompted_specific_top{depth}"] = round(float((asked < depth).mean()), 4)
        row["label_to_image_map"] = round(mean_average_precision(score, right), 4)
        row["commonest_share"] = round(max(counts.values()) / len(labelled), 4)
        table.append(row)
    return table


def ask_libraries(
    towers: Towers, shown: Shown, strength: float, size: int, *, libraries: int, seed: int
) -> tuple[F32, F32]:
    """Best scores of small libraries, each asked for a label that is there and for one that is not: [L], [L].

    A label is absent where no image of the library has it, broad terms included, so that "dog" is not called absent
    where a poodle is.
    """
    rng = np.random.default_rng(seed)
    vectors = shown.vectors[STRENGTHS.index(strength)]
    names = sorted({example.labels[0] for example in shown.examples})
    texts = dict(zip(names, towers.texts(names), strict=True))
    present, absent = [], []
    for _ in range(libraries):
        chosen = rng.choice(len(shown.examples), size, replace=False)
        held = {label for i in chosen for label in shown.examples[int(i)].labels}
        strangers = [name for name in names if name not in held]
        if not strangers:
            continue
        asked = shown.examples[int(rng.choice(chosen))].labels[0]
        stranger = strangers[int(rng.integers(len(strangers)))]
        present.append(float((vectors[chosen] @ texts[asked]).max()))
        absent.append(float((vectors[chosen] @ texts[stranger]).max()))
    return np.asarray(present, np.float32), np.asarray(absent, np.float32)


def all_libraries(
    towers: Towers, shown: Shown, strength: float, *, libraries: int, seed: int
) -> Iterator[tuple[int, F32, F32]]:
    """The sizes of which two different libraries can be drawn, each with its best scores from `ask_libraries`."""
    for size in (size for size in LIBRARIES if 2 * size <= len(shown.examples)):
        present, absent = ask_libraries(towers, shown, strength, size, libraries=libraries, seed=seed)
        if len(present):
            yield size, present, absent


def equal_error(present: F32, absent: F32) -> float:
    """The score that as many of the absent things reach as present ones fail to; halfway between two scores."""
    scores = np.unique(np.concatenate([present, absent]))
    bounds = (scores[1:] + scores[:-1]) / 2 if len(scores) > 1 else scores
    errors = [abs(float((present < bound).mean() - (absent >= bound).mean())) for bound in bounds]
    return float(bounds[int(np.argmin(errors))])


def weak_scores(towers: Towers, shown: Shown, strength: float, *, libraries: int = 1500) -> list[list[float]]:
    """[[images, score], ...]: what all but MISSED of the present labels reach among so many images.

    The more images, the higher the best one gets by chance. Both columns rise. Empty where there are too few images.
    """
    found: list[list[float]] = []
    for size, present, _ in all_libraries(towers, shown, strength, libraries=libraries, seed=0):
        score = round(float(np.quantile(present, MISSED)), 4)
        found.append([size, max(score, found[-1][1]) if found else score])
    return found


def measure_absent(towers: Towers, shown: Shown, strength: float, *, libraries: int = 1500) -> list[dict[str, float]]:
    """Is what is there told from what is not? A row for each size of library, at the bundle's own weak scores.

    "present_kept": the share of queries for present labels that reach it, "absent_told": of those for absent ones that
    do not; "auc": the chance that a present one scores higher than an absent one; "equal_right": the share of both that
    is right at the score where as many of the one are wrong as of the other.
    """
    table = []
    for size, present, absent in all_libraries(towers, shown, strength, libraries=libraries, seed=1):
        row = {"images": float(size), "libraries": float(len(present))}
        row["auc"] = round(float((present[:, None] > absent).mean()), 4)
        equal = equal_error(present, absent)
        row["equal_right"] = round(float((present >= equal).mean() + (absent < equal).mean()) / 2, 6)
        weak = towers.bundle.match_threshold(size)
        if weak is not None:
            row |= {"weak_score": round(weak, 4), "present_kept": round(float((present >= weak).mean()), 6)}
            row["absent_told"] = round(float((absent < weak).mean()), 6)
        table.append(row)
    return table


def halves(shown: Shown) -> tuple[Shown, Shown]:
    """Every second image: one half to set the weak scores by, the other to measure them on."""
    first, second = (
        Shown(shown.examples[start::2], [vectors[start::2] for vectors in shown.vectors]) for start in (0, 1)
    )
    return first, second


def measure_captions(towers: Towers, trainset: Path, strength: float) -> dict[str, float]:
    """COCO captions to images: recall at 1 and 5, median rank among the captioned validation images."""
    shown = show(towers, trainset, captioned=True)
    if not shown.examples:
        return {}
    captions = [(caption, row) for row, example in enumerate(shown.examples) for caption in example.captions]
    vectors = shown.vectors[STRENGTHS.index(strength)]
    scores = towers.texts([caption for caption, _ in captions]) @ vectors.T
    own = scores[np.arange(len(captions)), [row for _, row in captions]]
    rank = (scores > own[:, None]).sum(axis=1) + 1
    return {
        "captions": float(len(captions)),
        "caption_images": float(len(shown.examples)),
        "caption_recall_at_1": round(float((rank <= 1).mean()), 4),
        "caption_recall_at_5": round(float((rank <= 5).mean()), 4),
        "caption_median_rank": float(np.median(rank)),
    }


def measure_attention(towers: Towers, trainset: Path, *, count: int = 400) -> dict[str, float]:
    """Does the map find the one object of a picture better than the middle does? Mean area under the curve.

    Of validation images: objects before a plain ground as they are, and the same objects put on photographs of places.
    """
    objects, places = find_objects(trainset, read_examples(trainset, "val"))
    if not objects or not places:
        return {}
    grid = towers.bundle.grid
    found: dict[str, float] = {}
    kinds = marked(objects, places, SIZE, grid, count=count, seed=1)
    for name, kind in zip(("plain", "placed"), kinds, strict=True):
        maps = towers.attention(kind.frames)
        prior = np.broadcast_to(centre_prior(grid).reshape(1, -1), maps.shape)
        both = area_under_curve(maps, kind.masks), area_under_curve(prior, kind.masks)
        clear = np.isfinite(both[0])
        low, high = interval((both[0] - both[1])[clear])
        found |= {
            f"attention_{name}_auc": round(float(both[0][clear].mean()), 4),
            f"attention_{name}_centre_auc": round(float(both[1][clear].mean()), 4),
            f"attention_{name}_gain_low": round(low, 4),
            f"attention_{name}_gain_high": round(high, 4),
            f"attention_{name}_pictures": float(clear.sum()),
        }
    return found


def best_strength(table: Sequence[dict[str, Any]]) -> float:
    """The strength with the best top-1 and top-5 together among those that raise one for certain and lower neither.

    For certain: the whole interval lies above 0. Else 0, which costs nothing.
    """
    better = []
    for row in table:
        changes = row["top1_against_0"], row["top5_against_0"]
        if max(low for _, low, _ in changes) > 0 and min(mean for mean, _, _ in changes) >= 0:
            better.append(row)
    return float(max(better, key=lambda row: row["top1"] + row["top5"])["strength"]) if better else 0.0


def measure_scenes(towers: Towers, strength: float, count: int = 500, seed: int = 987654) -> dict[str, float]:
    """Rendered single shapes that training did not draw: is the right text first among all of its kind?"""
    rng = np.random.default_rng(seed)
    scenes = [render_scene("shape", rng, (398, 224)).squashed(SIZE) for _ in range(count)]
    [vectors] = towers.frames(np.stack([scene.pixels for scene in scenes]), (strength,))
    things = {f"{colour} {shape}": f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES}
    grounds = {f"{colour} background": f"a {colour} background" for colour in COLOURS}
    found = {"scenes": float(count)}
    for name, texts in (("coloured_shape", things), ("background", grounds)):
        tags = list(texts)
        best = (vectors @ towers.texts(list(texts.values())).T).argmax(axis=1)
        hits = [tags[int(b)] in scene.tags for b, scene in zip(best, scenes, strict=True)]
        found[f"scenes_{name}_top1"] = round(float(np.mean(hits)), 4)
    return found


def measure_all(
    towers: Towers, trainset: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and tables of labels, captions, attention and scenes.

    Sets the manifest's attention strength and weak scores. These come from every second image; how good they are is
    measured on the others by `measure_absent`.
    """
    shown = show(towers, trainset)
    table = measure_labels(towers, shown)
    strength = best_strength(table)
    chosen = next(row for row in table if row["strength"] == strength)
    kept = ("top1", "top5", "specific_top1", "specific_top5", "prompted_specific_top1", "prompted_specific_top5")
    figures = {f"val_label_{key}": float(chosen[key]) for key in (*kept, "commonest_share", "images", "labels")}
    figures["val_label_to_image_map"] = chosen["label_to_image_map"]
    manifest["fusion"]["strength_default"] = strength
    weak = weak_scores(towers, halves(shown)[0], strength)
    if weak:
        manifest["text"]["weak_scores"] = weak
    figures |= measure_captions(towers, trainset, strength) | measure_attention(towers, trainset)
    return figures | measure_scenes(towers, strength), [{"table": "attention strength", **row} for row in table]
