"""What a model finds: labels and captions of photographs, absent things, attention maps, captions of real clips.

The photographs are the validation images of the built-in model's training set. The clips and their captions are those
of quality_clips.json, written after a look at the clips and before the model was asked; a clip's score is the mean of
eight frames spread over it. Captions and things that are in no clip are also searched for as users do, by the best
moment, and whether its chance tells what is there from what is not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shot_clips
from benchmarks._common import ROOT, Row, parser_of, run, say
from benchmarks.shot_clips import slides
from keyreel import Engine, Sampling, Summary
from keyreel.chance import WELL, Chances
from keyreel.config import EncodeConfig
from keyreel.runtime.bundle import Bundle
from keyreel.search import frame_scores
from keyreel.types import F32, F64, I64
from keyreel_export.builtin.composites import moving, read_parts
from keyreel_export.builtin.data import SIZE, read_examples
from keyreel_export.builtin.measure import Shown, Towers, ask_libraries, halves, interval, measure_labels, show
from keyreel_export.builtin.saliency import find_objects, marked
from keyreel_export.fit import mean_average_precision
from keyreel_kernels.shift import adaptive_shift, shift_tokens
from tests.concatenated import concatenate, stretches

CLIPS = json.loads((ROOT / "benchmarks" / "quality_clips.json").read_text("utf-8"))
FRAMES = 8


def photographs(model: str, trainset: Path) -> Iterator[Row]:
    """Labels and captions by the scene alone and by both vectors; absent things; where the object is; composites."""
    towers = Towers(Bundle.find(model).folder)
    shown = show(towers, trainset)
    for part, rows in (
        ("labels", measure_labels(towers, shown)),
        ("captions", measure_captions(towers, trainset)),
        ("absent", measure_absent(towers, halves(shown)[1])),
        ("attention", [measure_attention(towers, trainset)]),
        ("composites", measure_composites(towers, trainset)),
    ):
        yield from ({"part": part, **row} for row in rows)


def measure_absent(towers: Towers, shown: Shown) -> list[Row]:
    """Are present labels told from absent ones? A row for each size of library, see `told_apart`."""
    scale, rows = towers.bundle.chance, list[Row]()
    if scale is None:
        return rows
    chances = Chances(towers.texts(scale.background), scale)
    for answers in ask_libraries(towers, shown, libraries=1500, seed=1):
        there, away = (
            np.array([chances.at(lead, answers.size) for lead in leads.lead.tolist()])
            for leads in (answers.present, answers.absent)
        )
        rows.append({"images": float(answers.size), "libraries": float(len(there)), **told_apart(there, away)})
    return rows


def told_apart(there: F64, away: F64) -> dict[str, float]:
    """`present_kept`: the share of what is there with a chance of `WELL` or more. `absent_told`: of what is not, with
    less. `auc`: how often what is there has the higher one. `calibration_error`: how far chances are from the share of
    what is there, in the mean over ten bins, if half is (expected calibration error, Guo et al. 2017).
    """
    error = 0.0
    for low in np.arange(10) / 10:
        both = [((part >= low) & (part < low + 0.1 + (low == 0.9))) for part in (there, away)]
        weights = [one.mean() / 2 for one in both]
        if sum(weights):
            mean = sum(float(part[one].sum()) / len(part) / 2 for part, one in zip((there, away), both, strict=True))
            error += abs(weights[0] - mean)
    return {
        "auc": round(float((there[:, None] > away).mean()), 4),
        "present_kept": round(float((there >= WELL).mean()), 6),
        "absent_told": round(float((away < WELL).mean()), 6),
        "calibration_error": round(float(error), 4),
    }


def measure_captions(towers: Towers, trainset: Path) -> Iterator[Row]:
    """COCO captions to images: recall at 1 and 5, median rank among the captioned validation images."""
    shown = show(towers, trainset, captioned=True)
    captions = [(caption, row) for row, example in enumerate(shown.examples) for caption in example.captions]
    if not captions:
        return
    texts = towers.texts([caption for caption, _ in captions])
    ways = {"scene": texts @ shown.scene.T, "scene and subject": shown.scores(texts, towers.bundle.subject).T}
    for way, scores in ways.items():
        own = scores[np.arange(len(captions)), [row for _, row in captions]]
        rank = (scores > own[:, None]).sum(axis=1) + 1
        yield {
            "vectors": way,
            "captions": len(captions),
            "caption_images": len(shown.examples),
            "caption_recall_at_1": round(float((rank <= 1).mean()), 4),
            "caption_recall_at_5": round(float((rank <= 5).mean()), 4),
            "caption_median_rank": float(np.median(rank)),
        }


def measure_composites(towers: Towers, trainset: Path) -> Iterator[Row]:
    """Videos of a small object that crosses a place: are both found by their labels, and is the object where the map
    says? Mean average precision over the videos, by the best frame of each; with parts of the map left out.

    `inside`: share of the object's columns in the 9:16 part of a 16:9 frame that holds most of the map.
    """
    objects, places = read_parts(trainset, read_examples(trainset, "val"))
    bundle = towers.bundle
    for pan, size in itertools.product((0, 8), (36, 56, 76)):
        made = moving(objects, places, size=size, pan=pan, count=min(300, len(objects)))
        clips, moved = towers.moving(made.frames)
        count, length = clips.shape[:2]
        tokens, change = (own.reshape(-1, *own.shape[2:]) for own in (clips, moved))
        linked, config = np.arange(length) > 0, EncodeConfig()
        steps, threshold = config.shift_steps, config.shift_threshold
        sources = [adaptive_shift(own, bundle.grid, linked, steps=steps, threshold=threshold) for own in clips]
        shifted = np.concatenate([shift_tokens(own, at, 0) for own, at in zip(clips, sources, strict=True)])
        attention = {name: towers.run("attention", tokens=seen) for name, seen in (("", tokens), ("shift", shifted))}
        even = np.full_like(change, 1 / change.shape[1])
        names = sorted({label for things in made.things for thing in things for label in thing.labels[:1]})
        texts = towers.texts(names)
        wanted = [np.array([[name == things[n].labels[0] for name in names] for things in made.things]) for n in (0, 1)]
        ways = {
            "scene": (even, change),  # whatever the map
            "attention": (attention[""], np.ones_like(change)),
            "change": (even, change),
            "attention and change": (attention[""], change),
            "attention of the shifted frame and change": (attention["shift"], change),
        }
        for way, (weights, changed) in ways.items():
            found = towers.fused(tokens, weights, changed)
            subject = None if way == "scene" else found["subject"]
            scores = frame_scores(found["scene"], subject, texts.T, bundle.subject)
            best = scores.best.reshape(count, length, -1).max(axis=1)
            row: Row = {"pan": pan, "object_lines": size, "map": way, "videos": count}
            for what, own in zip(("object", "place"), wanted, strict=True):
                row[f"{what}_map"] = round(mean_average_precision(best, own), 4)
            if way != "scene":
                row["subject_wins"] = round(float(scores.by_subject.mean()), 4)
                boxes = made.boxes.reshape(-1, 4)
                shares = [share_inside(m, box, bundle.grid) for m, box in zip(found["map"], boxes, strict=True)]
                row["inside"] = round(float(np.mean(shares)), 4)
            yield row


def share_inside(weights: F32, box: F32, grid: tuple[int, int]) -> float:
    """Share of a box's columns inside the window, (9/16)² of the width, that holds the most of a map [P]."""
    width = SIZE * (9 / 16) ** 2
    sums = np.concatenate([[0.0], np.cumsum(weights.reshape(grid).sum(axis=0))])
    starts, edges = np.linspace(0, SIZE - width, 33), np.linspace(0, SIZE, grid[1] + 1)
    left = starts[(np.interp(starts + width, edges, sums) - np.interp(starts, edges, sums)).argmax()]
    return float(max(0.0, min(box[2], left + width) - max(box[0], left)) / (box[2] - box[0]))


