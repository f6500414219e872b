"""Shared fixtures. Real clips are read from the media folder beside the checkout and are never committed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_streams
import pytest
import tiny_models
from cuda_on_host import host_cuda

from keyreel import Engine
from keyreel_kernels.cuda import Cuda

# Which runtime runs a model must not hang on what is installed here. Tests that compare the two choose for themselves.
os.environ.setdefault("KEYREEL_CPU_RUNTIME", "onnxruntime")

# Options that a keyreel.toml of this machine gives must not change what is tested: an empty file is read instead.
os.environ["KEYREEL_CONFIG"] = os.devnull

SHARED = Path(os.environ.get("KEYREEL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MEDIA = SHARED / "media"


# Files that take minutes in one process. They begin first, so that no worker is left alone with one at the end.
LONG = ("test_templates.py", "test_cluster.py", "test_guide.py", "test_benchmarks.py", "test_kernels_build.py")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def media() -> Callable[[str], Path]:
    """media("natural/bikes.mp4") -> Path; skips where the clips are not there."""

    def find(name: str) -> Path:
        path = MEDIA / name
        if not path.exists():
            pytest.skip(f"real clips are not here: {path} is missing (set KEYREEL_SHARED)")
        return path

    return find


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The built-in model on the CPU."""
    with Engine.from_pretrained(device="cpu") as engine:
        yield engine


def _devices() -> list[object]:
    return ["emulated", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(scope="session", params=_devices())
def cuda(request: pytest.FixtureRequest) -> Cuda:
    """A device: the kernels emulated on the CPU, and the real one where there is one.

    With KEYREEL_FAIL_WITHOUT_CUDA=1 a device that is missing is a failure.
    """
    if request.param == "emulated":
        return host_cuda(1)  # never the current device by chance: that is 0 in each new thread
    try:
        device = Cuda(0)
        device.synchronize()
    except Exception as error:
        if os.environ.get("KEYREEL_FAIL_WITHOUT_CUDA") == "1":
            raise
        pytest.skip(f"no CUDA device: {type(error).__name__}")
    return device


@pytest.fixture(autouse=True)
def _ordered_streams() -> Iterator[None]:
    """No work of two streams of the emulated device was left to chance, in any thread."""
    cuda_streams.faults.clear()
    yield
    assert cuda_streams.faults == []


@pytest.fixture(scope="session")
def open_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package, which knows the models of tiny_models.py as well."""
    return tiny_models.register(tmp_path_factory.mktemp("configs"))
