"""The table of operations: one signature for all devices, documented shapes; the package stands on NumPy alone."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import keyreel_kernels
from keyreel_kernels import Ops, clustering, ops_for, reference

NAMES = [field.name for field in fields(Ops) if field.name != "device"]
ARRAY = re.compile(r"\b(U8|U16|F32|F64|I64|Bools|NDArray)\b")
# [T, P, C] or [M, k + 1] or [3]
SHAPE = r"\[[A-Za-z0-9][A-Za-z0-9+*/(), ]*\]"


def definition(name: str) -> Callable[..., Any]:
    found = [getattr(module, name) for module in (reference, clustering) if hasattr(module, name)]
    assert len(found) == 1, f"{name} has {len(found)} definitions"
    function: Callable[..., Any] = found[0]
    return function


@pytest.mark.parametrize("name", NAMES)
def test_the_table_holds_the_definitions(name: str) -> None:
    assert getattr(ops_for("cpu"), name) is definition(name)
    assert next(field.default for field in fields(Ops) if field.name == name) is definition(name)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_documented(name: str) -> None:
    function = definition(name)
    own, module = inspect.getdoc(function) or "", inspect.getdoc(inspect.getmodule(function)) or ""
    assert re.search(SHAPE, own), "no shape in the docstring"
    arrays = [p.name for p in inspect.signature(function).parameters.values() if ARRAY.search(str(p.annotation))]
    for place, array in enumerate(arrays):
        # "x: [N, D]" or "x [N, D]" or "mean and std [3]"; a docstring "[N] -> [M]" begins with its first argument.
        said = rf"\b{array}(?:, \w+)*(?: and \w+)?:?\s+{SHAPE}"
        assert re.search(said, own) or re.search(said, module) or (place == 0 and own.startswith("[")), array


def test_the_table_is_complete() -> None:
    """What is public in the definitions is an operation, but for what only lays out arguments."""
    public = {
        name
        for module in (reference, clustering)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - set(NAMES) == {"resize_weights", "label_starts"}


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "gpu", "CPU", ""])
def test_a_device_without_operations_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(device))):
        ops_for(device)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ops_for("cpu").top_k = None  # type: ignore[misc]


def test_the_package_imports_numpy_and_the_standard_library_only() -> None:
    folder = Path(keyreel_kernels.__file__).parent
    allowed = {*sys.stdlib_module_names, "numpy", "keyreel_kernels"}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name}:{node.lineno} imports {name}"


def test_the_public_names() -> None:
    assert keyreel_kernels.__all__ == ["Ops", "ops_for"]
