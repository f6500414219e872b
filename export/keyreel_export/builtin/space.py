"""The joint space: a text tower and one linear map of image features, without any CNN in the loop.

Trained twice, for minutes each: on the teacher's features before distillation, as the student's aim, and on the
finished student's own pooled features, to fit the texts to what that student sees.

Three losses. Pictures and texts are contrasted both ways, with all right answers known (Khosla et al. 2020,
arXiv:2004.11362). Words beyond the labels (`wordnet.py`, `words.txt`) are drawn to the mean of their labels. Made-up
sentences of several known things, with filler and unknown words, are drawn to the mean of those things.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from keyreel_export.builtin.language import Drawn, Language
from keyreel_export.builtin.phrases import CAPTION, Phrase, View, say
from keyreel_export.builtin.student import EMBEDDING_WIDTH, TextTower

BATCH = 256
CAPTIONED = 12  # of a batch: pictures with captions, which are few but most like queries
SCENES = 48  # beside the batch
NEGATIVES = 384  # label texts beside the texts of the batch
WORDS = 96  # of each of the two text-only losses
RATE = 2e-3
REFRESH = 20  # steps between two looks at where the known things are


class Space(nn.Module):
    """Both maps into the joint space. F is the width of the image features.

    `common` is the mean of the label names, [D], zero at first. Without it, pictures are ranked by how much nearer they
    are to a text than to texts at large.
    """

    common: Tensor

    def __init__(self, features: int, vocabulary: int) -> None:
        super().__init__()
        self.place = nn.Linear(features, EMBEDDING_WIDTH)
        self.text = TextTower(vocabulary)
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0)))
        self.register_buffer("common", torch.zeros(EMBEDDING_WIDTH))

    def told(self, ids: Tensor) -> Tensor:
        """Token ids [Q, L] -> unit vectors [Q, D]."""
        return functional.normalize(self.text(ids).float() - self.common, dim=-1, eps=1e-6)

    def all_told(self, language: Language, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [Q, D], in parts."""
        return torch.cat([self.told(language.encode(texts[i : i + 256])) for i in range(0, len(texts), 256)])

    def placed(self, features: Tensor) -> Tensor:
        """[N, F] -> unit vectors [N, D]."""
        return functional.normalize(self.place(functional.dropout(features, 0.1, self.training)), dim=-1, eps=1e-6)


