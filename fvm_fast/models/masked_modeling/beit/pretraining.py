# SPDX-License-Identifier: Apache-2.0
"""BEiT while it pretrains: patches are masked, and the network says which visual token each of them would have been.

    x_0 = [cls; e_1; ...; e_N],   e_i = mask_token if patch i is masked, else E p_i
    p(token of i | the rest) = softmax(lm_head(norm(x_L)[i]))                    for the masked patches only

The visual tokens are those of a tokenizer that has learned to rebuild images from them (``discrete_vae.py``,
``vqkd.py``); ``objectives.MaskedTokenPrediction`` puts both together.

BEiT v2 predicts a second time from ``[cls_L; x_l]``: the last block's class token with the patches of an early block l,
through two more blocks. What the early patches lack, the class token must bring along.

BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254, section 2.3
BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, https://arxiv.org/abs/2208.06366, section 2.3
State-dict names are those of the paper's code, so its checkpoints load as they are.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast import ops
from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD, INCEPTION_MEAN, INCEPTION_STD
from fvm_fast.layers.relative_position_attention import rescale_blocks
from fvm_fast.models.masked_modeling.beit.model import BASE, LARGE, TEST, Beit


class BeitForMaskedImageModeling(Beit):
    """BEiT with a mask token and a head over the visual vocabulary: ``logits = beit(images, bool_masked_pos)``.

    Everything that ``Beit`` offers works on whole images. To fine-tune, load the weights into a ``Beit``:
    ``load_weights`` gives every block its own copy of the shared table and leaves out what pretraining alone needs.

    Args:
        vocab_size: number of visual tokens.
        init_std: the paper's small range: what is learned starts within [-init_std, init_std].
        early_layers: number of the block whose patches BEiT v2's second prediction reads; None for v1, without one.
        head_layers: blocks of the second prediction.
        **kwargs: those of ``Beit``, except for the pooling, the classes and the place of the last norm. Without
            others, positions are one table of relative ones for all blocks, and LayerScale starts at 0.1.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        vocab_size: int = 8192,
        *,
        init_std: float = 0.02,
        early_layers: int | None = None,
        head_layers: int = 2,
        init_values: float | None = 0.1,
        use_abs_pos_emb: bool = False,
        use_shared_rel_pos_bias: bool = True,
        weight_init: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes=0,
            global_pool="token",
            use_fc_norm=False,
            init_values=init_values,
            use_abs_pos_emb=use_abs_pos_emb,
            use_shared_rel_pos_bias=use_shared_rel_pos_bias,
            weight_init="skip",
            **kwargs,
        )
        self.vocab_size = vocab_size
        self.init_std = init_std
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.lm_head = nn.Linear(self.embed_dim, vocab_size)
        self.early_layers = early_layers
        self.cls_pt_layers = None
        if early_layers is not None:
            self.cls_pt_layers = self._layers_after(early_layers, head_layers)
        if weight_init != "skip":
            self.init_weights()

    def _layers_after(self, early_layers: int, head_layers: int) -> nn.Sequential:
        """Blocks like those that follow block ``early_layers``, with their stochastic depth."""
        if not 0 < early_layers <= len(self.blocks) - head_layers:
            raise ValueError(
                f"BeitForMaskedImageModeling: early_layers should be 1 to {len(self.blocks) - head_layers}, depth less "
                f"head_layers, got {early_layers}"
            )
        following = list(self.blocks)[early_layers : early_layers + head_layers]
        return nn.Sequential(*copy.deepcopy(following))

    def init_weights(self) -> None:
        """Section 2.4: all within a small range, and what block l adds to its input is divided by sqrt(2 l)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                self._within_small_range(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tokens in (self.cls_token, self.mask_token, self.pos_embed):
            if tokens is not None:
                self._within_small_range(tokens)
        rescale_blocks(self.blocks)
        if self.cls_pt_layers is not None:
            rescale_blocks(self.cls_pt_layers, first=self.early_layers + 1)

    def _within_small_range(self, parameter: Tensor) -> None:
        std = self.init_std
        nn.init.trunc_normal_(parameter, std=std, a=-std, b=std)

    def forward(
        self,
        images: Tensor,
        bool_masked_pos: Tensor | None = None,
        *,
        ids_masked: Tensor | None = None,
        return_all_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits over the visual tokens of masked patches.

        Args:
            images: [B, C, H, W], float and normalised; or uint8 when the model has ``image_mean`` and ``image_std``.
            bool_masked_pos: [B, L] or [B, rows, columns], true where a patch is masked. None masks nothing.
            ids_masked: [B, K] int64, instead: the K masked patches of each image. Shapes then do not depend on values,
                so this is the way that torch.compile takes without a break.
            return_all_tokens: logits of every patch.

        Returns:
            [M, vocab_size] for the M masked patches, image by image and patch by patch; [B, K, vocab_size] with
            ``ids_masked``; [B, L, vocab_size] with ``return_all_tokens``. With ``early_layers`` a pair of such: the
            prediction of the last block, and the second one.

        Raises:
            ValueError: both kinds of mask, neither without ``return_all_tokens``, or one of the wrong shape.
        """
        mask = self._mask(images, bool_masked_pos, ids_masked, return_all_tokens)
        logits = []
        for tokens in self.forward_masked_features(images, mask):
            patches = tokens[:, 1:]
            if not return_all_tokens:
                patches = patches[mask] if ids_masked is None else ops.gather_tokens(patches, ids_masked)
            logits.append(self.lm_head(patches))
        return logits[0] if self.early_layers is None else (logits[0], logits[1])

    def forward_masked_features(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """[B, C, H, W], and which patches to hide [B, L] bool -> normalised tokens [B, 1 + L, D], one or two."""
        x, bias, early = self.embed_masked(images, mask), self.shared_rel_pos_bias(), None
        for number, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, bias)
            early = x[:, 1:] if number == self.early_layers else early
        if self.cls_pt_layers is None:
            return (self.norm(x),)
        y = torch.cat([x[:, :1], early], dim=1)
        for block in self.cls_pt_layers:
            y = self.run_block(block, y, bias)
        return self.norm(x), self.norm(y)

    def embed_masked(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """[B, C, H, W], and which patches to hide [B, L] bool -> tokens [B, 1 + L, D]; all in one call of the op."""
        if mask is None:
            return self.embed(images)
        x = self.patch_embed(images, self.pos_embed, self.prefix_tokens(), mask=mask, mask_token=self.mask_token)
        return self.pos_drop(x)

    def _mask(
        self, images: Tensor, bool_masked_pos: Tensor | None, ids_masked: Tensor | None, return_all_tokens: bool
    ) -> Tensor | None:
        """Either kind of mask as [B, L] bool."""
        if bool_masked_pos is None and ids_masked is None and return_all_tokens:
            return None
        if (bool_masked_pos is None) == (ids_masked is None):
            got = "neither" if bool_masked_pos is None else "both"
            raise ValueError(
                f"BeitForMaskedImageModeling: expected bool_masked_pos or ids_masked, got {got}; "
                "for features of whole images call forward_features"
            )
        shape = (images.shape[0], self.patch_embed.num_patches)
        if ids_masked is not None:
            mask = torch.zeros(shape, dtype=torch.bool, device=images.device)
            return mask.scatter(1, ids_masked, torch.ones_like(ids_masked, dtype=torch.bool))
        mask = bool_masked_pos.flatten(1).bool()
        if mask.shape != shape:
            raise ValueError(
                f"BeitForMaskedImageModeling: bool_masked_pos should be {list(shape)}, one value a patch, got "
                f"{list(bool_masked_pos.shape)}"
            )
        return mask

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As ``VisionTransformer``'s; what pretraining alone needs goes with the head."""
        if prune_head:
            del self.mask_token, self.lm_head
            self.cls_pt_layers = None
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Takes images of another side or (height, width) from now on; every table of positions is resized."""
        super().set_input_size(img_size)
        for block in self.cls_pt_layers or ():
            block.attn.set_window_size(self.patch_embed.grid_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay, beside biases and norms."""
        return super().no_weight_decay() | {"mask_token"}


V1 = {"image_mean": INCEPTION_MEAN, "image_std": INCEPTION_STD}
V2 = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}


