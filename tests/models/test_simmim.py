# SPDX-License-Identifier: Apache-2.0
"""SimMIM against transformers (Swin), and against timm's Swin and BEiT with patches masked by hand."""

import re
from pathlib import Path

import pytest
import torch
from parity import (
    assert_bfloat16_rule,
    assert_checkpointing_changes_nothing,
    assert_compiles_without_a_break,
    assert_float32_rule,
    assert_native_and_torch_agree,
    assert_same,
    outputs_and_gradients,
    randomise,
)
from timm.models.beit import Beit as TimmBeit
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import SwinConfig, SwinForMaskedImageModeling

from fvm_fast.models import MODELS, SimMIM, create_model
from fvm_fast.models.masked_modeling import simmim
from fvm_fast.models.masked_modeling.simmim import SwinTransformerForSimMIM, VisionTransformerForSimMIM
from fvm_fast.weights.simmim import from_transformers, to_transformers, transformers_config

SWIN = dict(img_size=32, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, drop_path_rate=0.0)
VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
TEST_SIZES = pytest.mark.parametrize("name", ["simmim_swin_test", "simmim_vit_test"])


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def images_for(model: SimMIM, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return pictures(batch, model.in_chans, *model.patch_embed.img_size, dtype=dtype)


def some_mask(model: SimMIM, batch: int = 3, ratio: float = 0.6) -> Tensor:
    """[B, rows, columns], of every image other patches and another number."""
    shape = batch, *model.patch_embed.grid_size
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < ratio


def our_swin(**kwargs) -> SimMIM:
    return randomise(SimMIM(SwinTransformerForSimMIM(**SWIN | kwargs))).double()


def our_vit(**kwargs) -> SimMIM:
    return randomise(SimMIM(VisionTransformerForSimMIM(**VIT | kwargs))).double()


def loss_with(mask: Tensor):
    return lambda model, images: model(images, mask)[0]


# ---- Swin against transformers


def transformers_twin(ours: SimMIM) -> SwinForMaskedImageModeling:
    """transformers' model with our sizes and weights."""
    config = SwinConfig.from_dict(transformers_config(ours))
    config._attn_implementation = "sdpa"  # the eager one computes its softmax in float32
    theirs = SwinForMaskedImageModeling(config).to(ours.encoder.mask_token.dtype)
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    return theirs.eval()


def theirs_of(model: SwinForMaskedImageModeling, images: Tensor, mask: Tensor):
    """Called with a mask of floats: it divides by a sum in the mask's dtype, in float32 if that is bool."""
    return model(images, bool_masked_pos=mask.flatten(1).to(images.dtype))


SQUARE = {
    "plain": {},
    "grey": dict(in_chans=1),
    "three_stages": dict(img_size=40, depths=(1, 2, 1), num_heads=(2, 2, 4), window_size=5),
    "windows_do_not_divide": dict(window_size=5, pad_order="pad_roll"),
    "windows_cover_the_last_maps": dict(window_size=8),
    "other_numerics": dict(qkv_bias=False, mlp_ratio=1.5, act_layer="quick_gelu"),
}


@pytest.mark.parametrize("kwargs", SQUARE.values(), ids=SQUARE.keys())
def test_swin_equals_transformers(kwargs):
    ours = our_swin(**kwargs)
    theirs, images, mask = transformers_twin(ours), images_for(ours), some_mask(ours)
    expected = theirs_of(theirs, images, mask)
    loss, pred = ours(images, mask)
    assert_close(loss, expected.loss, atol=0.0, rtol=1e-9)
    assert_close(pred, expected.reconstruction, atol=1e-9, rtol=1e-9)
    calls = loss_with(mask), lambda model, x: theirs_of(model, x, mask).loss
    assert_same(ours, theirs, images, *calls, converted=from_transformers)


def test_whole_images_equal_transformers():
    ours = our_swin()
    theirs, images = transformers_twin(ours), images_for(ours)
    assert_close(ours.reconstruct(images), theirs(images).reconstruction, atol=1e-9, rtol=1e-9)
    nothing = torch.zeros(3, 256, dtype=torch.bool)
    loss, pred = ours(images, nothing)
    assert_close(pred, ours.reconstruct(images), atol=0.0, rtol=0.0)
    assert loss == theirs_of(theirs, images, nothing).loss == 0.0


def test_everything_hidden_equals_transformers():
    ours = our_swin()
    theirs, images, mask = transformers_twin(ours), images_for(ours), torch.ones(3, 16, 16)
    assert_close(ours(images, mask)[0], theirs_of(theirs, images, mask).loss, atol=0.0, rtol=1e-9)


def test_the_real_size_equals_transformers():
    torch.manual_seed(0)
    ours = create_model("simmim_swin_base_192").eval()
    theirs, images, mask = transformers_twin(ours), images_for(ours, 1, torch.float32), some_mask(ours, 1)
    with torch.no_grad():
        (loss, pred), expected = ours(images, mask), theirs_of(theirs, images, mask)
    assert_close(loss, expected.loss, atol=0.0, rtol=1e-6)
    assert_close(pred, expected.reconstruction, atol=1e-5, rtol=1e-5)


# ---- both encoders against timm's blocks, with the paper's own few lines


class MaskedTimmSwin(TimmSwin):
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, num_classes=0)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.where(mask[..., None], self.mask_token[0], x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).permute(0, 3, 1, 2)


