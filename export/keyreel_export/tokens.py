"""Exports open_clip's tokenizers as tokenizer.json, which the package tokenizers reads without torch or open_clip.

`transformers` converts CLIP's tokenizer too, but its ids differ on two texts of the corpus: runs of punctuation after
a URL, and special tokens inside a text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped]
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from keyreel.errors import ModelError
from keyreel.models.tokenizers import encode
from keyreel_export.torchvision_cpu import import_open_clip

CORPUS = (
    "",
    " ",
    "a photo of a cat",
    "A Dog's life; it's HERS, they'll say I'd've gone\u2026",
    "\u732b\u304c\u597d\u304d\u3067\u3059 \u4f60\u597d\uff0c\u4e16\u754c \uc548\ub155\ud558\uc138\uc694",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 flags",
    "cafe\u0301 na\u00efve A\u030a \u0130stanbul stra\u00dfe \u017ftone",
    "&lt;b&gt; &amp;amp; &quot;fish&quot; &eacute;",
    "  tabs\tand\nnewlines\u3000wide\u00a0hard  ",
    "3.14159 2026-11-22 v1.2b \u00bd \u0664",
    "snake_case CamelCase http://example.org/?q=1#x ... !!! ~~~",
    "<start_of_text> inside <end_of_text>!<end_of_text>",
    "word " * 200,
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 5,
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
)


def export_tokenizer(tokenizer: Any) -> tuple[Tokenizer, str]:
    """Rebuilds one of open_clip's tokenizers and checks it on `CORPUS`.

    Returns:
        The tokenizer, which pads and cuts to the context length, and how to clean texts before it (the `how` of
        `keyreel.runtime.text.clean_text`).

    Raises:
        ModelError: the tokenizer is not supported, or its copy gives other ids.
    """
    import_open_clip()
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.reduction_fn is not None or len(tokenizer.all_special_ids) != 2:
            raise ModelError("a SimpleTokenizer with a reduction mask or more special tokens is not supported")
        rebuilt, clean = _from_simple(tokenizer), _clean_name(tokenizer.clean_fn)
    elif isinstance(tokenizer, HFTokenizer | SigLipTokenizer):
        if getattr(tokenizer, "tokenizer_mode", "") or getattr(tokenizer, "strip_sep_token", False):
            raise ModelError("a tokenizer that rewrites its ids (tokenizer_mode, strip_sep_token) is not supported")
        rebuilt = _from_hugging_face(tokenizer)
        clean = _clean_name(tokenizer.clean_fn) if isinstance(tokenizer, HFTokenizer) else "canonicalize"
    else:
        raise ModelError(f"a tokenizer of type {type(tokenizer).__name__} is not supported")
    for text in CORPUS:
        if not np.array_equal(encode(rebuilt, clean, [text]), tokenizer([text]).numpy()):
            raise ModelError(f"tokenizer.json gives other ids than open_clip for {text[:60]!r}")
    return rebuilt, clean


def described(tokenizer: Any) -> dict[str, Any]:
    """The data that `keyreel.models.tokenizers` needs, besides the merges, to rebuild a tokenizer of open_clip."""
    rebuilt, clean = export_tokenizer(tokenizer)
    text = rebuilt.to_str()
    document = json.loads(text)
    vocabulary, merges = document["model"].pop("vocab"), document["model"].pop("merges")
    count = len(tokenizer.bpe_ranks)
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    own = {*ordered[:512], *("".join(pair) for pair in merges[:count])}
    return {
        "kind": "merges",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "clean": clean,
        "context_length": tokenizer.context_length,
        "document": document,
        "pieces": ordered[:256],
        "merges": count,
        "special_merges": merges[count:],
        "special_tokens": {token: vocabulary[token] for token in ordered if token not in own},
    }


def _clean_name(function: Any) -> str:
    from open_clip.tokenizer import get_clean_fn

    for name in ("lower", "canonicalize", "whitespace"):
        if get_clean_fn(name) is function:
            return name
    raise ModelError(f"the tokenizer cleans texts with {function!r}, which is not one of open_clip's own ways")


def _from_simple(tokenizer: Any) -> Tokenizer:
    """Byte-level BPE with </w> at the end of words.

    open_clip's regular expression finds a special token only where a match starts: "!<end_of_text>" is punctuation and
    words. The package's added tokens would match anywhere, so the special tokens become the last merges of the model,
    which no other text reaches.
    """
    vocabulary = dict(tokenizer.encoder)
    merges: list[tuple[str, str]] = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    specials = [tokenizer.decoder[number] for number in tokenizer.all_special_ids]
    for special in specials:
        number = vocabulary.pop(special)
        kept = tokenizer.cache.pop(special)  # else `bpe` returns the special token itself
        pieces = tokenizer.bpe(special).split(" ")
        tokenizer.cache[special] = kept
        whole = pieces[0]
        for piece in pieces[1:]:
            merges.append((whole, piece))
            whole += piece
            vocabulary.setdefault(whole, len(tokenizer.encoder) + len(vocabulary))
        vocabulary[whole] = number
    start, end = (f"{special}</w>" for special in specials)

    rebuilt = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    words = "|".join(_any_case(word) for word in (*specials, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"))
    letter, number, other = (_spelt_out(kind) for kind in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
    pattern = Regex(f"{words}|{letter}+|{number}|{other}+")
    rebuilt.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rebuilt.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    rebuilt.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    _fit(rebuilt, tokenizer.context_length, pad_id=0, pad_token=tokenizer.decoder[0])
    return rebuilt


def _any_case(word: str) -> str:
    # Instead of (?i), since the engines fold several letters differently. The long s is Python's.
    variants = {letter: letter + letter.upper() for letter in word if letter.isalpha()}
    if "s" in variants:
        variants["s"] += "\u017f"
    return "".join(f"[{variants[letter]}]" if letter in variants else letter for letter in word)


@functools.cache
def _spelt_out(character_class: str) -> str:
    """Converts a character class of the package regex to ranges of code points.

    The package tokenizers has the tables of another version of Unicode, with 17,000 other letters.
    """
    # All of Unicode but the surrogates; a run of matches is a range.
    runs = regex.compile(f"{character_class}+", regex.IGNORECASE)
    ranges = [
        (start + found.start(), start + found.end() - 1)
        for start, stop in ((0, 0xD800), (0xE000, 0x110000))
        for found in runs.finditer("".join(map(chr, range(start, stop))))
    ]
    return "[" + "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in ranges) + "]"


def _from_hugging_face(tokenizer: Any) -> Tokenizer:
    inner = tokenizer.tokenizer
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(inner).__name__} is not a fast tokenizer of Hugging Face's, it has no tokenizer.json")
    rebuilt = Tokenizer.from_str(backend.to_str())
    _fit(rebuilt, tokenizer.context_length, pad_id=int(inner.pad_token_id), pad_token=str(inner.pad_token))
    if inner.padding_side != "right":
        rebuilt.enable_padding(**{**(rebuilt.padding or {}), "direction": inner.padding_side})
    return rebuilt


def _fit(tokenizer: Tokenizer, context_length: int, *, pad_id: int, pad_token: str) -> None:
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=pad_id, pad_token=pad_token)
