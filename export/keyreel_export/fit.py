"""Fits the subject's side of a fusion to labelled frames, on fixed tokens.

It fits the spatial attention, the exponents of the map, the subject's fully connected layer, and the scale that makes
both scores comparable. The losses: a frame's subject vector should have the label of its object among all label names.
For a label, of an object or a place, the frames of the batch with that label should have the largest score, the larger
of both: so a subject must not win queries for places. A quarter of each batch are unchanged photographs: their subject
should stay near the scene, and their larger score should find their label. If outlines are known, the attention should
follow them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from keyreel.runtime.bundle import SubjectScale
from keyreel.types import F32
from keyreel_export.fusion import FLOOR, POWER, Pooling, subject_map

BATCH = 256
WIDTH = 32  # channels of the attention
RATE = 1e-3  # of the layer; three times as high for the attention, ten times for the single numbers
SCALE = 20.0  # of cosines as logits of label names
SHARP, SOFT = 25.0, 0.03  # of scores as logits of frames; temperature of the soft maximum of both scores
SHAPE = 4.0  # weight of the outlines
STILLS = 0.25  # share of unchanged photographs in a batch
# Subtracted from the offset: real videos have no pasted objects, and a subject that wins too often loses captions.
MARGIN = 0.03
STORED = 0.8  # share of the clips' frames whose subject is stored; far lower for real videos


class TokenAttention(nn.Module):
    """tokens [N, R+P, C] -> attention [N, P], rows sum to 1.

    `a_i = s_i / sum_j s_j`, `s_i = floor + sigmoid(conv3x3(relu(W x_i / rms(x)))_i)`: few channels, a 3x3 convolution
    and a sigmoid, after the spatial branch of CBAM (Woo et al. 2018, arXiv:1807.06521). A single 1x1 convolution,
    without the patches around, separated objects from ground less well.
    """

    floor = 0.05  # keeps every weight above 0

    def __init__(self, token_width: int, grid: tuple[int, int], prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens
        self.narrow, self.look = nn.Linear(token_width, WIDTH), nn.Conv2d(WIDTH, 1, 3, padding=1)

    def logits(self, tokens: Tensor) -> Tensor:
        """[N, P]: divided by each picture's root mean square, so that contrast and exposure do not matter."""
        patches = tokens[:, self.prefix_tokens :].float()
        size = patches.square().mean((1, 2), keepdim=True).add(1e-6).sqrt()
        narrow = torch.relu(self.narrow((patches / size).to(self.narrow.weight.dtype))).transpose(1, 2)
        found: Tensor = self.look(narrow.reshape(-1, WIDTH, *self.grid)).flatten(1).float()
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.floor + torch.sigmoid(self.logits(tokens))
        return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Outlined:
    """Pictures of objects with known outlines."""

    tokens: Tensor  # [M, R+P, C] float16
    masks: Tensor  # [M, P] float16: the share of each patch that the object covers

    def loss(self, attention: TokenAttention, count: int) -> Tensor:
        """The loss of a logistic regression on `count` of them."""
        rows = torch.randint(len(self.tokens), (count,))
        found = attention.logits(self.tokens[rows].float())
        return F.binary_cross_entropy_with_logits(found, self.masks[rows].float())


