# SPDX-License-Identifier: Apache-2.0
"""BEiT's tokenizers, DALL-E's discrete VAE and VQ-KD, against their formulas and counts."""

import math

import pytest
import torch
from parity import (
    assert_compiles_without_a_break,
    randomise,
)
from torch import Tensor, nn
from torch.testing import assert_close

from fvm_fast.models.masked_modeling.beit import discrete_vae
from fvm_fast.models.masked_modeling.beit.discrete_vae import dalle_discrete_vae, discrete_vae_test
from fvm_fast.models.masked_modeling.beit.vqkd import (
    CosineCodebook,
    vqkd_encoder_base_decoder_3x768x12_clip,
    vqkd_test,
)


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_dalles_shape_and_counts():
    with torch.device("meta"):
        model = dalle_discrete_vae()
        logits = model.encoder(torch.zeros(1, 3, 112, 112))
        assert model.decoder(logits).shape == (1, 6, 112, 112)
    assert logits.shape == (1, 8192, 14, 14)
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    names = model.encoder.state_dict().keys()
    assert {"blocks.input.w", "blocks.group_2.block_1.id_path.w", "blocks.output.conv.b"} <= names
    assert "blocks.group_4.block_2.res_path.conv_4.w" in names and "blocks.group_1.block_1.id_path.w" not in names


def test_a_residual_block_by_hand():
    block = randomise(discrete_vae.ResidualBlock(6, 8, (3, 3, 3, 1), gain=0.25)).double()
    x = pictures(2, 6, 5, 7)
    y = x
    for i, pad in enumerate((1, 1, 1, 0), start=1):
        conv = getattr(block.res_path, f"conv_{i}")
        y = nn.functional.conv2d(y.relu(), conv.w, conv.b, padding=pad)
    expected = nn.functional.conv2d(x, block.id_path.w, block.id_path.b) + 0.25 * y
    assert_close(block(x), expected, atol=1e-12, rtol=1e-12)


