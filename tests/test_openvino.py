"""OpenVINO on the CPU: its results against onnxruntime's, threads, cache, and which runtime is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import BF16_COSINE, F32_COSINE

from keyreel.errors import ModelError, pip_install
from keyreel.runtime import backend
from keyreel.runtime import openvino as session_openvino
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.doctor import probes
from keyreel.runtime.openvino import OpenVINOSession, image_precision
from keyreel.runtime.sessions import OnnxRuntimeSession

pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytestmark = pytest.mark.full

BUILTIN = Bundle.find("builtin")
FUSION, TEXT = BUILTIN.file("fusion.onnx"), BUILTIN.file("text.onnx")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


def pictures(count: int, seed: int = 0) -> Any:
    """Smooth shapes in colour: [count, 112, 112, 3] uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:112, :112] / 112
    waves = random.uniform(1, 12, (count, 3, 3))
    frames = [[np.sin(a * y + b * x + c * 6) for a, b, c in wave] for wave in waves]
    return np.clip(128 + 120 * np.array(frames).transpose(0, 2, 3, 1), 0, 255).astype(np.uint8)


def cosines(found: Any, expected: Any) -> Any:
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def fused(open_session: Callable[[Path], Any], frames: Any) -> dict[str, Any]:
    """The chain of the built-in model's graphs."""
    tokens = open_session(BUILTIN.file("backbone.onnx")).run({"frames": frames})["tokens"]
    attention = open_session(BUILTIN.file("attention.onnx")).run({"tokens": tokens})["attention"]
    np.testing.assert_allclose(attention.sum(1), 1, atol=1e-5)
    change = np.random.default_rng(1).random(attention.shape, np.float32)
    found: dict[str, Any] = open_session(FUSION).run({"tokens": tokens, "attention": attention, "change": change})
    return found


# --- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("f32", F32_COSINE), ("bf16", BF16_COSINE)])
def test_vectors_equal_those_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, precision: str, bound: float) -> None:
    if precision == "bf16" and image_precision() != "bf16":
        pytest.skip("this CPU does not multiply bf16")
    monkeypatch.setattr(session_openvino, "image_precision", lambda: precision)
    frames = pictures(11)
    found, expected = (fused(opens, frames) for opens in (OpenVINOSession, OnnxRuntimeSession))
    assert set(found) == set(expected) == {"scene", "subject", "map"}
    for name in expected:
        assert cosines(found[name], expected[name]).min() >= bound, name
    for name in ("scene", "subject"):
        np.testing.assert_allclose(np.linalg.norm(found[name], axis=1), 1, atol=1e-5)
        assert cosines(found[name], np.roll(expected[name], 1, axis=0)).max() < bound


def test_texts_are_in_float32() -> None:
    feeds = {"token_ids": np.random.default_rng(0).integers(1, 500, (9, BUILTIN.context_length))}
    found, expected = (opens(TEXT).run(feeds)["vectors"] for opens in (OpenVINOSession, OnnxRuntimeSession))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_any_number_of_rows(streams: int) -> None:
    session, reference = OpenVINOSession(FUSION), OnnxRuntimeSession(FUSION)
    session._streams = streams  # into how many parts a call is cut
    random = np.random.default_rng(0)
    for rows in (16, 1, 7, 3):
        energy = random.random((rows, 49), np.float32)
        feeds = {
            "tokens": random.standard_normal((rows, 49, 512), np.float32),
            "attention": energy / energy.sum(1, keepdims=True),
            "change": 2 * random.random((rows, 49), np.float32),
        }
        found, expected = session.run(feeds), reference.run(feeds)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, atol=1e-6)
        kept = {name: array.copy() for name, array in found.items()}
        session.run({**feeds, "tokens": -feeds["tokens"]})
        for name, array in kept.items():
            np.testing.assert_array_equal(found[name], array)  # results are the caller's own


