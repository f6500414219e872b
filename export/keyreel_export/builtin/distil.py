"""Distillation: the image tower learns the teacher's answers for the crops that it sees, then the joint space.

First the teacher's features and classes are imitated, which needs no labels, on pictures that grow from 64 to SIZE
pixels. Then the joint space is learnt as well: the place of the teacher's features in it (`space.py`), what that place
says of all label names, and the labels. The learning rate falls as a cosine of the time used.

Workers are processes of one thread each that average their gradients: the threads of one process spin at barriers when
the machine has other work, which cost three quarters of the speed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from keyreel.render.files import atomic_write
from keyreel_export.builtin.data import SIZE, U8, Bank
from keyreel_export.builtin.scenes import KINDS, WEIGHTS, Scene, render_scene
from keyreel_export.builtin.student import TOKEN_WIDTH, ImageTower

SIZES = ((0.3, 64), (0.55, 80), (0.85, 96), (1.0, SIZE))  # fraction of the time until which pictures have this side
JOINT = 0.6  # fraction of the time after which the joint space is learnt too
SCENES = 0.06  # fraction of a batch, doubled in the joint stage
RATE, DECAY = 2.5e-3, 0.05
CHECKPOINT_SECONDS = 120.0
PATIENCE = timedelta(minutes=5)  # of a worker with a lost one, where half an hour is usual
MAX_STEP_SECONDS = 5.0  # more was a pause of the process and does not count


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how large."""

    minutes: float = 70.0
    seed: int = 0
    batch: int = 128  # of all workers together
    workers: int = 2


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the joint stage teaches. M crops and R scenes, V texts."""

    placed: Tensor  # [M, D] unit: the teacher's features in the joint space
    texts: Tensor  # [V, D] unit
    scale: float  # of cosines before softmax
    true: Tensor  # [E + R, V] how much each text is true of each example or scene; rows sum to 1 or 0
    unknown: Tensor  # [E + R, V] bool, may be true without a label


class Student(nn.Module):
    """The image tower, and two maps that only its training needs."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.image = ImageTower()
        self.imitate = nn.Linear(TOKEN_WIDTH, features)  # pooled tokens -> the teacher's features
        self.classify = nn.Linear(TOKEN_WIDTH, classes)


def imitation(found: Tensor, wanted: Tensor) -> Tensor:
    """Distance of standardised features: direction and, half as much, values."""
    cosine = functional.cosine_similarity(found, wanted, dim=-1)
    return (1 - cosine).mean() + 0.5 * functional.mse_loss(found, wanted)


