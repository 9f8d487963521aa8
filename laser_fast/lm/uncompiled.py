"""Functions that `torch.compile` leaves as they are, called inside of what it compiles.

A packed batch is planned on the host by the lengths of its sequences. Traced, every length would become a guard, and
every batch would be compiled anew.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def uncompiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator, as `torch.compiler.disable`, which would import the compiler for everybody who imports this."""
    disabled: Callable[Arguments, Result] | None = None

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:  # nobody compiles
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function, reason="it is planned on the host, batch by batch")
        return disabled(*args, **kwargs)

    return call
