"""The ten best items by a calibrated score: searched as inner products, against all scores of the catalogue, sorted.

What both do alike is left out: the language model, whose embeddings of the users are given. The recommender reads the
histories in both. Both forms recommend the same before they are timed. With "rules" sequential rules are a part of the
score: for most items they say nothing, which the search makes use of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import Compare, skip_unless_on
from torch import Tensor
from workloads import case_name

from laser_fast.data import PackedSequences
from laser_fast.recommenders import SASRec, SequentialRules
from laser_fast.retrieval import CalibratedScorer, Calibration
from laser_fast.retrieval.inner_product import InnerProductIndex, ScoreBlock, packed_tensors
from laser_fast.retrieval.requests import best_items

Tables = dict[str, SequentialRules]

# device, users of a request, items, width of the embeddings, whether rules are added
CASES = [
    ("cpu", 1, 100_000, 384, "plain"),
    ("cpu", 64, 100_000, 384, "plain"),
    ("cpu", 64, 100_000, 384, "rules"),
    ("cuda", 1, 10**6, 1024, "plain"),
    ("cuda", 64, 10**6, 1024, "plain"),
    ("cuda", 64, 10**6, 1024, "rules"),
]
_K, _TEMPERATURE, _WEIGHT, _WIDTH = 10, 0.05, 2.0, 64


@dataclass
class Cosine:
    """Laser's score, as `LaserModel.score` computes it, of users whose embeddings are known."""

    users: Tensor
    item_matrix: Tensor

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.item_matrix.shape[0]

    def score(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[B, I]; the histories are those of the users."""
        return F.normalize(self.users, dim=-1) @ F.normalize(self.item_matrix, dim=-1).T / _TEMPERATURE


def matrix_form(
    laser: Cosine, recommender: SASRec, tables: Tables, settings: Calibration, histories: PackedSequences
) -> Callable[[], tuple[Tensor, Tensor]]:
    """All scores, sorted."""
    counts = torch.arange(laser.num_items) % 97
    scorer = CalibratedScorer({"laser": laser, "recommender": recommender, **tables}, settings, counts)
    packed = packed_tensors(histories, laser.users.device)
    return lambda: best_items(scorer.score(*packed), _K)


def search_form(
    laser: Cosine, recommender: SASRec, tables: Tables, settings: Calibration, histories: PackedSequences
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The index, made once, and a search in it."""
    device = laser.users.device
    log_counts = torch.log1p((torch.arange(laser.num_items, device=device) % 97).float())[:, None]
    blocks = [
        ScoreBlock(
            F.normalize(laser.item_matrix, dim=-1),
            lambda histories: F.normalize(laser.users, dim=-1) / _TEMPERATURE,
            settings.weights["laser"],
        ),
        ScoreBlock(
            recommender.item_embedding.weight,
            lambda histories: recommender.last_states(*packed_tensors(histories, device))[0],
            settings.weights["recommender"],
            standardize=True,
        ),
        ScoreBlock(log_counts, lambda histories: torch.ones(len(histories), 1), settings.popularity_weight),
    ]
    rules = [(table, settings.weights[name]) for name, table in tables.items()]
    index = InnerProductIndex(blocks, history_bias=settings.history_bias, last_bias=settings.last_bias, rules=rules)
    return lambda: index.search(histories, _K)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_recommend(case: tuple[str, int, int, int, str], device: torch.device, compare: Compare) -> None:
    wanted_device, users, items, width, kind = case
    skip_unless_on(wanted_device, device)
    generator = torch.Generator(device).manual_seed(0)
    laser = Cosine(
        torch.randn(users, width, generator=generator, device=device),
        torch.randn(items, width, generator=generator, device=device),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        recommender = SASRec(items, width=_WIDTH).to(device).eval()
    draw = np.random.default_rng(2)
    histories = PackedSequences.from_lists([draw.integers(0, items, draw.integers(1, 51)) for _ in range(users)])
    tables: Tables = {}
    if kind == "rules":  # of a log with as many events as items, so that an item has ten or so followers
        log = [draw.integers(0, items, 50) for _ in range(items // 50)]
        packed = packed_tensors(PackedSequences.from_lists(log), torch.device("cpu"))
        tables["rules"] = SequentialRules.fit(*packed, items)
    weights = {"laser": 1.0, "recommender": _WEIGHT} | dict.fromkeys(tables, 3.0)
    settings = Calibration(weights, ("recommender",), -4.0, -2.0, 0.3)
    matrix, search = (form(laser, recommender, tables, settings, histories) for form in (matrix_form, search_form))
    (found, names), (expected, wanted) = search(), matrix()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((names == wanted).float().mean()) > 0.99  # two may be as good as equal
    compare(
        search,
        {"matrix": matrix},
        moved_bytes=items * (width + _WIDTH + 1) * 4,
        shape={"users": users, "items": items, "width": width, "k": _K, "score": kind, "dtype": "torch.float32"},
    )
