"""What a user installs: the wheel's files and its metadata."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed: a test of the full ring")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    roots = {"engine/keyreel/": "engine/", "kernels/keyreel_kernels/": "kernels/", "export/keyreel_export/": "export/"}
    wanted = set()
    for name in tracked.stdout.splitlines():
        for package, root in roots.items():
            if name.startswith(package):
                wanted.add(name.removeprefix(root))
    assert names == wanted
    assert {"keyreel/py.typed", "keyreel/render/notebook.html", "keyreel_kernels/kmeans.cu"} <= names


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert metadata["Name"] == "keyreel"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    extras = set(metadata.get_all("Provides-Extra") or ())
    assert {"cpu", "gpu", "data", "library", "serve", "otio"} <= extras
