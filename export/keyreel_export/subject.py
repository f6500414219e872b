"""The subject's side of an exported model: calibrated on drawn pictures, or fitted to labelled ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from keyreel.config import ImageTransform
from keyreel.models import calibration
from keyreel.runtime.bundle import SubjectScale
from keyreel.search import frame_scores
from keyreel.types import F32, U8
from keyreel_export.fit import (
    BATCH,
    Frames,
    SubjectHead,
    TokenAttention,
    fit_subject,
    mean_average_precision,
    scale_of,
)
from keyreel_export.fusion import TemporalSpatialFusion
from keyreel_export.pictures import HELD_CLIPS, Picture, clip_count, clips, moving_frames, still_frames
from keyreel_export.towers import Tower

EPOCHS = 16
FITTED = "subject.safetensors"

Texts = Callable[[Sequence[str]], Tensor]  # texts -> unit vectors [L, D]


@dataclass(frozen=True, slots=True)
class ImageSide:
    """A model's image side without training."""

    tower: Tower
    attention: nn.Module
    attention_input: str  # "frames" or "tokens"
    fusion: TemporalSpatialFusion
    image: ImageTransform

    def maps(self, frames: U8, tokens: F32) -> Tensor:
        """[N, P]."""
        with torch.no_grad():
            return self.attention(torch.from_numpy(frames if self.attention_input == "frames" else tokens))  # type: ignore[no-any-return]

    def vectors(self, tokens: Tensor, maps: Tensor, change: Tensor) -> tuple[F32, F32]:
        """Scenes and subjects [N, D] of tokens [N, R+P, C]."""
        found: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for first in range(0, len(tokens), BATCH):
                own = slice(first, first + BATCH)
                found.append(self.fusion(tokens[own].float(), maps[own], change[own])[:2])
        scene, subject = (torch.cat(part).numpy() for part in zip(*found, strict=True))
        return scene, subject


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of a fit."""

    head: SubjectHead
    scale: SubjectScale
    measured: dict[str, float]


def calibrate(side: ImageSide, texts: Texts) -> calibration.Calibration:
    """Calibrates a model on the pictures of `keyreel.models.calibration`."""
    drawn, vectors = calibration.pictures(side.image), list[tuple[F32, F32]]()
    for first in range(0, len(drawn), 16):
        frames = drawn[first : first + 16]
        with torch.no_grad():
            tokens = side.tower(torch.from_numpy(frames))
        maps = side.maps(frames, tokens.numpy())
        vectors.append(side.vectors(tokens, maps, torch.zeros_like(maps)))
    scene, subject = (np.concatenate(part) for part in zip(*vectors, strict=True))
    return calibration.calibrate(scene, subject, texts(calibration.WORDS).numpy())


def fit_to_pictures(
    side: ImageSide, texts: Texts, fitted: Sequence[Picture], held: Sequence[Picture], *, epochs: int, seed: int
) -> Fit:
    """Fits the subject's side to some pictures, and measures it on others."""
    names = sorted({label for picture in (*fitted, *held) for label in picture.labels})
    tower, told = side.tower, texts(names)
    calibrated = calibrate(side, texts)
    count = clip_count(tower, len(fitted))
    moving, _ = moving_frames(tower, clips(fitted, side.image, seed), count, names, side.maps)
    still = still_frames(tower, fitted, side.image, names)
    attention = TokenAttention(tower.token_width, tower.grid, tower.prefix_tokens)
    head = SubjectHead(tower, side.fusion.projection, attention, _trainable(side.fusion.projection, tower))
    fit_subject(head, moving, still, told, epochs=epochs, seed=seed, spread=calibrated.spread)
    scale = scale_of(head, moving)
    seen, maps = moving_frames(tower, clips(held, side.image, seed + 1), HELD_CLIPS, names, side.maps)
    without = side.vectors(seen.tokens, maps, seen.change)
    answers = {
        "scene": without[0] @ told.numpy().T,
        "training_free": frame_scores(*without, told.numpy().T, calibrated.scale).best,
        "fitted": frame_scores(*head.vectors(seen), told.numpy().T, scale).best,
    }
    measured = {"fitted_pictures": float(len(fitted)), "held_out_pictures": float(len(held))}
    measured["held_out_frames"] = float(len(seen.tokens))
    for way, scores in answers.items():
        measured |= {f"held_out_{kind}_{way}": found for kind, found in _precision(scores, seen).items()}
    return Fit(head, scale, measured)


def _trainable(projection: nn.Module, tower: Tower) -> nn.Module:
    """The start of the subject's layer: the scene's layer or, if that has no weights, an identity."""
    if any(True for _ in projection.parameters()):
        return projection
    layer = nn.Linear(tower.feature_width, tower.embedding_width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _precision(scores: F32, seen: Frames) -> dict[str, float]:
    """Mean average precision of labels of what moves, and of places."""
    found: dict[str, float] = {}
    for kind in ("objects", "places"):
        wanted = getattr(seen, kind).numpy() > 0
        others = seen.true.numpy() & ~wanted  # also true of the frame, so neither right nor wrong: last
        found[kind] = round(mean_average_precision(np.where(others, -np.inf, scores), wanted), 4)
    return found


def write_tensors(fit: Fit, folder: Path) -> None:
    """Writes all fitted tensors, by name, in float32."""
    head, scale = fit.head, fit.scale
    found = {f"attention.{name}": own for name, own in head.attention.state_dict().items()}
    found |= {f"projection.{name}": own for name, own in head.projection.state_dict().items()}
    found |= {"power": head.power.detach(), "floor": head.log_floor.detach().exp()}
    found |= {name: torch.tensor(getattr(scale, name)) for name in ("slope", "offset", "novelty")}
    save_file({name: own.detach().clone().contiguous() for name, own in found.items()}, folder / FITTED)


def digest(layer: nn.Module) -> str:
    """The sha256 of a layer's weights."""
    found = hashlib.sha256()
    for own in layer.state_dict().values():
        found.update(own.detach().numpy().tobytes())
    return found.hexdigest()
