"""Reads the tensors of a checkpoint in safetensors, which has only numbers and cannot run code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from keyreel.errors import CheckpointMismatch
from keyreel.models.catalogue import Pixels
from keyreel.types import F32

_FLOATS = ("F64", "F32", "F16", "BF16")
HINT = "use a checkpoint of open_clip in safetensors, with open_clip's tensor names"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint, with names and shapes of an architecture."""

    path: Path
    file: Any  # safetensors'
    prefix: str  # before each name
    pixels: Pixels

    def tensor(self, name: str, shape: tuple[int, ...]) -> F32:
        """Reads a tensor by its name in open_clip's state dict, as float32."""
        name = self.prefix + name
        if self.file.get_slice(name).get_dtype() == "BF16":  # bfloat16, which NumPy lacks: the upper half of a float32
            raw = np.frombuffer(_raw(self.path, name), np.uint16)
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(shape)
        values: F32 = self.file.get_tensor(name).astype(np.float32, copy=False)
        return values

    def image(self, name: str) -> F32:
        """`offset` or `factor`, float32 [3]: the tower sees (pixels - offset) * factor, for pixels of 0..255."""
        mean, scale = (np.array(values, np.float32) for values in self.pixels)
        full = np.float32(255)
        return full * mean if name == "offset" else np.float32(1) / (full * scale)


@contextmanager
def opened(
    path: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]], pixels: Pixels
) -> Iterator[Checkpoint]:
    """Opens a checkpoint, and checks its tensors against an architecture.

    Args:
        shapes: by name, of open_clip's state dict.
        pixels: mean and scale of the pixels in the training.

    Raises:
        CheckpointMismatch: not safetensors, or tensors with other names, shapes or types.
    """
    try:
        file: Any = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointMismatch(f"{path} is not a checkpoint in safetensors: {error}", hint=HINT) from error
    with file:
        names = set(file.keys())
        prefix = "module." if names and all(name.startswith("module.") for name in names) else ""
        wanted = {prefix + name: shape for name, shape in shapes.items()}
        # Tensors that only the training needs are optional.
        missing = sorted(name for name in set(wanted) - names if wanted[name])
        unknown = sorted(name for name in names - set(wanted) if file.get_slice(name).get_shape())
        problems = [f"lacks {name}" for name in missing] + [f"has {name}, which is unknown" for name in unknown]
        for name in sorted(names & set(wanted)):
            found = file.get_slice(name)
            shape, kind = tuple(found.get_shape()), found.get_dtype()
            if shape != wanted[name]:
                problems.append(f"has {name} of shape {shape}, expected {wanted[name]}")
            elif kind not in _FLOATS and shape:
                problems.append(f"has {name} of type {kind}, expected one of {', '.join(_FLOATS)}")
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointMismatch(
                f"{path} is not a checkpoint of {architecture}: it {'; it '.join(problems[:3])}{more}", hint=HINT
            )
        yield Checkpoint(path, file, prefix, pixels)


def _raw(path: Path, name: str) -> bytes:
    """Reads the bytes of a tensor, by the offsets in the file's header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        return file.read(end - begin)
