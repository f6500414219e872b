"""`python -m keyreel_export.builtin --trainset DIR [--teacher FILE] -o FOLDER`: from labelled images to the bundle."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from keyreel.bundle import write_manifest
from keyreel_export.builtin.bundle import write_graphs
from keyreel_export.builtin.data import SIZE, Example, Teacher, make_bank, read_examples, read_images, square_view
from keyreel_export.builtin.measure import Towers, best_strength, measure_labels, measure_scenes
from keyreel_export.builtin.phrases import read_classes, tokenizer_json
from keyreel_export.builtin.train import Plan, Run

SOURCES = [
    {
        "what": "weights of both towers",
        "from": "trained from a fresh start by keyreel_export.builtin",
        "licence": "Apache-2.0; see MODEL_CARD.md for the rights in the images that were trained on",
    },
    {"what": "rendered scenes", "from": "keyreel_export.builtin.scenes", "licence": "Apache-2.0"},
    {
        "what": "labelled images, none of which is in the bundle",
        "from": "Caltech 101, Grocery Store, clothing-dataset-small, own synthetic screens; tiny-imagenet, "
        "imagenet-sample, PACS, SUN subset, COCO sample, sports and action sets, Houses",
        "licence": "16 % CC BY 4.0, MIT or CC0; the rest for research only or of unknown rights",
    },
]
TEACHER = {
    "what": "teacher, imitated but not included",
    "from": "MobileNetV2 1.0 224, ImageNet, int8 (TensorFlow Lite)",
    "licence": "Apache-2.0",
}


def teacher_cosine(run: Run, trainset: Path, examples: list[Example], model: Path) -> dict[str, float]:
    """Cosine of the student's and the teacher's features on images that neither was fitted to here."""
    frames = np.empty((len(examples), 2 * SIZE, 2 * SIZE, 3), np.uint8)
    for index, image in read_images(trainset, examples):
        frames[index] = square_view(image)
    wanted = torch.from_numpy(Teacher(model)(frames)[0])
    found = []
    with torch.inference_mode():
        for first in range(0, len(frames), 64):
            pixels = torch.from_numpy(frames[first : first + 64]).permute(0, 3, 1, 2).float()
            pooled = run.learner.image(functional.avg_pool2d(pixels, 2)).mean((2, 3))
            found.append(run.learner.imitate(pooled))
        guess = torch.cat(found)
        standard = functional.cosine_similarity(guess, ((wanted - run.mean) / run.spread).clamp(-6, 6), dim=-1)
        raw = functional.cosine_similarity(guess * run.spread + run.mean, wanted, dim=-1)
    return {
        "teacher_cosine_standardised": round(float(standard.mean()), 4),
        "teacher_cosine_raw": round(float(raw.mean()), 4),
        "teacher_cosine_images": float(len(examples)),
    }


def main(arguments: list[str] | None = None) -> None:
    """Makes or goes on with the bank, trains, writes the bundle, measures it, writes the log."""
    parser = argparse.ArgumentParser(prog="python -m keyreel_export.builtin", description=__doc__)
    parser.add_argument("--trainset", type=Path, required=True, help="folder with labels.jsonl and tar shards")
    parser.add_argument("--teacher", type=Path, help="tflite classifier to imitate; imagenet_labels.txt lies beside it")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument(
        "--work", type=Path, default=Path("builtin-run"), help="crops and checkpoints, kept for resuming"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="time for training, without the bank of crops")
    parser.add_argument("--views", type=int, default=3, help="crops of each image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=6000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)

    train, val = (read_examples(options.trainset, split) for split in ("train", "val"))
    known = {label for example in train for label in example.labels}
    classes = read_classes(options.teacher and options.teacher.parent / "imagenet_labels.txt", known)
    folder, views, seed = options.work / "bank", options.views, options.seed
    bank = make_bank(options.trainset, train, options.teacher, folder, views=views, seed=seed, workers=options.workers)
    plan = Plan(
        minutes=options.minutes, seed=options.seed, batch=options.batch, scenes=options.scenes, workers=options.workers
    )
    run = Run(plan, bank, train, classes, options.work)
    run.train()

    taught = options.teacher is not None
    verify: dict[str, Any] = {"training_images_seen": float(run.seen), "training_minutes": options.minutes}
    if taught:
        verify |= teacher_cosine(run, options.trainset, val, options.teacher)
    manifest = write_graphs(options.output, run.learner.image, run.learner.text, tokenizer_json(run.tokenizer))
    manifest["sources"] = [*SOURCES, *([TEACHER] if taught else [])]
    write_manifest(options.output, manifest)
    table = measure_labels(Towers(options.output), options.trainset, val)
    strength = best_strength(table)
    manifest["fusion"]["strength_default"] = strength
    chosen = next(row for row in table if row["strength"] == strength)
    kept = ("top1", "top5", "specific_top1", "specific_top5", "commonest_share", "images", "labels")
    verify |= {f"val_label_{key}": float(chosen[key]) for key in kept}
    verify["val_label_to_image_map"] = chosen["label_to_image_map"]
    write_manifest(options.output, manifest)
    verify |= measure_scenes(Towers(options.output))
    manifest["verify"] |= verify
    write_manifest(options.output, manifest)
    rows = [*run.log, *({"table": "attention strength", **row} for row in table), {"table": "verify", **verify}]
    log = options.output.with_name(f"{options.output.name}-training.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
