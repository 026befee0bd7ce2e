# SPDX-License-Identifier: Apache-2.0
"""The discrete variational autoencoder that turns an image into a grid of visual tokens, as DALL-E's does.

    q(k | x) = softmax(encoder(x))                        one token of the vocabulary for each cell of the grid
    z        = softmax((log q + gumbel) / temperature)    a soft choice, which gradients pass
    x'       ~ LogitLaplace(mu, b),   (mu, ln b) = decoder(z)
    loss     = -log p(x | z) per pixel and channel + kl_weight KL(q || uniform)

Afterwards an image's tokens are ``argmax_k q(k | x)``. Encoder and decoder have the shape and the state-dict names of
DALL-E's published ones (256 channels, 4 groups of 2 blocks, 8192 tokens): a 112 px image has 14 x 14 tokens.

Zero-Shot Text-to-Image Generation, https://arxiv.org/abs/2102.12092, section 2.1 and appendices A.1 to A.3
Categorical Reparameterization with Gumbel-Softmax, https://arxiv.org/abs/1611.01144
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_LAPLACE_EPS = 0.1


def map_pixels(images: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9]: the logit-Laplace distribution has no mass at 0 and 1."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Back from ``map_pixels``, clamped to [0, 1]."""
    return ((mapped - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


class Conv2d(nn.Module):
    """A convolution that keeps the size, with DALL-E's names ``w`` [n_out, n_in, kw, kw] and ``b`` [n_out]."""

    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H, W]."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class ResidualBlock(nn.Module):
    """``id_path(x) + gain res_path(x)``: four convolutions after ReLU, a quarter as wide in between.

    Args:
        n_in, n_out: channels.
        kernels: widths of the four kernels; (3, 3, 3, 1) in the encoder, (1, 3, 3, 3) in the decoder.
        gain: 1 / number of blocks squared, so that a deep stack begins near the identity.
    """

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        widths = [n_in] + [n_out // 4] * 3 + [n_out]
        path = OrderedDict()
        for i, kw in enumerate(kernels, start=1):
            path[f"relu_{i}"] = nn.ReLU()
            path[f"conv_{i}"] = Conv2d(widths[i - 1], widths[i], kw)
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(path)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H, W]."""
        return self.id_path(x) + self.gain * self.res_path(x)


class _Coder(nn.Module):
    """An input convolution, groups of residual blocks that change the size in between, an output convolution."""

    def __init__(
        self,
        stem: Conv2d,
        widths: Sequence[int],
        n_blk_per_group: int,
        kernels: Sequence[int],
        resize: nn.Module,
        n_out: int,
    ) -> None:
        super().__init__()
        gain = 1 / (len(widths) * n_blk_per_group) ** 2
        n_in, parts = stem.w.shape[0], OrderedDict(input=stem)
        for number, width in enumerate(widths, start=1):
            group = OrderedDict()
            for i in range(1, n_blk_per_group + 1):
                group[f"block_{i}"] = ResidualBlock(n_in, width, kernels, gain)
                n_in = width
            if number < len(widths):
                group["resize"] = resize
            parts[f"group_{number}"] = nn.Sequential(group)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))
        self.blocks = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H', W']."""
        return self.blocks(x)


class Encoder(_Coder):
    """Mapped pixels [B, C, H, W] to the logits of the tokens [B, vocab_size, H / s, W / s], s = 2^(group_count - 1)."""

    def __init__(
        self,
        group_count: int = 4,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        input_channels: int = 3,
        vocab_size: int = 8192,
    ) -> None:
        widths = [n_hid * 2**i for i in range(group_count)]
        stem = Conv2d(input_channels, n_hid, 7)
        super().__init__(stem, widths, n_blk_per_group, (3, 3, 3, 1), nn.MaxPool2d(2), vocab_size)


class Decoder(_Coder):
    """Choices of tokens [B, vocab_size, h, w] to the means and log scales of pixels [B, 2 C, h s, w s]."""

    def __init__(
        self,
        group_count: int = 4,
        n_init: int = 128,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        output_channels: int = 3,
        vocab_size: int = 8192,
    ) -> None:
        widths = [n_hid * 2**i for i in reversed(range(group_count))]
        stem = Conv2d(vocab_size, n_init, 1)
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        super().__init__(stem, widths, n_blk_per_group, (1, 3, 3, 3), upsample, 2 * output_channels)


class DiscreteVAE(nn.Module):
    """Encoder and decoder around a grid of visual tokens: ``loss, reconstruction, logits = dvae(images)``.

    Args:
        vocab_size: number of tokens.
        n_hid: channels of the encoder's first group and of the decoder's last; doubled from group to group.
        n_init: channels into which the decoder takes the tokens.
        group_count: groups of blocks; every one but the last halves the image.
        n_blk_per_group: residual blocks of a group.
        channels: channels of an image.
        kl_weight: weight of the divergence from the uniform distribution, which is summed over the tokens and divided
            by the number of pixels and channels, as the log-likelihood is. The paper rises from 0 to 6.6.
        temperature: of the soft choice; ``forward`` may override it. The paper goes from 1 to 1/16.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        n_hid: int = 256,
        n_init: int = 128,
        group_count: int = 4,
        n_blk_per_group: int = 2,
        channels: int = 3,
        *,
        kl_weight: float = 6.6,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(group_count, n_hid, n_blk_per_group, channels, vocab_size)
        self.decoder = Decoder(group_count, n_init, n_hid, n_blk_per_group, channels, vocab_size)
        self.vocab_size = vocab_size
        self.stride = 2 ** (group_count - 1)
        self.kl_weight = kl_weight
        self.temperature = temperature

    def forward(
        self, images: Tensor, temperature: float | None = None, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loses and rebuilds images.

        Args:
            images: [B, C, H, W] in [0, 1] or uint8; H and W multiples of ``stride``.
            temperature: instead of the model's own.
            noise: Gumbel noise [B, vocab_size, H / stride, W / stride]; drawn if None.

        Returns:
            loss (0-d), reconstruction [B, C, H, W] in [0, 1] and the logits of the tokens.
        """
        mapped = self._mapped(images)
        logits = self.encoder(mapped)
        noise = -torch.empty_like(logits).exponential_().log() if noise is None else noise
        temperature = self.temperature if temperature is None else temperature
        choice = ((logits.log_softmax(dim=1) + noise) / temperature).softmax(dim=1)
        mean, log_scale = self.decoder(choice).chunk(2, dim=1)
        loss = logit_laplace_loss(mapped, mean, log_scale)
        if self.kl_weight:
            loss = loss + self.kl_weight * kl_from_uniform(logits).sum() / mapped.numel()
        return loss, unmap_pixels(mean.sigmoid()), logits

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The visual tokens: [B, C, H, W] in [0, 1] or uint8 -> [B, H / stride, W / stride] int64."""
        return self.encoder(self._mapped(images)).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Visual tokens [B, h, w] -> images [B, C, h stride, w stride] in [0, 1]."""
        choice = F.one_hot(tokens, self.vocab_size).permute(0, 3, 1, 2).to(self.decoder.blocks.input.w.dtype)
        return unmap_pixels(self.decoder(choice).chunk(2, dim=1)[0].sigmoid())

    def _mapped(self, images: Tensor) -> Tensor:
        channels, s = self.encoder.blocks.input.w.shape[1], self.stride
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % s or images.shape[3] % s:
            raise ValueError(
                f"DiscreteVAE: images should be [B, {channels}, H, W] with sides that are multiples of {s}, got "
                f"{list(images.shape)}; resize them"
            )
        if images.dtype == torch.uint8:
            images = images.to(self.encoder.blocks.input.w.dtype) / 255
        return map_pixels(images)


def logit_laplace_loss(mapped: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log p of pixels in (0, 1), whose logits are Laplace of this mean and log scale; the mean over all, 0-d.

    ``p(x) = exp(-|logit x - mean| / b) / (2 b x (1 - x))``, appendix A.3 of the DALL-E paper.
    """
    distance = (torch.logit(mapped) - mean).abs()
    return (distance * (-log_scale).exp() + log_scale + (2 * mapped * (1 - mapped)).log()).mean()


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats over dimension 1: [B, K, h, w] -> [B, h, w]."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def dalle_discrete_vae(**kwargs: Any) -> DiscreteVAE:
    """DALL-E's: 8192 tokens, 8 pixels a token, 53.8 M parameters in the encoder and 43.8 M in the decoder."""
    return DiscreteVAE(**kwargs)


def discrete_vae_test(**kwargs: Any) -> DiscreteVAE:
    """A size for tests and laptops: 64 tokens, 8 pixels a token, 0.2 M parameters."""
    return DiscreteVAE(**{"vocab_size": 64, "n_hid": 16, "n_init": 32, "n_blk_per_group": 1} | kwargs)
