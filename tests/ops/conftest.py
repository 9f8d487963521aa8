"""What the tests of all operations share: a look at what runs inside one, and the kernels without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READBACKS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal"}


class InnerOperations(TorchDispatchMode):
    """Records what runs, inside laser_fast's operations too.

    Attributes:
        names: operators called, in order.
        largest: elements of the largest tensor that any of them returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        if func.namespace == "laser_fast":
            with self:  # a mode is off while it handles a call: switch it on again for the operation's body
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    @property
    def readbacks(self) -> list[str]:
        """Operators among `names` that wait for a GPU and read its memory."""
        return [name for name in self.names if name in _READBACKS]


@pytest.fixture
def inner_operations() -> type[InnerOperations]:
    return InnerOperations


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the Triton kernels serve CPU tensors, in Triton's interpreter, for one test.

    Returns the names of the operations that were served by a kernel, in the order of the calls.
    """
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("runs the kernels in Triton's interpreter, and here they are compiled for the GPU")
    from laser_fast.ops import dispatch, rotary, routing

    served: list[str] = []

    def serves(operation: str, *tensors: Tensor, num_experts: int = 1) -> bool:
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return False
        served.append(operation)
        return True

    for module in (routing, dispatch, rotary):
        monkeypatch.setattr(module, "triton_serves", serves)
    return served
