"""What a model finds: labels and captions of photographs, absent things, attention maps, captions of real clips.

    python -m benchmarks.quality --trainset DIR --media DIR [--model builtin] [-o FILE]

The photographs are the validation images of the built-in model's training set. The clips and their captions are those
of quality_clips.json, written by us after a look at the clips and before the model was asked; a clip's score is the
mean of eight frames spread over it. Each shift and strength is compared with neither of them, on the same queries, with
a 95 % bootstrap interval. Captions and things that are in no clip are also searched for as users do, by the best
moment, which is compared with the weak score of as many shots.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.environment import environment
from benchmarks.run import commit
from keyreel import EncodeConfig, Engine, Sampling, Summary
from keyreel.config import ShiftMode
from keyreel.runtime.backend import CPU_BATCH
from keyreel.runtime.bundle import Bundle
from keyreel.types import F32
from keyreel_export.builtin.measure import (
    STRENGTHS,
    Towers,
    halves,
    interval,
    measure_absent,
    measure_attention,
    measure_captions,
    measure_labels,
    measure_scenes,
    show,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from concatenated import concatenate, stretches

CLIPS = Path(__file__).with_name("quality_clips.json")
FRAMES = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """Scores of all clips for all captions."""

    frames: F32  # [clips, FRAMES, captions]
    own: list[int]  # the clip of each caption

    @property
    def ranks(self) -> np.ndarray[Any, Any]:
        """Place of the right clip for each caption, 1 the first, by the mean of its frames."""
        table = self.frames.mean(axis=1)
        right = table[self.own, np.arange(len(self.own))]
        return np.asarray((table > right).sum(axis=0) + 1)


def ask(model: str, media: Path, shift: ShiftMode, strength: float) -> Asked:
    """Decodes and encodes the clips, and asks for all captions."""
    captions: dict[str, list[str]] = json.loads(CLIPS.read_text("utf-8"))["clips"]
    encode = EncodeConfig(shift=shift, attention_strength=strength)
    texts = [(text, place) for place, own in enumerate(captions.values()) for text in own]
    scores = []
    with Engine.from_pretrained(model, device="cpu") as engine:
        queries = engine.encode_text([text for text, _ in texts])
        for name in captions:
            vectors = engine.embed_video(media / name, sampling=Sampling(fps=2.0), encode=encode).vectors
            chosen = np.linspace(0, len(vectors) - 1, FRAMES).round().astype(int)
            scores.append(vectors[chosen] @ queries.T)
    return Asked(np.stack(scores), [place for _, place in texts])


def measure_clips(model: str, media: Path) -> list[dict[str, Any]]:
    """One row for each shift and strength."""
    found: list[dict[str, Any]] = []
    plain = ask(model, media, "off", 0.0).ranks
    for shift, strength in product(get_args(ShiftMode), STRENGTHS):
        asked = ask(model, media, shift, strength)
        ranks, count = asked.ranks, len(asked.own)
        row: dict[str, Any] = {"part": "clips", "shift": shift, "strength": strength, "queries": count}
        row |= {"clips": len(asked.frames), "median_rank": float(np.median(ranks))}
        for depth in (1, 5):
            hits = (ranks <= depth).astype(np.float32)
            change = hits - (plain <= depth)
            # Captions of one clip stand or fall together: clips are drawn, not captions.
            by_clip = np.array([change[np.equal(asked.own, clip)].mean() for clip in range(len(asked.frames))])
            row[f"recall_at_{depth}"] = round(float(hits.mean()), 6)
            row[f"recall_at_{depth}_against_plain"] = [round(v, 4) for v in (float(by_clip.mean()), *interval(by_clip))]
        found.append(row)
    return found


def measure_absent_clips(model: str, media: Path) -> list[dict[str, Any]]:
    """Through `Engine.search`: is what a caption says told from what is in no clip, in one clip and in all together?"""
    wanted = json.loads(CLIPS.read_text("utf-8"))
    captions: dict[str, list[str]] = wanted["clips"]
    alone, together = Told(), Told()
    with Engine.from_pretrained(model, device="cpu") as engine:
        every = [engine.summarize(media / name, keyframes=1) for name in captions]
        for summary, own in zip(every, captions.values(), strict=True):
            alone.ask(engine, [summary], own, wanted["absent"])
        together.ask(engine, every, [text for own in captions.values() for text in own], wanted["absent"])
    return [{"part": "absent_clips", "clips": n, **told.row()} for n, told in ((1, alone), (len(every), together))]


@dataclass(slots=True)
class Told:
    """By how much the best scores of queries are above the weak score of the videos that were searched.

    Of a model that has none the scores themselves.
    """

    present: list[float] = field(default_factory=list)
    absent: list[float] = field(default_factory=list)
    calibrated: bool = True

    def ask(self, engine: Engine, videos: list[Summary], present: list[str], absent: list[str]) -> None:
        weak = engine.bundle.match_threshold(sum(len(video.shots) for video in videos))
        self.calibrated = weak is not None
        for texts, scores in ((present, self.present), (absent, self.absent)):
            scores.extend(engine.search(text, videos, k=1)[0].score - (weak or 0.0) for text in texts)

    def row(self) -> dict[str, Any]:
        there, away = np.asarray(self.present), np.asarray(self.absent)
        row: dict[str, Any] = {"present": len(there), "absent": len(away)}
        row["auc"] = round(float((there[:, None] > away).mean()), 6)
        if self.calibrated:
            row["present_kept"] = round(float((there >= 0).mean()), 6)
            row["absent_told"] = round(float((away < 0).mean()), 6)
        return row


def measure_keyframes(model: str, media: Path, *, draws: int = 10) -> dict[str, Any]:
    """Eight stretches of real clips in random order and lengths: how many get a key-frame, with K = 8 and by itself."""
    parts = stretches(lambda name: media / name)
    found: dict[str, list[int]] = {"8": [], "auto": []}
    counts = []
    with Engine.from_pretrained(model, device="cpu") as engine, tempfile.TemporaryDirectory() as folder:
        for seed in range(draws):
            chosen = [parts[int(n)] for n in np.random.default_rng(seed).permutation(len(parts))[:8]]
            clip = Path(folder) / f"{seed}.mp4"
            cuts, _ = concatenate(chosen, clip, seed)
            for name, keyframes in (("8", 8), ("auto", "auto")):
                frames = engine.summarize(clip, keyframes=keyframes).keyframes
                hit = {int(np.searchsorted(cuts, frame.pts_seconds, side="right")) for frame in frames}
                found[name].append(len(hit))
            counts.append(len(frames))
    return {
        "part": "keyframes",
        "draws": draws,
        "clips": 8,
        "covered_k8": round(float(np.mean(found["8"])) / 8, 4),
        "covered_auto": round(float(np.mean(found["auto"])) / 8, 4),
        "keyframes_auto": [min(counts), max(counts)],
    }


def measure_speed(model: str, *, runs: int = 7) -> dict[str, Any]:
    """The image tower on one thread of onnxruntime, in an engine's batches, on noise; an engine to its first text."""
    bundle = Bundle.find(model)
    towers = Towers(bundle.folder, threads=1)
    shape = (CPU_BATCH, bundle.image.height, bundle.image.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    rates, loads = [], []
    for _ in range(runs):
        began = time.perf_counter()
        towers.tokens(frames)
        rates.append(len(frames) / (time.perf_counter() - began))
        began = time.perf_counter()
        with Engine.from_pretrained(model, device="cpu") as engine:
            engine.encode_text("a dog")
            loads.append(time.perf_counter() - began)
    size = sum(path.stat().st_size for path in bundle.folder.iterdir())
    return {
        "part": "speed",
        "images_per_second_one_thread": round(float(np.median(rates)), 1),
        "load_seconds": round(float(np.median(loads)), 4),
        "megabytes": round(size / 1e6, 2),
        "runs": runs,
    }


def measure_photographs(model: str, trainset: Path) -> list[dict[str, Any]]:
    """Labels at each strength; captions, absent things, attention and scenes at the model's own strength."""
    bundle = Bundle.find(model)
    towers = Towers(bundle.folder)
    shown = show(towers, trainset)
    rows = [{"part": "labels", **row} for row in measure_labels(towers, shown)]
    strength = min(STRENGTHS, key=lambda known: abs(known - bundle.strength_default))
    rows.append({"part": "captions", "strength": strength, **measure_captions(towers, trainset, strength)})
    absent = measure_absent(towers, halves(shown)[1], strength)
    rows += [{"part": "absent", "strength": strength, **row} for row in absent]
    rows.append({"part": "attention", **measure_attention(towers, trainset)})
    rows.append({"part": "scenes", "strength": strength, **measure_scenes(towers, strength)})
    return rows


def main() -> None:
    """Writes one JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trainset", type=Path, help="folder with labels.jsonl and tar shards")
    parser.add_argument("--media", type=Path, help="folder with the clips of quality_clips.json")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    rows = measure_photographs(arguments.model, arguments.trainset) if arguments.trainset else []
    if arguments.media:
        for measure in (measure_clips, measure_absent_clips):
            rows += measure(arguments.model, arguments.media)
        rows.append(measure_keyframes(arguments.model, arguments.media))
    rows.append(measure_speed(arguments.model))
    about = {"model": arguments.model, "commit": commit(), "environment": environment()}
    for row in rows:
        print(json.dumps(row))
    if arguments.output:
        lines = [json.dumps({"case": "quality", **row, **about}) + "\n" for row in rows]
        arguments.output.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
