"""Norms and gated MLPs of a frozen model on our kernels, in Triton's interpreter: their numbers and their bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN

from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.execution.frozen_linear import UnpackedWeights
from laser_fast.lm.execution.frozen_mlp import gated_mlp, recognise_gated_mlp
from laser_fast.lm.execution.frozen_norm import frozen_rms_norm
from laser_fast.ops import gated_product, rms_norm
from laser_fast.ops.rms_norm import NormKind

from ..packed import assert_all_close
from .test_execution import PLAIN, hidden_and_gradients

TOKENS, WIDTH, INNER = 5, 16, 40
KIND = NormKind(0.0, True, 1e-6)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernels serve tensors on the CPU; the names of the operations they served, in order."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("runs the kernels in Triton's interpreter, and here they are compiled for the GPU")
    names: list[str] = []

    def serve(name: str) -> Callable[..., bool]:
        return lambda *_: names.append(name) is None

    monkeypatch.setattr(gated_product, "triton_serves", serve("product"))
    monkeypatch.setattr(rms_norm, "_kernel_serves", serve("norm"))
    return names


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama", "full"), ("llama", "mlp"), ("gemma2", "none"), ("phi3", "none"), ("phi3", "mlp")],
)
def test_a_model_on_the_kernels_gives_the_numbers_of_the_plain_one(
    name: str, checkpointing: str, served: list[str]
) -> None:
    lengths = [3, 1, 5]  # the interpreter takes its time
    expected = hidden_and_gradients(name, PLAIN, lengths)
    assert not served
    assert_all_close(hidden_and_gradients(name, Execution(checkpointing=checkpointing), lengths), expected, 2e-5)
    assert set(served) == {"norm", "product"}


class Mlp(nn.Module):
    """A gated MLP of two matrices, or of one as in Phi-3."""

    def __init__(self, *, joint: bool, act: str = "silu") -> None:
        super().__init__()
        self.act_fn = ACT2FN[act]
        if joint:
            self.gate_up_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        else:
            self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NewBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made, dead or alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._known: dict[int, Any] = {}  # storages are held, so that no address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs))
        output = func(*args, **(kwargs or {}))
        self.total += self._meet(output)
        return output

    def _meet(self, values: Any) -> int:
        storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        fresh = {storage._cdata: storage for storage in storages if storage._cdata not in self._known}
        self._known |= fresh
        return sum(storage.nbytes() for storage in fresh.values())


def _backward_bytes(output: Tensor, x: Tensor) -> int:
    grad = torch.ones_like(output)
    with NewBytes() as made:
        torch.autograd.grad(output, x, grad)
    return made.total


@pytest.mark.parametrize("joint", [False, True], ids=["two-matrices", "one-matrix"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "behind-a-norm"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_bytes_kept_and_bytes_made_in_backward(recompute: bool, normed: bool, joint: bool, served: list[str]) -> None:
    mlp, unpacked = Mlp(joint=joint), UnpackedWeights()
    activation = recognise_gated_mlp(mlp)
    assert activation == "silu"
    norm: Any = nn.RMSNorm(WIDTH, eps=KIND.eps).requires_grad_(False)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in [*mlp.parameters(), *norm.parameters()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = frozen_rms_norm(norm, KIND, x) if normed else x
        output = gated_mlp(mlp, activation, unpacked, recompute, states)
    row = 4 * TOKENS
    inner, width, scale = row * INNER, row * WIDTH, row
    expected_kept = 2 * inner if not recompute else 0
    expected_kept += width + scale if normed else (width if recompute else 0)  # the input, of the norm or of the MLP
    assert sum(size for address, size in kept.items() if address not in weights) == expected_kept

    # the gradient of the product; gate and up again or their gradients, in one place; the input's, of either matrix
    made = inner + 2 * inner + (width if joint else 2 * width)
    if not joint and not recompute:
        made += width  # autograd adds the two up in a third
    if normed:
        made += width + (width if recompute else 0)  # the norm's own, and its output again
    assert _backward_bytes(output, x) == made
    assert served.count("product") == 2


@pytest.mark.parametrize("joint", [False, True], ids=["two-matrices", "one-matrix"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_rehearsal_without_values_makes_the_bytes_of_the_kernels(
    recompute: bool, joint: bool, served: list[str]
) -> None:
    made = []
    for device in ("cpu", "meta"):
        mlp: Any = Mlp(joint=joint).to(device)
        norm: Any = nn.RMSNorm(WIDTH, eps=KIND.eps, device=device).requires_grad_(False)
        x = torch.zeros(1, TOKENS, WIDTH, device=device, requires_grad=True)
        with NewBytes() as forward:
            output = gated_mlp(mlp, "silu", UnpackedWeights(), recompute, frozen_rms_norm(norm, KIND, x))
        made.append((forward.total, _backward_bytes(output, x)))
    assert made[0] == made[1]
    assert made[0][0] == 4 * TOKENS * (2 * WIDTH + 1 + 3 * INNER)
    assert served == ["norm", "product", *(["norm"] if recompute else []), "product", "norm"]


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
@pytest.mark.parametrize("joint", [False, True], ids=["two-matrices", "one-matrix"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_every_activation_has_its_gradient_and_overwrites_nothing(
    recompute: bool, joint: bool, act: str, served: list[str]
) -> None:
    mlp, x = Mlp(joint=joint, act=act), torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    activation = recognise_gated_mlp(mlp)
    assert activation is not None
    output = gated_mlp(mlp, activation, UnpackedWeights(), recompute, x)
    expected = mlp(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    first, second = (torch.autograd.grad(output, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(expected, x, grad)[0], rtol=1e-5, atol=1e-6)
    assert served.count("product") == (0 if act == "relu" else 3)


def test_a_normalised_tensor_that_was_written_to_is_not_made_again_from_its_norm() -> None:
    mlp, norm = Mlp(joint=False), nn.RMSNorm(WIDTH, eps=KIND.eps).requires_grad_(False)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    states = frozen_rms_norm(norm, KIND, x)
    states.mul_(3.0)
    output = gated_mlp(mlp, "silu", UnpackedWeights(), True, states)
    expected = torch.autograd.grad(mlp(3.0 * norm(x)).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], expected, rtol=1e-4, atol=1e-6)
