"""OpenVINO on the CPU: its answers against onnxruntime's, threads, rows, and which runtime is taken.

test_export.py holds it against torch.
"""

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

pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytest.importorskip("onnxruntime", reason="no onnxruntime to compare with")

from bounds import BF16_COSINE, F32_COSINE

from keyreel.config import EncodeConfig
from keyreel.encode import Encoder
from keyreel.engine import Engine
from keyreel.errors import BackendUnavailable, MissingExtra, ModelError
from keyreel.runtime import backend
from keyreel.runtime import doctor as probes
from keyreel.runtime import openvino as session_openvino
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import OpenVINOSession, image_precision, open_openvino
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.types import FrameBatch

BUILTIN = Bundle.find("builtin")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(count: int, height: int = 112, width: int = 112, seed: int = 0) -> Any:
    """Smooth shapes in colour that move: [count, H, W, 3] uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    waves = random.uniform(1, 12, (count, 3, 3))
    frames = [[np.sin(a * y + b * x + c * 6) for a, b, c in wave] for wave in waves]
    return np.clip(128 + 120 * np.array(frames).transpose(0, 2, 3, 1), 0, 255).astype(np.uint8)


def cosines(found: Any, expected: Any) -> Any:
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def vectors(open_session: Callable[[Path], Any], bundle: Bundle, frames: Any, strength: float) -> Any:
    """The chain of a bundle's graphs."""
    tokens = open_session(bundle.file("backbone.onnx")).run({"frames": frames})["tokens"]
    seen = {"frames": frames} if bundle.attention_input == "frames" else {"tokens": tokens}
    attention = open_session(bundle.file("attention.onnx")).run(seen)["attention"]
    np.testing.assert_allclose(attention.sum(1), 1, atol=1e-5)
    feeds = {"tokens": tokens, "attention": attention, "strength": np.array(strength, np.float32)}
    return open_session(bundle.file("fusion.onnx")).run(feeds)["vectors"]


# --- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "least"), [("f32", F32_COSINE), ("bf16", BF16_COSINE)])
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_vectors_equal_those_of_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, precision: str, least: float, strength: float
) -> None:
    if precision == "bf16" and image_precision() != "bf16":
        pytest.skip("this CPU does not multiply bf16")
    monkeypatch.setattr(session_openvino, "image_precision", lambda: precision)
    frames = pictures(11)
    found, expected = (vectors(opens, BUILTIN, frames, strength) for opens in (open_openvino, OnnxRuntimeSession))
    assert cosines(found, expected).min() >= least
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    # The bound can fail: another frame's vector is farther.
    assert cosines(found, np.roll(expected, 1, axis=0)).max() < least


