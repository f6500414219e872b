"""How likely a frame shows what a text says.

A score alone does not tell: some frames score high with most texts, and among many frames one scores high with any. So
the score is compared with those of a background of other texts with the same frame, as the T-norm of speaker
verification does (Auckenthaler et al. 2000), and the number of pictures that were searched counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from keyreel.runtime.bundle import ChanceScale, SubjectScale
from keyreel.types import F32

# The score is compared with the third best of the background texts whose cosine with the query is lower.
RANK, ALIKE = 3, 0.6
WELL = 0.3  # the best chance from which on something matches well


def matches_well(chances: Iterable[float | None]) -> bool | None:
    """Whether the best chance is high enough; None where there is none."""
    known = [chance for chance in chances if chance is not None]
    return max(known) >= WELL if known else None


def percent(chance: float) -> str:
    """0.123 -> "12 %", and "<1 %" below that: nothing is known to be impossible."""
    return "<1 %" if chance < 0.01 else f"{math.floor(100 * chance + 0.5)} %"


@dataclass(frozen=True, slots=True, eq=False)
class Chances:
    """The calibration of a model, with its background of texts."""

    background: F32  # [B, D] float32, unit length
    scale: ChanceScale

    def of(self, query: F32, scale: SubjectScale, scene: F32, subject: F32 | None, pictures: int) -> float:
        """In 0..1: of a text that is there in half of all cases.

        Args:
            query: [D] float32, unit length.
            scene, subject: [D] float32, of the frame; None where it has no subject of its own.
            pictures: how many different ones were searched, such as the shots of all videos.
        """
        return self.at(lead_of(self.background, query, scale, scene, subject), pictures)

    def at(self, lead: float, pictures: int) -> float:
        """The chance with a lead over the background."""
        own = self.scale
        logit = own.lead * lead + own.pictures * math.log(max(pictures, 1)) + own.offset
        return 1 / (1 + math.exp(-max(min(logit, 50.0), -50.0)))


def lead_of(background: F32, query: F32, scale: SubjectScale, scene: F32, subject: F32 | None) -> float:
    """By how much the query's score with a frame is above that of the background, see `RANK`."""
    texts = np.concatenate([query[None], background])
    scores = texts @ scene
    if subject is not None:
        scores = np.maximum(scores, np.float32(scale.slope) * (texts @ subject) + np.float32(scale.offset))
    others = scores[1:][background @ query < ALIKE]
    if not len(others):
        return 0.0
    rank = min(RANK, len(others))
    return float(scores[0] - np.partition(others, -rank)[-rank])
