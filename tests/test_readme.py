"""Figures, defaults and dependencies that the pages name are those of this commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import plot
from keyreel import config
from keyreel.runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
DEPENDENCIES = (ROOT / "engine" / "guide" / "dependencies.md").read_text("utf-8")
CARD = (ROOT / "engine" / "keyreel" / "models" / "MODEL_CARD.md").read_text("utf-8")


def test_dependencies_are_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    required = re.search(r"^dependencies = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)
    assert required
    for package in re.findall(r'"([A-Za-z0-9_-]+)', required[1]):
        assert re.search(rf"^\|[^|]*\b{package}\b", DEPENDENCIES, flags=re.MULTILINE), package


def test_defaults_are_what_the_pages_say() -> None:
    bundle = Bundle.find("builtin")
    assert config.EncodeConfig().shift is None
    assert config.EncodeConfig().subject
    assert bundle.shift_default == "off"


def test_figures_are_those_of_the_committed_results() -> None:
    for page in plot.PAGES:
        assert plot.filled(page.read_text("utf-8")) == page.read_text("utf-8"), page.name


def test_figures_of_the_built_in_model_are_those_of_its_manifest() -> None:
    verify = Bundle.find("builtin").manifest["verify"]
    row = re.search(rf"top-1 / top-5 \| {verify['val_label_images']:,.0f} \| ([\d.]+) / ([\d.]+) %", CARD)
    assert row is not None
    # Those of the manifest are by the scene alone, those of the model card by the better of scene and subject.
    for found, depth in zip(row.groups(), (1, 5), strict=True):
        assert float(found) == pytest.approx(100 * verify[f"val_label_specific_top{depth}"], abs=0.2)
