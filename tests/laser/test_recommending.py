"""`LaserModel.recommend` and `index`: the sorted calibrated score without its matrix, and made again after a change."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laser_fast.data import PackedSequences
from laser_fast.laser import LaserModel
from laser_fast.nn.bituning import BiTuning
from laser_fast.ops import catalog
from laser_fast.recommenders import GRU4Rec, Popularity, SASRec, SequentialRules
from laser_fast.recommenders.packed_recommender import PackedRecommender
from laser_fast.recommenders.published_sasrec import LLaRASASRec, RecBoleSASRec
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration

COUNTS = torch.arange(25) % 7
HISTORIES = [["i3", "i4"], [], [f"i{7 * step % 25}" for step in range(18)], ["i9"], ["i9", "i1", "i9", "i2"]]
KINDS = {"sasrec": SASRec, "gru4rec": GRU4Rec, "recbole-sasrec": RecBoleSASRec, "llara-sasrec": LLaRASASRec}


def recommender_of(kind: str, num_items: int = 25) -> PackedRecommender:
    torch.manual_seed(2)
    built = KINDS[kind](num_items, width=8, max_length=10)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


def calibrate(model: LaserModel, calibration: Calibration, **others: Any) -> CalibratedScorer:
    model.calibration = CalibratedScorer({"laser": model, **others}, calibration, COUNTS)
    return model.calibration


def sorted_scores(
    model: LaserModel, histories: list[list[str]], k: int, seen: bool, blocked: list[int]
) -> list[list[tuple[str, float]]]:
    """The formula: all scores, sorted."""
    packed = PackedSequences.from_lists([[int(item[1:]) for item in history] for history in histories])
    scorer = model if model.calibration is None else model.calibration
    scores = scorer.score(torch.from_numpy(packed.items), torch.from_numpy(packed.cu_seqlens)).double().numpy()
    scores[:, blocked] = -np.inf
    for row in range(len(packed)):
        scores[row, packed[row] if seen else []] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        [(f"i{item}", line[item]) for item in best if line[item] > -np.inf]
        for line, best in zip(scores, order, strict=True)
    ]


def check(model: LaserModel) -> None:
    """`recommend` against the formula, with every way to leave items out."""
    choices: list[tuple[dict[str, Any], bool, list[int]]] = [
        ({}, False, []),
        ({"exclude_seen": True}, True, []),
        ({"exclude": ["i4", "i9"]}, False, [4, 9]),
        ({"exclude": ["i2"], "allow": ["i1", "i2", "i9", "i20"]}, False, [i for i in range(25) if i not in (1, 9, 20)]),
        ({"exclude_seen": True, "exclude": ["i0"]}, True, [0]),
    ]
    for (options, seen, blocked), k in zip(choices, (3, 40, 1, 3, 24), strict=True):
        compare(model, k, options, seen, blocked)


def compare(model: LaserModel, k: int, options: dict[str, Any], seen: bool, blocked: list[int]) -> None:
    found = model.recommend(HISTORIES, k, **options)
    wanted = sorted_scores(model, HISTORIES, k, seen, blocked)
    assert [[one.item_id for one in best] for best in found] == [[name for name, _ in best] for best in wanted]
    for best, line in zip(found, wanted, strict=True):
        actual, expected = [one.score for one in best], [value for _, value in line]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "calibration",
    [
        None,
        Calibration({"laser": 1.0}, (), -6.0, 4.0, 0.7),
        Calibration({"laser": 0.4}, ("laser",), 3.0),
    ],
    ids=["cosine", "biases", "standard"],
)
def test_recommend_without_a_recommender(model: LaserModel, calibration: Calibration | None) -> None:
    if calibration is not None:
        calibrate(model, calibration)
    check(model)


@pytest.mark.parametrize("standardize", [("recommender",), ("laser", "recommender"), ()])
@pytest.mark.parametrize("kind", KINDS)
def test_recommend_with_every_recommender(model: LaserModel, kind: str, standardize: tuple[str, ...]) -> None:
    calibrate(
        model,
        Calibration({"laser": 0.8, "recommender": 2.0}, standardize, -2.0, 5.0, 0.5),
        recommender=recommender_of(kind),
    )
    check(model)
    assert model.index().item_vectors.shape == (25, 16 + (9 if kind == "llara-sasrec" else 8) + 1)


@pytest.mark.parametrize("standardize", [(), ("rules",)])
def test_recommend_with_rules(model: LaserModel, standardize: tuple[str, ...]) -> None:
    packed = PackedSequences.from_lists([[int(item[1:]) for item in history] for history in HISTORIES])
    rules = SequentialRules.fit(packed.items, packed.cu_seqlens, 25)
    calibrate(model, Calibration({"laser": 0.8, "rules": 5.0}, standardize, -2.0, 5.0, 0.5), rules=rules)
    check(model)
    if standardize:  # a z-score is nowhere 0
        with pytest.raises(ValueError, match=r"got a SequentialRules as 'rules'"):
            model.index()
    else:
        assert model.index().item_vectors.shape == (25, 17) and model.index() is model.index()


def test_parts_without_weight_are_not_asked(model: LaserModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.item_matrix = torch.empty(0, 16)
    calibrate(model, Calibration({"laser": 0.0, "recommender": 1.0}), recommender=recommender_of("sasrec"))
    monkeypatch.setattr(type(model), "encode_users", None)
    assert len(model.recommend(HISTORIES, 3)) == 5
    assert model.index().item_vectors.shape == (25, 9)


class _OtherLogits(SASRec):
    def logits(self, states: Tensor) -> Tensor:
        return super().logits(states).square()


class _OtherScorer(CalibratedScorer):
    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        return -super().score(items, cu_seqlens)


class _OtherLaser(LaserModel):
    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        return -super().score(items, cu_seqlens)


def _with_other_scores() -> PackedRecommender:
    changed = recommender_of("sasrec")
    changed.score = lambda items, cu_seqlens: -recommender_of("sasrec").score(items, cu_seqlens)  # type: ignore[method-assign]
    return changed


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Popularity(COUNTS), "Popularity"),
        (lambda: _OtherLogits(25, width=8), "_OtherLogits"),
        (_with_other_scores, "SASRec"),
    ],
    ids=["no-states", "logits", "instance"],
)
def test_other_scores_are_sorted_as_a_whole(model: LaserModel, make: Callable[[], Any], named: str) -> None:
    calibrate(model, Calibration({"laser": 1.0, "recommender": 3.0}, ("recommender",), -1.0), recommender=make())
    check(model)
    with pytest.raises(
        ValueError,
        match=r"LaserModel\.index: the score must be made of Laser, a recommender with an output layer and rules, "
        rf"got a {named} as 'recommender'; use score or recommend",
    ):
        model.index()


def test_other_sums_and_other_models_are_sorted_as_a_whole(model: LaserModel) -> None:
    model.calibration = _OtherScorer({"laser": model}, Calibration({"laser": 1.0}), COUNTS)
    check(model)
    with pytest.raises(ValueError, match="got a _OtherScorer; use score"):
        model.index()
    other = _OtherLaser(model.lm, model.builder, model.item_ids, BiTuning(16)).eval()
    other.refresh_items()
    check(other)
    with pytest.raises(ValueError, match="got a _OtherLaser as 'laser'"):
        other.index()


def _with_output_of(recommender: Any) -> Any:
    """Other states before the same output layer."""
    other: Any = recommender_of("llara-sasrec")
    with torch.no_grad():
        other.position_embedding.weight.neg_()
    other.output = recommender.output
    return other


def test_the_index_is_made_again_after_a_change_only(model: LaserModel) -> None:
    recommender = recommender_of("llara-sasrec")
    settings = Calibration({"laser": 1.0, "recommender": 1.0}, ("recommender",), -1.0)
    calibrate(model, settings, recommender=recommender)
    optimizer = torch.optim.SGD(recommender.parameters(), lr=0.5)

    def step() -> None:
        recommender(torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32)).sum().backward()
        recommender.output.bias.grad = torch.randn(25, generator=torch.Generator().manual_seed(5))
        optimizer.step()
        calibrate(model, settings, recommender=recommender)

    changes: dict[str, Callable[[], Any]] = {
        "matrix": lambda: setattr(model, "item_matrix", model.item_matrix.flip(0)),
        "matrix in place": lambda: model.item_matrix.neg_(),
        "another counter": lambda: setattr(model, "item_matrix", model.item_matrix.data.neg_()),
        "scalars": lambda: calibrate(
            model, Calibration({"laser": 1.0, "recommender": 0.5}, (), 2.0), recommender=recommender
        ),
        "body": lambda: calibrate(model, settings, recommender=_with_output_of(recommender)),
        "recommender": step,
        "model rounded": lambda: model._apply(lambda t: t.half().float() if t.is_floating_point() else t),
        "calibration": lambda: calibrate(model, Calibration({"laser": 2.0})),
        "none": lambda: setattr(model, "calibration", None),
        "items": model.refresh_items,
    }
    for name, change in changes.items():
        before = model.index()
        model.recommend(HISTORIES, 2)
        model.encode_users(PackedSequences.from_lists([[1]]))
        assert model.index() is before
        change()
        assert model.index() is not before, name
        compare(model, 3, {}, False, [])


def test_a_copy_asks_its_own_weights(model: LaserModel) -> None:
    model.index()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.bituning.suffix_tokens.mul_(-1.0)
    assert twin.items_are_outdated and not model.items_are_outdated
    twin.keep_items()
    check(twin)
    assert twin.index() is not model.index()


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensors that one operation made, operations inside of operations included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_the_scores_of_the_catalogue_are_never_held(model: LaserModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num_items, users = 4000, 80  # more users than the vectors have places, or the item vectors were the larger
    repeats = np.arange(num_items) % 25
    large = type(model)(
        model.lm, _Repeated(model.builder, repeats), [f"i{i}" for i in range(num_items)], BiTuning(16), head="none"
    ).eval()
    large.item_matrix = torch.randn(num_items, 16, generator=torch.Generator().manual_seed(3))
    recommender = recommender_of("sasrec", num_items)
    settings = Calibration({"laser": 1.0, "recommender": 1.0}, ("recommender",), -1.0, 2.0, 0.5)
    large.calibration = CalibratedScorer(
        {"laser": large, "recommender": recommender}, settings, torch.arange(num_items) % 5
    )
    monkeypatch.setitem(catalog._CHUNK_ELEMENTS, "cpu", 2**14)
    histories = [[f"i{(17 * user + 3 * step) % num_items}" for step in range(user % 5)] for user in range(users)]
    large.index()
    scores = users * num_items * 4
    assert largest_allocation(lambda: large.recommend(histories, 10, exclude=["i0"])) < scores / 8
    largest = largest_allocation(lambda: large.score(torch.arange(users), torch.arange(users + 1, dtype=torch.int32)))
    assert largest >= scores  # the measure sees what it is to see


class _Repeated:
    """A builder whose catalogue is another one's items over and over."""

    def __init__(self, builder: Any, repeats: np.ndarray) -> None:
        self.builder, self.repeats, self.num_items = builder, repeats, len(repeats)

    def histories(self, histories: PackedSequences) -> Any:
        return self.builder.histories(PackedSequences(self.repeats[histories.items], histories.cu_seqlens))
