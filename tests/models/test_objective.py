"""The loss of stage 2 in every mode against a float64 hand computation, and where its gradients reach."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import EvaluationRows, training_rows
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.models.objective import Objective, sampled_cross_entropy

NEGATIVES = np.array([[20, 3], [21, 20], [7, 22]])


def cosines(users: Tensor, items: Tensor) -> list[list[float]]:
    def cosine(u: list[float], v: list[float]) -> float:
        return sum(a * b for a, b in zip(u, v, strict=True)) / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))

    return [[cosine(u, v) for v in items.tolist()] for u in users.tolist()]


def cross_entropy(scores: list[float], target: int, temperature: float) -> float:
    return math.log(sum(math.exp((score - scores[target]) / temperature) for score in scores))


def test_sampled_cross_entropy_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[5, 0, 1], [0, 5, 3], [3, 1, 0]])
    loss = sampled_cross_entropy(users, rows, places, 0.3)
    scores = cosines(users, rows)
    expected = sum(
        cross_entropy([scores[row][place] for place in own], 0, 0.3) for row, own in enumerate(places.tolist())
    )
    assert float(loss.detach()) == pytest.approx(expected / 3, rel=1e-12)
    loss.backward()
    assert rows.grad is not None
    assert (rows.grad.abs().amax(dim=1) > 0).tolist() == [True, True, False, True, False, True]  # 2 and 4: nobody's
    assert torch.autograd.gradcheck(lambda u, v: sampled_cross_entropy(u, v, places, 0.3), (users, rows))


@pytest.fixture
def build(make_laser: Callable[..., Any]) -> Callable[[str, str], tuple[LaserModel, EvaluationRows]]:
    """A model around a decoder (an instruction is reused), in evaluation mode."""

    def make(order: str, candidates: str) -> tuple[LaserModel, EvaluationRows]:
        prompt = {"user_template": "red , {history}", "order": order}
        objective = {"candidates": candidates, "num_negatives": 2, "balance_weight": 0.5}
        model, inputs = make_laser("llama", prompt=prompt, objective=objective)
        return model.eval(), training_rows(inputs.split.train, 4).select([0, 5, 9])

    return make


@pytest.mark.parametrize("order", ["prefix-first", "prompt-first"])
@pytest.mark.parametrize("item_gradient", ["positives", "none"])
@pytest.mark.parametrize("candidates", ["catalog", "sampled"])
def test_every_mode_equals_its_definition_and_reaches_what_it_should(
    build: Callable[..., Any], candidates: str, item_gradient: str, order: str
) -> None:
    model, rows = build(order, candidates)
    assert model.objective.candidates == candidates
    live = item_gradient == "positives"
    batch = model.builder.training_batch(rows, with_positives=live, negatives=NEGATIVES)
    assert bool(batch.instruction) == (order == "prompt-first")
    needs_matrix = candidates == "catalog" or not live
    if needs_matrix:
        with pytest.raises(RuntimeError, match=r"call refresh_items\(\) first"):
            model(batch)
        model.refresh_items()
        model.item_matrix += 0.05 * torch.randn(model.item_matrix.shape)  # rows of V are not the live ones
    output = model(batch)
    with torch.no_grad():
        users, routing = model.encode(batch)
        own = [[int(target), *row] for target, row in zip(rows.targets, NEGATIVES.tolist(), strict=True)]
        distinct = sorted({item for row in own for item in row})
        encoded = model.encode(model.builder.items(np.array(distinct)))[0] if live else model.item_matrix[distinct]
    among = cosines(users.double(), encoded.double())
    matrix = cosines(users.double(), model.item_matrix.double()) if needs_matrix else []
    total = 0.0
    for row, wanted in enumerate(own):
        places = [distinct.index(item) for item in wanted]
        if candidates == "sampled":
            total += cross_entropy([among[row][place] for place in places], 0, 0.05) / 3
            continue
        total += cross_entropy(matrix[row], wanted[0], 0.05) / 3
        if live:
            total += cross_entropy(among[row], places[0], 0.05) / 3
    assert routing is not None
    expected = total + 0.5 * float(routing.balance_loss)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=2e-5)
    assert_reaches_items(model, batch, live)


def assert_reaches_items(model: LaserModel, batch: PackedBatch, live: bool) -> None:
    """The gradient comes through the user side always, through the item side where candidates are live."""
    found: list[Tensor] = []

    def encode(part: PackedBatch) -> Any:
        embedding, routing = LaserModel.encode(model, part)
        embedding.retain_grad()
        found.append(embedding)
        return embedding, routing

    model.encode = encode  # type: ignore[method-assign]
    model(batch).loss.backward()
    assert len(found) == 1 + live
    for embedding in found:
        assert embedding.grad is not None and bool((embedding.grad.abs().amax(dim=1) > 0).all())
    assert model.mformer is not None
    for parameter in (model.mformer.router.weight, model.mformer.query_experts, model.bituning.suffix_tokens):
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0


def test_distinct_candidates_are_encoded_once(build: Callable[..., Any]) -> None:
    model, rows = build("prefix-first", "sampled")
    batch = model.builder.training_batch(rows, with_positives=True, negatives=NEGATIVES)
    distinct = np.unique(np.concatenate([rows.targets, NEGATIVES.ravel()]))
    assert batch.positives is not None and len(batch.positives) == len(distinct) < 9
    assert distinct[batch.places].tolist() == np.concatenate([rows.targets[:, None], NEGATIVES], axis=1).tolist()
    assert model.builder.training_batch(rows, with_positives=False, negatives=NEGATIVES).positives is None


def test_a_part_of_a_batch_has_the_loss_of_its_rows(build: Callable[..., Any]) -> None:
    model, rows = build("prefix-first", "sampled")
    model.objective = replace(model.objective, balance_weight=0.0)
    batch = model.builder.training_batch(rows, with_positives=True, negatives=NEGATIVES)
    with torch.no_grad():
        parts = [batch.select([0, 2]), batch.select([1])]
        assert parts[1].positives is not None and len(parts[1].positives) == 3
        total = sum(len(part) / 3 * model(part).loss for part in parts)
        torch.testing.assert_close(total, model(batch).loss, rtol=1e-5, atol=1e-6)


def test_what_is_missing_or_unknown_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match='candidates must be "catalog" or "sampled", got \'all\''):
        Objective(candidates="all")
    model, rows = build("prefix-first", "sampled")
    batch = model.builder.training_batch(rows, with_positives=True)
    with pytest.raises(ValueError, match="must have negatives where candidates are sampled, got None"):
        model(batch)
