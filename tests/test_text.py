"""Cleaning, tokens and text vectors of the built-in model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.text import TextEncoder, Tokenizer, clean_text


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    bundle = Bundle.find("builtin")
    backend = resolve("cpu", threads=1)
    return TextEncoder(bundle, backend.open_session(bundle.file("text.onnx")), backend.ops.arrays)


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("  A  Dog\n\tRuns ", "lower", "a dog runs"),
        ("  A  Dog\n\tRuns ", "whitespace", "A Dog Runs"),
        ("Tom &amp;amp; Jerry", "lower", "tom & jerry"),
        ("schÃ¶n", "lower", "schön"),
        ("a_dog, (running)!", "canonicalize", "a dog running"),
        ("  as it is ", "none", "  as it is "),
        ("", "lower", ""),
    ],
)
def test_clean_text(text: str, how: str, expected: str) -> None:
    assert clean_text(text, how) == expected


def test_unknown_way_of_cleaning() -> None:
    with pytest.raises(ValueError, match="canonicalize"):
        clean_text("a", "upper")


def test_tokens_are_padded_and_cut_to_the_context_length() -> None:
    bundle = Bundle.find("builtin")
    tokenizer = Tokenizer(bundle.file("tokenizer.json"), clean=bundle.clean, context_length=bundle.context_length)
    ids = tokenizer.encode(["a dog", "", "word " * 500, "犬が走る 🐕", "A DOG"])
    assert ids.shape == (5, bundle.context_length)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids[0], ids[4])
    assert (ids[0] != ids[2]).any()
    with pytest.raises(TypeError, match="sequence of strings"):
        tokenizer.encode("a dog")


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_gives_a_finite_unit_vector(encoder: TextEncoder, text: str) -> None:
    vector = encoder.encode([text])
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector[0]) == pytest.approx(1, abs=1e-4)


def test_a_batch_equals_its_texts_alone(encoder: TextEncoder) -> None:
    texts = ["a red circle", "a dog", "", "a man rides a horse on a beach at sunset in the summer"]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=1e-5)
    assert encoder.encode([]).shape == (0, alone.shape[1])
