"""What a person sees after a query: whole moments, the right video first, conditions and feedback that work.

Moments are judged on joins of real clips and on long takes (`benchmarks.joins`), videos on these and the clips
themselves, conditions on small videos of a labelled object that crosses a place, feedback on labelled photographs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from benchmarks._common import ROOT, Row, parser_of, run, say
from benchmarks.joins import Part, join, long_take
from keyreel import Engine, Summary
from keyreel.library.ranking import TEMPERATURE
from keyreel.runtime.bundle import Bundle, SubjectScale
from keyreel.search import LESS, MORE, WITHOUT, frame_scores
from keyreel.shots import shot_of
from keyreel.types import F32, Shot
from keyreel_export.builtin.composites import moving, read_parts
from keyreel_export.builtin.data import read_examples
from keyreel_export.builtin.measure import Towers, show
from keyreel_export.fit import mean_average_precision

CLIPS = json.loads((ROOT / "benchmarks" / "quality_clips.json").read_text("utf-8"))
CAPTIONS: dict[str, list[str]] = {
    name: [*CLIPS["clips"].get(name, []), *CLIPS["unusual"].get(name, [])] for name in CLIPS["clips"] | CLIPS["unusual"]
}
ENOUGH = 8  # images of a label, for feedback
Known: TypeAlias = list[tuple[Summary, tuple[Part, ...]]]  # videos, and what they show where


def moments(engine: Engine, options: argparse.Namespace) -> Iterator[Row]:
    """Is the best moment what a text describes? Intersection over union with what is known of joins of real clips, and
    of long takes, where the parts are asked for by their labels, and so is a thing that comes in for a while.
    """
    kinds: dict[str, Known] = {"joins": [], "long takes": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + (2 if options.quick else 24)):
            path = Path(folder) / f"{seed}.mp4"
            parts = join(options.media, CAPTIONS, path, seed)
            kinds["joins"].append((engine.summarize(path), parts))
        for seed in range(2 if options.quick else 24) if options.trainset else ():
            path = Path(folder) / f"take{seed}.mp4"
            parts = long_take(options.trainset, path, seed)
            kinds["long takes"].append((engine.summarize(path), parts))
    if options.seed == 0:
        clips = [(engine.summarize(options.media / name, keyframes=1), texts) for name, texts in CAPTIONS.items()]
        yield from video_scores(engine, clips, kinds)
    for kind, known in kinds.items():
        for event in (False, True):
            asked = [(video, part) for video, parts in known for part in parts if part.event == event]
            found = [(*found_in(engine, video, text), part) for video, part in asked for text in part.texts]
            for way in ("shot", "scene", "moment") if found else ():
                ious = np.array([overlap(spans[way], part) for _, spans, part in found])
                inside = np.mean([part.start <= best < part.stop for best, _, part in found])
                row: Row = {"part": "moments", "seed": options.seed, "videos": kind, "moment": way}
                row |= {"asked": "events" if event else "parts", "queries": len(found)}
                row["best_frame_inside"] = round(float(inside), 4)
                yield row | {f"iou_{least}": round(float((ious >= least).mean()), 4) for least in (0.5, 0.7)}


def video_scores(engine: Engine, clips: list[tuple[Summary, list[str]]], kinds: dict[str, Known]) -> Iterator[Row]:
    """Is the video that shows what a text says the first? By several ways to make one score of those of its frames.

    The text is asked of short clips, of joins of four, of long takes for what comes in, and of all together.
    """
    shown: dict[str, list[tuple[Summary, set[str]]]] = {"clips": [(video, set(texts)) for video, texts in clips]}
    for kind, known in kinds.items():
        for event in (False, True) if kind == "long takes" else (False,):
            shown[f"{kind}, events" if event else kind] = [
                (video, {text for part in parts if part.event == event for text in part.texts})
                for video, parts in known
            ]
    shown["all"] = [one for kind, some in shown.items() if not kind.endswith("events") for one in some]
    scale = engine.bundle.subject
    for kind, videos in shown.items():
        texts = sorted({text for _, own in videos for text in own})
        if not texts:
            continue
        queries = engine.encode_text(texts).T
        scores = [frame_scores(v.embedding.scene, v.embedding.subject, queries, scale).best for v, _ in videos]
        right = np.array([[text in own for text in texts] for _, own in videos])
        for way, made in VIDEO_WAYS.items():
            pairs = zip(videos, scores, strict=True)
            table = np.array([[made(own[:, n], v) for n in range(len(texts))] for (v, _), own in pairs])
            best = np.where(right, table, -np.inf).max(axis=0)
            rank = (table > best).sum(axis=0)
            row: Row = {"part": "video_score", "library": kind, "videos": len(videos), "way": way}
            row["queries"] = len(texts)
            row |= {f"recall_at_{depth}": round(float((rank < depth).mean()), 4) for depth in (1, 5)}
            yield row | {"map": round(mean_average_precision(table, right), 4)}


def softmax_mean(scores: F32, temperature: float) -> float:
    """Sum of softmax(s / temperature) s (CLIP-Hitchhiker, Bain et al. 2022)."""
    weights = np.exp((scores.astype(np.float64) - scores.max()) / temperature)
    return float((weights * scores).sum() / weights.sum())


def best_scene(scores: F32, video: Summary) -> float:
    """What `ranking.pooled` computes, from its definition."""
    own = shot_of(video.scenes, video.embedding.pts_seconds)
    return max(softmax_mean(scores[own == number], TEMPERATURE) for number in np.unique(own))


VIDEO_WAYS: dict[str, Callable[[F32, Summary], float]] = {
    "best frame": lambda scores, video: float(scores.max()),
    "softmax, temperature 0.02": lambda scores, video: softmax_mean(scores, 0.02),
    "softmax, temperature 0.1": lambda scores, video: softmax_mean(scores, 0.1),
    "mean": lambda scores, video: float(scores.mean()),
    "best scene, softmax, temperature 0.1": best_scene,
}


def found_in(engine: Engine, video: Summary, text: str) -> tuple[float, dict[str, Shot]]:
    """The time of the best frame, and the spans that may be shown for it."""
    [hit] = engine.search(text, [video], k=1)
    spans = {"moment": Shot(hit.start_seconds, hit.stop_seconds)}
    for kind, known in (("shot", video.shots), ("scene", video.scenes)):
        spans[kind] = known[int(shot_of(known, np.array([hit.pts_seconds]))[0])]
    return hit.pts_seconds, spans


def overlap(span: Shot, part: Part) -> float:
    """Intersection over union."""
    shared = min(span.stop_seconds, part.stop) - max(span.start_seconds, part.start)
    return max(shared, 0.0) / (max(span.stop_seconds, part.stop) - min(span.start_seconds, part.start))


def conditions(towers: Towers, trainset: Path, count: int) -> Iterator[Row]:
    """Mean average precision for objects in a place, and for objects that are elsewhere, by several ways to put two
    texts together. Only pairs with three videos that fit and five that fit either text alone.
    """
    objects, places = read_parts(trainset, read_examples(trainset, "val"))
    made = moving(objects, places, size=76, pan=0, count=min(count, len(objects)))
    videos, length = made.frames.shape[:2]
    tokens, change = (own.reshape(-1, *own.shape[2:]) for own in towers.moving(made.frames))
    found = towers.fused(tokens, towers.run("attention", tokens=tokens), change)
    things = [set(names[0].labels) for names in made.things]
    where = [names[1].labels[0] for names in made.things]
    both = Counter((label, place) for own, place in zip(things, where, strict=True) for label in own)
    labels, spots = Counter(label for own in things for label in own), Counter(where)
    pairs = [pair for pair, n in sorted(both.items()) if n >= 3 and min(labels[pair[0]], spots[pair[1]]) - n >= 5]
    if not pairs:
        return
    texts = sorted({text for pair in pairs for text in pair})
    vectors = dict(zip(texts, towers.texts(texts), strict=True))

    def scored(vector: F32) -> F32:
        best = frame_scores(found["scene"], found["subject"], vector, towers.bundle.subject).best
        return np.asarray(best.reshape(videos, length))

    alone = {text: scored(vector) for text, vector in vectors.items()}
    ways: dict[str, dict[str, Callable[[str, str], F32]]] = {
        "both": {
            "the first text": lambda a, b: alone[a],
            "mean of the scores": lambda a, b: (alone[a] + alone[b]) / 2,
            "minimum of the scores": lambda a, b: np.minimum(alone[a], alone[b]),
            "sum of the vectors": lambda a, b: scored(unit(vectors[a] + vectors[b])),
        },
        "not the second": {
            "the first text": lambda a, b: alone[a],
            **{f"less {p} of the score": lambda a, b, p=p: alone[a] - p * alone[b] for p in (0.1, WITHOUT, 0.5, 1.0)},
        },
    }
    for asked, own_ways in ways.items():
        here, shown = asked == "both", zip(things, where, strict=True)
        right = np.array([[a in own and (b == place) == here for a, b in pairs] for own, place in shown])
        for way, made_of in own_ways.items():
            table = np.stack([made_of(a, b).max(axis=1) for a, b in pairs], axis=1)
            row: Row = {"part": "conditions", "asked": asked, "way": way, "pairs": len(pairs), "videos": videos}
            yield row | {"map": round(mean_average_precision(table, right), 4)}


def unit(vector: F32) -> F32:
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def feedback(towers: Towers, trainset: Path) -> Iterator[Row]:
    """Labels of photographs: the share of right ones among the first ten, once a person has said "more like this" to
    the first right one and "less like this" to the first wrong one, which no longer count.
    """
    shown = show(towers, trainset)
    labels = Counter(label for example in shown.examples for label in example.labels)
    names = sorted(label for label, n in labels.items() if n >= ENOUGH)
    scores = shown.scores(towers.texts(names), towers.bundle.subject)
    plain = SubjectScale(novelty=towers.bundle.subject.novelty)
    gains: dict[str, list[float]] = {}
    for column, name in enumerate(names):
        right = np.array([name in example.labels for example in shown.examples])
        order = np.argsort(-scores[:, column], kind="stable")
        hit, miss = ([row for row in order[:10] if right[row] == wanted][:1] for wanted in (True, False))
        if not hit or not miss:
            continue
        left = np.ones(len(right), np.bool_)
        left[[hit[0], miss[0]]] = False
        like, unlike = (frame_scores(shown.scene, shown.subject, shown.scene[n[0]], plain).best for n in (hit, miss))
        for more, less in ((0.0, 0.0), (MORE, 0.0), (0.0, LESS), (MORE, LESS), (1.0, 1.0)):
            steered = scores[:, column] + more * like - less * unlike
            first = np.argsort(-steered[left], kind="stable")[:10]
            gains.setdefault(f"more {more:g}, less {less:g}", []).append(float(right[left][first].mean()))
    for way, found in gains.items():
        row: Row = {"part": "feedback", "way": way, "labels": len(found), "images": len(shown.examples)}
        yield row | {"precision_at_10": round(float(np.mean(found)), 4)}


def measure(options: argparse.Namespace) -> Iterator[Row]:
    rows: list[Iterator[Row]] = []
    if options.trainset:
        towers = Towers(Bundle.find("builtin").folder)
        rows += [conditions(towers, options.trainset, 60 if options.quick else 900), feedback(towers, options.trainset)]
    with Engine.from_pretrained(device="cpu") as engine:
        if (options.media / "natural").is_dir():
            rows.append(moments(engine, options))
        for row in (row for some in rows for row in some):
            say(f"{row}")
            yield {"case": "answers", **row}


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--trainset", type=Path, help="folder with labels.jsonl and tar shards")
    parser.add_argument("--seed", type=int, default=0, help="of the first join; scenes were fitted on those from 0 on")
    raise SystemExit(run(parser, measure))
