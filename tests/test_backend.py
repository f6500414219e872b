"""The choice of the device, and what doctor checks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keyreel import backend
from keyreel.backend import Probe, probe_codec, probe_cuda_driver, probes, resolve
from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra
from keyreel.session import OnnxRuntimeSession


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "probe_cuda_driver", lambda: Probe("cuda driver", False, "no CUDA driver"))
    chosen = resolve("auto")
    assert chosen.device == "cpu"
    assert "no CUDA driver" in chosen.reason
    assert resolve("cpu").reason == "asked for"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_an_explicit_device_never_falls_back(device: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        resolve(device)
    assert caught.value.probe == "cuda driver"
    assert "--device cpu" in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("device", ["", "gpu", "cpu:1", "cuda:x", "cuda:-1", "auto:0"])
def test_not_a_device(device: str) -> None:
    with pytest.raises(ValueError, match="allowed: auto, cpu"):
        resolve(device)


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYREEL_THREADS", "many")
    with pytest.raises(ValueError, match="KEYREEL_THREADS"):
        resolve("cpu")
    monkeypatch.setenv("KEYREEL_THREADS", "1")
    resolve("cpu")


def test_probes_pass_on_a_sound_installation() -> None:
    found = probes()
    assert [p.name for p in found if p.required and not p.passed] == []
    assert len({p.name for p in found}) == len(found)


def test_a_missing_codec_is_told() -> None:
    probe = probe_codec("no-such-codec", "r", required=True)
    assert not probe.passed
    assert probe.fix
    assert not probe_cuda_driver().required


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'keyreel\[cpu\]'"):
        OnnxRuntimeSession(Path("x.onnx"))
    assert issubclass(MissingExtra, ImportError)


def test_a_package_that_is_there_but_broken_is_no_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        import_extra("broken_package", extra="x", purpose="this")
    assert not isinstance(caught.value, MissingExtra)


def test_a_graph_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        OnnxRuntimeSession(tmp_path / "x.onnx")
