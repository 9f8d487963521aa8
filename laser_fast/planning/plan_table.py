"""Memory plans as words, as a table and as JSON."""

from collections.abc import Sequence

from laser_fast.config import LaserConfig
from laser_fast.lm.execution.execution import CHECKPOINTING
from laser_fast.planning.plan import GIB, MemoryPlan, estimate_memory
from laser_fast.planning.workload import workload_of

_SHOWN_TOKENS = 4096


def one_line(config: LaserConfig, *, on_gpu: bool) -> str:
    """The plan in the configured mode, for the message of an error."""
    mode = config.execution.checkpointing
    try:
        plan = estimate_memory(config, workload_of(config), on_gpu=on_gpu, modes=[mode])
    except (RuntimeError, ValueError, OSError) as error:  # an error about memory must not be lost in another
        return f"nothing, {error}"
    tokens = min(plan.batch_tokens, config.training.micro_batch_tokens or plan.batch_tokens)
    per_token = plan.step[mode].moments[-1].per_token
    return (
        f"{_gib(plan.fixed_bytes)} fixed and {per_token / 1e6:.2f} MB a packed token, "
        f"{_gib(plan.total(tokens))} in all with {tokens} tokens of mean length"
    )


def table(plan: MemoryPlan, cards: Sequence[str]) -> str:
    """The plan for people: what is fixed, what a step takes in each mode, and what to set on cards such as "8GB"."""
    work = plan.workload
    source = "mean of the data" if work.measured else "assumed: the longest the configuration allows"
    lines = [
        f"a row: {plan.row_tokens:.0f} packed tokens ({work.user_tokens:.0f} of the user, {work.item_tokens:.0f} of "
        f"an item, the rest virtual; {source}), {work.num_items} items",
        f"a batch: {plan.batch_tokens} packed tokens",
        "",
        f"fixed: {_gib(plan.fixed_bytes)}",
        *(f"  {name:<20}{_gib(size):>12}" for name, size in plan.fixed.items()),
        "",
        f"{'checkpointing':<14}{'kept a token':>16}{f'peak at {_SHOWN_TOKENS}':>16}"
        + "".join(f"{card:>10}" for card in cards),
    ]
    on_items = "" if work.measured else "; the catalogue is assumed, --items N says how large it is"
    budgets = {card: card_bytes(card) for card in cards}
    for mode in (mode for mode in CHECKPOINTING if mode in plan.step):
        step = plan.step[mode]
        fits = "".join(f"{plan.largest_micro_batch(size, mode):>10}" for size in budgets.values())
        kept = f"{step.kept.per_token / 1e6:.3f} MB"
        lines.append(f"{mode:<14}{kept:>16}{_gib(plan.total(_SHOWN_TOKENS, mode)):>16}{fits}")
    lines.append("(under a card: packed tokens of a micro-batch that fit, 0 = not one row)")
    for card, size in budgets.items():
        proposal = plan.propose(size)
        if proposal is None:
            least = min(plan.total(round(plan.row_tokens), mode) for mode in plan.step)
            lines.append(
                f"{card}: does not fit, one row needs {_gib(least)}; lm.quantization, lm.embedding_device and "
                f"training.optimizer.eight_bit lower what is fixed{on_items}"
            )
        else:
            lines.append(
                f"{card}: --set execution.checkpointing={proposal.checkpointing} "
                f"--set training.micro_batch_tokens={proposal.micro_batch_tokens}"
            )
    return "\n".join(lines)


def to_dict(plan: MemoryPlan, cards: Sequence[str]) -> dict[str, object]:
    """The plan for programs: bytes and tokens."""
    budgets = {card: card_bytes(card) for card in cards}
    proposals = {card: plan.propose(size) for card, size in budgets.items()}
    return {
        "fixed_bytes": plan.fixed,
        "step": {
            mode: {"kept_bytes_per_token": step.kept.per_token, "peak_bytes": plan.total(_SHOWN_TOKENS, mode)}
            for mode, step in plan.step.items()
        },
        "peak_at_tokens": _SHOWN_TOKENS,
        "row_tokens": plan.row_tokens,
        "batch_tokens": plan.batch_tokens,
        "workload": vars(plan.workload),
        "largest_micro_batch": {
            card: {mode: plan.largest_micro_batch(size, mode) for mode in plan.step} for card, size in budgets.items()
        },
        "proposals": {card: None if found is None else vars(found) for card, found in proposals.items()},
    }


def card_bytes(size: str) -> int:
    """Bytes of a card as it is sold: "8GB" has 8 GiB."""
    number = size.upper().removesuffix("GIB").removesuffix("GB")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if number == size.upper() or not 0 < value < 10_000:
        raise ValueError(f"plan: --gpu must be a size like 8GB, got {size!r}")
    return round(value * GIB)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
