"""Evaluation of one thread: no dropout in it, the modes as they were, and other threads not concerned."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from laser_fast.nn.evaluation_mode import draws_dropout, evaluating, refuse_torch_modes
from laser_fast.recommenders import SASRec


def test_it_is_of_one_thread_and_ends() -> None:
    module, seen = nn.Linear(1, 1), []
    with evaluating():
        with evaluating():
            pass
        assert module.training and not draws_dropout(module)
        other = threading.Thread(target=lambda: seen.append(draws_dropout(module)))
        other.start()
        other.join()
    assert seen == [True] and draws_dropout(module)
    with pytest.raises(ZeroDivisionError), evaluating():
        raise ZeroDivisionError
    assert draws_dropout(module)


def test_what_torch_compiled_in_training_asks_again() -> None:
    module = nn.Linear(1, 1)
    compiled = torch.compile(lambda: draws_dropout(module), backend="eager")

    def ask() -> list[bool]:
        drawn = [compiled()]
        with evaluating():
            drawn.append(compiled())
        return [*drawn, compiled()]

    with ThreadPoolExecutor(1) as fresh:  # a thread that has never evaluated
        assert fresh.submit(ask).result() == [True, False, True]
    assert ask() == [True, False, True]


@pytest.mark.parametrize(
    ("part", "name"),
    [(nn.Dropout(0.1), "Dropout"), (nn.LSTM(2, 2, 2, dropout=0.1), "LSTM"), (nn.BatchNorm1d(2), "BatchNorm1d")],
)
def test_what_it_does_not_reach_is_refused(part: nn.Module, name: str) -> None:
    recommender = SASRec(9, width=8)
    recommender.part = part
    empty = torch.empty(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"SASRec: a {name} must be in evaluation mode to answer, got training"):
        recommender.states(*empty)
    recommender.eval()
    assert recommender.states(*empty).shape == (0, 8)
    refuse_torch_modes("f", nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0), nn.LayerNorm(1)))
