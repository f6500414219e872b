"""Chances, against the formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import unit

from keyreel.chance import ALIKE, RANK, Chances
from keyreel.engine import Engine
from keyreel.runtime.bundle import ChanceScale, SubjectScale
from keyreel.search import Asked

SCALE = ChanceScale(("a",), 17.0, -0.6, 0.5)


@given(number=st.integers(0, 10_000), texts=st.integers(0, 40), pictures=st.integers(0, 10**6), subjects=st.booleans())
def test_the_formula(number: int, texts: int, pictures: int, subjects: bool) -> None:
    draw = np.random.default_rng(number)
    background, query = unit(draw.normal(size=(texts, 6))), unit(draw.normal(size=(1, 6)))[0]
    scene, subject = unit(draw.normal(size=(2, 6)))
    scale = SubjectScale(1.5, -0.1)

    def score(text: np.ndarray) -> float:
        own = [float(text.astype(np.float64) @ scene)]
        return max(own + ([1.5 * float(text.astype(np.float64) @ subject) - 0.1] if subjects else []))

    others = sorted((score(text) for text in background if float(text @ query) < ALIKE), reverse=True)
    lead = score(query) - others[min(RANK, len(others)) - 1] if others else 0.0
    logit = 17 * lead - 0.6 * math.log(max(pictures, 1)) + 0.5
    found = Chances(background, SCALE).of(query, scale, scene, subject if subjects else None, pictures)
    assert found == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-4)


def test_the_lowest_of_several_texts_counts() -> None:
    draw = np.random.default_rng(0)
    chances = Chances(unit(draw.normal(size=(30, 6))), SCALE)
    vectors, scene = unit(draw.normal(size=(4, 6))), unit(draw.normal(size=(1, 6)))[0]
    plain = SubjectScale()
    each = [chances.of(vector, plain, scene, None, 3) for vector in vectors]
    asked = Asked(vectors, (plain,) * 4, (0.5, 0.5, 0.2, -0.2), (1.0, 0.25, None), chances)
    assert asked.chance(scene, None, 3) == min(each[0], 0.25 * each[1])
    assert Asked(vectors[:1], (plain,), (1.0,)).chance(scene, None, 3) is None


def test_the_background_of_the_built_in_model_is_encoded_once(engine: Engine) -> None:
    chances = engine.chances()
    assert chances is not None
    assert chances is engine.chances()
    assert chances.background.shape == (len(chances.scale.background), engine.bundle.embedding_width)
