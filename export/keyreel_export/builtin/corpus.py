"""The phrases that the text tower learns from: names, words, lemmas, definitions, captions, made-up sentences."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keyreel.runtime.words import words_of
from keyreel.types import F32
from keyreel_export.builtin.language import pick, plural
from keyreel_export.builtin.phrases import TEMPLATES
from keyreel_export.builtin.vocabulary import VISIBLE
from keyreel_export.builtin.wordnet import Entry

LEMMAS, DEFINED, SENTENCES = 15_000, 50_000, 50_000  # of several words; definitions and examples; made-up ones
LONGEST = 14  # words of a definition
SHARES = {
    "names": 0.2,
    "words": 0.2,
    "lemmas": 0.08,
    "defined": 0.18,
    "captions": 0.04,
    "scenes": 0.06,
    "sentences": 0.24,
}
ODD, MISSPELLED = 0.15, 0.15  # of the phrases


@dataclass(frozen=True, slots=True)
class Phrases:
    """What is learned from, by kind: texts, and where they belong, [n, D] unit."""

    texts: dict[str, list[str]]
    targets: dict[str, Tensor]

    def draw(self, count: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Random phrases of all kinds, as a careless user writes them, with their targets [n, D]."""
        texts, rows = [], []
        for kind, share in SHARES.items():
            own = self.texts[kind]
            for n in rng.integers(0, len(own), round(count * share)).tolist() if own else ():
                text = own[n]
                if kind in ("names", "words", "lemmas"):
                    text = plural(text) if rng.random() < 0.15 else text
                    text = pick(TEMPLATES, rng).format(text) if rng.random() < 0.4 else text
                texts.append(careless(text, rng))
                rows.append(self.targets[kind][n])
        return texts, torch.stack(rows).float()


def careless(text: str, rng: np.random.Generator) -> str:
    """The text, in some cases with a word of no language or a number, or with one letter of a long word wrong."""
    words = text.split()
    if rng.random() < MISSPELLED:
        long = [n for n, word in enumerate(words) if len(word) > 4 and word.isalpha()]
        if long:
            place = pick(long, rng)
            words[place] = misspelled(words[place], rng)
    if rng.random() < ODD:
        odd = str(rng.integers(2100)) if rng.random() < 0.2 else _pick_letters(int(rng.integers(3, 10)), rng)
        words.insert(int(rng.integers(len(words) + 1)), odd)
    return " ".join(words)


def misspelled(word: str, rng: np.random.Generator) -> str:
    """One letter after the first is left out, doubled, exchanged for the next, or another one."""
    at = int(rng.integers(1, len(word) - 1))
    ways = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    kind = int(rng.integers(4))
    return ways[kind] if kind < 3 else word[:at] + _pick_letters(1, rng) + word[at + 1 :]


def _pick_letters(count: int, rng: np.random.Generator) -> str:
    return "".join(string.ascii_lowercase[int(n)] for n in rng.integers(0, 26, count))


def make_phrases(
    names: Sequence[str],
    captions: Sequence[str],
    listed: Sequence[str],
    entries: Sequence[Entry],
    rank: dict[str, int],
    grammar: dict[str, list[str]],
    seed: int,
) -> dict[str, list[str]]:
    """All texts, by kind. Lemmas and definitions are of listed words, for the greater part."""
    rng, there = np.random.default_rng(seed), frozenset(listed)

    def mostly(text: str) -> bool:
        words = words_of(text)
        return bool(words) and sum(word in there for word in words) > 0.7 * len(words)

    lemmas = {w for e in entries for w in e.words if (e.visible or e.part != "noun") and len(w.split()) > 1}
    defined = {" ".join(said.split()[:LONGEST]) for e in entries if e.visible or e.part == "verb" for said in e.said}

    def some(texts: set[str], count: int) -> list[str]:
        usable = sorted(text for text in texts if mostly(text))
        return [usable[int(n)] for n in rng.permutation(len(usable))[:count]]

    return {
        "names": list(names),
        "words": list(listed),
        "lemmas": some(lemmas, LEMMAS),
        "defined": some(defined, DEFINED),
        "captions": list(captions),
        "sentences": make_sentences(names, listed, entries, rank, grammar, rng),
    }


def make_sentences(
    names: Sequence[str],
    listed: Sequence[str],
    entries: Sequence[Entry],
    rank: dict[str, int],
    grammar: dict[str, list[str]],
    rng: np.random.Generator,
) -> list[str]:
    """Sentences of the patterns in grammar.txt, with things, deeds and looks from all of WordNet."""
    there = frozenset(listed)
    pools: dict[str, Pool] = {}
    for part, slots in {"noun": ("thing", "thing2", "place"), "verb": ("verb", "action"), "adj": ("adj",)}.items():
        counts = Counter(
            w for e in entries if e.part == part and (e.visible or part != "noun") for w in e.words if w in there
        )
        words = [participle(word) for word in counts] if part == "verb" else list(counts)
        # The more frequent the likelier, but less than in proportion.
        shares = np.array([(rank.get(word, VISIBLE) + 300.0) ** -0.7 for word in counts])
        pools |= dict.fromkeys(slots, Pool(words, shares / shares.sum()))
    people = [w for e in entries if "person" in e.words for w in e.words] + ["man", "woman", "boy", "girl", "people"]
    texts = []
    for _ in range(SENTENCES):
        pattern = pick(grammar["sentences"], rng)
        filled = {slot: pool.draw(rng) for slot, pool in pools.items()}
        for slot, common in (
            ("thing", names),
            ("thing2", names),
            ("place", grammar["places"]),
            ("verb", grammar["verbs"]),
        ):
            if rng.random() < 0.35:
                filled[slot] = pick(common, rng)
        for slot in ("thing", "thing2"):
            filled[slot] = plural(filled[slot]) if rng.random() < 0.2 else filled[slot]
        drawn = {"a": "articles", "prep": "prepositions"}
        filled |= {slot: pick(grammar[pool], rng) for slot, pool in drawn.items()}
        filled["person"] = f"a {pick(people, rng)}" if rng.random() < 0.6 else f"a {pools['thing'].draw(rng)}"
        texts.append(" ".join(pattern.format(**filled).split()))
    return texts


@dataclass(frozen=True, slots=True)
class Pool:
    """Words, and how often each is drawn."""

    words: list[str]
    shares: F32

    def draw(self, rng: np.random.Generator) -> str:
        return self.words[int(rng.choice(len(self.words), p=self.shares))]


def participle(verb: str) -> str:
    """The regular present participle."""
    if verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        return verb[:-1] + "ing"
    return verb + "ing"
