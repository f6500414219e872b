"""The house: imports run one way and in no circle, running needs no torch, the public surface is what it says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import keyreel

ROOT = Path(__file__).resolve().parents[1]


def modules(root: str, package: str) -> dict[str, Path]:
    base, found = ROOT / root, {}
    for path in (base / package).rglob("*.py"):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


KEYREEL = modules("engine", "keyreel")
KERNELS = modules("kernels", "keyreel_kernels")
EXPORT = modules("export", "keyreel_export")
ALL = KEYREEL | KERNELS | EXPORT


def imports(name: str) -> Iterator[str]:
    """Modules that a module imports, those inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(ALL[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in ALL else node.module


def test_packages_import_one_way() -> None:
    for name in KERNELS:
        assert not [m for m in imports(name) if m.split(".")[0] in ("keyreel", "keyreel_export")], name
    for name in KEYREEL:
        foreign = [m for m in imports(name) if m.split(".")[0] == "keyreel_export"]
        assert not foreign or name.startswith("keyreel.cli."), name  # `keyreel export` hands over to it


def test_running_needs_no_torch() -> None:
    for name in KEYREEL | KERNELS:
        assert not [m for m in imports(name) if m.split(".")[0] in ("torch", "open_clip", "timm", "onnx")], name


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {name: {m for m in imports(name) if m in ALL and m != name} for name in ALL}
    seen_by = {name: {m for m in ALL if name in graph[m]} for name in ALL}
    left = set(ALL)
    while ends := {name for name in left if not graph[name] & left or not seen_by[name] & left}:
        left -= ends
    assert {name: sorted(graph[name] & left) for name in left} == {}


def test_rooms_see_what_comes_before_them() -> None:
    """Leaves, then the runtime and the flow; commands, service and cluster see the rest, and nothing sees them."""
    leaves = {"keyreel.types", "keyreel.errors", "keyreel.config", "keyreel.tables"}
    outer = ("keyreel.cli", "keyreel.serve", "keyreel.cluster")
    for name in KEYREEL:
        ours = {m for m in imports(name) if m in KEYREEL and m != "keyreel"}
        if name in leaves:
            assert ours <= leaves, name
        if not name.startswith((*outer, "keyreel.__main__")):
            assert not [m for m in ours if m.startswith(outer)], name
        if name.startswith(("keyreel.decode", "keyreel.runtime", "keyreel.render")):
            assert not ours & {"keyreel.engine", "keyreel.library.library"}, name


def test_modules_are_of_a_size_to_read() -> None:
    long = {name: lines for name, path in ALL.items() if (lines := len(path.read_text("utf-8").splitlines())) > 500}
    assert long == {}


def test_the_public_surface() -> None:
    assert sorted(keyreel.__all__) == keyreel.__all__
    assert len(keyreel.__all__) <= 16
    assert all(hasattr(keyreel, name) for name in keyreel.__all__)


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        ("import keyreel", {"numpy", "torch", "onnxruntime", "lancedb", "fastapi"}),
        ("import keyreel.cli.app", {"numpy", "av", "pathspec"}),
        (
            "import keyreel; keyreel.Engine.from_pretrained(device='cpu').encode_text('a')",
            {"pyarrow", "lancedb", "opentelemetry", "keyreel.models.install", "keyreel.library.library"},
        ),
    ],
)
def test_importing_is_quiet_and_light(code: str, unused: set[str]) -> None:
    code += f"; import sys; print(sorted(set({sorted(unused)}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
