"""The texts of a training: known things, words that stand for them, made-up sentences, and which pictures they fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from keyreel_export.builtin.data import Example
from keyreel_export.builtin.phrases import BROAD, TEMPLATES, Phrase, View, caption_tag, encode, train_tokenizer
from keyreel_export.builtin.scenes import COLOURS, SHAPES, Scene
from keyreel_export.builtin.wordnet import Nouns

T = TypeVar("T")
Drawn = tuple[list[str], list[dict[int, float]]]  # texts, and the known things (places, weights) that each stands for


class Language:
    """The texts of one training.

    Args:
        classes: names of the teacher's classes (`phrases.read_classes`).
        words: the file of everyday words; `grammar.txt` lies beside it.
        tokenizer: file that the tokenizer is kept in, read where it exists.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        classes: Sequence[Sequence[Phrase]],
        scenes: Sequence[Scene],
        nouns: Nouns,
        words: Path,
        tokenizer: Path,
        seed: int = 0,
    ) -> None:
        counts = Counter(label for example in examples for label in example.labels)
        frequent = counts + Counter(tag for scene in scenes for tag in scene.tags)
        self.rarity = {tag: count**-0.5 for tag, count in frequent.items()}
        self.labels = sorted(counts)
        self.common = [label for label in self.labels if counts[label] >= 20] or self.labels
        scene_tags = frozenset[str]().union(*(scene.tags for scene in scenes))
        broad = frozenset(label for label, count in counts.items() if count >= BROAD)
        self.scene_views = [View("", s.tags, broad, s.captions) for s in scenes]
        names = {label: [label] for label in self.labels}
        for synonyms in classes[1:]:
            [tag] = synonyms[0][1]
            names.setdefault(tag, []).extend(name for name, _ in synonyms)
        self.broader = _broader(nouns, names, {label for label in self.labels if counts[label] >= 60})
        captions = {caption_tag(example) for example in examples if example.captions}
        self._columns = {tag: place for place, tag in enumerate(sorted({*names, *scene_tags, *captions}))}
        # Photographs show colours, grounds and skies without a label.
        loose = [t for t in scene_tags if t.startswith("has ") or t.endswith((" background", "sky", "landscape"))]
        self._loose = self._rows([loose])
        self._names: list[Phrase] = [(label, frozenset({label})) for label in self.labels]
        self._names += [phrase for synonyms in classes[1:] for phrase in synonyms]
        # All colours of all shapes and grounds, to learn which of a scene's two colours is meant.
        self.scene_phrases: list[Phrase] = [(f"a {c} {s}", frozenset({f"{c} {s}"})) for c in COLOURS for s in SHAPES]
        self.scene_phrases += [(f"a {c} background", frozenset({f"{c} background"})) for c in COLOURS]
        drawn = sorted({phrase for scene in scenes for phrase in scene.captions}, key=lambda p: p[0])
        self._captions = drawn[::3]
        tags = list(names)
        self._thing = {tag: place for place, tag in enumerate(tags)}
        self.things = [names[tag][0] for tag in tags]  # all that pictures show, labels first
        self._words = self._stand_for(nouns, names, words)
        self._people = [w for w, parts in self._words.items() if set(parts) == {self._thing.get("person", -1)}] or [
            "person"
        ]
        self._everyday = [*self.common, *read_lists(words)]
        self._all = list(self._words)
        self._grammar = read_rows(words.with_name("grammar.txt"))
        self._actions = [word for word in self._grammar["actions"] if word in self._words] or self.common
        self.tokenizer = self._make_tokenizer(tokenizer, examples, seed)

    def _stand_for(self, nouns: Nouns, names: Mapping[str, Sequence[str]], words: Path) -> dict[str, dict[int, float]]:
        """Each known word -> the things it stands for, weights that sum to 1."""
        tied = {word: list(tags) for word, tags in nouns.tie(names).items()}
        tied |= {word: tags for tag, own in names.items() for word, tags in ((name, [tag]) for name in own)}
        lists, common = read_lists(words), set(self.common)
        tied |= {label: [label] for label in self.labels}
        # A label with hardly an image ("plane", a carpenter's tool) means what the list says.
        tied |= {word: labels for word, labels in lists.items() if word not in common}
        found: dict[str, dict[int, float]] = {}
        for word, tags in tied.items():
            known = [self._thing[tag] for tag in tags if tag in self._thing]
            if known:
                found[word] = dict.fromkeys(known, 1 / len(known))
        return found

    def _make_tokenizer(self, kept: Path, examples: Sequence[Example], seed: int) -> Tokenizer:
        if kept.exists():
            return Tokenizer.from_file(str(kept))
        rng = np.random.default_rng(seed)
        corpus = [text for text, _ in (*self._names, *self._captions) for _ in range(2)]
        corpus += [caption.lower() for example in examples for caption in example.captions for _ in range(2)]
        corpus += [word for word in self._all for _ in range(2)] + self._everyday * 4
        corpus += self.draw_sentences(20000, rng)[0]
        tokenizer = train_tokenizer(corpus)
        tokenizer.save(str(kept))
        return tokenizer

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """[Q, L] int64, cut to the longest of them."""
        return encode(self.tokenizer, texts)

    def draw_names(self, count: int, rng: np.random.Generator) -> list[Phrase]:
        """Random names of things, half of them in a template, and a few captions of scenes."""
        chosen = [
            self._names[int(i)] for i in rng.choice(len(self._names), min(count, len(self._names)), replace=False)
        ]
        drawn = [(_dress(text, rng), tags) for text, tags in chosen]
        if self._captions:
            drawn += [self._captions[int(i)] for i in rng.integers(0, len(self._captions), count // 8)]
        return drawn

    def draw_words(self, count: int, rng: np.random.Generator) -> Drawn:
        """Random words that stand for known things, half of them everyday ones."""
        texts, parts = [], []
        for _ in range(count):
            word = pick(self._everyday if rng.random() < 0.5 else self._all, rng)
            texts.append(_dress(plural(word) if rng.random() < 0.2 else word, rng))
            parts.append(self._words.get(word, {}))
        return texts, parts

    def draw_sentences(self, count: int, rng: np.random.Generator) -> Drawn:
        """Random sentences of one to three known things, with filler words."""
        say = self._grammar
        texts: list[str] = []
        parts: list[dict[int, float]] = []
        while len(texts) < count:
            wanted: dict[int, float] = {}
            filled = {"a": pick(say["articles"], rng) if rng.random() < 0.8 else ""}
            filled |= {name: pick(say[pool], rng) for name, pool in (("verb", "verbs"), ("prep", "prepositions"))}
            filled["adj"] = pick(say["adjectives"], rng)
            if rng.random() < 0.15:  # a made-up word
                filled["adj"] = "".join(pick("bcdfghklmnprstvwzaeiou", rng) for _ in range(int(rng.integers(3, 9))))
            pools = {"thing": self._everyday if rng.random() < 0.7 else self._all, "thing2": self._everyday}
            pools |= {"person": self._people, "action": self._actions, "place": say["places"]}
            pattern = pick(say["sentences"], rng)
            for slot, pool in pools.items():
                if f"{{{slot}}}" in pattern:
                    word = pick(pool, rng)
                    weight = 0.5 if slot == "person" else 0.8 if slot == "place" else 1.0
                    for place, share in self._words.get(word, {}).items():
                        wanted[place] = wanted.get(place, 0.0) + weight * share
                    said = plural(word) if slot.startswith("thing") and rng.random() < 0.2 else word
                    filled[slot] = f"{pick(('a', 'the', 'a', ''), rng)} {said}" if slot == "person" else said
            if wanted:
                texts.append(" ".join(pattern.format(**filled).split()))
                parts.append(wanted)
        return texts, parts

    def truth(self, views: Sequence[View], photos: int, phrases: Sequence[Phrase]) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each text that is true of a picture, and where it may be true, both [B, Q].

        Rare tags weigh more, and a picture's most specific label most, so that "dog" comes before "animal". The first
        `photos` are photographs.
        """
        need = self._rows([tags for _, tags in phrases])
        count = need.sum(1)
        has = self._rows([view.tags for view in views])
        may = self._rows([view.tags | view.unknown for view in views])
        may[:photos] = may[:photos].maximum(self._loose)
        weight = torch.tensor([max((self.rarity.get(tag, 0.1) for tag in tags), default=1.0) for _, tags in phrases])
        first = self._rows([[view.first] for view in views])
        emphasis = 1 + 3 * (first @ need.T > 0)
        return (has @ need.T == count) * (count > 0) * weight * emphasis, may @ need.T == count

    def _rows(self, sets: Sequence[Iterable[str]]) -> torch.Tensor:
        """Sets of known tags as rows of 0 and 1."""
        found = torch.zeros(len(sets), len(self._columns))
        for row, tags in enumerate(sets):
            columns = [self._columns[tag] for tag in tags if tag in self._columns]
            found[row, columns] = 1.0
        return found


def plural(word: str) -> str:
    """The regular plural of an English noun, or the word itself where it has one already."""
    if word.endswith(("s", "ing")):
        return word
    if word.endswith(("x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def pick(pool: Sequence[T], rng: np.random.Generator) -> T:
    """One of them, all alike likely."""
    return pool[int(rng.integers(len(pool)))]


def _dress(text: str, rng: np.random.Generator) -> str:
    return pick(TEMPLATES, rng).format(text) if rng.random() < 0.5 else text


def read_lists(path: Path) -> dict[str, list[str]]:
    """Lines `word, word, ...: label, label, ...`: word -> labels, for each of the words."""
    return {word: labels for words, labels in read_rows(path).items() for word in words.split(", ")}


def read_rows(path: Path) -> dict[str, list[str]]:
    """Lines `name: entry, entry, ...`."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    return {name: entries.split(", ") for name, entries in (line.split(": ", 1) for line in lines)}


def _broader(nouns: Nouns, names: Mapping[str, Sequence[str]], labels: set[str]) -> dict[str, frozenset[str]]:
    """For each thing, the common labels that WordNet has above it."""
    synsets = {tag: synset for tag, own in names.items() if (synset := nouns.find(own)) is not None}
    where = {synsets[label]: label for label in labels if label in synsets and label.count(" ") == 0}
    found = {}
    for tag, synset in synsets.items():
        above = frozenset(where[one] for one in nouns.ancestors(synset) if one in where) - {tag}
        if above:
            found[tag] = above
    return found
