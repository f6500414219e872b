"""The choice of the device, and what doctor checks."""

from __future__ import annotations

import dataclasses
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cuda_on_host import host_cuda
from hosted_session import HostedSession

from keyreel import errors
from keyreel.errors import BackendUnavailable, MissingExtra, ModelError, import_extra, pip_install
from keyreel.runtime import backend
from keyreel.runtime.backend import Probe, probe_cuda, probe_driver, resolve
from keyreel.runtime.doctor import probe_codec, probes
from keyreel_kernels import Ops, ops_for
from keyreel_kernels.ops import ops_on


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "probe_driver", lambda _: Probe("cuda driver", False, "no CUDA driver"))
    chosen = resolve("auto")
    assert chosen.device == "cpu"
    assert "no CUDA driver" in chosen.reason
    assert resolve("cpu").reason.startswith("asked for; inference by ")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_an_explicit_device_never_falls_back(device: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        resolve(device)
    assert caught.value.probe == "cuda driver"
    assert "--device cpu" in str(caught.value)
    assert caught.value.exit_code == 5


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Ops:
    """A machine with a CUDA device, emulated."""
    ops = ops_on(host_cuda())
    monkeypatch.setattr(backend, "probe_driver", lambda _: Probe("cuda driver", True, "1 CUDA device(s)"))
    monkeypatch.setattr(backend, "ops_for", lambda name: ops_for(name) if name == "cpu" else ops)
    monkeypatch.setattr(backend, "open_cuda_session", lambda path, cuda, batch_size: HostedSession(path))
    return ops


def test_a_device_that_passes_every_check_is_taken(device: Ops) -> None:
    found = resolve("auto")
    assert found.device == "cuda:0"
    assert found.ops is device
    assert "HostedSession" in found.reason
    assert found.batch_size > resolve("cpu").batch_size
    assert resolve("cuda").reason == "asked for"
    names = [probe.name for probe in probe_cuda(0)[0]]
    assert names == ["cuda driver", "cupy", "cuda kernels", "cuda inference"]


@pytest.mark.parametrize(
    ("target", "error", "probe"),
    [
        ("ops_for", RuntimeError("cudaErrorNoDevice"), "cupy"),
        ("ops_for", ImportError("no CuPy"), "cupy"),
        ("open_cuda_session", MissingExtra("tensorrt", "gpu", "this"), "cuda inference"),
        ("open_cuda_session", ModelError("wrong", hint="mend"), "cuda inference"),
        ("open_cuda_session", PermissionError(13, "no cache"), "cuda inference"),
    ],
)
def test_each_check_can_fail_and_is_named(
    device: Ops, monkeypatch: pytest.MonkeyPatch, target: str, error: Exception, probe: str
) -> None:
    def fail(name: object, *_: object, **__: object) -> Ops:
        if name == "cpu":
            return ops_for("cpu")
        raise error

    monkeypatch.setattr(backend, target, fail)
    with pytest.raises(BackendUnavailable) as caught:
        resolve("cuda:0")
    assert caught.value.probe == probe
    assert caught.value.hint
    chosen = resolve("auto")
    assert chosen.device == "cpu"
    assert chosen.reason.startswith("auto: ")


def test_a_kernel_that_computes_something_else_is_no_device(device: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(device, frame_signals=lambda frames: (frames[:, 0, 0, 0],))
    monkeypatch.setattr(backend, "ops_for", lambda name: ops_for(name) if name == "cpu" else wrong)
    with pytest.raises(BackendUnavailable, match="result differs from NumPy's") as caught:
        resolve("cuda:0")
    assert caught.value.probe == "cuda kernels"


def test_a_model_that_computes_something_else_is_no_device(device: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(HostedSession):
        def run(self, feeds: Any) -> Any:
            return {name: array * 2 for name, array in super().run(feeds).items()}

    monkeypatch.setattr(backend, "open_cuda_session", lambda path, cuda, batch_size: Wrong(path))
    assert "length 2.000" in resolve("auto").reason


@pytest.mark.parametrize("device", ["", "gpu", "cpu:1", "cuda:x", "cuda:-1", "auto:0"])
def test_not_a_device(device: str) -> None:
    with pytest.raises(ValueError, match="allowed: auto, cpu"):
        resolve(device)


def test_probes_pass_on_a_sound_installation() -> None:
    found = probes()
    assert [p.name for p in found if p.required and not p.passed] == []
    assert len({p.name for p in found}) == len(found)


def test_a_missing_codec_is_told() -> None:
    probe = probe_codec("no-such-codec", "r", required=True)
    assert not probe.passed
    assert probe.fix
    assert not probe_driver().required


def test_a_package_that_is_there_but_broken_is_no_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        import_extra("broken_package", extra="x", purpose="this")
    assert not isinstance(caught.value, MissingExtra)


def test_hints_install_from_where_keyreel_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    assert shlex.split(pip_install("cpu")) == ["pip", "install", "-e", f"{root}[cpu]"]
    noted: list[str | None] = []

    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return noted[-1]

    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "keyreel" / "errors.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    for text, wanted in (
        (None, "keyreel[serve]"),
        ('{"url": "file:///a%20b", "dir_info": {}}', "keyreel[serve] @ file:///a%20b"),
        (
            '{"url": "https://example.org/k.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}',
            "keyreel[serve] @ git+https://example.org/k.git@ab12",
        ),
    ):
        noted.append(text)
        assert shlex.split(pip_install("serve")) == ["pip", "install", wanted]
