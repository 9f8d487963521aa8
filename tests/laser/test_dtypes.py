"""Moves of a model to another dtype, and calls under autocast: right, or refused by name before anything is moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from laser_fast import LaserModel
from laser_fast.lm.attention.packed_attention import varlen_attention
from laser_fast.recommenders.gru4rec import GRU4Rec
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.sasrec import SASRec

Move = Callable[[nn.Module], nn.Module]
PAPER = {"text": {"residual": False}, "objective": {"mask_history": False, "popularity": False}}
CASTS: dict[str, Move] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to with a device": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float16),
}
MOVES: dict[str, Move] = {
    "device": lambda model: model.to("cpu"),
    "the same dtype": lambda model: model.float(),
    "device and dtype": lambda model: model.to("cpu", torch.float32),
    "shared memory": lambda model: model.share_memory(),
}


def test_a_laser_keeps_its_dtypes(new_laser: Callable[..., LaserModel]) -> None:
    model = new_laser().eval()
    model.refresh_items()
    known = model.recommend([["i1", "i2"]], k=3)
    for cast in [*CASTS.values(), lambda model: model.double()]:
        with pytest.raises(
            TypeError, match=r"LaserModel: parameters must stay torch\.\w+, got a move to torch\.\w+; choose the dtype"
        ):
            cast(model)
    for move in MOVES.values():
        assert move(model) is model
    assert model.recommend([["i1", "i2"]], k=3) == known
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(value.is_meta for value in model.to_empty(device="meta").parameters())


@pytest.mark.parametrize("recommender", [SASRec(9, width=8, num_layers=1), GRU4Rec(9, width=8)], ids=["sasrec", "gru"])
def test_a_recommender_is_moved_to_float64_and_not_to_half_precision(recommender: PackedRecommender) -> None:
    history = torch.tensor([1, 2, 3]), torch.tensor([0, 3], dtype=torch.int32)
    known = recommender.score(*history)
    for cast in CASTS.values():
        with pytest.raises(
            TypeError, match=r"parameters must stay torch\.float32, got a move to torch\.\w+; its states"
        ):
            cast(recommender)
    for move in MOVES.values():
        move(recommender)
    assert torch.equal(recommender.score(*history), known)
    torch.testing.assert_close(recommender.double().score(*history).float(), known, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(recommender.float().score(*history), known, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recommender", [SASRec(9, width=8, num_layers=1), GRU4Rec(9, width=8)], ids=["sasrec", "gru"])
def test_autocast_changes_nothing_of_a_recommender(recommender: PackedRecommender) -> None:
    history = torch.tensor([1, 2, 3]), torch.tensor([0, 3], dtype=torch.int32)
    expected = recommender.states(*history), recommender.score(*history)
    with torch.autocast("cpu", torch.bfloat16):
        found = recommender.states(*history), recommender.score(*history)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_attention_over_two_dtypes_is_refused_by_name() -> None:
    query, bounds = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"must have one dtype, got torch.float32, torch.float32 and torch.float16"):
        varlen_attention(query, query, query.half(), bounds, causal=True)
    with torch.autocast("cpu", torch.bfloat16):  # which brings them into one
        assert varlen_attention(query, query, query.bfloat16(), bounds, causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [None, PAPER], ids=["residual", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_embeddings_are_float32_and_close(
    dtype: torch.dtype, config: dict[str, Any] | None, new_laser: Callable[..., LaserModel]
) -> None:
    model = new_laser(config_of=config).eval()
    model.refresh_items()
    users = torch.tensor([3, 4, 9]), torch.tensor([0, 2, 3], dtype=torch.int32)
    expected = model.encode_items(), model.score(*users)
    with torch.autocast("cpu", dtype):
        found = model.refresh_items(), model.score(*users)
    assert {value.dtype for value in (model.item_matrix, *found)} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 16 * torch.finfo(dtype).eps


def test_a_loaded_model_with_a_head_makes_a_laser_that_is_found_again(
    tiny_lm: Path, new_laser: Callable[..., LaserModel], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    headed = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, max_position_embeddings=128, **sizes))
    headed.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    made = []
    for base in (headed, tmp_path / "llama"):
        model = new_laser(base, PAPER, tokenizer=tokenizer).eval()
        made.append(model.refresh_items())
        model.save_pretrained(tmp_path / "saved")
        for again in (None, AutoModelForCausalLM.from_pretrained(tmp_path / "llama")):
            restored = LaserModel.from_pretrained(tmp_path / "saved", llm=again, tokenizer=tokenizer)
            assert torch.equal(restored.item_matrix, model.item_matrix)
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="dtype must be left out for a loaded language model, which stays as it is"):
        new_laser(headed, tokenizer=tokenizer, dtype="bfloat16")
