"""Which users go to which query expert, and what tells the users of one expert from the others.

A feature of a user is an item of the history (there or not) or a kind of items (its share of the history), such as a
genre, a brand or a decade. Everything is held against the same users dealt to the experts at random in groups of the
same sizes: of many features some always look typical, and few users always look peculiar.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from laser_fast.data import ItemTable, PackedSequences
from laser_fast.laser.model import LaserModel

LEAST_USERS = 20  # an expert is described from so many users on
_LEAST_USERS_WITH_IT = 5  # so many of an expert's users have what they are said to have more of
_SHUFFLES = 200
_MOST_KINDS = 100
_LEAST_ITEMS_PER_KIND = 5
_LEAST_FILLED = 0.5  # share of the items that have the field
_LONGEST_TITLE = 80
_YEAR = re.compile(r"\d{4}")
_SEPARATOR = re.compile(r"[|;,]")


@dataclass(frozen=True)
class Categories:
    """The kinds of items in one field, most items first; `of_item` holds the distinct kinds of each item by index."""

    field: str
    names: tuple[str, ...]
    of_item: tuple[tuple[int, ...], ...]

    @property
    def word(self) -> str:
        """The field for running text."""
        return self.field.replace("_", " ")


def find_categories(items: ItemTable) -> list[Categories]:
    """The fields that read as kinds: parts between | ; or commas where a tenth of the values has such, whole values,
    else words; years are put into decades.

    At least half of the items must have the field, and its 2 to 100 kinds 5 items each on average. The field that names
    the items never counts.
    """
    found = []
    for field, texts in items.fields.items():
        filled = [text for text in texts if text]
        if field == _title_field(items) or len(filled) < _LEAST_FILLED * len(texts):
            continue
        for split in _ways_to_split(filled):
            kinds = [sorted(set(split(text))) for text in texts]
            counts = Counter(kind for of_one in kinds for kind in of_one)
            if 2 <= len(counts) <= _MOST_KINDS and counts.total() >= _LEAST_ITEMS_PER_KIND * len(counts):
                names = sorted(counts, key=lambda kind: (-counts[kind], kind))
                index = {name: position for position, name in enumerate(names)}
                of_item = tuple(tuple(index[kind] for kind in of_one) for of_one in kinds)
                found.append(Categories(field, tuple(names), of_item))
                break
    return found


def _ways_to_split(filled: Sequence[str]) -> list[Callable[[str], list[str]]]:
    def decade(text: str) -> list[str]:
        return [f"{text[:3]}0s"] if _YEAR.fullmatch(text) else []

    def parts(text: str) -> list[str]:
        return [part.strip() for part in _SEPARATOR.split(text) if part.strip()]

    def whole(text: str) -> list[str]:
        return [text] if text else []

    if sum(bool(_YEAR.fullmatch(text)) for text in filled) >= 0.9 * len(filled):
        return [decade]
    lists = sum(bool(_SEPARATOR.search(text)) for text in filled) >= 0.1 * len(filled)
    return [parts, whole, str.split] if lists else [whole, str.split]


def _title_field(items: ItemTable) -> str | None:
    """The field that names an item: "title", "name", else the first."""
    return next((name for name in ("title", "name") if name in items.fields), next(iter(items.fields), None))


def item_titles(items: ItemTable) -> list[str]:
    """A name of at most 80 characters for every item, its id where it has none."""
    field = _title_field(items)
    texts: Sequence[str] = items.ids if field is None else items.fields[field]
    names = [text or f"item {external}" for text, external in zip(texts, items.ids, strict=True)]
    return [name if len(name) <= _LONGEST_TITLE else name[: _LONGEST_TITLE - 1].rstrip() + "…" for name in names]


@dataclass(frozen=True, eq=False)
class UserRouting:
    """The router's answer for B users, best expert first: int64 and float64 [B, k]; `histories` are what it read."""

    expert: np.ndarray
    weight: np.ndarray
    num_experts: int
    histories: PackedSequences

    @property
    def first(self) -> np.ndarray:
        """Expert of first choice, int64 [B]."""
        return np.asarray(self.expert[:, 0])

    @property
    def group_sizes(self) -> np.ndarray:
        """Users of whom an expert is the first choice, int64 [E]."""
        return np.bincount(self.first, minlength=self.num_experts)

    @property
    def first_share(self) -> np.ndarray:
        """`group_sizes` as a share of all users, [E]."""
        return np.asarray(self.group_sizes / max(1, len(self.expert)))

    @property
    def weight_share(self) -> np.ndarray:
        """Mean weight of each expert over the users, [E]; sums to 1."""
        totals = np.bincount(self.expert.ravel(), weights=self.weight.ravel(), minlength=self.num_experts)
        return np.asarray(totals / max(1, len(self.expert)))


@torch.no_grad()
def route_users(model: LaserModel, histories: PackedSequences, *, batch_size: int) -> UserRouting:
    """Ask the router of a model with M-Former about histories of item indices."""
    mformer, recommender = model.mformer, model.recommender
    if mformer is None or recommender is None:
        raise ValueError("route_users: the model must have an M-Former, got none")
    expert, weight, read = [], [], []
    for start in range(0, len(histories), batch_size):
        rows = histories.select(np.arange(start, min(start + batch_size, len(histories))))
        batch = model.builder.histories(rows).to(model.device)
        states = mformer.state_projection(recommender.states(batch.items, batch.cu_seqlens))
        routing = mformer.router(states, batch.cu_seqlens)
        expert.append(routing.expert.cpu().numpy().astype(np.int64))
        weight.append(routing.weight.double().cpu().numpy())
        read += PackedSequences(batch.items.cpu().numpy(), batch.cu_seqlens.cpu().numpy()).to_lists()
    num_experts = mformer.query_experts.shape[0]
    return UserRouting(np.concatenate(expert), np.concatenate(weight), num_experts, PackedSequences.from_lists(read))


