"""`python -m keyreel_export.builtin --trainset DIR --teacher FILE ... -o FOLDER`: images and texts to bundle.

Steps, each kept in the work folder and not done again: crops with the teacher's answers; the joint space on the
teacher's features; distillation of the image tower (by far the longest); the joint space on the student's features; the
attention, the scene's and the subject's layers; the text tower once more, with knowledge from text alone. Then the
graphs and the measurements.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from keyreel.runtime.bundle import write_manifest
from keyreel_export.builtin.bundle import write_graphs
from keyreel_export.builtin.measure import Towers, measure_all
from keyreel_export.builtin.recipe import Recipe
from keyreel_export.builtin.text import STEPS, Sources, add_sources


def main(arguments: list[str] | None = None) -> None:
    """Makes the missing steps, writes the bundle, measures it, writes the log."""
    parser = argparse.ArgumentParser(
        prog="python -m keyreel_export.builtin", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trainset", type=Path, required=True, help="folder with labels.jsonl and tar shards")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="tflite classifier to imitate; imagenet_labels.txt lies beside it"
    )
    add_sources(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--work", type=Path, default=Path("builtin-run"), help="what is kept for going on")
    parser.add_argument("--minutes", type=float, default=70.0, help="of distillation")
    parser.add_argument("--steps", type=int, default=1200, help="of each training of the joint space")
    parser.add_argument("--text-steps", type=int, default=STEPS, help="of the last training of the text tower")
    parser.add_argument("--views", type=int, default=7, help="crops of each image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=6000)
    options = parser.parse_args(arguments)
    counts = ("scenes", "views", "steps", "text_steps", "workers", "batch")
    if min(getattr(options, name) for name in counts) < 1:
        parser.error(f"{', '.join(counts)} must be at least 1")
    options.work.mkdir(parents=True, exist_ok=True)

    given = dict(vars(options))
    sources = Sources(given.pop("glove"), given.pop("sentences"), given.pop("wordnet"))
    made = Recipe(sources=sources, **{name: value for name, value in given.items() if name != "output"}).make()
    manifest = write_graphs(options.output, made.image, made.texts, made.tokenizer, made.fitted)
    manifest["sources"] = json.loads(Path(__file__).with_name("sources.json").read_text("utf-8"))
    write_manifest(options.output, manifest)
    figures, tables = measure_all(Towers(options.output), options.trainset, manifest)
    manifest["verify"] |= made.facts | figures
    write_manifest(options.output, manifest)
    rows: list[dict[str, Any]] = [*made.log, *tables, {"table": "verify", **manifest["verify"]}]
    log = options.output.with_name(f"{options.output.name}-training.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
