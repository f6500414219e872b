"""Shared fixtures. Real clips are read from the media folder beside the checkout and are never committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("KEYREEL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MEDIA = SHARED / "media"


@pytest.fixture(scope="session")
def media() -> Callable[[str], Path]:
    """media("natural/bikes.mp4") -> Path; skips where the clips are not there."""

    def find(name: str) -> Path:
        path = MEDIA / name
        if not path.exists():
            pytest.skip(f"real clips are not here: {path} is missing (set KEYREEL_SHARED)")
        return path

    return find
