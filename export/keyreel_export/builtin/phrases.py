"""Tags of pictures, the texts that they make true, and the tokenizer of those texts.

A picture's tags are its labels, a class that the teacher is sure of, the tags of a scene. A text is true of each
picture that has all its tags. Labels are incomplete, so a text whose missing tags may apply is neither true nor false.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from keyreel_export.builtin.data import Example
from keyreel_export.builtin.student import CONTEXT_LENGTH

Phrase = tuple[str, frozenset[str]]  # a text, and the tags that make it true

TEMPLATES = (
    "{}",
    "{}",
    "a photo of a {}",
    "a photo of {}",
    "a picture of a {}",
    "a video of a {}",
    "a {}",
    "the {}",
    "there is a {}",
    "a close-up of a {}",
    "{} in the picture",
    "people, {}",
)
JOINTS = ("{} and {}", "a photo of {} with {}", "{}, {}", "a {} and a {}", "{} with a {}")
CAPTION = "caption "
BROAD = 200  # labels with so many images are broad terms, which single-label sources leave out


@dataclass(frozen=True, slots=True)
class View:
    """What is known of one picture."""

    first: str  # its most specific tag, or ""
    tags: frozenset[str]
    unknown: frozenset[str]  # tags that may apply too
    phrases: tuple[Phrase, ...]  # captions


def read_classes(path: Path, labels: Iterable[str]) -> list[list[Phrase]]:
    """Names of the teacher's classes, a list of synonyms for each. A class with the name of a label has its tag."""
    known = set(labels)
    classes = []
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        names = [name.strip().lower() for name in line.split(",") if name.strip()]
        tag = next((name for name in names if name in known), f"class {number}")
        classes.append([(name, frozenset({tag})) for name in names])
    return classes


def caption_tag(example: Example) -> str:
    """The tag of this image alone, for its captions."""
    return f"{CAPTION}{example.member}"


def describe(
    examples: Sequence[Example],
    classes: Sequence[Sequence[Phrase]],
    places: Sequence[int],
    guesses: Sequence[int],
    broader: Mapping[str, frozenset[str]],
) -> list[View]:
    """One View for each crop: its example, and the class that the teacher is sure of, or -1.

    `broader` has the labels that a tag implies ("dog" for "class 207").
    """
    counts = Counter(label for example in examples for label in example.labels)
    broad = frozenset(label for label, count in counts.items() if count >= BROAD)
    together = Counter((a, b) for example in examples for a in example.labels for b in example.labels if a != b)
    implied: dict[str, set[str]] = {}
    for (a, b), count in together.items():
        if count > 0.25 * counts[a]:
            implied.setdefault(a, set()).add(b)
    made: dict[tuple[int, int], View] = {}
    for place, guess in set(zip(places, guesses, strict=True)):
        example, names = examples[place], classes[guess] if 0 < guess < len(classes) else []
        own = caption_tag(example)
        tags = frozenset(example.labels).union(*(tags for _, tags in names), {own} if example.captions else ())
        tags = tags.union(*(broader.get(tag, ()) for tag in tags))
        unknown = frozenset[str]().union(*(implied.get(tag, ()) for tag in tags))
        if example.source in ("imagenet-sample", "coco-mini") or not example.labels:
            unknown |= broad
        captions = [(caption.lower(), frozenset({own})) for caption in example.captions]
        first = example.labels[0] if example.labels else ""
        made[place, guess] = View(first, tags, unknown - tags, (*captions, *names))
    return [made[pair] for pair in zip(places, guesses, strict=True)]


def say(view: View, rng: np.random.Generator, rarity: Mapping[str, float]) -> Phrase:
    """One random text that is true of a picture; rarer labels are said more often."""
    labels = [tag for tag in sorted(view.tags) if not tag.startswith(("class ", CAPTION))]
    if view.phrases and (not labels or rng.random() < 0.5):
        text, tags = view.phrases[int(rng.integers(len(view.phrases)))]
        return text, tags
    if not labels:
        return "a picture", frozenset()
    if len(labels) > 1 and rng.random() < 0.25:
        first, second = (labels[int(i)] for i in rng.choice(len(labels), 2, replace=False))
        return JOINTS[int(rng.integers(len(JOINTS)))].format(first, second), frozenset({first, second})
    shares = np.array([rarity.get(label, 1.0) * (3.0 if label == view.first else 1.0) for label in labels])
    label = labels[int(rng.choice(len(labels), p=shares / shares.sum()))]
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(label), frozenset({label})


def train_tokenizer(texts: Iterable[str], size: int = 8192) -> Tokenizer:
    """Byte-pair pieces over the words of a corpus: an unknown word falls into pieces, at worst into bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["[PAD]", "[START]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return bounded(tokenizer)


def bounded(tokenizer: Tokenizer) -> Tokenizer:
    """Begins texts with [START] and cuts and pads them to CONTEXT_LENGTH, in place."""
    start, pad = (tokenizer.token_to_id(name) for name in ("[START]", "[PAD]"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="[START] $A", special_tokens=[("[START]", start)])
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(pad_id=pad, pad_token="[PAD]", length=CONTEXT_LENGTH)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """[Q, L] int64, cut to the longest of them."""
    rows = tokenizer.encode_batch(list(texts))
    longest = max(sum(row.attention_mask) for row in rows)
    return torch.tensor([row.ids[:longest] for row in rows])
