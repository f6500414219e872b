"""Backbones in 8 bits: what is quantised, how far vectors move, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")


import onnx
import tiny_models
from cuda_on_host import host_cuda
from onnx import TensorProto, numpy_helper

from keyreel.engine import Engine
from keyreel.errors import ModelError
from keyreel.models import quantize
from keyreel.runtime import backend
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.tensorrt import build_plans
from keyreel_export.bundle import export_model
from keyreel_export.triton import export_triton
from keyreel_kernels.ops import ops_on

pytestmark = pytest.mark.full

VIT = "keyreel-tiny-vit"


@pytest.fixture(scope="module")
def exported(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYREEL_CACHE", str(cache))
        folder = export_model(VIT, precision="int8", attention="uniform", random_weights=True, seed=7)
        assert Bundle.find(f"{VIT}@int8").folder == folder
    return Bundle.load(folder)


def test_the_backbone_is_in_8_bits_and_nothing_else(exported: Bundle) -> None:
    assert (exported.name, exported.precision) == (f"{VIT}@int8", "int8")
    kinds = {
        name: Counter(node.op_type for node in onnx.load(str(exported.file(f"{name}.onnx"))).graph.node)
        for name in ("backbone", "attention", "fusion", "text")
    }
    # Three blocks of four products each, of which the last is taken in by the pooling at its keys and values.
    assert kinds["backbone"]["MatMulInteger"] >= 8
    assert not any(kinds[name]["MatMulInteger"] for name in ("attention", "fusion", "text"))
    weights = onnx.load(str(exported.file("backbone.onnx"))).graph.initializer
    quantised = [numpy_helper.to_array(w) for w in weights if w.data_type == TensorProto.INT8]
    # 7 bits: sums of two products of 8 and 7 bits fit 16.
    assert max(int(np.abs(w.astype(int)).max()) for w in quantised) <= 64
    assert sorted(exported.manifest["files"]) == [
        "attention.onnx", "backbone.onnx", "fusion.onnx", "text.onnx", "tokenizer.json",
    ]  # fmt: skip


def test_vectors_equal_open_clip_within_the_floor(open_clip: Any, exported: Bundle) -> None:
    frames = quantize.pictures(exported.image, None, seed=7)
    model = tiny_models.build(open_clip, VIT, seed=7)
    stock = tiny_models.stock_vectors(model, frames)
    with Engine(exported, backend.resolve("cpu", precision="int8")) as engine:
        assert "inference by onnxruntime" in engine.backend.reason
        found = engine.embed(frames)
    cosines = (found * stock).sum(1)
    assert cosines.min() >= quantize.MIN_COSINE
    assert not np.allclose(found, stock, atol=1e-5)
    # The manifest's numbers are these, measured again another way: by the engine, against torch.
    numbers = exported.manifest["verify"]
    assert numbers["int8_frames"] == len(frames) == 16
    assert numbers["int8_cosine"] == pytest.approx(float(cosines.min()), abs=2e-5)
    assert numbers["int8_cosine_mean"] == pytest.approx(float(cosines.mean()), abs=2e-5)
    # What was measured of the float32 backbone does not stand there as if it were of this one.
    assert not [name for name in numbers if name.startswith(("backbone", "identity"))]
    assert numbers["text_cosine"] >= 0.9999


def test_a_model_that_8_bits_spoil_is_refused(open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MIN_COSINE", 1.1)
    with pytest.raises(ModelError, match=r"in 8 bits vectors differ: cosine .*allowed >= 1\.1") as caught:
        export_model(VIT, tmp_path / "out", precision="int8", attention="uniform", random_weights=True)
    assert "--verify-video" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []  # nothing is left of an export that fails


def test_convolutions_alone_gain_nothing(tmp_path: Path) -> None:
    source = Bundle.find("builtin")
    for name in ("backbone.onnx", "attention.onnx", "fusion.onnx"):
        shutil.copy(source.file(name), tmp_path / name)
    before = (tmp_path / "backbone.onnx").read_bytes()
    with pytest.raises(ModelError, match="only convolutions") as caught:
        quantize.quantize_backbone(tmp_path, quantize.pictures(source.image, None, 0), "tokens")
    assert "fp32" in str(caught.value.hint)
    assert (tmp_path / "backbone.onnx").read_bytes() == before


def test_it_is_for_cpus(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        raise AssertionError

    cuda = backend.Backend("cuda:0", "asked for", ops_on(host_cuda()), stream, stream, 4)
    with pytest.raises(ModelError, match=r"is in int8, which cuda:0 \(asked for\) does not run") as caught:
        Engine(exported, cuda)
    assert "--precision fp32" in str(caught.value.hint)
    with pytest.raises(ModelError, match="int8, which is for CPUs"):
        export_triton(exported, tmp_path / "triton")
    with pytest.raises(ModelError, match="int8, which is for CPUs"):
        build_plans(exported, host_cuda(), batch_size=4)
    assert json.loads((exported.folder / "manifest.json").read_text())["precision"] == "int8"
