"""The cached text line learns from vectors alone, keeps its best epoch, and is the same for the same seed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.config import StageConfig
from laser_fast.data import PackedSequences, Split
from laser_fast.data.sequences import EvaluationRows
from laser_fast.evaluation import evaluate
from laser_fast.nn.text_residual import centred
from laser_fast.training.text_stage import fit_text_line

NUM_ITEMS = 24


@pytest.fixture(scope="module")
def chain() -> tuple[Split, Tensor, Tensor]:
    """Everybody goes from item i to item i + 1, whose vector has nothing to do with that of i: only a head tells."""
    sequences = [[(start + step) % NUM_ITEMS for step in range(6)] for start in range(NUM_ITEMS)]
    histories = PackedSequences.from_lists([sequence[:5] for sequence in sequences])
    targets = np.array([sequence[5] for sequence in sequences])
    rows = EvaluationRows(np.arange(NUM_ITEMS), histories, targets)
    train = PackedSequences.from_lists(sequences)
    split = Split(train=train, train_users=np.arange(NUM_ITEMS), valid=rows, test=rows, rule="a chain", hash="0")
    torch.manual_seed(0)
    return split, centred(torch.randn(NUM_ITEMS, 64)), torch.full((NUM_ITEMS,), 6)


STAGE = StageConfig(epochs=30, batch_size=40, patience=30)


def test_it_learns_what_the_vectors_do_not_say(chain: tuple[Split, Tensor, Tensor]) -> None:
    split, vectors, counts = chain
    before = evaluate(fit_text_line(vectors, split, counts, stage=StageConfig(epochs=0)), split.test)["NDCG@10"].mean
    after = evaluate(fit_text_line(vectors, split, counts, stage=STAGE), split.test)["NDCG@10"].mean
    assert before < 0.15 < 0.3 < after  # one head for both sides cannot tell next from last


def test_a_seed_decides_everything_and_nothing_else_is_touched(chain: tuple[Split, Tensor, Tensor]) -> None:
    split, vectors, counts = chain
    short = StageConfig(epochs=2, batch_size=40)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    heads = [fit_text_line(vectors, split, counts, stage=short, seed=seed).text.head.weight for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_without_training_rows_it_is_what_it_begins_as(chain: tuple[Split, Tensor, Tensor]) -> None:
    split, vectors, counts = chain
    empty = Split(PackedSequences.from_lists([[3]]), np.arange(1), split.valid, split.test, "", "0")
    found = fit_text_line(vectors, empty, counts)
    assert torch.equal(found.text.head.weight, torch.eye(64))
