"""Which weights something was made of: a number that whoever keeps what is derived from weights remembers with it."""

import threading
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

_Seen = tuple[tuple[int, ...], ...]


class WeightsVersion:
    """Counts the changes of the parameters of a module and of all modules in it.

    It reads no values, so it is cheap enough for every request: about 0.2 us a parameter. It goes by what torch counts
    (an optimizer's step, `load_state_dict`, every write in place), by where a tensor lies, and by which modules and
    parameters there are. A write that torch does not count (through `.data`, or by another library, into the same
    memory) is not seen; who writes so tells torch: `torch.autograd.graph.increment_version(parameter)`.

    Args:
        module: whose weights they are.
        buffers: whether its buffers count as weights.
    """

    def __init__(self, module: nn.Module, *, buffers: bool = False) -> None:
        self._module = module
        self._buffers = buffers
        self._count = 0
        self._forget()

    def _forget(self) -> None:
        self._seen: _Seen | None = None
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tables: list[Mapping[str, Tensor | None]] = []
        self._lock = threading.Lock()

    def now(self) -> int:
        """The version: another number after every change."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._count += self._seen is not None  # at the first look there is nothing that is older
                self._seen = seen
            return self._count

    def adopt(self) -> None:
        """Say that what changed since the last look is where the weights lie, not what they are."""
        with self._lock:
            self._seen = self._look()

    def _look(self) -> _Seen:
        if not self._tables or any(table != known for table, known in self._children):
            modules = list(self._module.modules())
            self._children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
            self._tables = [module._parameters for module in modules]
            self._tables += [module._buffers for module in modules if self._buffers]
        tensors = [tensor for table in self._tables for tensor in table.values() if tensor is not None]
        return tuple(map(id, tensors)), tuple(map(Tensor.data_ptr, tensors)), _versions(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which counts on from here; its owner calls `adopt` once the copied module is whole."""
        self.now()
        return {name: getattr(self, name) for name in ("_module", "_buffers", "_count")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(attrgetter("_version"), tensors))
    except RuntimeError:  # tensors that were made in inference mode are not counted
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
