"""Encodes texts as unit vectors: cleaning, tokenizer, text tower."""

from __future__ import annotations

import functools
import html
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from keyreel.errors import ModelError
from keyreel.runtime.backend import Backend
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.words import SILENT, misspellings, sound, stems, words_of
from keyreel.types import F32, I64

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _fixed(text: str) -> str:
    # Unescaped twice, as in open_clip: captions from the web are often escaped twice.
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _canonical(text: str) -> str:
    return " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "whitespace": lambda text: " ".join(_fixed(text).split()),
    "lower": lambda text: " ".join(_fixed(text).split()).lower(),
    "canonicalize": lambda text: _canonical(_fixed(text)),
}


def clean_text(text: str, how: str) -> str:
    """Cleans a text for the tokenizer. `how` is one of open_clip's: none, whitespace, lower, canonicalize.

    Raises:
        ValueError: `how` is unknown.
    """
    if how not in _CLEANERS:
        raise ValueError(f"unknown way of cleaning {how!r}, allowed: {', '.join(_CLEANERS)}")
    return _CLEANERS[how](text)


class Tokenizer:
    """Converts texts to token ids, padded and cut as tokenizer.json says."""

    def __init__(self, path: Path, *, clean: str, context_length: int, unknown_mark: str | None = None) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the package raises a bare Exception
            raise ModelError(f"{path} cannot be read: {error}", hint="export the model again") from error
        self._clean = clean
        self._mark = unknown_mark
        self.context_length = context_length

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer:
        """The tokenizer of a bundle."""
        return cls(
            bundle.file("tokenizer.json"),
            clean=bundle.clean,
            context_length=bundle.context_length,
            unknown_mark=bundle.unknown_mark,
        )

    def encode(self, texts: Sequence[str]) -> I64:
        """Converts texts to [Q, L] int64 token ids.

        Raises:
            TypeError: `texts` is not a sequence of strings.
            ModelError: the tokenizer does not pad to the context length.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("expected a sequence of strings")
        if not texts:
            return np.empty((0, self.context_length), np.int64)
        rows = self._tokenizer.encode_batch([self._spelled(clean_text(text, self._clean)) for text in texts])
        lengths = {len(row.ids) for row in rows}
        if lengths != {self.context_length}:
            raise ModelError(f"the tokenizer gives {max(lengths)} tokens, the model takes {self.context_length}")
        return np.array([row.ids for row in rows], dtype=np.int64)

    def unknown_words(self, text: str) -> list[str]:
        """Lists the words of a text that the model has no token for, without repeats, in order.

        Inflections and misspellings of listed words are known. Without a list of words it returns [].
        """
        return [word for word in self._words(text) if not self._listed(stems(word))]

    def known(self, text: str) -> float:
        """Fraction of a text's words that the model has tokens for, 0..1. Words such as "the" do not count."""
        said = [word for word in self._words(text) if word not in SILENT]
        return sum(bool(self._listed(stems(word))) for word in said) / len(said) if said else 1.0

    def _words(self, text: str) -> dict[str, None]:
        return dict.fromkeys(words_of(self._spelled(clean_text(text, self._clean))))

    def _spelled(self, text: str) -> str:
        """Corrects a text: replaces an unlisted word by the only listed one that it may misspell.

        Words that sound alike come before words that differ by a letter.
        """
        if self._mark is None:
            return text
        text = self._tokenizer.normalizer.normalize_str(text)
        for word in dict.fromkeys(words_of(text)[: self.context_length]):  # the model reads no more
            if self._listed(stems(word)):
                continue
            meant = self._sounding.get(sound(word)) or self._listed(misspellings(word))
            if len(meant) == 1:
                text = re.sub(rf"(?<![^\W\d_]){word}(?![^\W\d_])", next(iter(meant)), text, flags=re.IGNORECASE)
        return text

    @functools.cached_property
    def _sounding(self) -> dict[str, set[str]]:
        """The listed words of four letters or more, by their sound."""
        found: dict[str, set[str]] = {}
        for token in self._tokenizer.get_vocab():
            word = token.removeprefix(self._mark or "")
            if word != token and len(word) >= 4:
                found.setdefault(sound(word), set()).add(word)
        return found

    def _listed(self, words: set[str]) -> set[str]:
        """The words that have a token; all words if the model has no list."""
        if self._mark is None:
            return words
        return {word for word in words if self._tokenizer.token_to_id(self._mark + word) is not None}


class TextEncoder:
    """Encodes texts in the space of the frame vectors."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._session, self._arrays = backend.open_session(bundle.file("text.onnx")), backend.ops.arrays
        self._width = bundle.embedding_width
        self.tokenizer = Tokenizer.of(bundle)

    def encode(self, texts: Sequence[str]) -> F32:
        """Encodes texts as [Q, D] float32 vectors of unit length."""
        ids = self.tokenizer.encode(texts)
        if not len(ids):
            return np.empty((0, self._width), np.float32)
        with self._arrays.scope():
            vectors: F32 = self._arrays.to_host(
                self._session.run({"token_ids": self._arrays.to_device(ids)})["vectors"]
            )
        return vectors

    def close(self) -> None:
        """Frees the text tower."""
        self._session.close()
