"""open_clip and timm on a CPU build of torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from keyreel.errors import import_extra

_library: Any = None  # a definition lives as long as its Library


def import_open_clip() -> ModuleType:
    """Imports open_clip, and with it timm, also where torchvision's native library does not load.

    PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its Python code registers fake kernels for
    operators that do not exist (https://github.com/pytorch/vision/issues/9085). Nothing here calls them: their schemas
    are enough.
    """
    try:
        import_extra("torchvision", extra="export", purpose="exporting a model")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
    return import_extra("open_clip", extra="export", purpose="exporting a model")


def _declare_operators() -> None:
    global _library
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
