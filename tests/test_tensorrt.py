"""TensorRT sessions and plans, against a stand-in that records and computes; and on a real device."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_on_host import HostedArray
from recording_tensorrt import Recording, builtin, recording_cuda, signature
from typer.testing import CliRunner

from keyreel.cli.app import app
from keyreel.errors import BackendError, ModelError, OutOfMemory, PlanStale
from keyreel.runtime import plans, tensorrt_build
from keyreel.runtime import tensorrt as session_tensorrt
from keyreel.runtime.backend import open_cuda_session
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.plans import PlanKey, building, read_plan, sample_feeds
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.tensorrt import build_plans, open_tensorrt
from keyreel.runtime.tensorrt_build import TensorRT, profile_for
from keyreel_kernels.cuda import Cuda

pytestmark = pytest.mark.full

FUSION = builtin("fusion")
BATCH = 4
OUTPUTS = ("scene", "subject", "map")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recording:
    made = Recording()
    for module in (tensorrt_build, session_tensorrt, plans):
        monkeypatch.setattr(module, "load_tensorrt", lambda: made.installed)
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def recorded(trt: Recording) -> Cuda:
    return recording_cuda(trt, capability=(9, 0))


def feeds(rows: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    energy = random.random((rows, 49), np.float32) + 1e-3
    return {
        "tokens": random.standard_normal((rows, 49, 512), np.float32),
        "attention": energy / energy.sum(1, keepdims=True),
        "change": 2 * random.random((rows, 49), np.float32),
    }


@pytest.fixture(scope="module")
def expected() -> Callable[[dict[str, Any]], dict[str, Any]]:
    session = onnxruntime.InferenceSession(str(FUSION), providers=["CPUExecutionProvider"])
    return lambda given: dict(zip(OUTPUTS, session.run(OUTPUTS, given), strict=True))


def assert_close(found: Any, wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)


def cached_plan(cuda: Cuda) -> bytes:
    return read_plan(PlanKey.of(FUSION, cuda.name, cuda.capability, profile_for("fusion", BATCH)))


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "cache" / "plans").iterdir())


# --- what runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 0])
def test_any_number_of_rows(trt: Recording, recorded: Cuda, expected: Any, rows: int) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert (session.inputs, session.outputs) == (("tokens", "attention", "change"), OUTPUTS)
    given = feeds(rows)
    trt.calls.clear()
    found = session.run({name: recorded.to_device(array) for name, array in given.items()})
    assert all(isinstance(array, HostedArray) for array in found.values())
    empty = {name: np.empty((0, width)) for name, width in zip(OUTPUTS, (256, 256, 49), strict=True)}
    assert_close({name: array.get() for name, array in found.items()}, expected(given) if rows else empty)
    # Whole batches, then the tail at the next power of two.
    sizes = [size for _, size in trt.noted("rows")]
    assert sizes == [BATCH] * (rows // BATCH) + [{0: [], 1: [1], 3: [4]}[rows % BATCH]][0]
    if rows == 11:
        tail = trt.noted("fed")[-1][1]
        np.testing.assert_array_equal(tail["tokens"][3], given["tokens"][10])
        np.testing.assert_array_equal(tail["attention"][3], given["attention"][10])
        np.testing.assert_array_equal(tail["change"][3], given["change"][10])


def test_whole_batches_are_captured_once_and_replayed(trt: Recording, recorded: Cuda, expected: Any) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    session.close()
    trt.calls.clear()
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    for seed, rows in enumerate((4, 2, 4, 1, 4, 8)):
        given = feeds(rows, seed)
        assert_close(session.run_on_host(given), expected(given))
    assert {stream for _, stream in trt.noted("execute")} == {recorded.stream.ptr}
    assert {stream for (stream,) in trt.noted("launch")} == {recorded.stream.ptr}
    # Each buffer has its address once and for all, none is that of what was fed or given back.
    addresses = trt.noted("set_tensor_address")
    assert len({(context, name) for context, name, _ in addresses}) == len(addresses)
    assert len({address for *_, address in addresses}) == len(addresses)
    whole, tail = (next(n for n, _name, shape in trt.noted("set_input_shape") if shape[0] == k) for k in (4, 2))
    assert whole != tail
    # Warm-up, then the capture on a stream of its own, then only replays.
    assert trt.noted("execute").count([whole, recorded.stream.ptr]) == 1
    assert trt.noted("capture") == [[whole]]
    ((stream, mode),) = trt.noted("begin_capture")
    assert (stream != recorded.stream.ptr, mode) == (True, 1)
    assert len(trt.noted("launch")) == 4
    order = [name for name, *_ in trt.calls if name in ("execute", "synchronize", "begin_capture", "capture", "launch")]
    assert order[:6] == ["execute", "synchronize", "begin_capture", "capture", "execute", "launch"]
    # A captured context keeps its shape; shapes are set only where they change.
    assert [shape[0] for n, name, shape in trt.noted("set_input_shape") if (n, name) == (whole, "tokens")] == [4]
    assert [shape[0] for n, name, shape in trt.noted("set_input_shape") if (n, name) == (tail, "tokens")] == [2, 1]


@pytest.mark.parametrize("refused", ["end_capture", "capture"])
def test_without_a_graph_it_runs_all_the_same(trt: Recording, recorded: Cuda, expected: Any, refused: str) -> None:
    trt.refused = {refused}
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.calls.clear()
    for seed in range(3):
        given = feeds(BATCH, seed)
        assert_close(session.run_on_host(given), expected(given))
    assert (trt.noted("launch"), trt.noted("begin_capture"), len(trt.noted("execute"))) == ([], [], 3)


def test_contexts_are_lent_to_one_thread_at_a_time(trt: Recording, recorded: Cuda, expected: Any) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.calls.clear()
    trt.spoil = lambda array, _replayed: (time.sleep(0.01), array)[1]  # so that they do meet
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        for rows in (4, 3, 9):
            given = feeds(rows, 10 * seed + rows)
            assert_close(session.run_on_host(given), expected(given))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    # The check of the plan has made one of each kind.
    assert len(trt.noted("context")) <= 2
    assert len({number for number, *_ in trt.noted("rows")}) == 4


def test_an_inference_that_fails_is_told(trt: Recording, recorded: Cuda, expected: Any) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.refused = {"execute"}
    with pytest.raises(BackendError, match="an inference failed: execute is out of order") as caught:
        session.run(feeds(3))
    assert caught.value.exit_code == 5
    trt.refused = set()
    trt.calls.clear()
    given = feeds(3)
    assert_close(session.run_on_host(given), expected(given))
    assert len(trt.noted("context")) == 1  # the one that failed is not used again
    trt.refused = {"set_input_shape"}
    with pytest.raises(BackendError, match="tokens may not be"):
        session.run(feeds(1))
    session.close()
    trt.refused = {"context"}
    with pytest.raises(OutOfMemory, match="free memory"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH).run(feeds(1))


def test_feeds_that_do_not_fit(trt: Recording, recorded: Cuda) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    good = feeds(2)
    for wrong in (
        {"tokens": good["tokens"]},
        {**good, "tokens": good["tokens"][:1]},
        {**good, "tokens": good["tokens"][:, :5]},
        {**good, "tokens": good["tokens"].astype(np.float64)},
        {**good, "change": np.ones(2, np.float32)},
        {**good, "attention": np.array(1, np.float32)},
        {**good, "more": good["tokens"]},
    ):
        with pytest.raises(ModelError, match=r"fusion\.onnx takes"):
            session.run(wrong)
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run(good)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_built_for_the_batches_of_the_engine(trt: Recording, recorded: Cuda) -> None:
    build_plans(Bundle.find("builtin"), recorded, batch_size=BATCH)
    assert [Path(path).name for (path,) in trt.noted("parse")] == [
        "backbone.onnx", "attention.onnx", "fusion.onnx", "text.onnx",
    ]  # fmt: skip
    frames = tuple((n, 112, 112, 3) for n in (1, 4, 4))
    tokens = tuple((n, 49, 512) for n in (1, 4, 4))
    assert [(name, tuple(shapes)) for name, *shapes in trt.noted("set_shape")] == [
        ("frames", frames),
        ("tokens", tokens),
        ("tokens", tokens),
        ("attention", ((1, 49), (4, 49), (4, 49))),
        ("change", ((1, 49), (4, 49), (4, 49))),
        ("token_ids", ((1, 32), (1, 32), (64, 32))),
    ]
    trt.calls.clear()
    build_plans(Bundle.find("builtin"), recorded, batch_size=BATCH)
    assert trt.noted("build") == []


def test_a_plan_is_kept_with_all_that_it_depends_on(trt: Recording, recorded: Cuda, tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    open_tensorrt(FUSION, recorded, batch_size=BATCH, progress=lambda *step: seen.append(step)).close()
    assert seen == [("plan fusion", 0.5, 1.0), ("plan fusion", 1.0, 1.0), ("plan fusion", 1.0, 1.0)]
    assert files(tmp_path) == [".json", ".lock", ".plan", ".timings"]
    (sidecar,) = (tmp_path / "cache" / "plans").glob("*.json")
    entry = json.loads(sidecar.read_text())
    assert entry["tensorrt"] == "tensorrt 11.1.0"
    assert (entry["device"], entry["capability"], entry["precision"]) == ("emulated", "9.0", "fp32")
    assert (entry["profile"], entry["flags"]) == ([1, 4, 4], ["strongly typed", "tf32"])
    assert entry["onnx_sha256"] == json.loads(FUSION.with_name("manifest.json").read_text())["files"]["fusion.onnx"][
        "sha256"
    ]  # fmt: skip
    assert set(entry["cosine"]) == set(OUTPUTS)
    assert min(entry["cosine"].values()) > 0.99999
    assert open_tensorrt(FUSION, recorded, batch_size=BATCH).outputs == OUTPUTS
    assert len(trt.noted("build")) == 1


def test_another_key_is_another_plan(trt: Recording, recorded: Cuda, tmp_path: Path) -> None:
    profile = profile_for("fusion", BATCH)
    key = PlanKey.of(FUSION, "A", (9, 0), profile)
    beside = tmp_path / "bundle"
    beside.mkdir()
    shutil.copy(FUSION, beside / "fusion.onnx")
    assert PlanKey.of(beside / "fusion.onnx", "A", (9, 0), profile) == key
    others = [
        PlanKey.of(FUSION, "B", (9, 0), profile),
        PlanKey.of(FUSION, "A", (10, 0), profile),
        PlanKey.of(FUSION, "A", (9, 0), profile_for("fusion", 8)),
        PlanKey.of(builtin("attention"), "A", (9, 0), profile),
    ]
    (beside / "fusion.onnx.data").write_bytes(b"weights")
    others.append(PlanKey.of(beside / "fusion.onnx", "A", (9, 0), profile))
    (beside / "fusion.onnx.data").write_bytes(b"other weights")
    others.append(PlanKey.of(beside / "fusion.onnx", "A", (9, 0), profile))
    trt.installed = TensorRT(trt, "tensorrt_rtx", "11.1.0", None, trt.installed.complaints)
    others.append(PlanKey.of(FUSION, "A", (9, 0), profile))
    assert len({k.file(".plan") for k in (key, *others)}) == 8
    with pytest.raises(PlanStale, match="no TensorRT plan for emulated yet"):
        cached_plan(recorded)


def _cut(folder: Path) -> None:
    path = next(folder.glob("*.plan"))
    path.write_bytes(path.read_bytes()[:-3])


def _sidecar(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.glob("*.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _unknown(folder: Path) -> None:
    """A plan that fits its sidecar, and that TensorRT does not take."""
    next(folder.glob("*.plan")).write_bytes(b"of another TensorRT")
    _sidecar(sha256=hashlib.sha256(b"of another TensorRT").hexdigest())(folder)


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        _unknown,
        _sidecar(capability="8.6"),
        _sidecar(tensorrt="tensorrt 10.9.0"),
        _sidecar(profile=[1, 16, 16]),
        lambda folder: next(folder.glob("*.json")).write_text("{"),
        lambda folder: next(folder.glob("*.json")).write_text("[]"),
        lambda folder: next(folder.glob("*.json")).unlink(),
        lambda folder: next(folder.glob("*.plan")).unlink(),
    ],
)
def test_what_does_not_fit_is_built_again(
    trt: Recording, recorded: Cuda, expected: Any, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    open_tensorrt(FUSION, recorded, batch_size=BATCH).close()
    harm(tmp_path / "cache" / "plans")
    if harm is not _unknown:
        with pytest.raises(PlanStale):
            cached_plan(recorded)
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    given = feeds(5)
    assert_close(session.run_on_host(given), expected(given))
    open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert len(trt.noted("build")) == 2


def _across(array: Any) -> Any:
    """Unit vectors at right angles to those given."""
    other = np.roll(array, 1, axis=1) - (np.roll(array, 1, axis=1) * array).sum(1, keepdims=True) * array
    return other / np.linalg.norm(other, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda array, _replayed: -array,
        lambda array, _replayed: array * np.float32(np.nan),
        lambda array, _replayed: array + np.float32(0.01) * np.arange(array.shape[1], dtype=np.float32) % 1,
        lambda array, replayed: array[::-1] if replayed else array,
        lambda array, _replayed: array[::-1] if len(array) == 4 else array,
        lambda array, _replayed: np.where(np.arange(len(array))[:, None] == 2, 0, array),
        # One row of three has a cosine of 0.998: the mean of the three would pass.
        lambda array, _replayed: array + np.float32(0.0633) * _across(array) * (np.arange(len(array))[:, None] == 1),
    ],
)
def test_a_plan_that_computes_something_else_is_refused(
    trt: Recording, recorded: Cuda, tmp_path: Path, spoil: Callable[[Any, bool], Any]
) -> None:
    trt.spoil = spoil
    with pytest.raises(
        ModelError, match=r"fusion.onnx is refused: (scene|subject|map) of \d rows has cosine"
    ) as caught:
        open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert "0.999" in str(caught.value)
    assert caught.value.hint
    assert files(tmp_path) == [".lock", ".timings"]
    trt.spoil = lambda array, _replayed: array * np.float32(1.5)  # cosines do not see lengths
    open_tensorrt(FUSION, recorded, batch_size=BATCH)


def test_half_precision_is_checked_against_what_the_export_wrote(
    trt: Recording, recorded: Cuda, expected: Any, tmp_path: Path
) -> None:
    path = tmp_path / "fusion.onnx"
    shutil.copy(FUSION, path)
    (tmp_path / "manifest.json").write_text('{"precision": "fp16"}')
    with pytest.raises(ModelError, match=r"reference\.npz cannot be read"):
        open_tensorrt(path, recorded, batch_size=BATCH)
    given = feeds(3)
    known = {f"fusion.{name}": array for name, array in given.items()}
    other = {"text.token_ids": np.ones((3, 32), np.int64), "text.vectors": np.ones((3, 256), np.float32)}
    wanted = {f"fusion.{name}": array for name, array in expected(given).items()}
    for name in wanted:  # each of them is held against it
        wrong = {**wanted, name: np.roll(wanted[name], 1, axis=0)}
        np.savez(tmp_path / "reference.npz", **known, **other, **wrong)
        with pytest.raises(ModelError, match=f"refused: {name.removeprefix('fusion.')} of"):
            open_tensorrt(path, recorded, batch_size=BATCH)
    np.savez(tmp_path / "reference.npz", **known, **other, **wanted)
    trt.calls.clear()
    open_tensorrt(path, recorded, batch_size=BATCH)
    np.testing.assert_array_equal(trt.noted("fed")[0][1]["tokens"][:3], given["tokens"])
    (sidecar,) = (tmp_path / "cache" / "plans").glob("*.json")
    assert json.loads(sidecar.read_text())["precision"] == "fp16"


def test_what_cannot_be_built_is_told(trt: Recording, recorded: Cuda, tmp_path: Path) -> None:
    trt.refused = {"parse"}
    with pytest.raises(ModelError, match=r"cannot parse fusion\.onnx: no importer \(in Odd 'the_node'\)"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.refused = {"build"}
    with pytest.raises(ModelError, match=r"cannot build fusion\.onnx: build is out of order"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert files(tmp_path) == [".lock"]


_WRITER = """
import sys
from keyreel.runtime.plans import PlanKey, building, write_plan
key = PlanKey("0", "tensorrt 11", "A", "9.0", "fp32", (1, 4, 4))
for round in range(40):
    with building(key):
        write_plan(key, (sys.argv[1] + str(round)).encode() * 10000, {"vectors": 1.0})
