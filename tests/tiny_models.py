"""open_clip models of a few thousand weights, one a pooling family, for the tests of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "keyreel-tiny-vit": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": _TEXT,
    },
    "keyreel-tiny-rn": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "keyreel-tiny-map": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {**_TEXT, "no_causal_mask": True, "pool_type": "last"},
    },
    "keyreel-tiny-token": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
        "text_cfg": _TEXT,
    },
    "keyreel-tiny-eva": {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None},
        "text_cfg": _TEXT,
    },
    "keyreel-tiny-avg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": _TEXT,
    },
}


def register(folder: Path) -> Any:
    """Makes the models known to open_clip, which is returned."""
    from keyreel_export.torchvision_cpu import import_open_clip

    open_clip = import_open_clip()
    for name, config in CONFIGS.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    return open_clip


def build(open_clip: Any, name: str, *, seed: int = 0, text: bool = True) -> Any:
    """A model with random weights in evaluation mode; `text=False` shrinks the text tower to next to nothing."""
    import torch

    from keyreel_export.onnx import contained

    small = {} if text else {"text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}}
    with torch.random.fork_rng(devices=[]), contained():
        torch.manual_seed(seed)
        return open_clip.create_model(name, **small).requires_grad_(False).eval()


def stock_vectors(model: Any, frames: Any) -> Any:
    """What open_clip itself makes of frames [N, H, W, 3] uint8: [N, D] float32."""
    import torch

    config = model.visual.preprocess_cfg
    images = (frames / 255.0 - np.array(config["mean"])) / np.array(config["std"])
    with torch.no_grad():
        return model.encode_image(torch.from_numpy(images.transpose(0, 3, 1, 2)).float(), normalize=True).numpy()
