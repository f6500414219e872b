"""Sessions: onnxruntime on either device, and TensorRT's against a stand-in that records and computes."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="no onnxruntime to compare with")

import onnxruntime
from cuda_on_host import HostedArray, host_cuda
from recording_tensorrt import NUMPY, Recording, builtin, recording_cuda
from typer.testing import CliRunner

from keyreel.cli.videos import app
from keyreel.errors import BackendError, BackendUnavailable, MissingExtra, ModelError, OutOfMemory, PlanStale
from keyreel.runtime import plans, session_cuda, tensorrt_build
from keyreel.runtime import tensorrt as session_tensorrt
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.plans import PlanKey, building, read_plan, sample_feeds, write_plan
from keyreel.runtime.sessions import OnnxRuntimeCudaSession, OnnxRuntimeSession
from keyreel.runtime.tensorrt import build_plans, open_tensorrt
from keyreel.runtime.tensorrt_build import Profile, build_plan, profile_for
from keyreel_kernels.cuda import Cuda

FUSION = builtin("fusion")
BATCH = 4
FLOAT = np.dtype(np.float32)
SIGNATURE: plans.Signature = {"tokens": (FLOAT, (49, 512)), "attention": (FLOAT, (49,)), "strength": (FLOAT, None)}


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recording:
    made = Recording()
    for module in (tensorrt_build, session_tensorrt, plans):
        monkeypatch.setattr(module, "library", lambda: made.library)
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
        "strength": np.array(1.5, np.float32),
    }


@pytest.fixture(scope="module")
def expected() -> Callable[[dict[str, Any]], Any]:
    session = onnxruntime.InferenceSession(str(FUSION), providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)[0]


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "cache" / "plans").iterdir())


# --- what runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 0])
def test_any_number_of_rows(trt: Recording, recorded: Cuda, expected: Any, rows: int) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert (session.inputs, session.outputs) == (("tokens", "attention", "strength"), ("vectors",))
    given = feeds(rows)
    trt.calls.clear()
    found = session.run({name: recorded.to_device(array) for name, array in given.items()})
    assert isinstance(found["vectors"], HostedArray)
    np.testing.assert_allclose(found["vectors"].get(), expected(given) if rows else np.empty((0, 256)), atol=1e-6)
    # Whole batches, then the tail at the next power of two.
    sizes = [size for _, size in trt.noted("rows")]
    assert sizes == [BATCH] * (rows // BATCH) + [{0: [], 1: [1], 3: [4]}[rows % BATCH]][0]
    if rows == 11:
        tail = trt.noted("fed")[-1][1]
        np.testing.assert_array_equal(tail["tokens"][3], given["tokens"][10])
        np.testing.assert_array_equal(tail["attention"][3], given["attention"][10])


def test_everything_goes_to_the_stream_of_the_device(trt: Recording, recorded: Cuda) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    session.run(feeds(3))
    assert {stream for _, stream in trt.noted("execute")} == {recorded.stream.ptr}
    assert {stream for (stream,) in trt.noted("launch")} == {recorded.stream.ptr}
    # Each buffer has its address once and for all, none is that of what was fed or given back.
    addresses = trt.noted("set_tensor_address")
    assert len({(context, name) for context, name, _ in addresses}) == len(addresses)
    assert len({address for *_, address in addresses}) == len(addresses)


def test_whole_batches_are_captured_once_and_replayed(trt: Recording, recorded: Cuda, expected: Any) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    session.close()
    trt.calls.clear()
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    for seed, rows in enumerate((4, 2, 4, 1, 4, 8)):
        given = feeds(rows, seed)
        np.testing.assert_allclose(session.run_on_host(given)["vectors"], expected(given), atol=1e-6)
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
        np.testing.assert_allclose(session.run_on_host(given)["vectors"], expected(given), atol=1e-6)
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
            np.testing.assert_allclose(session.run_on_host(given)["vectors"], expected(given), atol=1e-6)

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
    np.testing.assert_allclose(session.run_on_host(given)["vectors"], expected(given), atol=1e-6)
    assert len(trt.noted("context")) == 1  # the one that failed is not used again
    trt.refused = {"set_input_shape"}
    with pytest.raises(BackendError, match="tokens may not be"):
        session.run(feeds(1))


def test_no_room_for_a_context(trt: Recording, recorded: Cuda) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    session.close()
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.refused = {"context"}
    with pytest.raises(OutOfMemory, match="memory free"):
        session.run(feeds(1))


def test_feeds_that_do_not_fit(trt: Recording, recorded: Cuda) -> None:
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    good = feeds(2)
    for wrong in (
        {"tokens": good["tokens"]},
        {**good, "tokens": good["tokens"][:1]},
        {**good, "tokens": good["tokens"][:, :5]},
        {**good, "tokens": good["tokens"].astype(np.float64)},
        {**good, "strength": np.ones(2, np.float32)},
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


def test_profiles() -> None:
    assert [profile_for("backbone", 24).padded(rows) for rows in (1, 2, 3, 5, 9, 16, 17, 24)] == [
        1, 2, 4, 8, 16, 16, 24, 24,
    ]  # fmt: skip
    assert profile_for("text", 24) == Profile(1, 1, 64)
    assert Profile(4, 4, 8).padded(1) == 4
    for wrong in ((0, 1, 1), (2, 1, 4), (1, 8, 4)):
        with pytest.raises(ValueError, match="rises"):
            Profile(*wrong)


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
    assert entry["cosine"]["vectors"] > 0.99999
    assert open_tensorrt(FUSION, recorded, batch_size=BATCH, build=False).outputs == ("vectors",)


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
    trt.library = tensorrt_build.Library(trt, "tensorrt_rtx", "11.1.0", None, trt.library.complaints)
    others.append(PlanKey.of(FUSION, "A", (9, 0), profile))
    assert len({k.file(".plan") for k in (key, *others)}) == 8
    with pytest.raises(PlanStale, match="no TensorRT plan for emulated yet"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH, build=False)


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
    with pytest.raises(PlanStale) as caught:
        open_tensorrt(FUSION, recorded, batch_size=BATCH, build=False)
    assert caught.value.exit_code == 4
    session = open_tensorrt(FUSION, recorded, batch_size=BATCH)
    assert len(trt.noted("build")) == 2
    given = feeds(5)
    np.testing.assert_allclose(session.run_on_host(given)["vectors"], expected(given), atol=1e-6)
    open_tensorrt(FUSION, recorded, batch_size=BATCH, build=False)


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
    with pytest.raises(ModelError, match=r"fusion.onnx is refused: vectors of \d rows has cosine") as caught:
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
    np.savez(tmp_path / "reference.npz", **known, **other, **{"fusion.vectors": expected(feeds(3, 1))})
    with pytest.raises(ModelError, match="refused"):
        open_tensorrt(path, recorded, batch_size=BATCH)
    np.savez(tmp_path / "reference.npz", **known, **other, **{"fusion.vectors": expected(given)})
    trt.calls.clear()
    open_tensorrt(path, recorded, batch_size=BATCH)
    np.testing.assert_array_equal(trt.noted("fed")[0][1]["tokens"][:3], given["tokens"])
    (sidecar,) = (tmp_path / "cache" / "plans").glob("*.json")
    assert json.loads(sidecar.read_text())["precision"] == "fp16"


def test_the_same_feeds_every_time() -> None:
    first, second = (sample_feeds(SIGNATURE) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in SIGNATURE)
    np.testing.assert_allclose(first["attention"].sum(1), 1, atol=1e-6)
    assert (first["attention"].min() > 0, float(first["strength"])) == (True, 1.5)
    ids = sample_feeds({"token_ids": (np.dtype(np.int64), (77,))})["token_ids"]
    assert (ids.shape, ids.dtype, ids.min() >= 1, ids.max() < 100) == ((3, 77), np.int64, True, True)
    frames = sample_feeds({"frames": (np.dtype(np.uint8), (8, 8, 3))})["frames"]
    assert (frames.dtype, int(frames.max()) > 240, int(frames.min()) < 16) == (np.uint8, True, True)


def test_what_cannot_be_built_is_told(trt: Recording, recorded: Cuda, tmp_path: Path) -> None:
    trt.refused = {"parse"}
    with pytest.raises(ModelError, match=r"cannot parse fusion\.onnx: no importer \(in Odd 'the_node'\)"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.refused = {"build"}
    with pytest.raises(ModelError, match=r"cannot build fusion\.onnx: build is out of order"):
        open_tensorrt(FUSION, recorded, batch_size=BATCH)
    trt.refused = set()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    trt.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        open_tensorrt(FUSION, recorded, batch_size=BATCH, progress=stop)
    assert trt.noted("build") == []
    assert files(tmp_path) == [".lock"]


def test_measurements_are_kept(trt: Recording, tmp_path: Path) -> None:
    timings = tmp_path / "x.timings"
    for content, taken in ((None, b""), (b"timed", b"timed"), (b"damaged", b"")):
        if content is not None:
            timings.write_bytes(content)
        trt.calls.clear()
        build_plan(FUSION, Profile(1, 1, 1), capability=(9, 0), timing_cache=timings)
        assert trt.noted("set_timing_cache") == [[taken, False]]
        assert timings.read_bytes() == b"timed"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["x.timings"]


def test_one_thread_builds_and_the_others_wait(trt: Recording, recorded: Cuda) -> None:
    with ThreadPoolExecutor(6) as pool:
        sessions = list(pool.map(lambda _: open_tensorrt(FUSION, recorded, batch_size=BATCH), range(6)))
    assert len(trt.noted("build")) == 1
    assert len(sessions) == 6


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


def test_a_write_that_fails_harms_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))
    key = PlanKey("0", "tensorrt 11", "A", "9.0", "fp32", (1, 4, 4))
    with building(key):
        write_plan(key, b"first", {})
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        whole(path, content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with building(key), pytest.raises(OSError, match="No space"):
        write_plan(key, b"second", {})
    assert read_plan(key) == b"first"
    assert sorted(path.suffix for path in (tmp_path / "plans").iterdir()) == [".json", ".lock", ".plan"]


def test_the_export_command_builds_plans_for_the_device_at_hand(
    trt: Recording, recorded: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the extra export is not installed")
    backend = SimpleNamespace(ops=SimpleNamespace(arrays=recorded), batch_size=BATCH)
    monkeypatch.setattr("keyreel.cli.videos.resolve", lambda device: backend if device == "cuda" else None)
    done = CliRunner().invoke(app, ["export", "builtin", "--tensorrt"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(FUSION.parent)
    assert len(trt.noted("build")) == 4


def test_the_export_command_looks_for_the_device_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> None:
        raise BackendUnavailable(f"{device} was asked for", probe="cuda driver")

    monkeypatch.setattr("keyreel.cli.videos.resolve", refuse)
    monkeypatch.setattr("keyreel.cli.videos.library", lambda: None)
    done = CliRunner().invoke(app, ["export", "no-such-model", "--tensorrt"])
    assert (done.exit_code, done.stdout) == (5, ""), done.output


def test_a_bundle_is_not_exported_again(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra export is not installed")
    done = CliRunner().invoke(app, ["export", "builtin", "--triton", str(tmp_path / "served"), "--precision", "fp16"])
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert "only --triton and --tensorrt go with it" in done.stderr
    assert not (tmp_path / "served").exists()


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "_MODULES", {"keyreel_has_no_such_module": "tensorrt"})
    tensorrt_build.library.cache_clear()
    with pytest.raises(MissingExtra, match=r"keyreel\[gpu\]"):
        tensorrt_build.library()


# --- onnxruntime on a CUDA device -----------------------------------------------------------------------------------


class _HostProvider(OnnxRuntimeCudaSession):
    """The same code on the memory that the stand-in has."""

    _provider, _device = "CPUExecutionProvider", "cpu"


def _signature(session: Any) -> plans.Signature:
    return {
        node.name: (np.dtype(NUMPY[node.type]), tuple(node.shape[1:]) if node.shape else None)
        for node in session._session.get_inputs()
    }


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


@pytest.mark.parametrize("graph", ["backbone", "attention", "fusion", "text"])
def test_bound_memory_gives_what_copies_give(asked: list[Any], graph: str) -> None:
    cuda, path = host_cuda(), builtin(graph)
    session = _HostProvider(path, cuda)
    assert asked == [
        ([("CPUExecutionProvider", {"device_id": "0", "user_compute_stream": "0"})], {"enable_fallback": 0})
    ]
    given = sample_feeds(_signature(session))
    (output,) = session.outputs
    reference = onnxruntime.InferenceSession(str(path), None, providers=[("CPUExecutionProvider", {})])
    expected = reference.run(None, dict(given))[0]
    # Views that are not contiguous are made so.
    device = {n: cuda.to_device(np.repeat(a, 2, 0))[::2] if a.ndim else cuda.to_device(a) for n, a in given.items()}
    found = session.run(device)[output]
    assert isinstance(found, HostedArray)
    np.testing.assert_allclose(found.get(), expected, atol=1e-6)
    assert cuda.bytes_to_host == 0
    with pytest.raises(ModelError, match="does not take"):
        session.run({})
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.run(device)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_falls_back_is_refused() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has the CUDA provider here")
    with pytest.raises(BackendUnavailable, match="asked for CUDAExecutionProvider, the session runs on CPU") as caught:
        OnnxRuntimeCudaSession(FUSION, host_cuda())
    assert caught.value.probe == "onnxruntime on cuda"


def test_a_provider_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any, **options: Any) -> Any:
        assert options["enable_fallback"] == 0
        raise RuntimeError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(BackendUnavailable, match="libcudnn") as caught:
        OnnxRuntimeCudaSession(FUSION, host_cuda())
    assert "keyreel[gpu]" in str(caught.value.hint)
    assert capfd.readouterr().out == ""


def test_the_libraries_are_loaded_first_without_a_word(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The wheels of CUDA and cuDNN lie on no path that the loader looks at; what fails is told by the session."""
    order: list[int] = []

    def preload() -> None:
        order.append(len(asked))
        print("Failed to load libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    _HostProvider(FUSION, host_cuda()).close()
    assert (order, len(asked)) == ([0], 1)
    assert capfd.readouterr().out == ""


def test_threads_share_a_bound_session(asked: list[Any], expected: Any) -> None:
    cuda = host_cuda()
    session = _HostProvider(FUSION, cuda)

    def work(seed: int) -> None:
        given = feeds(1 + seed % 5, seed)
        found = session.run({name: cuda.to_device(array) for name, array in given.items()})
        np.testing.assert_allclose(found["vectors"].get(), expected(given), atol=1e-6)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))


