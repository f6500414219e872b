"""The table of operations: one signature on all devices, documented shapes; the package needs NumPy alone."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_on_host import host_cuda
from kernel_cases import NAMES

import keyreel_kernels
from keyreel_kernels import Ops, clustering, ops_for, pictures, shift
from keyreel_kernels.ops import ops_on

ARRAY = re.compile(r"\b(U8|U16|F32|F64|I64|Bools|NDArray)\b")
# [T, P, C] or [M, k + 1] or [3]
SHAPE = r"\[[A-Za-z0-9][A-Za-z0-9+*/(), ]*\]"


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_defined_in_numpy_and_documents_its_shapes(name: str) -> None:
    (definition,) = (getattr(module, name) for module in (pictures, shift, clustering) if hasattr(module, name))
    assert getattr(ops_for("cpu"), name) is definition
    own, module = inspect.getdoc(definition) or "", inspect.getdoc(inspect.getmodule(definition)) or ""
    assert re.search(SHAPE, own), "no shape in the docstring"
    for parameter in inspect.signature(definition).parameters.values():
        if ARRAY.search(str(parameter.annotation)):
            said = rf"\b{parameter.name}(?:, \w+)*(?: and \w+)?:?\s+{SHAPE}"
            assert re.search(said, own) or re.search(said, module), parameter.name


@pytest.mark.parametrize("name", NAMES)
def test_a_device_has_every_operation_with_the_arguments_of_its_definition(name: str) -> None:
    launcher = inspect.signature(inspect.unwrap(getattr(ops_on(host_cuda()), name))).parameters
    wanted = inspect.signature(getattr(Ops("cpu"), name)).parameters
    assert list(launcher)[1:] == list(wanted)
    for one in wanted.values():
        assert (launcher[one.name].default, launcher[one.name].kind) == (one.default, one.kind), one.name


@pytest.mark.parametrize("device", ["cuda:x", "cuda", "gpu", "CPU", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(device))):
        ops_for(device)


def test_arguments_are_left_alone() -> None:
    draw = np.random.default_rng(0)
    frames, tokens = draw.integers(0, 256, (3, 12, 12, 3), np.uint8), draw.normal(size=(3, 9, 4)).astype(np.float32)
    linked, source = np.array([False, True, True]), draw.integers(3, size=(3, 9))
    for array in (frames, tokens, linked, source):
        array.flags.writeable = False
    ops = ops_for("cpu")
    ops.adaptive_shift(tokens, (3, 3), linked, steps=2, threshold=0.1)
    ops.patch_change(tokens, (3, 3), linked, steps=2)
    ops.shift_tokens(tokens, source, 0)
    ops.shift_pixels(frames, source, (3, 3))
    ops.frame_signals(frames)
    ops.transform(frames, height=8, width=9, mode="shortest", interpolation="bicubic")
    ops.neighbour_similarity(tokens[0], np.array([0, 9]))


def test_the_package_imports_numpy_and_the_standard_library_only() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "keyreel_kernels"}  # CuPy is imported by name when it is asked for
    for path in sorted(Path(keyreel_kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, f"{path.name}:{node.lineno}"
