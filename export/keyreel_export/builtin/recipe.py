"""The whole training in its order. What a step makes is kept in the work folder and read there the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from keyreel_export.builtin.bundle import GRID, Backbone, Texts
from keyreel_export.builtin.data import (
    F16,
    SIZE,
    U8,
    Bank,
    Example,
    ask_teacher,
    make_bank,
    read_examples,
    read_images,
    square_view,
    teacher_view,
)
from keyreel_export.builtin.distil import Distillation, Lesson, Plan, draw_scenes, spread_of
from keyreel_export.builtin.language import Language
from keyreel_export.builtin.phrases import View, describe, read_classes
from keyreel_export.builtin.saliency import SpatialAttention, find_objects, marked, train_attention
from keyreel_export.builtin.space import Space, SpacePlan, train_space
from keyreel_export.builtin.student import ImageTower
from keyreel_export.builtin.wordnet import Nouns

SURE = 0.6  # the teacher's class is taken for a label from this probability on
STUDENT_VIEWS = 3  # crops of each image on which the last joint space is trained
MARKED = 3000  # pictures with outlines for the attention head, of each kind


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Made:
    """What a training leaves."""

    image: ImageTower
    attention: SpatialAttention
    texts: Texts
    tokenizer: Tokenizer
    facts: dict[str, float]
    log: list[dict[str, Any]]


@dataclass
class Recipe:
    """Arguments as those of the command line."""

    trainset: Path
    teacher: Path
    wordnet: Path | None
    work: Path
    minutes: float
    steps: int
    views: int
    seed: int
    workers: int
    batch: int
    scenes: int

    @cached_property
    def train(self) -> list[Example]:
        return read_examples(self.trainset, "train")

    @cached_property
    def val(self) -> list[Example]:
        return read_examples(self.trainset, "val")

    def make(self) -> Made:
        """All steps. torch is left with one thread while processes train side by side.

        Raises:
            ValueError: the work folder was begun with other options.
        """
        self._same_options()
        bank = make_bank(
            self.trainset, self.train, self.teacher, self.work, views=self.views, seed=self.seed, workers=self.workers
        )
        self.drawn = draw_scenes(self.scenes, self.seed)
        answers = ask_teacher(
            self.teacher, [s.pixels for s in self.drawn], self.work / f"scenes-{self.seed}-{self.scenes}.npz"
        )
        known = {label for example in self.train for label in example.labels}
        classes = read_classes(self.teacher.parent / "imagenet_labels.txt", known)
        nouns = Nouns(self.wordnet) if self.wordnet is not None else None
        words, kept = Path(__file__).with_name("words.txt"), self.work / "tokenizer.json"
        language = Language(self.train, classes, self.drawn, nouns, words, kept, self.seed)
        views = describe(self.train, classes, bank.example.tolist(), sure_classes(bank.logits), language.broader)

        features = standardised(bank.features, *spread_of(bank)), standardised(answers[0], *spread_of(bank))
        space = Space(features[0].shape[1], language.tokenizer.get_vocab_size())
        space = self._kept(space, "space-teacher", lambda log: self._space(features, views, language, log))
        lesson = make_lesson(space, features[0], self.train, views, language, bank)
        plan = Plan(minutes=self.minutes, seed=self.seed, batch=self.batch, workers=self.workers)
        run = Distillation(plan, bank, self.drawn, answers, self.work, lesson)
        run.train()

        image = run.student.image
        chosen = np.flatnonzero(np.arange(len(bank.crops)) % self.views < STUDENT_VIEWS)
        seen = self._student_features(image, bank, chosen, f"student-features-{run.step}.npz")
        start = Space(seen[0].shape[1], language.tokenizer.get_vocab_size())
        start.load_state_dict(
            {**space.state_dict(), **{f"place.{k}": v for k, v in image.project.state_dict().items()}}
        )
        some = [views[int(i)] for i in chosen]
        name = f"space-student-{run.step}"
        final = self._kept(start, name, lambda log: self._space(seen, some, language, log, start))
        image.project.load_state_dict(final.place.state_dict())
        facts = {
            "training_images_seen": float(run.seen),
            "training_minutes": round(run.seconds / 60, 1),
            **self._teacher_cosine(run),
        }
        texts = Texts(final.text, final.common)
        log = [*self._log("space-teacher"), *run.log, *self._log(name)]
        attention = self._kept(SpatialAttention(), f"attention-{run.step}", lambda _: self._attention(image))
        return Made(image, attention, texts, language.tokenizer, facts, log)

    def _same_options(self) -> None:
        """Notes what decides what is made: options, size of pictures, lists of words. Refuses others in the folder."""
        own = {"trainset": str(self.trainset), "teacher": str(self.teacher), "wordnet": str(self.wordnet)}
        own |= {name: str(getattr(self, name)) for name in ("steps", "views", "seed", "batch", "scenes")}
        own["view"] = f"{SIZE} pixels, bicubic"
        for name in ("words.txt", "grammar.txt"):
            own[name] = hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
        path = self.work / "options.json"
        if not path.exists():
            path.write_text(json.dumps(own, indent=2) + "\n", "utf-8")
        kept = json.loads(path.read_text("utf-8"))
        other = [f"{name} was {kept.get(name)}, is {value}" for name, value in own.items() if kept.get(name) != value]
        if other:
            raise ValueError(f"{self.work} was begun with other options: {'; '.join(other)}. Take another --work")

    def _space(
        self,
        features: tuple[Tensor, Tensor],
        views: list[View],
        language: Language,
        log: Path,
        start: Space | None = None,
    ) -> Space:
        plan = SpacePlan(steps=self.steps, seed=self.seed)
        if start is not None:
            plan = replace(plan, rate=0.4 * plan.rate)
        return train_space(plan, features, (views, language.scene_views), language, start, log)

    def _log(self, name: str) -> list[dict[str, Any]]:
        lines = (self.work / f"{name}.jsonl").read_text("utf-8").splitlines()
        return [{"stage": name.rsplit("-", 1)[0] if name[-1].isdigit() else name, **json.loads(line)} for line in lines]

    def _kept(self, empty: Module, name: str, make: Callable[[Path], Module]) -> Module:
        path = self.work / f"{name}.pt"
        if not path.exists():
            made = make(self.work / f"{name}.jsonl")
            aside = path.with_suffix(".part")
            torch.save(made.state_dict(), aside)
            aside.rename(path)
        empty.load_state_dict(torch.load(path, weights_only=True))
        return empty.eval()

    def _student_features(
        self, image: ImageTower, bank: Bank, chosen: np.ndarray[Any, Any], name: str
    ) -> tuple[Tensor, Tensor]:
        """Pooled tokens of some crops and of the scenes, fp16."""
        path = self.work / name
        if not path.exists():
            photos = pooled(image, bank.crops, chosen)
            scenes = pooled(image, np.stack([s.pixels for s in self.drawn]), np.arange(len(self.drawn)))
            aside = path.with_suffix(".part.npz")
            np.savez(aside, photos=photos, scenes=scenes)
            aside.rename(path)
        arrays = np.load(path)
        return torch.from_numpy(arrays["photos"]), torch.from_numpy(arrays["scenes"])

    def _attention(self, image: ImageTower) -> SpatialAttention:
        objects, places = find_objects(self.trainset, self.train)
        if not objects or not places:
            return SpatialAttention().eval()
        pictures = marked(objects, places, SIZE, (GRID, GRID), count=min(MARKED, len(objects)), seed=self.seed)
        tokens, masks = [], []
        with torch.inference_mode():
            for kind in pictures:
                for first in range(0, len(kind.frames), 64):
                    tokens.append(Backbone(image.eval())(torch.from_numpy(kind.frames[first : first + 64])))
                masks.append(kind.masks)
        return train_attention(torch.cat(tokens).clone(), np.concatenate(masks), seed=self.seed)

    def _teacher_cosine(self, run: Distillation) -> dict[str, float]:
        """Cosine of the student's and the teacher's features on images that neither was fitted to here."""
        frames: list[U8] = [np.zeros(0, np.uint8)] * len(self.val)
        small = np.empty((len(self.val), SIZE, SIZE, 3), np.uint8)
        for index, image in read_images(self.trainset, self.val):
            frames[index], small[index] = teacher_view(image), square_view(image)
        features = ask_teacher(self.teacher, frames, self.work / "val.npz")[0]
        with torch.inference_mode():
            found = torch.from_numpy(pooled(run.student.image, small, np.arange(len(small)))).float()
            guess = run.student.imitate(found)
        wanted = run.standard(features)
        raw = functional.cosine_similarity(guess * run.spread + run.mean, torch.from_numpy(features).float(), dim=-1)
        standard = functional.cosine_similarity(guess, wanted, dim=-1)
        return {
            "teacher_cosine_standardised": round(float(standard.mean()), 4),
            "teacher_cosine_raw": round(float(raw.mean()), 4),
            "teacher_cosine_images": float(len(frames)),
        }


def standardised(features: F16, mean: Tensor, spread: Tensor) -> Tensor:
    """[N, F] fp16, clipped at 6; in parts, so that fp32 of the whole never exists."""
    found = torch.empty(features.shape, dtype=torch.float16)
    for first in range(0, len(features), 8192):
        part = torch.from_numpy(features[first : first + 8192].astype(np.float32))
        found[first : first + 8192] = ((part - mean) / spread).clamp(-6, 6).half()
    return found


def sure_classes(logits: F16) -> list[int]:
    """The teacher's class of each crop where its probability is at least SURE, else -1."""
    found: list[int] = []
    for first in range(0, len(logits), 8192):
        part = torch.from_numpy(logits[first : first + 8192].astype(np.float32)).softmax(1).max(1)
        found += torch.where(part.values >= SURE, part.indices, -1).tolist()
    return found


