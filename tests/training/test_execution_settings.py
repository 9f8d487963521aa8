"""Training with everything that saves memory learns what training without it learns."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from laser_fast.config import LaserConfig, build_config, load_config
from laser_fast.planning.plan import GIB, estimate_memory
from laser_fast.planning.workload import Workload
from laser_fast.training.train import train_laser

PRESETS = Path(__file__).resolve().parents[2] / "laser_fast" / "presets"
SAVING = {"checkpointing": "full", "checkpoint_mformer": True}
PLAIN = {"checkpointing": "none", "fused": False, "share_dequantization": False, "last_layer": "all"}


def losses(settings: dict[str, Any], folder: Path, **sections: Any) -> list[float]:
    """Mean training loss of every epoch of a run."""
    config = build_config(LaserConfig, settings | sections | {"output": str(folder)})
    train_laser(config, progress=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
def test_a_run_that_saves_memory_learns_the_same(tiny_settings: dict[str, Any], tiny_lm: Path, tmp_path: Path) -> None:
    lm = {"path": "random:llama-tiny", "tokenizer": str(tiny_lm), "quantization": "nf4", "dtype": "float32"}
    settings = tiny_settings | {"bituning": {"prefix_mode": "kv"}}
    settings["training"] = settings["training"] | {"pretrain": {"epochs": 0}}
    plain = losses(settings, tmp_path / "plain", lm=lm, execution=PLAIN)
    saving = losses(settings, tmp_path / "saving", lm=lm | {"embedding_device": "cpu"}, execution=SAVING)
    assert len(plain) == 3
    assert saving == pytest.approx(plain, rel=1e-3, abs=1e-4)


def test_an_8b_model_and_the_papers_mformer_fit_a_card_of_8_gb() -> None:
    """By the plan: at least 4,096 packed tokens, for prompts as long as those of MovieLens-100K and 20,000 items."""
    config = load_config(LaserConfig, PRESETS / "llm-8b.yaml")
    plan = estimate_memory(config, Workload(20_000, 95, 10, 10), modes=["full"])
    assert plan.largest_micro_batch(8 * GIB, "full") >= 4096
    proposal = plan.propose(8 * GIB)
    assert proposal is not None and proposal.checkpointing == "full"
