"""Evaluation for one call: without dropout on this thread, whatever the mode of the modules.

`module.eval()` and back would switch the mode for every thread that uses the module, a training loop among them.
"""

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
    """While this is open, no module that asks `draws_dropout` draws any on this thread."""
    before = _calls.evaluating
    _calls.evaluating = True
    try:
        yield
    finally:
        _calls.evaluating = before


def draws_dropout(module: nn.Module) -> bool:
    """Whether a module is to draw its dropout now: in training mode, and nobody evaluates on this thread.

    Every place that draws dropout in what requests run asks this instead of `module.training`.
    """
    return module.training and not _calls.evaluating


def refuse_torch_modes(function: str, module: nn.Module) -> None:
    """Make sure that no module of torch in this one acts otherwise in training: `evaluating` does not reach it.

    Args:
        function: the first word of the message.

    Raises:
        RuntimeError: one does, and is in training mode.
    """
    for part in module.modules():
        if part.training and type(part).__module__.startswith("torch."):
            draws = getattr(part, "p", 0.0) if isinstance(part, _DROPOUTS) else getattr(part, "dropout", 0.0)
            if draws or isinstance(part, _BatchNorm):
                raise RuntimeError(
                    f"{function}: a {type(part).__name__} must be in evaluation mode to answer, got training; "
                    "call its method eval first"
                )
