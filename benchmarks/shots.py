"""Where shots begin, beside PySceneDetect's detectors and TransNetV2, on videos whose boundaries are known.

Sets: single takes (real clips without a cut, pictures of dead leaves, photographs under a hand-held camera), takes with
flashes, hard joins of takes, dissolves, fades through black, slides of talks (some that dissolve), screens with typing
and scrolling. A cut counts as found within one frame, a gradual change within a quarter of a second of its span; each
boundary counts once. `false_a_minute` is of all sets without boundaries. PySceneDetect's `minimum` is set to one frame
less than half a second, keyreel's own; TransNetV2 at its threshold of 0.5.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import peers
from benchmarks._common import ROOT, Row, System, compare, parser_of, run, say
from benchmarks.shot_clips import (
    FPS,
    SINGLE_TAKES,
    Known,
    dissolve,
    flashed,
    held,
    joined,
    leaves,
    photographs,
    real,
    screens,
    slides,
    through_black,
    write,
)

_DETECTORS = ("adaptive", "content", "histogram")
_GRADUAL_SECONDS = 0.25  # around a gradual change


def made(folder: Path, options: argparse.Namespace, seed: int, count: int) -> dict[str, list[Known]]:
    """The sets, `count` videos in each at most; kept in `folder`."""
    draw = np.random.default_rng([seed, 16])
    clips = [path for name in SINGLE_TAKES if (path := options.media / "natural" / name).exists()]
    photos = photographs(options.trainset, 60, draw) if options.trainset.exists() else []
    folder.mkdir(parents=True, exist_ok=True)

    def hand_held(length: int) -> Any:
        chosen = [photos[n] for n in draw.choice(len(photos), 3, replace=False)]
        return held(chosen[0], chosen[1 : 1 + int(draw.integers(3))], length, draw)

    def take(length: int, order: list[Path]) -> Any:
        kinds: list[Callable[[], Any]] = [lambda: leaves(length, int(draw.integers(1 << 30)))]
        kinds += [lambda: real(order.pop(), length, draw)] * 3 if order else []
        kinds += [lambda: hand_held(length)] * 2 if photos else []
        return kinds[int(draw.integers(len(kinds)))]()

    def edit(how: Any) -> tuple[Any, list[tuple[int, int]]]:
        order = [clips[n] for n in draw.permutation(len(clips))]  # each at most once: two parts of one are one place
        return joined([take(int(draw.integers(40, 110)), order) for _ in range(4)], how, draw)

    sets: dict[str, Callable[[int], tuple[Any, list[tuple[int, int]]]]] = {
        "real takes": lambda n: (real(clips[n], 10**6, draw, first=0), []),
        "made takes": lambda n: (hand_held(250) if photos and n % 3 else leaves(130, seed + n), []),
        "flashes": lambda n: (flashed(take(120, [clips[int(draw.integers(len(clips)))]] if clips else []), draw), []),
        "joins": lambda n: edit(None),
        "dissolves": lambda n: edit(dissolve),
        "fades": lambda n: edit(through_black),
        "slides": lambda n: slides(draw, photos or [Image.new("RGB", (90, 60))], soft=n % 3 == 2),
        "screens": lambda n: screens(draw),
    }
    found: dict[str, list[Known]] = {}
    for name, make in sets.items():
        limit = len(clips) if name == "real takes" else count // 2 if name == "screens" else count
        found[name] = [write(folder / f"{name} {seed}-{n}.mp4", *make(n)) for n in range(min(limit, count))]
    return found


def matched(known: Known, found: Sequence[float]) -> tuple[int, int, int]:
    """(found, missed, false): each boundary takes the nearest time that fits, each time fits one."""
    left = sorted(found)
    hits = 0
    for start, stop in known.boundaries:
        slack = 1.01 / FPS if stop - start <= 1.01 / FPS else _GRADUAL_SECONDS
        fit = [at for at in left if start - slack <= at <= (start if slack < 0.1 else stop) + slack]
        if fit:
            left.remove(min(fit, key=lambda at: abs(at - (start + stop) / 2)))
            hits += 1
    return hits, len(known.boundaries) - hits, len(left)


def scores(sets: dict[str, list[Known]], found: dict[Path, list[float]]) -> dict[str, float]:
    """F1 of each set that has boundaries, and of all; recall of joins; false boundaries a minute of the others."""
    result: dict[str, float] = {}
    total, plain = np.zeros(3), np.zeros(2)
    for name, videos in sets.items():
        counts = np.sum([matched(video, found[video.path]) for video in videos], axis=0)
        total += counts
        if counts[:2].sum():
            result[f"f1 {name}"] = _f1(counts)
            if name == "joins":
                result["recall joins"] = counts[0] / counts[:2].sum()
        else:
            own = np.array([counts[2], sum(video.seconds for video in videos) / 60])
            plain += own
            result[f"false_a_minute {name}"] = own[0] / own[1]
    return {**result, "f1": _f1(total), "false_a_minute": plain[0] / max(plain[1], 1e-9)}


def _f1(counts: Any) -> float:
    hits, missed, false = (float(count) for count in counts)
    return 2 * hits / max(2 * hits + missed + false, 1e-9)


def keyreel(paths: Sequence[Path]) -> peers.Run:
    from keyreel import Engine

    engine = Engine.from_pretrained(device="cpu")
    return lambda: {path: [shot.start_seconds for shot in engine.summarize(path).shots[1:]] for path in paths}


def check(sets: dict[str, list[Known]], found: dict[Path, list[float]]) -> dict[str, float]:
    return scores(sets, found)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    count = 2 if options.quick else options.videos
    began = time.monotonic()
    sets = made(options.content / "shots", options, options.seed, count)
    paths = [video.path for videos in sets.values() for video in videos]
    seconds = sum(video.seconds for videos in sets.values() for video in videos)
    say(f"{len(paths)} videos of {seconds:.0f} s made in {time.monotonic() - began:.0f} s")
    systems = [
        System("keyreel", partial(keyreel, paths), partial(check, sets)),
        *(System(f"pyscenedetect {n}", partial(peers.scenedetect, paths, n), partial(check, sets)) for n in _DETECTORS),
        System("transnetv2", partial(peers.transnet, paths), partial(check, sets)),
    ]
    params = {"videos": len(paths), "seconds": round(seconds), "seed": options.seed}
    yield from compare("shots", params, systems, runs=1, seconds=300, limit_seconds=1800)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--trainset", type=Path, default=ROOT.parent / "shared" / "trainset", help="of photographs")
    parser.add_argument("--videos", type=int, default=10, help="in each set")
    parser.add_argument("--seed", type=int, default=1)
    raise SystemExit(run(parser, measure))
