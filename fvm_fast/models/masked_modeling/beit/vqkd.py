# SPDX-License-Identifier: Apache-2.0
"""BEiT v2's tokenizer: visual tokens from which a teacher's features can be rebuilt, instead of pixels.

    h   = encoder(x)                                             one vector of 32 numbers a patch
    z_i = argmin_j |l2(h_i) - l2(v_j)|                           the nearest of 8192 codes, by angle
    o   = decoder(l2(v_z))
    loss = mean_i (1 - cos(o_i, t_i)) + beta mean (l2(h_i) - l2(v_z_i))^2

The choice passes its gradient straight through to ``h``. The codes have no gradient: each moves to the mean of the
vectors that chose it, by an exponential moving average. ``t`` are a teacher's features of the patches (CLIP's, in the
paper).

BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, https://arxiv.org/abs/2208.06366, section 2.2
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.models.masked_modeling.beit.model import BASE, TEST, Beit


class CosineCodebook(nn.Module):
    """Codes on the unit sphere, chosen by angle, that follow the vectors which choose them.

    An untrained encoder's vectors all point one way, where of codes in all directions only one is near: let the codes
    ``start_from`` some vectors, or they will stay one.

    Args:
        n_embed: number of codes.
        embed_dim: width of a code.
        decay: of the moving average.
    """

    def __init__(self, n_embed: int = 8192, embed_dim: int = 32, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("weight", F.normalize(torch.randn(n_embed, embed_dim), dim=1))
        self.register_buffer("cluster_size", torch.zeros(n_embed))

    def indices(self, x: Tensor) -> Tensor:
        """[..., embed_dim] -> the nearest codes' numbers [...] int64."""
        flat = F.normalize(x, dim=-1).flatten(0, -2)
        # of unit vectors the nearest has the largest product
        return (flat @ self.weight.to(flat.dtype).T).argmax(dim=1).view(x.shape[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replaces vectors by their codes.

        Args:
            x: [B, L, embed_dim].

        Returns:
            codes [B, L, embed_dim], through which the gradient passes to the normalised x; the mean squared distance
            of the two (0-d); and the codes' numbers [B, L].
        """
        x = F.normalize(x, dim=-1)
        indices = self.indices(x.detach())
        codes = F.embedding(indices, self.weight).to(x.dtype)
        if self.training:
            self._follow(x.detach(), indices)
        return x + (codes - x).detach(), F.mse_loss(x, codes), indices

    @torch.no_grad()
    def start_from(self, x: Tensor, iterations: int = 10) -> None:
        """Spherical k-means: [..., embed_dim] are picked at random and then moved to the means of those nearest them.

        With fewer vectors than codes the other codes stay where they are.
        """
        x = F.normalize(x, dim=-1).flatten(0, -2)
        picked = x[torch.randperm(len(x), device=x.device)[: len(self.weight)]]
        self.weight[: len(picked)] = picked.to(self.weight.dtype)
        for _ in range(iterations):
            sums, counts = self._sums(x, self.indices(x))
            self.weight.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), self.weight))

    def _sums(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [n, embed_dim] and whom they chose [n] -> the sum of each code's vectors and their number."""
        x = x.to(self.weight.dtype)
        sums = torch.zeros_like(self.weight).index_add_(0, indices, x)
        return sums, torch.zeros_like(self.cluster_size).index_add_(0, indices, torch.ones_like(x[:, 0]))

    @torch.no_grad()
    def _follow(self, x: Tensor, indices: Tensor) -> None:
        """Moves every code that was chosen towards the mean of its vectors, and back to the sphere."""
        sums, counts = self._sums(x.flatten(0, -2), indices.flatten())
        if (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):  # every process must keep the same codes
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        moved = self.weight.lerp(F.normalize(sums, dim=1), 1 - self.decay)
        self.weight.copy_(F.normalize(torch.where(counts[:, None] > 0, moved, self.weight), dim=1))


class VQKD(nn.Module):
    """Vector-quantised knowledge distillation: ``loss, features, tokens = vqkd(images, teacher_features)``.

    Args:
        img_size, patch_size, in_chans: of the images.
        embed_dim, num_heads: width and heads of encoder and decoder.
        depth, decoder_depth: their blocks.
        n_embed, code_dim: number and width of the codes.
        teacher_dim: width of the teacher's features.
        decay: of the codes' moving average.
        beta: weight of the distance between vectors and codes.
        **kwargs: arguments of both networks (``Beit``), such as ``init_values``.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        decoder_depth: int = 3,
        n_embed: int = 8192,
        code_dim: int = 32,
        teacher_dim: int = 512,
        *,
        decay: float = 0.99,
        beta: float = 1.0,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        both = {"num_classes": 0, "use_fc_norm": False, "embed_dim": embed_dim, "num_heads": num_heads} | kwargs
        normalise = {"image_mean": image_mean, "image_std": image_std}
        self.encoder = Beit(img_size, patch_size, in_chans, depth=depth, **both, **normalise)
        self.decoder = Beit(self.encoder.patch_embed.grid_size, 1, code_dim, depth=decoder_depth, **both)
        self.encode_task_layer = _task_layer(embed_dim, code_dim)
        self.decode_task_layer = _task_layer(embed_dim, teacher_dim)
        self.quantize = CosineCodebook(n_embed, code_dim, decay)
        self.beta = beta

    def forward(self, images: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuilds a teacher's features from visual tokens.

        Args:
            images: [B, C, H, W], float and normalised; or uint8 with ``image_mean`` and ``image_std``.
            teacher_features: [B, L, teacher_dim] of the same patches.

        Returns:
            loss (0-d), the features rebuilt [B, L, teacher_dim] and the visual tokens [B, L] int64.

        Raises:
            ValueError: the teacher's features are not one vector a patch.
        """
        codes, distance, tokens = self.quantize(self.encode(images))
        features = self.decode(codes)
        if features.shape != teacher_features.shape:
            raise ValueError(
                f"VQKD: teacher_features should be {list(features.shape)}, one vector a patch, got "
                f"{list(teacher_features.shape)}; leave out class tokens, or build it with another teacher_dim"
            )
        cosine = F.cosine_similarity(features, teacher_features, dim=-1)
        return (1 - cosine).mean() + self.beta * distance, features, tokens

    @torch.no_grad()
    def start_codes(self, images: Tensor) -> None:
        """Puts the codes where the encoder's vectors of some images are; once, before the first step."""
        self.quantize.start_from(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> one vector a patch [B, L, code_dim], not yet replaced by its code."""
        return self.encode_task_layer(self.encoder.forward_features(images)[:, 1:])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, L, code_dim] -> the teacher's features [B, L, teacher_dim]."""
        rows_and_columns = self.encoder.patch_embed.grid_size
        maps = codes.transpose(1, 2).unflatten(2, rows_and_columns)  # [B, code_dim, rows, columns]
        return self.decode_task_layer(self.decoder.forward_features(maps)[:, 1:])

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The visual tokens: [B, C, H, W] -> [B, rows, columns] int64."""
        return self.quantize.indices(self.encode(images)).unflatten(1, self.encoder.patch_embed.grid_size)


def _task_layer(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))


def _vqkd(overrides: dict[str, Any], **sizes: Any) -> VQKD:
    if overrides.get("in_chans", 3) == 3:
        sizes = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | sizes
    return VQKD(**sizes | overrides)


def vqkd_encoder_base_decoder_3x768x12_clip(**kwargs: Any) -> VQKD:
    """The paper's: ViT-B/16 and 3 blocks, 8192 codes of 32, for the features of CLIP's B/16 (512)."""
    return _vqkd(kwargs, **BASE)


def vqkd_test(**kwargs: Any) -> VQKD:
    """A size for tests and laptops: 64 px, 64 codes of 8, 0.26 M parameters."""
    return _vqkd(kwargs, **TEST, decoder_depth=1, n_embed=64, code_dim=8, teacher_dim=24)
