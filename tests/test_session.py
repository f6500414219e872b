"""Sessions on onnxruntime: the CPU's, and the CUDA provider's code on host memory."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_on_host import HostedArray, host_cuda
from recording_tensorrt import signature

from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, pip_install
from keyreel.runtime import backend
from keyreel.runtime.backend import open_cuda_session
from keyreel.runtime.bundle import GRAPHS, Bundle
from keyreel.runtime.plans import sample_feeds
from keyreel.runtime.sessions import OnnxRuntimeCudaSession, OnnxRuntimeSession

FUSION = Bundle.find("builtin").file("fusion.onnx")


def reference(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class HostProvider(OnnxRuntimeCudaSession):
    """The same code on the memory of the emulated device."""

    _provider, _device = "CPUExecutionProvider", "cpu"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What sessions are made with; the CPU's provider does not take CUDA's settings."""
    seen: list[Any] = []
    make = onnxruntime.InferenceSession

    def session(path: str, options: Any, *, providers: Any, **more: Any) -> Any:
        seen.append((providers, more))
        return make(path, options, providers=[name for name, _ in providers], **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return seen


@pytest.mark.parametrize("graph", GRAPHS)
def test_both_sessions_give_what_onnxruntime_gives(asked: list[Any], graph: str) -> None:
    path, cuda = Bundle.find("builtin").file(graph), host_cuda()
    bound = HostProvider(path, cuda)
    settings = {
        "device_id": "0",
        "user_compute_stream": str(cuda.stream.ptr),
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    assert asked == [([("CPUExecutionProvider", settings)], {"enable_fallback": 0})]
    inner = bound._session
    given = sample_feeds(signature(inner))
    expected = inner.run(None, dict(given))
    # Views that are not contiguous are made so.
    device = {n: cuda.to_device(np.repeat(a, 2, 0))[::2] if a.ndim else cuda.to_device(a) for n, a in given.items()}
    found = bound.run(device)
    assert tuple(found) == bound.outputs
    assert all(isinstance(array, HostedArray) for array in found.values())
    assert cuda.bytes_to_host == 0
    for array, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(cuda.to_host(array), wanted, atol=1e-6)
    with pytest.raises(ModelError, match="does not take"):
        bound.run({})
    bound.close()
    with pytest.raises(ValueError, match="closed"):
        bound.run(device)


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_cpu_session(graph: str) -> None:
    path = Bundle.find("builtin").file(graph)
    session, expected = OnnxRuntimeSession(path, threads=1), reference(path)
    given = sample_feeds(signature(expected))
    assert session.inputs == tuple(given)
    views = {n: np.repeat(a, 2, 0)[::2] if a.ndim else a for n, a in given.items()}
    found = session.run(views)
    assert tuple(found) == session.outputs
    for array, wanted in zip(found.values(), expected.run(None, given), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-6)
    with pytest.raises(ModelError, match="does not take"):
        session.run({name: array[..., None] for name, array in given.items()})
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run(given)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_small_batch_of_frames_runs_in_the_shape_of_a_large_one(
    asked: list[Any], graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device each change of shape plans all convolutions again. Texts are not filled up."""
    cuda, rows = host_cuda(), list[int]()
    bound = HostProvider(Bundle.find("builtin").file(graph), cuda)
    given = sample_feeds(signature(bound._session))
    bind = onnxruntime.IOBinding.bind_input

    def noted(self: Any, name: str, device: str, index: int, dtype: Any, shape: Any, pointer: int) -> None:
        rows.extend(shape[:1])
        bind(self, name, device, index, dtype, shape, pointer)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", noted)
    whole = {name: np.repeat(array, 3, 0)[:7] if array.ndim else array for name, array in given.items()}
    frames = any(array.ndim > 2 for array in whole.values())
    for count, shape in ((2, 2), (7, 7), (3, 7 if frames else 3), (7, 7), (1, 7 if frames else 1)):
        rows.clear()
        feeds = {name: array[-count:] if array.ndim else array for name, array in whole.items()}
        expected = bound._session.run(None, feeds)
        found = bound.run({name: cuda.to_device(array) for name, array in feeds.items()})
        assert set(rows) == {shape}
        for array, wanted in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(cuda.to_host(array), wanted, atol=1e-6)


def test_threads_share_a_bound_session(asked: list[Any]) -> None:
    cuda = host_cuda()
    session = HostProvider(FUSION, cuda)
    rows = sample_feeds(signature(session._session))
    expected = session._session.run(["subject"], rows)[0]

    def work(seed: int) -> None:
        order = np.random.default_rng(seed).integers(0, 3, 1 + seed % 5)
        given = {name: cuda.to_device(array[order] if array.ndim else array) for name, array in rows.items()}
        np.testing.assert_allclose(cuda.to_host(session.run(given)["subject"]), expected[order], atol=1e-6)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_falls_back_is_refused() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has the CUDA provider here")
    with pytest.raises(BackendUnavailable, match="asked for CUDAExecutionProvider, the session runs on CPU") as caught:
        OnnxRuntimeCudaSession(FUSION, host_cuda())
    assert caught.value.probe == "onnxruntime on cuda"


def test_a_provider_that_fails_is_reported_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **options: Any) -> Any:
        raise RuntimeError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(BackendUnavailable, match="libcudnn") as caught:
        OnnxRuntimeCudaSession(FUSION, host_cuda())
    assert "[gpu]" in str(caught.value.hint)
    assert capfd.readouterr().out == ""


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        OnnxRuntimeSession(tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=re.escape(pip_install("cpu"))):
        OnnxRuntimeSession(FUSION)


@pytest.mark.parametrize(
    ("supports", "expected"), [(lambda _: True, "tensorrt"), (lambda _: False, "onnxruntime"), (None, "onnxruntime")]
)
def test_tensorrt_is_taken_if_it_supports_the_device(
    monkeypatch: pytest.MonkeyPatch, supports: Any, expected: str
) -> None:
    def found() -> Any:
        if supports is None:
            raise MissingExtra("tensorrt", "gpu", "running a model")
        return SimpleNamespace(supports=supports)

    monkeypatch.setattr(backend, "load_tensorrt", found)
    monkeypatch.setattr(backend, "open_tensorrt", lambda *_args, **_options: "tensorrt")
    monkeypatch.setattr(backend, "OnnxRuntimeCudaSession", lambda *_args: "onnxruntime")
    assert open_cuda_session(FUSION, host_cuda(), batch_size=4) == expected  # type: ignore[comparison-overlap]
