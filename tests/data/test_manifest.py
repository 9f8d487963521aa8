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
        files={"items.parquet": "cd" * 32},
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
        ({"schema": 99}, "schema must be 1, got 99"),
        ({"extra": 1}, r"got unknown \['extra'\]"),
        ({"sources": [{"name": "x"}]}, "sources must hold name, sha256 and bytes"),
    ],
    ids=["schema", "unknown", "source"],
)
def test_other_content_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(json.dumps({**json.loads(example().to_json()), **change}))


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        Manifest.from_json("{")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        Manifest.from_json("[]")