def _pretraining(overrides: dict[str, Any], **sizes: Any) -> BeitForMaskedImageModeling:
    if overrides.get("in_chans", 3) == 3:
        sizes = V1 | sizes
    else:
        sizes = {name: value for name, value in sizes.items() if name not in V1}
    return BeitForMaskedImageModeling(**sizes | overrides)


def beit_test_patch16_64_64_vocab(**kwargs: Any) -> BeitForMaskedImageModeling:
    """A size for tests and laptops: 0.20 M parameters, 64 visual tokens."""
    return _pretraining(kwargs, **TEST, vocab_size=64)


def beit_base_patch16_224_8k_vocab(**kwargs: Any) -> BeitForMaskedImageModeling:
    """BEiT-B/16, 224 px, 92.0 M parameters, 8192 visual tokens."""
    return _pretraining(kwargs, **BASE)


def beit_large_patch16_224_8k_vocab(**kwargs: Any) -> BeitForMaskedImageModeling:
    """BEiT-L/16, 224 px, 311.5 M parameters, 8192 visual tokens; LayerScale from 1e-5."""
    return _pretraining(kwargs, **LARGE, init_values=1e-5)


def beit_base_patch16_224_8k_vocab_cls_pt(**kwargs: Any) -> BeitForMaskedImageModeling:
    """BEiT v2 B/16, 224 px, 106.1 M parameters: block 9 and two more make the second prediction."""
    return _pretraining(kwargs, **BASE, early_layers=9, **V2)


def beit_large_patch16_224_8k_vocab_cls_pt(**kwargs: Any) -> BeitForMaskedImageModeling:
    """BEiT v2 L/16, 224 px, 336.7 M parameters: block 21 and two more make the second prediction."""
    return _pretraining(kwargs, **LARGE, init_values=1e-5, early_layers=21, **V2)
