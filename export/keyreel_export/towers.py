"""open_clip's image towers, split where they pool.

Every CLIP image tower ends in a pooling with weights w[t,i] over patches, then a projection. `Tower.forward` is all
that comes before, `Tower.features` the pooling, with the weights multiplied by an attention map a[t,i] and
renormalised:

    w'[t,i] ∝ w[t,i] · (P · a[t,i])^γ

that is, γ·log(P·a) is added to the logits of the pooling query's row; the entries of prefix tokens (the class token)
stay as they are. A uniform map, and γ = 0, give the stock tower. Letters: N frames, P patches, R prefix tokens,
C token width, F width of the pooled features, D embedding width.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from keyreel.errors import ModelError
from keyreel_export.torchvision_cpu import import_open_clip

Family = Literal["cls", "map", "attention_pool", "average"]

SUPPORTED = (
    "supported image towers: open_clip's ViT pooled by class token; timm's ViT and EVA pooled by class "
    "token, average or attention (SigLIP, PE); open_clip's ResNet with attention pooling; timm's convolutional "
    "networks that end in an average (ConvNeXt, FastViT/MobileCLIP)"
)


def pooling_bias(attention: Tensor, strength: Tensor) -> Tensor:
    """γ·log(P·a), what an attention map adds to the logits of the pooling. [N,P] float32, [] -> [N,P] float32."""
    relative = attention.float() * attention.shape[1]
    # log 0 · γ would be NaN at γ = 0.
    return strength.float() * relative.clamp_min(1e-6).log()


def weighted_mean(tokens: Tensor, bias: Tensor) -> Tensor:
    """The mean of tokens [N, P, C] with the softmax of `bias` [N, P] as weights: [N, C]."""
    return (bias.softmax(-1).to(tokens.dtype)[:, None] @ tokens)[:, 0]


def query_attention(query: Tensor, keys: Tensor, values: Tensor, heads: int, bias: Tensor) -> Tensor:
    """Multi-head attention of one query [N, 1, C] over keys and values [N, L, C]: [N, C].

    `bias` [N, L] is added to the logits of every head. The result is before the output projection.
    """

    def split(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)

    q, k, v = split(query), split(keys), split(values)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias[:, None, None].to(q.dtype)
    attended: Tensor = logits.softmax(-1) @ v
    return attended.transpose(1, 2).flatten(1)


class Tower(nn.Module):
    """An image tower in two halves. Subclasses give `encode` and `features`.

    `projection` is the fully connected layer that ends the tower, Identity where there is none.
    """

    family: Family  # how the tower pools
    grid: tuple[int, int]  # (h, w), P = h * w
    token_width: int  # C
    feature_width: int  # F
    embedding_width: int  # D
    offset: Tensor
    factor: Tensor

    def __init__(self, visual: Any, body: Any, *, projection: nn.Module, prefix_tokens: int = 0) -> None:
        super().__init__()
        self.body: Any = body
        self.projection = projection
        self.prefix_tokens = prefix_tokens  # R
        preprocess = visual.preprocess_cfg
        self.image_size = _pair(preprocess["size"])  # (height, width) in pixels
        # open_clip: (x/255 - mean)/std, with both divisions made one factor.
        self.register_buffer("offset", 255.0 * torch.tensor(preprocess["mean"]))
        self.register_buffer("factor", 1.0 / (255.0 * torch.tensor(preprocess["std"])))

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> tokens [N, R+P, C]."""
        raise NotImplementedError

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Tokens [N, R+P, C] and the bias of the patches' logits [N, P] -> pooled features [N, F]."""
        raise NotImplementedError

    def forward(self, frames: Tensor) -> Tensor:
        """Frames uint8 [N, H, W, 3] -> tokens [N, R+P, C], float32 at any precision of the weights."""
        # Cast before permute: TensorRT cannot build a graph that permutes uint8.
        x = (frames.to(self.factor.dtype) - self.offset) * self.factor
        return self.encode(x.permute(0, 3, 1, 2)).float()

    def _with_prefix(self, bias: Tensor) -> Tensor:
        return F.pad(bias, (self.prefix_tokens, 0))

    @torch.no_grad()
    def measure(self) -> Tower:
        """Sets the widths by running one black frame. Returns itself.

        Raises:
            ModelError: the tower gives another grid than expected.
        """
        tokens = self(torch.zeros(1, *self.image_size, 3, dtype=torch.uint8))
        count = tokens.shape[1] - self.prefix_tokens
        if count != self.grid[0] * self.grid[1]:
            raise ModelError(f"the image tower gives {count} patches, its grid is {self.grid}", hint=SUPPORTED)
        features = self.features(tokens, torch.zeros(1, count))
        self.token_width = int(tokens.shape[2])
        self.feature_width = int(features.shape[1])
        self.embedding_width = int(self.projection(features).shape[1])
        return self


