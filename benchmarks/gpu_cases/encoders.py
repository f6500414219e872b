"""The encoder on each runtime that is there: TensorRT, else onnxruntime on CUDA, and torch with the same modules.

Torch is no runtime of the product. Here it stands in where neither of the other two is installed, so that the rest of
the chain can be measured with an encoder on the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_cases.bench import Bench
from benchmarks.gpu_cases.runner import Case, Missing, Row, import_or_missing

VIT = "ViT-B-32"


@dataclass(frozen=True, slots=True)
class Model:
    """A bundle and, by the names of its graphs, the torch modules that they were exported from."""

    bundle: Any
    modules: Mapping[str, Any]


class TorchSession:
    """A keyreel Session: a module that takes and gives arrays where they are, on the stream that they are used on."""

    def __init__(self, module: Any, inputs: tuple[str, ...], output: str, arrays: Any) -> None:
        self.inputs, self.outputs = inputs, (output,)
        self._torch = import_or_missing("torch")
        self._arrays = arrays
        self._device = f"cuda:{arrays.index}" if hasattr(arrays, "stream") else "cpu"
        self._module = module.to(self._device).eval()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        torch = self._torch
        with self._arrays.scope(), self._stream(), torch.inference_mode():
            given = [torch.from_dlpack(feeds[name]).to(self._device) for name in self.inputs]
            return {self.outputs[0]: self._arrays.to_device(self._module(*given).contiguous())}

    def close(self) -> None:
        self._module = None

    def _stream(self) -> Any:
        if not hasattr(self._arrays, "stream"):
            return contextlib.nullcontext()
        return self._torch.cuda.stream(self._torch.cuda.ExternalStream(self._arrays.stream.ptr))


def session(model: Model, graph: str, arrays: Any) -> TorchSession:
    inputs = {
        "backbone": ("frames",),
        "attention": (model.bundle.attention_input,),
        "fusion": ("tokens", "attention", "strength"),
        "text": ("token_ids",),
    }
    output = {"backbone": "tokens", "attention": "attention"}.get(graph, "vectors")
    return TorchSession(model.modules[graph], inputs[graph], output, arrays)


def _need_open_clip() -> None:
    # Not imported here: keyreel_export mends the torchvision that it may stumble over first.
    if importlib.util.find_spec("open_clip") is None:
        raise Missing("open_clip_torch is not installed")


def builtin() -> Model:
    """The built-in bundle; its weights are read back from its graphs."""
    torch, onnx = import_or_missing("torch"), import_or_missing("onnx")
    from keyreel.runtime.bundle import Bundle
    from keyreel_export.builtin.bundle import Backbone, Fusion, SpatialAttention, _fuse
    from keyreel_export.builtin.student import ImageTower

    bundle, tower = Bundle.find("builtin"), ImageTower().eval()
    _fuse(tower)  # as when the graph was written
    weights: dict[str, Any] = {}
    for graph, prefix in (("backbone", "tower."), ("fusion", "")):
        for tensor in onnx.load(bundle.file(f"{graph}.onnx")).graph.initializer:
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.float32))
            weights[tensor.name.removesuffix(".fp16").removeprefix(prefix)] = values
    tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
    modules = {"backbone": Backbone(tower), "attention": SpatialAttention(), "fusion": Fusion(tower.project)}
    return Model(bundle, modules)


def vit() -> Model:
    """ViT-B-32 with random weights in half precision, as `keyreel export --precision fp16` makes it."""
    torch = import_or_missing("torch")
    _need_open_clip()
    from keyreel.config import ImageTransform
    from keyreel.runtime.bundle import Bundle
    from keyreel_export import pretrained
    from keyreel_export.attention import DEFAULT_NETWORK, SpatialAttention
    from keyreel_export.fusion import TemporalSpatialFusion
    from keyreel_export.towers import split_tower

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = split_tower(pretrained.load_model(pretrained.resolve(VIT, random_weights=True)))
        network, _ = pretrained.load_attention(DEFAULT_NETWORK, None, random_weights=True)
    modules = {
        "backbone": tower.half(),
        "attention": SpatialAttention(network, tower.image_size, tower.grid).half(),
        "fusion": TemporalSpatialFusion(tower).half(),
    }
    bundle = Bundle(
        folder=Path(),
        name=f"{VIT}, random weights",
        family=tower.family,
        image=ImageTransform(*tower.image_size),
        grid=tower.grid,
        prefix_tokens=tower.prefix_tokens,
        token_width=tower.token_width,
        embedding_width=tower.embedding_width,
        context_length=77,
        clean="lower",
        attention_input="frames",
        strength_default=0.0,
        shift_default="off",
        sha256="0" * 64,
        manifest={},
    )
    return Model(bundle, modules)


def torch_backend(bench: Bench, model: Model, *, strict: bool) -> Any:
    """The CUDA backend with torch in the place of the product's runtime."""
    import dataclasses

    from keyreel.runtime import backend

    made = backend._cuda(bench.ops, "torch runs the encoder, in a benchmark", strict=strict)
    return dataclasses.replace(made, open_session=lambda path: session(model, path.stem, bench.arrays))


