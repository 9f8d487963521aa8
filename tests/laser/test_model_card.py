"""The card of a saved model: whatever the ids and names are, its code is code and its text is text."""

import ast
import re
from types import SimpleNamespace
from typing import Any

import pytest

from laser_fast.laser.model_card import model_card


def contents(item: str) -> Any:
    """As much of a model as its card tells of."""
    mformer = SimpleNamespace(num_experts=1, top_k=1)
    config = SimpleNamespace(bituning=SimpleNamespace(prefix="none"), mformer=mformer)
    base = {"type": "bert\n# <b>", "num_layers": 2, "hidden_size": 16, "tokenizer": None}
    origin = SimpleNamespace(lm=SimpleNamespace(path="folder"), base=base, config=config, split_hash=None)
    encoder = SimpleNamespace(parameters=list, num_items=1, item_ids=[item], recommender=None)
    return SimpleNamespace(encoder=encoder, origin=origin)


@pytest.mark.parametrize("item", ["plain", 'a"]]) #', "a\n```\n# b", "\\", "\x1b\u202e\ud800", "Amélie 👩\u200d🚀"])
def test_the_code_names_the_item(item: str) -> None:
    card = str(model_card(contents(item)))
    card.encode("utf-8")
    assert "\x1b" not in card and "\u202e" not in card
    (code,) = re.findall(r"^```python\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    call = ast.parse(code).body[-1]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert ast.literal_eval(call.value.args[0]) == [[item]]


def test_names_are_text() -> None:
    card = str(model_card(contents("plain"), repo_id='me/"x', figures={"a | b": 0.5}))
    assert "a bert \\# &lt;b&gt;, 2 layers" in card
    assert "| a \\| b | 0.5000 |" in card
    assert 'from_pretrained("me/\\"x", llm=' in card
