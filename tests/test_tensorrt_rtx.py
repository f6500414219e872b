"""Every exported graph builds under TensorRT-RTX, which needs no GPU to build, with the product's own code."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (Linux on x86_64 has it)")

import onnx
import tensorrt_rtx_bindings as trt
import tiny_models
import torch
from cuda_on_host import host_cuda
from onnx import TensorProto, helper

from keyreel.errors import BackendUnavailable, ModelError, PlanStale
from keyreel.runtime.bundle import GRAPHS, Bundle
from keyreel.runtime.plans import REFERENCE, PlanKey, reference
from keyreel.runtime.sessions import OnnxRuntimeSession
from keyreel.runtime.tensorrt import TensorRTSession, open_tensorrt
from keyreel.runtime.tensorrt_build import Profile, build_plan, load_tensorrt, profile_for
from keyreel_export.bundle import export_model

pytestmark = pytest.mark.full

FAMILIES = {  # model, spatial attention
    "cls": ("keyreel-tiny-vit", "builtin"),
    "attention_pool": ("keyreel-tiny-rn", "uniform"),
    "map": ("keyreel-tiny-map", "builtin"),
    "average": ("keyreel-tiny-avg", "builtin"),
}
CASES = [(family, precision) for family in FAMILIES for precision in ("fp32", "fp16")]
BATCH = 16
AMPERE = (8, 6)


def _export(family: str, precision: str, folder: Path) -> Path:
    """In a process of its own, one a core."""
    torch.set_num_threads(1)
    (folder / "configs").mkdir(parents=True)
    tiny_models.register(folder / "configs")
    name, network = FAMILIES[family]
    return export_model(name, folder / "bundle", precision=precision, attention=network, random_weights=True, seed=7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("families")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = {
            (family, precision): pool.submit(_export, family, precision, folder / family / precision)
            for family, precision in CASES
        }
        return {case: future.result() for case, future in made.items()}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYREEL_CACHE", str(tmp_path))


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_every_graph_builds(exported: dict[tuple[str, str], Path], family: str, precision: str) -> None:
    bundle = Bundle.load(exported[family, precision])
    assert (bundle.family, bundle.manifest["precision"]) == (family, precision)
    sizes = {}
    for graph in GRAPHS:
        path = bundle.file(graph)
        seen: list[float] = []

        def progress(stage: str, done: float, total: float | None, seen: list[float] = seen, path: Path = path) -> None:
            assert (stage, total) == (f"plan {path.stem}", 1.0)
            seen.append(done)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan = build_plan(path, profile_for(path.stem, BATCH), capability=AMPERE, progress=progress)
        sizes[graph] = len(plan)
        assert len(seen) > 10
        assert seen == sorted(seen)
        assert 0 < seen[0] < seen[-1] <= 1
        weights = sum(w.ByteSize() for w in onnx.load(str(path)).graph.initializer)
        assert len(plan) > 0.9 * weights
        assert load_tensorrt().reason() == "it gave no reason"
    if precision == "fp32":
        half = Bundle.load(exported[family, "fp16"])
        smaller = build_plan(half.file("text.onnx"), profile_for("text", BATCH), capability=AMPERE)
        # Nothing was widened on the way: a strongly typed plan has the weights as the graph has them.
        assert len(smaller) < 0.7 * sizes["text.onnx"]


def test_the_builtin_model_builds() -> None:
    bundle = Bundle.find("builtin")
    for graph in GRAPHS:
        path = bundle.file(graph)
        assert len(build_plan(path, profile_for(path.stem, 64), capability=AMPERE)) > path.stat().st_size // 2


def test_devices_that_it_has_no_plans_for(exported: dict[tuple[str, str], Path]) -> None:
    path = exported["cls", "fp16"] / "fusion.onnx"
    assert load_tensorrt().flavour == "tensorrt_rtx"
    assert (load_tensorrt().supports(AMPERE), load_tensorrt().supports((9, 0))) == (True, False)
    with pytest.raises(BackendUnavailable, match=r"does not build for compute capability 9\.0"):
        build_plan(path, profile_for("fusion", BATCH), capability=(9, 0))


def _graph(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def test_graphs_that_cannot_be_built(tmp_path: Path) -> None:
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, ["n", 8, 8, 3])
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3, 8, 8])
    # What the export avoids: a uint8 input that is permuted before it is cast.
    nodes = [
        helper.make_node("Transpose", ["frames"], ["moved"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["moved"], ["out"], to=TensorProto.FLOAT),
    ]
    path = _graph(tmp_path / "late.onnx", nodes, [frames], [result])
    with pytest.raises(ModelError, match=r"(?s)late\.onnx: .*UInt8"):
        build_plan(path, Profile(1, 2, 2), capability=AMPERE)
    path = _graph(tmp_path / "odd.onnx", [helper.make_node("NoSuchOperator", ["frames"], ["out"])], [frames], [result])
    with pytest.raises(ModelError, match=r"(?s)cannot parse odd\.onnx: .*NoSuchOperator"):
        build_plan(path, Profile(1, 2, 2), capability=AMPERE)
    wide = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    path = _graph(tmp_path / "wide.onnx", [helper.make_node("Neg", ["x"], ["y"])], [wide], [out])
    with pytest.raises(ModelError, match=r"x is \(-1, -1\), only the first dimension may vary"):
        build_plan(path, Profile(1, 2, 2), capability=AMPERE)
    (tmp_path / "none.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"cannot parse none\.onnx"):
        build_plan(tmp_path / "none.onnx", Profile(1, 2, 2), capability=AMPERE)


def test_a_build_can_be_stopped(exported: dict[tuple[str, str], Path]) -> None:
    steps = 0

    def stop(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(exported["map", "fp32"] / "backbone.onnx", Profile(1, 4, 4), capability=AMPERE, progress=stop)
    assert steps == 5


@pytest.mark.parametrize("graph", ["backbone", "attention", "fusion", "text"])
def test_half_precision_brings_its_reference(exported: dict[tuple[str, str], Path], graph: str) -> None:
    half, full = (exported["cls", precision] / f"{graph}.onnx" for precision in ("fp16", "fp32"))
    inputs = {node.name: node for node in onnx.load(str(half)).graph.input}
    signature = {name: (np.dtype(np.float32), ()) for name in inputs}
    feeds, expected = reference(half, signature)
    assert feeds.keys() == inputs.keys()
    assert {array.shape[0] for array in feeds.values() if array.ndim} == {3}
    # The graph of single precision, from the same seed, gives what is written down.
    found = OnnxRuntimeSession(full).run(feeds)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(found[name], array, atol=1e-4)
    assert REFERENCE in Bundle.load(half.parent).manifest["files"]
    assert not (full.parent / REFERENCE).exists()


def test_without_a_device_a_plan_is_stale_and_nothing_is_kept(
    exported: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    """As far as the library goes here: it builds, and says that there is no device when the plan is to be run."""
    path = exported["average", "fp32"] / "fusion.onnx"
    cuda = host_cuda(capability=AMPERE)
    profile = profile_for("fusion", BATCH)
    plan = build_plan(path, profile, capability=AMPERE)
    with pytest.raises(PlanStale, match=r"cudaErr|CUDA"):
        TensorRTSession(plan, cuda, profile, name="fusion.onnx")
    with pytest.raises(PlanStale, match="does not take"):
        open_tensorrt(path, cuda, batch_size=BATCH)
    assert [file.suffix for file in (tmp_path / "plans").iterdir()] == [".lock"]
    key = PlanKey.of(path, cuda.name, cuda.capability, profile)
    assert key.tensorrt == f"tensorrt_rtx {trt.__version__}"
    with pytest.raises(PlanStale, match="does not take"):
        TensorRTSession(b"not a plan", cuda, profile, name="fusion.onnx")