def engine(bench: Bench, *, strict: bool = True) -> tuple[Any, str]:
    """An Engine of the built-in bundle on the device, and what runs its graphs."""
    import_or_missing("av", package="av (PyAV)")
    from keyreel import Engine
    from keyreel.errors import BackendUnavailable

    try:
        made = Engine.from_pretrained(device=f"cuda:{bench.device}" if strict else "auto")
        if made.backend.device == "cpu":
            raise BackendUnavailable(made.backend.reason, probe="auto")
    except BackendUnavailable:
        model = builtin()
        return Engine(model.bundle, torch_backend(bench, model, strict=strict)), "torch"
    # The engine brings a device object of its own: counters are read there.
    bench.ops = made.backend.ops
    bench.__dict__.pop("arrays", None)
    bench.__dict__.pop("clock", None)
    with contextlib.closing(made.backend.open_session(made.bundle.file("attention.onnx"))) as opened:
        return made, _runtime(opened)


def _runtime(opened: Any) -> str:
    return str({"TensorRTSession": "TensorRT", "OnnxRuntimeCudaSession": "onnxruntime"}.get(type(opened).__name__))


def throughput(bench: Bench, bundle: Any, sessions: Mapping[str, Any], batch: int) -> Row:
    """The three graphs, one after the other, on frames that are on the device."""
    arrays, random = bench.arrays, np.random.default_rng(5)
    with arrays.scope():
        frames = arrays.to_device(
            random.integers(0, 256, (batch, bundle.image.height, bundle.image.width, 3), dtype=np.uint8)
        )
        strength = arrays.to_device(np.array(bundle.strength_default, np.float32))

        def work() -> Any:
            tokens = sessions["backbone"].run({"frames": frames})["tokens"]
            seen = {"frames": frames, "tokens": tokens}[bundle.attention_input]
            attention = sessions["attention"].run({bundle.attention_input: seen})["attention"]
            feeds = {"tokens": tokens, "attention": attention, "strength": strength}
            return sessions["fusion"].run(feeds)["vectors"]

        row = bench.measure(work)
        vectors, pictures = arrays.to_host(work()), arrays.to_host(frames)
    return {
        **row,
        "batch": batch,
        "images_per_s": 1e3 * batch / row["ms_back_to_back"],
        **_held(bundle, pictures, vectors),
    }


def _held(bundle: Any, frames: Any, vectors: Any, most: int = 8) -> Row:
    """The least cosine to what onnxruntime makes of the bundle on the CPU, where the bundle lies on disk."""
    if not bundle.file("backbone.onnx").is_file() or bundle.manifest.get("precision") == "fp16":
        return {}
    from keyreel.runtime.sessions import OnnxRuntimeSession

    def run(graph: str, **feeds: Any) -> Any:
        return next(iter(OnnxRuntimeSession(bundle.file(f"{graph}.onnx")).run(feeds).values()))

    try:
        frames = frames[:most]
        tokens = run("backbone", frames=frames)
        attention = run(
            "attention", **{bundle.attention_input: {"frames": frames, "tokens": tokens}[bundle.attention_input]}
        )
        own = run("fusion", tokens=tokens, attention=attention, strength=np.array(bundle.strength_default, np.float32))
    except ImportError:
        return {"cosine": None}
    return {"cosine": float((own * vectors[:most]).sum(1).min())}


def _torch_case(make: Any, batch: int) -> Any:
    def run(bench: Bench) -> Row:
        model = make()
        sessions = {graph: session(model, graph, bench.arrays) for graph in model.modules}
        return {**throughput(bench, model.bundle, sessions, batch), "runtime": "torch", "model": model.bundle.name}

    return run


def _installed_case(bench: Bench, bundle: Any) -> Row:
    from keyreel.errors import BackendUnavailable, MissingExtra
    from keyreel.runtime.backend import open_cuda_session

    opened: dict[str, Any] = {}
    with contextlib.ExitStack() as closed:
        try:
            for graph in ("backbone", "attention", "fusion"):
                session = open_cuda_session(bundle.file(f"{graph}.onnx"), bench.arrays, batch_size=64)
                opened[graph] = closed.enter_context(contextlib.closing(session))
        except (MissingExtra, BackendUnavailable) as error:
            raise Missing(f"no runtime of the product: {error}") from error
        row = throughput(bench, bundle, opened, 64)
        return {**row, "runtime": _runtime(opened["backbone"]), "model": bundle.name}


def installed_builtin(bench: Bench) -> Row:
    from keyreel.runtime.bundle import Bundle

    return _installed_case(bench, Bundle.find("builtin"))


def installed_vit(bench: Bench) -> Row:
    """Exports ViT-B-32 with random weights first, which takes most of the time."""
    _need_open_clip()
    from keyreel.errors import BackendUnavailable, MissingExtra
    from keyreel.runtime.backend import open_cuda_session
    from keyreel.runtime.bundle import Bundle
    from keyreel_export.bundle import export_model

    try:
        open_cuda_session(Bundle.find("builtin").file("attention.onnx"), bench.arrays, batch_size=64).close()
    except (MissingExtra, BackendUnavailable) as error:
        raise Missing(f"no runtime of the product: {error}") from error
    folder = export_model(VIT, bench.scratch / "vit", precision="fp16", random_weights=True)
    return _installed_case(bench, Bundle.load(folder))


def cases() -> list[Case]:
    return [
        Case("encoder builtin: TensorRT or onnxruntime", installed_builtin, seconds=15, most_seconds=180),
        Case("encoder builtin: torch fp32", _torch_case(builtin, 64), seconds=8),
        Case(f"encoder {VIT}: torch fp16", _torch_case(vit, 256), seconds=15, quick=False),
        Case(f"encoder {VIT}: TensorRT or onnxruntime", installed_vit, seconds=100, most_seconds=240, quick=False),
    ]
