"""Turns video into key-frames, highlight reels and a text-searchable library."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"  # pyproject.toml reads it here

if TYPE_CHECKING:
    from keyreel.config import EncodeConfig, Sampling, SelectConfig
    from keyreel.engine import Engine
    from keyreel.errors import KeyreelError
    from keyreel.library.library import Library
    from keyreel.library.types import Filter
    from keyreel.types import Combined, Embedding, Example, FrameBatch, KeyFrame, SearchHit, Shot, Summary
else:
    _MODULES = {
        "keyreel.config": ("EncodeConfig", "Sampling", "SelectConfig"),
        "keyreel.errors": ("KeyreelError",),
        "keyreel.engine": ("Engine",),
        "keyreel.library.library": ("Library",),
        "keyreel.library.types": ("Filter",),
        "keyreel.types": ("Combined", "Embedding", "Example", "FrameBatch", "KeyFrame", "SearchHit", "Shot", "Summary"),
    }

    def __getattr__(name: str) -> Any:
        """Imports NumPy and FFmpeg on first use, so that `keyreel --help` need not wait for them.

        The rest of the package waits too: Ctrl-C is quiet only once the command line has begun.
        """
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module 'keyreel' has no attribute {name!r}")


__all__ = [
    "Combined",
    "Embedding",
    "EncodeConfig",
    "Engine",
    "Example",
    "Filter",
    "FrameBatch",
    "KeyFrame",
    "KeyreelError",
    "Library",
    "Sampling",
    "SearchHit",
    "SelectConfig",
    "Shot",
    "Summary",
    "__version__",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
