"""Training from a fresh start, on a budget of time: text space, distillation, joint space.

1. Space: the text tower and a linear map of the teacher's features learn one space, without any CNN.
2. Distillation: the image tower learns the teacher's features, and where in that space each crop lies.
3. Joint: pictures and texts directly, the distillation kept. Without a teacher this is the whole training.

The learning rate falls as a cosine of the time that is used. Checkpoints make a broken run go on. Workers are processes
of one thread each that average their gradients: threads of one process spin at each other's barriers when the machine
has other work, which cost three quarters of the speed.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.nn import functional

from keyreel_export.builtin.data import SIZE, U8, Bank, Example
from keyreel_export.builtin.phrases import BROAD, Phrase, Tags, View, describe, encode, say, train_tokenizer
from keyreel_export.builtin.scenes import COLOURS, KINDS, SHAPES, WEIGHTS, Scene, render_scene
from keyreel_export.builtin.student import EMBEDDING_WIDTH, TOKEN_WIDTH, ImageTower, TextTower

SPACE, JOINT = 0.1, 0.72  # shares of the time at which the space is done and at which the joint stage begins


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how large."""

    minutes: float = 30.0
    seed: int = 0
    batch: int = 128  # of all workers together
    workers: int = 2
    scenes: int = 6000  # rendered once, then drawn from
    scene_share: float = 0.35  # of a batch that has texts
    negatives: int = 96  # label texts beside the texts of the batch
    image_rate: float = 2.5e-3
    text_rate: float = 2e-3
    checkpoint_seconds: float = 120.0


class Learner(nn.Module):
    """The two towers and what is only needed to train them."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.image = ImageTower()
        self.text = TextTower(vocabulary)
        self.imitate = nn.Linear(TOKEN_WIDTH, max(features, 1))  # pooled tokens -> the teacher's features
        self.place = nn.Linear(max(features, 1), EMBEDDING_WIDTH)  # the teacher's features -> the joint space
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0)))

    def placed(self, features: Tensor) -> Tensor:
        return functional.normalize(self.place(functional.dropout(features, 0.1, self.training)), dim=-1)


def contrast(vectors: Tensor, texts: Tensor, true: Tensor, unknown: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE with several right answers, averaged over them (Khosla et al. 2020), both ways.

    Args:
        vectors: [B, D] unit. texts: [Q, D] unit, the first B of them each made for its picture.
        true: [B, Q], where the text holds of the picture: how much it counts, else 0.
        unknown: [B, Q] bool, where it may hold though the labels do not say so; left out.
    """
    logits = (scale * vectors @ texts.T).masked_fill(unknown & (true == 0), -1e4)
    to_text = -(logits.log_softmax(1) * true).sum(1) / true.sum(1).clamp(min=1e-6)
    own = true[:, : len(vectors)]
    to_image = -(logits[:, : len(vectors)].log_softmax(0) * own).sum(0) / own.sum(0).clamp(min=1e-6)
    return 0.5 * (to_text.mean() + to_image.mean())


def imitation(found: Tensor, wanted: Tensor) -> Tensor:
    """Distance of standardised features: direction and, half as much, values."""
    cosine = functional.cosine_similarity(found, wanted, dim=-1)
    return (1 - cosine).mean() + 0.5 * functional.mse_loss(found, wanted)


