"""The README and the guide: every command and option exists, every block runs, every output is what comes out."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from pages import GUIDE, PAGES, ROOT, blocks_of, is_like, outputs_of, prepare

from keyreel.cli import documents
from keyreel.cli.app import app
from keyreel.render.documents import SearchDocument, SummaryDocument


def commands_of(line: str) -> list[list[str]]:
    """The words of each command of a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;()"):
            found.append([])
        else:
            found[-1].append(word)
    return found


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pages
def test_every_command_and_option_exists(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in "\n".join(block.code for block in blocks_of(page) if block.language == "sh").splitlines():
        for words in commands_of(line):
            if words[:1] != ["keyreel"] or words[1].startswith("-"):
                continue
            command = commands[words[1]]
            command = command.commands[words[2]] if hasattr(command, "commands") and len(words) > 2 else command
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line


@pages
def test_links_and_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([\w./-]+\.\w+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:benchmarks|export|engine|kernels|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pages
def test_outputs_belong_to_a_block(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("\n```text\n") == sum(block.output is not None for block in blocks_of(page))


def test_the_index_names_every_page() -> None:
    index = (GUIDE / "README.md").read_text("utf-8")
    assert {page.name for page in GUIDE.glob("*.md")} - {"README.md"} == set(re.findall(r"\]\((\w[\w-]*\.md)\)", index))


def test_the_formats_page_names_every_json_document() -> None:
    page = (GUIDE / "formats.md").read_text("utf-8")
    named = {
        document.__name__: schema.default
        for document in (*vars(documents).values(), SearchDocument, SummaryDocument)
        if (schema := getattr(document, "__dataclass_fields__", {}).get("schema")) is not None
    }
    assert {"Index", "SummaryDocument"} <= set(named)
    for name, schema in named.items():
        assert f"`{schema}`" in page, name
        assert re.search(rf"\b{name}\b", page)


def messages() -> list[str]:
    """Every text in the code that is no docstring, with NUL for what an f-string fills in."""
    found = []
    for path in (*ROOT.glob("engine/keyreel/**/*.py"), *ROOT.glob("export/**/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
            if id(node) not in docstrings and all(isinstance(text, str) for text in texts):
                found.append("".join(map(str, texts)))
    return found


def has_in_order(text: str, parts: list[str]) -> bool:
    for part in parts:
        _, found, text = text.partition(part)
        if not found:
            return False
    return True


def test_the_troubleshooting_page_quotes_messages_as_they_are() -> None:
    """In quotes "..." and numbers stand for what a message fills in."""
    page = re.sub(r"```.*?```", "", (GUIDE / "troubleshooting.md").read_text("utf-8"), flags=re.S)
    code = [found for found in re.findall(r"`([^`]+)`", page) if " " in found]
    quotes = [one for one in code if not re.match(r"keyreel |pip |cat |ffmpeg |--|\{|Authorization: ", one)]
    known = messages()
    assert len(quotes) > 50
    for quote in quotes:
        parts = [part.strip() for part in re.split(r"\.\.\.|\d+(?:\.\d+)?", quote) if part.strip()]
        assert any(has_in_order(text, parts) for text in known), quote
    kinds = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \d\d\d[^|]*", page, flags=re.M)))
    assert len(kinds) > 10
    assert set(kinds) <= set(known)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 160


@pytest.mark.full
@pages
def test_every_block_runs_and_says_what_the_page_says(page: Path, media: Callable[[str], Path], tmp_path: Path) -> None:
    prepare(tmp_path, media("natural/bikes.mp4").parents[1])
    for block, got in outputs_of(page, tmp_path):
        if block.output is not None:
            assert is_like(block.output, got), f"$ {block.code}\n{got}"
