"""Image towers on several runtimes: frames [N, H, W, 3] uint8 -> tokens [N, P, C] float32, all cores.

Each function takes the name of a model and the folder of its bundle, and gives what runs one batch. The graph is the
bundle's backbone for all; torch runs the module that the graph was exported from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Encode = Callable[[Any], Any]


def onnxruntime(model: str, folder: Path) -> Encode:
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(folder / "backbone.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda frames: session.run(None, {"frames": frames})[0]


def onnxruntime_int8(model: str, folder: Path) -> Encode:
    """Weights quantised by its own tool, activations as they come."""
    quantised = folder.with_name(f"{folder.name}@onnxruntime-int8") / "backbone.onnx"
    if not quantised.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantised.parent.mkdir(exist_ok=True)
        aside = quantised.with_name("aside.onnx")
        # Signed weights: its kernels for convolutions take no others.
        quantize_dynamic(
            folder / "backbone.onnx", aside, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
        aside.replace(quantised)
    return onnxruntime(model, quantised.parent)


def openvino(precision: str) -> Callable[[str, Path], Encode]:
    """OpenVINO with an inference precision of "f32" or "bf16"."""

    def prepare(model: str, folder: Path) -> Encode:
        import openvino as library

        hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        compiled = library.Core().compile_model(str(folder / "backbone.onnx"), "CPU", hints)
        request = compiled.create_infer_request()
        return lambda frames: request.infer({"frames": frames})[0].copy()

    return prepare


def torch(dtype: str) -> Callable[[str, Path], Encode]:
    """PyTorch, eager, in "float32" or "bfloat16" throughout."""

    def prepare(model: str, folder: Path) -> Encode:
        import torch as library

        from keyreel_export import pretrained
        from keyreel_export.towers import split_tower

        library.manual_seed(0)  # what the bundle's weights were drawn with
        tower = split_tower(pretrained.load_model(pretrained.resolve(model, random_weights=True)))
        tower = tower.eval().to(getattr(library, dtype))

        def run(frames: Any) -> Any:
            with library.inference_mode():
                return tower(library.from_numpy(frames)).float().numpy()

        return run

    return prepare


def keyreel(graph: str = "backbone.onnx", *, precision: str = "fp32") -> Callable[[str, Path], Encode]:
    """keyreel's own session, as an Engine on this machine opens it."""

    def prepare(model: str, folder: Path) -> Encode:
        from keyreel.runtime.backend import resolve

        session = resolve("cpu", precision=precision).open_session(folder / graph)
        (output,) = session.outputs
        return lambda frames: session.run({"frames": frames})[output]

    return prepare