def measure_attention(towers: Towers, trainset: Path) -> Row:
    """Does the map find the one object of a picture better than the middle does? Mean area under the curve.

    Of validation images: objects before a plain ground as they are, and the same objects put on photographs of places.
    """
    objects, places = find_objects(trainset, read_examples(trainset, "val"))
    if not objects or not places:
        return {}
    grid = towers.bundle.grid
    y, x = (np.linspace(-1, 1, n) for n in grid)
    # A normal distribution around the middle, of a third of the side: what photographers do.
    centre = np.exp(-0.5 * (y[:, None] ** 2 + x[None] ** 2) / (2 / 3) ** 2).reshape(1, -1)
    found: Row = {}
    kinds = marked(objects, places, SIZE, grid, count=400, seed=1)
    for name, kind in zip(("plain", "placed"), kinds, strict=True):
        parts = [kind.frames[first : first + 64] for first in range(0, len(kind.frames), 64)]
        maps = np.concatenate([towers.run("attention", tokens=towers.run("backbone", frames=part)) for part in parts])
        prior = np.broadcast_to(centre, maps.shape)
        both = area_under_curve(maps, kind.masks), area_under_curve(prior, kind.masks)
        clear = np.isfinite(both[0])
        found |= {
            f"attention_{name}_auc": round(float(both[0][clear].mean()), 4),
            f"attention_{name}_centre_auc": round(float(both[1][clear].mean()), 4),
            f"attention_{name}_pictures": float(clear.sum()),
        }
    return found