@pytest.mark.parametrize(
    ("installed", "expected"), [("tensorrt", "tensorrt"), ("tensorrt_rtx", "onnxruntime"), (None, "onnxruntime")]
)
def test_tensorrt_is_taken_where_it_has_plans_for_the_device(
    monkeypatch: pytest.MonkeyPatch, trt: Recording, recorded: Cuda, installed: str | None, expected: str
) -> None:
    """TensorRT-RTX has none for compute capability 9.0."""

    def found() -> tensorrt_build.Library:
        if installed is None:
            raise MissingExtra("tensorrt", "gpu", "running a model")
        trt.ComputeCapability = SimpleNamespace(SM86=0)
        return tensorrt_build.Library(trt, installed, "1", None, trt.library.complaints)

    monkeypatch.setattr(session_cuda, "library", found)
    monkeypatch.setattr(session_cuda, "open_tensorrt", lambda *_args, **_options: "tensorrt")
    monkeypatch.setattr(session_cuda, "OnnxRuntimeCudaSession", lambda *_args: "onnxruntime")
    assert session_cuda.open_cuda_session(FUSION, recorded, batch_size=BATCH) == expected
    if installed == "tensorrt_rtx":
        ampere = recording_cuda(trt, capability=(8, 6))
        assert session_cuda.open_cuda_session(FUSION, ampere, batch_size=BATCH) == "tensorrt"


# --- a real device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=pytest.mark.needs_cuda)], indirect=True)
@pytest.mark.parametrize("graph", ["backbone", "attention", "fusion", "text"])
def test_the_device_computes_what_the_cpu_does(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, graph: str
) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))
    try:
        found = tensorrt_build.library()
    except MissingExtra:
        found = None
    path = builtin(graph)
    if found is not None and found.supports(cuda.capability):
        session: Any = open_tensorrt(path, cuda, batch_size=8)
        signature = session.signature
    elif "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        session = OnnxRuntimeCudaSession(path, cuda)
        signature = _signature(session)
    else:
        pytest.skip("neither TensorRT for this device nor onnxruntime-gpu")
    given = {n: a if a.ndim == 0 else np.resize(a, (19, *a.shape[1:])) for n, a in sample_feeds(signature).items()}
    expected = OnnxRuntimeSession(path).run(given)
    for _ in range(3):
        (output,) = session.outputs
        result = cuda.to_host(session.run({n: cuda.to_device(a) for n, a in given.items()})[output])
        np.testing.assert_allclose(result, expected[output], atol=2e-2 * float(np.abs(expected[output]).max()))
    session.close()
