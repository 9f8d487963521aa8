"""How much memory a run needs, before it runs: `estimate_memory`.

Fixed bytes are counted from the shapes of everything that stays. Bytes of a step come from rehearsals without values
(`rehearsal`) of few layers and few rows: they are linear in layers, which are alike, and in rows, as nothing is padded.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from laser_fast.config import LaserConfig, OptimizerConfig, resolve_path
from laser_fast.laser.model import LaserModel
from laser_fast.lm.execution.execution import CHECKPOINTING
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.models.assembly import read_out_of
from laser_fast.planning.rehearsal import (
    Rehearsal,
    StepShape,
    batch_without_values,
    language_model_without_values,
    model_without_values,
    rehearse,
    rehearse_language_model,
    stored_bytes,
)
from laser_fast.planning.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30

_LAYERS = (3, 5)  # layers of the rehearsed models; the last layer differs from the others, the first may
_ROWS = (64, 192)  # enough for the language model to take most, as it does where memory is short
_USABLE = 0.95  # share of a card; the rest is lost between blocks of the allocator
_CONTEXT_BYTES = 600_000_000  # CUDA context and workspaces of cuBLAS
_ENOUGH_TOKENS = 2048  # in a micro-batch: with fewer, unpacking 4-bit weights takes over a seventh of the time


@dataclass(frozen=True)
class Line:
    """`base + per_token * tokens` bytes."""

    base: float
    per_token: float

    def at(self, tokens: float) -> float:
        """Bytes of so many packed tokens."""
        return self.base + self.per_token * tokens

    def of_share(self, share: float) -> "Line":
        """The same bytes by all tokens, where this line is by a share of them."""
        return Line(self.base, self.per_token * share)

    def __add__(self, other: "Line") -> "Line":
        return Line(self.base + other.base, self.per_token + other.per_token)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a micro-batch in one mode."""

    kept: Line  # what forward leaves for backward
    moments: tuple[Line, ...]  # one is the peak: backward of the users, or of the items with what users keep

    def peak(self, tokens: int) -> int:
        """Most bytes alive at once in a micro-batch of so many packed tokens."""
        return round(max(line.at(tokens) for line in self.moments))

    def largest(self, free_bytes: float) -> int:
        """Packed tokens whose peak is at most so many bytes."""
        return max(0, int(min((free_bytes - line.base) / line.per_token for line in self.moments)))


