"""Measures that the tests of all operations share: row-wise error, and a look at what runs inside an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READBACKS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal"}


class InnerOperations(TorchDispatchMode):
    """Records what runs, inside laser_fast's operations too, in the form that serves any device.

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
def worst_row_error() -> Callable[[Tensor, Tensor], float]:
    """Largest relative L2 error over rows (last dimension); the second argument is exact, in float64."""

    def measure(actual: Tensor, exact: Tensor) -> float:
        assert exact.dtype == torch.float64
        assert actual.shape == exact.shape
        if exact.numel() == 0:
            return 0.0
        actual, exact = actual.detach(), exact.detach()
        scale = exact.norm(dim=-1).clamp_min(1e-30)
        return float(((actual.double() - exact).norm(dim=-1) / scale).max())

    return measure
