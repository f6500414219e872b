"""What the built-in model must find: validation photographs, real clips, and nothing where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED

from keyreel import Engine, Sampling
from keyreel.chance import WELL, Chances
from keyreel.runtime.bundle import Bundle

TRAINSET = SHARED / "trainset"
CLIPS = json.loads((Path(__file__).parents[1] / "benchmarks" / "quality_clips.json").read_text("utf-8"))
VERIFY = Bundle.find("builtin").manifest["verify"]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(device="cpu") as opened:
        yield opened


@pytest.mark.full
def test_labels_of_photographs_are_found(engine: Engine) -> None:
    """Through the engine, on one shard of the validation images, with the names of all."""
    data = pytest.importorskip("keyreel_export.builtin.data")
    if not TRAINSET.exists():
        pytest.skip(f"the labelled images are not here: {TRAINSET} is missing (set KEYREEL_SHARED)")
    every = [example for example in data.read_examples(TRAINSET, "val") if example.labels]
    some = [example for example in every if example.shard.endswith("train-003.tar")]
    names = sorted({label for example in every for label in example.labels})
    side = engine.bundle.image.height
    frames = np.empty((len(some), side, side, 3), np.uint8)
    for index, image in data.read_images(TRAINSET, some):
        frames[index] = data.square_view(image)
    scores = np.concatenate([engine.embed(frames[i : i + 64]) for i in range(0, len(frames), 64)])
    scores = scores @ engine.encode_text(names).T
    rank = np.array(
        [(row > row[names.index(example.labels[0])]).sum() for row, example in zip(scores, some, strict=True)]
    )
    assert len(some) > 300
    # Within what a sample of this size may differ from the figures of the model card.
    for depth, figure in ((1, VERIFY["val_label_specific_top1"]), (5, VERIFY["val_label_specific_top5"])):
        spread = 3 * (figure * (1 - figure) / len(some)) ** 0.5
        assert (rank < depth).mean() == pytest.approx(figure, abs=spread + 0.005), depth


@pytest.mark.full
def test_absent_labels_have_low_chances() -> None:
    measure = pytest.importorskip("keyreel_export.builtin.measure")
    if not TRAINSET.exists():
        pytest.skip(f"the labelled images are not here: {TRAINSET} is missing (set KEYREEL_SHARED)")
    bundle = Bundle.find("builtin")
    assert bundle.chance is not None
    towers = measure.Towers(bundle.folder)
    shown = measure.halves(measure.show(towers, TRAINSET))[1]
    chances = Chances(np.empty((0, 256), np.float32), bundle.chance)
    least = dict(zip(measure.LIBRARIES, (0.81, 0.79, 0.76, 0.65, 0.66, 0.56, 0.50, 0.49, 0.46), strict=True))
    for answers in measure.ask_libraries(towers, shown, libraries=300, seed=1):
        present, absent = (
            np.array([chances.at(lead, answers.size) for lead in leads.lead.tolist()])
            for leads in (answers.present, answers.absent)
        )
        assert (present >= WELL).mean() > 0.81, answers.size
        assert (absent < WELL).mean() > least.pop(answers.size), answers.size
    assert not least


def test_real_clips_are_found_by_captions(engine: Engine, media: Callable[[str], Path]) -> None:
    names = list(CLIPS["clips"])
    means = []
    for name in names:
        vectors = engine.embed_video(media(name), sampling=Sampling(fps=2.0)).vectors
        means.append(vectors[np.linspace(0, len(vectors) - 1, 8).round().astype(int)].mean(axis=0))
    texts = [(text, place) for place, name in enumerate(names) for text in CLIPS["clips"][name]]
    scores = np.stack(means) @ engine.encode_text([text for text, _ in texts]).T
    own = np.array([scores[place, q] for q, (_, place) in enumerate(texts)])
    rank = (scores > own).sum(axis=0) + 1
    assert (rank == 1).mean() >= 0.36, rank  # by chance 1 of 11
    assert np.median(rank) <= 2, rank


@pytest.mark.full
def test_unknown_words_leave_the_rest_of_the_query(engine: Engine) -> None:
    """Words of no label or list, some of no language, beside a thing: the thing is still among the nearest names."""
    data = pytest.importorskip("keyreel_export.builtin.data")
    if not TRAINSET.exists():
        pytest.skip(f"the label names are not here: {TRAINSET} is missing (set KEYREEL_SHARED)")
    names = sorted({label for example in data.read_examples(TRAINSET, "val") for label in example.labels[:1]})
    odd = ("flurbish", "grebnak", "marvellous", "tandoric", "splendid", "wobbly", "frolicking", "tremendous", "sleepy")
    things = ("dog", "bicycle", "car")
    scores = engine.encode_text([f"a {word} {thing}" for word in odd for thing in things]) @ engine.encode_text(names).T
    right = [names.index(thing) for _ in odd for thing in things]
    rank = (scores > scores[np.arange(len(right)), right][:, None]).sum(axis=1)
    assert (rank < 5).mean() >= 0.85, rank


@pytest.mark.parametrize(
    ("word", "near", "far", "margin"),
    [
        ("puppy", "dog", "car", 0.25),
        ("automobile", "car", "dog", 0.35),
        ("bicycles", "bicycle", "pizza", 0.6),
        ("a man rides a horse on a beach", "horse", "laptop", 0.15),
        ("people walking in a city", "people", "frog", 0.3),
    ],
)
def test_words_beyond_the_labels_lie_near_them(engine: Engine, word: str, near: str, far: str, margin: float) -> None:
    asked, right, wrong = engine.encode_text([word, near, far])
    assert asked @ right > asked @ wrong + margin
