"""Attention with queries and keys rotated in one launch: whose it is, and that it changes no number."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.llama import modeling_llama

from laser_fast.lm.execution import rotary_attention as rotary_attention_module
from laser_fast.lm.execution.execution import Execution, apply_execution
from laser_fast.lm.execution.rotary_attention import (
    AttentionForm,
    recognise_rotary_attention,
    rotary_attention,
    rotary_widths,
)
from laser_fast.lm.frozen_lm import FrozenLM

from ..families import FAMILIES, LENGTHS, REFUSED, WIDTH, random_model
from ..packed import assert_all_close, pack_linears, packed_inputs, states_and_gradients

RECOGNISED = ("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2")
RECOGNISED += ("gemma3_text", "phi3", "olmo", "smollm3", "starcoder2", "stablelm", "nemotron", "granite", "exaone4")
RECOGNISED += ("seed_oss", "granitemoe", "phimoe", "eurobert", "nomic_bert")


def small_model(name: str = "llama", **changes: Any) -> Any:
    return random_model(name, **changes).requires_grad_(False)


def attention_of(model: Any, layer: int = 0) -> Any:
    return model.layers[layer].self_attn


def fused_modules(model: nn.Module) -> list[nn.Module]:
    """Modules with our forward."""
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    return [module for module, forward in forwards.items() if getattr(forward, "func", None) is rotary_attention]


def without_rotation(lm: FrozenLM) -> FrozenLM:
    """The same with the attention modules as transformers has them."""
    for module in fused_modules(lm.model):
        del module.forward
    return lm


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Heads of queries and of keys of every rotation that ran in one launch."""
    seen: list[tuple[int, int]] = []
    own = rotary_attention_module.rotary_embedding

    def counted(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((query.shape[1], key.shape[1]))
        return own(query, key, cos, sin)

    monkeypatch.setattr(rotary_attention_module, "rotary_embedding", counted)
    return seen


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_families_are_recognised_by_what_their_attention_computes(name: str) -> None:
    lm = FrozenLM(random_model(name))
    found = lm.replaced.attentions
    assert found == len(fused_modules(lm.model)) == (len(lm.layers) if name in RECOGNISED else 0)


@pytest.mark.parametrize("with_prefix", [False, True], ids=["text", "injected"])
@pytest.mark.parametrize("last_only", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("name", RECOGNISED)
def test_no_number_changes(name: str, last_only: bool, with_prefix: bool, rotations: list[tuple[int, int]]) -> None:
    lm = FrozenLM(random_model(name))
    if with_prefix and not lm.causal:
        pytest.skip("an encoder takes no injected prefix")
    states_and_gradients(lm)  # as the first call tries the model, the heads of its layers are known behind it
    heads = [(4, layer.num_heads) for layer in lm.layers]
    rotations.clear()
    actual = states_and_gradients(lm, last_only=last_only, with_prefix=with_prefix)
    assert [both for both in rotations if both[0]] == heads
    rotations.clear()
    expected = states_and_gradients(without_rotation(lm), last_only=last_only, with_prefix=with_prefix)
    assert not rotations
    assert_all_close(actual, expected)


def test_the_spared_last_layer_computes_queries_of_the_last_positions_alone(rotations: list[tuple[int, int]]) -> None:
    lm = FrozenLM(small_model())
    states_and_gradients(lm)
    rotations.clear()
    rows: list[int] = []
    attention_of(lm.model, 1).q_proj.register_forward_hook(lambda module, given, _: rows.append(given[0].shape[-2]))
    states_and_gradients(lm, last_only=True)
    assert rotations == [(4, 2), (0, 2), (4, 2)]  # the last layer first for its keys, then for its queries
    assert rows == [len(LENGTHS)]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_tables_narrower_than_a_head(factor: float, rotations: list[tuple[int, int]]) -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": factor}
    model = small_model("phi3", rope_parameters=rope)
    lm = FrozenLM(model)
    states_and_gradients(lm)
    rotations.clear()
    actual = states_and_gradients(lm)
    assert lm.replaced.attentions == len(rotations) == 2
    assert 8 * factor in attention_of(model).forward.args[1].widths
    assert_all_close(actual, states_and_gradients(without_rotation(lm)))


Rotate = Callable[..., tuple[Tensor, Tensor]]


def first_half_of_the_tables(own: Rotate) -> Rotate:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return own(q, k, *(table[..., : table.shape[-1] // 2].repeat(1, 1, 2) for table in (cos, sin)))

    return rotate


HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "interleaved": lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2),
    "other sign": lambda x: torch.cat((x.chunk(2, dim=-1)[1], -x.chunk(2, dim=-1)[0]), dim=-1),
}
ROTATIONS: dict[str, Callable[[Rotate], Rotate]] = {
    "scaled": lambda own: lambda q, k, *tables: (1.001 * own(q, k, *tables)[0], own(q, k, *tables)[1]),
    "only queries": lambda own: lambda q, k, *tables: (own(q, k, *tables)[0], k),
    "first half of the tables": first_half_of_the_tables,
}


def test_the_unchanged_model_is_recognised() -> None:
    form = recognise_rotary_attention(attention_of(small_model()), ())
    assert form == AttentionForm(8, None, False, frozenset({8}), {"dropout": 0.0, "scaling": 8**-0.5})


@pytest.mark.parametrize("name", [*HALVES, *ROTATIONS])
def test_another_rotation_is_not_recognised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in HALVES:
        monkeypatch.setattr(modeling_llama, "rotate_half", HALVES[name])
    else:
        own = modeling_llama.apply_rotary_pos_emb
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ROTATIONS[name](own))
    assert recognise_rotary_attention(attention_of(small_model()), ()) is None


def test_clipped_projections_are_not_recognised() -> None:
    assert [FrozenLM(small_model("olmo", clip_qkv=clip)).replaced.attentions for clip in (None, 1000.0)] == [2, 0]


Forward = Callable[..., Any]


def by_position(own: Forward) -> Forward:
    """The scale of a sequence grows beyond 8192 positions."""

    def forward(self: Any, hidden_states: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        hidden_states = hidden_states * (1 + (position_ids // 8192).log1p())[..., None]
        return own(self, hidden_states, position_ids=position_ids, **kwargs)

    return forward


def option_of_the_input(own: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return own(self, hidden_states, softcap=float(hidden_states.abs().max()), **kwargs)

    return forward


MORE: dict[str, Callable[[Forward], Forward]] = {
    "by position": by_position,
    "option of the input": option_of_the_input,
    "option that is a tensor": lambda own: lambda *args, **kwargs: own(*args, s_aux=torch.ones(4), **kwargs),
    "drops a mask": lambda own: lambda *args, **kwargs: own(*args, **kwargs | {"attention_mask": None}),
    "more after the output": lambda own: lambda *args, **kwargs: (own(*args, **kwargs)[0].relu(), None),
}


@pytest.mark.parametrize("change", MORE)
def test_a_module_that_does_more_is_not_recognised(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = modeling_llama.LlamaAttention
    monkeypatch.setattr(cls, "forward", MORE[change](cls.forward))
    assert recognise_rotary_attention(attention_of(small_model()), ()) is None


OWN: dict[str, Callable[[Any], object]] = {
    "trained": lambda module: module.q_proj.requires_grad_(True),
    "hooked": lambda module: module.o_proj.register_forward_hook(lambda *_: None),
    "more weights": lambda module: setattr(module, "gate", nn.Linear(2, 2).requires_grad_(False)),
    "one norm": lambda module: setattr(module, "q_norm", modeling_llama.LlamaRMSNorm(8).requires_grad_(False)),
    "a forward of somebody": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("change", OWN)
def test_a_module_with_something_of_its_own_is_not_recognised(change: str) -> None:
    module = attention_of(small_model())
    OWN[change](module)
    assert recognise_rotary_attention(module, ()) is None


def test_recognition_changes_neither_the_module_nor_the_random_numbers() -> None:
    model = small_model("qwen3")
    module = attention_of(model)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    attributes = dict(vars(module))
    assert recognise_rotary_attention(module, rotary_widths(model)) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(module) == attributes and model.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_calls_that_were_not_tried_run_as_transformers_has_them(rotations: list[tuple[int, int]]) -> None:
    plain, model = small_model(), small_model()
    assert apply_execution(model, Execution(last_layer="all")).attentions == 2
    rotations.clear()  # of the recognition
    embeds = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    for implementation, rows in (("eager", 1), ("eager", 2), ("sdpa", 2)):  # no exchanged attention; two sequences
        plain.set_attn_implementation(implementation), model.set_attn_implementation(implementation)
        states = [each(inputs_embeds=embeds[:rows], use_cache=False).last_hidden_state for each in (plain, model)]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    caches = [each(inputs_embeds=embeds[:1], use_cache=True).past_key_values for each in (plain, model)]
    torch.testing.assert_close(caches[0].layers[1].keys, caches[1].layers[1].keys, rtol=1e-5, atol=1e-5)
    assert not rotations
    model.set_attn_implementation("sdpa")
    model(inputs_embeds=embeds[:1], use_cache=False)
    assert len(rotations) == 2


def test_a_model_without_values_is_recognised() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("llama", **FAMILIES["llama"]))
        inputs = torch.empty(9, WIDTH, requires_grad=True), torch.empty(3, dtype=torch.int32)
    lm = FrozenLM(model)
    states = lm(*inputs, last_only=True)
    assert lm.replaced.attentions == 2
    assert states.shape == (2, WIDTH)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_projections_in_four_bits(rotations: list[tuple[int, int]]) -> None:
    lm = FrozenLM(pack_linears(small_model()))
    assert lm.replaced.attentions == 2
    rotations.clear()
    actual = states_and_gradients(lm, last_only=True)
    assert rotations
    assert_all_close(actual, states_and_gradients(without_rotation(lm), last_only=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "stablelm"])
def test_on_a_gpu_it_errs_at_most_twice_as_much_as_transformers(name: str) -> None:
    embeds, cu_seqlens = (tensor.cuda() for tensor in packed_inputs(LENGTHS))
    probe = torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1)).cuda()

    def both(lm: FrozenLM, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = embeds.to(dtype).requires_grad_()
        states = lm(leaf, cu_seqlens)
        return states.detach(), torch.autograd.grad((states * probe.to(dtype)).sum(), leaf)[0]

    exact = [x.double() for x in both(without_rotation(FrozenLM(random_model(name).cuda())), torch.float32)]
    half = [FrozenLM(random_model(name).to("cuda", torch.bfloat16)) for _ in range(2)]
    fused, plain = both(half[0], torch.bfloat16), both(without_rotation(half[1]), torch.bfloat16)
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        error, allowed = (float((x.double() - true).norm() / true.norm()) for x in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps
