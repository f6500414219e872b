"""Templates: the graphs of an architecture without weights, and how a checkpoint fills them.

An ONNX file consists of nodes and, between them, the bytes of weights. A template has everything but those bytes. For
each gap it says what fills it: a tensor of the checkpoint, or the result of a few steps of arithmetic (a transpose, a
slice, the branches of a FastViT folded into one convolution). These are the steps of torch's export, in its order, so
the files equal those of `keyreel export` to the bit. Branches are folded in float64 and then rounded, since the last
digit of a square root in float32 depends on the library.

A template is a file `templates/ARCHITECTURE.xz`: LZMA of the length of a JSON document (8 bytes, little endian), the
document, and all bytes that are kept. `python -m keyreel_export.templates` writes them.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keyreel.errors import ModelError

SCHEMA = "keyreel.template/1"
FOLDER = Path(__file__).with_name("templates")
BUILTIN_FOLDER = Path(__file__).with_name("builtin")
GRAPHS = ("backbone", "attention", "fusion", "text")

Array: TypeAlias = NDArray[Any]
Step: TypeAlias = Sequence[Any]  # an operation and its arguments: numbers of earlier steps, or constants


class Values(Protocol):
    """The source of the values of the first steps."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor of the checkpoint, float32."""

    def image(self, name: str) -> Array:
        """`offset` or `factor`, float32 [3]: a model sees (pixels - offset) * factor."""


_ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "sqrt": np.sqrt,
    "rsqrt": lambda values: 1 / np.sqrt(values),
}


@dataclass(frozen=True, slots=True)
class Template:
    """One architecture."""

    architecture: str  # as open_clip spells it
    tensors: Mapping[str, tuple[int, ...]]  # shape of each tensor of a checkpoint, by its name in open_clip's state
    steps: Sequence[Step]
    # By precision, then graph: the number of bytes to copy, the step that fills the gap after them, and so on by turns.
    pieces: Mapping[str, Mapping[str, Sequence[int]]]
    manifest: Mapping[str, Any]  # of the bundle, without what depends on the weights
    tokenizer: Mapping[str, Any]  # see `tokenizer`
    builtin: Mapping[str, str]  # sha256 of the built-in model's files that give weights
    versions: Mapping[str, str]  # versions of the packages that made the graphs
    body: bytes = field(repr=False)

    @classmethod
    def find(cls, architecture: str) -> Template:
        """The template of an architecture of the catalogue; all of them ship with keyreel."""
        return cls.read(FOLDER / f"{architecture}.xz")

    @classmethod
    def read(cls, path: Path) -> Template:
        """Reads a template's file.

        Raises:
            ModelError: the template has another version.
        """
        data = lzma.decompress(path.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        document = json.loads(data[8:end])
        if document.pop("schema") != SCHEMA:
            raise ModelError(f"{path}: not a {SCHEMA}", hint="install keyreel again")
        shapes = {name: tuple(shape) for name, shape in document.pop("tensors").items()}
        return cls(**document, tensors=shapes, body=data[end:])

    def write(self, path: Path) -> None:
        """Writes the template's file; the same template gives the same bytes."""
        names = ("architecture", "tensors", "steps", "pieces", "manifest", "tokenizer", "builtin", "versions")
        document = {"schema": SCHEMA, **{name: getattr(self, name) for name in names}}
        text = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        data = len(text).to_bytes(8, "little") + text + self.body
        path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    def fill(self, precision: str, graph: str, source: Values, file: BinaryIO) -> None:
        """Writes a graph with its weights, one after the other, so that memory holds only a few."""
        position = self._start(precision, graph)
        pieces = self.pieces[precision][graph]
        for place, number in enumerate(pieces):
            if place % 2 == 0:
                file.write(self.body[position : position + number])
                position += number
            else:
                file.write(np.ascontiguousarray(self.value(number, source)).data)

    def size(self, precision: str) -> int:
        """The approximate bytes of the graphs of a precision."""
        parameters = sum(int(np.prod(shape)) for shape in self.tensors.values())
        return len(self.body) + parameters * (2 if precision == "fp16" else 4)

    def _start(self, precision: str, graph: str) -> int:
        """The offset of a graph's bytes in the body; they are in the order of `pieces`."""
        position = 0
        for own, graphs in sorted(self.pieces.items()):
            for name in GRAPHS:
                if (own, name) == (precision, graph):
                    return position
                position += sum(graphs[name][::2])
        raise ValueError(f"the template has no {graph} in {precision}")

    def value(self, number: int, source: Values) -> Array:
        """The array that a step gives.

        Raises:
            ValueError: an unknown step.
        """
        name, *arguments = self.steps[number]
        if name in _ARITHMETIC:
            made = [self.value(one, source) if isinstance(one, int) else one for one in arguments]
            return _ARITHMETIC[name](*made)
        if name == "tensor":
            return source.tensor(arguments[0], self.tensors[arguments[0]])
        if name == "image":
            return source.image(arguments[0])
        if name == "builtin":
            file, offset, shape = arguments
            count = int(np.prod(shape))
            stored = np.fromfile(BUILTIN_FOLDER / file, np.float16, count, offset=offset)
            return stored.astype(np.float32).reshape(shape)
        if name == "identity":
            return identity(arguments[0])
        inner, own = self.value(arguments[0], source), arguments[1:]
        if name == "reshape":
            return inner.reshape(own[0])
        if name == "transpose":
            return inner.transpose(own[0])
        if name == "pad":
            return np.pad(inner, own[0])
        if name == "part":
            return np.split(inner, own[0])[own[1]]
        if name in ("double", "single"):
            return inner.astype(np.float64 if name == "double" else np.float32)
        if name == "half":
            with np.errstate(over="ignore"):  # the check after the install refuses what it makes
                return inner.astype(np.float16)
        raise ValueError(f"the template has a step {name!r} that this keyreel does not know")


def identity(shape: Sequence[int]) -> Array:
    """The kernel [outputs, inputs of a group, height, width] of a convolution that changes nothing, float32."""
    kernel = np.zeros(shape, np.float32)
    outputs, inputs, height, width = kernel.shape
    kernel[np.arange(outputs), np.arange(outputs) % inputs, height // 2, width // 2] = 1
    return kernel
