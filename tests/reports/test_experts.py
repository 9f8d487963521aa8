"""What experts do is told where it is there, and only there: planted differences are found, dealt ones are not."""

from itertools import combinations

import numpy as np
import pytest

from laser_fast.data.items import ItemTable
from laser_fast.data.sequences import PackedSequences
from laser_fast.reports.experts import (
    Categories,
    Contrast,
    Features,
    UserRouting,
    category_features,
    contrast,
    find_categories,
    item_features,
    item_titles,
)
from laser_fast.reports.experts_section import Contrasts, conclusion

GENRES = ["Action", "Drama", "Comedy", "Sci-Fi", "Horror", "War", "Crime", "Musical", "Western", "Mystery"]
TITLES = [f"film {index}" for index in range(40)]


def histories_of(first: np.ndarray, planted: float) -> PackedSequences:
    """Users with 8 of 40 items; those of expert 1 take items 0 to 4 with an extra probability."""
    random = np.random.default_rng(1)
    rows = []
    for expert in first:
        row = random.choice(40, 8, replace=False).tolist()
        if expert == 1 and random.random() < planted:
            row[:3] = random.choice(5, 3, replace=False).tolist()
        rows.append(row)
    return PackedSequences.from_lists(rows)


def routing_of(first: np.ndarray, histories: PackedSequences, num_experts: int = 3) -> UserRouting:
    second = (first + 1) % num_experts
    weight = np.tile([0.75, 0.25], (len(first), 1))
    return UserRouting(np.stack([first, second], axis=1), weight, num_experts, histories)


def test_shares_of_first_choices_and_of_weights() -> None:
    routing = routing_of(np.array([0, 0, 0, 1]), PackedSequences.from_lists([[0]] * 4))
    assert routing.first_share.tolist() == [0.75, 0.25, 0.0]
    assert routing.weight_share == pytest.approx([0.5625, 0.375, 0.0625])


def test_a_planted_difference_is_found_and_named() -> None:
    first = np.random.default_rng(0).integers(0, 2, 400)
    result = contrast(item_features(histories_of(first, 0.9), TITLES), first, 3)
    assert result is not None and result.p_value < 0.01
    assert result.explained > 2 * result.by_chance
    found = result.typical(1, 10)
    assert {one.name for one in found} == {f"film {index}" for index in range(5)}
    assert all(one.lift > 1.2 and one.users >= 5 for one in found)
    assert {one.name for one in result.typical(0, 10, more=False)} <= {f"film {index}" for index in range(5)}
    assert np.isnan(result.lift[2]).all() and not result.z[2].any()  # nobody's first choice
    told = conclusion(Contrasts(result, []), routing_of(first, histories_of(first, 0.9)))
    assert told.startswith("The experts") and "p ≤ 0.005" in told and "do not" not in told and "lean" not in told
    kinds = Categories("kind", ("planted", "other"), tuple((int(item >= 5),) for item in range(40)))
    by_kind = contrast(category_features(histories_of(first, 0.9), kinds), first, 3)
    assert by_kind is not None
    told = conclusion(Contrasts(result, [(kinds, by_kind)]), routing_of(first, histories_of(first, 0.9)))
    assert "those of expert 1 lean to other, those of expert 2 lean to planted" in told


def test_users_dealt_at_random_do_not_differ() -> None:
    first = np.random.default_rng(0).integers(0, 3, 400)
    histories = histories_of(first, 0.0)
    result = contrast(item_features(histories, TITLES), first, 3)
    assert result is not None and result.p_value > 0.05
    assert result.explained == pytest.approx(result.by_chance, rel=0.5)
    assert not any(result.typical(expert) for expert in range(3))
    told = conclusion(Contrasts(result, []), routing_of(first, histories))
    assert told.startswith("The experts do not differ in whom they serve") and "would be made up" in told


def test_few_users_say_nothing() -> None:
    first = np.array([0] * 30 + [1] * 19)
    assert contrast(item_features(histories_of(first, 1.0), TITLES, least_users=1), first, 2) is None
    nobody = Features((), np.zeros(0, int), np.zeros(0, int), np.zeros(0), 40)
    assert contrast(nobody, np.array([0, 1] * 20), 2) is None
    routing = routing_of(np.zeros(40, dtype=np.int64), PackedSequences.from_lists([[0]] * 40))
    assert conclusion(Contrasts(None, []), routing).startswith("Expert 1 is the first choice of 100% of the users")


def test_a_small_difference_is_called_small() -> None:
    first, shape = np.array([0, 1] * 50), (2, 1)
    small = Contrast(
        ("a",), np.ones(shape), np.zeros(shape), np.zeros(shape, int), np.ones(1), 3.0, 0.006, 0.002, 0.005
    )
    told = conclusion(Contrasts(small, []), routing_of(first, PackedSequences.from_lists([[0]] * 100)))
    assert told.startswith("The experts differ in whom they serve, but hardly")


def test_items_and_kinds_of_a_history() -> None:
    histories = PackedSequences.from_lists([[0, 1, 0], [], [1]])
    items = item_features(histories, ["a", "b"], least_users=2)
    assert items.names == ("b",) and items.user.tolist() == [0, 2]
    table = ItemTable(["x", "y"], {"title": ["a", "b"], "kind": ["red|big", "red"]})
    kinds = find_categories(
        ItemTable([str(i) for i in range(20)], {"title": ["t"] * 20, "kind": ["red|big", "red"] * 10})
    )
    features = category_features(histories, kinds[0])
    values = {
        (int(u), kinds[0].names[f]): v for u, f, v in zip(features.user, features.feature, features.value, strict=True)
    }
    assert values == {(0, "red"): 1.0, (0, "big"): pytest.approx(2 / 3), (2, "red"): 1.0}
    assert item_titles(table) == ["a", "b"]
    assert find_categories(ItemTable([str(i) for i in range(20)], {"title": ["red bolt", "saw"] * 10})) == []  # names


@pytest.mark.parametrize(
    ("field", "texts", "names"),
    [
        ("class", [" ".join(some) for some in combinations(GENRES, 3)], set(GENRES)),
        ("tags", ["war, love", "love", "peace and war, love"] * 10, {"war", "love", "peace and war"}),
        ("brand", ["Acme Tools", "Bolt & Nut"] * 10, {"Acme Tools", "Bolt & Nut"}),
        ("year", ["1994", "1997", "2001", ""] * 10, {"1990s", "2000s"}),
        ("empty", ["", "", "x"] * 10, None),
        ("text", [f"words of {index} that differ as in {index * 7}" for index in range(200)], None),
    ],
)
def test_which_fields_sort_items_into_kinds(field: str, texts: list[str], names: set[str] | None) -> None:
    items = ItemTable([str(index) for index in range(len(texts))], {"title": ["t"] * len(texts), field: texts})
    found = find_categories(items)
    assert [categories.field for categories in found] == ([] if names is None else [field])
    if names is not None:
        assert set(found[0].names) == names


def test_items_without_a_title_go_by_their_id() -> None:
    assert item_titles(ItemTable(["a", "b"], {"title": ["x" * 100, ""]})) == ["x" * 79 + "…", "item b"]
    assert item_titles(ItemTable(["a", "b"])) == ["a", "b"]
