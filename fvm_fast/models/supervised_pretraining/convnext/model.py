# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt, a convolutional network drawn up like a hierarchical transformer, in both its versions.

    x = norm(conv4x4, stride 4 (image))                        stem
    x = conv2x2, stride 2 (norm(x))                            between stages
    x = x + gamma * fc2(gelu(fc1(norm(dwconv7x7(x)))))         block of version 1
    x = x + fc2(grn(gelu(fc1(norm(dwconv7x7(x))))))            block of version 2
    y = fc(norm(mean of x over all places))                    head

A ConvNet for the 2020s, https://arxiv.org/abs/2201.03545
ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, https://arxiv.org/abs/2301.00808
Arguments and state-dict names are timm's, so its checkpoints load as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fvm_fast.layers.activation import activation_name, get_act_layer
from fvm_fast.layers.backbone import IMAGENET_MEAN, IMAGENET_STD
from fvm_fast.layers.classifier_head import ClassifierHead
from fvm_fast.layers.image_normalize import ImageNormalize
from fvm_fast.layers.staged_backbone import StagedBackbone, check_images
from fvm_fast.models.supervised_pretraining.convnext.block import ConvNeXtStage
from fvm_fast.models.supervised_pretraining.convnext.stem import STEMS, OverlapStem, PatchStem

_NORMS = {"layernorm": nn.LayerNorm, "layernorm2d": nn.LayerNorm, "rmsnorm": nn.RMSNorm, "rmsnorm2d": nn.RMSNorm}


