"""Which dtypes a module may be moved to, said where it is moved and not by a product deep inside of it."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn


def refuse_dtypes(
    module: nn.Module, move: Callable[[Tensor], Tensor], remedy: str, *, allowed: Collection[torch.dtype] = ()
) -> None:
    """Refuse what `nn.Module._apply` is told to do where it gives a tensor another dtype that is not `allowed`.

    Nothing is moved: `move` is tried on an empty tensor of every dtype that the module holds. A move to another device
    passes.

    Raises:
        TypeError: it does; the message ends with the remedy.
    """
    held = {tensor.dtype for tensors in (module.parameters(), module.buffers()) for tensor in tensors}
    for dtype in sorted(held, key=str):
        moved = move(torch.empty(0, dtype=dtype)).dtype
        if moved not in (dtype, *allowed):
            raise TypeError(f"{type(module).__name__}: parameters must stay {dtype}, got a move to {moved}; {remedy}")
