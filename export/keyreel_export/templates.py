"""Makes the templates from which `keyreel models install` builds bundles: `python -m keyreel_export.templates`.

An architecture is exported once with random weights, all different, as `keyreel export` does it. A weight of a graph is
then found by its content: it is a tensor of the state dict, or what the arithmetic before the export made of some,
which is recorded while it runs. What no weight explains is part of the graph.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keyreel.models import calibration, template
from keyreel.models.catalogue import ARCHITECTURES, TOKENIZERS
from keyreel.models.template import BUILTIN_FOLDER, FOLDER, Template
from keyreel.models.verify import OUTPUTS
from keyreel.runtime.bundle import sha256_of
from keyreel_export import pretrained, tokens
from keyreel_export.builtin.scenes import KINDS, WEIGHTS, render_scene
from keyreel_export.bundle import Parts, half, image_of, manifest_of, take_apart, versions
from keyreel_export.onnx import export_graph

SEED = 1
_BUILTIN_FILES = ("backbone.onnx", "attention.onnx")
SIDE = 160  # pixels of a picture of calibration
LEAST = 3  # numbers of a weight: single numbers are part of the graph
_NAMES = {
    "add": "add",
    "add_": "add",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
}
_SAME = ("detach", "alias", "clone", "contiguous", "lift_fresh")
_RESHAPES = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze")
_TURNS = ("t", "transpose", "permute")
_CASTS = {torch.float64: "double", torch.float32: "single"}
_RECORDED = {*_NAMES, *_SAME, *_RESHAPES, *_TURNS, "constant_pad_nd", "_to_copy"}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down how tensors are made of others.

    Args:
        leaves: the first steps and the tensors that they give.
    """

    def __init__(self, leaves: Sequence[tuple[list[Any], Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[list[Any]] = [step for step, _ in leaves]
        self.made: list[Tensor] = [tensor for _, tensor in leaves]  # by step; kept, so that no address is used twice
        self._numbers = {_address(tensor): number for number, tensor in enumerate(self.made)}
        self._by_content = {_digest(tensor.numpy()): number for number, tensor in enumerate(self.made)}

    def add(self, step: list[Any], tensor: Tensor) -> int:
        """One more step and the tensor that it gives. Returns its number."""
        self._numbers[_address(tensor)] = len(self.steps)
        self.steps.append(step)
        self.made.append(tensor)
        return len(self.steps) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _RECORDED and any(isinstance(one, Tensor) and self._number(one) is not None for one in args):
            self._record(name, args, result)
        return result

    def _number(self, tensor: Tensor) -> int | None:
        """The step that gives a tensor, or what it is a copy of."""
        number = self._numbers.get(_address(tensor))
        return self._by_content.get(_digest(tensor.detach().numpy())) if number is None else number

    def _record(self, name: str, args: Sequence[Any], result: Tensor) -> None:
        first = self._argument(args[0])
        if name in _SAME:
            step = self.steps[first]
        elif name in _NAMES:
            step = [_NAMES[name], *(self._argument(one) for one in args)]
        elif name == "_to_copy":
            step = [_CASTS.get(result.dtype), first]
        elif name in _RESHAPES:
            step = ["reshape", first, list(result.shape)]
        elif name in _TURNS:
            order = torch.arange(args[0].ndim)
            order = order[list(args[1])] if name == "permute" else order
            axes = order.tolist()
            if name != "permute":
                one, other = (0, 1) if name == "t" else (args[1], args[2])
                axes[one], axes[other] = axes[other], axes[one]
            step = ["transpose", first, axes]
        else:
            ends = list(zip(args[1][::2], args[1][1::2], strict=True))[::-1]
            step = ["pad", first, [(0, 0)] * (args[0].ndim - len(ends)) + ends]
        if None not in step:
            if name.endswith("_"):  # in place: the result of the earlier step is lost
                self.made[first] = torch.empty(0)
            self.add(step, result)

    def _argument(self, value: Any) -> Any:
        """A step's argument: the number of a step, or a constant."""
        if not isinstance(value, Tensor):
            return float(value)
        number = self._number(value)
        if number is not None:
            return number
        values = value.detach().numpy()
        if values.size and (values == values.flat[0]).all():
            return float(values.flat[0])
        if values.ndim == 4 and np.array_equal(template.identity(values.shape), values):  # of a FastViT
            return self.add(["identity", list(values.shape)], value)
        return None


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


class _Contents:
    """Steps by the bytes of what they give."""

    def __init__(self, recorder: Recorder) -> None:
        self.steps = recorder.steps
        self._found: dict[bytes, int] = {}
        self._candidates: dict[bytes, tuple[int, tuple[list[Any], ...]]] = {}
        for number, tensor in enumerate(recorder.made):
            values = tensor.detach().numpy()
            self._offer(values, number)
            if values.ndim and len(values) % 3 == 0:  # query, key and value of an attention
                for place, part in enumerate(np.split(values, 3)):
                    self._offer(part, number, ["part", 3, place])

    def _offer(self, values: NDArray[Any], number: int, *then: list[Any]) -> None:
        """Steps to be taken when the values are met: after a step some others, and a transpose, and to half."""
        if values.size < LEAST:
            return
        turned = [(values, then)] if values.ndim != 2 else [(values, then), (values.T, (*then, ["transpose", [1, 0]]))]
        for own, ways in turned:
            with np.errstate(over="ignore"):
                halves = own.astype(np.float16)
            self._candidates.setdefault(_digest(own), (number, ways))
            self._candidates.setdefault(_digest(halves), (number, (*ways, ["half"])))

    def step(self, values: NDArray[Any]) -> int | None:
        """The number of the step that gives these values, if one does."""
        digest = _digest(values)
        if digest not in self._found and digest in self._candidates:
            number, ways = self._candidates[digest]
            for name, *arguments in ways:
                self.steps.append([name, number, *arguments])
                number = len(self.steps) - 1
            self._found[digest] = number
        return self._found.get(digest)


def _digest(values: NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest() + values.dtype.str.encode()


def make_template(architecture: str) -> Template:
    """Exports an architecture with random weights and takes them out again."""
    model = pretrained.load_model(pretrained.resolve(architecture, random_weights=True))
    draw_weights(model, SEED)
    parts, recorder = _recorded(model)
    contents, tokenizer = _Contents(recorder), _tokenizer(architecture)
    pieces: dict[str, dict[str, list[int]]] = {}
    body: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder:
        # The weights are halved in place: half precision comes last here, and first in the body.
        graphs = {precision: Path(folder) / precision for precision in ("fp32", "fp16")}
        for precision, place in graphs.items():
            place.mkdir()
            for graph in template.GRAPHS:
                module = parts.modules[graph]
                feeds = _feeds(parts, graph, int(tokenizer["context_length"]))
                made = half(module) if precision == "fp16" else module
                export_graph(made, feeds, OUTPUTS[graph], place / f"{graph}.onnx")
        for precision in sorted(graphs):
            pieces[precision] = {}
            for graph in template.GRAPHS:
                pieces[precision][graph], kept = _cut(graphs[precision] / f"{graph}.onnx", contents)
                body += kept
    length, clean = int(tokenizer["context_length"]), str(tokenizer["clean"])
    return Template(
        architecture=architecture,
        tensors={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        steps=contents.steps,
        pieces=pieces,
        manifest=_manifest(architecture, parts, length, clean),
        tokenizer=tokenizer,
        builtin={name: sha256_of(BUILTIN_FOLDER / name) for name in _BUILTIN_FILES},
        versions=versions(),
        body=b"".join(body),
    )


def _manifest(architecture: str, parts: Parts, context_length: int, clean: str) -> dict[str, Any]:
    """What does not depend on the weights."""
    image = image_of(parts)
    manifest = manifest_of(architecture, parts, image, context_length, clean)
    for name in ("name", "image", "subject", "sources"):
        del manifest[name]
    return {**manifest, "image_size": {"height": image.height, "width": image.width}}


def draw_weights(model: Any, seed: int) -> None:
    """Random weights, no two alike; the means and scales of pixels as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator) * 0.02
                tensor.copy_(drawn.abs() + 0.01 if name.endswith("running_var") else drawn)
    means, scales = (torch.rand(3, generator=generator).add(0.1).tolist() for _ in range(2))
    model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, "mean": means, "std": scales}


def _recorded(model: Any) -> tuple[Parts, Recorder]:
    """The model's parts, and how their weights were made."""
    leaves = [(["tensor", name], tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    with torch.no_grad(), Recorder(leaves) as recorder:
        parts = take_apart(model, {})
    recorder.add(["image", "offset"], parts.tower.offset)
    recorder.add(["image", "factor"], parts.tower.factor)
    for name in _BUILTIN_FILES:
        stored = (BUILTIN_FOLDER / name).read_bytes()
        for weight in onnx.load_from_string(stored).graph.initializer:
            if weight.data_type == onnx.TensorProto.FLOAT16:
                offset = stored.index(weight.raw_data)
                values = torch.tensor(numpy_helper.to_array(weight)).float()
                recorder.add(["builtin", name, offset, list(values.shape)], values)
    return parts, recorder


def _tokenizer(architecture: str) -> dict[str, Any]:
    known = TOKENIZERS.get(architecture)
    return tokens.described(pretrained.load_tokenizer(architecture)) if known is None else dict(known)


def _feeds(parts: Parts, graph: str, context_length: int) -> dict[str, Tensor]:
    """An example of a graph's inputs, of the shapes that `export_model` takes."""
    tower, rows = parts.tower, 3
    patches = tower.grid[0] * tower.grid[1]
    frames = torch.zeros(rows, *tower.image_size, 3, dtype=torch.uint8)
    weights = torch.full((rows, patches), 1 / patches)  # cloned below: the exporter takes one tensor for one input
    tokens_ = torch.zeros(rows, tower.prefix_tokens + patches, tower.token_width)
    return {
        "backbone": {"frames": frames},
        "attention": {"frames": frames},
        "fusion": {"tokens": tokens_, "attention": weights, "change": weights.clone()},
        "text": {"token_ids": torch.ones(rows, context_length, dtype=torch.int64)},
    }[graph]


def _cut(path: Path, contents: _Contents) -> tuple[list[int], list[bytes]]:
    """The pieces of a graph, see `Template.pieces`, and the bytes that are kept."""
    data = path.read_bytes()
    pieces, kept, begin = list[int](), list[bytes](), 0
    for weight in onnx.load_from_string(data).graph.initializer:
        step = contents.step(numpy_helper.to_array(weight))
        if step is None:
            continue
        raw = weight.raw_data
        # In a message of protobuf: field 9, of type 2, its length, its bytes. Initialisers lie in the graph's order.
        field = b"\x4a" + _varint(len(raw))
        end = data.index(field + raw, begin) + len(field)
        kept.append(data[begin:end])
        pieces += [end - begin, step]
        begin = end + len(raw)
    kept.append(data[begin:])
    return [*pieces, len(data) - begin], kept


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def draw_pictures(path: Path) -> None:
    """Draws the pictures of `keyreel.models.calibration`."""
    rng, across, down = np.random.default_rng(0), calibration.ACROSS, calibration.DOWN
    sheet = Image.new("RGB", (SIDE * across, SIDE * down))
    for place, kind in enumerate(rng.choice(KINDS, across * down, p=WEIGHTS)):
        drawn = render_scene(str(kind), rng, (SIDE, SIDE)).pixels
        sheet.paste(Image.fromarray(drawn), (place % across * SIDE, place // across * SIDE))
    sheet.save(path, "JPEG", quality=85, subsampling=0)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m keyreel_export.templates", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="all that keyreel ships by default")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder; by default keyreel's own")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures of calibration, too")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.pictures:
        draw_pictures(calibration.PICTURES)
    for architecture in given.architectures or ARCHITECTURES:
        path = given.output / f"{architecture}.xz"
        make_template(architecture).write(path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