def test_pixels_are_mapped_and_back():
    pixels = torch.linspace(0, 1, 11, dtype=torch.float64)
    mapped = discrete_vae.map_pixels(pixels)
    assert_close(mapped[[0, 5, 10]], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert_close(discrete_vae.unmap_pixels(mapped), pixels)
    assert discrete_vae.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_the_logit_laplace_density_integrates_to_one():
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    for mean, log_scale in ((0.3, -0.5), (-1.0, 0.2)):
        given = torch.full_like(x, mean), torch.full_like(x, log_scale)
        losses = torch.stack([discrete_vae.logit_laplace_loss(x[i], given[0][i], given[1][i]) for i in range(3)])
        b = math.exp(log_scale)
        density = torch.exp(-(torch.logit(x) - mean).abs() / b) / (2 * b * x * (1 - x))
        assert_close(-density[:3].log(), losses, atol=1e-9, rtol=1e-9)
        assert_close(torch.trapezoid(density, x), torch.tensor(1.0, dtype=torch.float64), atol=1e-3, rtol=0.0)


def test_kl_from_uniform():
    logits = pictures(2, 5, 3, 4)
    uniform = torch.distributions.Categorical(logits=torch.zeros(5, dtype=torch.float64))
    chosen = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    expected = torch.distributions.kl_divergence(chosen, uniform)
    assert_close(discrete_vae.kl_from_uniform(logits), expected, atol=1e-12, rtol=1e-9)


def test_the_elbo_by_hand():
    model = randomise(discrete_vae_test(kl_weight=3.0)).double()
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    noise = pictures(2, 64, 2, 3)
    loss, reconstruction, logits = model(images, 0.5, noise=noise)
    q = logits.softmax(dim=1)
    mean, log_scale = model.decoder(((q.log() + noise) / 0.5).softmax(dim=1)).chunk(2, dim=1)
    mapped = 0.8 * images + 0.1
    error = (torch.logit(mapped) - mean).abs() / log_scale.exp()
    log_p = -(error + torch.log(2 * log_scale.exp() * mapped * (1 - mapped)))
    kl = (q * (q * 64).log()).sum()
    assert_close(loss, (-log_p.sum() + 3.0 * kl) / images.numel(), atol=1e-9, rtol=1e-9)
    assert_close(reconstruction, ((mean.sigmoid() - 0.1) / 0.8).clamp(0, 1), atol=1e-9, rtol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert all(p.grad.any() for p in model.parameters())


def test_tokens_are_the_likeliest_and_decode_to_images():
    model = randomise(discrete_vae_test()).eval()
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    tokens = model.get_codebook_indices(images)
    assert tokens.shape == (2, 2, 3) and tokens.dtype == torch.int64
    assert torch.equal(tokens, model(images / 255)[2].argmax(dim=1))
    decoded = model.decode(tokens)
    assert decoded.shape == (2, 3, 16, 24) and 0 <= decoded.min() <= decoded.max() <= 1
    with pytest.raises(ValueError, match="\\[B, 3, H, W\\] with sides that are multiples of 8, got \\[2, 3, 16, 20\\]"):
        model.get_codebook_indices(images[..., :20])


def test_the_discrete_vae_compiles_without_a_break():
    model, noise = randomise(discrete_vae_test(), std=0.1), pictures(2, 64, 2, 3, dtype=torch.float32)
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert_compiles_without_a_break(model, images, lambda m, x: m(x, noise=noise)[0])


def test_codes_are_the_nearest_and_pass_their_gradient():
    codebook = CosineCodebook(11, 5).double().eval()
    x = pictures(3, 4, 5).requires_grad_()
    codes, distance, indices = codebook(x)
    unit = nn.functional.normalize(x, dim=-1)
    assert torch.equal(indices, torch.cdist(unit, codebook.weight.expand(3, -1, -1)).argmin(dim=-1))
    assert torch.equal(indices, codebook.indices(x))
    assert_close(codes, codebook.weight[indices], atol=1e-12, rtol=0.0)
    assert_close(distance, (unit - codebook.weight[indices]).square().mean(), atol=1e-12, rtol=1e-9)
    weights = pictures(3, 4, 5)
    (gradient,) = torch.autograd.grad((codes * weights).sum() + 0.7 * distance, x)
    expected = (unit * weights).sum() + 0.7 * (unit - codebook.weight[indices]).square().mean()
    assert_close(gradient, torch.autograd.grad(expected, x)[0], atol=1e-12, rtol=1e-9)


def test_codes_follow_those_who_chose_them():
    codebook = CosineCodebook(6, 4, decay=0.9).double().train()
    x, before = pictures(2, 5, 4), codebook.weight.clone()
    _, _, indices = codebook(x)
    unit = nn.functional.normalize(x, dim=-1).flatten(0, 1)
    for code in range(6):
        chosen = unit[indices.flatten() == code]
        moved = before[code]
        if len(chosen):
            moved = 0.9 * moved + 0.1 * nn.functional.normalize(chosen.sum(dim=0), dim=0)
        assert_close(codebook.weight[code], nn.functional.normalize(moved, dim=0), atol=1e-12, rtol=1e-9)
        assert_close(float(codebook.cluster_size[code]), 0.1 * len(chosen))
    after = codebook.weight.clone()
    codebook.eval()(x)
    assert torch.equal(codebook.weight, after), "codes move in training only"


def test_codes_start_as_the_means_of_those_nearest():
    torch.manual_seed(0)
    codebook, x = CosineCodebook(6, 4).double(), pictures(2, 25, 4)
    codebook.start_from(x, iterations=50)
    unit, numbers = nn.functional.normalize(x, dim=-1).flatten(0, 1), codebook.indices(x).flatten()
    for code in range(6):
        mean = unit[numbers == code].mean(dim=0)
        assert_close(codebook.weight[code], nn.functional.normalize(mean, dim=0), atol=1e-12, rtol=1e-9)
    few, before = pictures(1, 3, 4), codebook.weight.clone()
    codebook.start_from(few)
    assert_close(codebook.weight[3:], before[3:], atol=0.0, rtol=0.0)
    assert sorted(codebook.indices(few)[0].tolist()) == [0, 1, 2]


def test_vqkd_by_hand():
    model = randomise(vqkd_test(init_values=0.1, beta=0.7)).double().eval()
    images, teacher = pictures(2, 3, 64, 64), pictures(2, 16, 24)
    loss, features, tokens = model(images, teacher)
    encoded = model.encode_task_layer(model.encoder.forward_features(images)[:, 1:])
    codes = model.quantize.weight[tokens]
    maps = codes.view(2, 4, 4, 8).permute(0, 3, 1, 2)
    rebuilt = model.decode_task_layer(model.decoder.forward_features(maps)[:, 1:])
    assert_close(features, rebuilt, atol=1e-9, rtol=1e-9)
    cosine = (nn.functional.normalize(rebuilt, dim=-1) * nn.functional.normalize(teacher, dim=-1)).sum(dim=-1)
    distance = (nn.functional.normalize(encoded, dim=-1) - codes).square().mean()
    assert_close(loss, 1 - cosine.mean() + 0.7 * distance, atol=1e-12, rtol=1e-9)
    assert torch.equal(model.get_codebook_indices(images), tokens.view(2, 4, 4))
    loss.backward()
    assert all(p.grad.any() for p in model.parameters()), "the gradient passes the choice"
    with pytest.raises(
        ValueError, match="teacher_features should be \\[2, 16, 24\\], one vector a patch, got \\[2, 17, 24\\]"
    ):
        model(images, pictures(2, 17, 24))


def test_vqkd_learns_and_compiles():
    torch.manual_seed(0)
    model = vqkd_test()
    images = (torch.rand(32, 3, 64, 64) - 0.5)[:, :, :4, :4].repeat_interleave(16, 2).repeat_interleave(16, 3)
    teacher = images[:, :, ::16, ::16].flatten(2).transpose(1, 2) @ torch.randn(3, 24)  # of each patch's colour
    model.start_codes(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _, tokens = model(images, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and len(tokens.unique()) > 8
    assert_compiles_without_a_break(model.eval(), images[:2], lambda m, x: m(x, teacher[:2])[0])


def test_vqkd_of_the_papers_size():
    with torch.device("meta"):
        model = vqkd_encoder_base_decoder_3x768x12_clip()
    assert model.quantize.weight.shape == (8192, 32) and len(model.decoder.blocks) == 3
    assert model.decode_task_layer[2].out_features == 512
