"""Recommending by text vectors alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from laser_fast.models.text_scorers import TextSimilarity, text_vectors

VECTORS = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=-1)


def packed(*histories: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    items = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    return items, torch.tensor([0, *map(len, histories)]).cumsum(0).to(torch.int32)


def test_last_item_alone() -> None:
    scores = TextSimilarity(VECTORS).score(*packed([1, 0], []))
    torch.testing.assert_close(scores[0], VECTORS @ VECTORS[0])
    assert torch.equal(scores[1], torch.zeros(3))


def test_newer_items_weigh_more() -> None:
    scores = TextSimilarity(VECTORS, decay=0.5).score(*packed([0, 1, 1]))
    user = F.normalize(0.25 * VECTORS[0] + 1.5 * VECTORS[1], dim=0)
    torch.testing.assert_close(scores[0], VECTORS @ user)


def test_decay_is_checked() -> None:
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 1.5"):
        TextSimilarity(VECTORS, decay=1.5)


def test_text_vectors_are_means_of_hidden_states(make_laser: Callable[..., Any], tiny_lm: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    model, inputs = make_laser()
    vectors = text_vectors(model.lm, model.builder, batch_size=7)
    assert vectors.shape == (25, 16)

    plain, tokenizer = BertModel.from_pretrained(tiny_lm).eval(), AutoTokenizer.from_pretrained(tiny_lm)
    text = inputs.dataset.items.fields["title"][3]
    hidden = plain(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(vectors[3], F.normalize(hidden.mean(0), dim=0), rtol=1e-4, atol=1e-5)