class MaskedTimmBeit(TimmBeit):
    def __init__(self, **kwargs) -> None:
        positions = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, use_fc_norm=False)
        norm = dict(norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6))
        super().__init__(**dict(init_values=0.1) | kwargs, **positions, **norm, num_classes=0)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.where(mask.flatten(1)[..., None], self.mask_token, x)
        x, bias = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1), self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, self.patch_embed.grid_size)


class ByHand(nn.Module):
    """The paper's decoder, one cell after the other, and its loss, one hidden patch after the other."""

    def __init__(self, encoder: nn.Module, stride: int, in_chans: int = 3) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, stride**2 * in_chans, 1))
        self.stride, self.in_chans = stride, in_chans

    def paint(self, images: Tensor, mask: Tensor) -> Tensor:
        z, s = self.encoder(images, mask), self.stride
        weight, bias = self.decoder[0].weight[:, :, 0, 0], self.decoder[0].bias
        rows = []
        for i in range(z.shape[2]):
            cells = [(z[:, :, i, j] @ weight.T + bias).view(-1, self.in_chans, s, s) for j in range(z.shape[3])]
            rows.append(torch.cat(cells, dim=3))
        return torch.cat(rows, dim=2)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pred, p, total, pixels = self.paint(images, mask), self.encoder.patch_embed.patch_size[0], 0.0, 0
        for b, i, j in mask.nonzero().tolist():
            patch = b, slice(None), slice(i * p, i * p + p), slice(j * p, j * p + p)
            total, pixels = total + (pred[patch] - images[patch]).abs().sum(), pixels + p * p
        return total / (pixels + 1e-5) / self.in_chans, pred


def swin_by_hand(**kwargs) -> ByHand:
    sizes = SWIN | kwargs
    stride = sizes["patch_size"] * 2 ** (len(sizes["depths"]) - 1)
    return ByHand(MaskedTimmSwin(**sizes), stride, sizes.get("in_chans", 3))


def vit_by_hand(**kwargs) -> ByHand:
    sizes = VIT | kwargs
    return ByHand(MaskedTimmBeit(**sizes), sizes["patch_size"], sizes.get("in_chans", 3))


VARIANTS = {
    "swin": (our_swin, swin_by_hand, {}),
    "swin_rectangular": (our_swin, swin_by_hand, dict(img_size=(24, 40))),
    "swin_windows_do_not_divide": (our_swin, swin_by_hand, dict(img_size=(28, 36), window_size=5)),
    "swin_one_stage": (our_swin, swin_by_hand, dict(depths=(2,), num_heads=(3,))),
    "vit": (our_vit, vit_by_hand, {}),
    "vit_rectangular": (our_vit, vit_by_hand, dict(img_size=(24, 40))),
    "vit_odd": (our_vit, vit_by_hand, dict(img_size=(15, 25), patch_size=5)),
    "vit_grey": (our_vit, vit_by_hand, dict(in_chans=1)),
    "vit_no_layer_scale": (our_vit, vit_by_hand, dict(init_values=None)),
    "vit_no_qkv_bias": (our_vit, vit_by_hand, dict(qkv_bias=False)),
}


