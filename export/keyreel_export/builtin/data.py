"""The labelled images as crops, with a teacher's features and logits of each crop.

A bank is a folder of arrays: the whole view and some random crops of each training image, and the teacher's answers
for the same part of the picture ("patient and consistent" distillation, Beyer et al. 2022, arXiv:2106.05237). An
interrupted run continues with the missing parts.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from keyreel.render.files import atomic_write

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

SIZE = 112  # side of what the student sees, in pixels
TEACHER_SIZE = 224  # of what the teacher sees
PART = 1024  # images in one part of the bank
BANK_FILES = ("crops", "features", "logits")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image. A missing label is not a negative."""

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
    features: F16  # [M, F] pooled features of the teacher
    logits: F16  # [M, C] the teacher's classes before softmax


def read_examples(trainset: Path, split: str) -> list[Example]:
    """Rows of `labels.jsonl` of one split, in the file's order."""
    examples = []
    for line in (trainset / "labels.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["split"] == split:
            shard, member = row["file"].rsplit("/", 1)
            labels, captions = tuple(row["labels"]), tuple(row["captions"])
            examples.append(Example(shard, member, row["source"], split, labels, captions))
    return examples


def read_images(trainset: Path, examples: Iterable[Example]) -> Iterator[tuple[int, Image.Image]]:
    """Yields (place in `examples`, RGB image), one tar file after the other."""
    wanted: dict[str, dict[str, int]] = {}
    for index, example in enumerate(examples):
        wanted.setdefault(example.shard, {})[example.member] = index
    for shard, members in wanted.items():
        with tarfile.open(trainset / shard) as tar:
            for entry in tar:
                stream = tar.extractfile(entry) if entry.name in members else None
                if stream is not None:
                    yield members[entry.name], Image.open(stream).convert("RGB")


def random_view(image: Image.Image, rng: np.random.Generator, *, whole: bool) -> tuple[U8, U8]:
    """One view of an image: [SIZE, SIZE, 3] for the student, [TEACHER_SIZE, TEACHER_SIZE, 3] for the teacher, uint8.

    Both show the same part, mirrored or not. Crops take 25 to 100 % of the area at aspects of 3:4 to 2:1 and are
    squashed to a square, as wide frames of a video are. The student's view is also coloured, blurred or compressed,
    since video is softer than photographs.
    """
    if not whole:
        area = image.width * image.height * rng.uniform(0.25, 1.0)
        aspect = np.exp(rng.uniform(np.log(0.75), np.log(2.0)))
        width = int(np.clip(np.sqrt(area * aspect), 8, image.width))
        height = int(np.clip(np.sqrt(area / aspect), 8, image.height))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        image = image.crop((int(left), int(top), int(left) + width, int(top) + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    clean = np.asarray(image.resize((TEACHER_SIZE, TEACHER_SIZE), Image.Resampling.BILINEAR))
    if rng.random() < 0.25:
        small = int(rng.integers(36, 90))
        image = image.resize((small, small), Image.Resampling.BILINEAR)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(float(rng.uniform(0.7, 1.35)))
    if rng.random() < 0.2:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(15, 60)))
        image = Image.open(stream)
    return np.asarray(image), clean


def square_view(image: Image.Image) -> U8:
    """The whole image squashed to [SIZE, SIZE, 3], as the engine does."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class Teacher:
    """A quantised MobileNetV2 classifier in its own runtime: pooled features and class logits."""

    def __init__(self, model: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._run: Any = Interpreter(str(model), num_threads=1, experimental_preserve_all_tensors=True)
        self._run.allocate_tensors()
        self._input = self._run.get_input_details()[0]
        classes = self._run.get_output_details()[0]["shape"][-1]
        pooled = [d for d in self._run.get_tensor_details() if list(d["shape"][:-1]) == [1, 1, 1]]
        inner = {int(d["shape"][-1]) == classes: d for d in pooled if d["dtype"] == np.int8}
        self._pooled, self._logits = inner[False], inner[True]

    @property
    def widths(self) -> tuple[int, int]:
        """Features and classes."""
        return int(self._pooled["shape"][-1]), int(self._logits["shape"][-1])

    def __call__(self, view: U8) -> tuple[F32, F32]:
        """view [h, w, 3] uint8 -> features [F], logits [C]."""
        _, height, width, _ = self._input["shape"]
        if view.shape[:2] != (height, width):
            view = np.asarray(Image.fromarray(view).resize((int(width), int(height)), Image.Resampling.BILINEAR))
        self._run.set_tensor(self._input["index"], view[None])
        self._run.invoke()
        return self._read(self._pooled), self._read(self._logits)

    def _read(self, tensor: Any) -> F32:
        scale, zero = tensor["quantization"]
        values = self._run.get_tensor(tensor["index"]).reshape(-1).astype(np.float32)
        return np.asarray((values - zero) * scale, np.float32)


def _fill_part(job: tuple[Path, Path, list[Example], int, int, int, Path]) -> None:
    trainset, model, examples, first, views, seed, folder = job
    crops, features, logits = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in BANK_FILES)
    teacher = Teacher(model)
    for index, image in read_images(trainset, examples):
        for view in range(views):
            row = (first + index) * views + view
            rng = np.random.default_rng([seed, first + index, view])
            crops[row], clean = random_view(image, rng, whole=view == 0)
            features[row], logits[row] = teacher(clean)
    for array in (crops, features, logits):
        array.flush()
    (folder / f"part-{first:06d}").touch()


def make_bank(
    trainset: Path, examples: list[Example], model: Path, work: Path, *, views: int, seed: int, workers: int
) -> Bank:
    """Makes the missing parts of the bank under `work`, and reads it. Of `views` crops the first is the whole image."""
    folder = work / f"bank-{len(examples)}-{views}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(examples) * views
    wide, classes = Teacher(model).widths
    shapes: list[tuple[int, ...]] = [(rows, SIZE, SIZE, 3), (rows, wide), (rows, classes)]
    for name, shape, dtype in zip(BANK_FILES, shapes, (np.uint8, np.float16, np.float16), strict=True):
        path = folder / f"{name}.npy"
        if not path.exists():
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    jobs = [
        (trainset, model, examples[first : first + PART], first, views, seed, folder)
        for first in range(0, len(examples), PART)
        if not (folder / f"part-{first:06d}").exists()
    ]
    if workers == 1:
        for job in jobs:
            _fill_part(job)
    elif jobs:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_fill_part, jobs))
    # In memory: random crops of a mapped file would wait for the disk.
    crops, features, logits = (np.load(folder / f"{name}.npy") for name in BANK_FILES)
    return Bank(crops, np.repeat(np.arange(len(examples)), views), features, logits)


def ask_teacher(model: Path, views: Sequence[U8], kept: Path) -> tuple[F16, F16]:
    """The teacher's features [N, F] and logits [N, C] of some pictures, cached in the file `kept`."""
    if not kept.exists():
        teacher = Teacher(model)
        found = [teacher(view) for view in views]
        features, logits = (np.stack([pair[place] for pair in found]).astype(np.float16) for place in (0, 1))
        with atomic_write(kept) as part:
            np.savez(part, features=features, logits=logits)
    arrays = np.load(kept)
    return arrays["features"], arrays["logits"]