def area_under_curve(maps: F32, masks: F32) -> F32:
    """Of each picture, the chance that a patch of the object has more weight than one of the ground, [N].

    A patch is the object's from half of it on; pictures without a patch of either kind give NaN.
    """
    found = np.full(len(maps), np.nan, np.float32)
    for row, (weights, mask) in enumerate(zip(maps.reshape(len(maps), -1), masks.reshape(len(masks), -1), strict=True)):
        inside, outside = weights[mask >= 0.5], weights[mask < 0.5]
        if len(inside) and len(outside):
            found[row] = ((inside[:, None] > outside).mean() + (inside[:, None] >= outside).mean()) / 2
    return found


def text_towers(engine: Engine, before: Path | None) -> dict[str, Callable[[list[str]], F32]]:
    return {**({} if before is None else {"before": Towers(before).texts}), "own": engine.encode_text}


def clips(engine: Engine, media: Path, before: Path | None) -> Iterator[Row]:
    """Place of the right clip for each caption, by the scene alone and by both vectors.

    Two sets: own captions, and captions of words that no label has. With `before`, the bundle of an earlier text tower
    for the same image tower, its answers too, and the difference with its interval over the captions.
    """
    seen = {
        name: engine.embed_video(media / name, sampling=Sampling(fps=2.0)) for name in CLIPS["unusual"] | CLIPS["clips"]
    }
    towers, scale = text_towers(engine, before), engine.bundle.subject
    for kind in ("clips", "unusual"):
        asked = [(text, place) for place, own in enumerate(CLIPS[kind].values()) for text in own]
        texts, own = [text for text, _ in asked], np.array([place for _, place in asked])
        earlier: dict[str, F32] = {}
        for tower, encode in towers.items():
            queries, table, best = encode(texts), [], []
            for name in CLIPS[kind]:
                embedding = seen[name]
                chosen = np.linspace(0, len(embedding) - 1, FRAMES).round().astype(int)
                both = frame_scores(embedding.scene, embedding.subject, queries.T, scale).best
                table.append([(embedding.scene @ queries.T)[chosen].mean(axis=0), both[chosen].mean(axis=0)])
                best.append(both.max(axis=0))
            for way, scores in zip(("scene", "scene and subject"), np.stack(table, axis=1), strict=True):
                ranks = (scores > scores[own, np.arange(len(own))]).sum(axis=0) + 1
                row: Row = {"part": "clips", "texts": kind, "tower": tower, "vectors": way, "queries": len(texts)}
                row |= {"clips": len(CLIPS[kind]), "median_rank": float(np.median(ranks))}
                row |= {f"recall_at_{depth}": round(float((ranks <= depth).mean()), 6) for depth in (1, 5)}
                row["joins"] = round(in_the_right_part(np.stack(best), own), 4)
                if way in earlier:
                    for depth in (1, 5):
                        more = (ranks <= depth).astype(np.float32) - (earlier[way] <= depth)
                        row[f"recall_at_{depth}_gain"] = [round(v, 4) for v in (float(more.mean()), *interval(more))]
                earlier[way] = ranks
                yield row


def in_the_right_part(best: F32, own: I64, *, parts: int = 4, draws: int = 200) -> float:
    """The share of queries whose best frame lies in the right clip of joins of `parts` clips.

    Args:
        best: the best frame's score of each clip, [C, Q].
        own: the right clip of each query, [Q].
    """
    rng, hits = np.random.default_rng(0), []
    for query, clip in enumerate(own):
        others = np.delete(best[:, query], clip)
        drawn = np.stack([rng.choice(len(others), parts - 1, replace=False) for _ in range(draws)])
        hits.append((best[clip, query] > others[drawn].max(axis=1)).mean())
    return float(np.mean(hits))


