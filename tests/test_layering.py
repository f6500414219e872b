"""The house: imports run one way, devices are decided in one place, the public surface is what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keyreel

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"keyreel.errors", "keyreel.types", "keyreel.config"}
TOP = {"keyreel.cli", "keyreel.bench", "keyreel.engine", "keyreel.__main__"}
TOP |= {
    "keyreel.cli_index",
    "keyreel.cli_library",
    "keyreel.library.library",
    "keyreel.library.indexing",
    "keyreel.ray",
}


def modules(root: str, package: str) -> dict[str, Path]:
    base = ROOT / root
    found = {}
    for path in (base / package).rglob("*.py"):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


KEYREEL = modules("engine", "keyreel")
KERNELS = modules("kernels", "keyreel_kernels")
EXPORT = modules("export", "keyreel_export")


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a file imports; with `at_import`, only those loaded when it is imported itself."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_import and (lazy or typing_only):
            skipped.update(child for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_packages_import_one_way() -> None:
    for name, path in KERNELS.items():
        assert not [m for m in imports(path) if m.split(".")[0] in ("keyreel", "keyreel_export")], name
    for name, path in KEYREEL.items():
        foreign = [m for m in imports(path) if m.split(".")[0] == "keyreel_export"]
        assert not foreign or name == "keyreel.cli", name  # `keyreel export` hands over to it


def test_running_needs_no_torch() -> None:
    for name, path in {**KEYREEL, **KERNELS}.items():
        assert not [m for m in imports(path) if m.split(".")[0] in ("torch", "open_clip", "timm", "onnx")], name


def test_leaves_import_no_stage() -> None:
    for name in LEAVES:
        ours = {m for m in imports(KEYREEL[name], at_import=True) if m in KEYREEL and m != "keyreel"}
        assert ours <= LEAVES, name


def test_stages_do_not_see_the_engine_or_the_command_line() -> None:
    for name, path in KEYREEL.items():
        if name not in TOP and name != "keyreel":
            assert not set(imports(path)) & TOP, name


def test_there_is_no_import_cycle() -> None:
    graph = {
        name: {m for m in imports(path, at_import=True) if m in KEYREEL and m not in (name, "keyreel")}
        for name, path in KEYREEL.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_device_is_decided_in_one_place() -> None:
    allowed = ("keyreel.backend", "keyreel.probes", "keyreel.decode.nvdec", "keyreel.session", "keyreel_kernels.cuda")
    for name, path in {**KEYREEL, **KERNELS}.items():
        if not name.startswith(allowed):
            assert not re.search(r"\bif\b[^\n]*cuda", path.read_text("utf-8")), name


def test_the_environment_is_read_in_two_places() -> None:
    for name, path in KEYREEL.items():
        if name not in ("keyreel.backend", "keyreel.bundle"):
            assert "os.environ" not in path.read_text("utf-8"), name


def test_the_library_does_not_print_or_configure_logging() -> None:
    for name, path in {**KEYREEL, **KERNELS, **EXPORT}.items():
        if name.startswith(("keyreel.cli", "keyreel_export.builtin")):
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), name
        assert "basicConfig" not in text, name


def test_modules_are_of_readable_size() -> None:
    for name, path in {**KEYREEL, **KERNELS, **EXPORT}.items():
        assert len(path.read_text("utf-8").splitlines()) <= 500, name


def test_public_names() -> None:
    assert keyreel.__all__ == sorted(keyreel.__all__)
    assert len(keyreel.__all__) <= 16
    assert all(hasattr(keyreel, name) for name in keyreel.__all__)


def test_importing_is_quiet_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, logging, keyreel; "
        "assert logging.getLogger('keyreel').handlers and not logging.getLogger().handlers; "
        "heavy = {'torch', 'onnxruntime', 'openvino', 'opentimelineio', 'rich', 'typer', 'lancedb', 'pyarrow', 'ray'}; "
        "print(sorted((heavy | {'fastapi'}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_top_level_folders() -> None:
    allowed = {"engine", "kernels", "export", "benchmarks", "tests"}
    allowed |= {"README.md", "pyproject.toml", "LICENSE", "CONTRIBUTING.md"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:
        assert {line.split("/")[0] for line in tracked.stdout.splitlines() if not line.startswith(".")} <= allowed
