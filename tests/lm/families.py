"""Tiny random models of many families, and docs/language-models.md, which says what became of each.

`python tests/lm/families.py` writes that page anew.
"""

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from laser_fast.lm.frozen_lm import FrozenLM

PAGE = Path(__file__).resolve().parents[2] / "docs" / "language-models.md"
WIDTH = 32
LENGTHS = [7, 1, 23, 18]
PREFIX = 3
PADDING = 4
_BASE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_WINDOW = {"sliding_window": 5}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# transformers' model_type -> its configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | _WINDOW,
    "ministral": _HEADS | _WINDOW,
    "mixtral": _GROUPED | _EXPERTS,
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "qwen3_moe": _HEADS | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "gemma": _HEADS,
    "gemma2": _HEADS | _WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    "gemma3_text": _HEADS | _WINDOW,
    "gpt_oss": _HEADS | _WINDOW | _EXPERTS,
    "phi": _BASE,
    "phi3": _GROUPED,
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "opt": _BASE | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "gpt_neox": _BASE,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": _HEADS | _WINDOW,
    "smollm3": _GROUPED,
    "starcoder2": _GROUPED,
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
    "nemotron": _GROUPED,
    "granite": _GROUPED,
    "deepseek_v3": _BASE
    | {"num_key_value_heads": 4, "head_dim": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "first_k_dense_replace": 2, "moe_intermediate_size": 16}
    | {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "glm": _HEADS,
    "glm4": _HEADS,
    "cohere2": _HEADS | _WINDOW,
    "exaone4": _HEADS | _WINDOW,
    "ernie4_5": _HEADS,
    "seed_oss": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "granitemoe": _GROUPED | _EXPERTS,
    "phimoe": _GROUPED | _EXPERTS,
    "llama4_text": _HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 2},
    "gpt_bigcode": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "modernbert-decoder": _BASE | {"local_attention": 6},
    "bert": _BASE,
    "roberta": _BASE,
    "xlm-roberta": _BASE,
    "distilbert": {"dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 61},
    "electra": _BASE | {"embedding_size": WIDTH},
    "albert": _BASE | {"embedding_size": WIDTH},
    "modernbert": _BASE | {"local_attention": 6},
    "eurobert": _GROUPED,
    "camembert": _BASE,
    "nomic_bert": _BASE,
    # what cannot run packed, each for a reason of its own
    "lfm2": _HEADS | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _HEADS | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma4_text": _HEADS | _WINDOW | {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8},
    "diffllama": _GROUPED,
    "gptj": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64, "rotary_dim": 4},
    "falcon": _BASE | {"new_decoder_architecture": False, "multi_query": True},
    "mpnet": _BASE,
    "deberta-v2": _BASE,
    "bloom": {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": 61},
    "mamba": {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4},
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61},
}
REFUSED = ("lfm2", "qwen3_next", "gemma4_text", "diffllama", "gptj", "falcon", "mpnet", "deberta-v2", "bloom", "mamba")
REFUSED += ("t5",)


