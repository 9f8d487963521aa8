"""Runs in stages, as the tests of what stops and goes on compare them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

_TIMES = ("time_s", "text_tokens_per_s")


@pytest.fixture(scope="session")
def staged_settings(tiny_lm: Path, tiny_data: Path, tiny_recommender: Path) -> dict[str, Any]:
    """A run with dropout, micro-batches, negatives and all stages, of 12 steps; the output is still to be set."""
    stage = {"epochs": 2, "rows_per_epoch": 24}
    return {
        "data": str(tiny_data),
        "recommender": str(tiny_recommender),
        "output": "",
        "lm": {"path": str(tiny_lm)},
        "prompt": {"user_template": "{history}", "separator": ",", "max_items": 4},
        "mformer": {"width": 16, "num_layers": 2, "num_heads": 2, "num_experts": 3, "num_queries": 2, "max_history": 4},
        "bituning": {"readout": "suffix"},
        "text": {"residual": False},
        "objective": {"num_negatives": 1, "mask_history": False, "popularity": False},
        "training": {
            "batch_size": 16,
            "micro_batch_tokens": 160,
            "pretrain": stage,
            "phase_a": stage,
            "phase_b": stage,
            "optimizer": {"learning_rate": 0.03},
        },
        "evaluation": {"calibrate": False},
    }


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Two finished runs are one, bit by bit; where they kept their last state, up to that."""
    return _assert_same_run


def _newest_state(run: Path) -> Path:
    return max((run / "states").iterdir())


def _log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def _assert_same_run(run: Path, whole: Path) -> None:
    """The best checkpoint, the log, and where the last state is kept: parameters, moments, generators, position."""
    assert json.dumps(_log_of(run)) == json.dumps(_log_of(whole))  # every bit, and in one order
    for name in ("adapter.safetensors", "items.safetensors"):
        assert (run / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes(), name
    if not (run / "states").exists():
        return
    last, expected = (load_file(_newest_state(folder) / "tensors.safetensors") for folder in (run, whole))
    assert last.keys() == expected.keys()
    assert all(torch.equal(last[name], expected[name]) for name in expected)
    values = [json.loads((_newest_state(folder) / "values.json").read_text()) for folder in (run, whole)]
    for value in values:
        del value["position"]["log_bytes"], value["sums"]["counts"]["time_s"]
    assert values[0] == values[1]
