# SPDX-License-Identifier: Apache-2.0
"""CLIP: Learning Transferable Visual Models From Natural Language Supervision, https://arxiv.org/abs/2103.00020.

An image tower and a causal text tower map a picture and its caption to one unit sphere; training pulls matching pairs
together with a symmetric cross-entropy over the batch. Parameter names are OpenAI's and open_clip's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.layers.activation import activation_name
from fvm_fast.layers.residual_attention import QuickGELU, Transformer
from fvm_fast.models.contrastive_learning.clip.vision import CLIPVisionTransformer

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """Contrastive image-text model with ViT and causal transformer towers.

    Args:
        embed_dim: width of the shared embedding.
        image_size: height and width in pixels, an int or a pair; multiples of ``patch_size``.
        patch_size: side of a square patch in pixels.
        vision_width, vision_layers, vision_mlp_ratio: size of the image tower.
        vision_heads: heads of the image tower; None for one head per 64 channels.
        context_length: longest caption in tokens, start and end included.
        vocab_size: number of token ids; the end-of-text token must have the highest id.
        text_width, text_layers, text_mlp_ratio: size of the text tower.
        text_heads: heads of the text tower; None for one head per 64 channels.
        quick_gelu: activation of OpenAI's weights; False for the exact GELU.
        norm_eps: epsilon of every LayerNorm.
        init_logit_scale: start of the learned log of the inverse temperature.
        init_logit_bias: start of SigLIP's learned bias (https://arxiv.org/abs/2303.15343); None for no such parameter.
        patch_dropout: share of the patches left out in training (FLIP, https://arxiv.org/abs/2212.00794).
        image_mean, image_std: per channel, for images in [0, 1], OpenAI's by default; needed for uint8 images, which
            are then normalised while they are embedded. Float images are taken as normalised already.
        output_dict: return a dict from `forward`, as open_clip's training loop expects.
    """

    def __init__(
        self,
        embed_dim: int = 512,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 32,
        vision_width: int = 768,
        vision_layers: int = 12,
        vision_heads: int | None = None,
        vision_mlp_ratio: float = 4.0,
        context_length: int = 77,
        vocab_size: int = 49408,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int | None = None,
        text_mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        norm_eps: float = 1e-5,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        patch_dropout: float = 0.0,
        image_mean: Sequence[float] | None = OPENAI_MEAN,
        image_std: Sequence[float] | None = OPENAI_STD,
        output_dict: bool = False,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.output_dict = output_dict
        act_layer = QuickGELU if quick_gelu else nn.GELU

        self.visual = CLIPVisionTransformer(
            image_size,
            patch_size,
            vision_width,
            vision_layers,
            vision_heads or vision_width // 64,
            vision_mlp_ratio,
            embed_dim,
            patch_dropout,
            act_layer,
            norm_eps,
            image_mean,
            image_std,
        )
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = Transformer(
            text_width, text_layers, text_heads or text_width // 64, text_mlp_ratio, act_layer, norm_eps
        )
        self.ln_final = nn.LayerNorm(text_width, eps=norm_eps)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self._init_text_tower()

        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> tuple | dict[str, Tensor | None]:
        """Embed images and captions; either may be left out, its features are then None.

        Args:
            images: [B, 3, H, W], float (already normalised) or uint8.
            tokens: int64 [n, L] with L at most ``context_length``, zeros after the end-of-text token.

        Returns:
            ``(image_features [B, D], text_features [n, D], logit_scale)``: features of unit length, the scale already
            exponentiated; ``logit_bias`` comes fourth if the model has one. With ``output_dict`` the same by name.
        """
        image_features = None if images is None else self.encode_image(images, normalize=True)
        text_features = None if tokens is None else self.encode_text(tokens, normalize=True)
        outputs = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, H, W] to embeddings [B, D], of unit length if ``normalize``."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [n, L] to embeddings [n, D], of unit length if ``normalize``.

        The embedding is read at the end-of-text token and attention is causal, so what follows that token changes
        nothing: on the CPU the columns beyond the longest caption are cut off before the first block.
        """
        tokens, eot = self._locate_eot(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (n, L, D)
        x = self.transformer(x, is_causal=True, pool=eot)  # (n, D)
        features = self.ln_final(x) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities ``(logits_per_image [B, n], logits_per_text [n, B])``."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        return {"norm_eps": self.ln_final.eps, "act": activation_name(self.transformer.resblocks[0].mlp.gelu)}

    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Resize the image tower's positions for images of another size, see `CLIPVisionTransformer.set_image_size`."""
        self.visual.set_image_size(image_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.visual.transformer.grad_checkpointing = enable
        self.transformer.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Freeze the image tower but for its last ``unlocked_groups``, see `CLIPVisionTransformer.lock`."""
        self.visual.lock(unlocked_groups)

    def no_weight_decay(self) -> set[str]:
        """Parameters, besides gains and biases, that weight decay should leave alone."""
        return {"positional_embedding", "visual.positional_embedding", "visual.class_embedding"}

    def _locate_eot(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens without needless columns, and the position [n] of each row's end-of-text token."""
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"CLIP: tokens should be [n, L] with L at most context_length {self.context_length}, "
                f"got {tuple(tokens.shape)}; call the tokenizer with context_length={self.context_length}"
            )
        highest, eot = tokens.max(dim=1)
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or len(tokens) == 0:
            return tokens, eot  # looking at values here would stall a GPU or break the graph
        if int(highest.max()) >= self.vocab_size:
            raise ValueError(
                f"CLIP: token ids should be below vocab_size {self.vocab_size}, got {int(highest.max())}; "
                "use the tokenizer the model was built for"
            )
        return tokens[:, : int(eot.max()) + 1], eot

    def _init_text_tower(self) -> None:
        """Draw the text tower as GPT-2 does, with residual projections scaled down by the depth."""
        width, layers = self.transformer.width, self.transformer.layers
        residual_std = width**-0.5 * (2 * layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        nn.init.normal_(self.text_projection, std=width**-0.5)


def clip_vit_b_32(**kwargs) -> CLIP:
    """ViT-B/32 at 224 px, 151 M parameters."""
    return CLIP(**dict(patch_size=32) | kwargs)


def clip_vit_b_16(**kwargs) -> CLIP:
    """ViT-B/16 at 224 px, 150 M parameters."""
    return CLIP(**dict(patch_size=16) | kwargs)


def clip_vit_l_14(**kwargs) -> CLIP:
    """ViT-L/14 at 224 px, 428 M parameters."""
    size = dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, text_width=768)
    return CLIP(**size | kwargs)


def clip_vit_l_14_336(**kwargs) -> CLIP:
    """ViT-L/14 at 336 px, 428 M parameters."""
    return clip_vit_l_14(**dict(image_size=336) | kwargs)


def clip_vit_h_14(**kwargs) -> CLIP:
    """ViT-H/14 at 224 px (LAION), 986 M parameters."""
    vision = dict(patch_size=14, vision_width=1280, vision_layers=32, vision_heads=16)
    return CLIP(**dict(embed_dim=1024, text_width=1024, text_layers=24) | vision | kwargs)


def clip_vit_g_14(**kwargs) -> CLIP:
    """ViT-g/14 at 224 px (LAION), 1.37 G parameters."""
    vision = dict(patch_size=14, vision_width=1408, vision_layers=40, vision_heads=16, vision_mlp_ratio=4.3637)
    return CLIP(**dict(embed_dim=1024, text_width=1024, text_layers=24) | vision | kwargs)


def clip_vit_bigg_14(**kwargs) -> CLIP:
    """ViT-bigG/14 at 224 px (LAION), 2.54 G parameters."""
    vision = dict(patch_size=14, vision_width=1664, vision_layers=48, vision_heads=16, vision_mlp_ratio=4.9231)
    return CLIP(**dict(embed_dim=1280, text_width=1280, text_layers=32) | vision | kwargs)


def clip_vit_emoji(**kwargs) -> CLIP:
    """The CPU demo: 48 px emoji with the small BPE of `fvm_fast.data.EmojiTokenizer`, 1.6 M parameters."""
    vision = dict(image_size=48, patch_size=8, vision_width=128, vision_layers=4, vision_heads=4)
    text = dict(context_length=16, vocab_size=3072, text_width=128, text_layers=2, text_heads=4)
    return CLIP(**dict(embed_dim=128) | vision | text | kwargs)


def clip_vit_test(**kwargs) -> CLIP:
    """A toy for tests: 32 px, 0.1 M parameters."""
    vision = dict(image_size=32, patch_size=8, vision_width=64, vision_layers=2, vision_heads=2)
    text = dict(context_length=12, vocab_size=128, text_width=48, text_layers=2, text_heads=3)
    return CLIP(**dict(embed_dim=32) | vision | text | kwargs)
