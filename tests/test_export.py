"""The whole export: bundles of tiny models, loaded back with onnxruntime, against open_clip."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import onnx
import onnxruntime
import tiny_models
import torch
from safetensors.torch import save_file

from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound
from keyreel.models import verify
from keyreel.runtime.bundle import Bundle
from keyreel_export import bundle as module
from keyreel_export import onnx as graphs
from keyreel_export import pretrained
from keyreel_export.fusion import FLOOR, POWER
from keyreel_export.triton import export_triton

pytestmark = pytest.mark.full

VIT = "keyreel-tiny-vit"


@pytest.fixture(scope="module")
def exported(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "vit"
    stages: list[tuple[str, float]] = []
    handlers = list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = module.export_model(
            VIT, folder, random_weights=True, seed=7, progress=lambda stage, done, _total: stages.append((stage, done))
        )
    assert made == folder
    assert [stage for stage, _ in stages] == [
        "load", "tokenizer", "reference", "backbone", "attention", "fusion", "text", "done",
    ]  # fmt: skip
    assert logging.getLogger().handlers == handlers
    return folder


def run(folder: Path, graph: str, **feeds: Any) -> Any:
    return outputs(folder, graph, **feeds)[0]


def outputs(folder: Path, graph: str, **feeds: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"), providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == verify.OUTPUTS[graph]
    return session.run(None, feeds)


def chain(folder: Path, frames: Any, change: Any) -> tuple[list[Any], Any]:
    """Scene, subject and map; and the attention that went into them."""
    found = run(folder, "backbone", frames=frames)
    uses_frames = Bundle.load(folder).attention_input == "frames"
    attention = run(folder, "attention", **({"frames": frames} if uses_frames else {"tokens": found}))
    return outputs(folder, "fusion", tokens=found, attention=attention, change=change), attention


@pytest.mark.parametrize("count", [1, 2, 5])
def test_images_equal_open_clip(open_clip: Any, exported: Path, count: int) -> None:
    frames = np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    stock = tiny_models.stock_vectors(tiny_models.build(open_clip, VIT, seed=7), frames)
    change = np.random.default_rng(count).random((count, 16), np.float32)
    (scene, subject, weights), attention = chain(exported, frames, change)
    np.testing.assert_allclose(scene, stock, atol=1e-5)
    assert (scene * stock).sum(1).min() >= 0.9999
    assert np.abs(subject - stock).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(subject, axis=1), 1, atol=1e-5)
    expected = attention**POWER * (FLOOR + change)
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), rtol=1e-4)


def test_texts_equal_open_clip(open_clip: Any, exported: Path) -> None:
    from keyreel.runtime.text import Tokenizer

    texts = ["a photo of a cat", "", "\u732b \U0001f600", "long " * 100]
    ids = Tokenizer(exported / "tokenizer.json", clean="lower", context_length=77).encode(texts)
    model = tiny_models.build(open_clip, VIT, seed=7)
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(VIT)(texts), normalize=True).numpy()
    np.testing.assert_allclose(run(exported, "text", token_ids=ids), expected, atol=1e-5)


def test_manifest(exported: Path) -> None:
    bundle = Bundle.load(exported)
    assert (bundle.name, bundle.family, bundle.grid, bundle.prefix_tokens) == (VIT, "cls", (4, 4), 1)
    assert (bundle.token_width, bundle.embedding_width, bundle.context_length) == (64, 32, 77)
    assert (bundle.image.height, bundle.image.width) == (64, 64)
    assert (bundle.image.mode, bundle.image.interpolation) == ("shortest", "bicubic")
    assert (bundle.subject.slope, bundle.same_scene, bundle.attention_input) == (1.0, {}, "frames")
    manifest = json.loads((exported / "manifest.json").read_text())
    assert [entry["from"] for entry in manifest["sources"]] == ["random weights"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["verify"]["identity_cosine"] >= 0.9999
    assert manifest["verify"]["text_difference"] <= 1e-5
    assert sorted(manifest["files"]) == [
        "attention.onnx",
        "backbone.onnx",
        "fusion.onnx",
        "text.onnx",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("graph", ["backbone", "attention"])
def test_frames_are_cast_before_anything_else(exported: Path, graph: str) -> None:
    """TensorRT parses a graph that permutes uint8, but cannot build it."""
    model = onnx.load(str(exported / f"{graph}.onnx"))
    users = [node.op_type for node in model.graph.node if "frames" in node.input and node.op_type != "Shape"]
    assert users == ["Cast"]
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()


def test_half_precision_with_a_trained_projection(open_clip: Any, tmp_path: Path) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, tmp_path / "fc.safetensors")
    folder = module.export_model(
        "keyreel-tiny-rn",
        tmp_path / "rn",
        precision="fp16",
        attention="uniform",
        projection=tmp_path / "fc.safetensors",
        random_weights=True,
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["precision"], manifest["attention"]["input"]) == ("fp16", "tokens")
    assert len(manifest["fusion"]["projection_sha256"]) == 64
    # An untrained tower sees little difference between pictures: shots of one scene are the more alike.
    assert 0.55 < manifest["fusion"]["scene_similarity"] <= 0.99
    assert Bundle.load(folder).scene_similarity == manifest["fusion"]["scene_similarity"]
    assert "identity_cosine" not in manifest["verify"]
    assert manifest["verify"]["fusion_cosine"] >= 0.999
    kinds = {onnx.load(str(folder / f"{graph}.onnx")).graph.output[0].type.tensor_type.elem_type
             for graph in ("backbone", "attention", "fusion", "text")}  # fmt: skip
    assert kinds == {onnx.TensorProto.FLOAT}
    weights = onnx.load(str(folder / "backbone.onnx")).graph.initializer
    halves = sum(len(w.raw_data) for w in weights if w.data_type == onnx.TensorProto.FLOAT16)
    assert halves > 0.95 * sum(len(w.raw_data) for w in weights)


def test_weights_beside_the_graph_when_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST_INSIDE_BYTES", 1000)
    layer = torch.nn.Linear(64, 32).requires_grad_(False)
    graphs.export_graph(layer, {"x": torch.zeros(2, 64)}, ["y"], tmp_path / "layer.onnx")
    assert (tmp_path / "layer.onnx.data").stat().st_size >= 64 * 32 * 4
    case = graphs.cases(layer, [{"x": np.ones((3, 64), np.float32)}])[0]
    [(found,)] = verify.run_graph(tmp_path / "layer.onnx", [case.feeds], "fp32")
    np.testing.assert_allclose(found, case.expected[0], atol=1e-6)


def test_other_folders_are_left_alone(open_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds holiday\.txt"):
        module.export_model(VIT, tmp_path, random_weights=True)
    with pytest.raises(ModelError, match="is a file"):
        module.export_model(VIT, tmp_path / "holiday.txt", random_weights=True)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


def test_names(open_clip: Any) -> None:
    recipe = pretrained.resolve("ViT-B-32/laion2b_s34b_b79k")
    assert (recipe.architecture, recipe.pretrained, recipe.quick_gelu) == ("ViT-B-32", "laion2b_s34b_b79k", False)
    assert recipe.source["from"] == "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert pretrained.resolve("ViT-B-32/openai").quick_gelu
    assert pretrained.resolve("hf-hub:org/repo").architecture == "hf-hub:org/repo"
    with pytest.raises(ModelNotFound) as caught:
        pretrained.resolve("ViT-B-32/laion2b_s34b_b79")
    assert caught.value.near[0] == "ViT-B-32/laion2b_s34b_b79k"
    with pytest.raises(ModelNotFound) as caught:
        pretrained.resolve("ViT-B32/openai")
    assert "ViT-B-32/openai" in caught.value.near
    with pytest.raises(ModelNotFound, match="openai"):
        pretrained.resolve("ViT-B-32")
    with pytest.raises(ValueError, match="precision"):
        module.export_model(VIT, precision="int4")
    with pytest.raises(ValueError, match="goes with precision int8"):
        module.export_model(VIT, verify_video=Path("x.mp4"))


def test_quick_gelu_follows_the_weights(open_clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip only warns when the tag's activation is not the architecture's, and the vectors are wrong."""
    seen: dict[str, Any] = {}

    def create(*_args: Any, **options: Any) -> Any:
        seen.update(options)
        return torch.nn.Identity()

    monkeypatch.setattr(open_clip, "create_model", create)
    pretrained.load_model(pretrained.resolve("ViT-B-32/openai"))
    assert seen["force_quick_gelu"] is True
    assert seen["weights_only"] is True


