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
from cuda_on_host import host_cuda

import keyreel_kernels
from keyreel_kernels import Ops, clustering, cpu_kmeans, cpu_search, ops_for, pictures, reference
from keyreel_kernels.ops import ops_on

NAMES = [field.name for field in fields(Ops) if field.name not in ("device", "arrays")]
ARRAY = re.compile(r"\b(U8|U16|F32|F64|I64|Bools|NDArray)\b")
# [T, P, C] or [M, k + 1] or [3]
SHAPE = r"\[[A-Za-z0-9][A-Za-z0-9+*/(), ]*\]"


def definition(name: str) -> Callable[..., Any]:
    found = [getattr(module, name) for module in (reference, pictures, clustering) if hasattr(module, name)]
    assert len(found) == 1, f"{name} has {len(found)} definitions"
    function: Callable[..., Any] = found[0]
    return function


@pytest.mark.parametrize("name", NAMES)
def test_the_table_holds_the_definitions(name: str) -> None:
    assert getattr(Ops("cpu"), name) is definition(name)
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
        for module in (reference, pictures, clustering)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - set(NAMES) == {"resize_weights", "label_starts", "moves"}


@pytest.mark.parametrize("device", ["cuda:x", "cuda", "gpu", "CPU", ""])
def test_a_device_without_operations_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(device))):
        ops_for(device)


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_has_the_definition_or_a_form_with_its_arguments(name: str) -> None:
    form = getattr(ops_for("cpu"), name)
    own, wanted = (inspect.signature(function) for function in (form, definition(name)))
    assert own == wanted
    # One of its own says what it is a form of, and is used wherever there is one.
    assert form is definition(name) or f".{name}: " in inspect.getdoc(form) or f".{name}; " in inspect.getdoc(form)
    written = [vars(module).get(name, form) for module in (cpu_kmeans, cpu_search)]
    assert written == [form, form]


@pytest.mark.parametrize("name", NAMES)
def test_a_device_has_every_operation_with_the_arguments_of_its_definition(name: str) -> None:
    bound = getattr(ops_on(host_cuda()), name)
    launcher = inspect.signature(inspect.unwrap(bound)).parameters
    wanted = inspect.signature(definition(name)).parameters
    assert list(launcher)[1:] == list(wanted), "other arguments than the definition"
    for one in wanted.values():
        own = launcher[one.name]
        assert (own.default, own.kind) == (one.default, one.kind), one.name


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ops_for("cpu").top_k = None  # type: ignore[misc]


def test_the_package_imports_numpy_and_the_standard_library_only() -> None:
    folder = Path(keyreel_kernels.__file__).parent
    allowed = {*sys.stdlib_module_names, "numpy", "keyreel_kernels"}  # CuPy is imported by name, when it is asked for
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