def test_threads_share_a_session() -> None:
    session = OpenVINOSession(BUILTIN.file("backbone.onnx"))
    given = [pictures(1 + seed % 3, seed=seed) for seed in range(8)]
    alone = [session.run({"frames": frames})["tokens"] for frames in given]
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            np.testing.assert_array_equal(session.run({"frames": given[number]})["tokens"], alone[number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_the_first_threads_of_a_process_do_not_deadlock() -> None:
    """As when two videos are indexed at once. Without the lock every other run did."""
    code = """
import sys, threading
import numpy as np
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import OpenVINOSession
path, width = Bundle.find("builtin").file("text.onnx"), Bundle.find("builtin").context_length
sys.setswitchinterval(1e-6)
start, found = threading.Barrier(4), []
def use():
    start.wait()
    found.append(OpenVINOSession(path).run({"token_ids": np.ones((1, width), np.int64)})["vectors"])
threads = [threading.Thread(target=use, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
print(len(found), np.abs(np.diff(np.concatenate(found), axis=0)).max() < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["4", "True"]


# --- what goes wrong, and the cache ---------------------------------------------------------------------------------


def test_feeds_that_do_not_fit_and_closing(tmp_path: Path) -> None:
    session = OpenVINOSession(BUILTIN.file("backbone.onnx"))
    frames = pictures(3)
    expected = session.run({"frames": frames})["tokens"]
    for wrong in ({}, {"frames": frames[0]}, {"frames": frames[:, :100]}, {"frames": frames.astype(np.float32)},
                  {"frames": frames, "more": frames}, {"frames": frames[:0]}):  # fmt: skip
        with pytest.raises(ModelError, match=r"backbone\.onnx") as caught:
            session.run(wrong)
        assert caught.value.hint
    # Views that are not contiguous are made so.
    np.testing.assert_array_equal(session.run({"frames": np.repeat(frames, 2, axis=2)[:, :, ::2]})["tokens"], expected)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run({"frames": frames})
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        OpenVINOSession(tmp_path / "x.onnx")


def test_the_second_start_takes_what_was_compiled(cache: Path) -> None:
    ids = {"token_ids": np.ones((2, BUILTIN.context_length), np.int64)}
    found: list[Any] = []
    for from_cache in (False, True, False):
        session = OpenVINOSession(TEXT)
        assert session._model.get_property("LOADED_FROM_CACHE") is from_cache
        found.append(session.run(ids)["vectors"])
        np.testing.assert_array_equal(found[0], found[-1])
        session.close()
        if from_cache:  # damaged, as by a full disk
            (blob,) = cache.glob("*.blob")
            blob.write_bytes(blob.read_bytes()[:5000])


def test_what_was_not_used_for_a_month_is_deleted(cache: Path) -> None:
    cache.mkdir(parents=True)
    now = time.time()
    for name, read, written in (("old.blob", 31, 400), ("read.blob", 2, 400), ("new.blob", 29, 29), ("other", 99, 99)):
        (cache / name).touch()
        os.utime(cache / name, (now - read * 86400, now - written * 86400))
    OpenVINOSession(FUSION)
    (compiled,) = {path.name for path in cache.iterdir()} - {"read.blob", "new.blob", "other"}
    assert compiled.endswith(".blob")


def test_it_runs_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "file"))
    found = OpenVINOSession(TEXT).run({"token_ids": np.ones((1, BUILTIN.context_length), np.int64)})
    assert np.linalg.norm(found["vectors"]) == pytest.approx(1, abs=1e-5)


def test_openvino_reports_to_nobody() -> None:
    """Its import sends an event to Google Analytics from a forked process, if the package for that is found."""
    code = """
import sys
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import OpenVINOSession
OpenVINOSession(Bundle.find("builtin").file("text.onnx"))
import openvino.tools.ovc
print(sys.modules["openvino_telemetry"], [name for name in sys.modules if name.startswith("openvino_telemetry.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "None []\n"


# --- which runtime is chosen ----------------------------------------------------------------------------------------


def outcome(blocked: tuple[str, ...] = (), chosen: str | None = None, precision: str = "fp32") -> str:
    """The choice of an interpreter without the packages in `blocked`: "SESSION reason", or the error."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
try:
    backend = resolve("cpu", precision={precision!r})
    print(type(backend.open_session(Bundle.find("builtin").file("text.onnx"))).__name__, backend.reason)
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "KEYREEL_CPU_RUNTIME"}
    environment |= {} if chosen is None else {"KEYREEL_CPU_RUNTIME": chosen}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_fastest_runtime_is_chosen() -> None:
    own = f"asked for; inference by openvino in {image_precision()}"
    assert outcome() == f"OpenVINOSession {own}"
    assert outcome(precision="int8") == "OnnxRuntimeSession asked for; inference by onnxruntime"
    assert outcome(("onnxruntime",)) == f"OpenVINOSession {own}"
    assert outcome(("openvino",)) == "OnnxRuntimeSession asked for; inference by onnxruntime"
    neither = outcome(("openvino", "onnxruntime"))
    assert neither.startswith("MissingExtra running a model on a CPU needs the package 'onnxruntime' or 'openvino'.")
    assert f"{pip_install('cpu')} or {pip_install('openvino')}" in neither


def test_an_explicit_choice_never_falls_back() -> None:
    assert outcome(chosen="onnxruntime").startswith("OnnxRuntimeSession")
    assert outcome(chosen="openvino", precision="int8").startswith("OpenVINOSession")
    assert outcome(("openvino",), "openvino").startswith("MissingExtra")
    assert outcome(("onnxruntime",), "onnxruntime").startswith("MissingExtra")
    assert outcome(chosen="tensorflow").startswith("ValueError KEYREEL_CPU_RUNTIME must be auto, openvino or onnx")


def test_a_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "openvino.py").write_text("raise ImportError('no libtbb')")
    own = "OpenVINO does not start: no libtbb"
    assert outcome() == f"OnnxRuntimeSession asked for; inference by onnxruntime; {own}"
    for found in (outcome(chosen="openvino"), outcome(("onnxruntime",))):
        assert found.startswith(f"BackendUnavailable {own}")
        assert "KEYREEL_CPU_RUNTIME=onnxruntime" in found
    (tmp_path / "openvino.py").unlink()
    for content in ("import no_such_module", ""):
        (tmp_path / "onnxruntime.py").write_text(content)
        assert outcome().startswith("OpenVINOSession asked for")
        found = outcome(chosen="onnxruntime")
        assert found.startswith("BackendUnavailable the package onnxruntime is installed but broken")
        assert pip_install("cpu") in found


def test_doctor_requires_the_runtime_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> dict[str, Any]:
        return {probe.name: probe for probe in probes()}

    for chosen, required in (("auto", "openvino"), ("openvino", "openvino"), ("onnxruntime", "onnxruntime")):
        monkeypatch.setenv("KEYREEL_CPU_RUNTIME", chosen)
        found = seen()
        assert found["cpu runtime"].found in backend.resolve("cpu").reason
        assert all(found[name].passed for name in ("cpu runtime", "openvino", "onnxruntime"))
        assert [name for name in ("openvino", "onnxruntime") if found[name].required] == [required]
    assert image_precision() in found["openvino"].found
    monkeypatch.setenv("KEYREEL_CPU_RUNTIME", "tensorflow")
    failed = seen()["cpu runtime"]
    assert (failed.passed, failed.required, bool(failed.fix)) == (False, True, True)
    monkeypatch.setenv("KEYREEL_CPU_RUNTIME", "onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    failed = seen()["cpu runtime"]
    assert (failed.passed, failed.fix) == (False, pip_install("cpu"))
