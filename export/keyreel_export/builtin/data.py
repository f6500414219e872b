"""The labelled images as crops, and what a teacher says of each crop.

A bank is a folder of parts: for each training image one whole view and some random crops, and beside each crop the
teacher's features. Teacher and student thus see the very same pixels ("patient and consistent" distillation, Beyer et
al. 2022, arXiv:2106.05237). Parts that are on disk are not made again, so a broken run goes on where it stopped.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SIZE = 112  # side of what the student sees, in pixels
PART = 2048  # images in one part of the bank


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image. A label that is missing says nothing; it is not a negative."""

    shard: str  # tar file, relative to the training set
    member: str  # name inside the tar file
    source: str
    split: str  # "train" or "val"
    labels: tuple[str, ...]  # the most specific first
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bank:
    """Crops of the training images with the teacher's answers. M crops."""

    crops: U8  # [M, SIZE, SIZE, 3] RGB
    example: I64  # [M] place in the list of training examples
    features: F16  # [M, F] pooled features of the teacher; F = 0 without one
    guess: I64  # [M] the teacher's class where it is sure, else -1


def read_examples(trainset: Path, split: str) -> list[Example]:
    """Rows of `labels.jsonl` of one split, in the file's order.

    Raises:
        FileNotFoundError: there is no `labels.jsonl` in the folder.
    """
    examples = []
    for line in (trainset / "labels.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == split:
            shard, member = row["file"].rsplit("/", 1)
            labels, captions = tuple(row["labels"]), tuple(row["captions"])
            examples.append(Example(shard, member, row["source"], split, labels, captions))
    return examples


def read_images(trainset: Path, examples: Iterable[Example]) -> Iterator[tuple[int, Image.Image]]:
    """Opens each tar file once; yields (place in `examples`, RGB image), grouped by tar file."""
    wanted: dict[str, dict[str, int]] = {}
    for index, example in enumerate(examples):
        wanted.setdefault(example.shard, {})[example.member] = index
    for shard, members in wanted.items():
        with tarfile.open(trainset / shard) as tar:
            for entry in tar:
                stream = tar.extractfile(entry) if entry.name in members else None
                if stream is not None:
                    yield members[entry.name], Image.open(stream).convert("RGB")


def random_view(image: Image.Image, rng: np.random.Generator, *, whole: bool) -> U8:
    """One view of an image, [SIZE, SIZE, 3] uint8: flipped, coloured, sometimes blurred; the whole of it or a crop.

    Crops take 25 to 100 % of the area at aspects of 3:4 to 2:1 and are squashed to a square, as wide frames of a video
    are. One view in four is blurred by going through a small size, since video is softer than photographs.
    """
    if not whole:
        area = image.width * image.height * rng.uniform(0.25, 1.0)
        aspect = np.exp(rng.uniform(np.log(0.75), np.log(2.0)))
        width = int(np.clip(np.sqrt(area * aspect), 8, image.width))
        height = int(np.clip(np.sqrt(area / aspect), 8, image.height))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        image = image.crop((int(left), int(top), int(left) + width, int(top) + height))
    if rng.random() < 0.25:
        small = int(rng.integers(36, 90))
        image = image.resize((small, small), Image.Resampling.BILINEAR)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(float(rng.uniform(0.7, 1.35)))
    return np.asarray(image)


def square_view(image: Image.Image, size: int = 2 * SIZE) -> U8:
    """The whole image squashed to [size, size, 3], as the engine does with a frame."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


class Teacher:
    """A quantised MobileNetV2 classifier, read with its own runtime: pooled features and class probabilities."""

    def __init__(self, model: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._run: Any = Interpreter(str(model), num_threads=1, experimental_preserve_all_tensors=True)
        self._run.allocate_tensors()
        self._input = self._run.get_input_details()[0]
        self._output = self._run.get_output_details()[0]
        pooled = [d for d in self._run.get_tensor_details() if list(d["shape"][:-1]) == [1, 1, 1]]
        widest = self._output["shape"][-1]
        self._pooled = next(d for d in pooled if d["dtype"] == np.int8 and d["shape"][-1] != widest)

    def __call__(self, views: U8) -> tuple[F32, F32]:
        """views [N, h, w, 3] uint8 -> features [N, F], probabilities [N, classes]."""
        _, height, width, _ = self._input["shape"]
        found: list[tuple[F32, F32]] = []
        for view in views:
            picture = Image.fromarray(view).resize((int(width), int(height)), Image.Resampling.BILINEAR)
            self._run.set_tensor(self._input["index"], np.asarray(picture)[None])
            self._run.invoke()
            found.append((self._read(self._pooled), self._read(self._output)))
        return np.stack([f for f, _ in found]), np.stack([p for _, p in found])

    def _read(self, tensor: Any) -> F32:
        scale, zero = tensor["quantization"]
        values = self._run.get_tensor(tensor["index"]).reshape(-1).astype(np.float32)
        return np.asarray((values - zero) * scale, np.float32)


def _make_part(job: tuple[Path, Path | None, list[Example], int, int, int, Path]) -> None:
    trainset, model, examples, first, views, seed, target = job
    crops: list[U8] = []
    places: list[int] = []
    for index, image in read_images(trainset, examples):
        for view in range(views):
            rng = np.random.default_rng([seed, first + index, view])
            crops.append(random_view(image, rng, whole=view == 0))
            places.append(first + index)
    stacked = np.stack(crops)
    features, guess = np.zeros((len(stacked), 0), np.float16), np.full(len(stacked), -1, np.int64)
    if model is not None:
        found, probabilities = Teacher(model)(stacked)
        features = found.astype(np.float16)
        guess = np.where(probabilities.max(axis=1) >= 0.6, probabilities.argmax(axis=1), -1)
    aside = target.with_suffix(".part.npz")
    np.savez(aside, crops=stacked, example=np.asarray(places), features=features, guess=guess)
    aside.rename(target)


def make_bank(
    trainset: Path,
    examples: list[Example],
    model: Path | None,
    folder: Path,
    *,
    views: int,
    seed: int,
    workers: int = 2,
) -> Bank:
    """Makes the missing parts of the bank in `folder`, reads all of them.

    Args:
        views: crops of each image, the first of which is the whole image.
        model: the teacher, or None for a bank without features.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for first in range(0, len(examples), PART):
        target = folder / f"bank-{seed}-{views}-{'taught' if model else 'plain'}-{first:06d}.npz"
        jobs.append((trainset, model, examples[first : first + PART], first, views, seed, target))
    missing = [job for job in jobs if not job[-1].exists()]
    if workers == 1:
        for job in missing:
            _make_part(job)
    elif missing:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_make_part, missing))
    parts = [np.load(job[-1]) for job in jobs]
    return Bank(*(np.concatenate([part[name] for part in parts]) for name in ("crops", "example", "features", "guess")))
