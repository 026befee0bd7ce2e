# SPDX-License-Identifier: Apache-2.0
"""Models by name."""

import pytest
import torch

import fvm_fast
from fvm_fast.models import MODELS, create_model, list_models

# The class that names with a beginning build; the first beginning that fits counts.
CLASSES = {
    "beit": "Beit",
    "clip_": "CLIP",
    "convnext": "ConvNeXt",
    "deit": "VisionTransformer",
    "mae_": "MaskedAutoencoderViT",
    "simmim_": "SimMIM",
    "swin_": "SwinTransformer",
    "swinv2_": "SwinTransformerV2",
    "tiny_vit_": "TinyVit",
    "vit_": "VisionTransformer",
}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_its_class(name):
    with torch.device("meta"):
        model = create_model(name)
    wanted = next(cls for beginning, cls in CLASSES.items() if name.startswith(beginning))
    assert isinstance(model, getattr(fvm_fast.models, wanted))


def test_names_are_those_of_their_functions():
    assert all(target.split(":")[1] == name for name, target in MODELS.items())


def test_list_models_matches_shell_patterns():
    assert list_models() == sorted(MODELS)
    assert list_models("vit_*_384") == sorted(name for name in MODELS if name[:4] == "vit_" and name[-4:] == "_384")
    assert "clip_vit_b_32" in list_models("clip*") and "clip_vit_b_32" not in list_models("vit*")
    assert list_models("resnet*") == []


def test_arguments_reach_the_model():
    model = fvm_fast.create_model(
        "vit_test_patch16_64", img_size=(32, 48), in_chans=1, num_classes=3, drop_path_rate=0.1
    )
    assert model(torch.zeros(2, 1, 32, 48)).shape == (2, 3)
    assert [round(getattr(block.drop_path1, "drop_prob", 0.0), 3) for block in model.blocks] == [0.0, 0.05, 0.1]


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("vit_base_patch16_225", "vit_base_patch16_224"),
        ("clip_vit_b32", "clip_vit_b_32"),
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("wit_small_patch16_224", "vit_small_patch16_224"),
    ],
)
def test_unknown_name_suggests_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=f"got '{wrong}'; did you mean.*'{nearest}'"):
        create_model(wrong)


def test_pretrained_says_where_weights_come_from():
    assert create_model("vit_test_patch16_64", pretrained=False).num_classes == 1000
    with pytest.raises(ValueError, match="nothing is downloaded, got True; build 'vit_test_patch16_64' and call"):
        create_model("vit_test_patch16_64", pretrained=True)


def test_hopeless_name_points_to_the_list():
    with pytest.raises(ValueError, match="list_models\\(\\) names them all"):
        create_model("xyz")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'ResNet'"):
        fvm_fast.models.ResNet  # noqa: B018


@pytest.mark.parametrize(
    "name, maps", [("vit_test_patch16_64", 3), ("swin_test_patch4_window4_64", 4), ("convnext_test", 4)]
)
def test_features_only_gives_the_last_blocks_or_all_stages(name, maps):
    backbone = create_model(name, features_only=True)
    found = backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in found] == backbone.feature_info.channels() and len(found) == maps
