"""What ruff's pydocstyle rules do not check: methods of the public classes, and the errors of public functions."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import keyreel

ROOT = Path(__file__).resolve().parents[1]
# Commands (their docstrings are help texts), and scripts that make the built-in model.
LEFT_OUT = ("engine/keyreel/cli", "export/keyreel_export/builtin")
MODULES = sorted(
    path
    for root in ("engine/keyreel", "kernels/keyreel_kernels", "export/keyreel_export")
    for path in (ROOT / root).rglob("*.py")
    if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT)
)
NO_CALLERS_BUSINESS = {"AssertionError", "KeyboardInterrupt", "NotImplementedError"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from inside(child)


def public_functions(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child) if isinstance(child, ast.ClassDef) else [child]


def raised(function: Function) -> set[str]:
    """The classes that a function raises by name."""
    found = [node.exc for node in inside(function) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(error.func if isinstance(error, ast.Call) else error) for error in found}
    return {name for name in names if name.isidentifier() and name[0].isupper()} - NO_CALLERS_BUSINESS


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_name_the_errors_of_public_functions(path: Path) -> None:
    for function in public_functions(ast.parse(path.read_text("utf-8"))):
        text = ast.get_docstring(function)
        if text is not None and raised(function):
            assert "aises" in text, f"{function.name} raises {raised(function)}"


def test_public_methods_have_docstrings() -> None:
    classes = [found for name in keyreel.__all__ if inspect.isclass(found := getattr(keyreel, name))]
    assert len(classes) > 10
    for owner in classes:
        for name, member in inspect.getmembers(owner):
            if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{owner.__name__}.{name}"
