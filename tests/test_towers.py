"""Split towers against open_clip's own encode_image, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra export is not installed")

import tiny_models
import torch
from torch.nn import functional as F

from keyreel.errors import ModelError
from keyreel_export import towers
from keyreel_export.fusion import TemporalSpatialFusion

pytestmark = pytest.mark.full

CASES = {
    "ViT-B-32": ("cls", (7, 7), 1, 768),
    "RN50": ("attention_pool", (7, 7), 0, 2048),
    "ViT-B-16-SigLIP": ("map", (14, 14), 0, 768),
    "convnext_tiny": ("average", (7, 7), 0, 768),
    "MobileCLIP2-S0": ("average", (8, 8), 0, 1024),
    "PE-Core-T-16-384": ("map", (24, 24), 1, 192),
    "ViTamin-S": ("average", (14, 14), 0, 384),
    "keyreel-tiny-token": ("cls", (10, 10), 1, 64),
    "keyreel-tiny-eva": ("cls", (16, 16), 1, 192),
}


@pytest.mark.parametrize("name", CASES)
def test_identity_with_open_clip(open_clip: Any, name: str) -> None:
    model = tiny_models.build(open_clip, name, text=False)
    family, grid, prefix, width = CASES[name]
    size = model.visual.preprocess_cfg["size"]
    height, breadth = size if isinstance(size, tuple) else (size, size)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, height, breadth, 3), dtype=torch.uint8, generator=generator)
    stock = torch.from_numpy(tiny_models.stock_vectors(model, frames.numpy()))

    tower = towers.split_tower(model)
    assert (tower.family, tower.grid, tower.prefix_tokens, tower.token_width) == (family, grid, prefix, width)
    assert tower.embedding_width == stock.shape[1]
    patches = grid[0] * grid[1]
    uniform = torch.full((2, patches), 1 / patches)
    energy = torch.rand(2, patches, generator=generator) ** 4
    energy[:, 0] = 0  # a patch without any attention must not give NaN
    contrast = energy / energy.sum(1, keepdim=True)
    change = torch.rand(2, patches, generator=generator)
    with torch.no_grad():
        tokens = tower(frames)
        assert tokens.shape == (2, prefix + patches, width)
        assert tokens.dtype == torch.float32
        biases = [
            towers.pooling_bias(attention, torch.tensor(strength))
            for attention, strength in ((uniform, 1.0), (contrast, 0.0), (contrast, 2.0))
        ]
        pooled = [F.normalize(tower.projection(tower.features(tokens, bias)), dim=-1) for bias in biases]
        scene, subject, weights = TemporalSpatialFusion(tower, tower.projection)(tokens, contrast, change)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert torch.isfinite(subject).all()
    assert float((subject - stock).abs().max()) >= 1e-4
    for same in (*pooled[:2], scene):
        assert float((same * stock).sum(1).min()) >= 0.9999
        assert float((same - stock).abs().max()) <= 1e-5
    assert torch.isfinite(pooled[2]).all()
    assert float((pooled[2] - stock).abs().max()) >= 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attentional_pool": True}, "attentional pooler"),
        ({"pool_type": "avg"}, "pool_type 'avg'"),
        ({"pool_type": "none"}, "pool_type 'none'"),
        ({"layers": 1}, "1 blocks"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160, "timm_proj": "linear"}, None),
        ({"timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "", "image_size": 224}, "SwinTransformer"),
        (
            {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": "", "image_size": 224},
            "own attention",
        ),
    ],
)
def test_unsupported_towers_are_refused(open_clip: Any, change: dict[str, Any], words: str | None) -> None:
    config = tiny_models.CONFIGS["keyreel-tiny-vit"]
    from keyreel_export.onnx import contained

    with contained():
        model = open_clip.create_model("keyreel-tiny-vit", vision_cfg={**config["vision_cfg"], **change}).eval()
    if words is None:  # timm's ViT with its own default pool, the class token: supported
        assert towers.split_tower(model).family == "cls"
        return
    with pytest.raises(ModelError, match=words) as caught:
        towers.split_tower(model)
    assert "SigLIP" in str(caught.value.hint)


def test_splitting_leaves_the_model_as_it_was(open_clip: Any, tmp_path: Path) -> None:
    model = tiny_models.build(open_clip, "MobileCLIP2-S0", text=False)
    before = [name for name, _ in model.named_parameters()]
    towers.split_tower(model)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("name", ["keyreel-tiny-vit", "keyreel-tiny-rn"])
def test_query_attention_against_torch_with_a_mask(open_clip: Any, name: str) -> None:
    """The whole last attention with an additive mask, by torch's own routine, row of the query kept."""
    tower = towers.split_tower(tiny_models.build(open_clip, name, text=False))
    generator = torch.Generator().manual_seed(3)
    patches = tower.grid[0] * tower.grid[1]
    tokens = torch.randn(2, tower.prefix_tokens + patches, tower.token_width, generator=generator)
    energy = torch.rand(2, patches, generator=generator) ** 3
    attention = energy / energy.sum(1, keepdim=True)
    strength = 1.5
    length = 1 + patches
    mask = torch.zeros(2, length, length)
    mask[:, 0, 1:] = strength * (attention * patches).log()
    body = tower.body
    with torch.no_grad():
        if name == "keyreel-tiny-vit":
            block = body.transformer.resblocks[-1]
            stacked = mask.repeat_interleave(block.attn.num_heads, 0)
            x = tokens + block.attention(block.ln_1(tokens), attn_mask=stacked)
            x = x + block.mlp(block.ln_2(x))
            expected = body.ln_post(x)[:, 0] @ body.proj
        else:
            pool = body.attnpool
            x = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.positional_embedding
            x = x.transpose(0, 1)
            expected = F.multi_head_attention_forward(
                x, x, x, x.shape[-1], pool.num_heads, None,
                torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
                pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
                attn_mask=mask.repeat_interleave(pool.num_heads, 0), use_separate_proj_weight=True,
                q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
            )[0][0]  # fmt: skip
        found = tower.projection(tower.features(tokens, towers.pooling_bias(attention, torch.tensor(strength))))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)
