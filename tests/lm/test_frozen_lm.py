"""The packed language model against Hugging Face's own padded forward, with weights large enough for errors to show."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from laser_fast.lm.exchanged_attention import ATTENTION_NAME
from laser_fast.lm.frozen_lm import FrozenLM

from .families import FAMILIES, LENGTHS, random_model
from .packed import assert_close, packed_inputs

# gemma2: soft-capped scores, every second layer with a sliding window, a scale of its own; gpt_oss: attention sinks
NAMES = ("llama", "qwen3", "bert", "gemma2", "gpt_oss")


def padded_hidden(model: PreTrainedModel, embeds: Tensor, lengths: list[int]) -> Tensor:
    """Right-padded batch through the unchanged model, the real positions packed again."""
    rows = torch.nn.utils.rnn.pad_sequence(list(embeds.split(lengths)), batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    hidden = model(inputs_embeds=rows, attention_mask=mask.long()).last_hidden_state
    return hidden[mask]


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_padded_forward_and_gradient(name: str) -> None:
    embeds, cu_seqlens = packed_inputs(LENGTHS)
    embeds.requires_grad_()
    packed = FrozenLM(random_model(name))(embeds, cu_seqlens)
    padded = padded_hidden(random_model(name), embeds, LENGTHS)
    assert_close(packed, padded)
    probe = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    assert_close(*(torch.autograd.grad((hidden * probe).sum(), embeds)[0] for hidden in (packed, padded)))


def test_no_weight_gets_a_gradient_and_dropout_stays_off() -> None:
    embeds, cu_seqlens = packed_inputs([6, 3])
    lm = FrozenLM(random_model("bert")).train()
    hidden = lm(embeds.requires_grad_(), cu_seqlens)
    hidden.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.parameters())
    assert torch.equal(hidden, lm(embeds, cu_seqlens))


def test_the_mask_that_a_model_is_handed_masks_nothing() -> None:
    lm = FrozenLM(random_model("llama"))
    masks: list[Tensor] = []
    assert lm.first_position == 0  # found with calls of its own, under masks of transformers
    lm.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    lm(*packed_inputs([6, 3]))
    assert [mask.tolist() for mask in masks] == [[[[[1.0]]]]]


def test_frozen_weights_stay_out_of_the_state() -> None:
    lm = FrozenLM(random_model("llama"))
    model = torch.nn.ModuleDict({"lm": lm, "head": torch.nn.Linear(2, 2)})
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="head.bias"):
        model.load_state_dict({"head.weight": torch.zeros(2, 2)})


def test_empty_sequences_and_empty_batches() -> None:
    lm = FrozenLM(random_model("bert"))
    embeds, _ = packed_inputs([4])
    alone = lm(embeds, torch.tensor([0, 4], dtype=torch.int32))
    torch.testing.assert_close(lm(embeds, torch.tensor([0, 0, 4, 4], dtype=torch.int32)), alone)
    assert lm(embeds[:0], torch.tensor([0], dtype=torch.int32)).shape == (0, 32)


def test_what_cannot_run_is_refused_by_name() -> None:
    lm = FrozenLM(random_model("bert"))
    embeds, cu_seqlens = packed_inputs([65])
    with pytest.raises(
        ValueError, match="at most 64 tokens with its prefix and suffix, got 65; lower prompt.max_tokens"
    ):
        lm(embeds, cu_seqlens)
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[T, 32\], got \(65, 16\)"):
        lm(embeds[:, :16], cu_seqlens)


def test_an_option_nobody_has_is_refused_by_name() -> None:
    lm = FrozenLM(random_model("llama"))
    attention = AttentionInterface()[ATTENTION_NAME]
    tokens = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="must not use a head mask, got head_mask=1"):
        attention(lm.model, tokens, tokens, tokens, None, head_mask=1)


def test_calling_the_model_past_the_wrapper_is_refused() -> None:
    lm = FrozenLM(random_model("llama"))
    with pytest.raises(RuntimeError, match="must be called through FrozenLM, got a direct call"):
        lm.model(input_ids=torch.zeros(1, 3, dtype=torch.long))


def test_embeddings_are_the_models_own() -> None:
    model = random_model("llama")
    lm = FrozenLM(model)
    ids = torch.tensor([4, 60, 0])
    assert torch.equal(lm.embed(ids), F.embedding(ids, model.get_input_embeddings().weight))
    assert lm.embedding_rms == pytest.approx(
        float(model.get_input_embeddings().weight.square().mean().sqrt()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", AutoModelForCausalLM),
        ("llama", AutoModelForSequenceClassification),
        ("bert", AutoModelForMaskedLM),
        ("bert", AutoModelForSequenceClassification),
        ("gemma2", AutoModelForCausalLM),
    ],
)
def test_of_a_model_with_a_head_the_base_is_taken_and_the_head_let_go(name: str, kind: type) -> None:
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(name, **FAMILIES[name]))
    base = copy.deepcopy(model.base_model)
    heads = [weakref.ref(child) for child in model.children() if child is not model.base_model]
    assert heads
    embeds, bounds = torch.randn(9, 32), torch.tensor([0, 4, 9], dtype=torch.int32)
    lm, expected = FrozenLM(model), FrozenLM(base)(embeds, bounds)
    assert torch.equal(lm(embeds, bounds), expected)
    del model
    gc.collect()
    assert all(head() is None for head in heads)


def test_models_without_a_usable_base_are_refused_by_name() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61}
    t5 = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=61)
    refused = {
        "an encoder or a decoder, got the encoder-decoder": T5ForConditionalGeneration(t5),
        "a base with a table of token embeddings and no head, got BartForCausalLM; load": BartForCausalLM(
            BartConfig(**sizes, decoder_attention_heads=2, encoder_attention_heads=2)
        ),
    }
    for message, model in refused.items():
        with pytest.raises(ValueError, match=f"FrozenLM: the model must (be|have) {message}"):
            FrozenLM(model)
    wrapped = torch.nn.Sequential(random_model("llama"))
    with pytest.raises(TypeError, match=r"must be one of transformers .*, got a Sequential; hand in the model inside"):
        FrozenLM(wrapped)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma2"])
def test_moved_to_another_dtype_it_is_the_model_in_that_dtype(name: str, dtype: torch.dtype) -> None:
    lm, exact = FrozenLM(random_model(name)), FrozenLM(random_model(name).double())
    embeds, bounds = torch.randn(9, 32), torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = exact(embeds, bounds)
    before = lm(embeds, bounds)
    moved = lm.to(dtype)(embeds, bounds)
    assert lm.dtype == moved.dtype == dtype and before.dtype == torch.float32
    # a few roundings per layer
    assert float((moved - expected).norm() / expected.norm()) < 16 * torch.finfo(dtype).eps + 1e-6
