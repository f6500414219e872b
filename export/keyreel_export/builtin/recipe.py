"""The whole training in its order. The result of each step is kept in the work folder and read there the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from keyreel.render.files import atomic_write
from keyreel_export.builtin.bundle import Backbone, Fitted, Texts
from keyreel_export.builtin.data import F16, F32, SIZE, U8, Bank, Example, ask_teacher, make_bank, read_examples
from keyreel_export.builtin.distil import Distillation, Lesson, Plan, draw_scenes, spread_of
from keyreel_export.builtin.language import Language
from keyreel_export.builtin.phrases import View, describe, read_classes
from keyreel_export.builtin.space import Space, train_space
from keyreel_export.builtin.student import ImageTower
from keyreel_export.builtin.subject import fit, pooled_photographs
from keyreel_export.builtin.text import Sources, learn_text
from keyreel_export.builtin.wordnet import Nouns

SURE = 0.6  # from this probability on, the teacher's class is taken for a label
STUDENT_VIEWS = 3  # crops of each image for the last joint space

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a training."""

    image: ImageTower
    texts: Texts
    tokenizer: Tokenizer
    fitted: Fitted
    facts: dict[str, float]
    log: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Arguments as on the command line."""

    trainset: Path
    teacher: Path
    sources: Sources
    work: Path
    minutes: float
    steps: int
    text_steps: int
    views: int
    seed: int
    workers: int
    batch: int
    scenes: int

    def make(self) -> Made:
        """All steps. Refuses a work folder that was begun with other options."""
        self._check_options()
        train = read_examples(self.trainset, "train")
        bank = make_bank(
            self.trainset, train, self.teacher, self.work, views=self.views, seed=self.seed, workers=self.workers
        )
        drawn = draw_scenes(self.scenes, self.seed)
        answers = ask_teacher(
            self.teacher, [s.pixels for s in drawn], self.work / f"scenes-{self.seed}-{self.scenes}.npz"
        )
        known = {label for example in train for label in example.labels}
        classes = read_classes(self.teacher.parent / "imagenet_labels.txt", known)
        nouns = Nouns(self.sources.wordnet)
        words, kept = Path(__file__).with_name("words.txt"), self.work / "tokenizer.json"
        language = Language(train, classes, drawn, nouns, words, kept, self.seed)
        views = describe(train, classes, bank.example.tolist(), sure_classes(bank.logits), language.broader)
        vocabulary = language.tokenizer.get_vocab_size()

        features = standardised(bank.features, *spread_of(bank)), standardised(answers[0], *spread_of(bank))
        space = self._kept(
            Space(features[0].shape[1], vocabulary),
            "space-teacher",
            lambda log: train_space(self.steps, self.seed, features, (views, language.scene_views), language, log),
        )
        lesson = make_lesson(space, features[0], train, views, language, bank)
        plan = Plan(minutes=self.minutes, seed=self.seed, batch=self.batch, workers=self.workers)
        run = Distillation(plan, bank, drawn, answers, self.work, lesson)
        run.train()

        image = run.student.image
        chosen = np.flatnonzero(np.arange(len(bank.crops)) % self.views < STUDENT_VIEWS)
        some = [views[int(i)] for i in chosen]
        start = Space(image.project.in_features, vocabulary)
        start.load_state_dict(
            {**space.state_dict(), **{f"place.{k}": v for k, v in image.project.state_dict().items()}}
        )

        def second_space(log: Path) -> Space:
            pixels = np.stack([scene.pixels for scene in drawn])
            seen = pooled(image, bank.crops, chosen), pooled(image, pixels, np.arange(len(pixels)))
            return train_space(self.steps, self.seed, seen, (some, language.scene_views), language, log, start)

        name = f"space-student-{run.step}"
        final = self._kept(Space(image.project.in_features, vocabulary), name, second_space)
        image.project.load_state_dict(final.place.state_dict())
        backbone = Backbone(image.eval())

        @torch.no_grad()
        def tokens(frames: U8) -> F32:
            found: F32 = backbone(torch.tensor(frames)).numpy()
            return found

        @torch.no_grad()
        def vectors(told: Sequence[str]) -> F32:
            found: F32 = final.all_told(language, told).numpy()
            return found

        last = self._folder(f"last-{run.step}")
        fitted = fit(tokens, vectors, image.project, self.trainset, last, self.seed)
        with torch.no_grad():
            seen = functional.normalize(fitted.scene(pooled_photographs(tokens, self.trainset, train, last)), dim=-1)
        texts, tokenizer, learned = learn_text(
            vectors, seen, self.trainset, self.sources, last, self.seed, self.text_steps
        )
        facts = {"training_images_seen": float(run.seen), "training_minutes": round(run.seconds / 60, 1)}
        log = [*self._log("space-teacher", "space-teacher"), *run.log, *self._log(name, "space-student")]
        return Made(image, texts, tokenizer, fitted, facts, [*log, *fitted.log, *learned])

    def _folder(self, name: str) -> Path:
        (self.work / name).mkdir(exist_ok=True)
        return self.work / name

    def _check_options(self) -> None:
        """Stores what decides the result: options, size of pictures, lists of words. Refuses to go on with others."""
        names = ("trainset", "teacher", "sources", "steps", "text_steps", "views", "seed", "batch", "scenes")
        own = {name: str(getattr(self, name)) for name in names} | {"view": f"{SIZE} pixels, bicubic"}
        for name in ("words.txt", "grammar.txt"):
            own[name] = hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
        path = self.work / "options.json"
        if not path.exists():
            path.write_text(json.dumps(own, indent=2) + "\n", "utf-8")
        kept = json.loads(path.read_text("utf-8"))
        other = [f"{name} was {kept.get(name)}, is {value}" for name, value in own.items() if kept.get(name) != value]
        if other:
            raise ValueError(f"{self.work} was begun with other options: {'; '.join(other)}. Take another --work")

    def _log(self, name: str, stage: str) -> list[dict[str, Any]]:
        lines = (self.work / f"{name}.jsonl").read_text("utf-8").splitlines()
        return [{"stage": stage, **json.loads(line)} for line in lines]

    def _kept(self, empty: Module, name: str, make: Callable[[Path], Module]) -> Module:
        path = self.work / f"{name}.pt"
        if not path.exists():
            made = make(self.work / f"{name}.jsonl")
            with atomic_write(path) as part:
                torch.save(made.state_dict(), part)
        empty.load_state_dict(torch.load(path, weights_only=True))
        return empty.eval()


def standardised(features: F16, mean: Tensor, spread: Tensor) -> Tensor:
    """[N, F] fp16, clipped at 6; in parts, so that the whole never exists in fp32."""
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


def pooled(image: ImageTower, crops: U8, chosen: np.ndarray[Any, Any]) -> Tensor:
    """Mean of the tokens of some crops, [n, C] fp16."""
    found = []
    image.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(chosen), 128):
            part = torch.from_numpy(crops[chosen[first : first + 128]]).permute(0, 3, 1, 2).float()
            tokens = image(part.contiguous(memory_format=torch.channels_last))
            found.append(tokens.float().mean((2, 3)).half())
    return torch.cat(found).clone()


def make_lesson(
    space: Space, features: Tensor, examples: list[Example], views: list[View], language: Language, bank: Bank
) -> Lesson:
    """The place of each crop in the space, and which texts are true of each image: label names and scenes' things."""
    phrases = [*((label, frozenset({label})) for label in language.labels), *language.scene_phrases]
    with torch.inference_mode():
        placed = torch.cat([space.placed(part.float()).half() for part in torch.split(features, 8192)])
        texts = space.all_told(language, [text for text, _ in phrases])
    first = np.unique(bank.example, return_index=True)[1]  # one view of each example, the whole image
    of_images = [views[int(place)] for place in first]
    true: list[Tensor] = []
    unknown: list[Tensor] = []
    for group, photos in ((of_images, True), (language.scene_views, False)):
        for start in range(0, len(group), 1024):
            part = group[start : start + 1024]
            right, may = language.truth(part, len(part) if photos else 0, phrases)
            right = right / right.sum(1, keepdim=True).clamp(min=1e-6)
            true.append(right.half())
            unknown.append(may & (right == 0))
    scale = float(space.log_scale.detach().exp())
    return Lesson(placed.clone(), texts.clone(), scale, torch.cat(true), torch.cat(unknown))
