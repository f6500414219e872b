"""What the README says is true of this commit."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from benchmarks import plot
from keyreel import config
from keyreel.cli.app import app
from keyreel.runtime.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CARD = (ROOT / "engine" / "keyreel" / "models" / "MODEL_CARD.md").read_text("utf-8")


GUIDE = sorted((ROOT / "engine" / "guide").glob("*.md"))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_blocks_run(media: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(media("natural/car-detection.mp4"), tmp_path / "match.mp4")
    (tmp_path / "clips").mkdir()
    for name, clip in (("a", "natural/test.mp4"), ("b", "natural/bikes.mp4")):
        shutil.copy(media(clip), tmp_path / "clips" / f"{name}.mp4")
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "reel.mp4").is_file()
    assert (tmp_path / "out" / "match" / "storyboard.html").is_file()


def test_every_command_and_option_exists() -> None:
    seen = commands_in(README)
    assert seen == {"demo", "summarize", "search", "export", "bench", "doctor", "index", "library", "serve", "models"}
    for page in GUIDE:
        assert commands_in(page.read_text("utf-8")) <= seen, page


def commands_in(text: str) -> set[str]:
    """The commands in its blocks, all of whose options exist."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for line in "\n".join(blocks("sh", text)).splitlines():
        for part in re.split(r"&&|\|", line.split("#")[0]):
            words = shlex.split(part)
            if words[:1] != ["keyreel"]:
                continue
            seen.add(words[1])
            command = commands[words[1]]
            command = command.commands[words[2]] if hasattr(command, "commands") else command
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            assert {word for word in words if word.startswith("-") and len(word) > 1} <= known, line
    return seen


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:benchmarks|export|engine|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_dependencies_are_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    required = re.search(r"^dependencies = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)
    assert required
    for package in re.findall(r'"([A-Za-z0-9_-]+)', required[1]):
        assert re.search(rf"^\|[^|]*\b{package}\b", README, flags=re.MULTILINE), package


def test_defaults_are_what_the_readme_says() -> None:
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
