"""The catalogue of models to install: where their weights are, and what they are good for.

Revisions and digests pin each file on the Hugging Face Hub. They come from public lock files and catalogues that agree
with each other, since the hub could not be reached where this list was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from keyreel.config import ImageTransform

Pixels: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and scale of red, green and blue, of 0..1."""

OPENAI: Pixels = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF: Pixels = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NONE: Pixels = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
MIT = "MIT"
APACHE = "Apache-2.0"
APPLE = "Apple ML Research License: for research only"

# These tokenizers come from the repository of the weights; all others are built from CLIP's merges.
GEMMA: Mapping[str, Any] = {
    "kind": "file",
    "sha256": "220c63d496e0c14e63eb656c91e0215e926202e4c74b1f089e09f1920d779b04",
    "clean": "canonicalize",
    "context_length": 64,
    "pad": [0, "<pad>"],
    "end": [1, "<eos>"],
}
TOKENIZERS: Mapping[str, Mapping[str, Any]] = {"ViT-B-16-SigLIP2": GEMMA, "ViT-B-32-SigLIP2-256": GEMMA}


@dataclass(frozen=True, slots=True)
class Weights:
    """Trained weights of an architecture, as open_clip names them."""

    name: str  # ARCHITECTURE/TAG
    repository: str  # on the Hugging Face Hub
    revision: str  # the commit
    sha256: str  # of the file
    size_bytes: int  # of the file; rounded for some
    licence: str
    about: str  # what it is good for
    gigaflops: float  # of the image tower, a frame
    width: int  # D
    languages: str = "English"
    file: str = "open_clip_model.safetensors"
    pixels: Pixels = OPENAI
    mode: str = "shortest"
    interpolation: str = "bicubic"

    @property
    def architecture(self) -> str:
        """The architecture, as open_clip spells it."""
        return self.name.partition("/")[0]

    def image(self, height: int, width: int) -> ImageTransform:
        """How to prepare frames for the tower."""
        return ImageTransform(height, width, self.mode, self.interpolation)  # type: ignore[arg-type]


BUILTIN_GIGAFLOPS = 0.67  # of the built-in image tower, a frame
RECOMMENDED = "ViT-B-32-256/datacomp_s34b_b86k"
CATALOGUE = (
    Weights(
        "MobileCLIP2-S0/dfndr2b",
        "timm/MobileCLIP2-S0-OpenCLIP",
        "095906d28bf54d7584dc411e8ffe448f34289e05",
        "ab91a1a0c4330d6b1913e24d5035dfdea15423316aaec649610c6b1c6ddd0e95",
        300_000_000,
        APPLE,
        "the fastest, for research",
        4.8,
        512,
        pixels=NONE,
        interpolation="bilinear",
    ),
    Weights(
        "ViT-B-32/laion2b_s34b_b79k",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "1a25a446712ba5ee05982a381eed697ef9b435cf",
        "ac4f8c4b88af6d963118cbf40ad93176d092abbedfcb752601ae1866352656e6",
        605_143_316,
        MIT,
        "the best known one, to compare with others",
        5.9,
        512,
    ),
    Weights(
        "ViT-B-32/datacomp_xl_s13b_b90k",
        "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "f0e2ffa09cbadab3db6a261ec1ec56407ce42912",
        "3c00043509d2e3f35ec62bd85a643a393883dcda624d8208d034cc390c708297",
        605_000_000,
        MIT,
        "as fast, trained on better data",
        5.9,
        512,
    ),
    Weights(
        RECOMMENDED,
        "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
        "4afec35ffe57a943d569ff7ee888061830164da8",
        "92c26d60d3200ed5ed040dff31a8d19f8140648da8007216c25744c478deef27",
        605_189_364,
        MIT,
        "recommended: the best answers for its time",
        7.7,
        512,
    ),
    Weights(
        "ViT-B-32-SigLIP2-256/webli",
        "timm/ViT-B-32-SigLIP2-256",
        "cd1efb47643f2794413dd79ef24397c175032780",
        "7cdccf256ee0e4a9908c365f8e1c88d5db171980a3350c214f5221d50f8d9927",
        1_507_000_000,
        APACHE,
        "queries in many languages, fast",
        11.3,
        768,
        languages="many",
        pixels=HALF,
        mode="squash",
    ),
    Weights(
        "ViT-B-16-SigLIP2/webli",
        "timm/ViT-B-16-SigLIP2",
        "eee10eff6dd8cabae2d7f379d4e8cfcd352030aa",
        "d0a51069d2fa6c95b371b3bffd2a2c765c1815004798ee99f075290dbca73041",
        1_500_786_832,
        APACHE,
        "queries in many languages",
        34.0,
        768,
        languages="many",
        pixels=HALF,
        mode="squash",
    ),
    Weights(
        "convnext_base_w/laion2b_s13b_b82k",
        "laion/CLIP-convnext_base_w-laion2B-s13B-b82K",
        "1bda9a8995c2c62f1c68c653e2f5993acbfc111d",
        "a7528aa0381ddcd2cf5791eb5efd8b695d109b57fbcf9f53fb464ab3950d86b0",
        718_000_000,
        MIT,
        "a convolutional network: finer maps of where things are",
        40.1,
        640,
    ),
    Weights(
        "ViT-L-14/laion2b_s32b_b82k",
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "1627032197142fbe2a7cfec626f4ced3ae60d07a",
        "7d129ed747e0ed53e82dfcc140382b51be66b56e6a9bdc3258afd2846e3bb019",
        1_710_517_748,
        MIT,
        "the best answers, for GPUs",
        103.8,
        768,
        file="open_clip_pytorch_model.safetensors",
        pixels=HALF,
    ),
)
ARCHITECTURES = tuple(dict.fromkeys(weights.architecture for weights in CATALOGUE))


def find(name: str) -> Weights | None:
    """Finds the weights of that name."""
    return next((weights for weights in CATALOGUE if weights.name == name), None)
