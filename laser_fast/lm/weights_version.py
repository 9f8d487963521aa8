"""The version of weights: a number to keep beside whatever is derived from them."""

import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Self = TypeVar("Self", bound="VersionedModule")
_Seen = tuple[tuple[int, ...], ...]
_WATCHED = "laser_watched"


class WeightsVersion:
    """Counts the changes of the parameters of a module and of all modules in it, with `buffers` of their buffers too.

    It reads no values, so every request may ask. It sees the writes that torch counts (`load_state_dict`, every write
    in place), steps of optimizers, and tensors and modules that are exchanged. It does not see a write through `.data`
    or by another library into the same memory, such as a moving average; call
    `torch.autograd.graph.increment_version(parameter)` after one.
    """

    def __init__(self, module: nn.Module, *, buffers: bool = False) -> None:
        self._module = module
        self._buffers = buffers
        self._count = 0
        self._forget()
        _count_steps()

    def _forget(self) -> None:
        self._seen: _Seen | None = None
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tables: list[Mapping[str, Tensor | None]] = []
        self._lock = threading.Lock()

    def now(self) -> int:
        """Another number after every change."""
        with self._lock:
            seen = self._look()
            # in memory that was freed meanwhile may lie another tensor with the same id and version
            if seen != self._seen or any(storage() is None for storage in self._storages):
                self._count += self._seen is not None  # the first look has nothing to compare with
                self._see(seen)
            return self._count

    def adopt(self) -> None:
        """Count nothing that changed since the last look: the weights moved and are the same."""
        with self._lock:
            self._see(self._look())

    def _see(self, seen: _Seen) -> None:
        self._seen, tensors = seen, self._tensors()
        self._storages = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        for tensor in tensors:
            setattr(tensor, _WATCHED, True)

    def _look(self) -> _Seen:
        if any(table != known for table, known in self._children):
            self._scan()
        seen = _state(self._tensors())
        if self._seen is None or seen[0] != self._seen[0]:  # other tensors may have come with more
            self._scan()
            seen = _state(self._tensors())
        return seen

    def _scan(self) -> None:
        modules = list(self._module.modules())
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._tables = [module._parameters for module in modules]
        self._tables += [module._buffers for module in modules if self._buffers]

    def _tensors(self) -> list[Tensor]:
        values = chain.from_iterable(table.values() for table in self._tables)
        return [tensor for tensor in values if tensor is not None]

    def __getstate__(self) -> dict[str, Any]:
        """A copy counts on from here; its owner calls `adopt` once the copied module is whole."""
        self.now()
        return {name: getattr(self, name) for name in ("_module", "_buffers", "_count")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()
        _count_steps()


class VersionedModule(nn.Module):
    """A module that knows the version of its weights; a move or a copy is no change."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = WeightsVersion(self)

    def _all_versions(self) -> tuple[WeightsVersion, ...]:
        return (self.weights,)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device or a dtype."""
        for version in self._all_versions():
            version.now()  # counts earlier changes
        super()._apply(fn, recurse)
        for version in self._all_versions():
            version.adopt()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Count earlier changes before a copy is made."""
        for version in self._all_versions():
            version.now()
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has the same weights elsewhere."""
        super().__setstate__(state)
        for version in self._all_versions():
            version.adopt()


def _state(tensors: list[Tensor]) -> _Seen:
    """The tensors, where they lie, and how often torch counted a write."""
    try:
        counts = tuple(map(attrgetter("_version"), tensors))
    except RuntimeError:  # one of them was made in inference mode
        counts = tuple(map(_version, tensors))
    return tuple(map(id, tensors)), tuple(map(Tensor.data_ptr, tensors)), counts


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # torch counts nothing here
        return 0


@cache
def _count_steps() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Count the step as a write, which fused optimizers and writes through `.data` do not."""
    for group in optimizer.param_groups:
        written = [parameter for parameter in group["params"] if parameter.grad is not None]
        increment_version([parameter for parameter in written if getattr(parameter, _WATCHED, False)])
