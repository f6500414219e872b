"""Does a 9:16 reel of a wide video keep the subject, beside the middle of the frame?

Case "reframe": videos of 2.5 s in which a photograph of an object crosses a photograph of a place, with a still camera
or a pan; drawn from the validation images of the built-in model's training set. Of 25 frames a second: `centre_inside`,
those with the middle of the object's box inside the crop; `area_inside`, those with four fifths of the box or more (of
objects of 76 lines, which are wider than the crop, at most 83 % can be); `whole`, the share of videos that are shown
whole, which are left out of the other two. With two objects, one keeps to the left third and one to the right, and
`whole` is all that is measured. A sample is one seed; the camera's settings were chosen on seeds 101 and 102.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks._common import Row, parser_of, rows_of, run
from keyreel.config import EncodeConfig
from keyreel.encode import Encoder
from keyreel.render.reframe import Camera, plan_camera, window_of
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
from keyreel.types import F32, F64, U8, FrameBatch, Shot
from keyreel_export.builtin.composites import moving, read_parts
from keyreel_export.builtin.data import SIZE, read_examples

ASPECT, FRAME = "9:16", (1080, 1920)
FPS = 2.0
SEEDS = range(2, 6)


class Follower:
    """Clips to cameras, with the built-in model."""

    def __init__(self) -> None:
        bundle = Bundle.find("builtin")
        self._backend = resolve("cpu", precision=bundle.precision)
        self._encoder = Encoder(bundle, self._backend)

    def camera(self, frames: U8) -> Camera:
        """frames [T, SIZE, SIZE, 3], wide pictures squashed to a square, as the engine does."""
        place = np.arange(len(frames))
        with self._backend.running():
            found = self._encoder.encode([FrameBatch(frames, place / FPS, place)], EncodeConfig()).embedding
        take = [Shot(0.0, (len(frames) - 1) / FPS)]
        return plan_camera(
            found.attention,
            found.grid,
            found.pts_seconds,
            area=(0.0, 0.0, 1.0, 1.0),
            size=FRAME,
            shots=[Shot(0.0, len(frames) / FPS)],
            spans=take,
            aspect=ASPECT,
        )


def kept(lefts: F64, sides: F64) -> tuple[float, float]:
    """(centre_inside, area_inside) of a window at `lefts` [N] and boxes from and to `sides` [N, 2], as shares."""
    width = window_of(*FRAME, ASPECT)[0]
    middle = sides.mean(axis=1)
    shown = np.minimum(sides[:, 1], lefts + width) - np.maximum(sides[:, 0], lefts)
    inside = (lefts <= middle) & (middle <= lefts + width)
    return float(inside.mean()), float((shown >= 0.8 * (sides[:, 1] - sides[:, 0]) - 1e-6).mean())


def one_object(follower: Follower, clips: U8, boxes: F32) -> dict[str, dict[str, float]]:
    """Of each system, what it keeps of the objects of clips [V, T, SIZE, SIZE, 3] with boxes [V, T, 4]."""
    sampled = np.arange(clips.shape[1]) / FPS
    times = np.linspace(0, sampled[-1], round(sampled[-1] * 25) + 1)
    middle = np.full(len(times), (1 - window_of(*FRAME, ASPECT)[0]) / 2)
    rows, whole = [], 0
    for frames, box in zip(clips, boxes / SIZE, strict=True):
        camera = follower.camera(frames)
        sides = np.stack([np.interp(times, sampled, box[:, n]) for n in (0, 2)], axis=1)
        regions = [camera.region(float(t)) for t in times]
        lefts = np.array([region[0] for region in regions if region is not None])
        if len(lefts) < len(times):
            whole += 1
        else:
            rows.append((*kept(lefts, sides), *kept(middle, sides)))
    shares = np.mean(rows, axis=0).tolist()
    names = "centre_inside", "area_inside"
    own = dict(zip(names, shares[:2], strict=True)) | {"whole": whole / len(clips)}
    return {"keyreel": own, "middle": dict(zip(names, shares[2:], strict=True))}


def two_objects(follower: Follower, clips: U8, boxes: F32) -> float:
    """The share of videos shown whole where the object of a second video is put on the far side of the first."""
    middle = boxes[:, :, [0, 2]].mean(axis=2) / SIZE
    left, right = np.flatnonzero((middle < 1 / 3).all(axis=1)), np.flatnonzero((middle > 2 / 3).all(axis=1))
    found = []
    for own, other in zip(left, right, strict=False):
        frames = clips[own].copy()
        for frame, second, box in zip(frames, clips[other], boxes[other].astype(int), strict=True):
            place = slice(box[1], box[3]), slice(box[0], box[2])
            frame[place] = second[place]
        found.append(all(take.mode == "fit" for take in follower.camera(frames).takes))
    return float(np.mean(found)) if found else np.nan


def measure(options: argparse.Namespace) -> Iterator[Row]:
    objects, places = read_parts(options.trainset, read_examples(options.trainset, "val"))
    follower, seeds, count = Follower(), SEEDS[:1] if options.quick else SEEDS, 20 if options.quick else 150
    for pan, size in itertools.product((0, 8), (36, 56, 76)):
        found: dict[str, dict[str, list[float]]] = {"keyreel": {}, "middle": {}}
        double: list[float] = []
        for seed in seeds:
            made = moving(objects, places, size=size, pan=pan, count=count, seed=seed)
            for system, shares in one_object(follower, made.frames, made.boxes).items():
                for metric, share in shares.items():
                    found[system].setdefault(metric, []).append(share)
            double.append(two_objects(follower, made.frames, made.boxes))
        params = {"pan": pan, "object_lines": size, "videos": count, "seeds": list(seeds)}
        for system, samples in found.items():
            yield from rows_of("reframe", {**params, "objects": 1}, system, samples)
        if not np.isnan(double).any():
            yield from rows_of("reframe", {**params, "objects": 2}, "keyreel", {"whole": double})


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--trainset", type=Path, required=True, help="folder with labels.jsonl and tar shards")
    raise SystemExit(run(parser, measure))
