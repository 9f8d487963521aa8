"""Every way to run a step gives the numbers of the plain one, and keeps for backward what it says."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM

from ..families import FAMILIES, LENGTHS, random_model
from ..packed import assert_all_close, packed_inputs, saved_bytes, states_and_gradients

NAMES = ("llama", "qwen3", "bert", "gemma2", "gpt_oss", "mistral", "phi3", "gpt2")
PLAIN = Execution(fused=False, last_layer="all")
GATED = ("llama", "qwen3", "gemma2", "phi3")


def hidden_and_gradients(name: str, execution: Execution, *arguments: Any, **options: Any) -> list[Tensor]:
    return states_and_gradients(FrozenLM(random_model(name), execution), *arguments, **options)


@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_fused_modules_and_the_spared_last_layer_change_no_number(name: str, last_only: bool) -> None:
    expected = hidden_and_gradients(name, PLAIN)
    assert_all_close(hidden_and_gradients(name, Execution(), last_only=last_only), expected, 2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_a_prefix_is_seen_by_the_spared_last_layer(name: str) -> None:
    expected = hidden_and_gradients(name, PLAIN, with_prefix=True)
    for checkpointing in ("none", "full"):
        execution = Execution(checkpointing=checkpointing)
        actual = hidden_and_gradients(name, execution, last_only=True, with_prefix=True)
        assert_all_close(actual, expected, 2e-5)
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in expected[2:])  # the prefix matters in every layer


@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("checkpointing", ["mlp", "full", "offload"])
@pytest.mark.parametrize("name", GATED)
def test_computing_again_gives_the_same_bits(name: str, checkpointing: str, last_only: bool) -> None:
    expected = hidden_and_gradients(name, Execution(), last_only=last_only)
    actual = hidden_and_gradients(name, Execution(checkpointing=checkpointing), last_only=last_only)
    if checkpointing == "mlp":  # sums the gradients of gate and up in another order
        assert_all_close(actual, expected, 1e-6)
    else:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral", "gpt_oss", "stablelm"])  # the last hands nothing on
def test_layers_are_computed_again_whatever_is_in_them(name: str) -> None:
    expected = hidden_and_gradients(name, Execution())
    assert_all_close(hidden_and_gradients(name, Execution(checkpointing="full")), expected, 1e-6)


def test_what_is_recognised_is_recognised_by_what_it_computes() -> None:
    found = {name: FrozenLM(random_model(name)).replaced for name in NAMES}
    assert (found["llama"].norms, found["llama"].mlps) == (5, 2)
    assert (found["qwen3"].norms, found["qwen3"].mlps) == (9, 2)  # queries and keys are normalised as well
    assert (found["gemma2"].norms, found["gemma2"].mlps) == (9, 2)  # another formula, and twice a layer
    assert (found["bert"].norms, found["bert"].mlps) == (0, 0)
    assert (found["phi3"].norms, found["phi3"].mlps) == (5, 2)  # gate and up are one matrix
    assert found["gpt_oss"].norms == 5


class Cosine(torch.nn.Module):
    """An activation that no kernel knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cos()


class Doubled(torch.nn.Module):
    """Looks like an RMSNorm, computes something else."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        rows = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return 2.0 * self.weight * rows


def test_a_module_with_another_formula_keeps_its_forward() -> None:
    model: Any = random_model("llama")
    model.norm = Doubled(model.norm)
    model.layers[0].mlp.act_fn = Cosine()
    plain = FrozenLM(copy.deepcopy(model), PLAIN)
    lm = FrozenLM(model)
    assert (lm.replaced.norms, lm.replaced.mlps) == (4, 2)
    embeds, cu_seqlens = packed_inputs(LENGTHS)
    torch.testing.assert_close(lm(embeds, cu_seqlens), plain(embeds, cu_seqlens), rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_model_runs_on_its_own_weights() -> None:
    lm = FrozenLM(random_model("llama"), Execution(checkpointing="full"))
    twin = copy.deepcopy(lm)
    embeds, cu_seqlens = packed_inputs(LENGTHS)
    before = lm(embeds, cu_seqlens)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(lm(embeds, cu_seqlens), before)
    assert float(twin(embeds, cu_seqlens).abs().max()) == 0.0


def test_another_execution_takes_the_place_of_the_first() -> None:
    model = random_model("llama")
    first = FrozenLM(model, Execution(checkpointing="full"))
    embeds, cu_seqlens = packed_inputs(LENGTHS)
    expected = first(embeds, cu_seqlens)
    assert "forward" in vars(model.layers[0])
    second = FrozenLM(model, Execution(fused=False, last_layer="all"))
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    torch.testing.assert_close(second(embeds, cu_seqlens), expected, rtol=1e-5, atol=1e-5)


def bytes_per_token_and_layer(name: str, execution: Execution) -> float:
    """From models of 2 and 4 layers, in bfloat16."""
    lengths = [32] * 4
    embeds, cu_seqlens = packed_inputs(lengths)
    totals = []
    for num_layers in (2, 4):
        config = AutoConfig.for_model(name, **FAMILIES[name] | {"num_hidden_layers": num_layers})
        lm = FrozenLM(AutoModel.from_config(config, dtype=torch.bfloat16), execution)
        totals.append(saved_bytes(lm, embeds.bfloat16().requires_grad_(), cu_seqlens))
    return (totals[1] - totals[0]) / 2 / sum(lengths)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bytes_kept_for_backward_are_those_of_the_arithmetic(name: str) -> None:
    width, inner, heads, groups, size = 32, 48, 4, 2, 8
    norms = 2 * (2 * width + 4)
    attention = 2 * (2 * heads + 2 * groups) * size + 4 * heads  # query, output, key, value; one float32 a head
    if name == "qwen3":
        attention += (heads + groups) * (2 * size + 4)  # queries and keys before their norms
    gated = 2 * 2 * inner
    modes = ("none", "mlp", "full")
    measured = {mode: bytes_per_token_and_layer(name, Execution(checkpointing=mode)) for mode in modes}
    assert measured == {"none": norms + attention + gated, "mlp": norms + attention, "full": 2 * width}
    assert bytes_per_token_and_layer(name, PLAIN) > 1.3 * measured["none"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"checkpointing": "some"}, r"Execution: checkpointing must be one of \(.*\), got 'some'"),
        ({"checkpointing": "mlp", "fused": False}, 'Execution: fused must be true with checkpointing "mlp", got false'),
        ({"last_layer": "none"}, 'Execution: last_layer must be "readout" or "all", got \'none\''),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Execution(**setting)


def test_mlp_checkpointing_is_refused_where_there_is_no_gated_mlp() -> None:
    with pytest.raises(ValueError, match='checkpointing "mlp" needs gated MLPs, and BertModel has none that is known'):
        FrozenLM(random_model("bert"), Execution(checkpointing="mlp"))


def test_layers_that_are_not_marked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laser_fast.lm.execution.execution.frozen_layers", lambda model: [])
    model: PreTrainedModel = random_model("llama")
    with pytest.raises(
        ValueError, match="checkpointing must be none or mlp for LlamaModel, whose layers .* got 'full'"
    ):
        FrozenLM(model, Execution(checkpointing="full"))
