"""What the message of an out-of-memory error proposes, setting by setting."""

from typing import Any

import pytest

from laser_fast.config import LaserConfig, build_config
from laser_fast.models.token_budget import Shortage
from laser_fast.planning.shortages import explain_optimizer_shortage, explain_pretraining_shortage, explain_shortage

SHORT = Shortage(tokens=5001, rows=64, longest=90, reason="CUDA out of memory.", encoding=False)
ENCODING = Shortage(tokens=5001, rows=64, longest=90, reason="CUDA out of memory.", encoding=True)


def config_of(settings: dict[str, Any], **sections: dict[str, Any]) -> LaserConfig:
    return build_config(LaserConfig, {**settings, **{n: {**settings.get(n, {}), **s} for n, s in sections.items()}})


def test_on_a_gpu_all_settings_are_named_and_the_plan_is_quoted(tiny_settings: dict[str, Any]) -> None:
    explain = explain_shortage(config_of(tiny_settings), on_gpu=True, plan=lambda: "7.1 GiB of 8")
    assert explain(SHORT) == (
        "training: memory must suffice for a micro-batch of 5001 packed tokens (64 rows), got CUDA out of memory.; "
        "lower training.micro_batch_tokens to 2500 (now no limit) or set training.halve_on_oom to true or "
        'set execution.checkpointing to "mlp" (now "none") or set execution.checkpoint_mformer to true or '
        'set lm.embedding_device to "cpu"; '
        "the plan said: 7.1 GiB of 8"
    )
    assert explain(ENCODING) == (
        "training: memory must suffice to encode 5001 packed tokens (64 rows), got CUDA out of memory.; "
        "lower training.micro_batch_tokens to 2500 (now no limit) or set training.halve_on_oom to true or "
        'set lm.embedding_device to "cpu"; the plan said: 7.1 GiB of 8'
    )


@pytest.mark.parametrize(
    ("mode", "on_gpu", "proposed"),
    [("none", True, "mlp"), ("mlp", False, "full"), ("full", True, "offload"), ("full", False, None)],
)
def test_the_next_cheaper_mode_is_proposed(
    tiny_settings: dict[str, Any], mode: str, on_gpu: bool, proposed: str | None
) -> None:
    config = config_of(tiny_settings, execution={"checkpointing": mode})
    text = explain_shortage(config, on_gpu=on_gpu)(SHORT)
    if proposed is None:
        assert "checkpointing" not in text
    else:
        assert f'set execution.checkpointing to "{proposed}" (now "{mode}")' in text


def test_what_is_set_already_is_not_proposed(tiny_settings: dict[str, Any]) -> None:
    config = config_of(
        tiny_settings,
        training={"micro_batch_tokens": 6000, "halve_on_oom": True},
        execution={"checkpointing": "offload", "checkpoint_mformer": True},
        lm={"embedding_device": "cpu"},
    )
    text = explain_shortage(config, on_gpu=True)(SHORT)
    assert text.endswith("got CUDA out of memory.; lower training.micro_batch_tokens to 2500 (now 6000)")
    alone = Shortage(tokens=300, rows=1, longest=300, reason="CUDA out of memory.", encoding=False)
    assert explain_shortage(config, on_gpu=True)(alone) == (
        "training: memory must suffice for a micro-batch of 300 packed tokens (1 row), got CUDA out of memory.; "
        "lower prompt.max_tokens below 256"
    )


def test_where_no_split_helps_other_settings_are_named(tiny_settings: dict[str, Any]) -> None:
    config = config_of(tiny_settings)
    assert explain_pretraining_shortage(config)(SHORT).endswith("; lower training.batch_size below 16")
    assert explain_optimizer_shortage(False, "CUDA out of memory.", lambda: "enough") == (
        "training: memory must suffice for the optimizer's step, got CUDA out of memory.; set optimizer.eight_bit to "
        "true or train fewer parameters (mformer.num_layers, mformer.width); the plan said: enough"
    )
    assert "eight_bit" not in explain_optimizer_shortage(True, "CUDA out of memory.")