class Run:
    """One training run: data, towers, optimiser, clock."""

    def __init__(
        self, plan: Plan, bank: Bank, examples: Sequence[Example], classes: Sequence[Sequence[Phrase]], work: Path
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.bank, self.work = plan, bank, work
        self.rng = np.random.default_rng(plan.seed)
        self.scenes = draw_scenes(plan.scenes, plan.seed)
        counts = Counter(label for example in examples for label in example.labels)
        self.labels = sorted(counts)
        frequent = counts + Counter(tag for scene in self.scenes for tag in scene.tags)
        self.rarity = {tag: count**-0.5 for tag, count in frequent.items()}
        self.views = describe(examples, classes, bank.example.tolist(), bank.guess.tolist())
        scene_tags = frozenset[str]().union(*(scene.tags for scene in self.scenes))
        broad = frozenset(label for label, count in counts.items() if count >= BROAD)
        self.scene_views = [View(s.tags, broad, s.captions) for s in self.scenes]
        names: set[str] = set(self.labels) | scene_tags
        for view in self.views:
            names |= view.tags
        self.tags = Tags(names)
        # Photographs show colours, grounds and skies too, and no label says so.
        loose = [t for t in scene_tags if t.startswith("has ") or t.endswith((" background", "sky", "landscape"))]
        self.loose = self.tags.rows([loose])
        self.others: list[Phrase] = [(label, frozenset({label})) for label in self.labels]
        self.others += [phrase for synonyms in classes[1:] for phrase in synonyms]
        self.others += sorted({phrase for scene in self.scenes for phrase in scene.captions}, key=lambda p: p[0])[::3]
        # Beside scenes stand all colours of all shapes and grounds: which of the two colours is meant must be learnt.
        self.things: list[Phrase] = [(f"a {c} {s}", frozenset({f"{c} {s}"})) for c in COLOURS for s in SHAPES]
        self.things += [(f"a {c} background", frozenset({f"{c} background"})) for c in COLOURS]
        self.tokenizer = self._tokenizer(examples)
        taught = bank.features.shape[1]
        self.learner = Learner(self.tokenizer.get_vocab_size(), taught)
        self.learner.image.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if taught:
            sample = bank.features[:: max(1, len(bank.features) // 8192)].astype(np.float32)
            self.mean = torch.from_numpy(sample.mean(0))
            self.spread = torch.from_numpy(sample.std(0) + 0.05)
        image = list(self.learner.image.parameters())
        rest = [p for name, p in self.learner.named_parameters() if not name.startswith("image.")]
        groups = [{"params": image, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.01}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
        self.batch = max(2, plan.batch // plan.workers)
        self.seconds, self.step, self.seen = 0.0, 0, 0
        self.log: list[dict[str, Any]] = []

    def _tokenizer(self, examples: Sequence[Example]) -> Tokenizer:
        kept = self.work / "tokenizer.json"
        if kept.exists():
            return Tokenizer.from_file(str(kept))
        corpus = [text for text, _ in self.others for _ in range(2)]
        corpus += [caption.lower() for example in examples for caption in example.captions for _ in range(2)]
        for view in [*self.views[:: max(1, len(self.views) // 20000)], *self.scene_views]:
            corpus.append(say(view, self.rng, self.rarity)[0])
        tokenizer = train_tokenizer(corpus)
        tokenizer.save(str(kept))
        return tokenizer

    def standard(self, rows: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """Standardised features of the teacher, [n, F], clipped at 6."""
        features = torch.from_numpy(self.bank.features[rows].astype(np.float32))
        return ((features - self.mean) / self.spread).clamp(-6, 6)

    def truth(self, views: Sequence[View], photos: int, phrases: Sequence[Phrase]) -> tuple[Tensor, Tensor]:
        """How much each text is true of each picture, and where it may be, [B, Q].

        Rare tags count for more, else "animal" would be said before "dog". The first `photos` are photographs.
        """
        need = self.tags.rows([tags for _, tags in phrases])
        count = need.sum(1)
        has = self.tags.rows([view.tags for view in views])
        may = self.tags.rows([view.tags | view.unknown for view in views])
        may[:photos] = may[:photos].maximum(self.loose)
        weight = torch.tensor([max((self.rarity.get(tag, 1.0) for tag in tags), default=1.0) for _, tags in phrases])
        return (has @ need.T == count) * (count > 0) * weight, may @ need.T == count

    def told(self, views: Sequence[View], photos: int) -> tuple[Tensor, Tensor, Tensor]:
        """Texts for the pictures and texts beside them: vectors [Q, D], true and unknown [B, Q]."""
        others = self.rng.choice(len(self.others), min(self.plan.negatives, len(self.others)), replace=False)
        phrases = [say(view, self.rng, self.rarity) for view in views] + [self.others[int(i)] for i in others]
        phrases += self.things if photos < len(views) else []
        true, unknown = self.truth(views, photos, phrases)
        ids = encode(self.tokenizer, [text for text, _ in phrases])
        if self.learner.training:  # pieces go missing, so that no text hangs on a single one
            gone = (torch.from_numpy(self.rng.random(ids.shape)) < 0.05) & (ids > 1)
            ids = torch.where(gone, 1, ids)
        return self.learner.text(ids), true, unknown

    def pixels(self, crops: Sequence[U8], size: int) -> Tensor:
        """[n, 3, size, size] float32 in 0..255, half of them mirrored."""
        found = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
        mirrored = torch.from_numpy(self.rng.random(len(found)) < 0.5)
        found = torch.where(mirrored[:, None, None, None], found.flip(3), found)
        if size != SIZE:
            found = functional.interpolate(found, size=(size, size), mode="bilinear", antialias=True)
        return found.contiguous(memory_format=torch.channels_last)

    def space_loss(self) -> dict[str, Tensor]:
        """Stage 1: texts against the teacher's features."""
        rows = self.rng.integers(0, len(self.bank.crops), 3 * self.batch)
        texts, true, unknown = self.told([self.views[int(i)] for i in rows], len(rows))
        vectors = self.learner.placed(self.standard(rows))
        return {"space": contrast(vectors, texts, true, unknown, self.learner.log_scale.exp())}

    def image_loss(self, share: float) -> dict[str, Tensor]:
        """Stages 2 and 3; `share` of the time is used."""
        taught = self.bank.features.shape[1] > 0
        done = (share - SPACE) / (1 - SPACE)
        size = 64 if done < 0.5 else 80 if done < 0.8 else SIZE
        # Texts are dear beside small pictures: while the imitation leads, one step in three has them.
        speaks = not taught or share >= JOINT or self.step % 3 == 0
        extra = max(1, round(self.batch * self.plan.scene_share)) if speaks else 0
        rows = self.rng.integers(0, len(self.bank.crops), self.batch - extra)
        drawn = self.rng.integers(0, len(self.scenes), extra)
        crops = [self.bank.crops[int(i)] for i in rows] + [self.scenes[int(i)].pixels for i in drawn]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.learner.image(self.pixels(crops, size))
        pooled = tokens.float().mean((2, 3))
        vectors = self.learner.image.vectors(pooled)
        losses: dict[str, Tensor] = {}
        placed = vectors[: len(rows)]
        if taught:
            wanted = self.standard(rows)
            losses["imitation"] = imitation(self.learner.imitate(pooled[: len(rows)]), wanted)
            placed = self.learner.placed(wanted)
            losses["placing"] = 2 * (1 - functional.cosine_similarity(vectors[: len(rows)], placed.detach())).mean()
        if not speaks:
            return losses
        views = [self.views[int(i)] for i in rows] + [self.scene_views[int(i)] for i in drawn]
        texts, true, unknown = self.told(views, len(rows))
        if taught and share < JOINT:
            vectors = torch.cat([placed, vectors[len(rows) :]])
        losses["text"] = contrast(vectors, texts, true, unknown, self.learner.log_scale.exp())
        return losses

    def train(self) -> None:
        """Runs until the time is used up. Goes on from a checkpoint where there is one."""
        self._restore()
        meeting = self.work / f"meeting-{time.time_ns()}"
        others = [
            get_context("fork").Process(target=self._work, args=(n, meeting)) for n in range(1, self.plan.workers)
        ]
        for process in others:
            process.start()
        try:
            self._work(0, meeting)
        finally:
            for process in others:
                process.join(60)
                process.kill()
        self.learner.eval()

    def _work(self, rank: int, meeting: Path) -> None:
        address = f"file://{meeting.resolve()}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=self.plan.workers)
        self.rng = np.random.default_rng([self.plan.seed, rank, self.step])
        torch.manual_seed(self.plan.seed + 1000 * rank + self.step)
        budget, taught = self.plan.minutes * 60, self.bank.features.shape[1] > 0
        last, saved = time.monotonic(), self.seconds
        sums: dict[str, float] = {}
        self.learner.train()
        while self.seconds < budget:
            share = self.seconds / budget
            first = taught and share < SPACE
            rate = self._set_rates(share, first)
            losses = self.space_loss() if first else self.image_loss(share)
            self.optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            now = time.monotonic()
            self.seconds, last = self._agree(self.seconds + now - last), now
            nn.utils.clip_grad_norm_(self.learner.parameters(), 5.0)
            self.optimizer.step()
            with torch.no_grad():
                self.learner.log_scale.clamp_(0.0, math.log(50.0))
            self.step += 1
            self.seen += 0 if first else self.batch * self.plan.workers
            for name, loss in losses.items():
                value = float(loss.detach())
                sums[name] = 0.95 * sums.get(name, value) + 0.05 * value
            if rank == 0 and self.step % 50 == 0:
                facts = {name: round(value, 4) for name, value in sums.items()}
                at = {"seconds": round(self.seconds), "step": self.step, "images": self.seen}
                self.log.append({**at, **facts, "rate": round(rate, 6)})
                with (self.work / "progress.jsonl").open("a") as file:
                    file.write(json.dumps(self.log[-1]) + "\n")
            if rank == 0 and self.seconds - saved > self.plan.checkpoint_seconds:
                self._save()
                saved = self.seconds
        if rank == 0:
            self._save()
        distributed.destroy_process_group()

    def _set_rates(self, share: float, first: bool) -> float:
        """Sets the learning rates for this share of the time; returns that of the image tower."""
        start = SPACE if self.bank.features.shape[1] else 0.0
        falling = 0.5 * (1 + math.cos(math.pi * max(0.0, share - start) / (1 - start)))
        warm = min(1.0, (self.step + 1) / 50)
        image = self.plan.image_rate * falling * warm
        text = self.plan.text_rate * warm * (1 - 0.8 * share / SPACE if first else 0.4 * falling**0.5)
        for group, rate in zip(self.optimizer.param_groups, (image, text), strict=True):
            group["lr"] = rate
        return image

    def _agree(self, seconds: float) -> float:
        """Averages the workers' gradients, and their clocks, so that all take the same steps."""
        grads = [p.grad for p in self.learner.parameters() if p.grad is not None]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([seconds])])
        distributed.all_reduce(flat)
        flat /= self.plan.workers
        for grad, mean in zip(grads, torch.split(flat[:-1], [grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return float(flat[-1])

    def _save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clock": {"seconds": self.seconds, "step": self.step, "seen": self.seen},
            "log": self.log,
        }
        aside = self.work / "checkpoint.part"
        torch.save(state, aside)
        aside.rename(self.work / "checkpoint.pt")

    def _restore(self) -> None:
        path = self.work / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            clock, self.log = state["clock"], state["log"]
            self.seconds, self.step, self.seen = clock["seconds"], clock["step"], clock["seen"]


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes at the student's size, drawn wide or square and squashed, as frames are."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(count):
        kind = KINDS[int(rng.choice(len(KINDS), p=WEIGHTS))]
        width = int(2 * SIZE * rng.choice([1.0, 1.33, 1.78]))
        scenes.append(render_scene(kind, rng, (width, 2 * SIZE)).squashed(SIZE))
    return scenes
