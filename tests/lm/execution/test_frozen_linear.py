"""Linear layers in 4 bits: values and gradients of the weights they stand for, and when a weight is unpacked."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laser_fast.lm.execution import frozen_linear
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.execution.frozen_linear import UnpackedWeights, is_frozen_linear, is_packed, packed_linear
from laser_fast.lm.frozen_lm import FrozenLM

from ..families import random_model
from ..packed import pack_linears, packed_inputs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
LAYERS = 3
PER_LAYER = 7  # q, k, v, o, gate, up, down
TWICE = 2 * LAYERS * PER_LAYER


def packed_llama(execution: Execution) -> FrozenLM:
    return FrozenLM(pack_linears(random_model("llama", num_hidden_layers=LAYERS)), execution)


def dequantised(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def gradient(lm: FrozenLM) -> Tensor:
    embeds, cu_seqlens = packed_inputs([5, 9, 2])
    hidden = lm(embeds.requires_grad_(), cu_seqlens)
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((hidden * probe).sum(), embeds)
    return grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_dequantised_weight(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module: Any = pack_linears(nn.Sequential(nn.Linear(64, 96, bias=bias)))[0]  # type: ignore[index]
    assert is_packed(module) and is_frozen_linear(module)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    y = packed_linear(module, UnpackedWeights(), x)
    assert y.dtype == dtype
    probe = torch.randn(3, 5, 96)
    (grad,) = torch.autograd.grad((y.float() * probe).sum(), x)
    weight = dequantised(module)
    exact = nn.functional.linear(x.detach().float(), weight, module.bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.float(), exact, rtol=tolerance, atol=tolerance)
    expected = probe.to(dtype).float() @ weight
    torch.testing.assert_close(grad.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_the_weights_are_never_repacked_by_a_call_without_gradient() -> None:
    """What bitsandbytes' own forward does on CPUs with bfloat16 instructions, after which there is no gradient."""
    lm = packed_llama(Execution())
    before = {name: module.weight.data.clone() for name, module in lm.named_modules() if is_packed(module)}
    assert len(before) == LAYERS * PER_LAYER
    for module in lm.modules():
        if is_packed(module):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        lm(*packed_inputs([4]))
    assert float(gradient(lm).abs().max()) > 0
    assert all(torch.equal(lm.get_submodule(name).weight.data, weight) for name, weight in before.items())


@pytest.mark.parametrize(
    ("execution", "times"),
    [
        (Execution(), TWICE),  # forward and backward
        (Execution(checkpointing="mlp"), TWICE),  # gate and up: forward, and once for recomputation and gradient
        (Execution(checkpointing="full"), TWICE),
        # a recomputation ends before the down projection, and the last layer has none
        (Execution(checkpointing="full", share_dequantization=False), TWICE + (LAYERS - 1) * (PER_LAYER - 1)),
    ],
    ids=["none", "mlp", "full-shared", "full"],
)
def test_how_often_a_weight_is_unpacked(execution: Execution, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    unpack = frozen_linear._unpack

    def counted(module: Any) -> Tensor:
        calls.append(module)
        return unpack(module)

    lm = packed_llama(execution)
    expected = gradient(packed_llama(Execution()))
    assert lm.first_position == 0  # found with calls of its own, which are not counted
    monkeypatch.setattr(frozen_linear, "_unpack", counted)
    actual = gradient(lm)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert len(calls) == times


def test_nothing_unpacked_outlives_a_step() -> None:
    lm = packed_llama(Execution(checkpointing="full"))
    gradient(lm)
    (unpacked,) = {module.forward.args[1] for module in lm.modules() if is_packed(module)}  # type: ignore[union-attr]
    assert unpacked._kept == {}


def test_an_adapter_is_no_frozen_linear_layer() -> None:
    class Adapted(nn.Linear):
        """Computes more than its product."""

    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert is_frozen_linear(frozen)
    assert not is_frozen_linear(nn.Linear(4, 4))  # trained
    assert not is_frozen_linear(Adapted(4, 4).requires_grad_(False))
    frozen.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not is_frozen_linear(frozen)
    assert not is_frozen_linear(None)