def pooled(image: ImageTower, crops: U8, chosen: np.ndarray[Any, Any]) -> F16:
    """Mean of the tokens of some crops, [n, C]."""
    found = []
    image.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(chosen), 128):
            part = torch.from_numpy(crops[chosen[first : first + 128]]).permute(0, 3, 1, 2).float()
            tokens = image(part.contiguous(memory_format=torch.channels_last))
            found.append(tokens.float().mean((2, 3)).half().numpy())
    return np.concatenate(found)


def encode_all(space: Space, language: Language, texts: list[str]) -> Tensor:
    """[n, D] unit."""
    return torch.cat([space.told(language.encode(texts[i : i + 256])) for i in range(0, len(texts), 256)])


def make_lesson(
    space: Space, features: Tensor, examples: list[Example], views: list[View], language: Language, bank: Bank
) -> Lesson:
    """What the space says of each crop, and which texts are true of each image: label names and scenes' things."""
    phrases = [*((label, frozenset({label})) for label in language.labels), *language.scene_phrases]
    with torch.inference_mode():
        placed = torch.cat([space.placed(part.float()).half() for part in torch.split(features, 8192)])
        texts = encode_all(space, language, [text for text, _ in phrases])
    first = np.unique(bank.example, return_index=True)[1]  # one view of each example, the whole image
    of_images = [views[int(place)] for place in first]
    true: list[Tensor] = []
    unknown: list[Tensor] = []
    for group, photos in ((of_images, True), (language.scene_views, False)):
        for start in range(0, len(group), 1024):
            part = group[start : start + 1024]
            right, open_ = language.truth(part, len(part) if photos else 0, phrases)
            right = right / right.sum(1, keepdim=True).clamp(min=1e-6)
            true.append(right.half())
            unknown.append(open_ & (right == 0))
    scale = float(space.log_scale.detach().exp())
    return Lesson(placed.clone(), texts.clone(), scale, torch.cat(true), torch.cat(unknown))
