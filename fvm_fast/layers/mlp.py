# SPDX-License-Identifier: Apache-2.0
"""The feed-forward half of a transformer block."""

from collections.abc import Callable

from torch import Tensor, nn

from fvm_fast.layers.activation import get_act_layer


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` on every token by itself.

    Args:
        in_features: width of a token.
        hidden_features: width between the two layers; ``in_features`` by default.
        out_features: width of the result; ``in_features`` by default.
        act_layer: name or class of the activation, GELU by default.
        bias: whether both layers have one.
        drop: dropout after the activation and after ``fc2``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: str | Callable[[], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = get_act_layer(act_layer)()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))