def test_texts_and_maps_are_in_float32() -> None:
    ids = np.random.default_rng(0).integers(1, 500, (9, BUILTIN.context_length))
    tokens = np.random.default_rng(1).random((6, 49, 512), np.float32)
    for graph, feeds, output in (
        ("text", {"token_ids": ids}, "vectors"),
        ("attention", {"tokens": tokens}, "attention"),
    ):
        path = BUILTIN.file(f"{graph}.onnx")
        found, expected = open_openvino(path).run(feeds)[output], OnnxRuntimeSession(path).run(feeds)[output]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_any_number_of_rows(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    path = BUILTIN.file("fusion.onnx")
    session, reference = OpenVINOSession(path), OnnxRuntimeSession(path)
    session._streams = streams  # how a call's rows are cut; one request takes them in turn
    random = np.random.default_rng(0)
    for rows in (16, 1, 7, 16, 3):
        energy = random.random((rows, 49), np.float32)
        feeds = {
            "tokens": random.standard_normal((rows, 49, 512), np.float32),
            "attention": energy / energy.sum(1, keepdims=True),
            "strength": np.array(1.5, np.float32),
        }
        found = session.run(feeds)["vectors"]
        np.testing.assert_allclose(found, reference.run(feeds)["vectors"], atol=1e-6)
        # The answer is the caller's own: the next run leaves it as it is.
        kept = found.copy()
        session.run({**feeds, "tokens": -feeds["tokens"]})
        np.testing.assert_array_equal(found, kept)


def test_windows_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video in ragged batches gives what it gives in one."""
    monkeypatch.setenv("KEYREEL_CPU_RUNTIME", "openvino")
    encoder = Encoder(BUILTIN, backend.resolve("cpu"))
    frames, numbers = pictures(13, seed=3), np.arange(13)

    def embed(*sizes: int) -> Any:
        stops = np.cumsum(sizes)
        batches = [
            FrameBatch(frames[stop - size : stop], numbers[stop - size : stop] / 2, numbers[stop - size : stop])
            for size, stop in zip(sizes, stops, strict=True)
        ]
        return encoder.encode(batches, EncodeConfig(shift="adaptive", attention_strength=1.0)).embedding.vectors

    assert cosines(embed(5, 4, 4), embed(13)).min() >= F32_COSINE
    np.testing.assert_array_equal(embed(5, 4, 4), embed(5, 4, 4))


def test_threads_share_a_session() -> None:
    session = open_openvino(BUILTIN.file("backbone.onnx"))
    given = [pictures(1 + seed % 3, seed=seed) for seed in range(8)]
    alone = [session.run({"frames": frames})["tokens"] for frames in given]
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            np.testing.assert_array_equal(session.run({"frames": given[number]})["tokens"], alone[number])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_feeds_that_do_not_fit_and_closing() -> None:
    session = open_openvino(BUILTIN.file("backbone.onnx"))
    frames = pictures(3)
    expected = session.run({"frames": frames})["tokens"]
    for wrong in ({}, {"frames": frames[0]}, {"frames": frames[:, :100]}, {"frames": frames.astype(np.float32)},
                  {"frames": frames, "more": frames}, {"frames": frames[:0]}):  # fmt: skip
        with pytest.raises(ModelError, match=r"backbone\.onnx") as caught:
            session.run(wrong)
        assert caught.value.hint
    # What failed has not spoilt the requests; views that are not contiguous are made so.
    doubled = np.repeat(frames, 2, axis=2)
    np.testing.assert_array_equal(session.run({"frames": doubled[:, :, ::2]})["tokens"], expected)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run({"frames": frames})


def test_a_graph_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        OpenVINOSession(tmp_path / "x.onnx")
    assert caught.value.hint


def test_the_second_start_takes_what_was_compiled(cache: Path) -> None:
    ids = {"token_ids": np.ones((2, BUILTIN.context_length), np.int64)}
    first = open_openvino(BUILTIN.file("text.onnx"))
    assert len(list((cache / "openvino").glob("*.blob"))) == 1
    second = open_openvino(BUILTIN.file("text.onnx"))
    assert [s._model.get_property("LOADED_FROM_CACHE") for s in (first, second)] == [False, True]
    np.testing.assert_array_equal(first.run(ids)["vectors"], second.run(ids)["vectors"])
    # One that is cut short, as by a full disk, is made again.
    blob = next((cache / "openvino").glob("*.blob"))
    blob.write_bytes(blob.read_bytes()[:5000])
    third = open_openvino(BUILTIN.file("text.onnx"))
    assert third._model.get_property("LOADED_FROM_CACHE") is False
    np.testing.assert_array_equal(first.run(ids)["vectors"], third.run(ids)["vectors"])


def test_what_was_not_used_for_a_month_is_deleted(cache: Path) -> None:
    folder = cache / "openvino"
    folder.mkdir(parents=True)
    now = time.time()
    for name, read, written in (("old.blob", 31, 400), ("read.blob", 2, 400), ("new.blob", 29, 29), ("other", 99, 99)):
        (folder / name).touch()
        os.utime(folder / name, (now - read * 86400, now - written * 86400))
    open_openvino(BUILTIN.file("fusion.onnx"))
    (compiled,) = {path.name for path in folder.iterdir()} - {"read.blob", "new.blob", "other"}
    assert compiled.endswith(".blob")
    # A start that compiles nothing looks at nothing.
    os.utime(folder / "new.blob", (0, 0))
    open_openvino(BUILTIN.file("fusion.onnx"))
    assert {path.name for path in folder.iterdir()} == {compiled, "read.blob", "new.blob", "other"}


def test_without_a_cache_folder_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "file"))
    found = open_openvino(BUILTIN.file("text.onnx")).run({"token_ids": np.ones((1, BUILTIN.context_length), np.int64)})
    assert np.linalg.norm(found["vectors"]) == pytest.approx(1, abs=1e-5)


def test_threads_that_are_the_first_to_run_a_graph_do_not_wait_for_each_other() -> None:
    """As two videos that are indexed at once do. With threads that change places often, every other run met it."""
    code = """
import sys, threading
import numpy as np
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import open_openvino
path, width = Bundle.find("builtin").file("text.onnx"), Bundle.find("builtin").context_length
session = open_openvino(path)
sys.setswitchinterval(1e-6)
start, found = threading.Barrier(8), []
def use():
    start.wait()
    found.append(session.run({"token_ids": np.ones((1, width), np.int64)})["vectors"])
threads = [threading.Thread(target=use, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
print(len(found), np.abs(np.diff(np.concatenate(found), axis=0)).max() < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["8", "True"]


# --- which runtime is taken -----------------------------------------------------------------------------------------


def outcome(blocked: tuple[str, ...], chosen: str | None, precision: str = "fp32") -> str:
    """What an interpreter without the packages in `blocked` makes of the choice: "SESSION reason", or the error."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from keyreel.runtime.backend import resolve
from keyreel.runtime.bundle import Bundle
import numpy as np
try:
    backend = resolve("cpu", precision={precision!r})
    bundle = Bundle.find("builtin")
    session = backend.open_session(bundle.file("text.onnx"))
    norm = np.linalg.norm(session.run({{"token_ids": np.ones((1, bundle.context_length), np.int64)}})["vectors"])
    assert abs(norm - 1) < 1e-5
    print(type(session).__name__, backend.reason)
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


def test_openvino_reports_to_nobody() -> None:
    """Its import sends an event to Google Analytics from a forked process, where the package for that is found."""
    code = """
import sys
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.openvino import open_openvino
open_openvino(Bundle.find("builtin").file("text.onnx"))
import openvino.tools.ovc
print(sys.modules["openvino_telemetry"], [name for name in sys.modules if name.startswith("openvino_telemetry.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "None []\n"


def test_the_faster_runtime_that_is_there_is_taken() -> None:
    own = f"asked for; inference by openvino in {image_precision()}"
    assert outcome((), None) == f"OpenVINOSession {own}"
    assert outcome((), None, "int8") == "OnnxRuntimeSession asked for; inference by onnxruntime"
    assert outcome(("onnxruntime",), None) == f"OpenVINOSession {own}"
    assert outcome(("openvino",), None) == "OnnxRuntimeSession asked for; inference by onnxruntime"
    neither = outcome(("openvino", "onnxruntime"), None)
    assert neither.startswith("MissingExtra running a model on a CPU needs the package 'onnxruntime' or 'openvino'.")
    assert "pip install 'keyreel[cpu]' or pip install 'keyreel[openvino]'" in neither


def test_a_choice_never_falls_back() -> None:
    assert outcome((), "onnxruntime").startswith("OnnxRuntimeSession")
    assert outcome((), "openvino", "int8").startswith("OpenVINOSession")
    missing = outcome(("openvino",), "openvino")
    assert missing.startswith("MissingExtra")
    assert "pip install 'keyreel[openvino]'" in missing
    missing = outcome(("onnxruntime",), "onnxruntime")
    assert missing.startswith("MissingExtra")
    assert "pip install 'keyreel[cpu]'" in missing
    assert outcome((), "tensorflow").startswith("ValueError KEYREEL_CPU_RUNTIME must be auto, openvino or onnxruntime")


BROKEN = "libtbb.so.12: cannot open shared object file"


def test_a_broken_openvino_is_told_and_never_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text(f"raise ImportError({BROKEN!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = f"OpenVINO does not start: {BROKEN}"
    assert outcome((), None) == f"OnnxRuntimeSession asked for; inference by onnxruntime; {own}"
    for found in (outcome((), "openvino"), outcome(("onnxruntime",), None)):
        assert found.startswith(f"BackendUnavailable {own}")
        assert "KEYREEL_CPU_RUNTIME=onnxruntime" in found


def test_a_broken_onnxruntime_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for content in ("import no_such_module", "raise ImportError('no libc')", ""):
        (tmp_path / "onnxruntime.py").write_text(content)
        assert outcome((), None).startswith("OpenVINOSession asked for")
        found = outcome((), "onnxruntime")
        assert found.startswith("BackendUnavailable the package onnxruntime is there but broken")
        assert "pip install 'keyreel[cpu]'" in found


def test_the_engine_says_what_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = pictures(4)
    found = {}
    for runtime in ("openvino", "onnxruntime"):
        monkeypatch.setenv("KEYREEL_CPU_RUNTIME", runtime)
        with Engine.from_pretrained(device="cpu") as engine:
            assert f"inference by {runtime}" in engine.backend.reason
            found[runtime] = engine.embed(frames)
    assert cosines(found["openvino"], found["onnxruntime"]).min() >= BF16_COSINE
    assert not np.array_equal(found["openvino"], found["onnxruntime"])


def test_doctor_looks_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    found = probes.probe_openvino()
    assert (found.passed, found.required) == (True, False)
    assert image_precision() in found.found
    assert found.found.split()[1] in openvino.__version__

    def broken() -> Any:
        raise BackendUnavailable("OpenVINO does not start: no TBB", probe="openvino", hint="mend it")

    def missing() -> Any:
        raise MissingExtra("openvino", "openvino", "this")

    for fails, fix in ((broken, "mend it"), (missing, "pip install 'keyreel[openvino]'")):
        monkeypatch.setattr(session_openvino, "_core", fails)
        failed = probes.probe_openvino()
        assert (failed.passed, failed.required, failed.fix) == (False, False, fix)
        # Then the other is what everything hangs on.
        (other,) = [probe for probe in probes.probes() if probe.name == "onnxruntime"]
        assert other.required
    monkeypatch.undo()
    monkeypatch.delenv("KEYREEL_CPU_RUNTIME", raising=False)
    (other,) = [probe for probe in probes.probes() if probe.name == "onnxruntime"]
    assert (other.passed, other.required) == (True, False)


@pytest.mark.parametrize(
    ("chosen", "found", "required"),
    [
        (None, f"openvino in {image_precision()}", "openvino"),
        ("openvino", f"openvino in {image_precision()}, as KEYREEL_CPU_RUNTIME says", "openvino"),
        ("onnxruntime", "onnxruntime, as KEYREEL_CPU_RUNTIME says", "onnxruntime"),
    ],
)
def test_doctor_names_the_runtime_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, found: str, required: str
) -> None:
    monkeypatch.delenv("KEYREEL_CPU_RUNTIME", raising=False)
    if chosen:
        monkeypatch.setenv("KEYREEL_CPU_RUNTIME", chosen)
    seen = {probe.name: probe for probe in probes.probes()}
    assert (seen["cpu runtime"].passed, seen["cpu runtime"].found) == (True, found)
    assert {name: seen[name].required for name in ("openvino", "onnxruntime")} == {
        name: name == required for name in ("openvino", "onnxruntime")
    }
    assert seen["cpu runtime"].found in backend.resolve("cpu").reason


def test_doctor_fails_on_a_wrong_or_missing_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYREEL_CPU_RUNTIME", "tensorflow")
    (failed,) = [probe for probe in probes.probes() if probe.required and not probe.passed]
    assert (failed.name, failed.passed) == ("cpu runtime", False)
    assert "must be auto, openvino or onnxruntime, got 'tensorflow'" in failed.found
    assert failed.fix
    monkeypatch.setenv("KEYREEL_CPU_RUNTIME", "onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    failed = next(probe for probe in probes.probes() if probe.name == "cpu runtime")
    assert (failed.passed, failed.required, failed.fix) == (False, True, "pip install 'keyreel[cpu]'")
