"""Turns video into key-frames, highlight reels and a text-searchable library."""

from __future__ import annotations

import logging
from importlib import metadata

from keyreel.config import EncodeConfig, Sampling, SelectConfig
from keyreel.engine import Engine
from keyreel.errors import KeyreelError
from keyreel.library.library import Library
from keyreel.library.types import Example, Filter
from keyreel.types import Embedding, FrameBatch, KeyFrame, SearchHit, Shot, Summary, VideoInfo

__version__ = metadata.version("keyreel")
__all__ = [
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
    "VideoInfo",
    "__version__",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
