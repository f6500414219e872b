"""The model repository for Triton Inference Server: its configuration by Triton's own schema, its graphs by value."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import onnxruntime

from keyreel.cli.documents import ExportedModel
from keyreel.errors import ModelError
from keyreel.models import verify
from keyreel.render.documents import schema_of
from keyreel.runtime.bundle import Bundle
from keyreel.runtime.text import Tokenizer
from keyreel_export import triton

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's ModelConfig. Its module is loaded by its file: the package around it wants grpcio."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("tritonclient is not installed")
    file = Path(package.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builtin() -> Bundle:
    return Bundle.find("builtin")


@pytest.fixture(scope="module")
def repository(builtin: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton.export_triton(builtin, tmp_path_factory.mktemp("served") / "models", max_batch_size=48, instances=2)


def outputs(path: Path, **feeds: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip((entry.name for entry in session.get_outputs()), session.run(None, feeds), strict=True))


def run(path: Path, **feeds: Any) -> Any:
    return next(iter(outputs(path, **feeds).values()))


def parsed(schema: Any, folder: Path, model: str) -> Any:
    from google.protobuf import text_format

    return text_format.Parse((folder / model / "config.pbtxt").read_text("utf-8"), schema.ModelConfig())


@pytest.mark.parametrize("count", [1, 5])
def test_the_merged_graph_gives_what_the_bundle_gives(builtin: Bundle, repository: Path, count: int) -> None:
    frames = verify.sample_frames(112, 112, count=count, seed=3)
    tokens = run(builtin.file("backbone.onnx"), frames=frames)
    attention = run(builtin.file("attention.onnx"), tokens=tokens)
    given = {"tokens": tokens, "attention": attention}
    own = outputs(builtin.file("fusion.onnx"), **given, change=np.zeros_like(attention))
    found = outputs(repository / "keyreel_image/1/model.onnx", frames=frames)
    assert list(found) == ["scene", "subject", "map"]
    for name, array in own.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5, err_msg=name)
    weights = attention ** builtin.manifest["fusion"]["power"]
    np.testing.assert_allclose(found["map"], weights / weights.sum(1, keepdims=True), rtol=1e-3)
    moving = outputs(builtin.file("fusion.onnx"), **given, change=np.eye(49, dtype=np.float32)[:count])
    assert np.abs(found["map"] - moving["map"]).max() > 1e-2


def test_text_runs_with_the_tokenizer_beside_it(builtin: Bundle, repository: Path) -> None:
    texts = ["a dog", "", "long " * 90]
    beside = repository / "keyreel_text/tokenizer.json"
    ids = Tokenizer(beside, clean=builtin.clean, context_length=builtin.context_length).encode(texts)
    found = run(repository / "keyreel_text/1/model.onnx", token_ids=ids)
    np.testing.assert_allclose(found, run(builtin.file("text.onnx"), token_ids=ids), atol=1e-6)


def test_configuration(schema: Any, builtin: Bundle, repository: Path) -> None:
    image, text = (parsed(schema, repository, model) for model in ("keyreel_image", "keyreel_text"))
    for config, folder in ((image, "keyreel_image"), (text, "keyreel_text")):
        assert (config.name, config.platform, config.max_batch_size) == (folder, "onnxruntime_onnx", 48)
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        group = config.instance_group[0]
        assert (group.count, group.kind) == (2, schema.ModelInstanceGroup.KIND_AUTO)
        assert config.version_policy.latest.num_versions == 1
        assert config.parameters["keyreel_bundle_sha256"].string_value == builtin.sha256
        # Triton adds the batch to these dimensions and holds them against the graph's.
        graph = onnxruntime.InferenceSession(
            str(repository / folder / "1/model.onnx"), providers=["CPUExecutionProvider"]
        )
        for described, real in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
            assert [(entry.name, list(entry.dims)) for entry in described] == [(v.name, v.shape[1:]) for v in real]
            assert all(isinstance(value.shape[0], str) for value in real)
    kinds = [entry.data_type for entry in (image.input[0], *image.output, text.input[0], *text.output)]
    assert kinds == [schema.TYPE_UINT8, *[schema.TYPE_FP32] * 3, schema.TYPE_INT64, schema.TYPE_FP32]


def test_half_precision_stays_on_the_gpu(schema: Any, builtin: Bundle) -> None:
    from google.protobuf import text_format

    half = dataclasses.replace(builtin, manifest={**builtin.manifest, "precision": "fp16"}, name='odd "name"')
    config = text_format.Parse(
        triton._config(half, "m", ("x", "TYPE_UINT8", (1,)), {"y": 1}, 1, 1), schema.ModelConfig()
    )
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU
    assert config.parameters["keyreel_bundle"].string_value == 'odd "name"'


def test_a_repository_is_replaced_and_nothing_else_is(builtin: Bundle, repository: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(repository, tmp_path / "models")
    triton.export_triton(builtin, folder, max_batch_size=16)
    assert "max_batch_size: 16" in (folder / "keyreel_image/config.pbtxt").read_text("utf-8")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == (
        triton.FILES - {"README.md"} - {f"keyreel_{model}/1/model.onnx.data" for model in ("image", "text")}
    )
    (folder / "keyreel_image/2").mkdir()
    (folder / "keyreel_image/2/model.onnx").write_text("mine")
    with pytest.raises(ModelError, match="keyreel_image/2/model"):
        triton.export_triton(builtin, folder)
    with pytest.raises(ModelError, match="is a file"):
        triton.export_triton(builtin, folder / "keyreel_image/config.pbtxt")
    assert (folder / "keyreel_image/2/model.onnx").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_nothing_is_left_of_an_export_that_fails(
    builtin: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = triton._merged

    def damaged(package: Any, bundle: Bundle) -> Any:
        model = merged(package, bundle)
        still = next(node for node in model.graph.node if node.name == "change")
        still.op_type = "Add"  # not nothing, but twice the attention
        return model

    monkeypatch.setattr(triton, "_merged", damaged)
    with pytest.raises(ModelError, match="differs"):
        triton.export_triton(builtin, tmp_path / "models")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="max_batch_size"):
        triton.export_triton(builtin, tmp_path / "models", max_batch_size=0)


def test_the_command_line(tmp_path: Path) -> None:
    target = tmp_path / "models"
    command = [sys.executable, "-W", "error", "-m", "keyreel", "export", "builtin", "--triton", str(target), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    jsonschema.validate(printed, schema_of(ExportedModel))
    assert printed["manifest"]["name"] == "builtin"
    assert (target / "keyreel_image/1/model.onnx").is_file()
