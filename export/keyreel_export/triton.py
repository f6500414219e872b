"""Exports a bundle as a model repository of Triton Inference Server: an image and a text encoder.

    keyreel_image/config.pbtxt      frames u8 [N, H, W, 3] -> scene f32 [N, D], subject f32 [N, D], map f32 [N, P]
    keyreel_image/1/model.onnx      backbone, attention and fusion as one graph
    keyreel_text/config.pbtxt       token_ids i64 [Q, L]   -> vectors f32 [Q, D]
    keyreel_text/1/model.onnx
    keyreel_text/tokenizer.json     for clients, which clean and tokenize texts

It is not an ensemble: in one graph, tokens stay in the session, and one queue batches instead of three.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from keyreel.errors import ModelError, import_extra
from keyreel.models import verify
from keyreel.models.folders import check_replaceable, replacing
from keyreel.models.verify import LARGEST_INSIDE_BYTES, Feeds
from keyreel.runtime.bundle import Bundle

IMAGE, TEXT = "keyreel_image", "keyreel_text"
VERSION = "1"
# The files to replace; older exports wrote a README.md.
FILES = frozenset(
    {"README.md", f"{TEXT}/tokenizer.json"}
    | {f"{model}/config.pbtxt" for model in (IMAGE, TEXT)}
    | {f"{model}/{VERSION}/{name}" for model in (IMAGE, TEXT) for name in ("model.onnx", "model.onnx.data")}
)
# Longest wait of the server to fill a batch: about the time to encode one.
_QUEUE_MICROSECONDS = 2000


def export_triton(bundle: Bundle, folder: Path, *, max_batch_size: int = 64, instances: int = 1) -> Path:
    """Exports a bundle as a model repository. It verifies it against the bundle's graphs, and writes all or nothing.

    It treats frames as stills, without temporal shift and change, since a batch mixes frames of many requests.

    Args:
        folder: new, empty, or an earlier export to replace.
        max_batch_size: rows of one inference.
        instances: sessions of each model on each device.

    Returns:
        The folder.

    Raises:
        ValueError: max_batch_size or instances is below 1.
        ModelError: an int8 bundle, a folder with other files, or a merged graph that differs from the bundle's.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    if min(max_batch_size, instances) < 1:
        raise ValueError(f"max_batch_size and instances must be 1 or more, got {max_batch_size} and {instances}")
    if bundle.precision not in verify.BOUNDS:
        raise ModelError(f"{bundle.name} is in {bundle.precision}, which is for CPUs", hint="take its fp32 or fp16")
    onnx = import_extra("onnx", extra="export", purpose="exporting a model")
    check_replaceable(folder, _foreign)
    size = (bundle.image.height, bundle.image.width, 3)
    with replacing(folder) as made:
        for model in (IMAGE, TEXT):
            (made / model / VERSION).mkdir(parents=True)
        graph = made / IMAGE / VERSION / "model.onnx"
        _save(onnx, _merged(onnx, bundle), graph)
        _save(onnx, onnx.load(bundle.file("text.onnx")), made / TEXT / VERSION / "model.onnx")
        _verify(bundle, graph)
        width = bundle.embedding_width
        vectors = {"scene": width, "subject": width, "map": bundle.grid[0] * bundle.grid[1]}
        for model, takes, gives in (
            (IMAGE, ("frames", "TYPE_UINT8", size), vectors),
            (TEXT, ("token_ids", "TYPE_INT64", (bundle.context_length,)), {"vectors": width}),
        ):
            config = _config(bundle, model, takes, gives, max_batch_size, instances)
            (made / model / "config.pbtxt").write_text(config)
        shutil.copyfile(bundle.file("tokenizer.json"), made / TEXT / "tokenizer.json")
    return folder


def _save(onnx: Any, model: Any, path: Path) -> None:
    outside = sum(tensor.ByteSize() for tensor in model.graph.initializer) > LARGEST_INSIDE_BYTES
    onnx.save(model, path, save_as_external_data=outside, location=f"{path.name}.data")


def _merged(onnx: Any, bundle: Bundle) -> Any:
    """Merges backbone, attention and fusion into one graph, by the names of their inputs and outputs."""
    parts = []
    for name in ("backbone", "attention", "fusion"):
        model = onnx.load(bundle.file(f"{name}.onnx"))
        parts.append(
            onnx.compose.add_prefix(model, f"{name}/", rename_inputs=False, rename_outputs=False, inplace=True)
        )
    first, last = parts[0], parts[-1]
    opsets = [sorted((entry.domain, entry.version) for entry in part.opset_import) for part in parts]
    if any(opset != opsets[0] for opset in opsets) or any(part.functions for part in parts):
        raise ModelError(f"the graphs of {bundle.name} do not fit together", hint="export the model again")
    # Zero change: stills. The attention gives the shape.
    still = onnx.helper.make_node("Sub", ["attention", "attention"], ["change"], "change")
    parts[1].graph.node.append(still)
    graph = onnx.helper.make_graph(
        [node for part in parts for node in part.graph.node],
        "keyreel_image",
        list(first.graph.input),
        list(last.graph.output),
        [tensor for part in parts for tensor in part.graph.initializer],
    )
    return onnx.helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)


def _verify(bundle: Bundle, graph: Path) -> None:
    """Compares the merged graph with the three graphs."""
    precision, height, width = bundle.precision, bundle.image.height, bundle.image.width
    frames: list[Feeds] = [
        {"frames": verify.sample_frames(height, width, count=count, seed=count)} for count in verify.BATCH_SIZES
    ]
    expected = verify.run_chain(bundle.folder, frames, bundle.attention_input, precision)
    verify.check("fusion", verify.run_graph(graph, frames, precision), expected, precision)


def _config(
    bundle: Bundle,
    model: str,
    takes: tuple[str, str, tuple[int, ...]],
    gives: dict[str, int],
    max_batch_size: int,
    instances: int,
) -> str:
    """Makes config.pbtxt, the text form of Triton's ModelConfig. Dimensions are those of one row."""
    name, kind, shape = takes
    # onnxruntime's CPU kernels for half precision are few and slow, and some graphs crash there.
    outputs = ", ".join(f'{{ name: "{key}" data_type: TYPE_FP32 dims: [{width}] }}' for key, width in gives.items())
    device = "KIND_GPU" if bundle.precision == "fp16" else "KIND_AUTO"
    return f"""name: "{model}"
platform: "onnxruntime_onnx"
max_batch_size: {max_batch_size}
input [ {{ name: "{name}" data_type: {kind} dims: {list(shape)} }} ]
output [ {outputs} ]
instance_group [ {{ count: {instances} kind: {device} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}
version_policy {{ latest {{ num_versions: 1 }} }}
parameters {{ key: "keyreel_bundle" value {{ string_value: {json.dumps(bundle.name)} }} }}
parameters {{ key: "keyreel_bundle_sha256" value {{ string_value: "{bundle.sha256}" }} }}
"""


def _foreign(folder: Path) -> str | None:
    # Links count as files, wherever they lead.
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return next((name for path in files if (name := path.relative_to(folder).as_posix()) not in FILES), None)
