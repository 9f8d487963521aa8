"""Modules that are used but never trained: a language model, an ID-based recommender."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

Self = TypeVar("Self", bound="FrozenModule")


class FrozenModule(nn.Module):
    """A module that is not trained, stays in evaluation mode, and leaves its weights out of every `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self._state_prefix: str | None = None
        self.register_load_state_dict_post_hook(_forget_missing_keys)

    def freeze(self: Self) -> Self:
        """Stop gradients into every parameter and switch off dropout."""
        self.requires_grad_(False)
        return self.eval()

    def train(self: Self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout in a frozen model would be noise in the features."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._state_prefix = prefix


def _forget_missing_keys(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, FrozenModule) and module._state_prefix is not None
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.startswith(module._state_prefix)
    ]
