"""A bundle of a tiny model for tests without PyTorch: `data/keyreel-tiny-vit.xz` with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds

from keyreel.models import catalogue, install
from keyreel.models.template import Template
from keyreel.runtime.bundle import sha256_of

TEMPLATE = Path(__file__).parent / "data" / "keyreel-tiny-vit.xz"
ENDS = {"kind": "file", "clean": "canonicalize", "context_length": 77, "pad": [0, "<pad>"], "end": [1, "<eos>"]}
PIECES = ("<pad>", "<eos>", "<unk>", "a", "dog", "red", "circle", "sea", "night")


def write_words(path: Path) -> Path:
    """A tokenizer.json of a few words."""
    made = Tokenizer(kinds.WordLevel({piece: n for n, piece in enumerate(PIECES)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path))
    return path


def random_tensors(seed: int = 0) -> dict[str, Any]:
    """A checkpoint, float32."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in Template.read(TEMPLATE).tensors.items()
    }


def put_in_catalogue(patch: pytest.MonkeyPatch, words: Path, weights: catalogue.Weights) -> None:
    """Makes the tiny architecture the only one that there is."""
    template = Template.read(TEMPLATE)
    template = dataclasses.replace(template, tokenizer={**ENDS, "sha256": sha256_of(words)})
    patch.setattr(Template, "find", lambda *_: template)
    patch.setattr(catalogue, "CATALOGUE", (weights,))
    patch.setattr(catalogue, "ARCHITECTURES", (weights.architecture,))
    patch.setattr(install, "CATALOGUE", (weights,))


def write_bundle(folder: Path, *, seed: int = 0) -> Path:
    """A bundle called "tiny" in `folder`/tiny."""
    folder.mkdir(parents=True, exist_ok=True)
    words = write_words(folder / "tokenizer.json")
    save_file(random_tensors(seed), folder / "weights.safetensors")
    weights = catalogue.Weights("keyreel-tiny-vit/tests", "o/r", "0" * 40, "0" * 64, 1, "none", "tests", 1.0, 32)
    with pytest.MonkeyPatch.context() as patch:
        put_in_catalogue(patch, words, weights)
        return install.install(
            "keyreel-tiny-vit",
            checkpoint=folder / "weights.safetensors",
            tokenizer=words,
            called="tiny",
            folder=folder / "tiny",
        )
