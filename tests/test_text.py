"""Cleaning, tokens and text vectors of the built-in model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel import Combined, Engine
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.text import TextEncoder, Tokenizer, clean_text
from keyreel.runtime.words import misspellings, sound, stems, words_of


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    bundle = Bundle.find("builtin")
    backend = resolve("cpu", threads=1)
    return TextEncoder(bundle, backend)


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


def test_words_that_the_model_does_not_know_are_told(encoder: TextEncoder) -> None:
    assert encoder.tokenizer.unknown_words("A zwyxq DOG, zwyxq & qwrtp's 2024 cafés") == ["zwyxq", "qwrtp"]
    for text in ("", "🐕 ...", "a dog's poodles; colour or color", "people running"):
        assert encoder.tokenizer.unknown_words(text) == []
    assert encoder.tokenizer.unknown_words("犬 dog") == ["犬"]
    bundle = Bundle.find("builtin")
    plain = Tokenizer(bundle.file("tokenizer.json"), clean=bundle.clean, context_length=bundle.context_length)
    assert plain.unknown_words("zwyxq") == []  # a model without a list of words


def test_a_misspelled_word_is_read_as_the_one_that_was_meant(encoder: TextEncoder) -> None:
    for wrong, right in (
        ("an elephnat", "an elephant"),
        ("BICYLCE race", "bicycle race"),
        ("a buterfly.", "a butterfly."),
        ("an elefant", "an elephant"),
        ("bycicle race", "bicycle race"),
        ("a fotografer's kamera", "a photographer's camera"),
        ("the rinoceros", "the rhinoceros"),
    ):
        assert encoder.tokenizer.unknown_words(wrong) == []
        np.testing.assert_allclose(*encoder.encode([wrong, right]), atol=1e-5)
    assert encoder.tokenizer.unknown_words("a dgo at a CAFÉ") == ["dgo"]  # three letters may be anything
    assert encoder.tokenizer.unknown_words("zwyxq elephnat") == ["zwyxq"]


def test_words_that_sound_alike(encoder: TextEncoder) -> None:
    heard = {sound(word) for word in ("phosphor", "fosfor", "phossphor")}
    assert heard == {"fosfor"}
    assert [sound(word) for word in ("quack", "Zebra", "cycle")] == ["kak", "Zebra", "kikl"]
    assert encoder.tokenizer.unknown_words("carafe flurbish grebnak") == ["carafe", "flurbish", "grebnak"]


def test_long_words_and_texts_cost_little(encoder: TextEncoder) -> None:
    assert misspellings("x" * 25) == set()
    assert encoder.tokenizer.unknown_words("x" * 20_000) == ["x" * 20_000]
    many = " ".join(f"{'qxz'[n % 3]}{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}vwq" for n in range(600))
    assert encoder.encode([many, "word " * 5000]).shape[0] == 2


@given(word=st.text("abcdefg", min_size=5, max_size=9), data=st.data())
def test_misspellings_are_one_edit_away(word: str, data: st.DataObject) -> None:
    found = misspellings(word)
    assert word not in found
    at = data.draw(st.integers(1, len(word) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "other", "exchange"]))
    wrong = {
        "drop": word[:at] + word[at + 1 :],
        "double": word[:at] + word[at] + word[at:],
        "other": word[:at] + "z" + word[at + 1 :],
        "exchange": word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
    }[kind]
    assert wrong == word or wrong in found
    if len(wrong) >= 5 and wrong != word:
        assert word in misspellings(wrong)  # each edit has one that takes it back
    assert all(abs(len(other) - len(word)) <= 1 and other[0] == word[0] for other in found)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dogs", {"dogs", "dog"}),
        ("boxes", {"boxes", "box", "boxe"}),
        ("puppies", {"puppies", "puppy", "puppi", "puppie"}),
        ("riding", {"riding", "rid", "ride"}),
        ("baked", {"baked", "bak", "bake"}),
        ("gas", {"gas"}),
    ],
)
def test_stems(word: str, expected: set[str]) -> None:
    assert stems(word) == expected


@given(text=st.text(max_size=80))
def test_words_have_letters_only(text: str) -> None:
    found = words_of(text)
    assert all(word.isalpha() or not word.isascii() for word in found)
    assert "".join(found) == "".join(words_of(" ".join(found)))


def test_unknown_words() -> None:
    with Engine.from_pretrained(device="cpu") as engine:
        assert engine.unknown_words("a zwyxq dog") == ["zwyxq"]
        asked = Combined("a zwyxq dog", also=["snow", "qwxzt"], without=["zwyxq", np.zeros((8, 8, 3), np.uint8)])
        assert engine.unknown_words(asked) == ["zwyxq", "qwxzt"]
        known = {"a zwyxq dog": 0.5, "the zwyxq": 0, "Zwýxq & zwýxq": 0, "of the": 1, "a dog in snow": 1}
        assert {text: engine.known(text) for text in known} == known
