"""Loads open_clip's model and tokenizer by the name of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyreel.errors import CheckpointMismatch, ModelError, ModelNotFound
from keyreel.runtime.bundle import sha256_of
from keyreel_export.onnx import contained
from keyreel_export.torchvision_cpu import import_open_clip

HUB = "hf-hub:"
TOWERS = "image and text tower"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed model name."""

    architecture: str  # a name of open_clip's, or hf-hub:org/repo
    pretrained: str | None  # a tag of open_clip, or the path of a checkpoint; None for a hub model or random weights
    source: dict[str, str]  # the manifest's entry: what, from, licence
    quick_gelu: bool = False  # whether the weights need the activation x * sigmoid(1.702 x)


def _source(what: str, origin: str | Path, licence: str = UNKNOWN) -> dict[str, str]:
    if isinstance(origin, Path):
        origin = f"{origin.name} sha256:{sha256_of(origin)}"
    return {"what": what, "from": origin, "licence": licence}


def resolve(name: str, *, random_weights: bool = False) -> Recipe:
    """Parses a model's name; loads and downloads nothing.

    Raises:
        ModelNotFound: there is no such architecture or tag.
    """
    open_clip = import_open_clip()
    if name.startswith(HUB):
        return Recipe(name, None, _source(TOWERS, name))
    architecture, _, rest = name.partition("/")
    pairs = [f"{model}/{tag}" for model, tag in open_clip.list_pretrained()]
    if architecture not in open_clip.list_models():
        raise ModelNotFound(name, [*pairs, *open_clip.list_models()], hint="open_clip.list_pretrained() has all names")
    if random_weights:
        return Recipe(architecture, None, _source(TOWERS, "random weights", "none"))
    for path in (Path(rest), Path("/", rest)):
        if rest and path.is_file():
            return Recipe(architecture, str(path), _source(TOWERS, path))
    from open_clip.pretrained import get_pretrained_cfg

    config = get_pretrained_cfg(architecture, rest)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        hint = f"weights of {architecture}: {', '.join(tags) or 'none'}; or give ARCH/path/to/checkpoint"
        raise ModelNotFound(name, pairs, hint=hint)
    repository = str(config.get("hf_hub") or "").strip("/")
    origin = f"{HUB}{repository}" if repository else str(config.get("url"))
    return Recipe(architecture, rest, _source(TOWERS, origin), bool(config.get("quick_gelu")))


def load_model(recipe: Recipe) -> Any:
    """Loads the open_clip model of a recipe, float32, in evaluation mode.

    Raises:
        ModelError: the weights cannot be loaded.
        CheckpointMismatch: the weights do not fit the architecture.
    """
    open_clip = import_open_clip()
    wanted = recipe.pretrained is not None or recipe.architecture.startswith(HUB)
    try:
        with contained():
            # weights_only: a checkpoint must not run code.
            model = open_clip.create_model(
                recipe.architecture,
                recipe.pretrained,
                force_quick_gelu=recipe.quick_gelu,
                require_pretrained=wanted,
                weights_only=True,
            )
    except Exception as error:
        if recipe.pretrained is not None and Path(recipe.pretrained).is_file():
            raise CheckpointMismatch(
                f"{recipe.pretrained} cannot be loaded as weights of {recipe.architecture}: {error}",
                hint="safetensors, or what torch.load(weights_only=True) reads, with open_clip's names of weights",
            ) from error
        hint = "offline, HF_HUB_OFFLINE=1 takes what the cache has, and ARCH/path/to/checkpoint a local file"
        raise ModelError(f"{recipe.source['from']} cannot be loaded: {error}", hint=hint) from error
    return model.requires_grad_(False).eval()


def load_tokenizer(architecture: str) -> Any:
    """Loads open_clip's tokenizer of a model.

    Raises:
        ModelError: open_clip cannot load it.
    """
    open_clip = import_open_clip()
    try:
        with contained():
            return open_clip.get_tokenizer(architecture)
    except Exception as error:
        hint = (
            "models with a Hugging Face tokenizer need `pip install transformers` and its files, downloaded or cached"
        )
        raise ModelError(f"the tokenizer of {architecture} cannot be loaded: {error}", hint=hint) from error