def contrast(vectors: Tensor, texts: Tensor, true: Tensor, unknown: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE with several right answers, averaged over them, both ways.

    Args:
        vectors: [B, D] unit.
        texts: [Q, D] unit.
        true: [B, Q], the weight of a text that is true of the picture, else 0.
        unknown: [B, Q] bool, where it may be true without a label; left out.
    """
    logits = (scale * vectors @ texts.T).masked_fill(unknown & (true == 0), -1e4)
    to_text = -(logits.log_softmax(1) * true).sum(1) / true.sum(1).clamp(min=1e-6)
    wanted = (true > 0).float()
    to_image = -(logits.log_softmax(0) * wanted).sum(0) / wanted.sum(0).clamp(min=1.0)
    return 0.7 * to_text.mean() + 0.3 * to_image[wanted.sum(0) > 0].mean()


def train_space(
    steps: int,
    seed: int,
    features: tuple[Tensor, Tensor],
    views: tuple[Sequence[View], Sequence[View]],
    language: Language,
    log: Path,
    start: Space | None = None,
) -> Space:
    """Trains a space on features of photographs [M, F] and of scenes [R, F], and what is known of each.

    Continues with `start`, slower, without the mean of its label names. Writes JSON lines to `log`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    space = Space(features[0].shape[1], language.tokenizer.get_vocab_size())
    peak = RATE if start is None else 0.4 * RATE
    if start is not None:
        space.load_state_dict(start.state_dict())
        with torch.no_grad():
            # Rounded as in the bundle's file.
            space.common += known_things(space, language)[: len(language.labels)].mean(0).half().float()
    optimizer = torch.optim.AdamW(space.parameters(), lr=peak, weight_decay=0.02, betas=(0.9, 0.98))
    captioned = [row for row, view in enumerate(views[0]) if any(tag.startswith(CAPTION) for tag in view.tags)]
    things = torch.zeros(0)
    began, sums = time.monotonic(), dict[str, float]()
    rows: list[dict[str, Any]] = []
    space.train()
    for step in range(steps):
        falling = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * max(falling, 0.01) * min(1.0, (step + 1) / 50)
        if step % REFRESH == 0:
            things = known_things(space, language)
        losses = {
            "space": _pictures(space, features, views, captioned, language, rng),
            "words": _towards(space, language, language.draw_words(WORDS, rng), things, rng),
            "sentences": _towards(space, language, language.draw_sentences(WORDS, rng), things, rng),
        }
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(space.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            space.log_scale.clamp_(0.0, math.log(50.0))
        for name, loss in losses.items():
            sums[name] = 0.97 * sums.get(name, float(loss.detach())) + 0.03 * float(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            facts: dict[str, Any] = {name: round(value, 4) for name, value in sums.items()}
            rows.append({"seconds": round(time.monotonic() - began), "step": step + 1, **facts})
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return space.eval()


def known_things(space: Space, language: Language) -> Tensor:
    """Where the names of all known things are, [K, D] unit; label names first."""
    was = space.training
    space.eval()
    with torch.no_grad():
        found = space.all_told(language, language.things)
    space.train(was)
    return found


def _pictures(
    space: Space,
    features: tuple[Tensor, Tensor],
    views: tuple[Sequence[View], Sequence[View]],
    captioned: Sequence[int],
    language: Language,
    rng: np.random.Generator,
) -> Tensor:
    rows = rng.integers(0, len(features[0]), BATCH)
    if captioned:
        rows[:CAPTIONED] = rng.choice(captioned, CAPTIONED)
    drawn = rng.integers(0, len(features[1]), SCENES)
    shown = [views[0][int(i)] for i in rows] + [views[1][int(i)] for i in drawn]
    phrases: list[Phrase] = [say(view, rng, language.rarity) for view in shown]
    phrases += language.draw_names(NEGATIVES, rng) + language.scene_phrases
    true, unknown = language.truth(shown, len(rows), phrases)
    texts = _read(space, language, [text for text, _ in phrases], rng)
    taken = torch.cat([features[0][torch.from_numpy(rows)].float(), features[1][torch.from_numpy(drawn)].float()])
    return contrast(space.placed(taken), texts, true, unknown, space.log_scale.exp())


def _towards(space: Space, language: Language, drawn: Drawn, things: Tensor, rng: np.random.Generator) -> Tensor:
    """1 - cosine of texts to the weighted means of known things."""
    texts, parts = drawn
    weights = torch.zeros(len(texts), len(things))
    for row, part in enumerate(parts):
        for place, weight in part.items():
            weights[row, place] = weight
    wanted = functional.normalize(weights @ things, dim=-1, eps=1e-6)
    found = _read(space, language, texts, rng)
    return (1 - functional.cosine_similarity(found, wanted, dim=-1)).mean()


def _read(space: Space, language: Language, texts: Sequence[str], rng: np.random.Generator) -> Tensor:
    """[n, D] unit. Some tokens are dropped, so that no text depends on a single one."""
    order = np.argsort([len(text) for text in texts], kind="stable")  # each part is as long as its longest text
    found = []
    for part in np.array_split(order, max(1, len(texts) // 96)):
        ids = language.encode([texts[int(i)] for i in part])
        gone = (torch.from_numpy(rng.random(ids.shape)) < 0.05) & (ids > 1)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(space.told(torch.where(gone, 1, ids)))
    return torch.cat(found)[torch.from_numpy(np.argsort(order, kind="stable"))]