@pytest.mark.parametrize("ours_of, by_hand, kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_timms_blocks_and_the_formula(ours_of, by_hand, kwargs):
    ours = ours_of(**kwargs)
    theirs = by_hand(**kwargs).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, mask = images_for(ours), some_mask(ours)
    assert_close(ours(images, mask)[1], theirs(images, mask)[1], atol=1e-9, rtol=1e-9)
    assert_same(ours, theirs, images, loss_with(mask))


# ---- sizes


COUNTS = {
    "simmim_swin_base_192": 89_874_104,
    "simmim_swin_test": 194_126,
    "simmim_vit_base_patch16_224": 86_256_720,
    "simmim_vit_test": 176_144,
}


def test_every_size_is_counted():
    assert COUNTS.keys() == {name for name in MODELS if name.startswith("simmim")}


@pytest.mark.parametrize("name", COUNTS)
def test_every_size_has_the_oracles_shapes_and_the_papers_count(name):
    with torch.device("meta"):
        ours = create_model(name)
        if "swin" in name:
            theirs = SwinForMaskedImageModeling(SwinConfig.from_dict(transformers_config(ours)))
            expected = from_transformers(theirs.state_dict())
        else:
            encoder, stem = ours.encoder, ours.patch_embed
            sizes = dict(embed_dim=encoder.embed_dim, depth=len(encoder.blocks), mlp_ratio=4.0)
            sizes |= dict(num_heads=encoder.blocks[0].attn.num_heads, img_size=stem.img_size)
            expected = vit_by_hand(**sizes, patch_size=stem.patch_size[0]).state_dict()
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in expected.items()}
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[name]


def test_the_readme_has_the_counts():
    readme = Path(simmim.__file__).with_name("README.md").read_text()
    assert all(name in readme and f"{count:,}" in readme for name, count in COUNTS.items())


# ---- the rules of all models


@TEST_SIZES
def test_rules_of_all_models(name):
    model = randomise(create_model(name), std=0.05)
    images, mask = images_for(model, dtype=torch.float32), some_mask(model)
    assert_native_and_torch_agree(randomise(create_model(name)).double(), images.double(), loss_with(mask))
    assert_checkpointing_changes_nothing(model, images, loss_with(mask))
    assert_compiles_without_a_break(model, images, loss_with(mask))


@pytest.mark.parametrize("ours_of", [our_swin, our_vit])
def test_float32_rule(ours_of):
    ours = ours_of()
    assert_float32_rule(ours, images_for(ours), loss_with(some_mask(ours)))


@pytest.mark.parametrize("ours_of, by_hand", [(our_swin, swin_by_hand), (our_vit, vit_by_hand)])
def test_bfloat16_rule(ours_of, by_hand):
    ours, theirs = ours_of(), by_hand().double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    mask = some_mask(ours)
    assert_bfloat16_rule(ours, theirs, images_for(ours), lambda model, images: model(images, mask)[1])
    assert ours.bfloat16()(images_for(ours, dtype=torch.bfloat16), mask)[0].dtype == torch.float32


@TEST_SIZES
def test_exports_with_a_dynamic_batch(name):
    model = randomise(create_model(name), std=0.05).eval()
    images, mask = images_for(model, dtype=torch.float32), some_mask(model)
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = {"images": batch, "mask": batch}
    program = torch.export.export(model, (images[:2], mask[:2]), dynamic_shapes=shapes)
    with torch.no_grad():
        assert_close(program.module()(images, mask), model(images, mask), atol=1e-5, rtol=1e-5)


@TEST_SIZES
def test_uint8_images_are_normalised_as_input_and_as_target(name):
    model = create_model(name).double()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(model.default_cfg[key])[:, None, None] for key in ("mean", "std"))
    floats, mask = (images.double() / 255 - mean.double()) / std.double(), some_mask(model)
    assert_close(model.target(images), floats, atol=1e-6, rtol=0.0)  # the model holds mean and std of float32
    assert_close(model(images, mask), model(floats, mask), atol=1e-6, rtol=1e-6)
    _, gradients = outputs_and_gradients(model, images, loss_with(mask))
    assert all(gradient.any() for gradient in gradients.values())


@TEST_SIZES
def test_no_images(name):
    model = create_model(name)
    images, mask = images_for(model, dtype=torch.float32)[:0], some_mask(model)[:0]
    loss, pred = model(images, mask)
    assert loss == 0.0 and pred.shape == (0, 3, 64, 64)


# ---- what is around


@TEST_SIZES
def test_a_mask_may_be_flat_and_of_numbers(name):
    model = create_model(name).eval()
    images, mask = images_for(model, dtype=torch.float32), some_mask(model)
    for same in (mask.flatten(1), mask.float(), mask.flatten(1).long()):
        assert_close(model(images, same), model(images, mask), atol=0.0, rtol=0.0)


