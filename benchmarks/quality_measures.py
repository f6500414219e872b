"""What a bundle finds in validation photographs: labels, captions, absent labels, the one object, rendered shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keyreel.types import F32
from keyreel_export.builtin import measure
from keyreel_export.builtin.data import SIZE, read_examples
from keyreel_export.builtin.measure import STRENGTHS, Shown, Towers, ask_libraries, halves, interval, label_ranks, show
from keyreel_export.builtin.saliency import find_objects, marked
from keyreel_export.builtin.scenes import COLOURS, SHAPES, render_scene

__all__ = [
    "Towers",
    "halves",
    "measure_absent",
    "measure_attention",
    "measure_captions",
    "measure_labels",
    "measure_scenes",
    "show",
]


def measure_labels(towers: Towers, shown: Shown) -> list[dict[str, Any]]:
    """The rows of `keyreel_export.builtin.measure`, and more columns.

    "prompted_specific": labels as "a photo of a {label}"; "label_to_image_map": images ranked for each name, where a
    missing label counts as wrong; "commonest_share": hits of always saying the commonest label.
    """
    counts = Counter(label for example in shown.examples for label in example.labels)
    names = sorted(counts)
    right = [[names.index(label) for label in example.labels] for example in shown.examples]
    texts, prompted = towers.texts(names), towers.texts([f"a photo of a {name}" for name in names])
    rows = measure.measure_labels(towers, shown)
    for row, vectors in zip(rows, shown.vectors, strict=True):
        asked = label_ranks(vectors @ prompted.T, [columns[:1] for columns in right])
        row |= {f"prompted_specific_top{depth}": round(float((asked < depth).mean()), 4) for depth in (1, 5)}
        row["label_to_image_map"] = round(mean_average_precision(vectors @ texts.T, right), 4)
        row["commonest_share"] = round(max(counts.values()) / len(right), 4)
    return rows


def mean_average_precision(scores: F32, right: Sequence[Sequence[int]]) -> float:
    """Images ranked for each label name: mean over the labels of the average precision."""
    relevant = np.zeros(scores.shape, bool)
    for row, columns in enumerate(right):
        relevant[row, list(columns)] = True
    ranked = np.take_along_axis(relevant, np.argsort(-scores, axis=0, kind="stable"), axis=0)
    precision = ranked.cumsum(axis=0) / np.arange(1, len(scores) + 1)[:, None]
    return float(((precision * ranked).sum(axis=0) / ranked.sum(axis=0)).mean())


def measure_absent(towers: Towers, shown: Shown, strength: float, *, libraries: int = 1500) -> list[dict[str, float]]:
    """Are present labels told from absent ones? A row for each size of library, at the bundle's own thresholds.

    "present_kept": queries for present labels that reach it, "absent_told": those for absent ones that do not; "auc":
    the chance that a present one scores higher; "equal_right": both at the score where as many of each are wrong.
    """
    table = []
    for size, present, absent in ask_libraries(towers, shown, strength, libraries=libraries, seed=1):
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


def equal_error(present: F32, absent: F32) -> float:
    """The score that as many of the absent labels reach as present ones fail to; halfway between two scores."""
    scores = np.unique(np.concatenate([present, absent]))
    bounds = (scores[1:] + scores[:-1]) / 2 if len(scores) > 1 else scores
    errors = [abs(float((present < bound).mean() - (absent >= bound).mean())) for bound in bounds]
    return float(bounds[int(np.argmin(errors))])


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
        parts = [kind.frames[first : first + 64] for first in range(0, len(kind.frames), 64)]
        maps = np.concatenate([towers.run("attention", tokens=towers.run("backbone", frames=part)) for part in parts])
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


def centre_prior(grid: tuple[int, int]) -> F32:
    """A normal distribution around the middle, [rows, columns], of a third of the side: what photographers do."""
    y, x = (np.linspace(-1, 1, n) for n in grid)
    prior = np.exp(-0.5 * (y[:, None] ** 2 + x[None] ** 2) / (2 / 3) ** 2)
    return np.asarray(prior / prior.sum(), np.float32)


def area_under_curve(maps: F32, masks: F32) -> F32:
    """Of each picture, the chance that a patch of the object has more weight than one of the ground, [N].

    A patch is the object's from half of it on; pictures without a patch of either kind give NaN.
    """
    found = np.full(len(maps), np.nan, np.float32)
    for row, (weights, mask) in enumerate(zip(maps.reshape(len(maps), -1), masks.reshape(len(masks), -1), strict=True)):
        inside, outside = weights[mask >= 0.5], weights[mask < 0.5]
        if len(inside) and len(outside):
            more = (inside[:, None] > outside[None]).mean() + 0.5 * (inside[:, None] == outside[None]).mean()
            found[row] = more
    return found


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