def agreement(found: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(found) from softmax(wanted), mean over the rows."""
    return functional.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


class Distillation:
    """One training of the image tower, with rendered scenes beside the bank's crops and the teacher's answers for them
    [R, F] and [R, C]. `work` is the folder of the checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        bank: Bank,
        scenes: list[Scene],
        answers: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
        work: Path,
        lesson: Lesson,
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.bank, self.scenes, self.answers, self.lesson = plan, bank, scenes, answers, lesson
        self.work, self.checkpoint = work, work / "checkpoint.pt"
        self.rng = np.random.default_rng(plan.seed)
        self.student = Student(bank.features.shape[1], bank.logits.shape[1])
        self.student.image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean, self.spread = spread_of(bank)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": DECAY}, {"params": [], "weight_decay": 0.0}]
        for weight in self.student.parameters():
            groups[weight.ndim < 2]["params"].append(weight)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.batch = max(2, plan.batch // plan.workers)
        self.seconds, self.step, self.seen = 0.0, 0, 0
        self.log: list[dict[str, Any]] = []

    def pixels(self, crops: list[U8], size: int) -> Tensor:
        """[n, 3, size, size] float32 in 0..255, half of them mirrored, with the same answer."""
        found = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
        mirrored = torch.from_numpy(self.rng.random(len(found)) < 0.5)
        found = torch.where(mirrored[:, None, None, None], found.flip(3), found)
        if size != SIZE:
            found = functional.interpolate(found, size=(size, size), mode="bilinear", antialias=True)
        return found.contiguous(memory_format=torch.channels_last)

    def losses(self, used: float) -> dict[str, Tensor]:
        """The losses of one random batch, at this fraction of the time."""
        size = next(size for until, size in SIZES if used <= until)
        joint = used >= JOINT
        extra = max(1, round(self.batch * SCENES * (2 if joint else 1)))
        rows = self.rng.integers(0, len(self.bank.crops), self.batch - extra)
        drawn = self.rng.integers(0, len(self.scenes), extra)
        crops = [self.bank.crops[int(i)] for i in rows] + [self.scenes[int(i)].pixels for i in drawn]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.student.image(self.pixels(crops, size))
        pooled = tokens.float().mean((2, 3))
        features = np.concatenate([self.bank.features[rows], self.answers[0][drawn]])
        logits = torch.from_numpy(np.concatenate([self.bank.logits[rows], self.answers[1][drawn]])).float()
        losses = {
            "imitation": imitation(self.student.imitate(pooled), self.standard(features)),
            "classes": 0.5 * agreement(self.student.classify(pooled) / 2, logits / 2),
        }
        if joint:
            losses |= self._joint(self.student.image.vectors(pooled), rows, drawn)
        return losses

    def _joint(self, vectors: Tensor, rows: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any]) -> dict[str, Tensor]:
        lesson = self.lesson
        examples = int(self.bank.example.max()) + 1
        places = torch.from_numpy(np.concatenate([self.bank.example[rows], examples + drawn]))
        logits = lesson.scale * vectors @ lesson.texts.T
        placed = lesson.placed[torch.from_numpy(rows)].float()
        true = lesson.true[places].float()
        known = logits.masked_fill(lesson.unknown[places], -1e4).log_softmax(1)
        return {
            "place": 2 * (1 - functional.cosine_similarity(vectors[: len(rows)], placed)).mean(),
            "opinion": 0.5 * agreement(logits[: len(rows)], lesson.scale * placed @ lesson.texts.T),
            "labels": -0.5 * (known * true).sum() / true.sum().clamp(min=1.0),
        }

    def standard(self, features: np.ndarray[Any, Any]) -> Tensor:
        """Standardised features of the teacher, [n, F], clipped at 6."""
        return ((torch.from_numpy(features.astype(np.float32)) - self.mean) / self.spread).clamp(-6, 6)

    def train(self) -> None:
        """Runs until the time is used up, from a checkpoint if there is one."""
        self._restore()
        meeting = self.work / f"meeting-{time.time_ns()}"
        fork = get_context("fork")
        others = [fork.Process(target=self._work, args=(n, meeting)) for n in range(1, self.plan.workers)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # after a fork, waiting for an earlier pool of threads never ends
        try:
            for process in others:
                process.start()
            self._work(0, meeting)
        finally:
            for process in others:
                if process.pid is not None:
                    process.join(60)
                    process.kill()
            meeting.unlink(missing_ok=True)
            torch.set_num_threads(threads)
        self.student.eval()

    def _work(self, rank: int, meeting: Path) -> None:
        address = f"file://{meeting.resolve()}"
        world = self.plan.workers
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=PATIENCE)
        self.rng = np.random.default_rng([self.plan.seed, rank, self.step])
        torch.manual_seed(self.plan.seed + 1000 * rank + self.step)
        budget = self.plan.minutes * 60
        last, saved = time.monotonic(), self.seconds
        sums: dict[str, float] = {}
        self.student.train()
        while self.seconds < budget:
            rate = self._set_rate(self.seconds / budget)
            losses = self.losses(min(1.0, self.seconds / budget))
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            now = time.monotonic()
            self.seconds, last = self._agree(self.seconds + min(now - last, MAX_STEP_SECONDS)), now
            nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
            self.optimizer.step()
            self.step += 1
            self.seen += self.batch * world
            for name, loss in losses.items():
                value = float(loss.detach())
                sums[name] = 0.98 * sums.get(name, value) + 0.02 * value
            if self.step % 100 == 0:
                facts = {name: round(value, 4) for name, value in sums.items() if name in losses}
                at = {"seconds": round(self.seconds), "step": self.step, "images": self.seen}
                self.log.append({"stage": "distillation", **at, **facts, "rate": round(rate, 6)})
            if rank == 0 and self.seconds - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = self.seconds
        if rank == 0:
            self._save()
        distributed.destroy_process_group()

    def _set_rate(self, used: float) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, used)))
        rate = RATE * max(falling, 0.004) * min(1.0, (self.step + 1) / 100)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _agree(self, seconds: float) -> float:
        """Averages the workers' gradients, and their clocks, so that all take the same steps."""
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([seconds])])
        distributed.all_reduce(flat)
        flat /= self.plan.workers
        for grad, mean in zip(grads, torch.split(flat[:-1], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return float(flat[-1])

    def _save(self) -> None:
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": {"seconds": self.seconds, "step": self.step, "seen": self.seen},
            "log": self.log,
        }
        with atomic_write(self.checkpoint) as part:
            torch.save(state, part)

    def _restore(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            clock, self.log = state["clock"], state["log"]
            self.seconds, self.step, self.seen = clock["seconds"], clock["step"], clock["seen"]


def spread_of(bank: Bank) -> tuple[Tensor, Tensor]:
    """Mean and spread of the teacher's features, [F] each, of about 8,192 crops."""
    sample = torch.from_numpy(bank.features[:: max(1, len(bank.features) // 8192)].astype(np.float32))
    return sample.mean(0), sample.std(0) + 0.05


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes at the student's size, drawn wide or square and squashed, as frames are."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        kind = KINDS[int(rng.choice(len(KINDS), p=WEIGHTS))]
        width = int(2 * SIZE * rng.choice([1.0, 1.33, 1.78]))
        scenes.append(render_scene(kind, rng, (width, 2 * SIZE)).squashed(SIZE))
    return scenes
