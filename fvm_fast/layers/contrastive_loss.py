# SPDX-License-Identifier: Apache-2.0
"""open_clip's loss modules on our kernels: the same calls, without an n x m matrix of logits.

With ``world_size > 1`` both stream the other ranks' features around a ring of the default process group, and return on
every rank the loss of the joined batch. Under DDP or FSDP, which average gradients, the result is the gradient of the
joined batch, exactly what open_clip gives with ``local_loss=True, gather_with_grad=True``.
"""

import torch.distributed as dist
from torch import Tensor, nn

from fvm_fast.ops import clip_loss, siglip_loss


class ClipLoss(nn.Module):
    """Symmetric cross-entropy of CLIP (https://arxiv.org/abs/2103.00020), with open_clip's signatures.

    Args:
        local_loss: accepted; memory is O(local batch) either way. open_clip then returns each rank's own rows' mean,
            here it is the mean over all rows.
        gather_with_grad: gradients that are right after averaging over ranks. False drops the factor ``world_size``, as
            open_clip does by default: the averaged gradient is then ``1 / world_size`` of the joined batch's.
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of this process; a ``world_size`` above 1 needs an initialised default process group.
        use_horovod: not supported.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod should be False, got True; launch with torchrun instead")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features, text_features: [n, D], of unit length.
            logit_scale: inverse temperature, already exponentiated.
            logit_bias: accepted; a constant added to every logit does not change a softmax, its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.
        """
        group, reduction = _group(self.world_size), "mean" if self.gather_with_grad else "sum"
        options = {} if group is None else {"group": group, "grad_reduction": reduction}
        loss = clip_loss(image_features, text_features, logit_scale, **options)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()  # keeps the parameter in the graph, as DDP wants
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343), with open_clip's signatures.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank, world_size: of this process; a ``world_size`` above 1 needs an initialised default process group.
        dist_impl: accepted (``bidir``, ``shift``, ``reduce``, ``gather``); the features always travel around a ring.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"SigLipLoss: dist_impl should be bidir, shift, reduce or gather, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs: the sum over all n x n pairs, divided by n.

        Args:
            image_features, text_features: [n, D], of unit length.
            logit_scale: inverse temperature, already exponentiated.
            logit_bias: added to every logit; None for zero.
            output_dict: return ``{"contrastive_loss": loss}``.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip_loss(image_features, text_features, logit_scale, bias, group=_group(self.world_size))
        return {"contrastive_loss": loss} if output_dict else loss


def _group(world_size: int) -> dist.ProcessGroup | None:
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"contrastive loss: world_size {world_size} needs a process group, got none; "
            "call torch.distributed.init_process_group first, or pass world_size=1"
        )
    return dist.group.WORLD
