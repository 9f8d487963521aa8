"""A BERT's layers in the querying transformer: its hidden states come out again, and what does not fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from laser_fast.nn.mformer import MFormer
from laser_fast.nn.qformer import QFormer
from laser_fast.nn.stage1.bert_weights import initialize_qformer, initialize_text_branch, load_bert
from laser_fast.nn.stage1.text_branch import TextBranch

SIZES: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 12}


def save_bert(folder: Path, **changes: Any) -> BertModel:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(8.0)  # at the initial scale attention would hardly matter
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    bert.save_pretrained(folder)
    return bert


def test_the_text_branch_gives_berts_hidden_states(tmp_path: Path) -> None:
    bert = save_bert(tmp_path)
    qformer = QFormer(16, 3, 2, dropout=0.1).eval()
    text = TextBranch(qformer, 16, 16, max_tokens=10).eval()
    read = load_bert(str(tmp_path), qformer)
    initialize_qformer(qformer, read)
    initialize_text_branch(text, read)
    for module in (*qformer.modules(), *text.modules()):
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12  # BERT's
    with torch.no_grad():  # the map from another model's token embeddings: here they are BERT's own
        text.token_projection.weight.copy_(torch.eye(16))
        text.token_projection.bias.zero_()
    input_ids, bounds = torch.randint(0, 30, (11,)), torch.tensor([0, 4, 11], dtype=torch.int32)
    embeds = bert.embeddings.word_embeddings(input_ids)
    with torch.no_grad():
        hidden = text.alone(text.embed(embeds, bounds), bounds)
        expected = [bert(input_ids[None, first:end]).last_hidden_state[0] for first, end in ((0, 4), (4, 11))]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_queries_begin_with_berts_layers_and_cross_attention_stays(tmp_path: Path) -> None:
    bert = save_bert(tmp_path)
    mformer = MFormer(6, None, width=16, num_layers=2, num_heads=2, num_experts=2, num_queries=3, dropout=0.0)
    before = {name: value.clone() for name, value in mformer.state_dict().items()}
    initialize_qformer(mformer.qformer, load_bert(str(tmp_path), mformer.qformer))
    changed = {name for name, value in mformer.state_dict().items() if not torch.equal(value, before[name])}
    kept = set(before) - changed
    assert all("cross_attention" in name or not name.startswith("qformer.") for name in kept)
    assert not any("cross_attention" in name or not name.startswith("qformer.") for name in changed)
    # queries that read nothing are a text whose embeddings they are
    layer = mformer.qformer.blocks[0]
    queries = torch.randn(1, 3, 16)
    with torch.no_grad():
        hidden = layer.feed_forward(layer.self_attention(queries))
        expected = bert.encoder.layer[0](queries)
    torch.testing.assert_close(hidden, expected[0] if isinstance(expected, tuple) else expected, rtol=1e-4, atol=1e-4)


def test_positions_past_berts_last_stay_random(tmp_path: Path) -> None:
    save_bert(tmp_path)
    qformer = QFormer(16, 1, 2)
    text = TextBranch(qformer, 16, 5, max_tokens=20)
    before = text.positions.detach().clone()
    initialize_text_branch(text, load_bert(str(tmp_path), qformer))
    assert torch.equal(text.positions[12:], before[12:]) and not torch.equal(text.positions[:12], before[:12])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 24, "intermediate_size": 64}, "hidden_size 24"),
        ({"num_attention_heads": 4}, "num_attention_heads 4"),
        ({"intermediate_size": 32}, "intermediate_size 32"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 2"),
        ({"is_decoder": True}, "is_decoder True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bert_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    save_bert(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"must have hidden_size 16, .*, got {found}; change mformer.width"):
        load_bert(str(tmp_path), QFormer(16, 3, 2))


def test_another_architecture_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold a BERT, got a RobertaModel"):
        load_bert(str(tmp_path), QFormer(16, 3, 2))
    with pytest.raises(FileNotFoundError, match="the path must exist"):
        load_bert(str(tmp_path / "none"), QFormer(16, 3, 2))