@dataclass(frozen=True)
class Outcome:
    """How a model got on with prefixes in front of packed texts, against one padded sequence after the other through
    its own eager attention.

    Attributes:
        state_error: largest difference over the largest value, of the last states.
        gradient_error: the same of the gradients of the prefixes and of the texts.
        injected_errors: both errors once more with the prefixes as keys and values in front of every layer; None for an
            encoder, in which that would be another model.
        effect: how much another prefix changes the last states; small = the errors would not show.
        lm: the packed model.
    """

    state_error: float
    gradient_error: float
    injected_errors: tuple[float, float] | None
    effect: float
    lm: FrozenLM


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model with weights so large that attention matters, its configuration changed so."""
    config = AutoConfig.for_model(name, **copy.deepcopy(FAMILIES[name] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


@cache
def try_family(name: str) -> Outcome:
    """Run it both ways."""
    generator = torch.Generator().manual_seed(3)
    texts = torch.randn(sum(LENGTHS), WIDTH, generator=generator).requires_grad_()
    prefixes = torch.randn(len(LENGTHS), PREFIX, WIDTH, generator=generator).requires_grad_()
    lm = FrozenLM(random_model(name))
    reference = random_model(name)
    packed = lm(torch.cat(rows_of(prefixes, texts)), _boundaries(PREFIX), last_only=True)
    alone = torch.stack([last_state(reference, row) for row in rows_of(prefixes, texts)])
    probe = torch.randn(packed.shape, generator=generator)

    def errors(states: Tensor) -> tuple[float, float]:
        ours, theirs = (
            torch.autograd.grad((each * probe).sum(), [prefixes, texts], retain_graph=True) for each in (states, alone)
        )
        return _difference(states, alone), max(map(_difference, ours, theirs))

    state_error, gradient_error = errors(packed)
    injected = errors(lm(texts, _boundaries(0), lm.key_values(prefixes), last_only=True)) if lm.causal else None
    other = torch.randn(prefixes.shape, generator=generator)
    changed = lm(torch.cat(rows_of(other, texts)), _boundaries(PREFIX), last_only=True)
    effect = float((changed - packed).detach().norm() / packed.detach().norm())
    return Outcome(state_error, gradient_error, injected, effect, lm)


def rows_of(prefixes: Tensor, texts: Tensor) -> list[Tensor]:
    """Every prefix with its text behind it: [P + length, D] each."""
    return [torch.cat([prefix, text]) for prefix, text in zip(prefixes, texts.split(LENGTHS), strict=True)]


def last_state(model: PreTrainedModel, row: Tensor) -> Tensor:
    """State of the last row, in a sequence that is padded on the right."""
    padded = torch.cat([row, torch.zeros(PADDING, WIDTH)])[None]
    mask = (torch.arange(padded.shape[1]) < len(row)).long()[None]
    state: Tensor = model(inputs_embeds=padded, attention_mask=mask).last_hidden_state[0, len(row) - 1]
    return state


def _boundaries(added: int) -> Tensor:
    return torch.tensor([0, *(length + added for length in LENGTHS)]).cumsum(0).to(torch.int32)


def page() -> str:
    """The text of docs/language-models.md, from trying every family."""
    lines = [
        "# Language models",
        "",
        "Any Hugging Face encoder or decoder runs frozen and packed if its attention can be exchanged and nothing",
        "else looks across positions. Whether that is so is found out with a model's first batch: two short",
        "sequences go through it packed and alone, and a difference is an error. The families below were tried with",
        "tiny random weights: prefixes of their own in front of packed texts against one padded sequence after the",
        "other through transformers' own eager attention, last states and gradients of the prefixes. In decoders the",
        "prefixes were injected as keys and values as well. Fused is what was recognised by what it computes: norms,",
        "MLPs, and the rotation of queries and keys in one launch; the rest runs as in transformers. This page is",
        "written by `python tests/lm/families.py`; a test fails when it is out of date.",
        "",
        "| family (`model_type`) | kind | prefix | fused | positions |",
        "|---|---|---|---|---|",
    ]
    refused = ["", "## Refused", "", "| family | because |", "|---|---|"]
    for name in FAMILIES:
        try:
            outcome = try_family(name)
        except (RuntimeError, ValueError) as error:
            reason = str(error).removeprefix("FrozenLM: ").split(", got")[0]
            refused.append(f"| {name} | {reason} |")
            continue
        found = outcome.lm.replaced
        kinds = {"RMSNorm": found.norms, "gated MLP": found.mlps, "rotation": found.attentions}
        fused = [text for text, count in kinds.items() if count]
        start = outcome.lm.first_position
        lines.append(
            f"| {name} | {'decoder | embeddings or injected' if outcome.lm.causal else 'encoder | embeddings'} "
            f"| {', '.join(fused) if fused else 'nothing'} | from {start} |"
        )
    return "\n".join([*lines, *refused, ""])


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