def unknown(engine: Engine, trainset: Path, before: Path | None) -> Iterator[Row]:
    """Queries of words that no label has: the nearest label names."""
    names = sorted({label for example in read_examples(trainset, "val") for label in example.labels[:1]})
    nearest = {
        tower: (-encode(CLIPS["unknown"]) @ encode(names).T).argsort(axis=1)[:, :3]
        for tower, encode in text_towers(engine, before).items()
    }
    for n, query in enumerate(CLIPS["unknown"]):
        row: Row = {"part": "unknown", "query": query, "unknown_words": engine.unknown_words(query)}
        yield row | {f"nearest_{tower}": [names[place] for place in found[n]] for tower, found in nearest.items()}


def told(engine: Engine, asked: list[tuple[list[Summary], list[str]]]) -> Row:
    """Is what a caption says told from what is in no clip? See `told_apart`."""
    chances: tuple[list[float], list[float]] = ([], [])
    for videos, captions in asked:
        for texts, found in zip((captions, CLIPS["absent"]), chances, strict=True):
            found += [engine.search(text, videos, k=1)[0].chance or 0.0 for text in texts]
    there, away = map(np.asarray, chances)
    row: Row = {"part": "absent_clips", "clips": len(asked[0][0]), "present": len(there), "absent": len(away)}
    return row | told_apart(there, away)


def keyframes(engine: Engine, media: Path, draws: int) -> Row:
    """Eight stretches of real clips in random order and lengths: how many get a key-frame, with K = 8 and by itself."""
    parts, counts = stretches(lambda name: media / name), []
    covered: dict[Any, list[int]] = {8: [], "auto": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(draws):
            chosen = [parts[int(n)] for n in np.random.default_rng(seed).permutation(len(parts))[:8]]
            path = Path(folder) / f"{seed}.mp4"
            cuts, _ = concatenate(chosen, path, seed)
            for wanted, found in covered.items():
                frames = engine.summarize(path, keyframes=wanted).keyframes
                found.append(len({int(np.searchsorted(cuts, frame.pts_seconds, side="right")) for frame in frames}))
            counts.append(len(frames))
    fixed, auto = (round(float(np.mean(found)) / 8, 4) for found in covered.values())
    row: Row = {"part": "keyframes", "draws": draws, "clips": 8, "covered_k8": fixed, "covered_auto": auto}
    return {**row, "keyframes_auto": [min(counts), max(counts)]}


def decks(engine: Engine, trainset: Path, draws: int) -> Row:
    """How many slides of rendered talks get a key-frame, with the automatic number."""
    covered, count, frames = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(draws):
            draw = np.random.default_rng(1000 + seed)
            made, boundaries = slides(draw, shot_clips.photographs(trainset, 4, draw), soft=seed % 2 == 1)
            known = shot_clips.write(Path(folder) / f"{seed}.mp4", made, boundaries)
            found = engine.summarize(known.path).keyframes
            edges = [stop for _, stop in known.boundaries]
            covered += len({int(np.searchsorted(edges, frame.pts_seconds, side="right")) for frame in found})
            count, frames = count + len(edges) + 1, frames + len(found)
    return {"part": "slides", "draws": draws, "slides": count, "covered": covered, "keyframes": frames}


def parts(options: argparse.Namespace) -> Iterator[Row]:
    if options.trainset:
        yield from photographs(options.model, options.trainset)
    with Engine.from_pretrained(options.model, device="cpu") as engine:
        if options.trainset:
            yield from unknown(engine, options.trainset, options.before)
        if (options.media / "natural").is_dir():
            yield from clips(engine, options.media, options.before)
            every = [engine.summarize(options.media / name, keyframes=1) for name in CLIPS["clips"]]
            own = list(CLIPS["clips"].values())
            yield told(engine, [([video], texts) for video, texts in zip(every, own, strict=True)])
            yield told(engine, [(every, [text for texts in own for text in texts])])
            yield keyframes(engine, options.media, 1 if options.quick else 10)
        if options.trainset:
            yield decks(engine, options.trainset, 1 if options.quick else 10)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    for row in parts(options):
        say(f"{row}")
        yield {"case": "quality", **row, "model": options.model}


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--trainset", type=Path, help="folder with labels.jsonl and tar shards")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--before", type=Path, help="bundle with an earlier text tower for the same image tower")
    raise SystemExit(run(parser, measure))
