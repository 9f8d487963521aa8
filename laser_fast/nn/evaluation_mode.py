"""Evaluation without dropout on one thread: `module.eval()` would switch the mode for a training thread as well."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _Calls(threading.local):
    def __init__(self) -> None:
        self.evaluating = False  # no default of the class: what torch.compile made would go on with it


_calls = _Calls()


@contextmanager
def evaluating() -> Iterator[None]:
    """Make `draws_dropout` false on this thread."""
    before = _calls.evaluating
    _calls.evaluating = True
    try:
        yield
    finally:
        _calls.evaluating = before


def draws_dropout(module: nn.Module) -> bool:
    """Whether a module draws dropout now; modules that answer requests ask this instead of `module.training`."""
    return module.training and not _calls.evaluating


def refuse_torch_modes(function: str, module: nn.Module) -> None:
    """Raise RuntimeError for a torch module in training mode that computes something else in it.

    `evaluating` does not reach such a module (dropout, batch norm). The message begins with `function`.
    """
    for part in module.modules():
        if part.training and type(part).__module__.startswith("torch."):
            draws = getattr(part, "p", 0.0) if isinstance(part, _DROPOUTS) else getattr(part, "dropout", 0.0)
            if draws or isinstance(part, _BatchNorm):
                raise RuntimeError(
                    f"{function}: a {type(part).__name__} must be in evaluation mode to answer, got training; "
                    "call its method eval first"
                )
