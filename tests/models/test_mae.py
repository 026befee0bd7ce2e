# SPDX-License-Identifier: Apache-2.0
"""MaskedAutoencoderViT against transformers and lightly: names, counts, predictions, losses and every gradient."""

import math
import re
from pathlib import Path

import pytest
import torch
from lightly.models import utils as lightly
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from parity import (
    assert_bfloat16_rule,
    assert_checkpointing_changes_nothing,
    assert_compiles_without_a_break,
    assert_float32_rule,
    assert_native_and_torch_agree,
    assert_same,
    randomise,
)
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from fvm_fast import ops
from fvm_fast.layers import resize_pos_embed, sincos_pos_embed
from fvm_fast.models import MODELS, MaskedAutoencoderViT, create_model
from fvm_fast.models.self_supervised import mae as mae_package
from fvm_fast.weights import vit
from fvm_fast.weights.mae import from_transformers, to_transformers, transformers_config

SMALL = dict(
    img_size=32,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    mlp_ratio=2.0,
)

VARIANTS = {
    "plain": {},
    "half": dict(mask_ratio=0.5),
    "two_hidden": dict(mask_ratio=0.1),
    "all_hidden": dict(mask_ratio=1.0),
    "norm_pix": dict(norm_pix_loss=True),
    "odd": dict(img_size=25, patch_size=5, mask_ratio=0.6),
    "patch_14": dict(img_size=28, patch_size=14),
    "one_patch": dict(img_size=8),
    "grey": dict(in_chans=1, norm_pix_loss=True),
    "no_qkv_bias": dict(qkv_bias=False),
    "other_numerics": dict(norm_eps=1e-3, act_layer="quick_gelu"),
}


def noise_for(model: MaskedAutoencoderViT, batch: int = 3) -> Tensor:
    return torch.rand(batch, model.patch_embed.num_patches, generator=torch.Generator().manual_seed(3))


def images_for(model: MaskedAutoencoderViT, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)


def loss_with(noise: Tensor, **kwargs):
    return lambda model, images: model(images, noise=noise, **kwargs)[0]


def their_loss_with(noise: Tensor):
    return lambda model, images: model(pixel_values=images, noise=noise).loss


def transformers_twin(ours: MaskedAutoencoderViT) -> ViTMAEForPreTraining:
    """transformers' model with our sizes and weights."""
    theirs = ViTMAEForPreTraining(ViTMAEConfig.from_dict(transformers_config(ours))).to(ours.cls_token.dtype)
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    return theirs


def pair(**kwargs) -> tuple[MaskedAutoencoderViT, ViTMAEForPreTraining]:
    ours = randomise(MaskedAutoencoderViT(**SMALL | kwargs)).double()
    return ours, transformers_twin(ours)


def loss_by_hand(images: Tensor, pred: Tensor, mask: Tensor, p: int, norm_pix_loss: bool) -> Tensor:
    """The paper's loss, one hidden patch after the other."""
    errors = []
    for b, patch in mask.nonzero().tolist():
        row, column = divmod(patch, images.shape[3] // p)
        pixels = images[b, :, row * p : (row + 1) * p, column * p : (column + 1) * p].permute(1, 2, 0).flatten()
        if norm_pix_loss:
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6) ** 0.5
        errors.append((pred[b, patch] - pixels).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_transformers(kwargs):
    ours, theirs = pair(**kwargs)
    images, noise = images_for(ours), noise_for(ours)
    loss, pred, mask = ours(images, noise=noise)
    expected = theirs(pixel_values=images, noise=noise)
    assert_close(loss, expected.loss, atol=0.0, rtol=1e-9)
    assert_close(pred, expected.logits, atol=1e-9, rtol=1e-9)
    assert_close(mask, expected.mask, atol=0.0, rtol=0.0)
    kept = int(mask.shape[1] * (1 - ours.mask_ratio))
    unseen = () if kept else ("patch_embed.proj.weight", "patch_embed.proj.bias")
    calls = loss_with(noise), their_loss_with(noise)
    assert_same(ours, theirs, images, *calls, converted=from_transformers, no_gradient=unseen)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("img_size", [(16, 64), (24, 40)])
def test_rectangular_images(img_size, norm_pix_loss):
    """transformers computes no loss on them: the loss is compared with the formula, the prediction where it can."""
    ours = randomise(MaskedAutoencoderViT(**SMALL | dict(img_size=img_size), norm_pix_loss=norm_pix_loss)).double()
    images, noise = images_for(ours).requires_grad_(), noise_for(ours)
    loss, pred, mask = ours(images, noise=noise)
    expected = loss_by_hand(images, pred, mask, 8, norm_pix_loss)
    assert_close(loss, expected, atol=0.0, rtol=1e-12)
    parameters = [p for p in ours.parameters() if p.requires_grad] + [images]
    gradients = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, expected))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-12, rtol=1e-9)
    if math.isqrt(mask.shape[1]) ** 2 == mask.shape[1]:  # transformers wants as many patches as a square has
        theirs = transformers_twin(ours)
        encoded = theirs.vit(images, noise=noise)
        their_pred = theirs.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        assert_close(pred, their_pred, atol=1e-9, rtol=1e-9)


