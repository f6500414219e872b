"""The words that the text tower has rows for, and the tokenizer that tells them from all others."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from keyreel.runtime.words import words_of
from keyreel_export.builtin.language import plural
from keyreel_export.builtin.phrases import bounded
from keyreel_export.builtin.student import UNKNOWN_MARK
from keyreel_export.builtin.wordnet import Entry

# Ranks in GloVe up to which words get a row: all, nouns of what can be seen, verbs and adjectives (by WordNet).
FREQUENT, VISIBLE, OTHER = 10_000, 150_000, 25_000
PIECES = 2_000  # of words that are in no list


def word_list(own: Sequence[str], entries: Sequence[Entry], rank: dict[str, int]) -> list[str]:
    """The words that get a row of their own: those of `own` texts, the frequent ones, WordNet's less frequent ones."""
    found = {word for text in own for word in words_of(text)}
    found |= {word for word, row in rank.items() if row < FREQUENT}
    for entry in entries:
        least = VISIBLE if entry.visible else 0 if entry.part == "noun" else OTHER
        several = {other for word in entry.words for part in words_of(word) for other in (part, plural(part))}
        found |= {word for word in several if rank.get(word, least) < least}
    return sorted(word for word in found if word.isascii() and word.isalpha())


def make_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A listed word is one token; another one is a mark that says so, and then pieces of bytes.

    Pieces begin without the mark, so none of them is also a listed word: "carpaccio" is not read as "car" and a rest.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["[PAD]", "[START]"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + PIECES,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for word in words:
        vocabulary.setdefault(UNKNOWN_MARK + word, len(vocabulary))
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=None, ignore_merges=True))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"['’]s\b"), ""),
            normalizers.Replace(Regex(r"['’]"), ""),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Strip(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?=\d)(?<=\p{L})|(?<=\d)(?=\p{L})"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
        ]
    )
    return bounded(made)
