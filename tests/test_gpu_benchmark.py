"""benchmarks.gpu without a GPU: its runner with cases that work, fail, hang or die, and its cases at tiny sizes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.gpu_cases import clustering, encoders, kernels, parity, peers, runner, video
from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.clocks import Clock, measure, wall_clock
from benchmarks.gpu_cases.runner import Case, Deadline, Missing, Results
from keyreel_kernels.cuda import Cuda
from keyreel_kernels.ops import ops_for, ops_on

ROOT = Path(__file__).resolve().parents[1]


class TinyBench(Bench):
    """A bench on another device than a GPU, timed on the wall, with a few MB of memory."""

    def __init__(self, ops: Any, scratch: Path = Path("nowhere")) -> None:
        super().__init__(quick=True, scratch=scratch)
        self.ops, self.clock = ops, wall_clock()

    def measure(self, work: Callable[[], Any], clock: Clock | None = None) -> dict[str, Any]:
        return measure(work, clock or self.clock, budget_seconds=0.0)

    def free_bytes(self) -> int:
        return 1 << 22


# --- the runner -------------------------------------------------------------------------------------------------------


def raising(error: Exception) -> Callable[[Any], Any]:
    def run(_: Any) -> Any:
        raise error

    return run


def test_a_row_says_what_became_of_its_case() -> None:
    late, soon = Deadline.after(60), Deadline.after(5)
    good = runner.run_case(Case("good", lambda bench: {"ms": bench + 1}), 41, late)
    assert {key: good[key] for key in ("case", "status", "ms")} == {"case": "good", "status": "ok", "ms": 42}
    missing = runner.run_case(Case("peer", lambda _: runner.import_or_missing("no_such_peer")), None, late)
    assert missing["status"] == "missing"
    assert "no_such_peer is not installed" in missing["reason"]
    extra = ModuleNotFoundError("No module named 'av'", name="av.video")
    missing = runner.run_case(Case("deep", raising(extra)), None, late)
    assert (missing["status"], missing["reason"]) == ("missing", "av is not installed")
    own = ModuleNotFoundError("No module named 'keyreel.nvdec'", name="keyreel.nvdec")
    assert runner.run_case(Case("own", raising(own)), None, late)["status"] == "failed"
    failed = runner.run_case(Case("bad", raising(ValueError("three are too many"))), None, late)
    assert (failed["status"], failed["error"]) == ("failed", "ValueError: three are too many")
    assert failed["where"].startswith("test_gpu_benchmark.py:")
    assert runner.run_case(Case("long", raising(AssertionError()), seconds=30), None, soon)["status"] == "not run"


def test_a_package_that_does_not_load_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_a_driver.py").write_text("raise RuntimeError('libnvidia-encode.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Missing, match=r"does not load: RuntimeError: libnvidia-encode\.so\.1"):
        runner.import_or_missing("needs_a_driver")


WORKER = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "dies":
        os._exit(139)
    if name == "hangs":
        time.sleep(60)
    row = {"case": name, "status": "ok", "process": os.getpid(), "device_lost": name == "loses"}
    print(json.dumps(row), flush=True)
    if name == "loses":
        sys.exit()
"""


def test_workers_that_die_hang_or_lose_the_device_are_replaced(tmp_path: Path) -> None:
    names = ("first", "dies", "second", "hangs", "third", "loses", "last")
    limits = {"hangs": 1.5}
    cases = [Case(name, raising(AssertionError()), seconds=0, most_seconds=limits.get(name, 60)) for name in names]
    rows: list[dict[str, Any]] = []
    runner.supervise(cases, [sys.executable, "-c", WORKER], Deadline.after(60), rows.append, tmp_path)
    assert [row["case"] for row in rows] == list(names)
    found = {row["case"]: row for row in rows}
    assert found["dies"]["error"] == "its process ended with code 139"
    assert found["hangs"]["error"] == "no answer within 2 s; its process was ended"
    assert {row["status"] for row in rows} == {"ok", "failed"}
    # One process for each stretch between two accidents.
    assert len({found[name]["process"] for name in ("first", "second", "third", "last")}) == 4
    assert found["third"]["process"] == found["loses"]["process"]


