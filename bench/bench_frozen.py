"""What the frozen model does between its products: weights unpacked, RMSNorm, the gated product, rotation.

Sizes are those of an 8B Llama and 4,096 packed tokens. The other forms are those of Hugging Face, of torch, of
bitsandbytes and of liger-kernel, where these are installed.
"""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from forms import Compare, CompareForms, CompileForms, Form
from timing import Captured, clock_of
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from workloads import Case

from laser_fast.lm.execution.frozen_linear import UnpackedWeights
from laser_fast.lm.execution.frozen_mlp import gated_mlp
from laser_fast.lm.execution.frozen_norm import frozen_rms_norm, recognise_norm
from laser_fast.ops import rotary_embedding

PASSES = ("forward", "forward+backward")  # backward alone cannot be timed of forms that overwrite what they kept
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_EPS = 1e-5


class Rows(NamedTuple):
    """Packed tokens."""

    device: str
    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * self.dtype.itemsize


class Heads(NamedTuple):
    """Packed tokens, and key heads of so many numbers."""

    device: str
    tokens: int
    heads_k: int
    size: int
    dtype: torch.dtype


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
ROTATIONS = cases(Heads("cpu", 64, 2, 16, torch.float32), Heads("cuda", 4096, 8, 128, torch.bfloat16))
WEIGHTS = cases(Matrix("cpu", 256, 128, torch.float32), Matrix("cuda", 14336, 4096, torch.bfloat16))


def has_liger(shape: Rows | Heads) -> bool:
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


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("case", ROTATIONS, ids=str, indirect=True)
def test_rotary(case: Case, name: str, compiled: CompileForms, compare_forms: CompareForms) -> None:
    """Queries and keys of a layer, 4 query heads a key head: reads and writes each once, backward likewise."""
    shape: Heads = case.workload  # type: ignore[assignment]
    generator = torch.Generator(shape.device).manual_seed(0)
    draw = {"generator": generator, "device": shape.device}
    inputs = [
        torch.randn(shape.tokens, heads, shape.size, **draw).to(shape.dtype).requires_grad_()
        for heads in (4 * shape.heads_k, shape.heads_k)
    ]
    angles = (torch.rand(shape.tokens, shape.size // 2, **draw) * 6).repeat(1, 2)
    cos, sin = angles.cos().to(shape.dtype), angles.sin().to(shape.dtype)

    def heads_first(rotate: Rotate) -> Rotate:
        def packed(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            turned = rotate(query.transpose(0, 1)[None], key.transpose(0, 1)[None])
            return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

        return packed

    eager = Form(heads_first(lambda query, key: apply_rotary_pos_emb(query, key, cos[None], sin[None])), inputs)
    baselines = {"hugging_face": eager} | compiled({"hugging_face": eager})
    if has_liger(shape):
        from liger_kernel.ops.rope import LigerRopeFunction

        rope = heads_first(lambda query, key: LigerRopeFunction.apply(query, key, cos[None], sin[None]))
        own = [tensor.detach().clone().requires_grad_() for tensor in inputs]  # it rotates where they lie
        baselines["liger"] = Form(rope, own, comparable=lambda query, key: rope(query.clone(), key.clone()))
    tables = cos.nbytes + sin.nbytes
    moved = {"forward": 1, "forward+backward": 2}[name] * (2 * sum(tensor.nbytes for tensor in inputs) + tables)
    candidate = Form(lambda query, key: rotary_embedding(query, key, cos, sin), inputs)
    compare_forms(case, name, candidate, baselines, moved_bytes=moved)


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