def fit_attention(attention: TokenAttention, pictures: Outlined, *, steps: int = 800, seed: int = 0) -> None:
    """Fits an attention to outlines, in place."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(attention.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        loss = pictures.loss(attention, 128)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@dataclass(frozen=True, slots=True)
class Frames:
    """The N frames to fit to."""

    tokens: Tensor  # [N, R+P, C] float16
    change: Tensor  # [N, P] float32
    objects: Tensor  # [N, L] float32: 1 if the label is an object's most specific one
    places: Tensor  # [N, L] float32: 1 if the label is the place's most specific one
    true: Tensor  # [N, L] bool: all labels of the frame; none is a wrong answer

    def rows(self, rows: Tensor | slice) -> Frames:
        """Selects frames by slice or indices."""
        return Frames(*(getattr(self, name)[rows] for name in Frames.__slots__))

    def joined(self, other: Frames) -> Frames:
        """Appends the frames of another."""
        return Frames(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in Frames.__slots__))


class SubjectHead(nn.Module):
    """The fitted parts. It starts as the training-free map over the scene's layer, or over a given one."""

    def __init__(
        self,
        pooling: Pooling,
        projection: nn.Module,
        attention: TokenAttention,
        subject_projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pooling, self.scene = pooling, projection
        first = projection if subject_projection is None else subject_projection
        self.attention, self.projection = copy.deepcopy(attention), copy.deepcopy(first).requires_grad_(True)
        self.power, self.log_floor = nn.Parameter(torch.tensor(POWER)), nn.Parameter(torch.tensor(FLOOR).log())
        self.slope, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scenes and subjects, [N, D] each, unit length."""
        weights = subject_map(self.attention(tokens), change, self.power, self.log_floor.exp())
        bias = (weights * weights.shape[1]).clamp_min(1e-6).log()
        with torch.no_grad():
            scene = self.scene(self.pooling.features(tokens, torch.zeros_like(bias)))
        subject = self.projection(self.pooling.features(tokens, bias))
        return F.normalize(scene.float(), dim=-1), F.normalize(subject.float(), dim=-1)

    def vectors(self, frames: Frames) -> tuple[F32, F32]:
        """Returns scenes and subjects of many frames, [N, D] each."""
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for first in range(0, len(frames.tokens), BATCH):
                own = slice(first, first + BATCH)
                found.append(self(frames.tokens[own].float(), frames.change[own]))
        scene, subject = (torch.cat(part).numpy() for part in zip(*found, strict=True))
        return scene, subject


def fit_subject(
    head: SubjectHead,
    clips: Frames,
    stills: Frames,
    texts: Tensor,
    *,
    outlined: Outlined | None = None,
    epochs: int,
    seed: int,
    spread: float = 1.0,
) -> list[dict[str, Any]]:
    """Fits a head in place. Returns the losses of every 20th step.

    Args:
        clips: frames of objects that move over places.
        stills: unchanged photographs.
        texts: [L, D] float32, unit vectors of the label names.
        outlined: keeps the attention on objects.
        spread: spread of a picture's cosines with texts, relative to the built-in model, for which SCALE, SHARP, SOFT
            and MARGIN were chosen.
    """
    soft = SOFT * spread
    torch.manual_seed(seed)
    single = [head.power, head.log_floor, head.slope, head.offset]
    layers = [*head.attention.parameters()], [*head.projection.parameters()], single
    groups = [{"params": own, "lr": rate * RATE} for own, rate in zip(layers, (3.0, 1.0, 10.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps, log = max(1, epochs * len(clips.tokens) // BATCH), list[dict[str, Any]]()
    whole = round(STILLS * BATCH)
    for step in range(steps):
        falling = max(0.5 * (1 + float(np.cos(np.pi * step / steps))), 0.02) * min(1.0, (step + 1) / 30)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * falling
        drawn = clips.rows(torch.randint(len(clips.tokens), (BATCH - whole,)))
        drawn = drawn.joined(stills.rows(torch.randint(len(stills.tokens), (whole,))))
        scene, subject = head(drawn.tokens.float(), drawn.change)
        objects, places, true = drawn.objects, drawn.places, drawn.true
        named = _told(SCALE / spread * subject @ texts.T, objects, true)
        asked = (objects.sum(0) + places.sum(0)).nonzero().squeeze(1)
        answers = torch.stack([scene @ texts.T, head.slope * (subject @ texts.T) + head.offset])
        scores = SHARP * SOFT * torch.logsumexp(answers / soft, 0)
        found = [_told(scores[:, asked].T, wanted[:, asked].T, true[:, asked].T) for wanted in (objects, places)]
        found.append(_told(scores[-whole:], (objects + places)[-whole:], true[-whole:]))
        away = 1 - (scene[-whole:] * subject[-whole:]).sum(1).mean()
        shape = torch.zeros(()) if outlined is None else outlined.loss(head.attention, BATCH // 4)
        optimizer.zero_grad()
        torch.stack([named, *found, away, SHAPE * shape]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 or step + 1 == steps:
            losses = {
                "label": named,
                "object": found[0],
                "place": found[1],
                "photograph": found[2],
                "still": away,
                "outline": shape,
            }
            log.append({"step": step + 1, **{name: round(float(loss.detach()), 4) for name, loss in losses.items()}})
    with torch.no_grad():
        head.offset.sub_(MARGIN * spread)
    return log


def _told(logits: Tensor, wanted: Tensor, true: Tensor) -> Tensor:
    """Mean cross entropy of rows with a wanted column, without their other true columns."""
    rows = wanted.sum(1) > 0
    share = wanted[rows] / wanted[rows].sum(1, keepdim=True)
    chances = logits[rows].masked_fill(true[rows] & (wanted[rows] == 0), -1e4).log_softmax(1)
    return -(chances * share).sum(1).mean()


def scale_of(head: SubjectHead, clips: Frames) -> SubjectScale:
    """The fitted scale of the scores, with a novelty below which the share STORED of the clips' frames lie."""
    scene, subject = head.vectors(clips)
    novelty = float(np.quantile((scene * subject).sum(1), STORED))
    slope, offset = float(head.slope.detach()), float(head.offset.detach())
    return SubjectScale(round(slope, 4), round(offset, 4), round(novelty, 4))


def marks(
    labels: Sequence[tuple[Sequence[Sequence[str]], Sequence[str]]], names: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes `objects`, `places` and `true` of Frames, from the labels of each frame's objects and place."""
    column = {name: n for n, name in enumerate(names)}
    found = torch.zeros(3, len(labels), len(names))
    for row, (things, ground) in enumerate(labels):
        found[0, row, [column[thing[0]] for thing in things]] = 1
        found[1, row, [column[label] for label in ground[:1]]] = 1
        found[2, row, [column[label] for thing in (*things, ground) for label in thing]] = 1
    return found[0], found[1], found[2] > 0


def mean_average_precision(scores: F32, wanted: NDArray[np.bool_]) -> float:
    """Mean average precision over the columns (labels) of scores [N, L], for the rows marked in `wanted` [N, L]."""
    found: list[float] = []
    for column in np.flatnonzero(wanted.any(0)):
        hits = wanted[np.argsort(-scores[:, column], kind="stable"), column]
        places = np.flatnonzero(hits) + 1
        found.append(float((np.arange(1, len(places) + 1) / places).mean()))
    return float(np.mean(found))