def test_what_does_not_fit_is_recorded_as_not_run(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    cases = [Case(name, raising(AssertionError()), seconds=9) for name in "ab"]
    runner.supervise(cases, ["/no/such/worker"], Deadline.after(5), rows.append, tmp_path)
    assert [(row["case"], row["status"]) for row in rows] == [("a", "not run"), ("b", "not run")]
    assert "takes about 9" in rows[0]["reason"]


def test_a_worker_stops_when_the_device_is_lost(tmp_path: Path) -> None:
    freed: list[str] = []
    bench = SimpleNamespace(lost=lambda: True, free=lambda: freed.append("free"))
    cases = [Case("good", lambda _: {}), Case("kills", raising(RuntimeError("illegal access"))), Case("next", dict)]
    with (tmp_path / "out").open("w+") as out:
        runner.work(cases, bench, Deadline.after(60), out)
        out.seek(0)
        rows = [json.loads(line) for line in out]
    assert [(row["case"], row.get("device_lost", False)) for row in rows] == [("good", False), ("kills", True)]
    assert freed == ["free"]


def test_results_grow_by_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "gpu.jsonl"
    path.parent.mkdir()
    path.write_text('{"case": "of yesterday"}\n')
    results = Results(path, {"gpu": "none"})
    assert path.read_text() == '{"case": "of yesterday"}\n'
    results.add({"case": "a", "status": "ok", "ms": 1.23456789})
    results.add({"case": "b", "status": "missing", "reason": "not installed"})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["of yesterday", "a", "b"]
    assert rows[1] == {"case": "a", "status": "ok", "ms": 1.23456789, "environment": {"gpu": "none"}}
    assert [file.name for file in path.parent.iterdir()] == ["gpu.jsonl"]
    assert "ok       a: ms 1.235" in capsys.readouterr().err


def test_times_are_medians_between_marks() -> None:
    now = [0.0]
    costs = iter([50.0, 10.0, 3.0, 1.0, 9.0, 2.0, 2.0, 5.0])

    def work() -> None:
        now[0] += next(costs)

    clock = Clock(lambda: now[0], lambda first, last: last - first, lambda: None)
    row = measure(work, clock, budget_seconds=0.0)
    assert (row["ms"], row["ms_least"], row["ms_back_to_back"], row["runs"]) == (3.0, 1.0, 3.0, 3)


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_a_device_nothing_is_written(tmp_path: Path) -> None:
    if gpu.device_name(0) is not None:
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "-o", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "no CUDA device 0" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_worker_says_nothing_but_rows(tmp_path: Path) -> None:
    names = ["parity tests", "copy within the device"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--scratch", str(tmp_path), "--stop-at", "0", "--worker", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((row["case"], row["status"]) for row in rows) == [(name, "not run") for name in sorted(names)]


def test_a_run_records_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on a machine that only says that it has a device: each case fails in its own way, and is recorded."""
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(gpu, "device_name", lambda _: "a card that is not there")
    monkeypatch.setattr(gpu, "machine", lambda _, name: {"gpu": name})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--only", "copy", "barriers", "-o", str(out)])
    assert gpu.main() == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["case"], row["status"]) for row in rows] == [
        ("copy within the device", "failed"),
        ("barriers", "failed"),
    ]
    assert rows[0]["environment"] == {"gpu": "a card that is not there", "quick": True}


def test_cases_have_names_of_their_own_and_an_order() -> None:
    full, quick = (gpu.all_cases(quick=quick) for quick in (False, True))
    names = [case.name for case in full]
    assert len(set(names)) == len(names)
    assert [case.name for case in quick] == [case.name for case in full if case.quick]
    assert names[0] == "parity tests"
    for shape in ("256x600", "1x600", "1x3000", "1x100000"):
        assert names.index(f"cluster {shape} float16: keyreel") < names.index(f"cluster {shape}: flash-kmeans")
    assert all(case.most_seconds > case.seconds for case in full)


@pytest.mark.parametrize(
    ("output", "within", "expected"),
    [
        (
            "..F.\nFAILED tests/test_a.py::test_b[cuda] - assert 1 == 2\n1 failed, 3 passed, 2 skipped in 4.50s\n",
            True,
            {"failed": 1, "passed": 3, "skipped": 2, "status": "failed", "failures": 1},
        ),
        ("....\n4 passed, 9 deselected in 4.50s\n", True, {"passed": 4, "status": "ok", "failures": 0}),
        ("..F... [ 50%]\n..", False, {"passed": 7, "failed": 1, "status": "failed", "failures": 0}),
    ],
)
def test_what_pytest_said(output: str, within: bool, expected: dict[str, Any]) -> None:
    row = parity.summed_up(output, within_limit=within, limit_seconds=9)
    row["failures"] = len(row["failures"])
    assert {key: row[key] for key in expected} == expected
    assert row["within_limit"] is within


def test_no_test_at_all_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match="no test ran"):
        parity.summed_up("12 deselected in 0.50s", within_limit=True, limit_seconds=9)


def test_parity_selects_the_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_files", lambda: ["tests/test_gpu_benchmark.py"])
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", parity.MARK, *parity._files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert chosen
    assert all("[cuda" in line or "-cuda" in line for line in chosen)
    assert not [line for line in chosen if "emulated" in line]


# --- the cases --------------------------------------------------------------------------------------------------------


def test_clustering_gives_the_quality_of_the_reference(cuda: Cuda) -> None:
    at = {"width": 64, "clusters": 5}
    rows = [clustering.keyreel(TinyBench(ops), 3, 40, "float32", 0.1, **at) for ops in (ops_for("cpu"), ops_on(cuda))]
    for key in ("inertia", "fit"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-3)
    assert rows[1]["rounds_most"] >= 2
    assert rows[1]["ms"] > 0


def test_quality_is_what_scikit_learn_measures() -> None:
    given = clustering.problem(1, 90, 16, 4)
    row, labels = peers.scikit_learn(TinyBench(ops_for("cpu")), given)
    from sklearn.cluster import KMeans

    model = KMeans(4, init=given.first[0], n_init=1, max_iter=300, tol=0).fit(given.x[0])
    assert clustering.quality(given, model.labels_[None])["inertia"] == pytest.approx(model.inertia_ / 90, rel=1e-4)
    own = given.x[0] * 1.0
    means = np.stack([own[model.labels_ == j].mean(0) for j in range(4)])[model.labels_]
    cosine = (own * means).sum(1) / np.linalg.norm(means, axis=1)
    assert clustering.quality(given, model.labels_[None])["fit"] == pytest.approx(float(cosine.mean()), rel=1e-5)
    assert labels.shape == (1, 90)
    assert row["rounds_most"] <= peers.ROUNDS


def test_the_peer_in_torch_is_lloyds_algorithm() -> None:
    torch = pytest.importorskip("torch")
    from sklearn.cluster import KMeans

    given = clustering.problem(3, 200, 32, 6)
    labels = peers.lloyd(torch, torch.from_numpy(given.x), torch.from_numpy(given.first), rounds=60).numpy()
    for x, first, own in zip(given.x, given.first, labels, strict=True):
        model = KMeans(6, init=first, n_init=1, max_iter=60, tol=0, algorithm="lloyd").fit(x)
        np.testing.assert_array_equal(own, model.labels_)


def test_search_finds_what_was_planted(cuda: Cuda) -> None:
    row = kernels.top_k(TinyBench(ops_on(cuda)), 700, 2)
    assert (row["recall"], row["rows"], row["queries"]) == (1.0, 700, 2)
    assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])


def test_rows_that_fit() -> None:
    assert kernels.rows_that_fit(TinyBench(ops_for("cpu")), 0.5) == (1 << 21) // 1024


def test_pictures_and_shift_at_tiny_sizes(cuda: Cuda) -> None:
    bench = TinyBench(ops_on(cuda))
    row = kernels.surfaces(bench, 30, 44, 2)
    assert row["gb_per_s"] == pytest.approx((2 * 30 * 44 * 1.5 + 2 * 224 * 224 * 3) / row["ms_back_to_back"] / 1e6)
    assert row["pictures_per_s"] == pytest.approx(2000 / row["ms_back_to_back"])
    row = kernels.adaptive_shift(bench, 12, (3, 4), 16)
    assert row["gb_per_s"] == pytest.approx(3 * 12 * 13 * 16 * 4 / row["ms_back_to_back"] / 1e6)


def test_barriers_are_passed(cuda: Cuda) -> None:
    row = kernels.barriers(TinyBench(ops_on(cuda)), rounds=3)
    assert row["grid_blocks"] == cuda.multiprocessors
    assert row["grid_us"] > 0
    assert (row.get("cluster_us", 1) > 0) == (cuda.capability >= (9, 0) or "cluster_us" not in row)


def test_torch_stands_in_for_the_runtime(cuda: Cuda) -> None:
    pytest.importorskip("torch")
    emulated = cuda.name == "emulated"  # where torch cannot see the arrays: the modules are then run on NumPy's
    bench = TinyBench(ops_for("cpu") if emulated else ops_on(cuda))
    model = encoders.builtin()
    sessions = {graph: encoders.session(model, graph, bench.arrays) for graph in model.modules}
    row = encoders.throughput(bench, model.bundle, sessions, 3)
    assert row["cosine"] == pytest.approx(1, abs=1e-6 if emulated else 1e-4)  # torch's convolutions may take TF32
    assert row["images_per_s"] == pytest.approx(3000 / row["ms_back_to_back"])
    backend = encoders.torch_backend(TinyBench(ops_on(cuda)), model, strict=True)
    assert (backend.device, backend.ops.arrays) == ("cuda:0", cuda)
    assert "torch" in backend.reason


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video.render(tmp_path_factory.mktemp("clip") / "clip.mp4", 96, 128, frames=150)


def test_the_clip_has_b_frames_and_cuts(rendered: Path) -> None:
    import av
    from av.video.frame import PictureType

    with av.open(str(rendered)) as container:
        decoded = list(container.decode(video=0))
    frames = [(PictureType(frame.pict_type).name, frame.to_ndarray(format="rgb24")) for frame in decoded]
    assert len(frames) == 150
    assert "B" in {kind for kind, _ in frames}
    moved = [float(np.abs(a.astype(int) - b).mean()) for (_, a), (_, b) in itertools.pairwise(frames)]
    assert int(np.argmax(moved)) == 119  # between the scenes


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from keyreel import Engine

    monkeypatch.setattr(encoders, "engine", lambda *_, **__: (Engine.from_pretrained(device="cpu"), "onnxruntime"))


@pytest.mark.usefixtures("on_the_cpu")
def test_a_summary_is_timed(rendered: Path) -> None:
    bench = TinyBench(ops_for("cpu"))
    bench.video, bench.raw_fps = rendered, 1000.0
    row = video.end_to_end(bench, "fps")
    assert (row["video_frames"], row["frames"], row["bytes_to_host"]) == (150, 10, 0)
    assert row["video_fps"] == pytest.approx(150 / row["total_seconds"])
    assert row["share_of_raw_nvdec"] == pytest.approx(row["video_fps"] / 1000)
    with pytest.raises(Missing, match="not needed"):
        video.end_to_end(bench, "fps", strict=False)


@pytest.mark.usefixtures("on_the_cpu")
def test_opens_watch_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "SIZES", ((96, 128), (64, 240)))
    bench = TinyBench(ops_for("cpu"), scratch=tmp_path)
    row = video.opens(bench, count=20)
    assert (row["opens"], row["files"], row["flat"], row["grown_mib"]) == (20, 4, True, [0.0] * 9)
    shrinking = iter(range(1 << 30, 0, -(20 << 20)))
    monkeypatch.setattr(bench, "free_bytes", lambda: next(shrinking))
    row = video.opens(bench, count=20)
    assert row["flat"] is False
    assert row["grown_mib"] == [20.0 * n for n in range(9)]


def fake_codec(frames: int, *, opens: bool = True) -> Any:
    """PyNvVideoCodec as far as the benchmark uses it: a demuxer of `frames` packets, a picture each."""

    class Demuxer:
        def __init__(self, path: str) -> None:
            assert path.endswith(".mp4")

        def __iter__(self) -> Any:
            return iter(range(frames))

        def GetNvCodecId(self) -> int:
            return 4

    def decoder(*, gpuid: int, codec: int, usedevicememory: bool) -> Any:
        if not opens:
            raise RuntimeError("no decoder is free")
        assert (gpuid, codec, usedevicememory) == (0, 4, True)
        return SimpleNamespace(Decode=lambda packet: [packet])

    def caps(**wanted: Any) -> dict[str, int]:
        return {"supported": wanted["codec"] != "AV1", "num_decoder_engines": 3}

    names = {name: name for name in ("H264", "HEVC", "VP9", "AV1")}
    return SimpleNamespace(
        __version__="2",
        cudaVideoCodec=SimpleNamespace(**names),
        cudaVideoChromaFormat=SimpleNamespace(**{"420": "420"}),
        CreateDemuxer=Demuxer,
        CreateDecoder=decoder,
        GetDecoderCaps=caps,
    )


def test_decoders_are_counted_and_compared(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "codec", lambda: fake_codec(150))
    bench = TinyBench(ops_for("cpu"))
    bench.video = rendered
    row = video.nvdec(bench)
    assert (row["engines"], sorted(row["fps"]), row["frames_missing"]) == (3, [1, 3, 4], 0)
    assert row["best_fps"] == max(row["fps"].values()) == bench.raw_fps
    caps = video.capabilities(bench)
    assert (caps["AV1 8 bit"]["supported"], caps["HEVC 10 bit"]["supported"]) == (0, 1)
    monkeypatch.setattr(video, "codec", lambda: fake_codec(140))
    assert video.raw_frames_per_second(bench, 2)["frames"] == 280
    monkeypatch.setattr(video, "codec", lambda: fake_codec(150, opens=False))
    with pytest.raises(RuntimeError, match="no decoder is free"):
        video.raw_frames_per_second(bench, 2)