class ConvNeXt(StagedBackbone):
    """ConvNeXt and ConvNeXt V2.

    Args:
        in_chans: channels of an image.
        num_classes: width of the head; 0 leaves the classifier out and the model returns pooled features.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""``: then the head works on every place of the last map.
        output_stride: 32, or 16 or 8: later stages are dilated and keep their size, for dense prediction.
        depths, dims: blocks and channels of each stage.
        kernel_sizes: of the depthwise convolutions; one, or one per stage.
        ls_init_value: initial gain ``gamma`` of each branch; None leaves it out (version 2).
        stem_type: ``patch``, or two overlapping 3 x 3 convolutions: ``overlap``, ``overlap_tiered`` (the first half as
            wide), ``overlap_act`` (an activation between).
        patch_size: side of a patch of the ``patch`` stem in pixels.
        head_init_scale: factor of the classifier's initial weights.
        head_norm_first: norm before the pooling instead of after it.
        head_hidden_size: width of a hidden layer in the head; None for none.
        conv_mlp: the MLPs' weights are those of 1 x 1 convolutions (timm's sizes below tiny); the result is the same.
        conv_bias: whether the convolutions have biases.
        use_grn: global response norm in the MLPs (version 2).
        act_layer: activation of the MLPs, by name or class.
        norm_layer: ``layernorm`` (None), ``rmsnorm``, or a constructor of a norm over the last dimension.
        norm_eps: epsilon of the norms named so; None for 1e-6.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        block_norm_eps: epsilon of all norms but the last, where it differs (transformers: 1e-6, and 1e-12 at the end).
        img_size: side or (height, width) that ``default_cfg`` reports; images of any size are taken.
        image_mean, image_std: per channel for images in [0, 1]; with them the model takes uint8 images too.
    """

    first_conv = "stem.0"
    crop_pct = 0.875

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: int | Sequence[int] = 7,
        ls_init_value: float | None = 1e-6,
        stem_type: str = "patch",
        patch_size: int = 4,
        head_init_scale: float = 1.0,
        head_norm_first: bool = False,
        head_hidden_size: int | None = None,
        conv_mlp: bool = False,
        conv_bias: bool = True,
        use_grn: bool = False,
        act_layer: str | Callable[[], nn.Module] = "gelu",
        norm_layer: str | Callable[[int], nn.Module] | None = None,
        norm_eps: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        *,
        block_norm_eps: float | None = None,
        img_size: int | Sequence[int] = 224,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check(output_stride, depths, dims, stem_type, head_norm_first and head_hidden_size)
        norm_eps = 1e-6 if norm_eps is None else norm_eps
        head_norm = _norm_layer(norm_layer, norm_eps)
        block_norm = _norm_layer(norm_layer, norm_eps if block_norm_eps is None else block_norm_eps)
        kernel_sizes = [kernel_sizes] * len(depths) if isinstance(kernel_sizes, int) else kernel_sizes
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.set_input_size(img_size)

        self.normalize = ImageNormalize(image_mean, image_std)
        if stem_type == "patch":
            self.stem = PatchStem(in_chans, dims[0], patch_size, conv_bias, block_norm)
        else:
            self.stem = OverlapStem(in_chans, dims[0], stem_type, conv_bias, get_act_layer(act_layer), block_norm)

        drop_path = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages, self.feature_info = nn.Sequential(), []
        for i, (stride, dilation, reduction) in enumerate(_geometry(self.stem.stride, output_stride, len(depths))):
            stage = ConvNeXtStage(
                dims[max(i - 1, 0)],
                dims[i],
                stride,
                dilation,
                drop_path[i].tolist(),
                conv_bias=conv_bias,
                norm_layer=block_norm,
                kernel_size=kernel_sizes[i],
                conv_mlp=conv_mlp,
                use_grn=use_grn,
                ls_init_value=ls_init_value,
                act_layer=act_layer,
            )
            self.stages.append(stage)
            self.feature_info.append({"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"})

        self.norm_pre = head_norm(self.num_features) if head_norm_first else nn.Identity()
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            hidden_size=head_hidden_size,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=None if head_norm_first else head_norm,
        )
        self.init_weights(head_init_scale)

    def init_weights(self, head_init_scale: float = 1.0) -> None:
        """Truncated normal of deviation 0.02 for convolutions and Linears, the head's times ``head_init_scale``."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.startswith("head.") and isinstance(module, nn.Linear):
                module.weight.data.mul_(head_init_scale)

    def embed(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W], float and normalised or uint8 -> [B, dims[0], H / 4, W / 4], rounded down."""
        check_images(images, smallest=self.feature_info[-1]["reduction"])
        return self.stem(images, self.normalize)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that assign parameters to depths, for layer-wise learning rates."""
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm_pre", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @property
    def numerics(self) -> dict[str, Any]:
        """What must match for equal weights to give equal outputs; it travels with exported weights."""
        last = self.head.norm if isinstance(self.norm_pre, nn.Identity) else self.norm_pre
        block = self.stages[0].blocks[0]
        values = {"norm_eps": getattr(last, "eps", None), "block_norm_eps": getattr(block.norm, "eps", None)}
        values["act"] = activation_name(block.mlp.act)
        return {name: value for name, value in values.items() if value is not None}


def _check(
    output_stride: int, depths: Sequence[int], dims: Sequence[int], stem_type: str, two_heads: int | None
) -> None:
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride should be 8, 16 or 32, got {output_stride}")
    if len(depths) != len(dims):
        raise ValueError(f"depths and dims should have one number per stage, got {tuple(depths)} and {tuple(dims)}")
    if stem_type not in STEMS:
        raise ValueError(f"stem_type should be one of {', '.join(map(repr, STEMS))}, got {stem_type!r}")
    if two_heads:
        raise ValueError("head_hidden_size needs the norm after the pooling; leave out head_norm_first")


def _norm_layer(norm: str | Callable[[int], nn.Module] | None, eps: float) -> Callable[[int], nn.Module]:
    if norm is not None and not isinstance(norm, str):
        return norm
    if (norm or "layernorm") not in _NORMS:
        raise ValueError(f"norm_layer should be one of {', '.join(map(repr, _NORMS))} or a constructor, got {norm!r}")
    return partial(_NORMS[norm or "layernorm"], eps=eps)


def _geometry(stem_stride: int, output_stride: int, num_stages: int) -> Iterator[tuple[int, tuple[int, int], int]]:
    """Of each stage: stride and dilations (downsampling, blocks), and pixels of the image per cell of its map."""
    reduction, dilation = stem_stride, 1
    for i in range(num_stages):
        stride = 2 if i > 0 or stem_stride == 2 else 1
        if stride == 2 and reduction >= output_stride:
            stride, dilation = 1, 2 * dilation
        reduction *= stride
        yield stride, (1 if dilation <= 2 else 2, dilation), reduction


TEST = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 96)}
ATTO = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320)}
FEMTO = {"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384)}
PICO = {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512)}
NANO = {"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640)}
TINY = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
SMALL = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
BASE = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
LARGE = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}
XLARGE = {"depths": (3, 3, 27, 3), "dims": (256, 512, 1024, 2048)}
HUGE = {"depths": (3, 3, 27, 3), "dims": (352, 704, 1408, 2816)}


def _convnext(overrides: dict[str, Any], sizes: dict[str, Any], **more: Any) -> ConvNeXt:
    if overrides.get("in_chans", 3) == 3:
        more = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD} | more
    return ConvNeXt(**sizes | more | overrides)


def _convnextv2(overrides: dict[str, Any], sizes: dict[str, Any], **more: Any) -> ConvNeXt:
    return _convnext(overrides, sizes, use_grn=True, ls_init_value=None, **more)


def convnext_test(**kwargs: Any) -> ConvNeXt:
    """A size for tests and laptops: 0.30 M parameters."""
    return _convnext(kwargs, TEST, img_size=64)


def convnext_atto(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-A, 3.7 M parameters."""
    return _convnext(kwargs, ATTO, conv_mlp=True)


