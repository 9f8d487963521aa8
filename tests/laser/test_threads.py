"""Every public call of one model from many threads at once: the answers and the modes of one thread alone."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from laser_fast.data import PackedSequences
from laser_fast.laser import LaserModel
from laser_fast.lm.execution.cuda_graphs import Recorder
from laser_fast.lm.execution.fixed_shapes import FixedShapes
from laser_fast.recommenders import SASRec
from laser_fast.retrieval.calibration import CalibratedScorer, Calibration

THREADS, REQUESTS = 8, 32
HISTORIES = [[f"i{(user + step) % 25}" for step in range(1 + user % 4)] for user in range(25)]


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Threads take turns far more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def build(make_laser: Callable[..., Any]) -> Callable[..., LaserModel]:
    def make(*, refresh: bool = True) -> LaserModel:
        model, _ = make_laser("llama", bituning={"prefix_mode": "kv", "dropout": 0.2}, text={"residual": True})
        if refresh:
            model.refresh_items()
        return model.train()

    return make


def calls(model: LaserModel) -> list[Callable[[int], Any]]:
    """The public calls, each by the number of a user, with results that compare."""
    index = model.index

    def packed(user: int) -> PackedSequences:
        return PackedSequences.from_lists([[int(item[1:]) for item in HISTORIES[user]]])

    def tensors(user: int) -> tuple[torch.Tensor, torch.Tensor]:
        history = packed(user)
        return torch.from_numpy(history.items), torch.from_numpy(history.cu_seqlens)

    def names(user: int, **options: Any) -> list[str]:
        return [one.item_id for one in model.recommend([HISTORIES[user]], 5, **options)[0]]

    return [
        names,
        lambda user: names(user, exclude_seen=True, exclude=["i3"]),
        lambda user: names(user, allow=[f"i{item}" for item in range(0, 25, 2)]),
        lambda user: index().search(packed(user), 5)[1].tolist(),
        lambda user: model.score(*tensors(user)).flatten().tolist(),
        lambda user: model.encode_users(packed(user)).flatten().tolist(),
        lambda user: model.encode_items([user, (user + 3) % 25]).flatten().tolist(),
        lambda user: model.calibration and model.calibration.score(*tensors(user)).flatten().tolist(),
    ]


def same(one: Any, two: Any) -> bool:
    """Names alike, numbers up to rounding."""
    return one == (pytest.approx(two, rel=1e-3, abs=1e-3) if one and isinstance(one[0], float) else two)


def prepare(model: LaserModel, how: str) -> None:
    if how in ("kept", "recorded"):
        model.keep_prefixes(4)
    if how == "recorded":  # as graphs are, on a device that has none
        assert model.lm.layers
        model.lm.fixed_shapes = FixedShapes(model.lm, Recorder(), capacity=3)
    if how in ("kept", "sorted"):
        other = SASRec(25, width=8, dropout=0.5)  # in training mode as well
        standardize = ("laser",) if how == "sorted" else ()
        settings = Calibration({"laser": 0.7, "recommender": 1.0}, standardize, -1.0, 2.0, 0.5)
        model.calibration = CalibratedScorer({"laser": model, "recommender": other}, settings, torch.arange(25) % 5)


@pytest.mark.parametrize("how", ["plain", "kept", "sorted", "recorded"])
def test_every_answer_is_that_of_one_thread(build: Callable[..., Any], how: str) -> None:
    model = build()
    prepare(model, how)
    public = calls(model)
    modes = [module.training for module in model.modules()]
    requests = [(number % len(public), number * 7 % 25) for number in range(REQUESTS)]
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda request: public[request[0]](request[1]), requests))
    wanted = [public[call](user) for call, user in requests]
    wrong = [request for request, *pair in zip(requests, answers, wanted, strict=True) if not same(*pair)]
    assert not wrong
    assert [module.training for module in model.modules()] == modes and model.training


def test_modes_are_never_touched_while_requests_run(build: Callable[..., Any]) -> None:
    model = build()
    switched: list[bool] = []
    for module in model.modules():
        module.train = lambda mode=True: switched.append(mode)  # type: ignore[method-assign,assignment]
        module.eval = lambda: switched.append(False)  # type: ignore[method-assign,assignment,return-value]
    for call in calls(model):
        call(3)
    model.refresh_items()
    assert not switched


def test_what_is_made_at_the_first_request_is_made_once(build: Callable[..., Any]) -> None:
    model = build(refresh=False).eval()
    assert model.text is not None and model.text.source is not None
    made, source = [], model.text.source

    def counted() -> torch.Tensor:
        made.append(1)
        time.sleep(0.05)
        return source()

    model.text.source = counted
    model.item_matrix = torch.randn(25, 16, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda _: model.recommend(HISTORIES[:2], 5), range(THREADS)))
        indices = list(pool.map(lambda _: model.index(), range(THREADS)))
    alone = model.recommend(HISTORIES[:2], 5)
    assert made == [1] and all(index is indices[0] for index in indices)
    assert all(
        [[one.item_id for one in best] for best in answer] == [[one.item_id for one in best] for best in alone]
        for answer in answers
    )


def test_training_goes_on_beside_requests(build: Callable[..., Any]) -> None:
    """Dropout of the one and none of the other, at the same time."""
    model = build()
    batch = model.builder.histories(PackedSequences.from_lists([[1, 2, 3]]))
    users = PackedSequences.from_lists([[1, 2, 3]])
    expected = model.encode_users(users)

    def train(_: int) -> bool:
        return not torch.allclose(model.encode(batch)[0], expected, atol=1e-4)

    def ask(_: int) -> bool:
        return torch.allclose(model.encode_users(users), expected, atol=1e-5)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda number: (train, ask)[number % 2](number), range(30)))
    assert all(found)
