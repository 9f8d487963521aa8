"""Cross-entropy of a large output layer as published libraries compute it, over a table that is normalised beforehand.

Both filter or chunk over items and never hold all scores: cut-cross-entropy (Wijmans et al., arXiv:2411.09009) with
nothing filtered, and liger-kernel's fused linear cross-entropy, which makes the gradients in its forward pass.
"""

import importlib.util
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor], Tensor]  # of users [B, d]


def library_losses(items: Tensor, target: Tensor, temperature: float) -> dict[str, Loss]:
    """Those that are installed, by name, for normalised items [I, d] without gradient; their kernels need a GPU."""
    found: dict[str, Loss] = {}
    if not items.is_cuda:
        return found
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["cut_cross_entropy"] = lambda users: linear_cross_entropy(
            F.normalize(users) / temperature, items, target, filter_eps=None
        )
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda users: fused(items, F.normalize(users) / temperature, target)
    return found
