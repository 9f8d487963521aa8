"""Memory plans against arithmetic by hand, against full rehearsals, and against what the CPU's allocator hands out."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from laser_fast.config import LaserConfig, build_config
from laser_fast.data.batches import PackedBatch
from laser_fast.laser import LaserModel
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.lm.loading.language_model import load_model
from laser_fast.models.assembly import build_execution, laser_parts
from laser_fast.ops import cu_seqlens_from_lengths
from laser_fast.planning.plan import GIB, Line, MemoryPlan, Proposal, StepBytes, estimate_memory
from laser_fast.planning.plan_table import card_bytes, one_line, table, to_dict
from laser_fast.planning.workload import Workload, workload_of
from laser_fast.recommenders import SASRec

NUM_ITEMS = 500
PLAIN = {"mask_history": False, "popularity": False}


def settings(**sections: Any) -> LaserConfig:
    values: dict[str, Any] = {
        "data": "none",
        "recommender": "none",
        "output": "none",
        "lm": {"path": "random:llama-tiny"},
        "training": {},
        "mformer": {"width": 64, "num_layers": 2, "num_heads": 2, "num_queries": 4, "dropout": 0.0},
        "bituning": {"dropout": 0.0},
        "text": {"residual": False},
        "objective": PLAIN,
    }
    return build_config(LaserConfig, values | sections)


def llama(folder: Path, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> str:
    values = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 512,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return f"random:{folder}"


def packed(rows: int, tokens: int, history: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    return PackedBatch(
        torch.randint(0, NUM_ITEMS, (rows * history,), generator=generator),
        cu_seqlens_from_lengths(torch.full((rows,), history)),
        torch.randint(0, 500, (rows * tokens,), generator=generator),
        cu_seqlens_from_lengths(torch.full((rows,), tokens)),
    )


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that the CPU's allocator had handed out at once during a run, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install laser-fast[4bit])"
)
@pytest.mark.parametrize(
    ("sizes", "rows", "modes", "negatives", "residual"),
    [
        ((128, 384, 3, 4, 2), 16, ["none", "full"], 0, False),
        ((128, 384, 3, 4, 2), 8, ["full"], 3, False),
        ((256, 768, 6, 8, 2), 12, ["mlp"], 0, False),
        ((512, 1536, 4, 8, 8), 6, ["full"], 0, False),
        ((128, 384, 3, 4, 2), 16, ["none", "full"], 0, True),
        ((128, 384, 3, 4, 2), 8, ["full"], 3, True),
    ],
    ids=["width-128", "negatives", "width-256", "width-512", "defaults", "defaults-negatives"],
)
def test_the_plan_is_what_the_allocator_hands_out(
    sizes: tuple[int, ...], rows: int, modes: list[str], negatives: int, residual: bool, tmp_path: Path
) -> None:
    """Measured on the day this was written: between 2.3% too low and 3.5% too high."""
    lm = {"path": llama(tmp_path, *sizes), "quantization": "nf4", "dtype": "float32"}
    workload = Workload(NUM_ITEMS, user_tokens=59, item_tokens=27, history=10, state_size=32)
    for mode in modes:
        objective = {"num_negatives": negatives, "candidates": "sampled" if negatives else "catalog"}
        objective |= {} if residual else PLAIN
        text = {"residual": residual, "dropout": 0.0}
        config = settings(lm=lm, execution={"checkpointing": mode}, objective=objective, text=text)
        plan = estimate_memory(config, workload, on_gpu=False, modes=[mode])
        builder: Any = SimpleNamespace(num_items=NUM_ITEMS)
        recommender = SASRec(NUM_ITEMS, width=32, max_length=10, num_heads=2)
        frozen = FrozenLM(load_model(config.lm), build_execution(config.execution))
        ids = [str(index) for index in range(NUM_ITEMS)]
        model = LaserModel(**laser_parts(config, frozen, builder, ids, recommender)).train()
        model.item_matrix = torch.randn(NUM_ITEMS, sizes[0])
        batch = replace(packed(rows, 59, 10), targets=torch.arange(rows))
        places = rows + torch.arange(rows * negatives).view(rows, negatives)
        if negatives:
            batch = replace(batch, negatives=places)
        if residual:  # items are made of their texts, so that none are encoded
            assert model.text is not None
            model.text.set_vectors(torch.randn(NUM_ITEMS, sizes[0]))
            batch = replace(batch, text_items=batch.items, text_cu_seqlens=batch.cu_seqlens)
        else:
            positives = packed(rows * (1 + negatives), 27, 1)
            batch = replace(batch, positives=positives, positive_targets=torch.arange(rows))
            batch = replace(batch, negative_places=places) if negatives else batch
        peak = allocated_peak(lambda: model(batch).loss.backward())
        assert plan.step[mode].peak(round(plan.row_tokens * rows)) == pytest.approx(peak, rel=0.15)


def test_an_8b_model_needs_what_arithmetic_by_hand_says() -> None:
    config = settings(lm={"path": "random:llama-3-8b", "quantization": "nf4"})
    workload = Workload(1000, user_tokens=200, item_tokens=0, history=10)
    plan = estimate_memory(config, replace(workload, item_tokens=50), modes=["none", "full"])
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    norms = 65 * 4096 * 2
    assert plan.fixed["language model"] == pytest.approx(linears * (4 + 8 / 64 + 32 / 64 / 256) / 8 + norms, rel=1e-3)
    assert plan.fixed["token embeddings"] == 128_256 * 4096 * 2
    # a layer keeps two inputs of norms with a float32 each, q, k, v, the output and its sums, gate and up
    layer = 2 * (2 * 4096 + 4) + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 2 * 14336
    assert layer == 94_344
    per_token = {mode: plan.step[mode].kept.per_token for mode in plan.step}
    assert per_token["none"] - per_token["full"] == pytest.approx(31 * (layer - 2 * 4096), rel=0.001)


def test_few_layers_tell_what_many_hold(tmp_path: Path) -> None:
    """The plan looks at 3 and 5 layers; here it is asked about 3, 5 and 9 and must lie on one line."""
    kept, peaks = [], []
    for layers in (3, 5, 9):
        folder = tmp_path / str(layers)
        folder.mkdir()
        config = settings(lm={"path": llama(folder, 64, 160, layers, 4, 2)})
        plan = estimate_memory(config, Workload(100, 60, 30, 5), modes=["none"])
        kept.append(plan.step["none"].kept.per_token)
        peaks.append(plan.step["none"].peak(10_000))
    assert kept[2] == pytest.approx(kept[1] + 2 * (kept[1] - kept[0]))
    assert peaks[2] == pytest.approx(peaks[1] + 2 * (peaks[1] - peaks[0]), rel=1e-6)


def test_settings_that_save_memory_are_seen() -> None:
    def plan(**sections: Any) -> MemoryPlan:
        lm = {"path": "random:llama-tiny"} | sections.pop("lm", {})
        sections["mformer"] = {"width": 16, "num_layers": 1, "num_heads": 2, "num_queries": 2}
        return estimate_memory(settings(lm=lm, **sections), Workload(1000, 60, 30, 5), modes=["none"])

    plain = plan()
    assert plan(lm={"embedding_device": "cpu"}).fixed["token embeddings"] == 0 < plain.fixed["token embeddings"]
    eight = plan(training={"optimizer": {"eight_bit": True}})
    assert eight.fixed["optimizer"] / plain.fixed["optimizer"] == pytest.approx(2.03125 / 8, rel=1e-4)
    again = plan(execution={"checkpoint_mformer": True})
    assert again.step["none"].kept.per_token < plain.step["none"].kept.per_token
    linear = plan(bituning={"prefix": "linear"})
    assert linear.row_tokens == plain.row_tokens
    assert linear.step["none"].kept.per_token < plain.step["none"].kept.per_token
    alone = plan(objective={"item_gradient": "none", **PLAIN})
    assert alone.row_tokens < plain.row_tokens and len(alone.step["none"].moments) == 1
    on_cpu = estimate_memory(settings(), Workload(1000, 60, 30, 5), on_gpu=False, modes=["full", "offload"])
    assert "CUDA context" not in on_cpu.fixed
    assert on_cpu.step["full"] == on_cpu.step["offload"]  # the host is where everything lies already


def test_modes_that_a_model_does_not_have_are_left_out(tiny_lm: Path) -> None:
    config = settings(lm={"path": str(tiny_lm)})  # an encoder without gated MLPs
    assert set(estimate_memory(config, Workload(100, 20, 5, 3)).step) == {"none", "full", "offload"}
    asked = settings(lm={"path": str(tiny_lm)}, execution={"checkpointing": "mlp"})
    with pytest.raises(ValueError, match='checkpointing "mlp" needs gated MLPs'):
        estimate_memory(asked, Workload(100, 20, 5, 3))


def made_up(**step: tuple[float, float]) -> MemoryPlan:
    lines = {mode: StepBytes(Line(0, 1), (Line(*line), Line(0, 1))) for mode, line in step.items()}
    work = Workload(10, 60, 20, 5)
    return MemoryPlan({"all": GIB}, lines, 1000, "none", batch_tokens=100_000, row_tokens=100, workload=work)


def test_the_cheapest_mode_with_a_useful_micro_batch_is_proposed() -> None:
    plan = made_up(none=(0, 2e6), mlp=(1e6, 2e5), full=(5e6, 1e4))
    free = 0.95 * 8 * GIB - GIB
    assert plan.largest_micro_batch(8 * GIB, "none") == int(free / 2e6)
    assert plan.propose(8 * GIB) == Proposal("none", int(free / 2e6) // 64 * 64)  # 3,543 tokens
    assert plan.propose(4 * GIB) == Proposal("mlp", int((0.95 * 4 * GIB - GIB - 1e6) / 2e5) // 64 * 64)
    assert plan.propose(GIB) is None
    assert plan.total(1000) == GIB + 2_000_000_000
    assert plan.total(0) == GIB + 1000  # the optimizer's step
    little = replace(plan, batch_tokens=300)
    assert little.propose(2 * GIB) == Proposal("none", int((0.95 * 2 * GIB - GIB) / 2e6) // 64 * 64)
    few = made_up(none=(0, 1e7), full=(0, 1e6))
    assert few.propose(2 * GIB).checkpointing == "full"  # type: ignore[union-attr]  # too few tokens in either


@pytest.mark.parametrize(("size", "expected"), [("8GB", 8 * GIB), ("7.5gib", 7.5 * GIB), ("24GB", 24 * GIB)])
def test_cards_are_named_as_they_are_sold(size: str, expected: float) -> None:
    assert card_bytes(size) == expected


@pytest.mark.parametrize("size", ["8", "GB", "-1GB", "manyGB", "nanGB"])
def test_other_sizes_are_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"plan: --gpu must be a size like 8GB, got '{size}'"):
        card_bytes(size)


def test_the_data_tell_the_lengths(tiny_settings: dict[str, Any]) -> None:
    config = build_config(LaserConfig, tiny_settings)
    work = workload_of(config)
    assert work.measured and work.num_items > 1
    assert 0 < work.item_tokens < work.user_tokens < 4 * (work.item_tokens + 4)
    assert 1 <= work.history <= 4
    missing = build_config(LaserConfig, tiny_settings | {"data": "nowhere"})
    assert workload_of(missing) == Workload.assumed(missing)
    assert not workload_of(missing).measured


def test_a_plan_reads_as_a_table_a_line_and_a_dictionary(tiny_settings: dict[str, Any]) -> None:
    config = build_config(LaserConfig, tiny_settings)
    plan = estimate_memory(config, workload_of(config))
    text = table(plan, ["8GB"])
    assert "8GB: --set execution.checkpointing=none --set training.micro_batch_tokens=" in text
    assert "mean of the data" in text and "CUDA context" in text
    assert "does not fit" in table(plan, ["0.5GB"])
    values = to_dict(plan, ["8GB", "0.5GB"])
    assert json.loads(json.dumps(values))["proposals"]["0.5GB"] is None
    assert one_line(config, on_gpu=False).endswith("tokens of mean length")
    unknown = build_config(LaserConfig, tiny_settings | {"lm": {"path": "random:unknown"}})
    assert one_line(unknown, on_gpu=False).startswith("nothing, random_config: the shape must be")
