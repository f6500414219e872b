"""What the built-in model finds, for the README and its model card, from the rows of quality.jsonl and its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import charts
from benchmarks.markers import marked

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
MODELS = ROOT / "engine" / "keyreel" / "models"
CARD = MODELS / "MODEL_CARD.md"
CURVE = ROOT / "benchmarks" / "charts" / "builtin_training.svg"
REPORTED = (1, 20, 400)  # photographs in a library, of those that were measured
POINTS = 8  # of the curve, at most


def rows(part: str) -> list[dict[str, Any]]:
    """Rows of one part, in their order."""
    found = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    return [row for row in found if row["part"] == part]


def _percent(*values: float) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values) + " %"


def _photographs(count: float) -> str:
    return "one photograph" if count == 1 else f"{count:.0f} photographs"


def _told(row: dict[str, Any]) -> str:
    equal = f", at equal error rates {_percent(row['equal_right'])}" if "equal_right" in row else ""
    return f"{_percent(row['present_kept'], row['absent_told'])}{equal} (area under the curve {row['auc']:.3f})"


def _change(values: list[float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _default(part: str) -> dict[str, Any]:
    manifest = json.loads((MODELS / "builtin" / "manifest.json").read_text("utf-8"))["fusion"]
    wanted = {"strength": manifest["strength_default"], "shift": manifest["shift_default"]}
    return next(row for row in rows(part) if all(row.get(key, value) == value for key, value in wanted.items()))


def section() -> str:
    """The table of the README."""
    label, clip = _default("labels"), _default("clips")
    parts = ("captions", "attention", "keyframes", "speed")
    [caption], [maps], [keys], [speed] = (rows(part) for part in parts)
    absent = {row["images"]: row for row in rows("absent")}
    alone, gone = sorted(rows("absent_clips"), key=lambda row: row["clips"])
    lines = [
        "| measured | n | value |",
        "|---|---|---|",
        f"| the most specific label of a photograph among {label['labels']} names, top-1 / top-5 | {label['images']:,} "
        f"| {_percent(label['specific_top1'], label['specific_top5'])} |",
        '| the same, asked for as "a photo of a ..." | | '
        f"{_percent(label['prompted_specific_top1'], label['prompted_specific_top5'])} |",
        f"| any label of it, broad ones too (always the commonest: {100 * label['commonest_share']:.0f} %) | "
        f"| {_percent(label['top1'], label['top5'])} |",
        "| photographs ranked for each name, mean average precision (a missing label counts as wrong) "
        f"| {label['labels']} | {label['label_to_image_map']:.3f} |",
        f"| COCO caption to its photograph among {caption['caption_images']:.0f}, recall at 1 / 5, median rank "
        f"| {caption['captions']:.0f} | {_percent(caption['caption_recall_at_1'], caption['caption_recall_at_5'])}, "
        f"{caption['caption_median_rank']:.0f} |",
        f"| own captions to one of {clip['clips']} real clips, recall at 1 / 5, median rank | {clip['queries']} "
        f"| {_percent(clip['recall_at_1'], clip['recall_at_5'])}, {clip['median_rank']:.0f} |",
        *(
            f"| a label asked of {_photographs(row['images'])}: there and above the weak score / absent and below it "
            f"| {row['libraries']:,.0f} + {row['libraries']:,.0f} | {_told(row)} |"
            for row in (absent[images] for images in REPORTED)
        ),
        *(
            f"| own captions and absent things asked of {what}: the same | {row['present']} + {row['absent']} "
            f"| {_told(row)} |"
            for what, row in (("each clip alone", alone), (f"the {gone['clips']} clips together", gone))
        ),
        "| attention on the one object of a picture against a centre prior, area under the curve: as photographed "
        f"| {maps['attention_plain_pictures']:.0f} | {maps['attention_plain_auc']:.3f} against "
        f"{maps['attention_plain_centre_auc']:.3f} |",
        f"| the same, object put anywhere on a photograph of a place | {maps['attention_placed_pictures']:.0f} "
        f"| {maps['attention_placed_auc']:.3f} against {maps['attention_placed_centre_auc']:.3f} |",
        f"| {keys['clips']} real clips in a row, random order and lengths: clips with a key-frame, K = 8 / automatic K "
        f"({keys['keyframes_auto'][0]} to {keys['keyframes_auto'][1]}) | {keys['draws']} draws "
        f"| {_percent(keys['covered_k8'], keys['covered_auto'])} |",
        "| frames a second on one thread (onnxruntime, fp32), seconds to load and encode a first text, megabytes "
        f"| {speed['runs']} runs | {speed['images_per_second_one_thread']:.0f}, {speed['load_seconds']:.2f}, "
        f"{speed['megabytes']:.1f} |",
    ]
    return "\n".join(lines)


def strengths() -> str:
    """What attention and shift change: the tables of the model card."""
    lines = [
        "| attention strength | label top-1 % | against 0 (points) | top-5 % | against 0 (points) | specific top-1 / 5 "
        "| mAP |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows("labels"):
        lines.append(
            f"| {row['strength']} | {100 * row['top1']:.1f} | {_change(row['top1_against_0'])} "
            f"| {100 * row['top5']:.1f} | {_change(row['top5_against_0'])} "
            f"| {_percent(row['specific_top1'], row['specific_top5'])} "
            f"| {row['label_to_image_map']:.3f} |"
        )
    lines += [
        "",
        "| shift | strength | clips, recall at 1 % | against neither | at 5 % | against neither | median rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows("clips"):
        lines.append(
            f"| {row['shift']} | {row['strength']} | {100 * row['recall_at_1']:.1f} "
            f"| {_change(row['recall_at_1_against_plain'])} | {100 * row['recall_at_5']:.1f} "
            f"| {_change(row['recall_at_5_against_plain'])} | {row['median_rank']:.0f} |"
        )
    return "\n".join(lines)


def scenes() -> str:
    """Rendered scenes, one line."""
    [row] = rows("scenes")
    return (
        f"On {row['scenes']:.0f} rendered single shapes it puts the right one of 84 coloured shapes first for\n"
        f"{100 * row['scenes_coloured_shape_top1']:.1f} %, the right one of 12 backgrounds for "
        f"{100 * row['scenes_background_top1']:.1f} %."
    )


def files() -> dict[Path, str]:
    """The model card and the curve, by path."""
    found = {"quality": section(), "strengths": strengths(), "scenes": scenes()}
    return {CARD: marked(CARD.read_text("utf-8"), found, CARD.name), CURVE: curve()}


def curve() -> str:
    """The course of distillation as SVG: distance to the teacher's features by images seen."""
    log = [json.loads(line) for line in (MODELS / "builtin-training.jsonl").read_text("utf-8").splitlines()]
    steps = [row for row in log if row.get("stage") == "distillation"]
    places = np.geomspace(1, len(steps), POINTS).round().astype(int)  # the chart's axis is logarithmic
    chosen = [steps[place - 1] for place in dict.fromkeys(places.tolist())]
    points = [(row["images"] / 1000, row["imitation"]) for row in chosen]
    title = "Distillation: (1 - cosine) + squared error / 2 of the teacher's standardised features"
    return charts.lines(title, "thousand images seen", [("training crops", points)])
