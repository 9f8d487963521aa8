"""The contrastive term of stage 1 against its definition, and what it trains."""

import math

import pytest
import torch
import torch.nn.functional as F

from laser_fast.nn.mformer import MFormer
from laser_fast.nn.pretraining import ContrastiveHeads, contrastive_loss


def test_contrastive_loss_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(3, 2, 4, generator=generator), dim=-1)
    text = F.normalize(torch.randn(3, 4, generator=generator), dim=-1)
    similarity = [[max(float(q @ text[c]) for q in queries[b]) / 0.1 for c in range(3)] for b in range(3)]
    smoothing, total = 0.1, 0.0
    for matrix in (similarity, [list(column) for column in zip(*similarity, strict=True)]):
        for row, values in enumerate(matrix):
            log_sum = math.log(sum(math.exp(value) for value in values))
            for column, value in enumerate(values):
                target = (1 - smoothing) * (row == column) + smoothing / 3
                total += target * (log_sum - value) / 3 / 2
    assert float(contrastive_loss(queries, text, 0.1, smoothing)) == pytest.approx(total, rel=1e-5)


def test_matching_pairs_beat_shuffled_pairs() -> None:
    text = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    queries = text[:, None]
    assert contrastive_loss(queries, text, 0.07, 0.0) < 0.2 < contrastive_loss(queries.roll(1, 0), text, 0.07, 0.0)


def test_pretraining_learns_and_reaches_mformer() -> None:
    torch.manual_seed(0)
    mformer = MFormer(6, 10, width=16, num_layers=2, num_heads=2, num_experts=2, top_k=1, num_queries=2, dropout=0.0)
    heads = ContrastiveHeads(mformer.qformer, 16, 5, max_tokens=8, projection_size=8)
    states, cu_seqlens = torch.randn(12, 6), torch.arange(0, 13, 2, dtype=torch.int32)
    tokens, token_cu_seqlens = torch.randn(15, 5), torch.tensor([0, 1, 3, 6, 8, 11, 15], dtype=torch.int32)
    parameters = [*mformer.parameters(), *heads.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(60):
        loss = heads(mformer(states, cu_seqlens).queries, tokens, token_cu_seqlens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert mformer.query_experts.grad is not None and float(mformer.query_experts.grad.abs().max()) > 0
    assert not any(name.startswith("_qformer") for name, _ in heads.named_parameters())


def test_texts_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    mformer = MFormer(6, 10, width=16, num_layers=2, num_heads=2, num_queries=2, dropout=0.0)
    heads = ContrastiveHeads(mformer.qformer, 16, 5, max_tokens=8).eval()
    tokens = torch.randn(7, 5)
    both = heads.encode_text(tokens, torch.tensor([0, 3, 7], dtype=torch.int32))
    alone = heads.encode_text(tokens[3:], torch.tensor([0, 4], dtype=torch.int32))
    torch.testing.assert_close(both[1:], alone)


def test_an_empty_batch_has_no_loss() -> None:
    assert float(contrastive_loss(torch.zeros(0, 2, 4), torch.zeros(0, 4), 0.07, 0.1)) == 0.0
