"""The text residual against its formula, item by item."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laser_fast.nn.text_residual import TextResidual, centred

HISTORIES = [[3, 1, 4], [], [5], [2, 2]]


Pack = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def residual() -> TextResidual:
    """Trained a little: no weight is what it begins as."""
    torch.manual_seed(0)
    text = TextResidual(6, 4, max_history=3).eval()
    text.set_vectors(centred(torch.randn(6, 4)))
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return text


def test_users_are_weighted_means_of_their_items_by_age(residual: TextResidual, pack: Pack) -> None:
    found = residual.users(*pack(*HISTORIES))
    for row, history in enumerate(HISTORIES):
        weights = [math.exp(float(residual.recency[age])) for age in range(len(history))]
        mean = torch.zeros(4)
        for weight, item in zip(weights, reversed(history), strict=True):
            mean += weight / sum(weights) * residual.vectors[item]
        torch.testing.assert_close(found[row], mean @ residual.head.weight.T + residual.head.bias)


def test_an_item_is_a_history_of_one(residual: TextResidual, pack: Pack) -> None:
    torch.testing.assert_close(residual.users(*pack(*([item] for item in range(6)))), residual.items())
    assert torch.equal(residual.embeddings(), residual.items())
    assert not residual.embeddings().requires_grad


def test_it_begins_as_the_decayed_mean_of_the_vectors(pack: Pack) -> None:
    text = TextResidual(3, 2, max_history=2)
    text.set_vectors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    torch.testing.assert_close(text.users(*pack([0, 1]))[0], torch.tensor([0.7, 1.0]) / 1.7)


def test_gradients_reach_head_and_recency_and_dropout_is_for_training(residual: TextResidual, pack: Pack) -> None:
    residual.users(*pack(*HISTORIES)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in residual.parameters())
    assert residual.vectors.grad is None
    residual.dropout = 0.5
    assert torch.equal(residual.items(), residual.items())
    residual.train()
    assert not torch.equal(residual.items(), residual.items())


def test_vectors_come_from_their_source_once_and_are_not_saved() -> None:
    calls = []

    def source() -> Tensor:
        calls.append(1)
        return torch.eye(3)

    text = TextResidual(3, 3)
    text.source = source
    with torch.inference_mode():
        text.embeddings()
    text.items().sum().backward()  # what was fetched in inference mode may be trained on
    assert len(calls) == 1
    assert set(text.state_dict()) == {"head.weight", "head.bias", "recency"}


def test_missing_and_misshapen_vectors_are_refused() -> None:
    text = TextResidual(3, 2)
    with pytest.raises(RuntimeError, match=r"TextResidual: the vectors must be set, got none; call set_vectors"):
        text.items()
    with pytest.raises(ValueError, match=r"TextResidual: vectors must have shape \(3, 2\), got \(2, 2\)"):
        text.set_vectors(torch.zeros(2, 2))


def test_centred_rows_are_unit_rows_around_zero() -> None:
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(50, 8) + 5.0, dim=-1)
    found = centred(rows)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(50))
    assert (found @ found.T).mean() < 0.1 < (rows @ rows.T).mean()  # the cone is gone
    assert torch.equal(centred(torch.ones(3, 2)), torch.zeros(3, 2))


def test_items_and_offsets_that_point_outside_are_refused(residual: TextResidual) -> None:
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    for wrong in (-1, 6):  # from the back a negative one would name another item
        with pytest.raises(ValueError, match=f"TextResidual.users: items must be between 0 and 5, got {wrong}"):
            residual.users(torch.tensor([0, wrong]), bounds)
    with pytest.raises(
        ValueError, match="TextResidual.users: cu_seqlens must end at the number of packed rows 3, got 2"
    ):
        residual.users(torch.tensor([0, 1, 2]), bounds)
