"""Small copies of modules with random weights, which are tried to find out what a module computes.

They run in float32 on the CPU, so a trial needs no values, no GPU and no global random numbers.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from laser_fast.lm.execution.frozen_linear import is_frozen_linear

TWIN_WIDTH = 8  # of the inputs and outputs of a small twin


def frozen_projections(module: nn.Module, forms: Iterable[tuple[str, ...]], *others: nn.Module) -> tuple[str, ...]:
    """The names of the first form whose first name the module has.

    Empty where these are not all frozen linear layers, where the module has parameters outside of them and of the
    `others`, or where another library gave it a forward.
    """
    names: tuple[str, ...] = next((form for form in forms if hasattr(module, form[0])), ())
    parts = [part for name in names if is_frozen_linear(part := getattr(module, name, None)) and part is not None]
    own = sum(len(list(part.parameters())) for part in (*parts, *others))
    whole = len(parts) == len(names) and len(list(module.parameters())) == own
    return names if whole and "forward" not in vars(module) else ()


def random_copy(module: nn.Module) -> Any:
    """The module with other weights."""
    return _randomised(copy.deepcopy(module).to_empty(device="cpu").float())


def small_twin(module: nn.Module, projections: tuple[str, ...], norms: Iterable[str] = ()) -> Any:
    """The module with other weights, whose projections map from and to a few numbers.

    Args:
        projections: names of its linear layers; the last one leads out.
        norms: names of its other children with weights.
    """
    twin: Any = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.training = False
    for name in projections:
        layer: Any = module._modules[name]
        sizes = (layer.in_features, TWIN_WIDTH) if name == projections[-1] else (TWIN_WIDTH, layer.out_features)
        twin._modules[name] = nn.utils.skip_init(nn.Linear, *sizes, bias=layer.bias is not None, device="cpu")
    for name in norms:
        twin._modules[name] = random_copy(getattr(module, name))
    return _randomised(twin)


def _randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
    return module