def test_local_checkpoints(open_clip: Any, tmp_path: Path) -> None:
    model = tiny_models.build(open_clip, VIT, seed=3)
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    recipe = pretrained.resolve(f"{VIT}/{path}")
    assert recipe.source["from"].startswith("weights.safetensors sha256:")
    loaded = pretrained.load_model(recipe).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointMismatch, match="keyreel-tiny-rn"):
        pretrained.load_model(pretrained.resolve(f"keyreel-tiny-rn/{path}"))


class _Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoint_cannot_run_code(open_clip: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": _Harmful(tmp_path / "harm")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointMismatch, match="cannot be loaded"):
        pretrained.load_model(pretrained.resolve(f"{VIT}/{tmp_path / 'model.pt'}"))
    assert not (tmp_path / "harm").exists()


def test_without_a_network(open_clip: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("ViT-B-32/laion2b_s34b_b79k", "hf-hub:org/repo"):
        with pytest.raises(ModelError) as caught:
            pretrained.load_model(pretrained.resolve(name))
        assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    with pytest.raises(ModelError, match="tokenizer") as caught:
        pretrained.load_tokenizer("ViT-B-16-SigLIP")
    assert "transformers" in str(caught.value.hint)


def test_differences_are_refused() -> None:
    unit = np.eye(2, 4, dtype=np.float32)
    turned = unit.copy()
    turned[0] = (0.99, 0.14106736, 0, 0)
    good = [(unit, unit)]
    assert verify.check("fusion", good, good, "fp32") == {"fusion_difference": 0.0, "fusion_cosine": 1.0}
    for graph in verify.BOUNDS["fp32"]:
        for wrong in (turned, unit * np.float32(np.nan)):
            for found in ((wrong, unit), (unit, wrong)):  # any of a graph's outputs
                with pytest.raises(ModelError, match="differs from its reference"):
                    verify.check(graph, [found], good, "fp32")
    with pytest.raises(ModelError, match="float64"):
        verify.check("fusion", [(unit, unit.astype(np.float64))], good, "fp32")


def test_a_map_made_from_frames_is_served_as_well(exported: Path, tmp_path: Path) -> None:
    export_triton(Bundle.load(exported), tmp_path / "models")
    frames = np.random.default_rng(4).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    served = tmp_path / "models" / "keyreel_image" / "1" / "model.onnx"
    found = onnxruntime.InferenceSession(str(served), providers=["CPUExecutionProvider"]).run(None, {"frames": frames})
    expected, _ = chain(exported, frames, np.zeros((3, 16), np.float32))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