@TEST_SIZES
def test_other_image_sizes(name):
    model = create_model(name)
    model.set_input_size((32, 96))
    images, mask = images_for(model, 2, torch.float32), some_mask(model, 2)
    loss, pred = model(images, mask)
    assert loss.isfinite() and pred.shape == images.shape


@pytest.mark.parametrize("name, maps", [("simmim_swin_test", [16, 32, 64]), ("simmim_vit_test", [64, 64, 64])])
def test_features_only_leaves_pretraining_out(name, maps):
    torch.manual_seed(0)
    whole = create_model(name)
    images = images_for(whole, 2, torch.float32)
    expected = whole.forward_intermediates(images, intermediates_only=True)
    torch.manual_seed(0)
    backbone = create_model(name, features_only=True)
    assert_close(backbone(images), expected, atol=0.0, rtol=0.0)
    assert backbone.feature_info.channels() == maps
    for module in backbone.feature_info.module_name():
        backbone.model.get_submodule(module)
    assert not [key for key in backbone.state_dict() if "decoder" in key or "mask_token" in key]


def test_features_of_whole_images():
    swin, vit = our_swin(), our_vit()
    images = images_for(swin)
    assert_close(swin.encoder(images), swin.forward_features(images).permute(0, 3, 1, 2), atol=0.0, rtol=0.0)
    patches = vit.forward_features(images)[:, 1:]  # without the class token
    assert_close(vit.encoder(images).flatten(2).mT, patches, atol=0.0, rtol=0.0)


@TEST_SIZES
def test_autocast_keeps_the_loss_in_float32(name):
    model = create_model(name)
    images, mask = images_for(model, dtype=torch.float32), some_mask(model)
    loss = model(images, mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half, pred = model(images, mask)
    assert half.dtype == torch.float32 and pred.dtype == torch.bfloat16
    assert_close(half, loss, atol=0.0, rtol=1e-2)
    half.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@TEST_SIZES
def test_what_an_optimiser_should_not_decay_exists(name):
    model = create_model(name)
    names = model.no_weight_decay()
    assert "encoder.mask_token" in names and any("relative_position_bias_table" in key for key in names)
    assert names <= {key for key, _ in model.named_parameters()}


def test_the_vit_begins_within_the_papers_small_range():
    torch.manual_seed(0)
    encoder = create_model("simmim_vit_test").encoder
    for name in ("cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert 0.015 < encoder.get_parameter(name).abs().max() <= 0.02, name
    for number, block in enumerate(encoder.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            bound = 0.02 / (2 * number) ** 0.5
            assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)


def test_arguments_reach_the_encoder():
    model = create_model("simmim_swin_test", in_chans=1, img_size=(32, 64), drop_path_rate=0.1)
    images = pictures(2, 1, 32, 64, dtype=torch.float32)
    assert model(images, some_mask(model, 2))[1].shape == images.shape and model.in_chans == 1
    assert SimMIM(SwinTransformerForSimMIM(**SWIN), encoder_stride=4, in_chans=3).encoder_stride == 4


BAD = {
    "mask": (lambda m: m(torch.zeros(2, 3, 32, 32), torch.zeros(2, 64)), "\\[2, 16, 16\\] or \\[2, 256\\], one value"),
    "size": (lambda m: m(torch.zeros(2, 3, 32, 40), torch.zeros(2, 16, 20)), "should be 32 x 32, got 32 x 40"),
    "uint8": (lambda m: m(torch.zeros(2, 3, 32, 32).byte(), torch.zeros(2, 256)), "uint8 images need a mean"),
    "stride": (lambda m: SimMIM(m.encoder, 32), "encoder_stride=4 and in_chans=3, got 32 and 3; leave them out"),
    "channels": (lambda m: SimMIM(m.encoder, 4, 1), "in_chans=3, got 4 and 1"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(SimMIM(SwinTransformerForSimMIM(**SWIN)))


def test_an_image_that_the_stride_does_not_divide_is_refused():
    model = SimMIM(SwinTransformerForSimMIM(**SWIN | dict(img_size=30)))
    with pytest.raises(ValueError, match="multiples of encoder_stride 4, got 30 x 30; resize the images"):
        model(torch.zeros(1, 3, 30, 30), torch.zeros(1, 15, 15))


def test_the_readme_snippet_runs(capsys):
    readme = Path(simmim.__file__).with_name("README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    assert names["painted"].shape == (8, 3, 64, 64) and names["logits"].shape == (8, 10)
    assert "left out the 3 tensors that pretraining alone needs" in capsys.readouterr().out
