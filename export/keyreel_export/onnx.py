"""Exports torch modules to ONNX files."""

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
from keyreel.models.verify import LARGEST_INSIDE_BYTES, Case, Feeds

OPSET = 20


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keeps prints, warnings and logs of open_clip, timm and torch's exporter off the terminal.

    The application's logging handlers still get the log.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()  # else `logging.warning`, which open_clip calls, would configure the logging
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


def export_graph(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Writes a module as an ONNX graph.

    Args:
        module: takes the inputs in order.
        inputs: an example of each input, with at least two rows, since torch treats a size of 1 as constant. The first
            dimension of all inputs, except scalars, is dynamic and equal.
        outputs: names of the outputs.
        path: the .onnx file; weights of more than 2 GB go beside it, into `<path>.data`.

    Raises:
        ModelError: torch cannot export the module.
    """
    for package in ("onnx", "onnxscript"):
        import_extra(package, extra="export", purpose="exporting a model")
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes: list[dict[int, Any] | None] = [{0: batch} if example.ndim else None for example in inputs.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    try:
        with contained(), torch.no_grad():
            program: Any = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(shapes),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            _forget_origin(program)
            program.save(str(path), external_data=size > LARGEST_INSIDE_BYTES)
    except Exception as error:
        raise ModelError(f"torch cannot export {path.name}: {error}") from error


@torch.no_grad()
def cases(module: nn.Module, batches: Sequence[Feeds]) -> list[Case]:
    """Runs `module` on each batch. Keys of the feeds are the graph's inputs, in the module's order."""
    found = []
    for feeds in batches:
        outputs = module(*(torch.from_numpy(array) for array in feeds.values()))
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        found.append(Case(feeds, tuple(output.numpy() for output in several)))
    return found


def _forget_origin(program: Any) -> None:
    # The exporter stores source lines of each node, with paths of this machine.
    program.model.metadata_props.clear()
    for graph in (program.model.graph, *program.model.functions.values()):
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
