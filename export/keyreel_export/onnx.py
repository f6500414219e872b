"""torch modules to ONNX files."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyreel.errors import ModelError, import_extra

OPSET = 20
# A protobuf message ends at 2 GiB; weights beyond go to a file of their own, <name>.onnx.data.
LARGEST_INSIDE_BYTES = (1 << 31) - (64 << 20)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keeps what open_clip, timm and torch's exporter print, warn of and log away from the caller's terminal.

    None of it is for the caller: deprecations inside torch, steps of the exporter, "initialized randomly". A logging
    handler of the application's own still gets the log. Without the null handler, `logging.warning`, which open_clip
    calls, would configure the application's logging.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
        root.removeHandler(handler)


def export_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
) -> None:
    """Writes a module as an ONNX graph.

    Args:
        module: takes the inputs in order; set to evaluation mode here.
        inputs: an example of each input by its name, with two rows or more: one row would be taken for a constant.
            The first dimension of every input is dynamic, and the same; scalars have none.
        outputs: names of the outputs.
        path: the .onnx file; weights of more than 2 GB go beside it, into `<path>.data`.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ModelError: torch cannot export the module.
    """
    for package in ("onnx", "onnxscript"):
        import_extra(package, extra="export", purpose="exporting a model")
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes: list[dict[int, Any] | None] = [{0: batch} if example.ndim else None for example in inputs.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    try:
        with contained(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(shapes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            if program is None:
                raise ModelError(f"torch gave no program for {path.name}")
            _forget_origin(program)
            program.save(str(path), external_data=size > LARGEST_INSIDE_BYTES)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"torch cannot export {path.name}: {error}") from error


def _forget_origin(program: Any) -> None:
    # The exporter notes for each node the source lines it came from, with paths of the machine that ran it.
    program.model.metadata_props.clear()
    for graph in (program.model.graph, *program.model.functions.values()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
