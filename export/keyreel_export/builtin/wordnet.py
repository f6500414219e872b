"""Words beyond the labels: nouns of WordNet, tied to the nearest labels.

Read from WordNet's own database files (`data.noun`, `cntlist.rev`; Fellbaum 1998, WordNet licence), which are neither
in the project nor in the bundle. A noun above labels ("canine") stands for all of them, a noun below or beside them
("puppy") for the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Lexicographer files whose nouns can be seen (wninput(5WN)): acts, animals, artefacts, body, events, food, groups,
# locations, objects, persons, phenomena, plants, shapes, substances.
VISIBLE = frozenset({4, 5, 6, 8, 11, 13, 14, 15, 17, 18, 19, 20, 25, 27})
THINGS = frozenset({5, 6, 13, 17, 20})  # animals, artefacts, food, natural objects, plants: neighbours look alike
MANY = 400  # a word for more things than this means nothing
NEAR = 12  # most neighbours that a word may stand for
CLIMB = 3  # steps up to a common ancestor
SENSES = 3  # of a word, the most frequent


class Nouns:
    """Synsets, their words, and what lies above them."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[int, int] = {}  # synset -> lexicographer file
        self.words: dict[int, list[str]] = {}
        self.above: dict[int, list[int]] = {}
        self.counts: dict[tuple[str, int], int] = {}  # (word, synset) -> how often it was seen in tagged texts
        self.senses: dict[str, list[int]] = {}  # word -> synsets, the most frequent first
        seen = self._frequencies(folder / "cntlist.rev")
        for line in (folder / "data.noun").read_text("utf-8").split("\n"):
            if line.strip() and not line.startswith("  "):
                self._read(line.split(" | ", 1)[0].split(), seen)
        for synset, words in self.words.items():
            for word in words:
                self.senses.setdefault(word, []).append(synset)
        for word, synsets in self.senses.items():
            synsets.sort(key=lambda synset: -self.counts.get((word, synset), 0))

    @staticmethod
    def _frequencies(path: Path) -> dict[str, int]:
        """Sense key -> count, where there is such a list (cntlist(5WN))."""
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
        return {key: int(count) for key, _, count in (line.split() for line in lines if line)}

    def _read(self, fields: list[str], seen: Mapping[str, int]) -> None:
        synset, count = int(fields[0]), int(fields[3], 16)
        pointers = fields[5 + 2 * count :]
        up = [(pointers[i], int(pointers[i + 1])) for i in range(0, len(pointers) - 3, 4)]
        if any(kind == "@i" for kind, _ in up):
            return  # a single city, river or person
        self.files[synset], self.words[synset] = int(fields[1]), []
        for written, number in zip(fields[4 : 4 + 2 * count : 2], fields[5 : 5 + 2 * count : 2], strict=True):
            word = written.replace("_", " ").lower()
            key = f"{written.lower()}%1:{fields[1]}:{int(number, 16):02d}::"
            self.words[synset].append(word)
            self.counts[word, synset] = seen.get(key, 0)
        self.above[synset] = [parent for kind, parent in up if kind == "@"]

    def find(self, names: Sequence[str]) -> int | None:
        """The visible synset with most of these names; of a name that WordNet lacks, the last words are looked up
        ("steel arch bridge").
        """
        votes: dict[int, float] = {}
        for name in names:
            words = name.lower().split()
            tails = (" ".join(words[start:]) for start in range(len(words)))
            found = next((self.senses[tail] for tail in tails if tail in self.senses), [])
            for place, synset in enumerate(found):
                if self.files[synset] in VISIBLE:
                    votes[synset] = votes.get(synset, 0.0) + 1.0 - 0.01 * place
        return max(votes, key=lambda synset: votes[synset]) if votes else None

    def ancestors(self, synset: int) -> set[int]:
        """All synsets above this one."""
        found: set[int] = set()
        open_ = list(self.above.get(synset, []))
        while open_:
            one = open_.pop()
            if one not in found:
                found.add(one)
                open_ += self.above.get(one, [])
        return found

    def tie(self, things: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """Words -> the things that they stand for. `things` has the names of each known thing."""
        places = {thing: synset for thing, names in things.items() if (synset := self.find(names)) is not None}
        here: dict[int, list[str]] = {}
        under: dict[int, list[str]] = {}
        for thing, synset in places.items():
            here.setdefault(synset, []).append(thing)
            for one in {synset, *self.ancestors(synset)}:
                under.setdefault(one, []).append(thing)
        tied: dict[str, tuple[str, ...]] = {}
        for word, senses in self.senses.items():
            for synset in senses[:SENSES]:
                common = self.counts[word, synset] > 0 or synset in here
                if common and self.files[synset] in VISIBLE and len(word) > 2 and not any(c.isdigit() for c in word):
                    found = self._stand_for(synset, here, under)
                    if found:
                        tied[word] = tuple(sorted(found))
                        break
        return tied

    def _stand_for(self, synset: int, here: Mapping[int, list[str]], under: Mapping[int, list[str]]) -> Iterable[str]:
        if synset in here:
            return here[synset]
        if synset in under:
            return under[synset] if len(under[synset]) <= MANY else ()
        level = [synset] if self.files[synset] in THINGS else []
        for _ in range(CLIMB):
            level = [parent for one in level for parent in self.above.get(one, [])]
            known = [thing for one in level for thing in here.get(one, [])]
            if known:
                return known
            near = {thing for one in level for thing in under.get(one, [])}
            if near:
                return near if len(near) <= NEAR else ()
        return ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A synset: its words, whether it can be seen, its definition and examples."""

    part: str  # of speech: noun, verb, adj
    words: tuple[str, ...]
    visible: bool
    said: tuple[str, ...]


def read_entries(folder: Path) -> list[Entry]:
    """The nouns, verbs and adjectives of WordNet but single cities, rivers and persons."""
    found = []
    for part in ("noun", "verb", "adj"):
        for line in (folder / f"data.{part}").read_text("utf-8").split("\n"):
            fields, _, gloss = line.partition(" | ")
            numbers = fields.split()
            if not line.strip() or line.startswith("  ") or "@i" in numbers:
                continue
            written = numbers[4 : 4 + 2 * int(numbers[3], 16) : 2]
            words = tuple(word.split("(")[0].replace("_", " ").lower() for word in written)
            said = tuple(text.strip(' "') for text in gloss.split(";") if len(text.split()) > 1)
            found.append(Entry(part, words, part == "noun" and int(numbers[1]) in VISIBLE, said))
    return found
