# SPDX-License-Identifier: Apache-2.0
"""BEiT as a classifier: a Vision Transformer that knows patches by how far apart they are, pretrained as BERT is.

    x_0 = [cls; E p_1; ...; E p_N]                                     no absolute positions
    x   = x + gamma_1 attention(norm(x); B),  x = x + gamma_2 mlp(norm(x))
    y   = head(norm(mean of the patches' x_L))

``B`` is a bias by relative position, from a table in each block or from one for all (``layers.RelativePositionBias``).
``pretraining.py`` has the network that predicts visual tokens of masked patches, whose weights this one starts from.

BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254
BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, https://arxiv.org/abs/2208.06366
Arguments and state-dict names are timm's, so its checkpoints load as they are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from fvm_fast.layers.relative_position_attention import RelativePositionBias, RelativePositionBlock, rescale_blocks
from fvm_fast.layers.vision_transformer import VisionTransformer

TEST = {"img_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 4, "init_values": 0.1}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


class Beit(VisionTransformer):
    """BEiT, v1 and v2.

    timm's ``swiglu_mlp`` and ``scale_mlp``, which none of the published models has, are not there.

    Args:
        img_size: side or (height, width) of the images in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of an image.
        num_classes: width of the head; 0 leaves the head out and the model returns pooled features.
        global_pool: ``avg`` (over patches), ``token`` (the class token), or ``""`` for all tokens.
        embed_dim, depth, num_heads, mlp_ratio: width of a token, blocks, heads, hidden width over ``embed_dim``.
        qkv_bias: whether query and value have a bias; the key has none.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the embedding, after
            attention and MLP, of the attention probabilities.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        norm_layer, act_layer: norm constructor (None: LayerNorm with ``norm_eps``) and activation, by name or class.
        init_values: initial LayerScale; None leaves LayerScale out.
        use_abs_pos_emb: learned absolute positions.
        use_rel_pos_bias: a table of relative positions in every block.
        use_shared_rel_pos_bias: one table of relative positions for all blocks, as in pretraining.
        head_init_scale: factor of the head's initial weights.
        use_fc_norm: the norm comes after the pooling instead of before it (None: when the pooling is ``avg``).
        norm_eps: epsilon of the default norm.
        pos_embed_resize: the rule of ``layers.resize_pos_embed``, for absolute positions.
        image_mean, image_std: per channel for images in [0, 1]; with them the model takes uint8 images too.
        weight_init: ``""`` for the paper's initialisation, ``skip`` to leave torch's.
    """

    crop_pct: float | None = None  # share of the resized image that is seen when evaluating; None goes by the size

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        head_init_scale: float = 0.001,
        use_fc_norm: bool | None = None,
        norm_eps: float = 1e-6,
        pos_embed_resize: str = "timm",
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        weight_init: str = "",
    ) -> None:
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            embed_dim,
            depth=0,  # the blocks are of another kind
            num_heads=num_heads,
            pos_embed="learn" if use_abs_pos_emb else "none",
            fc_norm=use_fc_norm,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            norm_layer=norm_layer,
            pos_embed_resize=pos_embed_resize,
            image_mean=image_mean,
            image_std=image_std,
            weight_init="skip",
        )
        self.head_init_scale = head_init_scale
        grid = self.patch_embed.grid_size
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        self.blocks = nn.Sequential(
            *(
                RelativePositionBlock(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    proj_drop_rate,
                    attn_drop_rate,
                    drop_path,
                    init_values,
                    act_layer,
                    norm_layer,
                    window_size=grid if use_rel_pos_bias else None,
                )
                for drop_path in torch.linspace(0.0, drop_path_rate, depth, device="cpu").tolist()
            )
        )
        if weight_init != "skip":
            self.init_weights()

    def init_weights(self) -> None:
        """Section 2.4: deviation 0.02, and what block l adds to its input is divided by sqrt(2 l); the head small."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tokens in (self.pos_embed, self.cls_token):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)
        rescale_blocks(self.blocks)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, 1 + L, D], the class token first."""
        return self.norm(self.run_blocks(self.embed(images)))

    def run_blocks(self, x: Tensor) -> Tensor:
        """[B, 1 + L, D] -> [B, 1 + L, D]; a table that is shared is read once for all blocks."""
        bias = self.shared_rel_pos_bias()
        for block in self.blocks:
            x = self.run_block(block, x, bias)
        return x

    def run_block(self, block: nn.Module, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """One block, with gradient checkpointing if it is on; the shared bias is read if it is not given."""
        bias = self.shared_rel_pos_bias() if shared_rel_pos_bias is None else shared_rel_pos_bias
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False)
        return block(x, bias)

    def shared_rel_pos_bias(self) -> Tensor | None:
        """[num_heads, 1 + L, 1 + L] of the table that all blocks share; None without one."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; every table of positions is resized."""
        super().set_input_size(img_size)
        grid = self.patch_embed.grid_size
        if self.rel_pos_bias is not None:
            self.rel_pos_bias.set_window_size(grid)
        for block in self.blocks:
            block.attn.set_window_size(grid)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What the data pipeline should know, under timm's keys."""
        return super().default_cfg | ({} if self.crop_pct is None else {"crop_pct": self.crop_pct})

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        tables = {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}
        return {"pos_embed", "cls_token"} | tables

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to depths, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|rel_pos_bias",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _beit(overrides: dict[str, Any], **sizes: Any) -> Beit:
    positions = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": INCEPTION_MEAN, "image_std": INCEPTION_STD} | sizes
    return Beit(**positions | sizes | overrides)


def _beitv2(overrides: dict[str, Any], **sizes: Any) -> Beit:
    if overrides.get("in_chans", 3) == 3:
        sizes |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return _beit(overrides, **sizes)


def beit_test_patch16_64(**kwargs: Any) -> Beit:
    """A size for tests and laptops: 0.26 M parameters."""
    return _beit(kwargs, **TEST)


def beit_base_patch16_224(**kwargs: Any) -> Beit:
    """BEiT-B/16, 224 px, 86.5 M parameters."""
    return _beit(kwargs, **BASE, init_values=0.1)


def beit_base_patch16_384(**kwargs: Any) -> Beit:
    """BEiT-B/16, 384 px, 86.7 M parameters."""
    return _beit(kwargs, img_size=384, **BASE, init_values=0.1)


def beit_large_patch16_224(**kwargs: Any) -> Beit:
    """BEiT-L/16, 224 px, 304.4 M parameters."""
    return _beit(kwargs, **LARGE, init_values=1e-5)


def beit_large_patch16_384(**kwargs: Any) -> Beit:
    """BEiT-L/16, 384 px, 305.0 M parameters."""
    return _beit(kwargs, img_size=384, **LARGE, init_values=1e-5)


def beit_large_patch16_512(**kwargs: Any) -> Beit:
    """BEiT-L/16, 512 px, 305.7 M parameters."""
    return _beit(kwargs, img_size=512, **LARGE, init_values=1e-5)


def beitv2_base_patch16_224(**kwargs: Any) -> Beit:
    """BEiT v2 B/16, 224 px, 86.5 M parameters; LayerScale from 1e-5, ImageNet's mean and deviation."""
    return _beitv2(kwargs, **BASE, init_values=1e-5)


def beitv2_large_patch16_224(**kwargs: Any) -> Beit:
    """BEiT v2 L/16, 224 px, 304.4 M parameters; ImageNet's mean and deviation."""
    model = _beitv2(kwargs, **LARGE, init_values=1e-5)
    model.crop_pct = 0.95
    return model
