"""Chances: how likely a frame shows what a text says.

A score alone does not tell: some frames score high with most texts, and among many frames one scores high with any
text. So the score is compared with those of other texts, the background, with the same frame, as in the T-norm of
speaker verification (Auckenthaler et al. 2000). The number of searched pictures counts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from keyreel.runtime.bundle import ChanceScale, SubjectScale
from keyreel.types import F32

# The rank of the background text to compare with; texts with a higher cosine to the query do not count.
RANK, ALIKE = 3, 0.6
WELL = 0.3  # the lowest best chance of a good match


def matches_well(chances: Iterable[float | None]) -> bool | None:
    """Whether the best chance is at least `WELL`; None without any chance."""
    known = [chance for chance in chances if chance is not None]
    return max(known) >= WELL if known else None


def percent(chance: float) -> str:
    """Formats a chance: 0.123 is "12 %", less than 0.01 is "<1 %", since nothing is surely impossible."""
    return "<1 %" if chance < 0.01 else f"{math.floor(100 * chance + 0.5)} %"


@dataclass(frozen=True, slots=True, eq=False)
class Chances:
    """The calibration of a model, with its background of texts."""

    background: F32  # [B, D] float32, unit length
    scale: ChanceScale

    def of(self, query: F32, scale: SubjectScale, scene: F32, subject: F32 | None, pictures: int) -> float:
        """The chance, 0..1, that a frame shows what the text says, with a prior of one half.

        Args:
            query: [D] float32, unit length.
            scene, subject: [D] float32 of the frame; None if it has no subject.
            pictures: how many different pictures were searched: the shots of all videos.
        """
        return self.at(lead_of(self.background, query, scale, scene, subject), pictures)

    def at(self, lead: float, pictures: int) -> float:
        """Converts the lead over the background to a chance, by logistic regression."""
        own = self.scale
        logit = own.lead * lead + own.pictures * math.log(max(pictures, 1)) + own.offset
        return 1 / (1 + math.exp(-max(min(logit, 50.0), -50.0)))


def lead_of(background: F32, query: F32, scale: SubjectScale, scene: F32, subject: F32 | None) -> float:
    """How far the query's score with a frame exceeds that of the background, see `RANK`."""
    texts = np.concatenate([query[None], background])
    scores = texts @ scene
    if subject is not None:
        scores = np.maximum(scores, np.float32(scale.slope) * (texts @ subject) + np.float32(scale.offset))
    others = scores[1:][background @ query < ALIKE]
    if not len(others):
        return 0.0
    rank = min(RANK, len(others))
    return float(scores[0] - np.partition(others, -rank)[-rank])
