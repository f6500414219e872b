"""tokenizer.json and keyreel's cleaning against open_clip's own tokenizers, end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import tokenizers as package
from hypothesis import given, settings
from hypothesis import strategies as st

from keyreel.errors import ModelError
from keyreel.models import tokenizers
from keyreel.runtime.text import clean_text
from keyreel_export import tokens
from keyreel_export.torchvision_cpu import import_open_clip

pytestmark = pytest.mark.full

open_clip = import_open_clip()

EXTRA = [
    "\u200b zero \u2060 width \ufeff joiner",
    "e\u0301\u0323 o\u0308\u0304 combining, \u0345 \u1e9e \ufb06 ligature",
    "&#x1F600; &nbsp;&nbsp; &amp;lt;",
    "\x00 \x1c\x1d\x1e\x1f \x85 control",
    "!<start_of_text>",
    "<START_OF_TEXT> x",
    "'\u017f 'S 'T 'RE don't DON'T",
    "\U0002ebf0\U000323b0\u1c89 letters of late Unicode",
    "\u00e2\u20ac\u2122 mojibake \u00c3\u00a9",
    "x" * 3000,
    "1234567890" * 20,
    "\U0001f1ec\U0001f1e7\U0001f1eb\U0001f1f7 \u2764\ufe0f\u200d\U0001f525",
]


@pytest.fixture(scope="module")
def simple() -> tuple[Any, package.Tokenizer, str]:
    original = open_clip.get_tokenizer("ViT-B-32")
    rebuilt, clean = tokens.export_tokenizer(original)
    # Through JSON, as a bundle does.
    return original, package.Tokenizer.from_str(rebuilt.to_str()), clean


def assert_same(simple: tuple[Any, package.Tokenizer, str], texts: list[str]) -> None:
    original, rebuilt, clean = simple
    np.testing.assert_array_equal(tokenizers.encode(rebuilt, clean, texts), original(texts).numpy())


def test_corpus(simple: tuple[Any, package.Tokenizer, str]) -> None:
    assert simple[2] == "lower"
    assert_same(simple, [*tokens.CORPUS, *EXTRA])


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(simple: tuple[Any, package.Tokenizer, str], text: str) -> None:
    assert_same(simple, [text])


_PIECES = ["<start_of_text>", "<end_of_text>", *"<>! '7\u00e9\u4e2d_", "'s", "&amp;", "&lt;", "the"]


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(_PIECES), max_size=12))
def test_special_tokens_and_punctuation_in_any_order(
    simple: tuple[Any, package.Tokenizer, str], pieces: list[str]
) -> None:
    assert_same(simple, ["".join(pieces)])


def test_words_are_cut_alike_for_every_character(simple: tuple[Any, package.Tokenizer, str]) -> None:
    """Each 23rd character of Unicode between letters, digits and punctuation."""
    original, rebuilt, clean = simple
    for code in range(0, 0x110000, 23):
        if 0xD800 <= code < 0xE000:
            continue
        text = clean_text(f"a{chr(code)}1{chr(code)}b!{chr(code)}", clean)
        expected = [
            "".join(original.byte_encoder[byte] for byte in word.encode()) for word in original.pat.findall(text)
        ]
        assert [word for word, _ in rebuilt.pre_tokenizer.pre_tokenize_str(text)] == expected, hex(code)


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_other_cleaning_and_length(clean: str) -> None:
    original = open_clip.SimpleTokenizer(context_length=16, clean=clean)
    rebuilt, found = tokens.export_tokenizer(original)
    assert found == clean
    assert_same((original, rebuilt, found), [*tokens.CORPUS, *EXTRA])


class _Fast:
    """What transformers' fast tokenizers have of the interface that is used."""

    def __init__(self, backend: package.Tokenizer | None) -> None:
        self.backend_tokenizer = backend
        self.pad_token_id, self.pad_token, self.padding_side = 1, "</s>", "right"

    def __call__(self, texts: list[str], **options: Any) -> Any:
        import torch

        assert self.backend_tokenizer is not None
        rows = [self.backend_tokenizer.encode(text).ids for text in texts]
        length = options["max_length"]
        cut = [[*row[: length - 1], 1] if len(row) > length else row for row in rows]
        ids = torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in cut])
        return type("Encoding", (), {"input_ids": ids})()


def hugging_face(backend: package.Tokenizer | None, **changes: Any) -> Any:
    from open_clip.tokenizer import HFTokenizer, get_clean_fn

    made = HFTokenizer.__new__(HFTokenizer)
    made.tokenizer, made.tokenizer_mode, made.context_length = _Fast(backend), "", 12
    made.clean_fn, made.strip_sep_token = get_clean_fn("canonicalize"), False
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def word_level() -> package.Tokenizer:
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "photo": 3, "of": 4, "cat": 5, "word": 6}
    backend = package.Tokenizer(package.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = package.pre_tokenizers.Whitespace()
    backend.post_processor = package.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def test_hugging_face_fast_tokenizer() -> None:
    original = hugging_face(word_level())
    rebuilt, clean = tokens.export_tokenizer(original)
    assert clean == "canonicalize"
    assert_same((original, rebuilt, clean), [*tokens.CORPUS, *EXTRA])
    assert tokenizers.encode(rebuilt, clean, ["A photo, of_a CAT!"]).tolist() == [[2, 3, 4, 2, 5] + [1] * 7]


@pytest.mark.parametrize(
    ("original", "words"),
    [
        (hugging_face(None), "not a fast tokenizer"),
        (hugging_face(word_level(), strip_sep_token=True), "rewrites its ids"),
        (hugging_face(word_level(), tokenizer_mode="clips"), "rewrites its ids"),
        (open_clip.SimpleTokenizer(reduction_mask="simple"), "reduction mask"),
        (open_clip.SimpleTokenizer(additional_special_tokens=["<x>"]), "more special tokens"),
        (object(), "type object"),
    ],
)
def test_unsupported_tokenizers(original: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        tokens.export_tokenizer(original)


def test_a_difference_is_found() -> None:
    original = open_clip.SimpleTokenizer(context_length=16)
    original.eot_token_id = 5  # what a cut text ends with; tokenizer.json takes the last special id
    with pytest.raises(ModelError, match="other ids than open_clip"):
        tokens.export_tokenizer(original)
