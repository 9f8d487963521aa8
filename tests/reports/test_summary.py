"""The sentence of a report that says what was trained, for every writer of a prefix."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from laser_fast.config import BiTuningConfig
from laser_fast.reports.summary import _what_was_trained

SAID = {
    "mformer": "M-Former (4 experts, 2 for each user, 3 virtual tokens) writes what an ID-based recommender knows",
    "linear": "a linear map writes what an ID-based recommender knows about the user in front of the text",
    "shared": "one learned text of virtual tokens, the same for everybody, stands in front of the text",
    "none": "nothing stands in front of the text",
}


@pytest.mark.parametrize("prefix", get_args(BiTuningConfig.model_fields["prefix"].annotation))
def test_every_writer_of_a_prefix_is_named(prefix: str) -> None:
    mformer = {"num_experts": 4, "top_k": 2, "num_queries": 3}
    config = {"lm": {"path": "package:minilm/model"}, "bituning": {"prefix": prefix}, "mformer": mformer}
    record: Any = SimpleNamespace(config=config)
    said = _what_was_trained(record, None)
    assert said.startswith("Laser, a recommender around the frozen language model minilm; ")
    assert SAID[prefix] in said