"""


def test_processes_do_not_harm_each_others_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, name]) for name in "ab"]
    key = PlanKey("0", "tensorrt 11", "A", "9.0", "fp32", (1, 4, 4))
    whole = 0
    while any(writer.poll() is None for writer in writers):
        with building(key):
            try:
                plan = read_plan(key)
            except PlanStale:
                assert whole == 0  # only before the first is there
                continue
        word = plan[: len(plan) // 10000]
        assert plan == word * 10000
        assert word[:1] in b"ab"
        whole += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert read_plan(key)[1:3].isdigit()
    assert sorted(path.suffix for path in (tmp_path / "plans").iterdir()) == [".json", ".lock", ".plan"]


def test_the_export_command_builds_plans_for_the_device_at_hand(
    trt: Recording, recorded: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the extra export is not installed")
    backend = SimpleNamespace(ops=SimpleNamespace(arrays=recorded), batch_size=BATCH)
    monkeypatch.setattr("keyreel.runtime.backend.resolve", lambda device: backend if device == "cuda" else None)
    done = CliRunner().invoke(app, ["export", "builtin", "--tensorrt"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(FUSION.parent)
    assert len(trt.noted("build")) == 4


# --- a real device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=pytest.mark.needs_cuda)], indirect=True)
@pytest.mark.parametrize("graph", ["backbone", "attention", "fusion", "text"])
def test_the_device_computes_what_the_cpu_does(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, graph: str
) -> None:
    if find_spec("tensorrt") is None and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("neither TensorRT nor onnxruntime for CUDA is installed")
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))
    session, reference = open_cuda_session(builtin(graph), cuda, batch_size=8), OnnxRuntimeSession(builtin(graph))
    feeds = sample_feeds(signature(reference._session))
    given = {
        name: array if array.ndim == 0 else np.resize(array, (19, *array.shape[1:])) for name, array in feeds.items()
    }
    expected = reference.run(given)
    for _ in range(3):
        (output,) = session.outputs
        result = cuda.to_host(session.run({name: cuda.to_device(array) for name, array in given.items()})[output])
        np.testing.assert_allclose(result, expected[output], atol=2e-2 * float(np.abs(expected[output]).max()))
    session.close()
