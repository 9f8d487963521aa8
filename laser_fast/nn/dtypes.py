"""Which dtypes a module may be moved to, checked where it is moved and not by a product deep inside."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn


def refuse_dtypes(
    module: nn.Module, move: Callable[[Tensor], Tensor], remedy: str, *, allowed: Collection[torch.dtype] = ()
) -> None:
    """Raise TypeError where `move`, an argument of `nn.Module._apply`, changes a dtype to one that is not `allowed`.

    `move` is tried on an empty tensor of each dtype that the module holds. The message ends with the remedy.
    """
    held = {tensor.dtype for tensors in (module.parameters(), module.buffers()) for tensor in tensors}
    for dtype in sorted(held, key=str):
        moved = move(torch.empty(0, dtype=dtype)).dtype
        if moved not in (dtype, *allowed):
            raise TypeError(f"{type(module).__name__}: parameters must stay {dtype}, got a move to {moved}; {remedy}")