def convnext_femto(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-F, 5.2 M parameters."""
    return _convnext(kwargs, FEMTO, conv_mlp=True)


def convnext_pico(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-P, 9.1 M parameters."""
    return _convnext(kwargs, PICO, conv_mlp=True)


def convnext_nano(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-N, 15.6 M parameters."""
    return _convnext(kwargs, NANO, conv_mlp=True)


def convnext_tiny(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-T, 28.6 M parameters."""
    return _convnext(kwargs, TINY)


def convnext_small(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-S, 50.2 M parameters."""
    return _convnext(kwargs, SMALL)


def convnext_base(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-B, 88.6 M parameters."""
    return _convnext(kwargs, BASE)


def convnext_large(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-L, 197.8 M parameters."""
    return _convnext(kwargs, LARGE)


def convnext_xlarge(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt-XL, 350.2 M parameters."""
    return _convnext(kwargs, XLARGE)


def convnextv2_test(**kwargs: Any) -> ConvNeXt:
    """A size for tests and laptops: 0.30 M parameters."""
    return _convnextv2(kwargs, TEST, conv_mlp=True, img_size=64)


def convnextv2_atto(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-A, 3.7 M parameters."""
    return _convnextv2(kwargs, ATTO, conv_mlp=True)


def convnextv2_femto(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-F, 5.2 M parameters."""
    return _convnextv2(kwargs, FEMTO, conv_mlp=True)


def convnextv2_pico(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-P, 9.1 M parameters."""
    return _convnextv2(kwargs, PICO, conv_mlp=True)


def convnextv2_nano(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-N, 15.6 M parameters."""
    return _convnextv2(kwargs, NANO, conv_mlp=True)


def convnextv2_tiny(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-T, 28.6 M parameters."""
    return _convnextv2(kwargs, TINY)


def convnextv2_small(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-S, 50.3 M parameters."""
    return _convnextv2(kwargs, SMALL)


def convnextv2_base(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-B, 88.7 M parameters."""
    return _convnextv2(kwargs, BASE)


def convnextv2_large(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-L, 198.0 M parameters."""
    return _convnextv2(kwargs, LARGE)


def convnextv2_huge(**kwargs: Any) -> ConvNeXt:
    """ConvNeXt V2-H, 660.3 M parameters; timm's weights are for 384 px."""
    return _convnextv2(kwargs, HUGE, img_size=384)
