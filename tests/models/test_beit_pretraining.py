# SPDX-License-Identifier: Apache-2.0
"""BEiT's masked image modelling against transformers, and against timm's blocks over tokens masked by hand."""

import math

import pytest
import torch
from parity import (
    assert_bfloat16_rule,
    assert_checkpointing_changes_nothing,
    assert_compiles_without_a_break,
    assert_float32_rule,
    assert_native_and_torch_agree,
    assert_same,
    randomise,
)
from timm.models.beit import Beit as TimmBeit
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import BeitConfig
from transformers import BeitForMaskedImageModeling as TransformersBeit

from fvm_fast.layers.backbone import IMAGENET_MEAN
from fvm_fast.models import MODELS, Beit, BeitForMaskedImageModeling, create_model
from fvm_fast.weights.beit import from_transformers, to_transformers, transformers_config


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


PRETRAINING = dict(img_size=32, patch_size=8, vocab_size=19, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
PRETRAINING_VARIANTS = {
    "shared_table": {},
    "own_tables": dict(use_shared_rel_pos_bias=False, use_rel_pos_bias=True),
    "absolute_positions": dict(use_abs_pos_emb=True),
    "no_layer_scale": dict(init_values=None),
    "rectangular": dict(img_size=(24, 40)),
    "grey": dict(in_chans=1),
}

# transformers takes a table for rows x columns as one for columns x rows
SQUARE = {name: kwargs for name, kwargs in PRETRAINING_VARIANTS.items() if name != "rectangular"}


def pretraining_pair(**kwargs) -> tuple[BeitForMaskedImageModeling, TransformersBeit]:
    ours = randomise(BeitForMaskedImageModeling(**PRETRAINING | kwargs)).double()
    config = BeitConfig.from_dict(transformers_config(ours))
    config._attn_implementation = "sdpa"  # its other softmax is in float32
    theirs = TransformersBeit(config).double()
    theirs.load_state_dict(to_transformers(ours.state_dict()), strict=True)
    return ours.eval(), theirs.eval()


def some_mask(model: Beit, batch: int = 3) -> Tensor:
    """As many patches of every image, others in each."""
    noise = torch.rand(batch, model.patch_embed.num_patches, generator=torch.Generator().manual_seed(3))
    return noise.argsort(dim=1) < 5


def some_tokens(mask: Tensor, vocab_size: int = 19) -> Tensor:
    return torch.arange(int(mask.sum())) * 7 % vocab_size


def token_loss(mask: Tensor):
    return lambda model, images: cross_entropy(model(images, mask), some_tokens(mask, model.vocab_size))


@pytest.mark.parametrize("kwargs", SQUARE.values(), ids=SQUARE.keys())
def test_pretraining_equals_transformers(kwargs):
    ours, theirs = pretraining_pair(**kwargs)
    images = pictures(3, kwargs.get("in_chans", 3), *ours.patch_embed.img_size)
    mask = some_mask(ours)
    masked = dict(bool_masked_pos=mask, labels=some_tokens(mask))

    def their_call(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, **masked).loss

    assert_same(ours, theirs, images, token_loss(mask), their_call, converted=from_transformers)
    expected = theirs(images, bool_masked_pos=mask).logits
    assert_close(ours(images, mask), expected[mask], atol=1e-9, rtol=1e-9)
    assert_close(ours(images, mask, return_all_tokens=True), expected, atol=1e-9, rtol=1e-9)


def test_pretraining_equals_timm_where_nothing_is_masked():
    ours, _ = pretraining_pair()
    shared = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1, use_fc_norm=False)
    sizes = {name: value for name, value in PRETRAINING.items() if name != "vocab_size"}
    theirs = TimmBeit(**sizes, **shared, num_classes=0, norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6))
    state = {name: t for name, t in ours.state_dict().items() if name != "mask_token" and "lm_head" not in name}
    theirs.double().load_state_dict(state, strict=True)
    images = pictures(3, 3, 32, 32)
    tokens = theirs.forward_features(images)
    assert_close(ours.forward_features(images), tokens, atol=1e-9, rtol=1e-9)
    expected = ours.lm_head(tokens[:, 1:])
    assert_close(ours(images, return_all_tokens=True), expected, atol=1e-9, rtol=1e-9)
    nothing = torch.zeros(3, 16, dtype=torch.bool)
    assert_close(ours(images, nothing, return_all_tokens=True), expected, atol=1e-9, rtol=1e-9)
    assert ours(images, nothing).shape == (0, 19)


@pytest.mark.parametrize("kwargs", PRETRAINING_VARIANTS.values(), ids=PRETRAINING_VARIANTS.keys())
def test_masked_patches_are_timms_blocks_over_mask_tokens(kwargs):
    ours, _ = pretraining_pair(**kwargs)
    options = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1) | kwargs
    sizes = {name: value for name, value in PRETRAINING.items() if name != "vocab_size"}
    theirs = ByHand(sizes | options).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    mask = some_mask(ours)
    images = pictures(3, kwargs.get("in_chans", 3), *ours.patch_embed.img_size)
    assert_same(ours, theirs, images, token_loss(mask))


