"""A training step without values: the real code runs on the meta device, and the bytes it would hold are counted."""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laser_fast.config import LaserConfig
from laser_fast.data.batches import PackedBatch
from laser_fast.laser.model import LaserModel
from laser_fast.lm.frozen_lm import FrozenLM
from laser_fast.models.assembly import build_execution, laser_parts
from laser_fast.planning.workload import Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BLOCK_SIZE = 64  # 4-bit weights that share one 8-bit scale (bitsandbytes)
_NESTED_BLOCK_SIZE = 256  # 8-bit scales that share one 32-bit scale


@dataclass(frozen=True)
class StepShape:
    """One micro-batch: users and the items that are encoded with them."""

    workload: Workload  # `item_tokens` 0: no item is encoded
    num_negatives: int = 0  # drawn for each user
    text_history: int = 0  # most items of a user whose text vectors are read
    rows: int = 1


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of one step beside weights and optimizer."""

    kept: int  # alive between forward and backward
    peak: int  # most at any time, gradients of the trained parameters included


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that were made while it is active; `known` ones are left out."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._before = [tensor.untyped_storage() for tensor in known]  # held, so that no address is reused
        self._seen = {storage._cdata for storage in self._before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._unique2.default and args[0].is_meta:  # the most: no value occurs twice
            flat = torch.empty(args[0].numel(), dtype=args[0].dtype, device="meta")
            output: Any = flat, torch.empty(args[0].shape, dtype=torch.int64, device="meta"), torch.empty_like(flat)
        else:
            output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        address = storage._cdata
        if address not in self._seen:
            num_bytes = storage.nbytes()
            self._seen.add(address)
            self.live += num_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.live -= num_bytes


def model_without_values(
    config: LaserConfig, shape: "PretrainedConfig", dtype: torch.dtype, step: StepShape
) -> LaserModel:
    """The model that this configuration trains, on the meta device, around a language model of `shape`."""
    lm, num_items = language_model_without_values(config, shape, dtype), step.workload.num_items
    with torch.device("meta"):
        builder: Any = SimpleNamespace(num_items=num_items)
        recommender: Any = _StatesWithoutValues(num_items, step.workload.state_size)
        ids = cast(Any, range(num_items))
        model = LaserModel(**laser_parts(config, lm, builder, ids, recommender))
        model.item_matrix = torch.empty(num_items, lm.hidden_size)
        if model.text is not None:
            model.text.set_vectors(torch.empty(num_items, lm.hidden_size))
    return model.to("meta")


def language_model_without_values(config: LaserConfig, shape: "PretrainedConfig", dtype: torch.dtype) -> FrozenLM:
    """The frozen language model alone, on the meta device."""
    from transformers import AutoModel

    shape = copy.deepcopy(shape)
    packed = config.lm.quantization == "nf4" or getattr(shape, "quantization_config", None) is not None
    with torch.device("meta"):
        language_model = AutoModel.from_config(shape, dtype=dtype)
        if packed:
            for name, module in list(language_model.named_modules()):
                if type(module) is nn.Linear:
                    language_model.set_submodule(name, _PackedWithoutValues(module, dtype))
    return FrozenLM(language_model, build_execution(config.execution))


def rehearse(model: LaserModel, step: StepShape) -> Rehearsal:
    """Forward and backward of one micro-batch on the meta device."""
    batch = batch_without_values(step)
    with LiveBytes([*model.parameters(), *model.buffers(), *_tensors_of(batch)]) as bytes_:
        loss = model(batch).loss
        kept = bytes_.live
        loss.backward()
    model.zero_grad()
    return Rehearsal(kept, bytes_.peak)


def rehearse_language_model(lm: FrozenLM, tokens: int, sequences: int, *, last_only: bool) -> Rehearsal:
    """Forward and backward of the language model alone on the meta device; see `FrozenLM.forward`."""
    with torch.device("meta"):
        embeds = torch.empty(tokens, lm.hidden_size, dtype=lm.dtype, requires_grad=True)
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32)
    with LiveBytes([*lm.parameters(), *lm.buffers(), embeds, cu_seqlens]) as bytes_:
        # as in training, the input of the model is not a leaf
        states = lm(embeds * 1.0, cu_seqlens, last_only=last_only)
        kept = bytes_.live
        states.backward(torch.empty_like(states))
    return Rehearsal(kept, bytes_.peak)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in [*module.parameters(), *module.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


class _PackedWithoutValues(nn.Linear):
    """The bytes of a linear layer in NF4 with double quantisation."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.compute_dtype = dtype
        count = linear.in_features * linear.out_features
        codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        shape = torch.Size((linear.out_features, linear.in_features))
        self.weight.quant_state = SimpleNamespace(shape=shape, dtype=dtype)  # type: ignore[attr-defined]
        scales = -(-count // _BLOCK_SIZE)
        self.register_buffer("absmax", torch.empty(scales, dtype=torch.uint8, device="meta"))
        self.register_buffer("nested_absmax", torch.empty(-(-scales // _NESTED_BLOCK_SIZE), device="meta"))


class _StatesWithoutValues(nn.Module):
    """A recommender that gives states of the right shape."""

    def __init__(self, num_items: int, state_size: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.state_size = state_size

    def states(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[N], [B+1] -> [N, D_id]."""
        return torch.empty(items.shape[0], self.state_size, device=items.device)


def batch_without_values(step: StepShape) -> PackedBatch:
    """A training batch of this shape on the meta device."""
    rows, work = step.rows, step.workload
    users = _sequences(rows, work.user_tokens, work.history)
    more: dict[str, Any] = {"targets": _whole(rows)}
    if step.text_history:
        read = round(rows * min(work.history, step.text_history))
        more |= {"text_items": _whole(read), "text_cu_seqlens": users.cu_seqlens}
    if step.num_negatives:
        more["negatives"] = _whole(rows, step.num_negatives)
    if work.item_tokens:
        items = _sequences(rows * (1 + step.num_negatives), work.item_tokens, 1.0)
        if step.text_history:
            items = replace(items, text_items=items.items, text_cu_seqlens=items.cu_seqlens)
        more |= {"positives": items, "positive_targets": _whole(rows), "negative_places": more.get("negatives")}
    return replace(users, **more)


def _sequences(rows: int, tokens: float, history: float) -> PackedBatch:
    bounds = [_whole(rows + 1).int() for _ in range(2)]
    return PackedBatch(_whole(round(rows * history)), bounds[0], _whole(round(rows * tokens)), bounds[1])


def _whole(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _tensors_of(batch: PackedBatch) -> list[Tensor]:
    own = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    return own if batch.positives is None else own + _tensors_of(batch.positives)
