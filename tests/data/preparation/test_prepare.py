"""Preparing data sets: small sources written by hand, through the command's arguments where it has a say."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laser_fast.cli import prepare as command
from laser_fast.data import InteractionColumns, PrepareRequest, SequenceDataset, leave_one_out, prepare

LOG = "user_id,item_id,timestamp\nu2,c,5\nu1,a,3\nu2,a,5\nu1,b,1\nu2,b,4\nu1,c,3\n"
ITEMS = [
    {"item_id": "b", "title": "Boot, Das", "brand": " x&amp;y "},
    {"item_id": "a", "title": "Alien", "brand": None},
    {"item_id": "z", "title": "Never seen", "brand": "<b>z</b>"},
    {"item_id": "c", "title": "Cube", "brand": "NaN"},
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "log.csv").write_text(LOG)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return folder


@pytest.fixture
def request_(sources: Path) -> PrepareRequest:
    return PrepareRequest(sources.parent / "out", interactions=sources / "log.csv", items=sources / "items.jsonl")


def named_sequences(dataset: SequenceDataset) -> dict[str, list[str]]:
    return {
        user: [dataset.items.ids[item] for item in dataset.sequence(index)]
        for index, user in enumerate(dataset.user_ids)
    }


def request_of(*arguments: object) -> PrepareRequest:
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    return command.request_of(parser.parse_args([str(argument) for argument in arguments]))


def test_tables_by_hand(request_: PrepareRequest) -> None:
    dataset = prepare(request_)
    assert dataset.items.ids == ["b", "a", "z", "c"]  # the order of the item file, unused items kept
    assert dataset.items.fields == {
        "title": ["Boot, Das", "Alien", "Never seen", "Cube"],  # no year column: not taken for films
        "brand": ["x&y", "", "z", ""],
    }
    assert dataset.user_ids == ["u2", "u1"]  # by first appearance
    # ties in the order of the file: u2 has c before a at time 5, u1 has a before c at time 3
    assert named_sequences(dataset) == {"u2": ["b", "c", "a"], "u1": ["b", "a", "c"]}
    assert dataset.timestamps.tolist() == [4, 5, 5, 1, 3, 3]


def test_manifest_says_how_it_was_made(request_: PrepareRequest) -> None:
    dataset = prepare(request_)
    manifest = dataset.manifest
    assert manifest.split_hash == leave_one_out(dataset).hash
    assert manifest.dataset_hash == dataset.hash()
    assert [source.name for source in manifest.sources] == ["log.csv", "items.jsonl"]
    assert manifest.sources[0].bytes == len(LOG)
    assert manifest.tie_rule == "file-order"
    assert manifest.options["text_columns"] == ["title", "brand"]
    assert manifest.counts == {
        "users": 2,
        "items": 4,
        "items_in_sequences": 3,
        "interactions": 6,
        "tied_interactions": 4,
        "users_with_last_two_tied": 2,
        "dropped_core": 0,
        "dropped_low_rating": 0,
        "dropped_unknown_item": 0,
    }
    assert str(request_.out.parent) not in manifest.to_json()


def test_hashed_ties_do_not_depend_on_the_order_of_the_file(request_: PrepareRequest, sources: Path) -> None:
    hashed = replace(request_, tie_rule="hash:0")
    first = named_sequences(prepare(hashed))
    header, *rows = LOG.splitlines()
    (sources / "log.csv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert named_sequences(prepare(replace(hashed, out=request_.out.with_name("reversed")))) == first
    other = {
        seed: named_sequences(prepare(replace(hashed, out=request_.out.with_name(f"s{seed}"), tie_rule=f"hash:{seed}")))
        for seed in range(1, 6)
    }
    assert any(sequences != first for sequences in other.values())


def test_the_tie_rule_is_part_of_the_split(request_: PrepareRequest) -> None:
    by_file = leave_one_out(prepare(request_))
    by_hash = leave_one_out(prepare(replace(request_, out=request_.out.with_name("h"), tie_rule="hash:0")))
    assert by_hash.rule == "leave-one-out, ties by hash:0"
    assert by_hash.hash != by_file.hash


def test_a_second_run_does_nothing_and_says_so(request_: PrepareRequest) -> None:
    said: list[str] = []
    prepare(request_, say=said.append)
    before = {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir()}
    dataset = prepare(request_, say=said.append)
    assert {path.name: path.stat().st_mtime_ns for path in request_.out.iterdir()} == before
    assert dataset.num_users == 2
    assert "2 users, 4 items (3 in sequences), 6 interactions" in said[0]
    assert said[0].endswith(f"wrote {request_.out}")
    assert said[1].endswith("is up to date: same sources, same settings; nothing written")


def test_another_recipe_needs_overwrite(request_: PrepareRequest, sources: Path) -> None:
    prepare(request_)
    changed = replace(request_, tie_rule="hash:1")
    with pytest.raises(FileExistsError, match="it was prepared with other tie_rule; use overwrite"):
        prepare(changed)
    assert prepare(replace(changed, overwrite=True)).manifest.tie_rule == "hash:1"
    (sources / "log.csv").write_text(LOG + "u3,a,1\n")
    with pytest.raises(FileExistsError, match="it was prepared with other sources; use overwrite"):
        prepare(changed)


def test_a_damaged_data_set_is_not_up_to_date(request_: PrepareRequest) -> None:
    prepare(request_)
    (request_.out / "item_index.npy").write_bytes(b"")
    with pytest.raises(
        FileExistsError, match=r"it is damaged .*item_index\.npy of .*out must be the file that was written"
    ):
        prepare(request_)
    assert prepare(replace(request_, overwrite=True)).num_users == 2


def test_a_bad_row_writes_nothing(request_: PrepareRequest, sources: Path) -> None:
    (sources / "log.csv").write_text(LOG + "u1,unheard,9\n")
    with pytest.raises(ValueError, match="got 'unheard' in line 8, column 'item_id'"):
        prepare(request_)
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["sources"]


def test_unknown_items_kept_have_empty_texts(request_: PrepareRequest, sources: Path) -> None:
    (sources / "log.csv").write_text(LOG + "u1,unheard,9\n")
    dataset = prepare(replace(request_, unknown_items="keep"))
    assert dataset.items.ids[-1] == "unheard"
    assert {name: column[-1] for name, column in dataset.items.fields.items()} == {"title": "", "brand": ""}
    assert named_sequences(dataset)["u1"][-1] == "unheard"


def test_catalogue_of_interacted_items_only(request_: PrepareRequest) -> None:
    dataset = prepare(replace(request_, catalogue="interacted"))
    assert dataset.items.ids == ["b", "a", "c"]
    assert dataset.items.field("title") == ["Boot, Das", "Alien", "Cube"]
    assert named_sequences(dataset) == {"u2": ["b", "c", "a"], "u1": ["b", "a", "c"]}


def test_filters_drop_users_and_say_how_much(request_: PrepareRequest, sources: Path) -> None:
    (sources / "log.csv").write_text(LOG.replace("u2,c,5\n", "u0,a,1\nu2,c,5\n"))
    dataset = prepare(replace(request_, min_user_interactions=2))
    assert dataset.user_ids == ["u2", "u1"]
    assert dataset.manifest.counts["dropped_core"] == 1
    with pytest.raises(ValueError, match="at least one interaction must be left, got none"):
        prepare(replace(request_, out=request_.out.with_name("none"), min_user_interactions=9))


def test_without_an_item_file_the_catalogue_is_the_log(request_: PrepareRequest) -> None:
    dataset = prepare(replace(request_, items=None))
    assert dataset.items.ids == ["c", "a", "b"]
    assert dataset.items.fields == {}
    with pytest.raises(ValueError, match="text columns need an item file"):
        prepare(replace(request_, items=None, title_column="title"))


def test_texts_can_be_left_as_they_are(request_: PrepareRequest) -> None:
    assert prepare(replace(request_, clean=False)).items.field("brand") == [" x&amp;y ", "", "<b>z</b>", "NaN"]


def recbole_folder(folder: Path, item_header: str = "item_id:token\tfilm_title:token_seq\trelease_year:token") -> Path:
    folder.mkdir()
    (folder / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t7\t5\t2\n1\t8\t1\t1\n"
    )
    (folder / "x.item").write_text(f"{item_header}\n8\tUsual Suspects, The\t1995\n7\tBoot, Das\t1981\n")
    (folder / "x.user").write_text("user_id:token\n1\n")
    return folder


def test_recbole_needs_no_options(tmp_path: Path) -> None:
    dataset = prepare(request_of(tmp_path / "out", "--recbole", recbole_folder(tmp_path / "x")))
    assert dataset.items.fields == {
        "title": ["The Usual Suspects (1995)", "Das Boot (1981)"],
        "release_year": ["1995", "1981"],
    }
    assert named_sequences(dataset) == {"1": ["8", "7"]}
    assert dataset.manifest.format == "recbole"


def test_recbole_without_a_year_leaves_titles_alone(tmp_path: Path) -> None:
    folder = recbole_folder(tmp_path / "x", "item_id:token\ttitle:token_seq\tprice:float")
    dataset = prepare(PrepareRequest(tmp_path / "out", recbole=folder))
    assert dataset.items.fields == {"title": ["Usual Suspects, The", "Boot, Das"]}  # a number is no text


def test_recbole_folders_must_be_clear(tmp_path: Path) -> None:
    folder = recbole_folder(tmp_path / "x")
    (folder / "y.inter").write_text("")
    with pytest.raises(ValueError, match=r"one \.inter and .* one \.item file, got \['x.inter', 'y.inter', 'x.item'\]"):
        prepare(PrepareRequest(tmp_path / "out", recbole=folder))
    with pytest.raises(FileNotFoundError, match="the RecBole source must be a folder"):
        prepare(PrepareRequest(tmp_path / "out", recbole=tmp_path / "nowhere"))


def test_arguments_of_tables(tmp_path: Path, sources: Path) -> None:
    (sources / "films.csv").write_text('asin,name,year,plot\nb,"Boot, Das",1981,sea\na,Alien,1979,space\nc,Cube,?,x\n')
    (sources / "views.csv").write_text("who,what,stars,when\nu,b,5,1\nu,a,2,2\nu,c,4,3\n")
    request = request_of(
        tmp_path / "out",
        *("--interactions", sources / "views.csv", "--items", sources / "films.csv"),
        *("--user-column", "who", "--item-column", "what", "--time-column", "when", "--rating-column", "stars"),
        *("--item-id-column", "asin", "--title-column", "name", "--year-column", "year", "--text-columns", "plot"),
        *("--min-rating", 3, "--tie-rule", "hash:2"),
    )
    dataset = prepare(request)
    assert dataset.items.fields == {"title": ["Das Boot (1981)", "Alien (1979)", "Cube"], "plot": ["sea", "space", "x"]}
    assert named_sequences(dataset) == {"u": ["b", "c"]}
    assert dataset.manifest.counts["dropped_low_rating"] == 1


def test_arguments_and_request_have_the_same_defaults(tmp_path: Path, sources: Path) -> None:
    made = request_of(tmp_path / "out", "--interactions", sources / "log.csv")
    assert made == PrepareRequest(tmp_path / "out", interactions=sources / "log.csv")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"interactions": None}, "exactly one of recbole, interactions, .* must be given, got None"),
        ({"recbole": Path("x")}, r"exactly one of .* must be given, got \['recbole', 'interactions'\]"),
        ({"interactions": None, "movielens": Path("x")}, "the source movielens brings its own item file, got .*items"),
        ({"duplicates": "some"}, "duplicates must be one of .*, got 'some'"),
        ({"max_history": 0}, "max_history must be at least 1, got 0"),
        ({"min_rating": float("nan")}, "min_rating must be a number, got nan"),
        ({"from_time": "9", "to_time": "2"}, "from_time must lie before to_time, got 9 and 2"),
        ({"to_time": "soon"}, "parse_time: a time must be a number or a date like 2015-12-31, got 'soon'"),
        ({"tie_rule": "random"}, "must be 'file-order' or 'hash:SEED', got 'random'"),
        ({"unknown_items": "ignore"}, "unknown_items must be one of .*, got 'ignore'"),
        ({"catalogue": "some"}, "catalogue must be one of .*, got 'some'"),
        ({"min_item_interactions": 0}, "min_item_interactions must be at least 1, got 0"),
        ({"year_column": "year"}, "a year column needs a title column, got 'year' alone"),
    ],
)
def test_bad_requests_are_refused(request_: PrepareRequest, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(request_, **change)  # type: ignore[arg-type]


def test_a_missing_source_and_a_title_from_two_columns(request_: PrepareRequest) -> None:
    with pytest.raises(FileNotFoundError, match=r"the source must be a file, got .*nothing"):
        prepare(replace(request_, items=Path("nothing.csv")))
    with pytest.raises(ValueError, match="the field 'title' would come from two columns, got 'brand' and 'title'"):
        prepare(replace(request_, title_column="brand"))
    columns = InteractionColumns(time="when")
    with pytest.raises(ValueError, match=r"log\.csv: unknown column, got 'when'; available: user_id, item_id"):
        prepare(replace(request_, columns=columns))


def test_a_longer_log_equals_a_sort_in_python(request_: PrepareRequest, sources: Path) -> None:
    rng = np.random.default_rng(0)
    users, items, times = rng.integers(0, 50, 5000), rng.integers(0, 3, 5000), rng.integers(0, 90, 5000)
    rows = [f"{user},{'abc'[item]},{time}" for user, item, time in zip(users, items, times, strict=True)]
    (sources / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    dataset = prepare(request_)
    expected: dict[str, list[str]] = {}
    for position in sorted(range(5000), key=lambda event: (times[event], event)):
        expected.setdefault(str(users[position]), []).append("abc"[items[position]])
    assert named_sequences(dataset) == expected
