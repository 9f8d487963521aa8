"""Models of many families, packed, against one sequence after the other; and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from laser_fast.lm import packing_check
from laser_fast.lm.execution.execution import Execution
from laser_fast.lm.frozen_lm import FrozenLM

from .families import FAMILIES, PAGE, REFUSED, page, random_model, try_family

SERVED = [name for name in FAMILIES if name not in REFUSED]


@pytest.mark.parametrize("name", SERVED)
def test_packed_behind_prefixes_as_one_after_the_other(name: str) -> None:
    outcome = try_family(name)
    assert outcome.state_error < 1e-4 and outcome.gradient_error < 1e-4  # float32; seen: below 2e-6
    if outcome.lm.causal:
        assert outcome.injected_errors is not None and max(outcome.injected_errors) < 1e-4
    assert outcome.effect > 0.02  # or an error of the prefixes would not show


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffllama", "DiffLlamaModel must call its attention once in every layer, got 4 calls in 2 layers"),
        ("gemma4_text", "Gemma4TextModel must run on input embeddings alone and without a cache, got RuntimeError: It"),
        ("gptj", "GPTJModel must call transformers' AttentionInterface, got no call"),
        ("lfm2", "Lfm2Model must give a sequence the same states packed with others as alone, got a difference of"),
    ],
)
def test_the_reason_is_named(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^FrozenLM: {message}"):
        try_family(name)


def test_the_page_in_the_documentation_says_what_is_refused_and_is_up_to_date() -> None:
    text = page()
    refused = text.partition("## Refused")[2]
    assert [name for name in FAMILIES if f"| {name} |" in refused] == list(REFUSED)
    assert PAGE.read_text(encoding="utf-8") == text


def test_positions_behind_a_padding_index_are_found() -> None:
    lm = FrozenLM(random_model("roberta"))
    assert lm.first_position == 1 + 0 and lm.max_length == 64  # the padding index is 0 here
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    with pytest.raises(ValueError, match="FrozenLM: a sequence must have at most 63 tokens .*, got 64"):
        lm(torch.randn(64, 32), cu_seqlens)


def test_threads_that_make_the_first_call_together_get_the_same() -> None:
    from concurrent.futures import ThreadPoolExecutor

    embeds, cu_seqlens = torch.randn(12, 32), torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = FrozenLM(random_model("roberta"))(embeds, cu_seqlens)
    for _ in range(5):
        lm = FrozenLM(random_model("roberta"))
        with ThreadPoolExecutor(4) as pool:
            for states in pool.map(lambda _, lm=lm: lm(embeds, cu_seqlens), range(4)):  # type: ignore[misc]
                assert torch.equal(states, expected)


@pytest.mark.parametrize("name", ["roberta", "llama", "bert"])
def test_autocast_has_no_say_in_whether_a_model_can_run_packed(name: str) -> None:
    lm = FrozenLM(random_model(name))
    with torch.autocast("cpu", torch.bfloat16):
        assert lm.first_position == int(name == "roberta")


def deep_model() -> PreTrainedModel:
    """A Llama of 64 layers in bfloat16 whose products have the scale of an 8B model with its initial weights."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, num_hidden_layers=64, initializer_range=0.02 * 32**0.5, **sizes)
        return AutoModel.from_config(config, dtype=torch.bfloat16)


def test_rounding_that_many_layers_add_up_is_no_reason_to_refuse() -> None:
    model, plain = deep_model(), Execution(fused=False)
    assert FrozenLM(model, plain).first_position == 0
    model.layers[0].input_layernorm = Neighbours(model.layers[0].input_layernorm)  # type: ignore[index, union-attr]
    with pytest.raises(RuntimeError, match="LlamaModel must give a sequence the same states packed with others"):
        FrozenLM(model, plain).first_position  # noqa: B018


def test_no_position_behind_the_last_is_tried() -> None:
    model = random_model("llama")
    for padding, tried in ((3, [0, 4]), (model.config.max_position_embeddings - 4, [0])):
        model.embed_tokens.padding_idx = padding  # type: ignore[union-attr, assignment]
        assert packing_check._candidates(model) == tried


class Neighbours(nn.Module):
    """Adds the row before to every row: what a convolution does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + hidden.roll(1, dims=1))  # type: ignore[no-any-return]


def test_layers_that_mix_neighbours_are_found() -> None:
    model = random_model("llama")
    model.layers[0].input_layernorm = Neighbours(model.layers[0].input_layernorm)  # type: ignore[index, union-attr]
    lm = FrozenLM(model)
    message = "LlamaModel must give a sequence the same states packed with others as alone, got a difference of"
    for _ in range(2):  # the second call is refused as well
        with pytest.raises(RuntimeError, match=message):
            lm(torch.randn(4, 32), torch.tensor([0, 4], dtype=torch.int32))
    assert model.config._attn_implementation == "laser_varlen"