class Lightly(nn.Module):
    """The masked autoencoder as lightly's examples put it together."""

    def __init__(self) -> None:
        super().__init__()
        vit = TimmViT(32, 8, num_classes=0, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.decoder = MAEDecoderTIMM(16, 8, 3, 24, 16, 2, 2, mlp_ratio=2.0)
        del self.encoder.mask_token

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        keep = int(noise.shape[1] * 0.25)
        hidden = 1 + noise.argsort(dim=1)[:, keep:]  # lightly counts the class token
        kept = torch.cat([hidden.new_zeros(len(images), 1), 1 + noise.argsort(dim=1)[:, :keep]], dim=1)
        x = self.decoder.embed(self.encoder.encode(images, idx_keep=kept))
        tokens = lightly.repeat_token(self.decoder.mask_token, (len(images), noise.shape[1] + 1))
        x = self.decoder.decode(lightly.set_at_index(tokens, kept, x))
        pred = self.decoder.predict(lightly.get_at_index(x, hidden))
        target = lightly.get_at_index(lightly.patchify(images, 8), hidden - 1)
        return nn.functional.mse_loss(pred, target)


def from_lightly(state: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {re.sub(r"^(encoder\.vit|decoder)\.", "", name): t for name, t in state.items() if t is not None}


@pytest.mark.filterwarnings("ignore:.*MAEDecoderTIMM.*")
def test_equals_lightly():
    ours, theirs = randomise(MaskedAutoencoderViT(**SMALL)).double(), Lightly().double()
    state = ours.state_dict().items()
    of_decoder = {name for name, _ in state if vit.is_of_mae_decoder(name)}
    named = {f"{'decoder' if name in of_decoder else 'encoder.vit'}.{name}": tensor for name, tensor in state}
    theirs.load_state_dict(named, strict=True)
    theirs.encoder.vit.pos_embed.requires_grad_(False)
    images, noise = images_for(ours), noise_for(ours)
    assert_same(ours, theirs, images, loss_with(noise), lambda model, x: model(x, noise), converted=from_lightly)


def test_mae_vit_base_equals_transformers_in_float32():
    ours = create_model("mae_vit_base_patch16", weight_init="skip")
    theirs = transformers_twin(ours)
    images, noise = images_for(ours, 1, torch.float32), noise_for(ours, 1)
    with torch.no_grad():
        loss, pred, mask = ours(images, noise=noise)
        expected = theirs(pixel_values=images, noise=noise)
    assert_close(pred, expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(loss, expected.loss, atol=0.0, rtol=1e-5)
    assert_close(mask, expected.mask, atol=0.0, rtol=0.0)
    assert int(mask.sum()) == 147


COUNTS = {  # all, and those that are trained: positions are fixed
    "mae_vit_base_patch16": (111_907_840, 111_655_680),
    "mae_vit_large_patch16": (329_541_888, 329_239_296),
    "mae_vit_huge_patch14": (657_074_508, 656_613_964),
    "mae_vit_test_patch8": (238_992, 231_712),
}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("mae_")])
def test_every_size_has_transformers_shapes_and_the_papers_count(name):
    with torch.device("meta"):
        ours = create_model(name)
        theirs = ViTMAEForPreTraining(ViTMAEConfig.from_dict(transformers_config(ours)))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in from_transformers(theirs.state_dict()).items()}
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert (sum(p.numel() for p in ours.parameters()), trained) == COUNTS[name]
    assert ours.default_cfg["mean"] == (0.485, 0.456, 0.406)