@dataclass(frozen=True, eq=False)
class Features:
    """Sparse values of B users: value[n] of feature[n] for user[n], 0 elsewhere."""

    names: tuple[str, ...]
    user: np.ndarray
    feature: np.ndarray
    value: np.ndarray
    num_users: int


def item_features(histories: PackedSequences, titles: Sequence[str], least_users: int = 10) -> Features:
    """1 where an item is in a user's history, for the items that at least `least_users` users have."""
    user = np.repeat(np.arange(len(histories)), histories.lengths)
    user, item = np.unique(np.stack([user, histories.items]), axis=1)
    kept = np.bincount(item, minlength=len(titles)) >= least_users
    user, item = user[kept[item]], item[kept[item]]
    names = tuple(titles[index] for index in np.flatnonzero(kept).tolist())
    return Features(names, user, (kept.cumsum() - 1)[item], np.ones(len(item)), len(histories))


def category_features(histories: PackedSequences, categories: Categories) -> Features:
    """Share of a user's history that is of each kind; an item may be of several kinds or none."""
    user = np.repeat(np.arange(len(histories)), histories.lengths)
    events = zip(user.tolist(), histories.items.tolist(), strict=True)
    pairs = np.array([(one, kind) for one, item in events for kind in categories.of_item[item]], dtype=np.int64)
    (user, kind), counts = np.unique(pairs.reshape(-1, 2).T, axis=1, return_counts=True)
    return Features(categories.names, user, kind, counts / histories.lengths[user], len(histories))


@dataclass(frozen=True, eq=False)
class Typical:
    """A feature of one expert's users: how many have it, its mean there over that of all, deviation from chance."""

    name: str
    users: int
    lift: float
    z: float


@dataclass(frozen=True, eq=False)
class Contrast:
    """What the choice of expert has to do with features of the users.

    Attributes:
        names: of the F features.
        lift: [E, F], mean of the expert's users / mean of all; NaN for an expert without users.
        z: [E, F], deviation from groups dealt at random, in standard deviations; 0 for experts with less than 20 users.
        users: int64 [E, F], users of the expert with the feature.
        overall: [F], mean over all users.
        threshold: |z| that only 1 in 20 random deals exceeds anywhere.
        explained: share of the features' variance between users that lies between experts.
        by_chance: the same, mean over random deals.
        p_value: share of random deals that explain at least as much, (1 + number) / (1 + deals).
    """

    names: tuple[str, ...]
    lift: np.ndarray
    z: np.ndarray
    users: np.ndarray
    overall: np.ndarray
    threshold: float
    explained: float
    by_chance: float
    p_value: float

    def typical(self, expert: int, most: int = 5, *, more: bool = True) -> list[Typical]:
        """What the expert's users have more (or less) of than chance allows, the clearest first."""
        users, lift, z = self.users[expert], self.lift[expert], self.z[expert]
        clear = z >= self.threshold if more else -z >= self.threshold
        if more:
            clear &= users >= _LEAST_USERS_WITH_IT
        order = np.argsort(-z if more else z, kind="stable")
        found = order[clear[order]][:most]
        return [Typical(self.names[one], int(users[one]), float(lift[one]), float(z[one])) for one in found]


def contrast(features: Features, first: np.ndarray, num_experts: int) -> Contrast | None:
    """Hold the users of each expert (`first`, int64 [B]) against all users and against random deals of a fixed seed;
    None where there is no feature, or fewer than two experts with 20 users.
    """
    group_sizes = np.bincount(first, minlength=num_experts).astype(np.float64)
    size, total = len(features.names), features.num_users
    described = group_sizes >= LEAST_USERS
    if not size or described.sum() < 2:
        return None
    sums = np.bincount(features.feature, weights=features.value, minlength=size)
    squares = np.bincount(features.feature, weights=features.value**2, minlength=size)
    mean = sums / total
    variance = np.maximum(squares / total - mean**2, 0.0)
    # of a sum over a group drawn without replacement
    spread = np.sqrt(np.outer(group_sizes * (total - group_sizes) / (total - 1), variance))

    def deal(assigned: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        places = assigned[features.user] * size + features.feature
        group = np.bincount(places, weights=features.value, minlength=num_experts * size).reshape(num_experts, size)
        gap = group - np.outer(group_sizes, mean)
        z = np.divide(gap, spread, out=np.zeros_like(gap), where=(spread > 0) & described[:, None])
        between = (gap**2 / np.maximum(group_sizes, 1.0)[:, None]).sum()
        return group, z, float(between / max(total * variance.sum(), 1e-30))

    group, z, explained = deal(first)
    random = np.random.default_rng(0)
    dealt = [deal(random.permutation(first))[1:] for _ in range(_SHUFFLES)]
    largest = np.array([np.abs(other).max() for other, _ in dealt])
    shares = np.array([share for _, share in dealt])
    present = np.bincount(first[features.user] * size + features.feature, minlength=num_experts * size)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = group / group_sizes[:, None] / mean
    return Contrast(
        features.names,
        lift,
        z,
        present.reshape(num_experts, size),
        mean,
        threshold=float(np.quantile(largest, 0.95)),
        explained=explained,
        by_chance=float(shares.mean()),
        p_value=float((1 + (shares >= explained).sum()) / (1 + _SHUFFLES)),
    )
