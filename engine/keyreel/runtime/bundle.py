"""A model on disk, a bundle: a folder with ONNX graphs, a tokenizer and a manifest with the sha256 of each file.

    backbone.onnx   frames u8 [N, H, W, 3]                    -> tokens f32 [N, R+P, C]
    attention.onnx  frames u8 [N, H, W, 3] or tokens          -> attention f32 [N, P], rows sum to 1
    fusion.onnx     tokens, attention, change f32 [N, P]      -> scene and subject f32 [N, D], unit length, and
                                                                 map f32 [N, P], rows sum to 1
    text.onnx       token_ids i64 [Q, L]                      -> vectors f32 [Q, D], unit length
    tokenizer.json  for the package tokenizers
    reference.npz   of fp16 models: a few feeds and torch's float32 results, to check TensorRT plans

R prefix tokens (a class token) come before the P patches. Models are found by name in the user's cache folder
(KEYREEL_CACHE); `builtin` is in the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from keyreel.config import ImageTransform, ShiftMode
from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound, pip_install
from keyreel.models import catalogue
from keyreel.render.files import atomic_write
from keyreel.types import F32

SCHEMA = "keyreel.bundle/2"
MANIFEST = "manifest.json"
BUILTIN = "builtin"
# Neighbours whose mean vectors have a higher cosine are one scene. With the built-in model, 2.7 % of pairs of
# photographs are above it, and 2.2 % of pairs of parts of one photograph are not. It was also the best on joined real
# clips.
SCENE_SIMILARITY = 0.55
AttentionInput = Literal["frames", "tokens"]
GRAPHS = ("backbone.onnx", "attention.onnx", "fusion.onnx", "text.onnx")


def cache_root() -> Path:
    """The folder of installed models and plans: KEYREEL_CACHE, else XDG_CACHE_HOME/keyreel, else ~/.cache/keyreel."""
    own = os.environ.get("KEYREEL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keyreel"


def bundle_folder(name: str) -> Path:
    """The folder of a model in the cache: <cache>/models/ViT-B-32--openai for 'ViT-B-32/openai'.

    Raises:
        ValueError: not a name of a model.
    """
    safe = re.sub(r"[^A-Za-z0-9._+-]", "--", name.strip("/"))
    if not safe.strip("."):
        raise ValueError(f"not a model name: {name!r}")
    return cache_root() / "models" / safe


def cached_names() -> tuple[str, ...]:
    """Names of the models on this machine: the built-in one and those in the cache."""
    names = [BUILTIN]
    for manifest in sorted((cache_root() / "models").glob(f"*/{MANIFEST}")):
        try:
            names.append(str(json.loads(manifest.read_text("utf-8"))["name"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: loading it by name reports the error
    return tuple(names)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class SubjectScale:
    """Makes a subject's cosine comparable with a scene's: slope * cosine + offset, fitted for the model."""

    slope: float = 1.0
    offset: float = 0.0
    novelty: float = 1.0  # store subjects whose cosine to the scene is lower

    def __post_init__(self) -> None:
        if not (0 < self.slope < 100 and abs(self.offset) < 100 and -1 <= self.novelty <= 2):
            raise ValueError(f"subject is {self}, expected a slope above 0, a finite offset, a cosine")


@dataclass(frozen=True, slots=True)
class ChanceScale:
    """Converts scores to chances, fitted for the model, see `keyreel.chance`."""

    background: tuple[str, ...]  # the background: texts about many things
    lead: float  # weight of the lead over the background, in the logit
    pictures: float  # weight of the logarithm of the number of pictures
    offset: float

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> ChanceScale | None:
        """Reads `text.chance` of a manifest; None if not calibrated. Raises ValueError for invalid values."""
        known = manifest["text"].get("chance")
        if known is None:
            return None
        numbers = [float(known[name]) for name in ("lead", "pictures", "offset")]
        texts = tuple(map(str, known["background"]))
        if not np.isfinite(numbers).all() or numbers[0] <= 0 or numbers[1] > 0 or not texts:
            raise ValueError(f"text.chance has {numbers} and {len(texts)} texts, expected a rising one and some texts")
        return cls(texts, *numbers)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked model folder. `sha256` is that of the manifest, which has those of all other files."""

    folder: Path
    name: str
    family: str  # "cls", "map", "attention_pool" or "average": how the image tower pools its tokens
    image: ImageTransform  # how to prepare frames
    grid: tuple[int, int]  # (h, w), P = h * w
    prefix_tokens: int  # R
    token_width: int  # C
    embedding_width: int  # D
    context_length: int  # L
    clean: str  # how to clean texts before the tokenizer, see `text.clean_text`
    unknown_mark: str | None  # prefix of the tokens of listed words; alone, the token of unknown words; None: no list
    attention_input: AttentionInput
    shift_default: ShiftMode
    subject: SubjectScale
    chance: ChanceScale | None  # None: the model was not calibrated
    scene_similarity: float  # cosine above which neighbouring shots are one scene, see `scenes`
    # sha256 of an earlier manifest -> file of the matrix [D, D] that converts its scene vectors to this one's, or ""
    same_scene: Mapping[str, str]
    same_vectors: frozenset[str]  # sha256 of earlier manifests with the same image side, but an older text tower
    sha256: str
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def find(cls, name: str | os.PathLike[str]) -> Bundle:
        """Loads a bundle by name: 'builtin', a folder, or a model in the cache.

        Raises:
            ModelNotFound: there is no such model.
            CheckpointMismatch: a file differs from the manifest.
            ModelError: the folder holds no usable bundle.
        """
        text = os.fspath(name)
        if text == BUILTIN:
            return cls.load(Path(__file__).parents[1] / "models" / BUILTIN)
        if (Path(text) / MANIFEST).is_file():
            return cls.load(Path(text))
        if Path(text).is_dir():
            raise ModelError(f"{text} is a folder without a {MANIFEST}", hint="`keyreel export MODEL -o DIR` makes one")
        cached = bundle_folder(text)
        if (cached / MANIFEST).is_file():
            return cls.load(cached)
        command = f"`keyreel models install {text}` downloads it"
        if catalogue.find(text) is None:
            command = f"`keyreel export {text}` makes it (needs {pip_install('export')})"
        hint = f"{command}; `keyreel models list` shows what you can install"
        raise ModelNotFound(text, cached_names(), hint=hint)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and checks every file against it.

        Raises:
            CheckpointMismatch: a file is missing or differs from the manifest.
            ModelError: the manifest cannot be read or is not keyreel's.
        """
        folder = Path(folder)
        try:
            raw = (folder / MANIFEST).read_bytes()
            manifest = json.loads(raw)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder / MANIFEST} cannot be read: {error}", hint="export the model again") from error
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            got = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
            raise ModelError(f"{folder}: schema {got!r} is not {SCHEMA!r}", hint="export the model again")
        _check_files(folder, manifest)
        try:
            _check_values(manifest)
            return cls(
                folder=folder,
                name=str(manifest["name"]),
                family=str(manifest["family"]),
                image=ImageTransform(**manifest["image"]),
                grid=cast("tuple[int, int]", tuple(int(n) for n in manifest["grid"])),
                prefix_tokens=int(manifest["prefix_tokens"]),
                token_width=int(manifest["token_width"]),
                embedding_width=int(manifest["embedding_width"]),
                context_length=int(manifest["text"]["context_length"]),
                clean=str(manifest["text"]["clean"]),
                unknown_mark=manifest["text"].get("unknown_mark"),
                attention_input=manifest["attention"]["input"],
                shift_default=manifest["fusion"]["shift_default"],
                subject=SubjectScale(**{key: float(value) for key, value in dict(manifest["subject"]).items()}),
                chance=ChanceScale.of(manifest),
                scene_similarity=_cosine_of(manifest["fusion"].get("scene_similarity", SCENE_SIMILARITY)),
                same_scene={str(key): str(value) for key, value in manifest["fusion"].get("same_scene", {}).items()},
                same_vectors=frozenset(map(str, manifest["fusion"].get("same_vectors", ()))),
                sha256=hashlib.sha256(raw).hexdigest(),
                manifest=manifest,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / MANIFEST}: bad or missing entry: {error!r}", hint="export it again") from error

    @property
    def precision(self) -> str:
        """Precision of the weights: "fp32", "fp16", or "int8" if the backbone's matrix products have 8 bits."""
        return str(self.manifest.get("precision", "fp32"))

    def scene_update(self, sha256: str) -> F32 | None:
        """[D, D] float32: converts scene vectors of an earlier bundle, one of `same_scene`; None if they are the same.

        The products do not have unit length.
        """
        name = self.same_scene[sha256]
        return np.load(self.file(name), allow_pickle=False).astype(np.float32) if name else None

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.folder / name


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ModelError(f"{folder / MANIFEST} lists no files", hint="export the model again")
    missing = [name for name in (*GRAPHS, "tokenizer.json") if name not in files]
    if missing:
        raise ModelError(f"{folder / MANIFEST} does not list {', '.join(missing)}", hint="export the model again")
    for name, entry in files.items():
        path = folder / name
        if path.resolve().parent != folder.resolve():
            raise ModelError(f"{folder / MANIFEST} names a file outside its folder: {name!r}")
        if not path.is_file():
            raise CheckpointMismatch(f"{path} is missing", hint="export the model again")
        digest, wanted = sha256_of(path), str(entry.get("sha256")) if isinstance(entry, dict) else ""
        if digest != wanted:
            message = f"{path} is not the file of the manifest (sha256 {digest[:12]}, expected {wanted[:12]})"
            raise CheckpointMismatch(message, hint="export the model again")


def _check_values(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not allowed."""
    for part, key, allowed in (
        ("attention", "input", get_args(AttentionInput)),
        ("fusion", "shift_default", get_args(ShiftMode)),
        ("text", "clean", ("none", "lower", "whitespace", "canonicalize")),
    ):
        if manifest[part][key] not in allowed:
            raise ValueError(f"{part}.{key} is {manifest[part][key]!r}, allowed: {', '.join(allowed)}")
    if len(manifest["grid"]) != 2 or min(manifest["grid"]) < 1:
        raise ValueError(f"grid is {manifest['grid']!r}, expected [rows, columns]")


def _cosine_of(value: Any) -> float:
    if not -1 <= float(value) <= 1:
        raise ValueError(f"fusion.scene_similarity is {value!r}, expected a cosine")
    return float(value)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Adds size and sha256 of every other file in `folder` to the manifest, and writes it."""
    files = {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    document = {"schema": SCHEMA, **manifest, "files": files}
    with atomic_write(folder / MANIFEST) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
