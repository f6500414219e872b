"""open_clip and timm on a CPU-only torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_definitions: list[object] = []


def import_torchvision() -> ModuleType:
    """Imports torchvision, which fails on a CPU-only torch without help.

    PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its native library does not load;
    torchvision swallows that, then registers a fake kernel for `torchvision::nms` and `torchvision::qnms` all the
    same, which raises "operator torchvision::nms does not exist"
    (https://github.com/pytorch/vision/issues/9085). Nothing here calls either, so declaring the two schemas is enough.

    Raises:
        MissingExtra: torchvision is not installed.
    """
    from keyreel.errors import import_extra

    try:
        return import_extra("torchvision", extra="export", purpose="exporting a model")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_missing_operators()
        return importlib.import_module("torchvision")


def import_open_clip() -> ModuleType:
    """Imports open_clip, after `import_torchvision`.

    Raises:
        MissingExtra: open_clip or torchvision is not installed.
    """
    from keyreel.errors import import_extra

    import_torchvision()
    return import_extra("open_clip", extra="export", purpose="exporting a model")


def import_timm() -> ModuleType:
    """Imports timm; it needs the same help, see `import_open_clip`."""
    import_open_clip()
    return importlib.import_module("timm")


def _declare_missing_operators() -> None:
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # A definition lives as long as its Library object.
    _definitions.append(library)
