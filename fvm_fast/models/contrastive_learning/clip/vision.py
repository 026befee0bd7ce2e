# SPDX-License-Identifier: Apache-2.0
"""CLIP's image tower: a ViT with a norm before the blocks, no bias on the patches, and the cls token as the output."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from fvm_fast.layers.pos_embed import resize_pos_embed
from fvm_fast.layers.residual_attention import Transformer
from fvm_fast.ops import patch_embed, random_masking


class CLIPVisionTransformer(nn.Module):
    """Images to embeddings, in open_clip's names.

    Args:
        image_size: height and width in pixels, an int or a pair; multiples of ``patch_size``.
        patch_size: side of a square patch in pixels.
        width, layers, heads, mlp_ratio, act_layer, norm_eps: as in `Transformer`.
        output_dim: width of the embedding shared with the text tower.
        patch_dropout: share of the patches left out in training (FLIP, https://arxiv.org/abs/2212.00794).
        image_mean, image_std: per channel, for images in [0, 1]; needed for uint8 images, which are then normalised
            while they are embedded. Float images are taken as normalised already.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        output_dim: int,
        patch_dropout: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_eps: float = 1e-5,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= patch_dropout < 1.0:
            raise ValueError(f"patch_dropout should be in [0, 1), got {patch_dropout}")
        self.patch_size = patch_size
        self.patch_dropout = patch_dropout
        self.output_dim = output_dim
        self._set_grid(image_size)
        self._set_statistics(image_mean, image_std)

        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.num_patches + 1, width))
        self.ln_pre = nn.LayerNorm(width, eps=norm_eps)
        self.transformer = Transformer(width, layers, heads, mlp_ratio, act_layer, norm_eps)
        self.ln_post = nn.LayerNorm(width, eps=norm_eps)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    @property
    def num_patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float (already normalised) or uint8 -> [B, output_dim], not normalised to unit length."""
        tokens = self.embed(images, self._draw_patches(images))  # (B, 1 + K, D)
        x = self.transformer(tokens, pool=0)  # (B, D)
        return self.ln_post(x) @ self.proj

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """The tokens that enter the first block, cls first: all patches, or those of ``ids_keep`` [B, K] only."""
        height, width = self.image_size
        if images.ndim != 4 or images.shape[-2:] != (height, width):
            raise ValueError(
                f"CLIP: images should be [B, 3, {height}, {width}], got {tuple(images.shape)}; resize them, or "
                "the model with model.set_image_size(...)"
            )
        to_normalise = images.dtype == torch.uint8
        if to_normalise and self.image_mean is None:
            raise ValueError(
                "CLIP: uint8 images need a mean and a standard deviation, got none; build the model with "
                "image_mean=... and image_std=..., or pass normalised float images"
            )
        tokens = patch_embed(
            images,
            self.conv1.weight,
            pos_embed=self.positional_embedding,
            prefix_tokens=self.class_embedding[None],
            ids_keep=ids_keep,
            mean=self.image_mean if to_normalise else None,
            std=self.image_std if to_normalise else None,
        )
        return self.ln_pre(tokens)

    def forward_intermediates(self, images: Tensor) -> list[Tensor]:
        """The output of every block as a map [B, D, H / patch_size, W / patch_size]: all patches, no cls."""
        outputs = self.transformer.intermediates(self.embed(images))
        return [x[:, 1:].transpose(1, 2).unflatten(2, self.grid_size) for x in outputs]

    @torch.no_grad()
    def set_image_size(self, image_size: int | Sequence[int]) -> None:
        """Resize the positions for images of another size (int or pair), in place, as open_clip does on loading.

        The table becomes a new parameter: make the optimizer afterwards.
        """
        old_grid, table = self.grid_size, self.positional_embedding
        self._set_grid(image_size)
        resized = resize_pos_embed(table[None], self.grid_size, old_grid=old_grid)[0]
        self.positional_embedding = nn.Parameter(resized, table.requires_grad)

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze the tower (LiT, https://arxiv.org/abs/2111.07991) but for its last ``unlocked_groups`` groups.

        The groups, first to last: embedding, each block but the last, last block and ``ln_post``, ``proj``.
        """
        embedding = [self.conv1.weight, self.class_embedding, self.positional_embedding, *self.ln_pre.parameters()]
        *blocks, last = [list(block.parameters()) for block in self.transformer.resblocks]
        groups = [embedding, *blocks, last + list(self.ln_post.parameters()), [self.proj]]
        self.requires_grad_(False)
        for parameter in chain(*groups[max(0, len(groups) - unlocked_groups) :]):
            parameter.requires_grad_(True)

    def _set_grid(self, image_size: int | Sequence[int]) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if height % self.patch_size or width % self.patch_size or min(height, width) < self.patch_size:
            raise ValueError(
                f"CLIP: image_size should be a positive multiple of patch_size {self.patch_size}, got {(height, width)}"
            )
        self.image_size = (height, width)
        self.grid_size = (height // self.patch_size, width // self.patch_size)

    def _set_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"CLIP: image_mean and image_std should be given together, got {mean} and {std}")
        for name, values in (("image_mean", mean), ("image_std", std)):
            table = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)

    def _draw_patches(self, images: Tensor) -> Tensor | None:
        """The random patches that survive patch dropout, [B, K], or None for all of them."""
        len_keep = max(1, int(self.num_patches * (1.0 - self.patch_dropout)))
        if not self.training or len_keep == self.num_patches:
            return None
        ratio = 1.0 - (len_keep + 0.5) / self.num_patches  # half a patch of room: no rounding changes len_keep
        ids_keep, _, _ = random_masking(len(images), self.num_patches, ratio, device=images.device)
        return ids_keep