@dataclass(frozen=True)
class Proposal:
    """What to set so that a run fits."""

    checkpointing: str
    micro_batch_tokens: int  # a multiple of 64 where so many fit


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training run on one device."""

    fixed: dict[str, int]  # by purpose; alive all the time
    step: dict[str, StepBytes]  # by mode
    optimizer_step: int  # beside `fixed` while the optimizer updates
    checkpointing: str  # the mode of the configuration
    batch_tokens: int  # packed tokens of a whole batch
    row_tokens: float  # a user, its positive, and their virtual tokens
    workload: Workload

    @cached_property
    def fixed_bytes(self) -> int:
        """Sum of `fixed`."""
        return sum(self.fixed.values())

    def total(self, tokens: int, mode: str | None = None) -> int:
        """Most bytes alive at once with micro-batches of so many packed tokens; mode None = the configured one."""
        step = self.step[self.checkpointing if mode is None else mode]
        return self.fixed_bytes + max(step.peak(tokens), self.optimizer_step)

    def largest_micro_batch(self, budget_bytes: int, mode: str) -> int:
        """Packed tokens that fit into so many bytes; 0 if not even one row does."""
        step = self.step[mode]
        free = _USABLE * budget_bytes - self.fixed_bytes
        tokens = step.largest(free)
        return tokens if tokens >= self.row_tokens and free >= self.optimizer_step else 0

    def propose(self, budget_bytes: int) -> Proposal | None:
        """The cheapest mode that fits a whole batch or 2,048 tokens, else the one that fits most; None if none fits."""
        fits = {mode: self.largest_micro_batch(budget_bytes, mode) for mode in self.step}
        wanted = min(self.batch_tokens, _ENOUGH_TOKENS)
        useful = [mode for mode in CHECKPOINTING if fits.get(mode, 0) >= wanted]
        mode = useful[0] if useful else max(fits, key=lambda name: fits[name])
        tokens = fits[mode] // 64 * 64 or fits[mode]
        return Proposal(mode, tokens) if tokens else None


def estimate_memory(
    config: LaserConfig, workload: Workload | None = None, *, on_gpu: bool = True, modes: Iterable[str] = CHECKPOINTING
) -> MemoryPlan:
    """Bytes that training by this configuration needs, from shapes alone: no weight is read and no GPU is touched.

    Mixed precision, with which M-Former needs less, is not counted. A CUDA context is assumed to take 0.6 GB.

    Args:
        workload: None = `Workload.assumed`; `workload_of` measures one.
        modes: values of `execution.checkpointing`; those that the model does not have are left out.

    Raises:
        FileNotFoundError, ValueError: no such language model.
    """
    workload = Workload.assumed(config) if workload is None else workload
    shape = _shape(config)
    automatic = torch.bfloat16 if on_gpu else torch.float32
    dtype = automatic if config.lm.dtype == "auto" else getattr(torch, config.lm.dtype)
    one = _one_row(config, workload)
    whole = model_without_values(config, shape, dtype, one)
    virtual = whole.virtual_tokens(batch_without_values(one))
    items = 1 + one.num_negatives if one.workload.item_tokens else 0
    rows = _Rows(workload.user_tokens + virtual, items * (workload.item_tokens + virtual), items)
    others = _kept_by_others(config, shape, dtype, one, rows)
    step = {}
    for mode in modes:
        effective = "full" if mode == "offload" and not on_gpu else mode  # on a CPU everything is in host memory
        execution = config.execution.model_copy(update={"checkpointing": effective})
        try:
            step[mode] = _step_bytes(config.model_copy(update={"execution": execution}), shape, dtype, rows, others)
        except ValueError:  # a mode that this model does not have
            if mode == config.execution.checkpointing:
                raise
    trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * 4 for parameter in trained)
    return MemoryPlan(
        fixed=_fixed(config, whole, on_gpu),
        step=step,
        optimizer_step=gradients * (2 if on_gpu else 1),  # on a GPU all updates are computed before one is applied
        checkpointing=config.execution.checkpointing,
        batch_tokens=round(rows.tokens * config.training.batch_size),
        row_tokens=rows.tokens,
        workload=workload,
    )


def optimizer_bytes_per_parameter(config: OptimizerConfig) -> float:
    """Bytes of the optimizer's state for a trained parameter.

    8 for two moments in float32, 2.03 for two in 8 bits with a float32 scale for 256 values (bitsandbytes). Biases and
    norms, whose moments stay in 32 bits, are too small to count.
    """
    return 2 * (1 + 4 / 256) if config.eight_bit else 8.0


def _fixed(config: LaserConfig, model: LaserModel, on_gpu: bool) -> dict[str, int]:
    table: Any = model.lm.model.get_input_embeddings()
    table_bytes = stored_bytes(table)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    on_host = on_gpu and config.lm.embedding_device == "cpu"
    fixed = {
        "language model": stored_bytes(model.lm) - table_bytes,
        "token embeddings": 0 if on_host else table_bytes,
        "trained parameters": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "optimizer": round(count * optimizer_bytes_per_parameter(config.training.optimizer)),
        "item matrix": model.item_matrix.numel() * 4,
        **({} if model.text is None else {"text vectors": model.num_items * model.text.head.in_features * 4}),
    }
    return fixed | {"CUDA context": _CONTEXT_BYTES} if on_gpu else fixed


@dataclass(frozen=True)
class _Rows:
    """Packed tokens of one row, virtual ones included: its user and its `items` encoded items."""

    user: float
    item: float
    items: int

    @property
    def tokens(self) -> float:
        return self.user + self.item


def _kept_by_others(
    config: LaserConfig, shape: "PretrainedConfig", dtype: torch.dtype, one: StepShape, rows: _Rows
) -> Line:
    """What forward leaves outside the language model, mostly in M-Former."""
    shallow = with_layers(shape, min(_LAYERS[0], shape.get_text_config().num_hidden_layers))
    model = model_without_values(config, shallow, dtype, one)
    kept = []
    for count in _ROWS:
        whole = rehearse(model, replace(one, rows=count)).kept
        passes = [_rehearse_pass(config, model.lm, rows.user * count, count).kept]
        if rows.items:
            passes.append(_rehearse_pass(config, model.lm, rows.item * count, rows.items * count).kept)
        kept.append(float(whole - sum(passes)))
    return _line(kept, rows.tokens)


def _step_bytes(
    config: LaserConfig, shape: "PretrainedConfig", dtype: torch.dtype, rows: _Rows, others: Line
) -> StepBytes:
    """The language model in one mode, on top of what is kept elsewhere."""
    num_layers = shape.get_text_config().num_hidden_layers
    few = sorted({min(layers, num_layers) for layers in _LAYERS})
    found = []
    for layers in few:
        lm = language_model_without_values(config, with_layers(shape, layers), dtype)
        found.append([_rehearse_pass(config, lm, rows.user * count, count) for count in _ROWS])

    def line(name: str) -> Line:
        ends = []
        for low, high in zip(found[0], found[-1], strict=True):
            slope = (getattr(high, name) - getattr(low, name)) / max(1, few[-1] - few[0])
            ends.append(getattr(low, name) + slope * (num_layers - few[0]))
        return _line(ends, rows.user)

    kept, peak = line("kept"), line("peak")
    if not rows.item:
        return StepBytes(others + kept, (others + peak,))
    user, item = rows.user / rows.tokens, rows.item / rows.tokens
    kept_by_users = others + kept.of_share(user)
    moments = others + peak.of_share(user), kept_by_users + peak.of_share(item)
    return StepBytes(kept_by_users + kept.of_share(item), moments)


def _rehearse_pass(config: LaserConfig, lm: FrozenLM, tokens: float, sequences: int) -> Rehearsal:
    last_only = read_out_of(config.bituning, lm) == "suffix"
    return rehearse_language_model(lm, round(tokens), sequences, last_only=last_only)


def _line(values: list[float], tokens: float) -> Line:
    """The line through the bytes of `_ROWS` rows of so many tokens."""
    per_row = (values[1] - values[0]) / (_ROWS[1] - _ROWS[0])
    return Line(values[0] - per_row * _ROWS[0], per_row / tokens)


def with_layers(shape: "PretrainedConfig", num_layers: int) -> "PretrainedConfig":
    """The same architecture with fewer layers; settings listed by layer are cut to length."""
    shape = copy.deepcopy(shape)
    text = shape.get_text_config()
    before = text.num_hidden_layers
    text.num_hidden_layers = num_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:num_layers])
    return shape


def _one_row(config: LaserConfig, workload: Workload) -> StepShape:
    objective = config.objective
    encodes_items = objective.item_gradient == "positives" and not config.text.items_are_texts
    return StepShape(
        workload=workload if encodes_items else replace(workload, item_tokens=0.0),
        num_negatives=objective.num_negatives if encodes_items or objective.candidates == "sampled" else 0,
        text_history=config.text.max_history if config.text.residual else 0,
    )


def _shape(config: LaserConfig) -> "PretrainedConfig":
    from transformers import AutoConfig

    from laser_fast.lm.loading.random_models import random_config

    scheme, _, name = config.lm.path.partition(":")
    if scheme == "random":
        return random_config(name)
    return AutoConfig.from_pretrained(resolve_path(config.lm.path, "lm.path"), local_files_only=True)