def test_names_are_the_papers():
    names = {re.sub(r"\.\d+\..*|\.(weight|bias)$", "", name) for name in MaskedAutoencoderViT(**SMALL).state_dict()}
    encoder = {"cls_token", "pos_embed", "patch_embed.proj", "blocks", "norm"}
    decoder = {"decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert names == encoder | decoder


def test_positions_are_transformers():
    """Which has the row first; its ViTMAE swaps the halves, for the sake of the paper's weights."""
    ours = MaskedAutoencoderViT(**SMALL | dict(img_size=(24, 40)))
    for table in (ours.pos_embed, ours.decoder_pos_embed):
        width = table.shape[-1]
        theirs = build_2d_sinusoidal_position_embedding(3, 5, width, cls_token=True).roll(width // 2, dims=-1)
        assert_close(table[0], theirs, atol=1e-7, rtol=0.0)


def test_positions_of_a_rectangular_grid():
    table = sincos_pos_embed(8, (2, 3), num_prefix_tokens=2)
    assert table.shape == (1, 8, 8) and not table[0, :2].any()
    for row in range(2):
        for column in range(3):
            of_each = [[f(x * w) for f in (math.sin, math.cos) for w in (1.0, 0.01)] for x in (column, row)]
            assert_close(table[0, 2 + 3 * row + column], torch.tensor(sum(of_each, [])))
    assert_close(sincos_pos_embed(4, 2)[0, 1], torch.tensor([math.sin(1), math.cos(1), 0.0, 1.0]))


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = create_model("mae_vit_test_patch8")
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1:
            fan_out, fan_in = parameter.flatten(1).shape
            assert_close(parameter.std().item(), math.sqrt(2 / (fan_in + fan_out)), atol=0.0, rtol=0.05, msg=name)
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not parameter.any(), name
    for token in (model.cls_token, model.mask_token):
        assert 0.01 < token.std() < 0.03


def test_the_loop_as_the_paper_writes_it():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**SMALL)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for _ in range(2):
        loss, pred, mask = model(images_for(model, dtype=torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fixed = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert fixed == {"pos_embed", "decoder_pos_embed"}
    assert pred.shape == (3, 16, 192) and mask.shape == (3, 16)


def test_the_ratio_of_forward_wins_over_the_models():
    model = MaskedAutoencoderViT(**SMALL, mask_ratio=0.5)
    images = images_for(model, dtype=torch.float32)
    hidden = [model(images)[2].sum(dim=1), model(images, 0.25)[2].sum(dim=1), model(images, mask_ratio=0.7)[2].sum(1)]
    assert [h.tolist() for h in hidden] == [[8.0] * 3, [4.0] * 3, [12.0] * 3]


def test_masks_come_from_the_generator():
    model = MaskedAutoencoderViT(**SMALL)
    images = images_for(model, dtype=torch.float32)
    draw = [model(images, generator=torch.Generator().manual_seed(seed))[2] for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0][0], draw[0][1]), "each image should have a mask of its own"


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_uint8_images_and_targets_are_normalised_alike(norm_pix_loss):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = MaskedAutoencoderViT(**SMALL, norm_pix_loss=norm_pix_loss, image_mean=mean, image_std=std)
    model = randomise(model).double()
    noise = noise_for(model)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    mean, std = (t[:, None, None] for t in (model.patch_embed.mean, model.patch_embed.std))
    floats = (images.double() / 255 - mean) / std
    assert_same(model, model, images, loss_with(noise), lambda m, _: m(floats, noise=noise)[0])
    assert_close(model.target(images), model.target(floats), atol=1e-12, rtol=1e-9)


def test_patchify_and_back():
    model = MaskedAutoencoderViT(**SMALL | dict(img_size=(16, 24)))
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    patches = model.patchify(images)
    assert torch.equal(patches[0, 4], images[0, :, 8:16, 8:16].permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_the_encoder_alone_reads_whole_images():
    model = randomise(MaskedAutoencoderViT(**SMALL)).double().eval()
    images = images_for(model)
    tokens = model.forward_features(images)
    shuffled, _, ids_restore = model.forward_encoder(images, 0.0)
    assert_close(ops.gather_tokens(shuffled[:, 1:], ids_restore), tokens[:, 1:])
    maps = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    assert_close(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:])
    assert model.forward_head(tokens).shape == (3, 24)


def test_features_only_leaves_the_decoder_out():
    backbone = create_model("mae_vit_test_patch8", features_only=True, out_indices=(0, 2))
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 8, 8)] * 2
    assert not [name for name in backbone.state_dict() if "decoder" in name or "mask_token" in name]


def test_set_input_size_resizes_both_tables():
    model = MaskedAutoencoderViT(**SMALL | dict(img_size=(16, 64)))
    tables = [resize_pos_embed(t, (2, 5), old_grid=(2, 8)) for t in (model.pos_embed, model.decoder_pos_embed)]
    model.set_input_size((16, 40))
    assert_close([model.pos_embed.data, model.decoder_pos_embed.data], tables)
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    _, pred, mask = model(torch.zeros(2, 3, 16, 40))
    assert pred.shape == (2, 10, 192) and model.unpatchify(pred).shape == (2, 3, 16, 40)


