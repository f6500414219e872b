"""Text to unit vectors: cleaning, tokenizer, text session."""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from keyreel.errors import ModelError
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.sessions import Session
from keyreel.types import F32, I64
from keyreel_kernels.arrays import Arrays

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
    """Cleans a text for the tokenizer. `how` is one of open_clip's: none, whitespace, lower, canonicalize."""
    if how not in _CLEANERS:
        raise ValueError(f"unknown way of cleaning {how!r}, allowed: {', '.join(_CLEANERS)}")
    return _CLEANERS[how](text)


class Tokenizer:
    """Texts -> token ids, padded and cut as in tokenizer.json."""

    def __init__(self, path: Path, *, clean: str, context_length: int) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the package raises a bare Exception
            raise ModelError(f"{path} cannot be read: {error}", hint="export the model again") from error
        self._clean = clean
        self.context_length = context_length

    def encode(self, texts: Sequence[str]) -> I64:
        """[Q, L] int64 token ids.

        Raises:
            TypeError: not a sequence of strings.
            ModelError: the tokenizer does not pad to the context length.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("expected a sequence of strings")
        if not texts:
            return np.empty((0, self.context_length), np.int64)
        rows = self._tokenizer.encode_batch([clean_text(text, self._clean) for text in texts])
        lengths = {len(row.ids) for row in rows}
        if lengths != {self.context_length}:
            raise ModelError(f"the tokenizer gives {max(lengths)} tokens, the model takes {self.context_length}")
        return np.array([row.ids for row in rows], dtype=np.int64)


class TextEncoder:
    """Texts -> unit vectors in the space of the fused frame vectors."""

    def __init__(self, bundle: Bundle, session: Session, arrays: Arrays) -> None:
        self._session, self._arrays = session, arrays
        self._width = bundle.embedding_width
        self._tokenizer = Tokenizer(
            bundle.file("tokenizer.json"), clean=bundle.clean, context_length=bundle.context_length
        )

    def encode(self, texts: Sequence[str]) -> F32:
        """[Q, D] float32, unit length."""
        ids = self._tokenizer.encode(texts)
        if not len(ids):
            return np.empty((0, self._width), np.float32)
        with self._arrays.scope():
            vectors: F32 = self._arrays.to_host(
                self._session.run({"token_ids": self._arrays.to_device(ids)})["vectors"]
            )
        return vectors

    def close(self) -> None:
        self._session.close()
