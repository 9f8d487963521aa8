"""A custom op that eager code calls as a plain autograd function, past the dispatcher.

`torch.library.custom_op` gives an operation the schema, fake and gradient that compilation and export need. A call
through it costs several times as much Python as a `torch.autograd.Function` (`pytest bench/bench_operation.py`), for
which a GPU, whose kernel takes microseconds, would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _has_storage
from torch.autograd import forward_ad

Function = Callable[..., Any]

_PLAIN = (Tensor, torch.nn.Parameter)  # anything else, a fake tensor among them, may hold no memory to compute on


class Operation:
    """A function of tensors that has a fake and a gradient; made by `operation`, registered as a custom op is.

    Both ways of a call run the same functions, and both refuse to differentiate what has no gradient.

    Attributes:
        body: what runs, on any device; it asks `backends` for a kernel itself.
        registered: the custom op, which the dispatcher calls.
    """

    def __init__(self, name: str, body: Function) -> None:
        self.body = body
        self.registered = torch.library.custom_op(name, body, mutates_args=())
        self._function: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Function) -> Function:
        """Decorator of what gives empty results of the right shape, dtype and strides."""
        return self.registered.register_fake(fake)

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """The gradient: `setup_context(ctx, inputs, output)` saves what `backward(ctx, *grads)` needs."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        # one `forward` that does both: with a `setup_context` of its own, torch inspects the signature at every call
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self.body(*arguments)
            setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.body.__name__, (torch.autograd.Function,), methods)

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        """Neither way has a forward-mode derivative, and neither would say so: tangents would be zero or missing."""
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            name = self.body.__name__.strip("_")
            raise NotImplementedError(f"{name}: tensors must have no forward-mode tangent, got one; use backward")

    def __call__(self, *arguments: Any) -> Any:
        # the dispatcher has to see calls under a compiler or a dispatch mode, and tensors without memory of their own
        # (on the meta device, under `torch.vmap` and its like)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.registered(*arguments)
        if forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        wants_grad = False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if type(argument) not in _PLAIN or argument.is_meta or not _has_storage(argument):
                    return self.registered(*arguments)
                wants_grad = wants_grad or argument.requires_grad
        if not (wants_grad and torch.is_grad_enabled()):
            return self.body(*arguments)
        # the registered form says in backward that there is no gradient
        return self._function.apply(*arguments) if self._function else self.registered(*arguments)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None in place of the gradients that are not needed."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def operation(name: str) -> Callable[[Function], Operation]:
    """Decorator that makes an annotated function, which mutates none of its arguments, an `Operation` of that name."""
    return lambda body: Operation(name, body)