def test_no_weight_decay_names_what_is_there():
    model = MaskedAutoencoderViT(**SMALL)
    names = model.no_weight_decay() & dict(model.named_parameters()).keys()
    assert names == {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed"}


def test_float32_rule():
    model = randomise(MaskedAutoencoderViT(**SMALL))
    assert_float32_rule(model, images_for(model), loss_with(noise_for(model)))


def test_bfloat16_rule():
    ours, theirs = pair()
    noise = noise_for(ours)
    calls = (lambda m, x: m(x, noise=noise)[1]), (lambda m, x: m(pixel_values=x, noise=noise).logits)
    assert_bfloat16_rule(ours, theirs, images_for(ours), *calls)


def test_the_loss_is_float32_at_least():
    model = MaskedAutoencoderViT(**SMALL)
    images, noise = images_for(model, dtype=torch.float32), noise_for(model)
    exact = model(images, noise=noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(images, noise=noise)[0]
    images = images.bfloat16()
    half, pred, mask = model.bfloat16()(images, noise=noise)
    assert exact.dtype == autocast.dtype == half.dtype == torch.float32
    assert_close([autocast, half], [exact, exact], atol=0.0, rtol=0.02)
    expected = loss_by_hand(images.double(), pred.double(), mask, 8, norm_pix_loss=False)
    assert_close(half.double(), expected, atol=0.0, rtol=1e-6)


def test_native_and_torch_agree():
    model = randomise(MaskedAutoencoderViT(**SMALL, norm_pix_loss=True)).double()
    images = images_for(model).to(memory_format=torch.channels_last)
    assert_native_and_torch_agree(model, images, loss_with(noise_for(model)))


def test_checkpointing_changes_nothing():
    model = randomise(create_model("mae_vit_test_patch8"))
    images = images_for(model, dtype=torch.float32)
    assert_checkpointing_changes_nothing(model, images, loss_with(noise_for(model)))


def test_compiles_without_a_break():
    model = create_model("mae_vit_test_patch8", norm_pix_loss=True)
    images = images_for(model, dtype=torch.float32)
    assert_compiles_without_a_break(model, images, loss_with(noise_for(model)))


def test_exports():
    model = create_model("mae_vit_test_patch8").eval()
    images, noise = images_for(model, dtype=torch.float32), noise_for(model)
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = {"images": batch, "noise": batch}
    program = torch.export.export(model, (images[:2],), {"noise": noise[:2]}, dynamic_shapes=shapes)
    with torch.no_grad():
        for one, other in zip(program.module()(images, noise=noise), model(images, noise=noise), strict=True):
            assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_empty_batch():
    model = MaskedAutoencoderViT(**SMALL)
    loss, pred, mask = model(torch.zeros(0, 3, 32, 32))
    assert pred.shape == (0, 16, 192) and mask.shape == (0, 16) and loss.isnan()  # a mean of nothing


def test_the_readme_snippet_runs(capsys):
    readme = Path(mae_package.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["painted"].shape == (8, 3, 64, 64)
    assert names["vit"](names["images"]).shape == (8, 10)
    assert "left out the 32 tensors of a masked autoencoder's decoder; left out norm" in capsys.readouterr().out


BAD = {
    "ratio": (lambda m: MaskedAutoencoderViT(**SMALL, mask_ratio=1.5), "mask_ratio should be in \\[0, 1\\], got 1.5"),
    "nothing_hidden": (lambda m: m(torch.zeros(1, 3, 32, 32), 0.0), "hide one patch or more of 16, got 0.0"),
    "ratio_of_forward": (lambda m: m(torch.zeros(1, 3, 32, 32), 75), "mask_ratio in \\[0, 1\\], got 75"),
    "noise": (lambda m: m(torch.zeros(1, 3, 32, 32), noise=torch.rand(1, 9)), "noise \\[1, 16\\], got .*\\(1, 9\\)"),
    "uint8": (lambda m: m(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8 images need a mean"),
    "other_size": (lambda m: m(torch.zeros(1, 3, 32, 40)), "should be 32 x 32, got 32 x 40"),
    "decoder_heads": (lambda m: MaskedAutoencoderViT(**SMALL | dict(decoder_num_heads=3)), "got 16 and 3"),
    "decoder_width": (lambda m: MaskedAutoencoderViT(**SMALL | dict(decoder_embed_dim=18)), "multiple of 4.*got 18"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(MaskedAutoencoderViT(**SMALL))
