# SPDX-License-Identifier: Apache-2.0
"""What stands behind the stages of a hierarchical model: pooling, norm, classifier."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fvm_fast.layers.activation import get_act_layer
from fvm_fast.layers.pointwise_conv import PointwiseConv

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(dim=(1, 2)),
    "max": lambda x: x.amax(dim=(1, 2)),
    "avgmax": lambda x: 0.5 * (x.mean(dim=(1, 2)) + x.amax(dim=(1, 2))),
    "": lambda x: x,
}


class ClassifierHead(nn.Module):
    """Pools a map, norms, and classifies; without pooling it classifies every place.

    Args:
        in_features: channels of the map.
        num_classes: width of the result; 0 leaves the classifier out.
        hidden_size: width of a hidden layer before the classifier; None for none.
        global_pool: ``avg``, ``max``, ``avgmax``, or ``""``.
        drop_rate: dropout before the classifier.
        norm_layer: constructor of a norm over the last dimension; None for none.
        act_layer: activation of the hidden layer, by name or class.
        input_fmt: ``NCHW`` or ``NHWC``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_size: int | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        input_fmt: str = "NCHW",
    ) -> None:
        super().__init__()
        if input_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"input_fmt should be 'NCHW' or 'NHWC', got {input_fmt!r}")
        self.input_fmt = input_fmt
        self.in_features = in_features
        self.num_features = hidden_size or in_features
        self.global_pool = _checked_pool(global_pool)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(in_features)
        self.pre_logits = nn.Identity()
        if hidden_size:
            fc, act = self._linear(in_features, hidden_size), get_act_layer(act_layer)()
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=act))
        self.drop = nn.Dropout(drop_rate)
        self.fc = self._linear(self.num_features, num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A map -> logits [B, num_classes], or with ``pre_logits`` the features [B, num_features] that they come from.

        Without pooling both stay maps, in the format of the input.
        """
        channels_first = self.input_fmt == "NCHW"
        x = _POOLS[self.global_pool](x.permute(0, 2, 3, 1) if channels_first else x)
        x = self.drop(self.pre_logits(self.norm(x)))
        x = x if pre_logits else self.fc(x)
        return x.permute(0, 3, 1, 2) if channels_first and x.ndim == 4 else x

    def reset(
        self, num_classes: int, global_pool: str | None = None, *, like: Tensor, in_features: int | None = None
    ) -> None:
        """A fresh classifier, and another pooling if given.

        Args:
            num_classes: 0 for none.
            global_pool: as in the constructor; None leaves it.
            like: a tensor of the device and dtype wanted.
            in_features: if given, norm and hidden layer are removed and the map has this many channels.
        """
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        if in_features is not None:
            self.in_features = self.num_features = in_features
            self.norm, self.pre_logits = nn.Identity(), nn.Identity()
        factory = {"device": like.device, "dtype": like.dtype}
        if isinstance(self.pre_logits, nn.Sequential):
            old = self.pre_logits.fc
            new = self._linear(self.in_features, self.num_features, **factory)
            new.load_state_dict({"weight": old.weight.reshape(new.weight.shape), "bias": old.bias})
            self.pre_logits.fc = new.requires_grad_(old.weight.requires_grad)
        self.fc = self._linear(self.num_features, num_classes, **factory)

    def _linear(self, in_features: int, out_features: int, **factory: Any) -> nn.Module:
        """A Linear; with a convolution's weight where there is no pooling, as checkpoints have it."""
        if out_features == 0:
            return nn.Identity()
        return (nn.Linear if self.global_pool else PointwiseConv)(in_features, out_features, **factory)


def _checked_pool(global_pool: str) -> str:
    if global_pool not in _POOLS:
        raise ValueError(f"global_pool should be one of {', '.join(map(repr, _POOLS))}, got {global_pool!r}")
    return global_pool