class ClassTokenTower(Tower):
    """open_clip's VisionTransformer with pool_type "tok": the class token's query in the last block pools."""

    family: Family = "cls"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual, projection=_as_linear(visual.proj), prefix_tokens=1)
        self.grid = _pair(visual.grid_size)

    def encode(self, images: Tensor) -> Tensor:
        found = self.body.forward_intermediates(
            images,
            indices=[len(self.body.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        block = self.body.transformer.resblocks[-1]
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        first, normed = tokens[:, :1], block.ln_1(tokens)
        # Only the class token leaves the last block, so only its row is computed.
        query, keys, values = (
            F.linear(x, w, b) for x, w, b in zip((normed[:, :1], normed, normed), weights, biases, strict=True)
        )
        attended = query_attention(query, keys, values, block.attn.num_heads, self._with_prefix(bias))
        x = first[:, 0] + block.ls_1(block.attn.out_proj(attended))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        normalised: Tensor = self.body.ln_post(x)
        return normalised


class AttentionPool2dTower(Tower):
    """open_clip's ModifiedResNet: the mean token's query in AttentionPool2d pools."""

    family: Family = "attention_pool"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual, projection=visual.attnpool.c_proj)
        self.grid = (self.image_size[0] // 32, self.image_size[1] // 32)

    def encode(self, images: Tensor) -> Tensor:
        stages = self.body.forward_intermediates(images, indices=[4], intermediates_only=True)
        feature_map: Tensor = stages["image_intermediates"][0]
        return feature_map.flatten(2).transpose(1, 2)

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        head = self.body.attnpool
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + head.positional_embedding
        query, keys, values = head.q_proj(x[:, :1]), head.k_proj(x), head.v_proj(x)
        return query_attention(query, keys, values, head.num_heads, F.pad(bias, (1, 0)))


class TrunkClassTokenTower(Tower):
    """timm's VisionTransformer or Eva with global_pool "token": the class token's query in the last block pools."""

    family: Family = "cls"

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        super().__init__(visual, trunk, projection=_trunk_projection(visual), prefix_tokens=trunk.num_prefix_tokens)
        self.grid = _pair(trunk.patch_embed.grid_size)

    def encode(self, images: Tensor) -> Tensor:
        trunk = self.body
        patches, prefix = trunk.forward_intermediates(
            images,
            indices=[len(trunk.blocks) - 2],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )[0]
        return torch.cat([prefix, patches], dim=1)

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        trunk = self.body
        row = self._with_prefix(bias).to(tokens.dtype)[:, None, None]
        mask = F.pad(row, (0, 0, 0, row.shape[-1] - 1))
        rope = getattr(trunk, "rope", None)
        if rope is None:
            x = trunk.blocks[-1](tokens, attn_mask=mask)
        else:
            x = trunk.blocks[-1](tokens, rope=rope.get_embed().to(tokens.dtype), attn_mask=mask)
        return _trunk_features(trunk, trunk.norm(x)[:, 0])


class LatentQueryTower(Tower):
    """timm's VisionTransformer or Eva with AttentionPoolLatent (SigLIP, PE): a learnt query pools."""

    family: Family = "map"

    def __init__(self, visual: Any) -> None:
        trunk = visual.trunk
        # Where the class token is not pooled, it is not among the tokens either.
        dropped = 0 if getattr(trunk, "pool_include_prefix", True) else trunk.num_prefix_tokens
        prefix_tokens = trunk.num_prefix_tokens - dropped
        super().__init__(visual, trunk, projection=_trunk_projection(visual), prefix_tokens=prefix_tokens)
        self._dropped = dropped
        self.grid = _pair(trunk.patch_embed.grid_size)

    def encode(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.body.forward_features(images)
        return tokens[:, self._dropped :]

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        trunk = self.body
        mask = self._with_prefix(bias).to(tokens.dtype)[:, None, None]
        return _trunk_features(trunk, trunk.attn_pool(tokens, attn_mask=mask))


class TrunkAverageTokensTower(Tower):
    """timm's VisionTransformer with global_pool "avg" (ViTamin): the mean over patches pools."""

    family: Family = "average"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual, visual.trunk, projection=_trunk_projection(visual))
        self.grid = _pair(visual.trunk.patch_embed.grid_size)

    def encode(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.body.forward_features(images)
        return tokens[:, self.body.num_prefix_tokens :]

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        return _trunk_features(self.body, weighted_mean(tokens, bias))


class AveragePoolTower(Tower):
    """timm's convolutional networks (ConvNeXt, FastViT): the mean over the last feature map pools."""

    family: Family = "average"

    def __init__(self, visual: Any, trunk: Any) -> None:
        super().__init__(visual, trunk, projection=_trunk_projection(visual))
        with torch.no_grad():
            height, width = trunk.forward_features(torch.zeros(1, 3, *self.image_size)).shape[2:]
        self.grid = (int(height), int(width))

    def encode(self, images: Tensor) -> Tensor:
        feature_map: Tensor = self.body.forward_features(images)
        return feature_map.flatten(2).transpose(1, 2)

    def features(self, tokens: Tensor, bias: Tensor) -> Tensor:
        # The head averages its input, which does not change a map of one pixel.
        pooled = weighted_mean(tokens, bias)[:, :, None, None]
        features: Tensor = self.body.forward_head(pooled, pre_logits=True)
        return features.flatten(1)


def split_tower(model: Any) -> Tower:
    """Splits the image tower of an open_clip model in evaluation mode; the result shares its weights.

    Raises:
        ModelError: the tower pools in a way that is not supported.
    """
    import_open_clip()
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    if isinstance(visual, VisionTransformer):
        return _split_open_clip_vit(visual).measure()
    if isinstance(visual, ModifiedResNet):
        return AttentionPool2dTower(visual).measure()
    if isinstance(visual, TimmModel):
        return _split_timm(visual).measure()
    raise _unsupported(type(visual).__name__)


def _split_open_clip_vit(visual: Any) -> Tower:
    from open_clip.transformer import ResidualAttentionBlock

    if visual.attn_pool is not None:
        raise _unsupported("an open_clip ViT with an attentional pooler (CoCa)")
    if visual.pool_type != "tok":
        raise _unsupported(f"an open_clip ViT with pool_type {visual.pool_type!r}")
    blocks = visual.transformer.resblocks
    if type(blocks[-1]) is not ResidualAttentionBlock or len(blocks) < 2:
        raise _unsupported(f"an open_clip ViT of {len(blocks)} blocks whose last is a {type(blocks[-1]).__name__}")
    return ClassTokenTower(visual)


def _split_timm(visual: Any) -> Tower:
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.utils.model import reparameterize_model

    trunk = visual.trunk
    name = type(trunk).__name__
    if "pool" in visual.head._modules:
        raise _unsupported(f"timm's {name} with open_clip's own attention pooling")
    # Exact types: subclasses (relative positions, distillation) have other blocks and pools.
    if type(trunk) in (VisionTransformer, Eva):
        if type(trunk.attn_pool) is AttentionPoolLatent and trunk.attn_pool.latent_len == 1:
            return LatentQueryTower(visual)
        if trunk.attn_pool is None and trunk.global_pool == "avg" and not getattr(trunk, "pool_include_prefix", False):
            return TrunkAverageTokensTower(visual)
        if trunk.attn_pool is None and trunk.global_pool == "token" and not getattr(trunk, "rope_mixed", False):
            return TrunkClassTokenTower(visual)
        raise _unsupported(f"timm's {name} with global_pool {trunk.global_pool!r}")
    pools = [module for module in trunk.modules() if isinstance(module, SelectAdaptivePool2d)]
    if len(pools) != 1 or pools[0].pool_type != "avg" or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
        raise _unsupported(f"timm's {name}")
    # FastViT's training-time branches become one convolution each (MobileOne, arXiv 2206.04040): same values. What
    # normalisation is left is folded here, and not by the exporter, so that a template can tell how.
    whole = copy.deepcopy(trunk).double()
    return AveragePoolTower(visual, _without_norms(reparameterize_model(whole, inplace=True)).float())


def _without_norms(trunk: Any) -> Any:
    """Folds each BatchNorm that follows a convolution into it, in place."""
    from timm.layers.conv_bn_act import ConvNormAct

    for module in trunk.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = getattr(module.bn, "act", nn.Identity())
    return trunk


def _unsupported(what: str) -> ModelError:
    return ModelError(f"the image tower cannot be split at its pooling: it is {what}", hint=SUPPORTED)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (int(size), int(size))


def _as_linear(weight: Tensor | None) -> nn.Module:
    if weight is None:
        return nn.Identity()
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight = nn.Parameter(weight.detach().T.contiguous())
    return linear


def _trunk_projection(visual: Any) -> nn.Module:
    return nn.Sequential(visual.trunk.get_classifier(), visual.head)


def _trunk_features(trunk: Any, pooled: Tensor) -> Tensor:
    features: Tensor = trunk.head_drop(trunk.fc_norm(pooled))
    return features
