"""The manifest: to JSON and back, and what is refused."""

import json

import pytest

from laser_fast.data import Manifest, SourceFile


def example() -> Manifest:
    return Manifest(
        format="tables",
        tie_rule="hash:3",
        sources=(SourceFile("log.csv", "ab" * 32, 17),),
        filters={"min_rating": 3.0},
        options={"text_columns": ["title"]},
        counts={"users": 2},
        dataset_hash="ef" * 32,
    )


def test_json_round_trip() -> None:
    assert Manifest.from_json(example().to_json()) == example()


def test_recipe_is_what_decides_and_not_what_came_out() -> None:
    recipe = example().recipe()
    assert recipe["sources"] == [{"name": "log.csv", "sha256": "ab" * 32, "bytes": 17}]
    assert set(recipe) == {"schema", "format", "sources", "filters", "tie_rule", "options"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": 99}, "manifest.json must have schema 2, got 99; prepare the data set again"),
        ({"extra": 1}, "unknown key 'extra'"),
        (
            {"sources": [{"name": "x"}]},
            r"key 'sources\.0\.sha256' must be set, got nothing; key 'sources\.0\.bytes' must be set",
        ),
        (
            {"sources": [{"name": "x", "sha256": "", "bytes": -1}]},
            r"sources\.0\.bytes: Input should be greater than or equal to 0, got -1",
        ),
        ({"counts": {"users": "2"}}, r"counts\.users: Input should be a valid integer, got '2'"),
    ],
    ids=["schema", "unknown", "source", "size", "type"],
)
def test_other_content_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(json.dumps({**json.loads(example().to_json()), **change}))


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        Manifest.from_json("{")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        Manifest.from_json("[]")


@pytest.mark.parametrize("name", ["schema", "format", "options", "counts", "split_hash", "library_version"])
def test_no_key_can_be_left_out(name: str) -> None:
    values = json.loads(example().to_json())
    del values[name]
    with pytest.raises(
        ValueError, match=f"must have schema 2, got None|key '{name}' must be set|got none of \\['{name}'\\]"
    ):
        Manifest.from_json(json.dumps(values))