class ByHand(TimmBeit):
    """timm's network with the paper's mask token and vocabulary."""

    def __init__(self, options: dict) -> None:
        norm = dict(norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6))
        super().__init__(**options, **norm, num_classes=0, use_fc_norm=False)
        self.vocab_size = 19
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.lm_head = nn.Linear(self.embed_dim, 19)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.where(mask[:, :, None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x if self.pos_embed is None else x + self.pos_embed
        for block in self.blocks:
            x = block(x, None if self.rel_pos_bias is None else self.rel_pos_bias())
        return self.lm_head(self.norm(x)[:, 1:][mask])


class SecondPredictionByHand(ByHand):
    """With BEiT v2's second prediction, from the patches of the first block."""

    def __init__(self, options: dict) -> None:
        super().__init__(options)
        self.cls_pt_layers = TimmBeit(**options).blocks[:2]

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where(mask[:, :, None], self.mask_token, self.patch_embed(images))
        x, bias = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1), self.rel_pos_bias()
        after = [x := block(x, bias) for block in self.blocks]
        y = torch.cat([after[-1][:, :1], after[0][:, 1:]], dim=1)
        for block in self.cls_pt_layers:
            block.norm1.eps = block.norm2.eps = 1e-6
            y = block(y, bias)
        return tuple(self.lm_head(self.norm(z)[:, 1:][mask]) for z in (x, y))


def test_the_second_prediction_of_v2_by_hand():
    sizes = PRETRAINING | dict(depth=4)
    ours = randomise(BeitForMaskedImageModeling(**sizes, early_layers=1)).double()
    del sizes["vocab_size"]
    theirs = SecondPredictionByHand(
        sizes | dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    ).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images, mask = pictures(3, 3, 32, 32), some_mask(ours)
    tokens = some_tokens(mask)

    def both_losses(model: nn.Module, x: Tensor) -> Tensor:
        return sum(weight * cross_entropy(z, tokens) for weight, z in zip((1.0, 0.3), model(x, mask), strict=True))

    assert_same(ours, theirs, images, both_losses)
    assert_checkpointing_changes_nothing(ours, images, both_losses)
    ours.set_input_size((16, 48))
    logits, second = ours(pictures(2, 3, 16, 48), return_all_tokens=True)
    assert logits.shape == second.shape == (2, 12, 19)
    with pytest.raises(ValueError, match="early_layers should be 1 to 2, depth less head_layers, got 3"):
        BeitForMaskedImageModeling(**PRETRAINING | dict(depth=4), early_layers=3)


@pytest.mark.parametrize("size, count", [("base", 106_143_056), ("large", 336_728_512)])
def test_sizes_with_a_second_prediction_have_two_blocks_more(size, count):
    with torch.device("meta"):
        ours = create_model(f"beit_{size}_patch16_224_8k_vocab_cls_pt")
    block = sum(p.numel() for p in ours.blocks[0].parameters())
    total = sum(p.numel() for p in ours.parameters())
    assert total == count == PRETRAINING_COUNTS[f"beit_{size}_patch16_224_8k_vocab"] + 2 * block
    assert ours.default_cfg["mean"] == IMAGENET_MEAN and ours.early_layers == len(ours.blocks) - 3


def test_ids_and_mask_say_the_same():
    ours, _ = pretraining_pair()
    images, mask = pictures(3, 3, 32, 32), some_mask(ours)
    ids = mask.nonzero()[:, 1].view(3, 5)
    logits = ours(images, ids_masked=ids)
    assert_close(logits.flatten(0, 1), ours(images, mask), atol=1e-12, rtol=1e-12)
    assert_close(ours(images, mask.view(3, 4, 4)), ours(images, mask), atol=0.0, rtol=0.0)
    assert_close(ours(images, ids_masked=ids.flip(1)), logits.flip(1), atol=1e-12, rtol=1e-12)


def test_unequal_numbers_of_masked_patches():
    ours, theirs = pretraining_pair()
    images, mask = pictures(3, 3, 32, 32), torch.zeros(3, 16, dtype=torch.bool)
    mask[0, :7] = mask[2, 15] = True
    assert_close(ours(images, mask), theirs(images, bool_masked_pos=mask).logits[mask], atol=1e-9, rtol=1e-9)


PRETRAINING_COUNTS = {
    "beit_base_patch16_224_8k_vocab": 91_965_776,
    "beit_large_patch16_224_8k_vocab": 311_534_016,
    "beit_test_patch16_64_64_vocab": 203_984,
}


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("_vocab")])
def test_every_pretraining_size_has_transformers_shapes_and_the_papers_count(name):
    with torch.device("meta"):
        ours = create_model(name)
        theirs = TransformersBeit(BeitConfig.from_dict(transformers_config(ours)))
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in from_transformers(theirs.state_dict()).items()}
    assert sum(p.numel() for p in ours.parameters()) == PRETRAINING_COUNTS[name]


