"""On a GPU: kernels of norms and gated MLPs, 4-bit weights, inputs of layers in host memory."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config

from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 61}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "gemma2": Gemma2Config(**SIZES, **HEADS),
    "phi3": Phi3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0),  # one matrix for both
}
LENGTHS = [130, 1, 77, 300]
SHORT = [130, 1, 77, 200]  # FlashAttention's backward adds up blocks of 128 keys in any order, of which two are alike


def states_and_gradient(
    name: str, execution: Execution, dtype: torch.dtype, lengths: list[int] = LENGTHS
) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    lm = FrozenLM(model.to("cuda", dtype), execution)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(sum(lengths), 256, generator=generator).to("cuda", dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    states = lm(embeds, cu_seqlens, last_only=True)
    probe = torch.randn(states.shape, generator=generator).to("cuda", dtype)
    return states.detach(), torch.autograd.grad((states * probe).sum(), embeds)[0]


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "full", "offload"])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_kernels_err_at_most_twice_as_much_as_eager_modules(name: str, checkpointing: str) -> None:
    plain = Execution(fused=False, last_layer="all")
    exact = [tensor.double() for tensor in states_and_gradient(name, plain, torch.float32)]
    eager = states_and_gradient(name, plain, torch.bfloat16)
    fused = states_and_gradient(name, Execution(checkpointing=checkpointing), torch.bfloat16)
    for ours, theirs, truth in zip(fused, eager, exact, strict=True):
        assert error(ours, truth) <= 2 * error(theirs, truth) + torch.finfo(torch.bfloat16).eps


def test_offloaded_inputs_come_back_as_they_went() -> None:
    kept = states_and_gradient("llama", Execution(checkpointing="full"), torch.bfloat16, SHORT)
    for _ in range(5):  # copies that race would not fail every time
        away = states_and_gradient("llama", Execution(checkpointing="offload"), torch.bfloat16, SHORT)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(away, kept, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_four_bit_weights_give_the_gradient_of_the_weights_they_stand_for() -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from laser_fast.lm.execution.frozen_linear import UnpackedWeights, packed_linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 512)
    module: Any = Linear4bit(256, 512, compute_dtype=torch.bfloat16, quant_type="nf4")
    module.load_state_dict(linear.state_dict())
    module = module.requires_grad_(False).to("cuda")
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).double()
    for rows in (1, 64, 3000):  # bitsandbytes has a fused product for few rows
        x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
        y = packed_linear(module, UnpackedWeights(), x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert error(y, x.detach().double() @ weight.T + module.bias.double()) < 1e-2
        assert error(grad, torch.ones_like(y, dtype=torch.float64) @ weight) < 1e-2


def test_full_checkpointing_needs_less_memory_than_none() -> None:
    peaks = {}
    for checkpointing in ("none", "full"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        states_and_gradient("llama", Execution(checkpointing=checkpointing), torch.bfloat16)
        peaks[checkpointing] = torch.cuda.max_memory_allocated() - before
    assert peaks["full"] < peaks["none"]
