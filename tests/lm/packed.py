"""What tests of the frozen language model share: packed batches, prefixes, 4-bit layers, bytes kept for backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.key_value_prefix import KeyValuePrefix

from .families import LENGTHS, WIDTH


def packed_inputs(lengths: list[int], width: int = WIDTH, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Random embeddings [T, D] and cu_seqlens."""
    embeds = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))
    return embeds, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_prefix(lm: FrozenLM, size: int, length: int = 5, **options: Any) -> tuple[KeyValuePrefix, list[Tensor]]:
    """Keys and values [size, length, H_kv, d] of every layer, and the same tensors in a list, which want gradients.

    Options: the `dtype`, and the `slots` of a pool.
    """
    generator, slots = torch.Generator().manual_seed(5), options.pop("slots", None)
    shapes = [(size, length, layer.num_heads, layer.head_size) for layer in lm.layers for _ in "kv"]
    leaves = [torch.randn(shape, generator=generator, requires_grad=True, **options) for shape in shapes]
    return KeyValuePrefix(tuple(leaves[::2]), tuple(leaves[1::2]), slots), leaves


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))


def states_and_gradients(
    lm: FrozenLM, lengths: list[int] = LENGTHS, *, last_only: bool = False, with_prefix: bool = False
) -> list[Tensor]:
    """States of the last positions, and gradients of the embeddings and of an injected prefix."""
    embeds, cu_seqlens = packed_inputs(lengths)
    prefix, leaves = random_prefix(lm, len(lengths), 3) if with_prefix else (None, [])
    states = lm(embeds.requires_grad_(), cu_seqlens, prefix, last_only=last_only)
    if not last_only:
        states = states[cu_seqlens[1:].long() - 1]
    probe = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return [states, *torch.autograd.grad((states * probe).sum(), [embeds, *leaves])]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """Each of them equal up to a share of its largest value."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, tolerance)


def pack_linears(model: nn.Module) -> nn.Module:
    """Every linear layer in NF4 with double quantisation, by bitsandbytes, which computes in float32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features, child.bias is not None
                packed = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed.requires_grad_(False).to("cpu"))
    return model


def saved_bytes(lm: FrozenLM, embeds: Tensor, cu_seqlens: Tensor) -> int:
    """Distinct bytes that autograd keeps beside the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*lm.parameters(), *lm.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm(embeds, cu_seqlens)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
