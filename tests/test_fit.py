"""Fitting the subject's side of a fusion, on tokens with planted objects."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra export is not installed")

from keyreel_export import fit  # noqa: E402
from keyreel_export.fusion import AveragePooling, TemporalSpatialFusion  # noqa: E402

pytestmark = pytest.mark.full

PATCHES, WIDTH, OBJECTS, PLACES = 9, 24, 4, 3


def frames(seed: int, count: int, *, still: bool = False) -> fit.Frames:
    """Each shows one of the places; in clips an object takes one patch, which changes."""
    rng = np.random.default_rng(seed)
    axes = np.eye(WIDTH, dtype=np.float32)
    place, thing, patch = (
        rng.integers(PLACES, size=count),
        rng.integers(OBJECTS, size=count),
        rng.integers(9, size=count),
    )
    tokens = np.repeat(axes[OBJECTS + place][:, None], PATCHES, 1) + 0.1 * rng.normal(size=(count, PATCHES, WIDTH))
    change = 0.05 * rng.random((count, PATCHES))
    rows, labels = np.arange(count), np.eye(OBJECTS + PLACES)
    if not still:
        tokens[rows, patch] = axes[thing] + 0.1 * rng.normal(size=(count, WIDTH))
        change[rows, patch] = 1.0
    objects, places = labels[thing] * (not still), labels[OBJECTS + place]
    arrays = (tokens.astype(np.float16), change.astype(np.float32))
    return fit.Frames(
        *map(torch.from_numpy, (*arrays, objects.astype(np.float32), places.astype(np.float32))),
        true=torch.from_numpy((objects + places) > 0),
    )


def head() -> fit.SubjectHead:
    """Its layer finds places and objects in the tokens, the places alone in their mean."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, OBJECTS + PLACES, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(OBJECTS + PLACES, WIDTH) + 0.3 * torch.randn(OBJECTS + PLACES, WIDTH))
    return fit.SubjectHead(
        AveragePooling(), layer.requires_grad_(False), fit.TokenAttention(WIDTH, (3, 3))
    ).requires_grad_(True)


def test_it_starts_as_the_fusion_without_training() -> None:
    made, given = head(), frames(1, 5)
    tokens, change = given.tokens.float(), given.change
    with torch.no_grad():
        fused = TemporalSpatialFusion(AveragePooling(), made.scene)(tokens, made.attention(tokens), change)
    for found, expected in zip(made.vectors(given), fused, strict=False):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_fit_finds_objects_and_leaves_places_and_scenes() -> None:
    made, texts, seen = head(), torch.eye(OBJECTS + PLACES), frames(3, 300)
    before = made.vectors(seen)
    log = fit.fit_subject(made, frames(1, 600), frames(2, 200, still=True), texts, epochs=40, seed=0)
    after = made.vectors(seen)
    np.testing.assert_array_equal(after[0], before[0])
    assert log[-1]["label"] < log[0]["label"]
    scale = fit.scale_of(made, seen)
    assert ((after[0] * after[1]).sum(1) < scale.novelty).mean() == pytest.approx(fit.STORED, abs=0.02)
    wanted = {name: getattr(seen, name).numpy() > 0 for name in ("objects", "places")}

    def precision(scores: np.ndarray, name: str) -> float:
        return fit.mean_average_precision(scores, wanted[name])

    best = np.maximum(after[0], scale.slope * after[1] + scale.offset)  # the texts are the axes
    assert precision(best, "objects") > max(0.9, precision(before[0], "objects"))
    assert precision(best, "places") > precision(before[0], "places") - 0.02


def test_the_loss_of_rows_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(4)
    logits, wanted = rng.normal(size=(6, 5)), rng.random((6, 5)) < 0.3
    wanted[2] = False
    true = wanted | (rng.random((6, 5)) < 0.3)
    losses = []
    for n in range(6):
        against = [j for j in range(5) if wanted[n, j] or not true[n, j]]
        total = math.log(sum(math.exp(logits[n, j]) for j in against))
        own = [total - logits[n, j] for j in range(5) if wanted[n, j]]
        losses += [sum(own) / len(own)] if own else []
    found = fit._told(torch.from_numpy(logits), torch.from_numpy(wanted).double(), torch.from_numpy(true))
    assert float(found) == pytest.approx(sum(losses) / len(losses), abs=1e-9)


def test_mean_average_precision_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.4, 0.0], [0.7, 0.3, 0.0]], np.float32)
    wanted = np.array([[True, True, False], [False, False, False], [True, False, False]])
    # Places 1 and 3 of the first label, place 3 of the second; nobody wants the third.
    assert fit.mean_average_precision(scores, wanted) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
