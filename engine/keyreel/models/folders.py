"""Replaces folders, such as bundles, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from keyreel.errors import KeyreelError, ModelError
from keyreel.models import verify
from keyreel.runtime.bundle import MANIFEST, SCHEMA, Bundle, sha256_of, write_manifest

_SAME = {"fp32": 1e-5, "fp16": 2e-3}  # largest difference of equal scene vectors


def check_replaceable(folder: Path, foreign: Callable[[Path], str | None]) -> None:
    """Raises ModelError for a file, or a folder in which `foreign` finds something that keyreel did not write."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file", hint="name a folder")
    name = foreign(folder) if folder.is_dir() and any(folder.iterdir()) else None
    if name is not None:
        raise ModelError(f"{folder} holds {name}, which keyreel did not write", hint="name another folder")


def check_space(folder: Path, size: int) -> None:
    """Raises ModelError if the disk has fewer free bytes than `size`."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size * 1.02 + (64 << 20):
        raise ModelError(
            f"{folder} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            hint="free disk space, or set KEYREEL_CACHE (models) or HF_HOME (downloads) to a folder on another disk",
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write to. At the end it replaces `folder`; after an error it is deleted."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".keyreel-export-") as aside:
        made = Path(aside) / "made"
        made.mkdir()
        yield made
        old = Path(aside) / "replaced"
        if folder.exists():
            folder.rename(old)
        try:
            made.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def foreign_to_bundle(folder: Path) -> str | None:
    """Finds something in a folder that no bundle's manifest names."""
    names = {path.name for path in folder.iterdir()}
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        known = {MANIFEST, *manifest["files"]} if manifest["schema"] == SCHEMA else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return min(names - known, default=None)


def write_bundle_manifest(made: Path, manifest: dict[str, Any], replaced: Path) -> None:
    """Writes the manifest of a bundle whose other files exist.

    If the replaced bundle has the same scene vectors, the manifest names it, and the ones that it names, so that their
    libraries can be opened.
    """
    earlier: dict[str, str] = manifest["fusion"]["same_scene"]
    try:
        old: Bundle | None = Bundle.load(replaced)
    except KeyreelError:  # none, or not usable
        old = None
    if old is None or not _same_scene(old, made, manifest):
        write_manifest(made, manifest)
        return
    earlier.update(old.same_scene)
    for name in filter(None, old.same_scene.values()):
        shutil.copyfile(old.file(name), made / name)
    write_manifest(made, manifest)
    if sha256_of(made / MANIFEST) != old.sha256:
        earlier[old.sha256] = ""
        write_manifest(made, manifest)


def _same_scene(old: Bundle, made: Path, manifest: dict[str, Any]) -> bool:
    """Whether both bundles make the same scene vectors: equal tokens of equal pictures, equal vectors of these.

    It compares the later layers by their results, since the graphs differ in the subject's layers.
    """
    if dataclasses.asdict(old.image) != manifest["image"]:
        return False
    if old.manifest["files"]["backbone.onnx"]["sha256"] != sha256_of(made / "backbone.onnx"):
        return False
    random, patches = np.random.default_rng(0), old.grid[0] * old.grid[1]
    fed: list[verify.Feeds] = [
        {
            "tokens": random.standard_normal((4, old.prefix_tokens + patches, old.token_width), np.float32),
            "attention": np.full((4, patches), 1 / patches, np.float32),
            "change": np.zeros((4, patches), np.float32),
        }
    ]
    precision = "fp16" if manifest["precision"] == "fp16" else "fp32"
    ((before, *_),), ((after, *_),) = (
        verify.run_graph(at / "fusion.onnx", fed, precision) for at in (old.folder, made)
    )
    return before.shape == after.shape and bool(np.abs(before - after).max() <= _SAME[precision])
