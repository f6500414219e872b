"""The tokenizer of an installed model, from a file of its repository.

open_clip's own tokenizer is CLIP's merges (Radford et al. 2021) and open_clip's rules around them. A template has the
rules and the digest of the result; the merges come from any file that has them, and a wrong one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from keyreel.errors import CheckpointMismatch, ModelError
from keyreel.runtime.bundle import sha256_of
from keyreel.runtime.text import clean_text
from keyreel.types import I64

FILES = ("tokenizer.json", "merges.txt")  # file names in a repository, the better one first
HINT = "use --tokenizer with the tokenizer.json or merges.txt of these weights"


def build(known: Mapping[str, Any], path: Path) -> Tokenizer:
    """Builds the tokenizer that a template describes from a file.

    Args:
        known: `Template.tokenizer`.
        path: `tokenizer.json` in the format of Hugging Face's package tokenizers, or `merges.txt`.

    Raises:
        ModelError: the file cannot be read.
        CheckpointMismatch: the file gives another tokenizer.
    """
    if known["kind"] == "merges":
        return _from_merges(known, path)
    if (digest := sha256_of(path)) != known["sha256"]:
        wanted = str(known["sha256"])[:12]
        raise CheckpointMismatch(
            f"{path} is not the model's tokenizer: sha256 {digest[:12]}, expected {wanted}", hint=HINT
        )
    tokenizer = Tokenizer.from_file(str(path))
    pad, (end, token) = known["pad"], known["end"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, end)])
    tokenizer.enable_truncation(known["context_length"])
    tokenizer.enable_padding(length=known["context_length"], pad_id=pad[0], pad_token=pad[1])
    return tokenizer


def encode(tokenizer: Tokenizer, clean: str, texts: Sequence[str]) -> I64:
    """Converts texts to token ids, [Q, L] int64."""
    return np.array([row.ids for row in tokenizer.encode_batch([clean_text(text, clean) for text in texts])], np.int64)


def _from_merges(known: Mapping[str, Any], path: Path) -> Tokenizer:
    merges = _merges(path)[: known["merges"]]
    pieces = [*known["pieces"], *(f"{piece}</w>" for piece in known["pieces"]), *map("".join, merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)} | known["special_tokens"]
    document = json.loads(json.dumps(known["document"]))
    document["model"] |= {"vocab": vocabulary, "merges": [*merges, *known["special_merges"]]}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the package raises a bare Exception for a merge of unknown pieces
        raise CheckpointMismatch(f"{path} is not the model's tokenizer: {error}", hint=HINT) from error
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    if digest != known["sha256"]:
        raise CheckpointMismatch(f"{path} is not the model's tokenizer: {len(merges)} merges, or others", hint=HINT)
    return tokenizer


def _merges(path: Path) -> list[list[str]]:
    """Reads the pairs of pieces, in order of rank."""
    try:
        text = path.read_text("utf-8")
        if not text.lstrip().startswith("{"):  # the first line is the version
            return [line.split(" ") for line in text.splitlines()[1:] if line]
        found = json.loads(text)["model"]["merges"]
        return [pair.split(" ") if isinstance(pair, str) else [str(piece) for piece in pair] for pair in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokenizer {path} cannot be read: {error!r}", hint=HINT) from error