def test_pretraining_begins_within_the_papers_small_range():
    torch.manual_seed(0)
    model = create_model("beit_test_patch16_64_64_vocab", early_layers=1)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_table")):
            assert not parameter.any(), name
        elif "norm" not in name and "gamma" not in name:
            assert 0 < parameter.abs().max() <= 0.02, name
    numbered = [*enumerate(model.blocks, start=1), *enumerate(model.cls_pt_layers, start=2)]
    for number, block in numbered:
        for layer in (block.attn.proj, block.mlp.fc2):
            bound = 0.02 / math.sqrt(2 * number)
            assert 0.99 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)


def test_pretraining_rules_of_all_models():
    model = randomise(create_model("beit_test_patch16_64_64_vocab"), std=0.05).eval()
    images, mask = pictures(3, 3, 64, 64, dtype=torch.float32), some_mask(model)
    assert_float32_rule(randomise(BeitForMaskedImageModeling(**PRETRAINING)), pictures(3, 3, 32, 32), token_loss(mask))
    double = randomise(create_model("beit_test_patch16_64_64_vocab")).double()
    assert_native_and_torch_agree(double, images.double(), token_loss(mask))
    assert_checkpointing_changes_nothing(model, images, token_loss(mask))
    ids = mask.nonzero()[:, 1].view(3, 5)
    assert_compiles_without_a_break(model, images, lambda m, x: m(x, ids_masked=ids))


def test_pretraining_bfloat16_rule():
    ours, theirs = pretraining_pair()
    mask = some_mask(ours)
    calls = (lambda m, x: m(x, mask)), (lambda m, x: m(x, bool_masked_pos=mask).logits[mask])
    assert_bfloat16_rule(ours, theirs, pictures(3, 3, 32, 32), *calls)


def test_pretraining_exports():
    model = randomise(create_model("beit_test_patch16_64_64_vocab")).eval()
    images, ids = pictures(3, 3, 64, 64, dtype=torch.float32), some_mask(model).nonzero()[:, 1].view(3, 5)
    batch = {0: torch.export.Dim("batch", min=2)}
    shapes = {"images": batch, "ids_masked": batch}
    program = torch.export.export(model, (images[:2],), {"ids_masked": ids[:2]}, dynamic_shapes=shapes)
    with torch.no_grad():
        assert_close(program.module()(images, ids_masked=ids), model(images, ids_masked=ids), atol=1e-5, rtol=1e-5)


def test_pretraining_takes_uint8_images_and_none():
    model = create_model("beit_test_patch16_64_64_vocab").double()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    mask = some_mask(model)
    floats = (images.double() / 255 - 0.5) / 0.5
    assert_close(model(images, mask), model(floats, mask), atol=1e-9, rtol=1e-9)
    assert model(images[:0], mask[:0]).shape == (0, 64)


def test_features_only_leaves_pretraining_out():
    backbone = create_model("beit_test_patch16_64_64_vocab", features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 64))] == [(1, 64, 4, 4)] * 2
    assert not [name for name in backbone.state_dict() if "lm_head" in name or "mask_token" in name]
    backbone.model.set_input_size((32, 96))
    assert backbone(torch.zeros(1, 3, 32, 96))[0].shape == (1, 64, 2, 6)


def test_pretraining_at_another_size():
    model = create_model("beit_test_patch16_64_64_vocab")
    model.set_input_size((32, 96))
    mask = torch.zeros(2, 2, 6, dtype=torch.bool)
    mask[:, 1, 2:4] = True
    assert model(torch.zeros(2, 3, 32, 96), mask).shape == (4, 64)
    assert (
        "mask_token" in model.no_weight_decay()
        and "rel_pos_bias.relative_position_bias_table" in model.no_weight_decay()
    )


IMAGES = torch.zeros(2, 3, 32, 32)
BAD = {
    "no_mask": (lambda m: m(IMAGES), "expected bool_masked_pos or ids_masked, got neither; for features of whole"),
    "both": (
        lambda m: m(IMAGES, torch.zeros(2, 16) > 0, ids_masked=torch.zeros(2, 1, dtype=torch.long)),
        "got both",
    ),
    "mask_shape": (
        lambda m: m(IMAGES, torch.zeros(2, 9) > 0),
        "should be \\[2, 16\\], one value a patch, got \\[2, 9\\]",
    ),
    "size": (lambda m: m(torch.zeros(2, 3, 32, 40), torch.zeros(2, 16) > 0), "should be 32 x 32, got 32 x 40"),
    "uint8": (lambda m: m(IMAGES.byte(), torch.zeros(2, 16) > 0), "uint8 images need a mean"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(BeitForMaskedImageModeling(**PRETRAINING))
