"""What the frozen model does between its products: 4-bit weights unpacked, RMSNorm, the gated product.

Sizes are those of an 8B Llama and 4,096 packed tokens. The other forms are those of Hugging Face, of torch, of
bitsandbytes and of liger-kernel, where these are installed.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from forms import CompareForms, CompileForms, Form
from timing import Captured, clock_of
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from workloads import Case

from laser_fast.nn.frozen_linear import UnpackedWeights
from laser_fast.nn.frozen_mlp import gated_mlp
from laser_fast.nn.frozen_norm import frozen_rms_norm, recognise_norm

from .conftest import Compare

PASSES = ("forward", "forward+backward")  # backward alone cannot be timed of forms that overwrite what they kept
_EPS = 1e-5


class Rows(NamedTuple):
    """Packed tokens and their width."""

    device: str
    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * self.dtype.itemsize


class Matrix(NamedTuple):
    """A weight in 4 bits, and the dtype in which it is used."""

    device: str
    outputs: int
    inputs: int
    dtype: torch.dtype


def cases(cpu: NamedTuple, gpu: NamedTuple) -> list[Case]:
    return [Case("cpu", "plain", cpu), Case("gpu", "graph", gpu)]  # type: ignore[arg-type]


NORMS = cases(Rows("cpu", 64, 256, torch.float32), Rows("cuda", 4096, 4096, torch.bfloat16))
PRODUCTS = cases(Rows("cpu", 64, 704, torch.float32), Rows("cuda", 4096, 14336, torch.bfloat16))
WEIGHTS = cases(Matrix("cpu", 256, 128, torch.float32), Matrix("cuda", 14336, 4096, torch.bfloat16))


def has_liger(shape: Rows) -> bool:
    """Its kernels are Triton's, which run on a GPU."""
    return shape.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def random_rows(shape: Rows, count: int) -> list[Tensor]:
    """Leaves."""
    generator = torch.Generator(shape.device).manual_seed(0)
    draw = {"generator": generator, "device": shape.device}
    return [torch.randn(shape.tokens, shape.width, **draw).to(shape.dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", NORMS, ids=str, indirect=True)
def test_rms_norm(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    """Reads and writes the rows; backward reads two tensors and writes one."""
    shape: Rows = case.workload  # type: ignore[assignment]
    inputs = random_rows(shape, 1)
    module = LlamaRMSNorm(shape.width, eps=_EPS).to(shape.device, shape.dtype).requires_grad_(False)
    kind = recognise_norm(module)
    assert kind is not None
    forms = {
        "hugging_face": Form(module, inputs),
        "torch": Form(lambda x: F.rms_norm(x, (shape.width,), module.weight, _EPS), inputs),
    }
    baselines = forms | compiled({"hugging_face": forms["hugging_face"]})
    if has_liger(shape):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        weight = module.weight.detach()
        baselines["liger"] = Form(lambda x: LigerRMSNormFunction.apply(x, weight, _EPS, 0.0, "llama", False), inputs)
    moved = {"forward": 2, "forward+backward": 5}[name] * shape.nbytes
    compare_forms(case, name, Form(lambda x: frozen_rms_norm(module, kind, x), inputs), baselines, moved_bytes=moved)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", PRODUCTS, ids=str, indirect=True)
def test_gated_product(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    """`silu(gate) * up`: reads two tensors and writes one; backward reads three and writes two."""
    shape: Rows = case.workload  # type: ignore[assignment]
    inputs = random_rows(shape, 2)

    def candidate(gate: Tensor, up: Tensor) -> Tensor:
        """An MLP whose linear layers are done, or have nothing to do."""
        layers = {"gate_proj": lambda _: gate, "up_proj": lambda _: up, "down_proj": lambda product: product}
        return gated_mlp(SimpleNamespace(**layers, act_fn=F.silu), "silu", UnpackedWeights(), False, gate)

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    baselines = {"eager": Form(eager, inputs)} | compiled({"eager": Form(eager, inputs)})
    if has_liger(shape):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # its backward writes the gradients over its inputs
        own = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        baselines["liger"] = Form(
            LigerSiLUMulFunction.apply,
            own,
            comparable=lambda gate, up: LigerSiLUMulFunction.apply(gate.clone(), up.clone()),
        )
    moved = {"forward": 3, "forward+backward": 8}[name] * shape.nbytes
    compare_forms(case, name, Form(candidate, inputs), baselines, moved_bytes=moved)


@pytest.mark.parametrize("case", WEIGHTS, ids=str, indirect=True)
def test_unpack(case: Case, compare: Compare) -> None:
    """NF4 with double quantisation: reads half a byte and about an eighth of a bit a weight, writes its dtype."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes")
    shape: Matrix = case.workload  # type: ignore[assignment]
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(shape.inputs, shape.outputs, bias=False, quant_type="nf4")
    with torch.no_grad():
        layer.weight.data = layer.weight.data.to(shape.dtype)
    layer = layer.requires_grad_(False).to(shape.device)
    weight = layer.weight

    def ours() -> Tensor:
        return UnpackedWeights().unpack(layer)

    def theirs() -> Tensor:
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)

    assert torch.equal(ours(), theirs())
    runs = {"candidate": ours, "bitsandbytes": theirs}
    if case.mode == "graph":
        runs = {name: Captured(lambda run=run: run) for name, run in runs.items()}
    absmax = weight.quant_state.absmax
    compare(
        runs.pop("candidate"),
        runs,
        moved_bytes=weight.data.nbytes + absmax.nbytes + shape.outputs * shape.inputs * shape.dtype.itemsize,
        clock=clock_of(case.mode, torch.device(shape.device)),
        mode=case.mode,
        shape={**shape._asdict(), "dtype": str(shape.dtype)},
    )
