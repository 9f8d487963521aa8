"""What to change when memory runs out, in the words of the configuration."""

from collections.abc import Callable

from laser_fast.config import LaserConfig
from laser_fast.lm.execution.execution import CHECKPOINTING
from laser_fast.models.token_budget import Explain, Shortage

Plan = Callable[[], str]
"""Tells what the memory plan of the run expected; called when memory ran out."""


def explain_shortage(config: LaserConfig, *, on_gpu: bool, plan: Plan | None = None) -> Explain:
    """The message of stage 2: what was needed, the settings to change in order, and what the plan said.

    Args:
        on_gpu: whether moving bytes to host memory saves any.
    """

    def explain(shortage: Shortage) -> str:
        settings = [_smaller_parts(config, shortage)]
        if not shortage.encoding:
            settings += _cheaper_backward(config, on_gpu)
        if on_gpu and config.lm.embedding_device != "cpu":
            settings.append('set lm.embedding_device to "cpu"')
        return f"training: {shortage}; {' or '.join(settings)}{_said(plan)}"

    return explain


def explain_pretraining_shortage(config: LaserConfig, plan: Plan | None = None) -> Explain:
    """The message of stage 1, which runs no language model and needs the whole batch at once."""
    setting = f"lower training.batch_size below {config.training.batch_size}"
    return lambda shortage: f"training: {shortage}; {setting}{_said(plan)}"


def explain_optimizer_shortage(eight_bit: bool, reason: str, plan: Plan | None = None) -> str:
    """The message for the optimizer's step, which needs the same memory however batches are split."""
    setting = "train fewer parameters (mformer.num_layers, mformer.width)"
    if not eight_bit:
        setting = f"set optimizer.eight_bit to true or {setting}"
    return f"training: memory must suffice for the optimizer's step, got {reason}; {setting}{_said(plan)}"


def _smaller_parts(config: LaserConfig, shortage: Shortage) -> str:
    if shortage.rows < 2:  # a row cannot be split
        return f"lower prompt.max_tokens below {config.prompt.max_tokens}"
    limit = config.training.micro_batch_tokens
    text = f"lower training.micro_batch_tokens to {shortage.halved} (now {'no limit' if limit is None else limit})"
    return text if config.training.halve_on_oom else f"{text} or set training.halve_on_oom to true"


def _cheaper_backward(config: LaserConfig, on_gpu: bool) -> list[str]:
    modes = CHECKPOINTING if on_gpu else CHECKPOINTING[:-1]
    now = CHECKPOINTING.index(config.execution.checkpointing)
    settings = []
    if now + 1 < len(modes):
        settings.append(f'set execution.checkpointing to "{modes[now + 1]}" (now "{modes[now]}")')
    if config.bituning.prefix == "mformer" and not config.execution.checkpoint_mformer:
        settings.append("set execution.checkpoint_mformer to true")
    return settings


def _said(plan: Plan | None) -> str:
    return "" if plan is None else f"; the plan said: {plan()}"
